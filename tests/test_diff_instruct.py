"""Diff-Instruct against closed forms: its gradient, its order of updates, the law of its noise levels, passes."""

import contextlib
from typing import Any

import playing
import pytest
import torch
from gaussian import TYPES, Calls, ClosedFormTeacher, Gaussian, GridRng, denoiser, fixed_level, grid
from playing import LEVELS, MU, TAU, M, S, batch, dit, has_gradient, linear_vp, play
from torch import Tensor

from onestep.objectives import diff_instruct, score
from onestep.objectives.base import Batch
from onestep.objectives.diff_instruct import DiffInstruct, LogNormal
from onestep.objectives.score import matching_loss
from onestep.rng import Rng
from onestep.schedule import EDM, VP, RectifiedFlow, Schedule

KL = dict(zip(LEVELS, [(-0.44, -0.05268293), (-0.80145719, -0.21324803), (-1.0000538, -0.37767707)]))


def expected_gradient(monkeypatch: pytest.MonkeyPatch, level: str, kind: str, fake: tuple[float, float]) -> Any:
    """d/dmu, d/dtau of the generator's expected loss for x = MU + TAU z, by quadrature over (z, eps)."""
    schedule, _, _ = fixed_level(level)
    (z, eps), weights = grid(40, 2)

    def expected(x: Tensor, fake: Tensor, real: Tensor, weight: Any) -> Tensor:
        return matching_loss(x, fake, real, weight * weights * len(weights))

    monkeypatch.setattr(diff_instruct, "matching_loss", expected)
    method = playing.objective(DiffInstruct, ClosedFormTeacher(Gaussian(schedule, kind)), times=[0])
    method.fake = denoiser(Gaussian(schedule, kind, *fake))
    mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, TAU))
    cond, uncond = method.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    method.generator_loss(mu + tau * z, Batch(cond["class_labels"], None, GridRng([eps])), cond, uncond).backward()
    assert not any(has_gradient(method.fake)) and not any(has_gradient(method.teacher.denoiser))
    return float(mu.grad), float(tau.grad)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_is_the_kls_times_sigma_squared_over_alpha_squared(monkeypatch, level, kind):
    _, alpha, sigma = fixed_level(level)
    p, q = alpha**2 * TAU**2 + sigma**2, alpha**2 * S**2 + sigma**2
    exact = (alpha**2 * (MU - M) / q, alpha**2 * TAU * (1 / q - 1 / p))
    got = expected_gradient(monkeypatch, level, kind, (MU, TAU))
    assert got == pytest.approx([sigma**2 / alpha**2 * each for each in exact], abs=1e-10)
    assert got == pytest.approx([sigma**2 / alpha**2 * each for each in KL[level]], abs=2e-8)
    assert got != pytest.approx(KL[level], abs=1e-2)  # at none of these levels is the factor 1


def test_equal_denoisers_give_no_gradient(monkeypatch):
    assert expected_gradient(monkeypatch, "vp", "v_prediction", (M, S)) == (0.0, 0.0)


# --- noise levels


class Draws:
    """An Rng with these normal numbers, one an item."""

    def __init__(self, *values: float):
        self.values = torch.tensor(values, dtype=torch.float64)

    def normal(self, shape: Any) -> Tensor:
        assert tuple(shape) == ()
        return self.values


DRAWS = (-1.5, -0.4, 0.0, 0.7, 1.3)


@pytest.mark.parametrize("schedule", [EDM(), RectifiedFlow(), RectifiedFlow(shift=3.0), linear_vp()])
def test_log_normal_levels(schedule: Schedule):
    """ln(sigma/alpha) = mean + std n to what the table, or the schedule itself, resolves; on a flow t = sigmoid of that."""
    t = schedule.at(LogNormal(schedule, -1.2, 1.2, "cpu")(Draws(*DRAWS)))  # type: ignore[arg-type]
    alpha, sigma = schedule.coefficients(t)
    wanted = -1.2 + 1.2 * torch.tensor(DRAWS, dtype=torch.float64)
    resolved = 0.02 if isinstance(schedule, VP) else 1e-4
    torch.testing.assert_close((sigma / alpha).log(), wanted, atol=resolved, rtol=0)
    if isinstance(schedule, RectifiedFlow):
        torch.testing.assert_close(t.double(), wanted.sigmoid(), atol=1e-5, rtol=0)


def test_levels_out_of_reach_are_the_nearest():
    schedule = linear_vp()
    t = schedule.at(LogNormal(schedule, 0.0, 1.0, "cpu")(Draws(-50.0, 50.0)))  # type: ignore[arg-type]
    assert t.tolist() == [0, 999]


def test_both_losses_follow_the_law_and_the_generators_within_its_limits(monkeypatch):
    teacher = ClosedFormTeacher(Gaussian(EDM()))
    method = playing.objective(DiffInstruct, teacher, noise="log-normal", t_min=0.3, t_max=0.4)
    seen: dict[str, Tensor] = {}

    def of_fake(x_0: Tensor, cond: Any, rng: Rng, t: Tensor | None = None) -> Tensor:
        assert t is not None
        seen["critic"] = t
        return x_0.sum() * 0

    monkeypatch.setattr(method.fake, "loss", of_fake)
    x = torch.zeros(500, 1, dtype=torch.float64)
    item = Batch(torch.zeros(500, dtype=torch.long), None, Rng(0, 0, 500, dtype=torch.float64))
    cond, _ = teacher.encode(item.conditions)
    method.denoising(x, item, cond)
    x_t, seen["generator"] = method.noised(x, item)
    log = seen["critic"].double().log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.2) and float(log.std()) == pytest.approx(1.2, abs=0.15)
    low, high = method.schedule.at(torch.tensor([0.3, 0.4], dtype=torch.float64))
    assert seen["generator"].min() == pytest.approx(float(low)) and seen["generator"].max() == pytest.approx(float(high))
    assert float((x_t[:, 0] / seen["generator"]).std()) == pytest.approx(1, abs=0.1)  # x is 0


def test_without_the_law_levels_are_uniform_as_in_every_score_method():
    teacher = ClosedFormTeacher(Gaussian(linear_vp()))
    method = playing.objective(DiffInstruct, teacher)
    x, item = torch.zeros(4, 1, dtype=torch.float64), batch(teacher, size=4)
    plain = super(DiffInstruct, method).noised(x, Batch(item.conditions, None, Rng(11, 0, 4)))
    ours = method.noised(x, item)
    assert torch.equal(plain[0], ours[0]) and torch.equal(plain[1], ours[1])


# --- updates


def test_the_critic_first_and_each_on_samples_of_its_own(monkeypatch):
    teacher = dit()
    method = playing.objective(DiffInstruct, teacher, ratio=2)
    samples: list[Tensor] = []
    sample = method.sample
    monkeypatch.setattr(method, "sample", lambda *a, **k: samples.append(sample(*a, **k)) or samples[-1])
    orders = [play(method, step, batch(teacher, step)) for step in range(3)]
    assert orders == [["critic", "generator"], ["critic"], ["critic", "generator"]]
    assert [each.requires_grad for each in samples] == [False, True, False, False, True]
    assert not torch.equal(samples[0], samples[1])
    assert DiffInstruct.Config().ratio == 1 and not DiffInstruct.uses_real(DiffInstruct.Config())


@pytest.mark.parametrize("noise", ["uniform", "log-normal"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(guidance, noise):
    """Of one step, in batches: student 2 (one without gradient), critic 2 (one without), teacher 1 (2 guided)."""
    teacher = dit()
    method = playing.objective(DiffInstruct, teacher, guidance=guidance, noise=noise)
    calls = [Calls(each.network) for each in (method.generator.denoiser, teacher.denoiser, method.fake)]
    play(method, 0, batch(teacher, real=False))
    assert [each.finished for each in calls] == [4, 4 if guidance > 1 else 2, 4]
    assert [each.stopped for each in calls] == [0, 0, 0]


def turns_apart(method: DiffInstruct) -> dict[str, tuple[bool, bool]]:
    """Whose parameters (student's, critic's) have a gradient after each player's backward; the teacher's never."""
    found = {}
    for player, loss in method.step(batch(method.teacher), 0):
        loss.backward()
        found[player] = (any(has_gradient(method.generator)), any(has_gradient(method.fake)))
        playing.clear(method.generator, method.fake)
    assert not any(has_gradient(method.teacher.denoiser))
    return found


def test_no_players_loss_reaches_another():
    assert turns_apart(playing.objective(DiffInstruct, dit())) == {"critic": (False, True), "generator": (True, False)}


def test_the_leak_test_can_fail(monkeypatch):
    """Had the loss a graph through the critic, only `frozen` would keep its parameters out."""

    def with_graph(self: DiffInstruct, x: Tensor, item: Batch, cond: Any, uncond: Any) -> tuple[Tensor, Tensor]:
        x_t, t = self.noised(x, item)
        return self.fake(x_t, t, cond), self.real(x_t, t, cond, uncond)

    monkeypatch.setattr(DiffInstruct, "estimates", with_graph)
    monkeypatch.setattr(diff_instruct, "matching_loss", lambda x, fake, real, weight: ((fake - real) * x).mean())
    assert turns_apart(playing.objective(DiffInstruct, dit()))["generator"] == (True, False)
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    assert turns_apart(playing.objective(DiffInstruct, dit()))["generator"] == (True, True)
