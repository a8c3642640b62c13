"""BOOT against closed forms: the signal ODE, what a student learns of it, gradient and weights, the exported pipeline."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Calls, ClosedFormTeacher, Gaussian
from playing import batch, dit, linear_vp, objective
from tiny import edm_pipeline, randomise
from torch import Tensor, nn

from onestep.card import Card
from onestep.config import resolve
from onestep.denoiser import Cond, unwrap
from onestep.exporting import export
from onestep.generator import Generator
from onestep.objectives.base import Batch
from onestep.objectives.boot import BOOT, SPAN
from onestep.schedule import EDM, RectifiedFlow, Schedule
from onestep.second_time import layers
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher
from onestep.trajectory import Grid

MEAN, STD, TOP = 1.3, 0.7, 0.97


class Cosine(Schedule):
    """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2), t in (0, 0.97]: there is signal at its end."""

    init_sigma = 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (math.pi / 2 * t.double()).cos(), (math.pi / 2 * t.double()).sin()

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def at(self, u: Tensor) -> Tensor:
        return TOP * u

    def fraction(self, t: float) -> float:
        return t / TOP

    def at_rho(self, rho: float) -> float:
        raise NotImplementedError

    def log_range(self) -> tuple[float, float]:
        raise NotImplementedError

    def time_at(self, q: Tensor) -> Tensor:
        raise NotImplementedError


class Table(BOOT):
    """A student y_n = slope_n eps + intercept_n with a row for each level, which can have any linear solution."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rows = self.config.levels + 1
        self.slope, self.intercept = (nn.Parameter(torch.full((rows,), v, dtype=torch.float64)) for v in (0.3, -0.2))

    @classmethod
    def prepare(cls, config: Any, generator: Generator) -> None:
        return None

    def signal(self, z: Tensor, u: Tensor, cond: Cond) -> Tensor:
        level = (u * self.config.levels).round().long()
        return self.slope[level].view(-1, 1) * z + self.intercept[level].view(-1, 1)


class Classes(Gaussian):
    """The classes 0, 1, 2 have the means 1, 1.4, 1.8; class 3, the null class, has 0.2."""

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        label = cond["class_labels"].double().view(-1, 1)
        self.mean.data = torch.where(label == 3, 0.2, 1 + 0.4 * label)
        return super().forward(x, timestep, return_dict)


class EveryLevel:
    """Rng's interface: the same noise at every level, so that a step is the expectation over both."""

    def __init__(self, z: Tensor, levels: int):
        self.z, self.level = z.repeat(levels, 1), torch.arange(levels).repeat_interleave(len(z))

    def normal(self, shape: Any) -> Tensor:
        return self.z

    def integers(self, high: int) -> Tensor:
        return self.level


Z = torch.tensor([[-1.5], [-0.4], [0.3], [1.6]], dtype=torch.float64)


def teacher_of(schedule: Schedule | None = None) -> ClosedFormTeacher:
    return ClosedFormTeacher(Gaussian(schedule or Cosine(), "sample", MEAN, STD))


def table(levels: int, teacher: Teacher | None = None, guidance: float = 1.0, **options: Any) -> Table:
    teacher = teacher or teacher_of()
    times = [teacher.denoiser.schedule.grid(1)[0]]
    given = {"boundary": 1 / levels} | options  # as much as each level has
    return objective(Table, teacher, guidance=guidance, times=times, levels=levels, most=1.0, **given)


def every(method: Table, conditions: int = 0) -> Batch:
    rows = len(Z) * method.config.levels
    return Batch(torch.full((rows,), conditions), None, EveryLevel(Z, method.config.levels))  # type: ignore[arg-type]


def train(method: Table, steps: int, conditions: int = 0) -> None:
    """Gradient descent with the curvature of each level divided out: all levels have weight 1 of levels + boundary."""
    rows, item = [method.slope, method.intercept], every(method, conditions)
    scale = torch.stack([Z.square().mean(), torch.ones((), dtype=torch.float64)])
    for step in range(steps):
        ((_, loss),) = method.step(item, step)
        loss.backward()
        for row, curvature in zip(rows, scale):
            assert row.grad is not None
            row.data -= 0.45 * method.config.levels * row.grad / curvature
            row.grad = None


def discrete(grid: Grid, solver: Callable[..., Tensor], eps: Tensor = Z) -> Tensor:
    """y_0 of y_T = f(eps, T), y_s = r y_t + (1 - r) f(alpha_t y_t + sigma_t eps, t), r = q_s / q_t."""
    x_0 = posterior(grid.alpha[-1], grid.sigma[-1])
    y = x_0(eps)
    for n in range(grid.size, 0, -1):
        y = solver(grid, n, y, eps)
    return y


def posterior(alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], Tensor]:
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return lambda x: MEAN + gain * (x - alpha * MEAN)


def ddim(grid: Grid, n: int, y: Tensor, eps: Tensor) -> Tensor:
    (a, s), (b, r) = ((grid.alpha[k], grid.sigma[k]) for k in (n, n - 1))
    kept = r / b * a / s
    return kept * y + (1 - kept) * posterior(a, s)(a * y + s * eps)


def heun(grid: Grid, n: int, y: Tensor, eps: Tensor) -> Tensor:
    """Trapezoidal in X = x / (alpha + sigma) over tau = sigma / (alpha + sigma), of slope eps_hat - x0; DDIM to level 0."""
    (a, s), (b, r) = ((grid.alpha[k], grid.sigma[k]) for k in (n, n - 1))
    euler, f = ddim(grid, n, y, eps), posterior(a, s)(a * y + s * eps)
    if n == 1:
        return euler
    after = posterior(b, r)(b * euler + r * eps)
    slopes = (a * y + s * eps - a * f) / s - f + (b * euler + r * eps - b * after) / r - after
    x = (a * y + s * eps) / (a + s) + (r / (b + r) - s / (a + s)) * slopes / 2
    return ((b + r) * x - r * eps) / b


def exact(eps: Tensor = Z) -> Tensor:
    """PF(x_T, T -> 0) of x_T = alpha_T f(eps, T) + sigma_T eps: not of eps, for there is signal at T."""
    alpha, sigma = math.cos(math.pi / 2 * TOP), math.sin(math.pi / 2 * TOP)
    variance = (alpha * STD) ** 2 + sigma**2
    f = MEAN + alpha * STD**2 / variance * (eps - alpha * MEAN)
    return MEAN + STD / math.sqrt(variance) * (alpha * f + sigma * eps - alpha * MEAN)


# --- the signal ODE


def test_the_signal_of_a_gaussian():
    """From q = infinity, which a rectified flow has, y_t = mu + (sqrt(s^2 + q^2) - q) eps and y_0 = mu + s eps."""
    grid = Grid(RectifiedFlow(), 4000)
    assert discrete(grid, ddim).flatten().tolist() == pytest.approx((MEAN + STD * Z).flatten().tolist(), abs=1e-3)
    assert posterior(grid.alpha[-1], grid.sigma[-1])(Z).tolist() == [[MEAN]] * 4
    y = posterior(grid.alpha[-1], grid.sigma[-1])(Z)
    for n in range(grid.size, 2000, -1):
        y = ddim(grid, n, y, Z)
    assert torch.allclose(y, MEAN + (math.sqrt(STD**2 + 1) - 1) * Z, atol=1e-3)  # q = 1 in the middle


@pytest.mark.parametrize("solver, order", [(ddim, 1), (heun, 2)])
def test_order_of_the_solvers(solver, order):
    errors = [float((discrete(Grid(Cosine(), n), solver) - exact()).abs().max()) for n in (80, 160, 320)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.05)
    assert float((discrete(Grid(Cosine(), 4000), ddim) - exact()).abs().max()) < 1e-3


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_student_learns_the_discrete_solution(solver):
    method = table(10, solver=solver)
    train(method, 150)
    grid, by_hand = method.grid(0), ddim if solver == "ddim" else heun
    want = discrete(grid, by_hand)
    assert torch.allclose(method.signal(Z, torch.zeros(4), {}), want, atol=1e-6, rtol=0)
    assert float((want - exact()).abs().max()) > 1e-3  # which is not that of continuous time


def test_boundary_alone():
    method = table(5, boundary_steps=100)
    train(method, 60)
    alpha, sigma = method.grid(0).alpha[-1], method.grid(0).sigma[-1]
    assert torch.allclose(method.signal(Z, torch.ones(4), {}), posterior(alpha, sigma)(Z), atol=1e-9)
    assert method.slope[:-1].tolist() == [0.3] * 5  # the other levels are not touched
    free = table(5, boundary=0.0)
    train(free, 60)
    assert float(free.slope[-1]) == 0.3 and float(free.slope[0]) != 0.3


def test_the_guided_mean():
    """y_0 of equal variances is that of the mean u + w (c - u); with w - 1 for w it is another."""
    teacher = ClosedFormTeacher(Classes(RectifiedFlow(), "sample", MEAN, STD))
    at_noise = teacher(Z, torch.ones(4).double(), *teacher.encode(torch.full((4,), 2)), 3.0)
    assert torch.allclose(at_noise, torch.full_like(Z, 5.0))
    method = table(64, teacher, guidance=3.0)
    train(method, 600, conditions=2)
    y = method.signal(Z, torch.zeros(4), {})
    slope = (y[-1] - y[0]) / (Z[-1] - Z[0])
    assert float((y - slope * Z).mean()) == pytest.approx(0.2 + 3 * (1.8 - 0.2), abs=1e-6)
    assert float(slope) == pytest.approx(STD, abs=0.02)  # O(1 / 64)


# --- the loss


@pytest.mark.parametrize("weight, factor", [("uniform", 100.0), ("slope", None)])
def test_gradient_is_that_of_the_lower_end_alone(weight, factor):
    """2 omega / delta^2 (y_s - y_hat_s) d y_s: none reaches y at t, from which y_hat_s is made."""
    method = table(10, weight=weight, boundary=0.0)
    method.config.most = 50.0
    z, here = Z[:1], 7
    item = Batch(torch.zeros(1, dtype=torch.long), None, OneLevel(z, here))  # type: ignore[arg-type]
    ((_, loss),) = method.step(item, 0)
    loss.backward()
    grid, (a, b) = method.grid(0), (method.slope.detach(), method.intercept.detach())
    y_hat = ddim(grid, here, a[here] * z + b[here], z)
    r = grid.sigma[here - 1] / grid.alpha[here - 1] * grid.alpha[here] / grid.sigma[here]
    w = factor or min(float((1 - r) ** -2), 50.0)
    by_hand = 2 * w * (a[here - 1] * z + b[here - 1] - y_hat)
    assert method.intercept.grad is not None and method.slope.grad is not None
    want = torch.zeros(11, dtype=torch.float64)
    want[here - 1] = by_hand
    assert torch.allclose(method.intercept.grad, want, rtol=1e-12)
    assert torch.allclose(method.slope.grad, want * z, rtol=1e-12)
    assert w > 1 if weight == "slope" else w == 100


class OneLevel(EveryLevel):
    def __init__(self, z: Tensor, level: int):
        self.z, self.level = z, torch.tensor([level - 1])


def test_a_gradient_at_both_ends_is_not_boot(monkeypatch):
    """Without the no_grad around the targets the level t gets a gradient too: the test above would see it."""
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
    method = table(10, boundary=0.0)
    ((_, loss),) = method.step(Batch(torch.zeros(1, dtype=torch.long), None, OneLevel(Z[:1], 7)), 0)  # type: ignore[arg-type]
    loss.backward()
    assert method.slope.grad is not None and float(method.slope.grad[7]) != 0


@pytest.mark.parametrize("schedule", [linear_vp(), RectifiedFlow(), EDM(), Cosine()], ids=lambda s: type(s).__name__)
def test_weights_are_finite_on_every_schedule(schedule):
    """1 / (1 - q_s / q_t)^2 is 1 at either end of a flow, and never above `most`; uniform is 1 / delta^2."""
    method = table(50, teacher_of(schedule))
    method.config.most = 100.0
    level = torch.arange(1, 51)
    weights = method.weights(method.grid(0), level, torch.zeros(50, 1, dtype=torch.float64))
    assert weights.shape == (50, 1) and bool((weights >= 1).all()) and float(weights.max()) <= 100
    assert float(weights[0]) == 1  # level 0 has no noise
    if isinstance(schedule, RectifiedFlow):
        assert float(weights[-1]) == 1 and float(weights[-2]) == pytest.approx((1 - 0.96 / 0.04 * 0.02 / 0.98) ** -2)
    method.config.weight = "uniform"
    assert bool((method.weights(method.grid(0), level, torch.zeros(50, 1)) == 2500).all())


def test_delta_is_annealed():
    method = table(20, anneal=100)
    assert [method.grid(step).size for step in (0, 49, 50, 99, 100, 500)] == [5, 5, 10, 10, 20, 20]
    assert table(20).grid(0).size == 20


# --- networks


def noise(teacher: Teacher, rows: int) -> tuple[Tensor, Cond]:
    z = torch.randn(rows, *teacher.shape, generator=torch.Generator().manual_seed(1))
    return z, teacher.encode(torch.arange(rows))[0]


def test_at_first_the_signal_is_the_teachers_estimate_at_every_time():
    """The second time starts without effect: the boundary holds before the first step, if there is no guidance."""
    teacher = dit()
    method = objective(BOOT, teacher, times=[999])
    assert layers(method.generator.denoiser.network)
    z, (cond, _) = (
        torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1)),
        teacher.encode(torch.arange(3)),
    )
    with torch.no_grad():
        y = method.signal(z, torch.tensor([0.0, 0.4, 1.0]), cond)
        assert torch.allclose(y, teacher(z, torch.full((3,), 999), cond), rtol=1e-4, atol=1e-4)
        randomise(method.generator.denoiser.network, seed=3)
        assert torch.equal(method.signal(z, torch.zeros(3), cond), method.generator(z, cond))
        assert not torch.allclose(method.signal(z, torch.ones(3), cond), method.generator(z, cond), atol=1e-2)


def test_an_adapter_is_told_by_the_networks_own_time():
    """At u = 0 the generator itself; else its time is 1 - u / 2 of the way, its coefficients are those of T."""
    teacher = dit()
    teacher.copies = Copies(frozenset({"student"}), rank=2)
    method = objective(BOOT, teacher, times=[999])
    z, (cond, _) = (
        torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)),
        teacher.encode(torch.arange(2)),
    )
    with torch.no_grad():
        assert torch.equal(method.signal(z, torch.zeros(2), cond), method.generator(z, cond))
        told = torch.full((2,), round(1000 * (1 - SPAN * 0.6)) - 1)
        eps = teacher.denoiser.output(z, told, cond)
        alpha, sigma = teacher.denoiser.schedule(torch.full((2,), 999), z)
        assert torch.allclose(method.signal(z, torch.full((2,), 0.6), cond), (z - sigma * eps) / alpha, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver, guidance, passes", [("ddim", 1.0, 2), ("ddim", 1.5, 4), ("heun", 1.5, 6)])
def test_number_of_network_passes(solver, guidance, passes):
    """A step, in samples of the batch: student 1 without and 2 with gradient, teacher 2, doubled by guidance, one more by
    Heun; with the boundary alone 1 and 1."""
    teacher, size = dit(), 2
    method = objective(BOOT, teacher, times=[999], guidance=guidance, solver=solver, levels=5)
    student, real = Calls(method.generator.denoiser.network), Calls(teacher.denoiser.network)
    ((_, loss),) = method.step(batch(teacher, 0, size, real=False), 0)
    loss.backward()
    assert (student.finished, student.passes) == (3 * size, 2) and real.finished == passes * size
    assert all(p.grad is None for p in teacher.denoiser.network.parameters())
    method.config.boundary_steps = 1
    list(method.step(batch(teacher, 0, size, real=False), 0))
    assert student.finished == 4 * size and real.finished == passes * size + size * (2 if guidance > 1 else 1)


@pytest.mark.parametrize("make", [dit, lambda: EDMTeacher(edm_pipeline(), Facts("x"))])
def test_the_exported_pipeline_is_the_signal_at_time_zero(make, tmp_path: Path):
    """A stock folder, compared with the generator, which is y(eps, 0); its network is of the teacher's own class."""
    from onestep.verify import plain_pipeline

    teacher = make()
    method = objective(BOOT, teacher, times=teacher.denoiser.schedule.grid(1))
    network = method.generator.denoiser.network
    randomise(network, seed=4, scale=0.02)
    method.generator.input_scale = teacher.denoiser.schedule.init_sigma
    card = Card("boot", "tiny", 1.0, "none", {}, None, "")
    folder = export(method.generator, teacher, tmp_path / "export", torch.float32, card)
    stored = getattr(plain_pipeline(folder, torch.float32), teacher.network_name)
    assert type(stored) is type(teacher.denoiser.network) and not layers(stored)
    z, (cond, _) = (
        torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(5)),
        teacher.encode(torch.arange(2)),
    )
    read = teacher._denoiser(stored)
    x, t = method.generator.input_scale * z, method.generator.time(0, z)
    with torch.no_grad():
        assert torch.allclose(read(x, t, cond), method.signal(z, torch.zeros(2), cond), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(read(x, t, cond), method.signal(z, torch.ones(2), cond), rtol=1e-4, atol=1e-4)


# --- options


def test_options():
    train_options, options = resolve(BOOT.Config, {"init_rho": 2.5}, {}, {})
    assert train_options.init_rho is None  # whatever the teacher's facts say
    assert (options.levels, options.boundary, options.weight, options.solver) == (50, 1.0, "slope", "ddim")
    assert not BOOT.uses_real(options)


def test_a_chain_is_refused():
    with pytest.raises(ValueError, match="--student-steps 1"):
        objective(BOOT, dit(), times=[999, 499])


def test_levels_must_differ():
    with pytest.raises(ValueError, match="more than this schedule has"):
        objective(BOOT, dit(), times=[999], levels=2000)


def test_no_gradient_is_left_in_the_average_of_the_teacher():
    """The teacher's network and the student's are different ones: the second time is not added to the teacher's."""
    teacher = dit()
    method = objective(BOOT, teacher, times=[999])
    assert not layers(teacher.denoiser.network) and layers(unwrap(method.generator.denoiser.network))
