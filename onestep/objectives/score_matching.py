"""Teacher score matching: a smaller student learns to denoise as the teacher does (Song et al. 2024, section 4.3).

It is the first stage of a student that is no copy of the teacher: what it ends at is the `--init` of any other method.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..methods.score_matching import ScoreMatchingConfig
from ..prediction import add_noise
from .base import Batch, Objective


class ScoreMatching(Objective):
    """E lambda_t |mu(x_t, t, c) - sg[mu_teacher(x_t, t, c)]|^2 at noised real samples x_t = alpha_t x + sigma_t eps."""

    Config = ScoreMatchingConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.schedule = self.teacher.denoiser.schedule

    @classmethod
    def uses_real(cls, config: ScoreMatchingConfig) -> bool:
        return True

    def players(self) -> Mapping[str, Sequence[nn.Module]]:
        return {"generator": [self.generator.denoiser]}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        if batch.real is None:
            raise ValueError("score matching looks at real samples: type --data with pictures")
        cond, uncond = self.teacher.encode(batch.conditions)
        loss = self.loss(batch.real, batch, cond, uncond)
        self.log["score"] = loss.detach()
        yield "generator", loss

    def loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """Mean over batch and elements; x are real samples, shape (B, ...).

        The difference is that of the network's outputs with the prediction's own weight, as in `Denoiser.loss`: in x0
        units lambda_t is alpha_t^2 / sigma_t^2 for epsilon, and 1 / c_out^2 for EDM (Karras et al. 2022).
        """
        student = self.generator.denoiser
        t = self.schedule.at(batch.rng.uniform(self.config.t_min, self.config.t_max))
        alpha_t, sigma_t = self.schedule(t, x)
        with torch.no_grad():
            x_t = add_noise(self.schedule, x, batch.rng.normal(x.shape[1:]).to(x.dtype), t)
            mu = self.teacher(x_t, t, cond, uncond, self.guidance)
            target = student.prediction.target(mu, (x_t - alpha_t * mu) / sigma_t, alpha_t, sigma_t)
        error = student.output(x_t, t, cond) - target
        return (student.prediction.weight(alpha_t, sigma_t) * error.square()).mean()
