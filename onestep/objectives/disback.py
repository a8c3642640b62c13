"""DisBack: Distribution Backtracking Builds a Faster Convergence Trajectory for Diffusion Distillation (Zhang et al. 2024,
arXiv 2408.15991)."""

from torch import Tensor

from ..denoiser import Cond
from ..methods.disback import DisBackConfig
from .base import Batch
from .score import ScoreDistillation, matching_loss, per_sample_weight


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
