"""Health of a run: student, teacher and critic from the same noise, in a picture and a few numbers.

The numbers compare with the teacher's many-step samples of a `Panel`; docs/health.md says how to read them.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import TrainConfig
from .denoiser import Denoiser
from .generator import Generator
from .grid import save_grid
from .panel import Panel, health_every, rows_in
from .prediction import add_noise
from .schedule import Schedule

RHO = 1.0
"""sigma/alpha at which teacher and critic see the student's samples: as much noise as signal."""
SHOWN = 3
"""Most pictures a condition and block."""
EDGE = 1.5 / 255
"""How near to 0 or 1 a pixel counts as at the end: it is 0, 1, 254 or 255 of a PNG."""


@dataclass(frozen=True)
class Sign:
    """A number that says collapse where it is below `least` or above `most`."""

    name: str
    meaning: str
    least: float = -math.inf
    most: float = math.inf
    patient: bool = True
    """Whether it has to be there at two checks in a row, and not better at the second: early students are blurred."""

    def excess(self, values: Mapping[str, float]) -> float:
        """How far the number is past its bound; 0 where it is not, or was not measured."""
        value = values.get(self.name)
        return 0.0 if value is None else max(0.0, self.least - value, value - self.most)


SIGNS = (
    Sign("finite", "samples are NaN or infinite", least=1.0, patient=False),
    Sign("diversity", "the samples of a condition are nearly alike", least=0.3),
    Sign("saturation", "far more pixels than of the teacher's are at the ends of the range", most=0.3),
    Sign("mean_drift", "the mean has left the teacher's by more than its standard deviation", most=1.0),
    Sign("std_drift", "the standard deviation is not half, or more than twice, the teacher's", most=math.log(2)),
)


def due(step: int, config: TrainConfig, last: bool) -> bool:
    """Whether this log line has a check: it is the first at or after a multiple of the steps between checks."""
    every, before = health_every(config), (step - 1) // config.log_every * config.log_every
    return every > 0 and (last or step % config.log_every == 0) and step // every > before // every


def diversity(x: Tensor, each: int) -> float:
    """Mean |x_i - x_j| over pairs i < j of a condition's samples and over conditions; `each` follow one another in x."""
    groups = x.double().flatten(1).split(each)
    return float(torch.cat([torch.pdist(group) for group in groups]).mean())


def drift(x: Tensor, reference: Tensor) -> dict[str, float]:
    """Of each channel (dimension 1) of x and reference, m and s being mean and standard deviation over all else:

    mean_drift: root mean square of (m - m_ref) / s_ref over channels. std_ratio: exp of the mean of ln(s / s_ref).
    std_drift: root mean square of ln(s / s_ref), which channels of opposite drift do not cancel in.
    """
    (mean, std), (mean_ref, std_ref) = (_channels(each) for each in (x, reference))
    shift = (mean - mean_ref) / std_ref
    log_ratio = (std / std_ref).clamp_min(1e-6).log()  # of a constant 0: numbers stay finite
    return {
        "mean_drift": float(shift.square().mean().sqrt()),
        "std_ratio": float(log_ratio.mean().exp()),
        "std_drift": float(log_ratio.square().mean().sqrt()),
    }


def _channels(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1, correction=0).clamp_min(1e-12)


def saturation(pictures: Tensor) -> float:
    """Fraction of the values of pictures in [0, 1] that are within EDGE of 0 or of 1."""
    return float(((pictures <= EDGE) | (pictures >= 1 - EDGE)).double().mean())


def balance(norms: Mapping[str, Iterable[Tensor]]) -> dict[str, float]:
    """gradient_<player>: the mean of its gradient norms before clipping. balance: the generator's over the critic's."""
    means = {name: float(torch.stack([*each]).double().mean()) for name, each in norms.items() if each}
    found = {f"gradient_{name}": mean for name, mean in means.items()}
    if means.get("critic"):
        found["balance"] = means.get("generator", 0.0) / means["critic"]
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Health:
    """Checks of one run on its panel. A check takes a pass of student, teacher (guided: two) and critic for each sample."""

    def __init__(self, config: TrainConfig, panel: Panel):
        self.panel, self.columns = panel, min(SHOWN, panel.each)
        self.teacher_title = f"teacher, {config.grid_steps} step{'s' * (config.grid_steps > 1)}"
        self.teacher_pictures = panel.first(panel.by_teacher, self.columns)
        self.reference = {"saturation": saturation(self.teacher_pictures), "diversity": diversity(panel.x_0, panel.each)}
        self.before: dict[str, float] = {}
        self.known: set[str] = set()

    def measure(self, student: Generator, critic: Denoiser | None, path: Path | None) -> dict[str, float]:
        """The numbers of the student as it is now, and the picture at `path`, if any. See docs/health.md for each.

        Where a sample is not finite, `finite` (the fraction that is) alone is measured.
        """
        start, panel = time.perf_counter(), self.panel
        x = panel.of(student).float()
        finite = float(x.flatten(1).isfinite().all(1).double().mean())
        if finite < 1:
            return {"finite": finite}
        shown = panel.pictures(x, self.columns)
        by_teacher = self._again(x, panel.teacher.denoiser.schedule, self._guided)
        few = len(student.times)
        blocks = [
            (self.teacher_title, self.teacher_pictures),
            (f"student, {few} step{'s' * (few > 1)}", shown),
            ("noised: teacher", panel.pictures(by_teacher, self.columns)),
        ]
        values = {
            "finite": finite,
            "diversity": diversity(x, panel.each) / max(self.reference["diversity"], 1e-12),
            "saturation": saturation(shown) - self.reference["saturation"],
            **drift(x, panel.x_0.float()),
        }
        if critic is not None:
            by_critic = self._again(x, critic.schedule, lambda x_t, t, of: critic(x_t, t, rows_in(panel.cond, of)))
            blocks.append(("noised: critic", panel.pictures(by_critic, self.columns)))
            values["critic_error"] = _error(by_critic, x) / max(_error(by_teacher, x), 1e-12)
        if path is not None:
            save_grid(path, blocks, self.columns)
        return values | {"seconds": time.perf_counter() - start}

    def _guided(self, x_t: Tensor, t: Tensor, of: slice) -> Tensor:
        panel = self.panel
        return panel.teacher(x_t, t, rows_in(panel.cond, of), panel.null(of), panel.guidance)

    @torch.no_grad()
    def _again(self, x: Tensor, schedule: Schedule, denoise: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
        """x0 estimates of the samples x noised to sigma/alpha = RHO, by denoise(x_t, t, rows); on the CPU."""
        here, panel = schedule.at_rho(RHO), self.panel

        def part(of: slice) -> Tensor:
            x_0 = x[of].to(panel.z)
            kind = torch.long if isinstance(here, int) else torch.promote_types(x_0.dtype, torch.float32)
            t = torch.full((len(x_0),), here, device=x_0.device, dtype=kind)
            return denoise(add_noise(schedule, x_0, panel.eps[of], t), t, of)

        return panel.parts(part)

    def collapse(self, values: Mapping[str, float]) -> str:
        """Why these numbers, after those of the check before, say that the student collapses; empty where they do not.

        What was said is said again only after the number has been within its bounds.
        """
        found = []
        for sign in SIGNS:
            now, then = sign.excess(values), sign.excess(self.before)
            if now == 0:
                self.known.discard(sign.name)
            elif sign.name not in self.known and (not sign.patient or now >= then > 0):
                bound = f"below {sign.least:.2g}" if values[sign.name] < sign.least else f"above {sign.most:.2g}"
                found.append(f"{sign.name} is {values[sign.name]:.2g}, {bound}: {sign.meaning}")
                self.known.add(sign.name)
        self.before = dict(values)
        return "; ".join(found)


def _error(estimate: Tensor, x: Tensor) -> float:
    return float((estimate - x).double().square().mean())


def told(reason: str, step: int, choice: str) -> str:
    """The line that tells of a collapse: `choice` is "warn" or "stop"."""
    picture = f"health/step-{step:08d}.png"
    if choice == "stop":
        return (
            f"stopping: the student seems to have collapsed at step {step}: {reason}; see {picture} and docs/health.md. "
            "To go on all the same, add --on-collapse warn; else train again with a smaller --lr in a new --output"
        )
    return f"warning: the student seems to have collapsed at step {step}: {reason}; see {picture} and docs/health.md"
