"""Consistency distillation against the closed forms of Gaussians: fixed points, guidance, stationarity, target, passes."""

import shutil
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussian import TYPES, Calls, ClosedFormTeacher, denoiser
from guided import Classes
from playing import batch, dit, has_gradient, linear_vp, objective, play
from safetensors.torch import load_file
from tables import MEANS, SIGNS, TOP, Cosine, Exact, S, Table, fits, item, made, trained
from torch import Tensor

from onestep.config import resolve
from onestep.objectives import consistency
from onestep.objectives.cd import CD, CDConfig
from onestep.objectives.consistency import level_weights
from onestep.objectives.regression import l2, pseudo_huber
from onestep.schedule import EDM, RectifiedFlow, Schedule
from onestep.train import main
from onestep.trajectory import Grid

EXACT = 0.05500777  # S / sqrt(S^2 + tan(pi 0.95 / 2)^2)
GOLDEN = {10: 0.04867, 50: 0.05368, 400: 0.05484}


def product(grid: Grid) -> float:
    """Slope in y after a DDIM step at every level, x0 - m = S^2 / (S^2 + q^2) (y - m)."""
    slope, q = 1.0, (grid.sigma / grid.alpha).tolist()
    for low, high in pairwise(q):
        slope *= low / high + (1 - low / high) * S**2 / (S**2 + high**2)
    return slope


# --- the fixed point


@pytest.mark.parametrize("levels", GOLDEN)
def test_the_students_fixed_point_is_the_product_of_the_teachers_steps(levels):
    method = made(CD, levels)
    slope, bias = trained(method)
    assert slope == pytest.approx(product(method.grid), abs=1e-9) == pytest.approx(GOLDEN[levels], abs=5e-6)
    assert bias == pytest.approx((1 - slope) * MEANS[2], abs=1e-9)


def test_more_levels_halve_its_error_and_heun_quarters_it():
    assert S / (S**2 + torch.tan(torch.tensor(torch.pi / 2 * TOP, dtype=torch.float64)) ** 2) ** 0.5 == pytest.approx(EXACT)
    errors = {
        solver: [abs(trained(made(CD, levels, solver=solver))[0] - EXACT) for levels in (20, 40)]
        for solver in ("ddim", "heun")
    }
    assert errors["ddim"][0] / errors["ddim"][1] == pytest.approx(2, abs=0.2)
    assert errors["heun"][0] / errors["heun"][1] == pytest.approx(4, abs=0.6)
    assert errors["heun"][1] < errors["ddim"][1] / 10


def test_two_levels_at_once_are_steps_of_twice_the_size():
    method = made(CD, 40, skip=2)
    q = (method.grid.sigma / method.grid.alpha).tolist()[::2]
    slope = 1.0
    for low, high in pairwise(q):
        slope *= low / high + (1 - low / high) * S**2 / (S**2 + high**2)
    assert trained(method)[0] == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("target_ema", [0.0, 0.5])
@pytest.mark.parametrize("name, kind", [(n, k) for n in ("vp", "flow", "edm") for k in TYPES if fits(n, k)])
def test_the_fixed_point_of_every_prediction_and_schedule(name, kind, target_ema):
    """In x: a_n = alpha_s g + sigma_s (1 - alpha_t g) / sigma_t with g = alpha_t S^2 / v, finite at alpha = 0."""
    schedule: Schedule = {"vp": linear_vp(), "flow": RectifiedFlow(shift=3.0), "edm": EDM(0.02, 20.0)}[name]
    method = made(CD, 5, schedule, kind, target_ema=target_ema)
    if target_ema:
        method.target.network = method.generator.denoiser.network  # where the average has caught up
    trained(method)
    alpha, sigma = method.grid.alpha, method.grid.sigma
    g = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    steps = alpha[:-1] * g[1:] + sigma[:-1] * (1 - alpha[1:] * g[1:]) / sigma[1:]
    got = method.generator.denoiser.network.slope[1:].detach()
    torch.testing.assert_close(got, steps.cumprod(0), atol=1e-9, rtol=1e-7)


# --- guidance


@pytest.mark.parametrize("w", [1.0, 3.0, 8.0])
def test_a_guided_student_ends_at_the_guided_gaussian(w):
    """f = m_w + slope (y - m_w) with m_w = m_null + w (m - m_null), w = 1 the plain conditional."""
    slope, bias = trained(made(CD, 10, guidance=w))
    guided = MEANS[3] + w * (MEANS[2] - MEANS[3])
    assert slope == pytest.approx(GOLDEN[10], abs=5e-6)
    assert bias == pytest.approx((1 - slope) * guided, abs=1e-9)


def test_guidance_that_is_one_off_would_be_seen():
    """The mean moves by (1 - slope) (m - m_null) for each unit of guidance."""
    (slope, one), (_, other) = (trained(made(CD, 10, guidance=w)) for w in (3.0, 2.0))
    assert one - other == pytest.approx((1 - slope) * (MEANS[2] - MEANS[3]), abs=1e-9) and one - other > 0.5


# --- the exact solution


def on_the_solution(monkeypatch, schedule: Schedule, kind: str, **options: Any) -> CD:
    """The student is the consistency function, and the teacher leads exactly along the probability-flow ODE."""
    teacher = ClosedFormTeacher(Classes(schedule, kind, MEANS, S))
    method = objective(CD, teacher, times=[schedule.grid(1)[0]], levels=8, **options)
    method.generator.denoiser.network = Exact(schedule, kind, MEANS, S)

    def lead(x_t: Tensor, here: Tensor, there: Tensor, cond: Any, *rest: Any) -> Tensor:
        mean = torch.tensor(MEANS, dtype=torch.float64)[cond["class_labels"]].view(-1, 1)
        (a, b), (c, d) = (method.grid.levels(level, x_t) for level in (here, there))
        root = ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt()
        return c * mean + root * (x_t - a * mean)

    monkeypatch.setattr(method, "lead", lead)
    return method


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
@pytest.mark.parametrize("name, kind", [(n, k) for n in ("vp", "cosine", "flow", "edm") for k in TYPES if fits(n, k)])
def test_the_exact_solution_is_stationary(name, kind, distance, monkeypatch):
    schedule = {"vp": linear_vp(), "cosine": Cosine(), "flow": RectifiedFlow(), "edm": EDM(0.02, 20.0)}[name]
    method = on_the_solution(monkeypatch, schedule, kind, distance=distance)
    network = method.generator.denoiser.network
    for n in (0, 1, 4, 7):
        ((_, loss),) = method.step(item(n), 0)
        loss.backward()
        assert float(loss.detach()) < 1e-12 and all(float(p.grad.abs().max()) < 1e-9 for p in network.parameters())


def test_another_solution_is_not(monkeypatch):
    method = on_the_solution(monkeypatch, linear_vp(), "epsilon", weight="uniform")
    with torch.no_grad():
        method.generator.denoiser.network.std += 0.05
    ((_, loss),) = method.step(item(4), 0)
    assert float(loss.detach()) > 1e-3


# --- the loss


def test_samples_are_compared_at_levels_of_one_trajectory(monkeypatch):
    """Level 1 .. size for the student, `skip` below for the target, never under 0, where the target is the sample itself."""
    method = made(CD, 10, skip=3)
    seen: list[tuple[Tensor, Tensor]] = []
    consistent = method.grid.consistency
    monkeypatch.setattr(
        method.grid, "consistency", lambda d, x, level, cond: seen.append((x, level)) or consistent(d, x, level, cond)
    )
    source = item(torch.tensor([0, 1, 3, 9]))
    ((_, loss),) = method.step(source, 0)
    (x_s, there), (x_t, here) = seen
    assert here.tolist() == [1, 2, 4, 10] and there.tolist() == [0, 0, 1, 7]
    alpha, sigma = (c.view(-1, 1) for c in (method.grid.alpha[here], method.grid.sigma[here]))
    torch.testing.assert_close(x_t, alpha * source.real + sigma * SIGNS[1])
    cond, _ = method.teacher.encode(source.conditions)
    x_0 = method.teacher(x_t, method.grid.time(here), cond)
    torch.testing.assert_close(x_s[:2], x_0[:2])  # a step to level 0 ends at x0
    target = consistent(method.generator.denoiser, x_s, there, cond)
    assert torch.equal(target[:2], x_s[:2])
    student = method.generator.denoiser(x_t, method.grid.time(here), cond)
    assert float(loss.detach()) == pytest.approx(float((student - target).square().mean().detach()))


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
def test_distances_are_those_of_the_regression(distance):
    method = made(CD, 4, distance=distance, huber=0.1)
    x, y = (torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    want = l2(x, y) if distance == "l2" else pseudo_huber(x, y, 0.1)
    got = method._distances(x, y)
    assert got.shape == (5,) and float(got.mean()) == pytest.approx(float(want), rel=1e-12)


def test_weights_of_levels():
    grid = Grid(EDM(0.02, 20.0), 10)
    assert torch.equal(level_weights(grid, "uniform", 1), torch.ones(10, dtype=torch.float64))
    gaps = grid.sigma[1:] - grid.sigma[:-1]
    torch.testing.assert_close(level_weights(grid, "gap", 1), (1 / gaps) / (1 / gaps).mean())
    cosine = Grid(Cosine(), 10, TOP)
    for power in (1, 2):
        want = cosine.alpha[1:] ** power
        torch.testing.assert_close(level_weights(cosine, "signal", 1, power), want / want.mean())
    for kind in ("signal", "gap"):
        assert float(level_weights(Grid(linear_vp(), 20), kind, 3).mean()) == pytest.approx(1)
        with pytest.raises(ValueError, match=f"--weight {kind} would leave it out; type --weight uniform"):
            level_weights(Grid(RectifiedFlow(), 10), kind, 1)


@pytest.mark.parametrize("distance, power", [("l2", 2), ("pseudo-huber", 1)])
def test_by_default_epsilon_networks_have_weights_that_undo_their_division_by_alpha(distance, power):
    """x0 = (x_t - sigma output) / alpha: an error of the output counts alike at all levels where sigma is near 1."""
    vp, flow = linear_vp(), RectifiedFlow()
    method = made(CD, 10, vp, "epsilon", distance=distance)
    assert torch.equal(method.weights, level_weights(method.grid, "signal", 1, power))
    errors = (method.grid.sigma / method.grid.alpha)[1:] ** power * method.weights
    assert float(errors[5:].max() / errors[5:].min()) < 1.2 and float(errors[0] / errors[9]) < 1
    for schedule, kind in ((vp, "v_prediction"), (flow, "flow_prediction"), (EDM(), "edm")):
        assert bool((made(CD, 10, schedule, kind, distance=distance).weights == 1).all())
    assert bool((made(CD, 10, vp, "epsilon", weight="uniform").weights == 1).all())


def test_a_weight_scales_its_levels_loss():
    plain, weighted = (made(CD, 10, weight=kind) for kind in ("uniform", "signal"))
    for n in (0, 9):
        (one, other) = (next(method.step(item(n), 0))[1].detach() for method in (plain, weighted))
        assert float(other / one) == pytest.approx(float(weighted.weights[n]), rel=1e-12)
    assert weighted.weights[0] / weighted.weights[9] > 5


def test_trajectories_need_real_samples():
    assert CD.uses_real(CDConfig())
    with pytest.raises(ValueError, match="trajectories start from real samples: type --data"):
        next(objective(CD, dit()).step(batch(dit(), real=False), 0))


# --- the target


def test_the_target_is_the_student_held_still():
    """No copy, no state; the gradient is that of the student's own pass alone."""
    method = objective(CD, dit(), guidance=1.5, distance="l2", weight="uniform")
    assert method.target is method.generator.denoiser and not method.state() and not method.kept()
    (_, loss), *_ = method.step(batch(method.teacher), 0)
    loss.backward()
    got = [p.grad.clone() for p in method.generator.parameters() if p.grad is not None]
    method.generator.zero_grad(set_to_none=True)
    source, (cond, uncond) = batch(method.teacher), method.teacher.encode(torch.arange(2) % 3)
    here = 1 + source.rng.integers(40)
    x_t = method.grid.noised(source.real, source.rng.normal(method.teacher.shape), here)
    with torch.no_grad():
        x_s = method.lead(x_t, here, here - 1, cond, uncond, 1.5, source.rng)
        target = method.grid.consistency(method.generator.denoiser, x_s, here - 1, cond)
    l2(method.generator.denoiser(x_t, method.grid.time(here), cond), target).backward()
    for ours, theirs in zip(got, (p.grad for p in method.generator.parameters() if p.grad is not None)):
        torch.testing.assert_close(ours, theirs)
    assert not any(has_gradient(method.teacher.denoiser))


def test_the_leak_test_can_fail(monkeypatch):
    """With gradients let through, the table's lower levels get one, which `settle` tells."""
    monkeypatch.setattr(consistency, "torch", SimpleNamespace(**{**vars(torch), "no_grad": nullcontext}))
    with pytest.raises(AssertionError, match="a gradient reaches the target"):
        trained(made(CD, 3))


def test_a_moving_average_for_a_target():
    """theta' <- m theta' + (1 - m) theta after each of the student's updates; kept in checkpoints, without gradients."""
    method = made(CD, 3, target_ema=0.9)
    method.target.network = Table(method.grid, "v_prediction").requires_grad_(False)
    table, target = method.generator.denoiser.network, method.target.network
    assert method.state() == {"target": target} and method.kept() == [target]
    with torch.no_grad():
        table.slope += 1
    before = target.slope.clone()
    play(method, 0, item(2))
    assert torch.equal(target.slope, before)  # not by the step itself
    method.updated("critic")
    assert torch.equal(target.slope, before)
    method.updated("generator")
    torch.testing.assert_close(target.slope.data, before + 0.1)
    assert not any(p.requires_grad for p in target.parameters())


def test_an_average_starts_as_the_student_and_takes_its_place_in_the_loss():
    plain, averaged = (objective(CD, dit(), target_ema=ema) for ema in (0.0, 0.9))
    (one, other) = (next(method.step(batch(method.teacher), 0))[1] for method in (plain, averaged))
    assert torch.equal(one, other) and averaged.target is not averaged.generator.denoiser
    with torch.no_grad():
        for parameter in averaged.target.network.parameters():
            parameter += 0.1
    assert not torch.equal(next(averaged.step(batch(averaged.teacher), 0))[1], one)


# --- passes and options


@pytest.mark.parametrize(
    "guidance, solver, teachers", [(1.0, "ddim", 1), (1.5, "ddim", 2), (1.0, "heun", 2), (1.5, "heun", 4)]
)
@pytest.mark.parametrize("target_ema", [0.0, 0.9])
def test_number_of_network_passes(guidance, solver, teachers, target_ema):
    """A step, in batches: student 1 with gradient, its target 1 without, teacher 1 or, with Heun, 2, doubled by guidance."""
    method = objective(CD, dit(), guidance=guidance, solver=solver, target_ema=target_ema)
    student, teacher = Calls(method.generator.denoiser.network), Calls(method.teacher.denoiser.network)
    target = Calls(method.target.network) if target_ema else student
    assert play(method, 0, batch(method.teacher)) == ["generator"]
    assert student.finished == (2 if target_ema else 4) and target.finished == (2 if target_ema else 4)
    assert teacher.finished == 2 * teachers and student.stopped == teacher.stopped == 0


def test_a_chains_times_are_on_the_grid_and_defaults():
    method = objective(CD, ClosedFormTeacher(Classes(EDM())), times=[80.0, 60.0, 40.0, 20.0])
    assert {80.0, 60.0, 40.0, 20.0} <= set(method.grid.times.tolist()) and method.grid.size == 40
    train, options = resolve(CD.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and (train.beta1, train.beta2) == (0.9, 0.999)
    assert (options.levels, options.skip, options.solver, options.target_ema) == (40, 1, "ddim", 0.0)
    with pytest.raises(ValueError, match="type fewer"):
        objective(CD, ClosedFormTeacher(Classes(linear_vp())), levels=1001, times=[999])


def test_a_resumed_run_ends_with_the_same_weights(tiny_teacher: Path, tmp_path: Path):
    """The average of the target is in the checkpoint."""
    argv = ["--method", "cd", "--teacher", str(tiny_teacher), "--data", "digits", "--device", "cpu", "--iterations", "4"]
    argv += ["--batch-size", "4", "--target-ema", "0.5", "--lr", "1e-2", "--warmup", "0", "--checkpoint-every", "2"]
    argv += [
        "--grid-steps",
        "1",
        "--grid-columns",
        "1",
        "--levels",
        "8",
        "--student-steps",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 0
    weights = tmp_path / "run/export/unet/diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    last = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "run/export")
    assert main(argv) == 0
    assert all(torch.equal(value, whole[key]) for key, value in load_file(weights).items())


def test_a_student_that_is_one_network_everywhere():
    """The denoiser of the generator is that which is trained, and its network may be replaced by a wrapper."""
    method = made(CD, 3)
    assert method.players() == {"generator": [method.generator.denoiser]}
    wrapped = denoiser(method.generator.denoiser.network)
    method.generator.denoiser.network = wrapped.network
    assert method.target.network is wrapped.network
