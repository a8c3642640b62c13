"""HiPA: High-Frequency-Promoting Adaptation (Zhang & Hooi 2023, arXiv 2311.18158)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import option
from ..highpass import MASKS, edge_distance, spectral_distance
from .regression import Regression, RegressionConfig


@dataclass
class HiPAConfig(RegressionConfig):
    """Options of HiPA: those of the regression, whose distance is one of pictures here, and its high-frequency terms."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "student": "lora",
        "rank": 16,
        "targets": "to_q,to_k,to_v,to_out.0",
        "beta1": 0.9,
        "beta2": 0.999,
    }
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # the teacher's sampler begins at the most noise

    fourier: float = option(0.1, "weight of the high-passed pictures' distance; 0 is off", minimum=0.0)
    edge: float = option(0.001, "weight of the distance of Sobel edges; 0 is off", minimum=0.0)
    cutoff: float = option(0.125, "least high frequency, in cycles a pixel; 0.5 is the highest", above=0.0, below=0.5)
    mask: str = option("gaussian", "how the high pass begins", choices=tuple(MASKS))


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
