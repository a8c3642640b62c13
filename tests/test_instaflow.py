"""Rectified flow and InstaFlow against closed forms, the stages of a run, and a run that is killed while it makes pairs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Affine, Calls, ClosedForm, ClosedFormTeacher, Gaussian, Mixture, denoiser, grid
from playing import batch, dit, linear_vp, objective, play, zeros
from safetensors.torch import load_file
from torch import Tensor, nn

from onestep.config import resolve
from onestep.data import PairCache
from onestep.denoiser import Denoiser, unwrap
from onestep.flow import euler, flow_time, flow_velocity, straightness
from onestep.generator import Generator
from onestep.objectives import regression
from onestep.objectives.base import Batch
from onestep.objectives.instaflow import InstaFlow
from onestep.schedule import EDM, VP, RectifiedFlow, Schedule
from onestep.train import main

MEAN, STD = 1.3, 0.7
(Z,), WEIGHTS = grid(12, 1)
FLOW = RectifiedFlow()


def first(kind: str = "flow_prediction") -> Denoiser:
    """1-RF: v = mu + (tau s^2 - (1 - tau)) / (tau^2 s^2 + (1 - tau)^2) (x - tau mu), with the paper's tau = 1 - t."""
    return denoiser(Gaussian(FLOW, kind, MEAN, STD))


class Line(ClosedForm):
    """2-RF: v = mu + (s - 1) (x - tau mu) / ((1 - tau) + tau s), the field of the pairs (z, mu + s z)."""

    def __init__(self, schedule: Schedule, kind: str, mean: float = MEAN, std: float = STD):
        super().__init__(schedule, kind)
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (mean, std))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        t, x = sigma / (alpha + sigma), x_t / (alpha + sigma)
        v = self.mean + (self.std - 1) * (x - (1 - t) * self.mean) / (t + (1 - t) * self.std)
        return x + t * v  # x0 of a velocity


# --- the flow


def test_the_first_flow_is_curved_and_its_one_step_is_the_mean():
    x, _, _ = euler(first(), FLOW, Z, {}, 2000)
    assert torch.allclose(x, MEAN + STD * Z, atol=3e-3)
    one, _, _ = euler(first(), FLOW, Z, {}, 1)
    assert torch.allclose(one, torch.full_like(Z, MEAN), atol=1e-12)  # for every z: a blur


def test_the_second_flow_is_straight_and_its_one_step_exact():
    for steps in (1, 2, 7):
        x, velocities, _ = euler(denoiser(Line(FLOW, "flow_prediction")), FLOW, Z, {}, steps)
        assert torch.allclose(x, MEAN + STD * Z, atol=1e-12)
        assert torch.allclose(velocities, Z - x, atol=1e-12)  # noise less sample, all the way


def s_of(field: Denoiser, steps: int = 1000) -> float:
    """E over z: of affine fields it is a square of something affine in z, for which z = 1 and -1 are enough."""
    return float(straightness(field, field.schedule, torch.tensor([[1.0], [-1.0]], dtype=torch.float64), {}, steps))


def test_straightness_of_both():
    """int (s - 1 - (tau s^2 - (1 - tau)) / sqrt(tau^2 s^2 + (1 - tau)^2))^2 dtau = .3004 at s = .7, and 0."""
    tau = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    field = (tau * STD**2 - (1 - tau)) / (tau**2 * STD**2 + (1 - tau) ** 2).sqrt()
    integral = float((STD - 1 - field).square().mean())
    assert integral == pytest.approx(0.3004, abs=5e-5)
    assert s_of(first()) == pytest.approx(integral, abs=2e-3)
    assert s_of(denoiser(Line(FLOW, "flow_prediction")), 20) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("schedule", [linear_vp(), EDM(0.002, 80.0)], ids=lambda s: type(s).__name__)
def test_straightness_is_that_of_the_flow_whatever_the_schedule(schedule):
    """In X over tau both flows are the same ones on every schedule."""
    assert s_of(denoiser(Gaussian(schedule, "epsilon", MEAN, STD)), 1000) == pytest.approx(0.3004, abs=0.01)
    assert s_of(denoiser(Line(schedule, "epsilon")), 50) == pytest.approx(0, abs=1e-12)


def test_transport_cost():
    """E |x - z|^2 falls from 1 + s^2 + mu^2 of independent pairs to (s - 1)^2 + mu^2 of the flow's."""
    (z, other), weights = grid(12, 2)
    x, _, _ = euler(first(), FLOW, z, {}, 500)
    assert float((weights * (MEAN + STD * other - z) ** 2).sum()) == pytest.approx(1 + STD**2 + MEAN**2, rel=1e-9)
    assert float((weights * (x - z) ** 2).sum()) == pytest.approx((STD - 1) ** 2 + MEAN**2, rel=5e-3)


def cosine_vp(size: int) -> VP:
    """alpha = cos(pi t / 2) with t = (i + 1) / size at index i; the last, at t = 1, is left out."""
    t = torch.arange(1, size, dtype=torch.float64) / size
    return VP((math.pi / 2 * t).cos() ** 2)


@pytest.mark.parametrize("kind, size", [("epsilon", 5000), ("v_prediction", 1000), ("sample", 1000)])
def test_a_vp_teacher_is_a_flow_as_it_is(kind, size):
    """From a point at t = .7, Euler steps of dX/dtau end at the probability flow's x0, mu + s/sqrt(v) (x - alpha mu)."""
    schedule = cosine_vp(size)
    field = denoiser(Gaussian(schedule, kind, MEAN, STD))
    x_t = torch.tensor([[-0.7], [0.4], [1.9]], dtype=torch.float64)
    start = size * 7 // 10 - 1
    alpha, sigma = (float(c) for c in schedule.coefficients(torch.tensor([start])))
    x = x_t / (alpha + sigma)
    a, s = (each[: start + 1].tolist() for each in schedule.coefficients(torch.arange(size - 1)))
    for i in range(start, -1, -1):
        here, below = (a[i] + s[i]) * x, s[i - 1] / (a[i - 1] + s[i - 1]) if i else 0.0
        v = flow_velocity(here, field(here, torch.full((3,), i), {}), a[i], s[i])  # type: ignore[arg-type]
        x = x + (below - s[i] / (a[i] + s[i])) * v
    exact = MEAN + STD / math.sqrt(alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    assert torch.allclose(x, exact, atol=2 / size)


@pytest.mark.parametrize("schedule", [linear_vp(), EDM(), FLOW], ids=lambda s: type(s).__name__)
def test_times_by_tau(schedule):
    tau = torch.tensor([1e-9, 0.1, 0.35, 0.8, 0.97, 1.0], dtype=torch.float64)
    t = flow_time(schedule, tau)
    alpha, sigma = schedule.coefficients(t)
    got = sigma / (alpha + sigma)
    if isinstance(schedule, VP):
        table = (1 / schedule.alphas_cumprod - 1).sqrt()
        table = table / (1 + table)
        assert t.dtype == torch.long and (t[0], t[-1]) == (0, 999)
        assert all(abs(int(i) - int((table - want).abs().argmin())) <= 1 for i, want in zip(t, tau))
    else:
        assert got[1:-1].tolist() == pytest.approx(tau[1:-1].tolist(), rel=1e-9)
    assert float(got[0]) > 1e-6 and bool(got.isfinite().all())  # a velocity is read off at some noise
    assert flow_time(schedule, tau.float()).dtype in (torch.float32, torch.long)


# --- reflow and distillation


class Given:
    def __init__(self, z: Tensor, y: Tensor):
        self.z, self.y = z, y

    def draw(self, rng: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.z, self.y, zeros(len(self.z))


class Evenly:
    """Rng's interface: tau at the middles of as many equal parts as there are rows."""

    def __init__(self, rows: int):
        self.rows = rows

    def uniform(self) -> Tensor:
        return (torch.arange(self.rows, dtype=torch.float64) + 0.5) / self.rows


def method_on(student: Denoiser, pairs: Given, monkeypatch: pytest.MonkeyPatch, **options: Any) -> InstaFlow:
    monkeypatch.setattr(regression, "PairCache", lambda *args, **kwargs: pairs)
    teacher = ClosedFormTeacher(Gaussian(student.schedule, "epsilon", MEAN, STD))
    top = student.schedule.grid(1)
    method = objective(InstaFlow, teacher, times=top, **options)
    method.generator = Generator(student, top)
    return method


def every_pair(rows: int, taus: int, law: Any) -> Given:
    """`taus` copies of quantiles of N(0, 1), so that every one of them meets every tau."""
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)
    z = z.repeat(taus).view(-1, 1)
    return Given(z, law(z))


class EveryTau(Evenly):
    def uniform(self) -> Tensor:
        return super().uniform().repeat_interleave(self.each)

    def __init__(self, rows: int, each: int):
        super().__init__(rows)
        self.each = each


def reflow_loss(student: Denoiser, monkeypatch: pytest.MonkeyPatch, rows: int = 400, taus: int = 400) -> Tensor:
    method = method_on(student, every_pair(rows, taus, lambda z: MEAN + STD * z), monkeypatch)
    ((_, loss),) = method.step(Batch(zeros(1), None, EveryTau(taus, rows)), 0)  # type: ignore[arg-type]
    return loss


@pytest.mark.parametrize("schedule", [FLOW, linear_vp(), EDM()], ids=lambda s: type(s).__name__)
def test_the_loss_of_reflow(schedule, monkeypatch):
    """0 at the 2-RF field; at the 1-RF field int (k (tau s + 1 - tau) - (s - 1))^2 dtau, k the field's slope."""
    tau = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    k = (tau * STD**2 - (1 - tau)) / (tau**2 * STD**2 + (1 - tau) ** 2)
    golden = float((k * (tau * STD + 1 - tau) - (STD - 1)).square().mean())
    assert golden == pytest.approx(0.3996, abs=5e-5)
    kind = "flow_prediction" if schedule is FLOW else "epsilon"
    assert float(reflow_loss(denoiser(Line(schedule, kind)), monkeypatch).detach()) < 1e-20
    curved = reflow_loss(denoiser(Gaussian(schedule, kind, MEAN, STD)), monkeypatch)
    assert float(curved.detach()) == pytest.approx(golden, rel=0.02)


def test_reflow_learns_the_straight_flow(monkeypatch):
    """From another mean and spread; then S is 0 and a single Euler step exact."""
    student = Line(linear_vp(), "epsilon", mean=0.2, std=1.4)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reflow_loss(denoiser(student), monkeypatch, 50, 50)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (float(student.mean), float(student.std)) == (pytest.approx(MEAN, abs=1e-6), pytest.approx(STD, abs=1e-6))
    assert s_of(denoiser(student), 10) < 1e-9


@pytest.mark.parametrize("features", [False, True])
def test_distillation_is_exact_for_an_affine_student(features, monkeypatch):
    """The pairs' own map is the minimiser, of the squared error as of a fixed feature's, the stand-in for LPIPS."""
    student = Affine(FLOW, "flow_prediction")
    method = method_on(denoiser(student), every_pair(50, 1, lambda z: MEAN + STD * z), monkeypatch, rounds=0)
    if features:
        method.perceptual = Feature()
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ((_, loss),) = method.step(Batch(zeros(50), None, Evenly(50)), 0)  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimizer.step(closure)
    tolerance = 1e-4 if features else 1e-6  # in float32, which perceptual networks are given
    assert float(student.gain) == pytest.approx(STD, abs=tolerance)
    assert float(student.bias) == pytest.approx(MEAN, abs=tolerance)


class Feature(nn.Module):
    """(w . (x - y))^2 of the features (x, 2 x)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x - y) * torch.tensor([1.0, 2.0])).square().sum(1)


def test_pairs_of_the_flow_do_not_cross():
    """Two modes: half of all independent pairs cross on their straight ways, none of the flow's; S falls to nothing."""
    field = denoiser(Mixture(FLOW, "flow_prediction"))
    z = torch.linspace(-2.6, 2.6, 401, dtype=torch.float64).view(-1, 1)
    x, _, _ = euler(field, FLOW, z, {}, 2000)
    source = torch.Generator().manual_seed(0)
    shuffled = x[torch.randperm(len(x), generator=source)]

    def crossings(y: Tensor) -> float:
        sign = (z - z.T) * (y - y.T)
        return float((sign < 0).double().mean())

    assert crossings(shuffled) == pytest.approx(0.5, abs=0.02) and crossings(x) == 0

    def rectified(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """x0 of the straight field through the pairs, by interpolation: X = (1 - t) x + t z has one pair for each X."""
        tau = float(t[0])
        ways = ((1 - tau) * x + tau * z).flatten()
        above = torch.searchsorted(ways, x_t.flatten().contiguous()).clamp(1, len(z) - 1)
        part = (x_t.flatten() - ways[above - 1]) / (ways[above] - ways[above - 1])
        start, end = (v.flatten()[above - 1] + part * (v.flatten()[above] - v.flatten()[above - 1]) for v in (z, x))
        return (x_t.flatten() + tau * (end - start)).view(-1, 1)

    inner = z[20:-20]
    curved, straight = (float(straightness(each, FLOW, inner, {}, 200)) for each in (field, rectified))
    assert curved > 0.3 and straight < 1e-3 * curved
    one, _, _ = euler(rectified, FLOW, inner, {}, 1)
    assert torch.allclose(one, x[20:-20], atol=1e-6)
    blurred, _, _ = euler(field, FLOW, inner, {}, 1)
    assert float(blurred.std()) < 1e-9


# --- stages


def stages(tmp_path: Path, **options: Any) -> InstaFlow:
    given = {"rounds": 2, "reflow_steps": 3, "pairs": 6, "pair_steps": 2} | options
    return objective(InstaFlow, dit(), tmp_path, guidance=1.5, times=[999], **given)


def test_a_run_has_its_stages(tmp_path: Path):
    """Reflow on the teacher's pairs, on those of the student after each round, and the distillation on the last."""
    method = stages(tmp_path)
    names, sources = [], []
    for step in range(9):
        method.log.clear()
        assert play(method, step, batch(method.teacher, step, real=False)) == ["generator"]
        names.append("reflow" if "reflow" in method.log else "regression")
        sources.append(method.source)
        assert ("straightness" in method.log) == (step in (3, 6))
    assert names == ["reflow"] * 6 + ["regression"] * 3 and sources == [0] * 3 + [1] * 3 + [2] * 3
    assert method.settled == 6
    assert {path.name for path in tmp_path.glob("*.json")} == {"rectified-1.json", "rectified-2.json"}
    assert len([each for each in tmp_path.glob("pairs-*") if each.is_dir()]) == 3


def test_the_average_makes_the_next_pairs_without_guidance(tmp_path: Path):
    """New noise for each round; one network pass a step and sample, by the averaged student."""
    method = stages(tmp_path, reflow_ema=0.5)
    live, average = unwrap(method.generator.denoiser.network), method.average
    assert average is not None and method.state() == {"rectified": average} and method.kept() == [average]
    teachers = method.pairs.rows[torch.arange(6)]
    play(method, 0, batch(method.teacher, real=False))
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.01)
    before = [p.clone() for p in average.parameters()]
    method.updated("generator")
    for was, now, p in zip(before, average.parameters(), live.parameters()):
        assert torch.allclose(now, (was + p) / 2)
    play(method, 3, batch(method.teacher, 3, real=False))
    rows = method.pairs.rows[torch.arange(6)]
    assert not torch.equal(rows["z"], teachers["z"])
    maker = method.teacher._denoiser(average)
    cond, _ = method.teacher.encode(rows["conditions"])
    with torch.no_grad():
        x, _, _ = euler(maker, maker.schedule, rows["z"], cond, 2)
    torch.testing.assert_close(rows["y"], x, rtol=1e-3, atol=1e-2)
    assert method.teacher.denoiser.network is not average and method.pairs.guidance == 1.0


def test_passes_of_a_step(tmp_path: Path):
    """Reflow and distillation: 1 of the student, 0 of the teacher; no gradient reaches teacher or average."""
    method = stages(tmp_path)
    student, real = Calls(method.generator.denoiser.network), Calls(method.teacher.denoiser.network)
    for step in (0, 1):
        play(method, step, batch(method.teacher, step, real=False))
    assert (student.passes, real.passes) == (2, 0)
    play(method, 6, batch(method.teacher, 6, real=False))
    assert (student.passes, real.passes) == (3, 0)
    networks = (method.teacher.denoiser.network, method.average)
    assert all(p.grad is None for network in networks if network is not None for p in network.parameters())


def test_a_later_step_finds_the_pairs_of_its_round(tmp_path: Path):
    """Resumed in the middle of a round the weights are others than those that made its pairs; the note leads to them."""
    method = stages(tmp_path)
    play(method, 3, batch(method.teacher, 3, real=False))
    folder = method.pairs.rows.folder
    later = stages(tmp_path)
    assert later.average is not None
    with torch.no_grad():
        for p in later.average.parameters():
            p.add_(0.01)
    play(later, 4, batch(later.teacher, 4, real=False))
    assert later.pairs.rows.folder == folder and "straightness" not in later.log
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="--restart"):
        play(stages(tmp_path), 5, batch(method.teacher, 5, real=False))


def test_no_rounds_are_distillation_alone(tmp_path: Path):
    method = stages(tmp_path, rounds=0)
    assert method.average is None and method.state() == {} and method.settled == 0
    play(method, 0, batch(method.teacher, real=False))
    assert "regression" in method.log and method.source == 0


# --- runs


class Killed(BaseException):
    pass


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed while the student makes its pairs, and once more in the stage that uses them."""
    argv = ["--method", "instaflow", "--teacher", str(tiny_teacher), "--device", "cpu", "--iterations", "8", "--no-evaluate"]
    argv += ["--rounds", "1", "--reflow-steps", "4", "--pairs", "300", "--pair-steps", "1", "--batch-size", "4"]
    argv += ["--checkpoint-every", "3", "--log-every", "1", "--grid-steps", "1", "--grid-every", "100", "--lr", "1e-3"]
    argv += ["--grid-columns", "1", "--cache", str(tmp_path / "cache")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*argv, "--output", str(whole)]) == 0
    make, made = PairCache._make, []

    def killed(self: PairCache, start: int, stop: int) -> Any:
        made.append(start)
        if made == [0, 256]:
            raise Killed
        return make(self, start, stop)

    monkeypatch.setattr(PairCache, "_make", killed)
    with pytest.raises(Killed):
        main([*argv, "--output", str(broken)])
    step = InstaFlow.step

    def cut(self: InstaFlow, item: Batch, number: int) -> Any:
        if number == 7:
            raise Killed
        return step(self, item, number)

    monkeypatch.setattr(InstaFlow, "step", cut)
    with pytest.raises(Killed):
        main([*argv, "--output", str(broken)])
    monkeypatch.setattr(InstaFlow, "step", step)
    assert main([*argv, "--output", str(broken)]) == 0
    assert made == [0, 256, 256]  # the complete shard was not made again
    checkpoint = "checkpoints/step-00000008/average.safetensors"
    want, got = load_file(whole / checkpoint), load_file(broken / checkpoint)
    assert all(torch.equal(want[key], got[key]) for key in want)
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and "reflow" in rows[0] and "regression" in rows[-1]


def test_options(tmp_path: Path):
    train, options = resolve(InstaFlow.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and train.clip_norm == 1.0
    assert (options.rounds, options.reflow_steps, options.pair_steps, options.distance) == (1, 600, 25, "l2")
    with pytest.raises(ValueError, match="--student-steps 1"):
        objective(InstaFlow, dit(), tmp_path, times=[999, 499])
