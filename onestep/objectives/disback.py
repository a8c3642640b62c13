"""DisBack: Distribution Backtracking Builds a Faster Convergence Trajectory for Diffusion Distillation (Zhang et al. 2024,
arXiv 2408.15991)."""

from dataclasses import dataclass

from torch import Tensor

from ..config import option
from ..denoiser import Cond
from .base import Batch
from .score import ScoreConfig, ScoreDistillation, matching_loss, per_sample_weight


@dataclass
class DisBackConfig(ScoreConfig):
    """Options of DisBack: backtracking, which every score distillation method has, is on by default."""

    backtrack: int = option(200, "steps that first record the teacher's way to the student; 0 is off", minimum=0)


class DisBack(ScoreDistillation):
    """Score distillation by the gradient of the reverse KL divergence, without a GAN, to the recorded teachers in turn.

    One generator update and one critic update a step by default, on the same samples.
    """

    Config = DisBackConfig

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """1/2 mean (x - sg[x - g])^2 with g = (fake - real) / mean |x - real|, real the recorded teacher in force."""
        fake, real = self.estimates(x, batch, cond, uncond)
        loss = matching_loss(x, fake, real, per_sample_weight(x.detach(), real))
        self.log["matching"] = loss.detach()
        return loss
