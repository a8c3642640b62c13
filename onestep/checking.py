"""Whether a teacher is what it says, by numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from .data import Data
from .objectives.base import Batch
from .prediction import PREDICTIONS, EDMPreconditioned, Prediction, add_noise
from .rng import Rng
from .schedule import RectifiedFlow
from .teacher import Teacher, load_teacher
from .teacher.text import TextTeacher

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels, as fractions of the schedule."""
COUNT = 64
"""Real samples the errors are measured on; fewer of large pictures, which are many measurements each."""
CLEAR = 3.0
"""Another prediction type is named where its error is this many times smaller, and below half of the best linear guess."""


@dataclass
class Report:
    """Errors are E|x0_hat - x0|^2 / Var(x0), of shape (levels, candidates)."""

    candidates: list[str]
    errors: Tensor
    linear: Tensor
    """Error of the best linear guess from x_t, sigma^2 / (alpha^2 Var(x0) + sigma^2), shape (levels,)."""
    std: float
    """Standard deviation of x0."""

    def better(self, name: str) -> str | None:
        """The prediction type that explains the data clearly better than `name`, or None."""
        # noise levels at which the guesses can be told apart: at the ends all or none of x0 is in x_t
        own, best = self.errors[1:4].mean(0)[self.candidates.index(name)], self.errors[1:4].mean(0).min(0)
        clear = own > CLEAR * best.values and best.values < 0.5 * self.linear[1:4].mean()
        return self.candidates[int(best.indices)] if clear else None


def candidates_of(teacher: Teacher) -> dict[str, Prediction]:
    """What the network could predict, on its own kind of schedule."""
    own = teacher.denoiser.prediction
    if isinstance(own, EDMPreconditioned):
        return {own.name: own}
    flow = isinstance(teacher.denoiser.schedule, RectifiedFlow)
    return {name: each for name, each in PREDICTIONS.items() if flow or name != "flow_prediction"}


def samples(data: Data, teacher: Teacher) -> Batch:
    """Real samples to measure on: COUNT of pictures up to 64 pixels, at least 4."""
    count = max(4, min(COUNT, COUNT * 64**2 // teacher.resolution**2))
    return data.batch(0, count, 0, count, teacher.device)


@torch.no_grad()
def measure(teacher: Teacher, batch: Batch, levels: Sequence[float] = LEVELS) -> Report:
    """The denoiser's error on real samples under every prediction type; one pass of the network for each level."""
    assert batch.real is not None
    x_0, denoiser, candidates = batch.real.float(), teacher.denoiser, candidates_of(teacher)
    cond, _ = teacher.encode(batch.conditions)
    variance = x_0.var()
    errors, linear = [], []
    for level in levels:
        t = denoiser.schedule.at(torch.full((len(x_0),), level, device=x_0.device))
        x_t = add_noise(denoiser.schedule, x_0, batch.rng.normal(x_0.shape[1:]), t)
        alpha_t, sigma_t = denoiser.schedule(t, x_t)
        output = denoiser.output(x_t, t, cond)
        guesses = [each.to_x0(output, x_t, alpha_t, sigma_t) for each in candidates.values()]
        errors.append(torch.stack([(guess - x_0).square().mean() / variance for guess in guesses]))
        linear.append((sigma_t[0] ** 2 / (alpha_t[0] ** 2 * variance + sigma_t[0] ** 2)).flatten()[0])
    return Report(list(candidates), torch.stack(errors).cpu(), torch.stack(linear).cpu(), float(x_0.std()))


def require_prediction(teacher: Teacher, batch: Batch) -> None:
    """Raises ValueError where the data says that the network predicts something else than its scheduler claims."""
    own = teacher.denoiser.prediction.name
    better = measure(teacher, batch).better(own)
    if better:
        raise ValueError(
            f"the teacher's scheduler says prediction_type {own}, but on the data the network predicts {better}: set "
            f'"prediction_type": "{better}" in its scheduler/scheduler_config.json'
        )


def round_trip(teacher: Teacher) -> float:
    """Largest relative |to_x0(target(x0, eps)) - x0| over the levels, in float64: zero for consistent conversions."""
    rng = Rng(0, 0, 8)
    schedule, prediction = teacher.denoiser.schedule, teacher.denoiser.prediction
    worst = 0.0
    for level in LEVELS:
        x_0, eps = rng.normal((16,)).double(), rng.normal((16,)).double()
        t = schedule.at(torch.full((8,), level))
        alpha_t, sigma_t = schedule(t, x_0)
        back = prediction.to_x0(
            prediction.target(x_0, eps, alpha_t, sigma_t), add_noise(schedule, x_0, eps, t), alpha_t, sigma_t
        )
        worst = max(worst, float((back - x_0).abs().max() / x_0.abs().max()))
    return worst


def described(name: str, teacher: Teacher) -> str:
    """What was loaded, a line each."""
    network, denoiser = teacher.denoiser.network, teacher.denoiser
    units = ", ".join(f"{key} {value:g}" for key, value in teacher.latent_units().items() if value is not None)
    return "\n".join(
        (
            f"teacher     {name}: {type(teacher.pipeline).__name__} from {teacher.facts.source}",
            f"network     {type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters",
            f"prediction  {denoiser.prediction.name}; conversions round-trip to {round_trip(teacher):.1e}",
            f"schedule    {type(denoiser.schedule).__name__}, from {type(teacher.pipeline.scheduler).__name__}",
            f"x0          {tuple(teacher.shape)}{'; ' + units if units else ', pixels'}",
            f"pictures    {teacher.resolution} pixels; conditioned by {teacher.conditioned_by}",
            f"guidance    {teacher.facts.guidance:g}; licence: {teacher.facts.licence}",
        )
    )


def table(report: Report, own: str) -> str:
    """The errors as text, one row a noise level."""
    head = f"{'noise level':>12}{'best linear':>14}" + "".join(f"{name:>18}" for name in report.candidates)
    rows = [
        f"{level:>12g}{float(linear):>14.4f}" + "".join(f"{float(error):>18.4f}" for error in errors)
        for level, linear, errors in zip(LEVELS, report.linear, report.errors)
    ]
    note = f"relative error of x0 if the network predicts ...; its scheduler says {own}; std of x0 is {report.std:.3f}"
    return "\n".join((note, head, *rows))


@torch.no_grad()
def check(name: str, source: str | None, cache: Path, resolution: int | None, steps: int, picture: Path) -> bool:
    """Print what there is to know and save a sample; whether the teacher is right as far as can be told."""
    teacher = load_teacher(name, resolution=resolution)
    print(described(name, teacher))
    batch = None
    if source:
        data = Data.of(source, teacher, 0, cache)
        batch = samples(data, teacher)
    elif isinstance(teacher, TextTeacher):
        teacher.use_texts(teacher.prompts)
    rng = Rng(0, 0, min(4, teacher.classes) * 2, device=teacher.device)
    cond, uncond = teacher.encode(torch.arange(rng.total, device=teacher.device) // 2)
    x_0 = teacher.sample(rng.normal(teacher.shape), cond, uncond, teacher.facts.guidance, steps)
    save_image(teacher.to_images(x_0).float(), picture, nrow=4)
    print(f"sample      {picture}: {steps} steps; x0 has a standard deviation of {float(x_0.std()):.3f}")
    if batch is None or batch.real is None:
        print("no real pictures to measure on; type --data with a folder of them")
        return True
    report = measure(teacher, batch)
    own = teacher.denoiser.prediction.name
    print("\n" + table(report, own))
    return _verdict(report, own)


def _verdict(report: Report, own: str) -> bool:
    better = report.better(own)
    if better:
        print(
            f"\nWRONG: the network predicts {better}, and its scheduler says {own}. Correct the scheduler's prediction_type."
        )
    elif not 0.3 < report.std < 3:
        print(f"\nWRONG: x0 has a standard deviation of {report.std:.3f}, far from 1: check the VAE's scaling_factor")
    else:
        print("\nOK")
        return True
    return False
