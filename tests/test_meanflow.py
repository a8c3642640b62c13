"""MeanFlow against closed forms: its identity, what it is still at, its pieces, and that one step is the generator's."""

import math
from typing import Any

import pytest
import torch
from gaussian import TYPES, Calls, ClosedForm, ClosedFormTeacher, denoiser
from guided import Classes
from playing import batch, clear, dit, has_gradient, linear_vp, objective, play
from tiny import randomise
from torch import Tensor, nn

from onestep.config import resolve
from onestep.continuous import StraightFlow, TrigFlow
from onestep.denoiser import Cond
from onestep.objectives.base import Batch
from onestep.objectives.meanflow import MeanFlow, weighted
from onestep.prediction import add_noise
from onestep.rng import Rng
from onestep.schedule import EDM, RectifiedFlow, Schedule
from onestep.second_time import KEY, folded
from onestep.teacher import Copies

SCHEDULES = {"vp": linear_vp(), "flow": RectifiedFlow(), "edm": EDM()}
SIZE, D = 6, 3


class MeanVelocity(Classes):
    """The exact u(x, r, t) of the teacher that is guided from class 3 to the others, as an x0: x - t u."""

    guidance = 1.0

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        r = cond.get(KEY)
        self.r = torch.zeros(len(x), dtype=torch.float64) if r is None else r
        return super().forward(x, timestep, return_dict, **cond)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.means[3] + self.guidance * (self.means[self.labels[-1]] - self.means[3])
        mean, r = mean.view(-1, 1), self.r.view(-1, 1)
        x, t = x_t / (alpha + sigma), sigma / (alpha + sigma)
        spread, there = (((1 - time) ** 2 * self.std**2 + time**2).sqrt() for time in (t, r))
        away = x - (1 - t) * mean
        moved = (1 - r) * mean + there / spread * away
        v = -mean + (t - (1 - t) * self.std**2) / spread**2 * away
        gap = torch.where(t > r, t - r, 1.0)
        return x - t * torch.where(t > r, (x - moved) / gap, v)


def method_on(network: ClosedForm, student: ClosedForm, guidance: float = 1.0, **options: Any) -> MeanFlow:
    teacher = ClosedFormTeacher(network, (D,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeanFlow, "prepare", classmethod(lambda *args: None))  # a closed form has no time embedding
        method = objective(MeanFlow, teacher, guidance=guidance, times=network.schedule.grid(1), **options)
    method.generator.denoiser = denoiser(student)
    method.two_times = isinstance(student, MeanVelocity)
    return method


def exact(kind: str, schedule: Schedule, guidance: float = 1.0, told: float | None = None, **options: Any) -> MeanFlow:
    """The method with a student that is the mean velocity already, of the guidance that it is `told`."""
    student = MeanVelocity(schedule, kind)
    student.guidance = guidance if told is None else told
    return method_on(Classes(schedule, kind), student, guidance, **options)


def item(step: int = 0, size: int = SIZE) -> Batch:
    rng = Rng(7, step, size, dtype=torch.float64)
    real = 0.7 * rng.normal((D,)) + torch.tensor([-1, 0.5, 2]).repeat(size)[:size].view(-1, 1)
    return Batch(torch.arange(size) % 3, real, rng)


# --- the identity


@pytest.mark.parametrize("how, tolerance", [("forward", 1e-12), ("difference", 1e-5)])
def test_the_identity_at_one_point(how, tolerance):
    """N(1.3, .7^2), x = .4, t = .8, r = .1: u = -1.257085 = v - (t - r)(v d_x u + d_t u), with v = -1.151001."""
    schedule = RectifiedFlow()
    teacher, student = (kind(schedule, "flow_prediction", (1.3,) * 4) for kind in (Classes, MeanVelocity))
    method = method_on(teacher, student, jvp=how)
    x, log_q = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64).logit()
    cond = {"class_labels": torch.zeros(1, dtype=torch.long)}
    v = method.flow.velocity(denoiser(teacher), x, log_q, cond).detach()
    timed = cond | {KEY: torch.tensor([0.1], dtype=torch.float64)}
    u = method.flow.velocity(denoiser(student), x, log_q, timed).detach()
    assert float(v) == pytest.approx(-1.1510006064281382, abs=1e-12)
    assert float(u) == pytest.approx(-1.257084566224782, abs=1e-12)
    slope = method.slope(x, log_q, timed, v, method.flow.at(log_q, x).way)
    assert float(v - 0.7 * slope) == pytest.approx(float(u), abs=tolerance)
    astray = method.slope(x, log_q, timed, v + 0.5, method.flow.at(log_q, x).way)
    assert abs(float(v - 0.7 * astray - u)) > 0.01


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_the_mean_velocity_is_still(kind, name):
    method = exact(kind, SCHEDULES[name], time_std=2.0)
    for step in range(3):
        play(method, step, item(step))
        assert float(method.log["mean_flow"]) < 1e-16


@pytest.mark.parametrize("told", [3.0, 2.0])
def test_it_is_the_guided_teachers(told):
    """u + w (c - u): of guidance 3 the mean velocity for 3 is still, and that for w - 1, another convention, is not."""
    method = exact("epsilon", linear_vp(), guidance=3.0, told=told)
    play(method, 0, item())
    assert (float(method.log["mean_flow"]) < 1e-16) == (told == 3.0)


def test_without_a_second_time_it_is_still_at_the_consistency_function():
    """u(x, 0, t) = (x - f(x, t)) / t: r is 0 for every sample."""
    method = exact("v_prediction", linear_vp(), guidance=2.0)
    method.two_times = False
    r, _ = method.levels(Rng(0, 0, 100, dtype=torch.float64))
    assert not r.any()
    play(method, 0, item())
    assert float(method.log["mean_flow"]) < 1e-16


@pytest.mark.parametrize("two_times", [True, False])
def test_a_share_of_samples_is_at_the_most_noise(two_times):
    share = {}
    for asked in (0.0, 0.25):
        method = exact("v_prediction", linear_vp(), guidance=2.0, max_noise=asked)
        method.two_times = two_times
        r, log_q = method.levels(Rng(0, 0, 4000, dtype=torch.float64))
        share[asked] = float((log_q == method.law.high).double().mean())
        assert bool((r <= log_q.sigmoid()).all())
    assert share[0.0] < 0.01 and share[0.25] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_straight_coordinates_are_exact(name):
    """x = (1 - t) x_0 + t eps is x_t / (alpha + sigma), and the exact denoiser's velocity eps - x_0."""
    schedule, log_q = SCHEDULES[name], torch.tensor([-4, -1, 0.5, 3.5], dtype=torch.float64)
    x_0, eps = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = log_q.sigmoid().view(-1, 1)
    flow = StraightFlow(schedule)

    def denoise(x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        torch.testing.assert_close(x_t, add_noise(schedule, x_0, eps, time), atol=1e-9, rtol=1e-9)
        return x_0

    torch.testing.assert_close(flow.at(log_q, x_0).way, t, atol=1e-12, rtol=1e-9)
    v = flow.velocity(denoise, (1 - t) * x_0 + t * eps, log_q, {})
    torch.testing.assert_close(v, eps - x_0, atol=1e-9, rtol=1e-9)


# --- its pieces


def test_equal_times_regress_on_the_velocity():
    """With r = t the loss is mean s / (s + c), s = mean (u - v)^2, whatever the slope."""
    student = MeanVelocity(linear_vp(), "epsilon", means=(0.3, -0.2, 1, 0), std=1.1)
    method = method_on(Classes(linear_vp()), student, guidance=2.0, unit="u", power=1.0)
    method.config.to_data, method.config.instantaneous = 0.0, 1.0
    data = item()
    (_, loss), *_ = method.step(data, 0)
    again = item()
    _, log_q = method.levels(again.rng)
    t, eps = log_q.sigmoid().view(-1, 1), again.rng.normal((D,))
    x, (cond, uncond) = (1 - t) * again.real + t * eps, method.teacher.encode(again.conditions)
    v = method.flow.velocity(lambda *at: method.teacher(*at, uncond, 2.0), x, log_q, cond)
    u = method.flow.velocity(denoiser(student), x, log_q, cond | {KEY: log_q.sigmoid()})
    square = (u - v).square().mean(1)
    torch.testing.assert_close(loss, (square / (square + 1e-3)).mean(), atol=1e-9, rtol=1e-9)
    assert float(square.detach().min()) > 1e-4


def test_gradient_of_a_step_by_hand():
    """d/dparameter mean 1/sqrt(s + c) |u - sg(v - (t - r)(v d_x u + d_t u))|^2 / D, derivatives by finite differences."""
    student = MeanVelocity(RectifiedFlow(), "flow_prediction", means=(0.3, -0.2, 1, 0), std=1.1)
    method = method_on(Classes(RectifiedFlow(), "flow_prediction"), student, guidance=2.0)
    play(method, 0, item())
    found = student.std.grad.clone()
    clear(student)
    again = item()
    r, log_q = method.levels(again.rng)
    t, eps = log_q.sigmoid().view(-1, 1), again.rng.normal((D,))
    x, (cond, uncond) = (1 - t) * again.real + t * eps, method.teacher.encode(again.conditions)
    v = (x - method.teacher(x, t.flatten(), cond, uncond, 2.0)) / t
    timed, h = cond | {KEY: r}, 1e-6

    def u(x: Tensor, t: Tensor) -> Tensor:
        return (x - denoiser(student)(x, t.flatten(), timed)) / t

    with torch.no_grad():
        slope = (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
    error = u(x, t) - (v - (t - r.view(-1, 1)) * slope)
    weight = 1 / (error.detach().square().mean(1, keepdim=True) + 1e-3).sqrt()
    (weight * error.square() / (SIZE * D)).sum().backward()
    torch.testing.assert_close(found, student.std.grad, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("path", [StraightFlow, lambda schedule: TrigFlow(schedule, 0.5)], ids=["straight", "trig"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_unit_of_the_networks_output(kind, name, path):
    """|d velocity / d output| of every prediction type; 1 where F is what EDM's networks and v predict."""
    flow, log_q = path(SCHEDULES[name]), torch.tensor([-3, 0.2, 3], dtype=torch.float64)
    x, shift = torch.randn(3, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.0

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return TYPES[kind].to_x0(0.3 * x_t + shift, x_t, *SCHEDULES[name](t, x_t))

    before = flow.velocity(denoise, x, log_q, {})
    shift = 2.0
    change = (flow.velocity(denoise, x, log_q, {}) - before).abs() / 2
    torch.testing.assert_close(flow.per_output(TYPES[kind], flow.at(log_q, x)).expand_as(x), change, atol=1e-9, rtol=1e-6)


def test_the_unit_is_that_of_the_loss():
    """In outputs an error of u counts for alpha / (alpha + sigma) of it where the network predicts eps."""
    losses = []
    for unit in ("u", "output"):
        student = MeanVelocity(linear_vp(), "epsilon", means=(0.3, -0.2, 1, 0), std=1.1)
        method = method_on(Classes(linear_vp()), student, unit=unit, power=0.0)
        method.levels = lambda rng: (torch.zeros(SIZE), torch.full((SIZE,), 2.0, dtype=torch.float64))
        (_, loss), *_ = method.step(item(), 0)
        losses.append(float(loss.detach()))
    alpha, sigma = linear_vp().coefficients(linear_vp().time_at(torch.tensor([2.0], dtype=torch.float64).exp()))
    assert losses[1] / losses[0] == pytest.approx(float(alpha / (alpha + sigma)) ** 2, rel=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weight(power):
    """2 e / (B D (s + c)^p): the weight itself has no gradient."""
    error = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weighted(error, power, 0.3).backward()
    square = error.detach().square().mean((1, 2), keepdim=True)
    torch.testing.assert_close(error.grad, 2 * error.detach() / (24 * (square + 0.3) ** power))


@pytest.mark.parametrize("law", ["logit-normal", "uniform"])
def test_levels(law):
    method = exact("flow_prediction", RectifiedFlow(), time_law=law, instantaneous=0.3, to_data=0.2)
    r, log_q = method.levels(Rng(0, 0, 20_000, dtype=torch.float64))
    t = log_q.sigmoid()
    assert bool((r <= t).all()) and float(t.max()) < 1 and float(t.min()) > 0
    assert float((r == t).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float((r == 0).double().mean()) == pytest.approx(0.2, abs=0.01)
    # of the larger of two draws
    if law == "uniform":
        assert float(t.mean()) == pytest.approx(2 / 3, abs=0.01)
    else:
        assert float(log_q.mean()) == pytest.approx(-0.4 + math.pi**-0.5, abs=0.02)


def test_velocity_of_the_data():
    """v = eps - x_0: the teacher is not asked, so that guidance means nothing, and the card says so."""
    teacher = dit()
    method = objective(MeanFlow, teacher, guidance=1.5, velocity="data")
    calls = Calls(teacher.denoiser.network)
    assert play(method, 0, batch(teacher)) == ["generator"] and calls.started == 0
    assert method.guidance == 1.0 and MeanFlow.ends_at(method.config, 1.5) == 1.0
    assert MeanFlow.ends_at(MeanFlow.Config(), 1.5) == 1.5


# --- the student


def test_one_step_is_the_generators():
    """x_0 = x_1 - u(x_1, 0, 1) in straight coordinates is the first call of the generator, and of the folded network."""
    teacher = dit()
    method = objective(MeanFlow, teacher, times=[999])
    student = method.generator.denoiser
    randomise(student.network, seed=3)
    z = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    cond, _ = teacher.encode(torch.arange(2))
    top = torch.tensor([teacher.denoiser.schedule.log_range()[1]]).double().expand(2)
    t = method.flow.at(top, z).way
    x = z * t / float(student.schedule.coefficients(torch.tensor([999]))[1])
    with torch.no_grad():
        first = method.generator.first(z, cond)
        u = method.flow.velocity(student, x, top, cond | {KEY: torch.zeros(2)})
        later = method.flow.velocity(student, x, top, cond | {KEY: torch.full((2,), 0.5)})
        size = float(first.abs().max())
        torch.testing.assert_close(x - t * u, first, atol=1e-5 * size, rtol=0)
        assert float((x - t * later - first).abs().max()) > 1e-3 * size
        student.network = folded(student.network)
        torch.testing.assert_close(method.generator.first(z, cond), first, atol=1e-5 * size, rtol=0)


def test_the_second_time_learns_and_an_adapter_has_none():
    teacher = dit()
    method = objective(MeanFlow, teacher)
    play(method, 0, batch(teacher))
    grads = [p.grad for name, p in method.generator.named_parameters() if name.endswith("second_weight")]
    assert method.two_times and grads and all(bool(g.any()) for g in grads)
    teacher = dit()
    teacher.copies = Copies(frozenset({"student"}), rank=2)
    method = objective(MeanFlow, teacher)
    assert not method.two_times
    play(method, 0, batch(teacher))
    assert any(has_gradient(method.generator))


class Slopes(nn.Module):
    """x0 = x - t u with u = a(ln q) x + b(ln q) of a rectified flow, a and b sums of bumps."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 12, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        bumps = (-0.5 * ((timestep / 1000).logit().view(-1, 1) - torch.linspace(-5, 5, 12, dtype=torch.float64)) ** 2).exp()
        slope, bias = (bumps @ weights for weights in self.weights)
        return (slope.view(-1, 1) * x + bias.view(-1, 1),)


def test_it_converges_to_the_exact_flow():
    """From t the slope is s / sqrt((1 - t)^2 s^2 + t^2), about the mean; that of the denoiser is far from it."""
    schedule, std = RectifiedFlow(), 0.7
    method = method_on(
        Classes(schedule, "flow_prediction"), Classes(schedule, "flow_prediction"), time_mean=0.0, time_std=1.5
    )
    student, cond = Slopes(), {"class_labels": torch.full((3,), 2)}
    method.generator.denoiser.network = student
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        rng = Rng(1, step, 256, dtype=torch.float64)
        optimizer.zero_grad()
        play(method, step, Batch(torch.full((256,), 2), 2 + std * rng.normal((D,)), rng))
        optimizer.step()
    t, one = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    with torch.no_grad():
        high, low = (method.generator.denoiser((1 - t).view(-1, 1) * 2 + x * one, t, cond).flatten() for x in (1.0, 0.0))
    exact, by_teacher = std / ((1 - t) ** 2 * std**2 + t**2).sqrt(), (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    torch.testing.assert_close(high - low, exact, atol=0.02, rtol=0.02)
    torch.testing.assert_close(low, torch.full_like(low, 2), atol=0.06, rtol=0)
    assert float((exact - by_teacher).abs().min()) > 0.1


# --- a step


@pytest.mark.parametrize("how, passes", [("forward", 2), ("difference", 3)])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(guidance, how, passes):
    teacher = dit()
    method = objective(MeanFlow, teacher, guidance=guidance, jvp=how)
    networks = (method.generator.denoiser.network, teacher.denoiser.network)
    student, real = (Calls(network) for network in networks)
    graphs: list[bool] = []
    networks[0].register_forward_hook(lambda module, args, out: graphs.append(out[0].requires_grad))
    assert play(method, 0, batch(teacher, size=2)) == ["generator"]
    assert student.finished == 2 * passes and graphs == [False] * (passes - 1) + [True]
    assert real.finished == 2 * (2 if guidance > 1 else 1) and real.stopped == student.stopped == 0
    assert any(has_gradient(method.generator)) and not any(has_gradient(teacher.denoiser))


def test_without_real_samples():
    teacher = dit()
    method = objective(MeanFlow, teacher)
    assert MeanFlow.uses_real(method.config)
    with pytest.raises(ValueError, match="--data"):
        play(method, 0, batch(teacher, real=False))


def test_defaults():
    train, options = resolve(MeanFlow.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and (train.beta1, train.clip_norm) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"--to-data 0\.25"):
        MeanFlow.Config(instantaneous=0.7, to_data=0.4)
    assert (options.velocity, options.power, options.power_floor, options.jvp) == ("teacher", 0.5, 1e-3, "forward")
