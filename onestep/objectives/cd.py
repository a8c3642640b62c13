"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2)."""

from torch import Tensor

from ..denoiser import Cond
from ..methods.cd import CDConfig
from ..rng import Rng
from ..trajectory import heun, jump
from .consistency import Consistency


class CD(Consistency):
    """The teacher leads along its probability-flow ODE, in one step: 1 (guided) pass of it with DDIM, 2 with Heun."""

    Config = CDConfig

    @property
    def gap(self) -> int:  # type: ignore[override]
        return self.config.skip

    def lead(
        self, x_t: Tensor, here: Tensor, there: Tensor, cond: Cond, uncond: Cond | None, guidance: Tensor | float, rng: Rng
    ) -> Tensor:
        x_0 = self.real(x_t, here, cond, uncond, guidance)
        start, end = self.grid.levels(here, x_t), self.grid.levels(there, x_t)
        if self.config.solver == "ddim":
            return jump(x_t, x_0, start, end)
        return heun(x_t, x_0, start, end, lambda x: self.real(x, there, cond, uncond, guidance))
