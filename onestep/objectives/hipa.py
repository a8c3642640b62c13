"""HiPA: High-Frequency-Promoting Adaptation (Zhang & Hooi 2023, arXiv 2311.18158)."""

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..highpass import edge_distance, spectral_distance
from ..methods.hipa import HiPAConfig
from .regression import Regression


class HiPA(Regression):
    """min_G E [d(x, y) + fourier |H x - H y|^2 + edge |E x - E y|^2] of the pictures of G(z) and of the teacher's sample.

    H is a high pass, E Sobel's derivatives; |.|^2 are means, of E summed over its directions. Gradients pass through the
    decoder, whose activations are recomputed with --gradient-checkpointing. By default the student is an adapter on the
    attention layers. Raises ValueError for a student of several steps.
    """

    Config = HiPAConfig
    one_step = True

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        c = self.config
        with torch.no_grad():
            target = self.teacher.decode(y)
        picture = self._decoded(x)
        loss = self.compare(picture, target)
        self.log["spatial"] = loss.detach()
        if c.fourier:
            high = spectral_distance(picture, target, c.cutoff * min(picture.shape[-2:]), c.mask)
            self.log["fourier"] = high.detach()
            loss = loss + c.fourier * high
        if c.edge:
            edge = edge_distance(picture, target)
            self.log["edge"] = edge.detach()
            loss = loss + c.edge * edge
        return loss

    def _decoded(self, x: Tensor) -> Tensor:
        if self.teacher.copies.checkpointing:
            return cast(Tensor, checkpoint(self.teacher.decode, x, use_reentrant=False))
        return self.teacher.decode(x)
