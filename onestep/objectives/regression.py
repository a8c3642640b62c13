"""Regression on teacher pairs: the warm start of a one-step student (DMD, Yin et al. 2023, section 3.2 and DMD2, appendix).

The student starts from noise and is regressed on what the teacher's deterministic sampler makes of the same noise.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import PairCache
from ..methods.regression import RegressionConfig
from ..teacher import Teacher
from .base import Batch, Objective


def l2(x: Tensor, y: Tensor) -> Tensor:
    """mean (x - y)^2 over batch and elements."""
    return F.mse_loss(x, y)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """mean over the batch of (sqrt(|x - y|^2 + c^2) - c) / sqrt(D), with D elements a sample (Song & Dhariwal 2023, eq. 8).

    Divided by sqrt(D) so that its gradient has the size of the mean absolute error's.
    """
    square = (x - y).flatten(1).square().sum(1)
    return ((square + c**2).sqrt() - c).mean() / math.sqrt(x[0].numel())


class Regression(Objective):
    """min_G E d(G(z), y_z) over pairs (z, y_z)."""

    Config = RegressionConfig
    one_step: ClassVar[bool] = False
    """Whether a student of several steps is refused, of which pairs teach the first alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, steps = self.config, len(self.generator.times)
        if self.one_step and steps > 1:
            raise ValueError(
                f"{type(self).__name__} would train the first of {steps} student steps alone; type --student-steps 1"
            )
        make = PERCEPTUAL.get(c.distance)
        self.perceptual = make(self.teacher.device) if make else None
        self.pairs = self.pairs_of(self.folder, self.teacher, self.guidance)

    def pairs_of(self, folder: Path, teacher: Teacher, guidance: float, **more: Any) -> PairCache:
        """The pairs that the options ask for, of that teacher; `more` is what else `PairCache` takes."""
        c = self.config
        how = {"half": c.pair_half, "sampler": c.pair_sampler, "batch": c.pair_batch}
        return PairCache(folder, teacher, c.pairs, c.pair_steps, guidance, **how, **more)

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        z, y, conditions = self.pairs.draw(batch.rng)
        loss = self.distance(self.generator.first(z, self.teacher.encode(conditions)[0]), y)
        self.log["regression"] = loss.detach()
        yield "generator", loss

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """d(x, y) of two batches in x0 units, shape (B, ...); y has no gradient."""
        if self.perceptual is None:
            return self.compare(x, y)
        with torch.no_grad():
            target = self.teacher.decode(y)
        return self.compare(self.teacher.decode(x), target)

    def compare(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance asked for, a mean over the batch: of pictures where it is perceptual, else of anything."""
        if self.perceptual is not None:
            return self.perceptual(x.float(), y.float()).mean()
        if self.config.distance == "l2":
            return l2(x, y)
        return pseudo_huber(x, y, self.config.huber or 0.00054 * math.sqrt(x[0].numel()))


def lpips_on(device: torch.device) -> nn.Module:
    """LPIPS on VGG features (Zhang et al. 2018). Raises ValueError where the package or its weights cannot be had."""
    try:
        from lpips import LPIPS

        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    except Exception as error:
        raise ValueError(
            f"LPIPS cannot be had: {error}. Type pip install lpips; its VGG weights are downloaded on first use. "
            "Or type --distance pseudo-huber"
        ) from error


class Dists(nn.Module):
    """DISTS (Ding et al. 2020) of pictures in [-1, 1], of one channel or three."""

    def __init__(self, metric: nn.Module):
        super().__init__()
        self.metric = metric

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (each.expand(-1, 3, -1, -1) / 2 + 0.5 for each in (x, y))
        return self.metric(x, y, require_grad=True)


def dists_on(device: torch.device) -> nn.Module:
    """DISTS on VGG features. Raises ValueError where the package or its weights cannot be had."""
    try:
        from DISTS_pytorch import DISTS

        return Dists(DISTS()).eval().requires_grad_(False).to(device)
    except Exception as error:
        raise ValueError(
            f"DISTS cannot be had: {error}. Type pip install dists-pytorch; its VGG weights are downloaded on first use. "
            "Or type --distance pseudo-huber"
        ) from error


PERCEPTUAL: dict[str, Callable[[torch.device], nn.Module]] = {"lpips": lpips_on, "dists": dists_on}
"""Distances of pictures, which the teacher's decoder makes of x0."""
