"""sCM against closed forms: its tangent by the exact flow, what it is still at, its gradient, what it converges to."""

import math
from typing import Any

import pytest
import torch
from gaussian import TYPES, Calls, ClosedForm, ClosedFormTeacher, Gaussian, denoiser
from guided import Classes
from playing import batch, clear, dit, has_gradient, linear_vp, objective, play
from tiny import edm_pipeline
from torch import Tensor, nn

from onestep.config import resolve
from onestep.continuous import TrigFlow
from onestep.denoiser import Denoiser
from onestep.objectives import scm
from onestep.objectives.base import Batch
from onestep.objectives.scm import SCM, normalised, scm_loss, tangent
from onestep.prediction import EDMPreconditioned
from onestep.rng import Rng
from onestep.schedule import EDM, RectifiedFlow, Schedule
from onestep.teacher import EDMTeacher, Facts

SCHEDULES = {"vp": linear_vp(), "flow": RectifiedFlow(), "edm": EDM()}
SIZE, D = 6, 3
LOG_Q = torch.tensor([-4.0, -2.0, -0.5, 0.3, 1.5, 3.5], dtype=torch.float64)


class Consistent(Classes):
    """The consistency function of the teacher that is guided from class 3 to the others: x0 along the trajectory."""

    guidance = 1.0

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.means[3] + self.guidance * (self.means[self.labels[-1]] - self.means[3])
        mean = mean.view(-1, *(1,) * (x_t.ndim - 1))
        return mean + self.std / (alpha**2 * self.std**2 + sigma**2).sqrt() * (x_t - alpha * mean)


def method_on(network: ClosedForm, student: ClosedForm, guidance: float = 1.0, **options: Any) -> SCM:
    method = objective(SCM, ClosedFormTeacher(network, (D,)), guidance=guidance, times=network.schedule.grid(1), **options)
    method.generator.denoiser = denoiser(student)
    return method


def exact(kind: str, schedule: Schedule, guidance: float = 1.0, told: float | None = None, **options: Any) -> SCM:
    """The method with a student that is the consistency function already, of the guidance that it is `told`."""
    student = Consistent(schedule, kind)
    student.guidance = guidance if told is None else told
    return method_on(Classes(schedule, kind), student, guidance, **options)


def item(step: int = 0, size: int = SIZE) -> Batch:
    rng = Rng(7, step, size, dtype=torch.float64)
    real = 0.7 * rng.normal((D,)) + torch.tensor([-1, 0.5, 2]).repeat(size)[:size].view(-1, 1)
    return Batch(torch.arange(size) % 3, real, rng)


# --- the transform


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_trigflow_is_the_same_noise(name, sigma_data):
    """x_t of the schedule and x_theta differ by a factor alone, tan(theta) = q / sigma_data, and the way is dx/dtheta."""
    schedule, q = SCHEDULES[name], LOG_Q.exp()
    seen: list[Tensor] = []
    x_0, eps = torch.randn(2, SIZE, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        alpha, sigma = schedule(t, x_t)
        seen.append(x_t - (alpha * x_0 + sigma * eps))
        return x_0

    flow = TrigFlow(schedule, sigma_data)
    cos, sin = flow.at(LOG_Q, x_0)[3:5]
    theta = torch.atan(q / sigma_data).view(-1, 1)
    torch.testing.assert_close((cos, sin), (theta.cos(), theta.sin()), atol=1e-10, rtol=1e-10)
    way = flow.velocity(denoise, cos * x_0 + sin * sigma_data * eps, LOG_Q, {})
    assert float(seen[0].abs().max()) < 1e-9
    torch.testing.assert_close(way, -sin * x_0 + cos * sigma_data * eps, atol=1e-9, rtol=1e-9)


def test_sigma_data_is_the_networks_own():
    assert objective(SCM, EDMTeacher(edm_pipeline(), Facts("x"))).flow.sigma_data == 0.5
    assert objective(SCM, dit()).flow.sigma_data == 1.0
    assert objective(SCM, dit(), sigma_data=0.7).flow.sigma_data == 0.7
    assert scm.sigma_data_of(Denoiser(nn.Identity(), EDM(), EDMPreconditioned(0.3))) == 0.3


# --- the tangent


def along_the_flow(student: ClosedForm, teacher: Classes, x: Tensor, theta: Tensor, sigma_data: float) -> Tensor:
    """cos(theta) df/dtheta by central differences, on the exact trajectory of the teacher's Gaussians through x."""
    std = float(teacher.std)

    def x_0_at(h: float) -> Tensor:
        there = theta + h
        spread = [(angle.cos() ** 2 * std**2 + angle.sin() ** 2 * sigma_data**2).sqrt() for angle in (theta, there)]
        moved = there.cos() * mean + spread[1] / spread[0] * (x - theta.cos() * mean)
        flow = TrigFlow(student.schedule, sigma_data)
        q = sigma_data * there.tan().flatten()
        return there.cos() * moved - there.sin() * flow.velocity(denoiser(student), moved, q.log(), cond)

    cond = {"class_labels": torch.arange(len(x)) % 3}
    mean = teacher.means[cond["class_labels"]].view(-1, 1)
    h = 1e-6
    return theta.cos() * (x_0_at(h) - x_0_at(-h)) / (2 * h)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_tangent_is_the_slope_along_the_teachers_trajectory(kind, name):
    """Of a student that is neither the teacher nor consistent: another Gaussian."""
    schedule = SCHEDULES[name]
    teacher, student = Classes(schedule, kind), Classes(schedule, kind, means=(0.3, -0.2, 1, 0), std=1.1)
    method = method_on(teacher, student)
    x = torch.randn(SIZE, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # between the ends of the indices of VP, where the schedule has a kink
    log_q = schedule.coefficients(schedule.time_at(LOG_Q.exp()).floor() + 0.4) if name == "vp" else None
    levels = LOG_Q if log_q is None else (log_q[1] / log_q[0]).log()
    cos, sin = method.flow.at(levels, x)[3:5]
    cond = {"class_labels": torch.arange(SIZE) % 3}
    way = method.flow.velocity(denoiser(teacher), x, levels, cond)
    slope = method.slope(x, levels, cond, cos * sin * way)
    ours = method.flow.velocity(denoiser(student), x, levels, cond)
    found = tangent(x, ours, way, slope, cos, sin, 1.0)
    expected = along_the_flow(student, teacher, x, torch.atan2(sin, cos), method.flow.sigma_data)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert float(expected.detach().abs().max()) > 0.1
    torch.testing.assert_close(tangent(x, ours, way, slope, cos, sin, 0.0), -(cos**2) * (ours - way))


@pytest.mark.parametrize("how", ["forward", "difference"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_the_consistency_function_is_still(kind, name, how):
    method = exact(kind, SCHEDULES[name], tangent_warmup=0, jvp=how)
    play(method, 0, item())
    assert float(method.log["tangent"]) < (1e-8 if how == "forward" else 1e-5)


@pytest.mark.parametrize("how", ["forward", "difference"])
@pytest.mark.parametrize("told", [3.0, 2.0])
def test_it_is_the_guided_teachers(told, how):
    """u + w (c - u): of guidance 3 the function for 3 is still, and that for w - 1, the convention of others, is not."""
    method = exact("epsilon", linear_vp(), guidance=3.0, told=told, tangent_warmup=0, jvp=how)
    play(method, 0, item())
    assert (float(method.log["tangent"]) < 1e-4) == (told == 3.0)


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_the_datas_direction_is_not_the_teachers(how, monkeypatch):
    """The derivative along the way back to the sample, in place of the guided teacher's way, leaves a tangent."""
    method = exact("epsilon", linear_vp(), guidance=3.0, tangent_warmup=0, jvp=how)
    data, slope = item(), method.slope

    def astray(x: Tensor, log_q: Tensor, cond: Any, along: Tensor) -> Tensor:
        cos, sin = method.flow.at(log_q, x)[3:5]
        z = (x - cos * data.real) / sin
        return slope(x, log_q, cond, cos * sin * (cos * z - sin * data.real))

    monkeypatch.setattr(method, "slope", astray)
    play(method, 0, data)
    assert float(method.log["tangent"]) > 0.05


def test_warm_up():
    """r rises from 1 / warmup to 1; without its part a student that is the teacher stays still, under guidance 1."""
    teacher = Classes(linear_vp())
    seen = []
    method = method_on(teacher, Classes(linear_vp()), tangent_warmup=4)
    full = scm.tangent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scm, "tangent", lambda *args: (seen.append(args[-1]), full(*args[:-1], 0.0))[1])
        for step in (0, 1, 3, 4, 100):
            play(method, step, item(step))
            assert float(method.log["tangent"]) < 1e-10
    assert seen == [0.25, 0.5, 1.0, 1.0, 1.0]
    play(method, 100, item())
    assert float(method.log["tangent"]) > 0.05


# --- the loss


def test_gradient_is_the_tangent():
    source = torch.Generator().manual_seed(3)
    ours, g = torch.randn(2, 4, 2, 3, generator=source, dtype=torch.float64)
    ours.requires_grad_()
    loss = scm_loss(ours, g)
    loss.backward()
    torch.testing.assert_close(ours.grad, -2 * g / g.numel(), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(loss.detach(), g.square().mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_unit_is_the_networks_output(kind):
    """The weight is 1 / |dF / d output|, on VP with sigma_data 1: cos(theta) for eps and 1 for v; the paper's is 1."""
    cos = (1 / (1 + (2 * LOG_Q).exp()).sqrt()).view(-1, 1)
    x = torch.zeros(SIZE, D, dtype=torch.float64)
    method = method_on(Classes(linear_vp(), kind), Classes(linear_vp(), kind))
    expected = cos if kind == "epsilon" else torch.ones_like(cos)
    level = method.flow.at(LOG_Q, x)
    torch.testing.assert_close(method.weight(level), expected, atol=1e-9, rtol=1e-9)
    assert method_on(Classes(linear_vp(), kind), Classes(linear_vp(), kind), weight="F").weight(level) == 1.0
    ours, g = x + 1, x + 2
    assert float(scm_loss(ours, g, cos)) == pytest.approx(4 * float(cos.mean()))


def test_normalisation():
    g = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]], dtype=torch.float64)
    rms = math.sqrt(12.5)
    torch.testing.assert_close(normalised(g, 0.1), g / (rms + 0.1))


def test_gradient_of_a_step_by_hand():
    """-2/(B D sigma_d) g/(rms(g) + c) dF/dparameter, with the step's own draws."""
    method = method_on(Classes(EDM(), "edm"), Classes(EDM(), "edm", (0.3, -0.2, 1, 0), 1.1), guidance=2.0, tangent_warmup=2)
    student, data = method.generator.denoiser, item()
    play(method, 0, data)
    found = student.network.std.grad.clone()
    rng, sigma_data, again = Rng(7, 0, SIZE, dtype=torch.float64), method.flow.sigma_data, item()
    rng.normal((D,))  # the data's
    log_q = method.law.cut(math.log(0.5) - 0.1 + 1.6 * rng.normal(()))
    theta = torch.atan(log_q.exp() / sigma_data).view(-1, 1)
    x = theta.cos() * again.real + theta.sin() * sigma_data * rng.normal((D,))
    cond, uncond = method.teacher.encode(again.conditions)
    t = log_q.exp()
    x_0 = method.teacher(x / theta.cos(), t, cond, uncond, 2.0)
    way = (theta.cos() * x - x_0) / theta.sin()
    clear(student)
    ours = (theta.cos() * x - student(x / theta.cos(), t, cond)) / theta.sin()
    h = 1e-6
    ahead, behind = (
        (a.cos() * (x + s * way) - student((x + s * way) / a.cos(), 0.5 * a.tan().flatten(), cond)) / a.sin()
        for s in (h, -h)
        for a in [theta + s]
    )
    slope = ((ahead - behind) / (2 * h)).detach()
    g = -(theta.cos() ** 2) * (ours.detach() - way) - 0.5 * theta.cos() * theta.sin() * (x + slope)
    g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    (-2 * g * ours / (SIZE * D * sigma_data)).sum().backward()
    torch.testing.assert_close(found, student.network.std.grad, atol=1e-7, rtol=1e-5)


class Bumps(ClosedForm):
    """F = a(ln sigma) x + b(ln sigma) under EDM's preconditioning, a and b sums of bumps: linear in its parameters."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule, "edm")
        self.weights = nn.Parameter(torch.zeros(2, 16, dtype=torch.float64))

    def bumps(self, log_sigma: Tensor) -> Tensor:
        return (-0.5 * (log_sigma.view(-1, 1) - torch.linspace(-5.5, 3.5, 16, dtype=torch.float64)) ** 2).exp()

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        slope, bias = (self.bumps(4 * timestep) @ weights for weights in self.weights)
        return (slope.view(-1, 1) * x + bias.view(-1, 1),)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def start_as(self, teacher: ClosedForm, low: float, high: float) -> None:
        """The least squares fit of a teacher that is affine in x."""
        log_sigma = torch.linspace(math.log(low), math.log(high), 200, dtype=torch.float64)
        known = denoiser(teacher)
        ones, t = torch.ones(200, 1, dtype=torch.float64), log_sigma.exp()
        bias = known.output(0 * ones, t, {})
        slope = (known.output(ones, t, {}) - bias) * (t.view(-1, 1) ** 2 + 0.25).sqrt()
        bumps = self.bumps(log_sigma)
        self.weights.copy_(torch.linalg.lstsq(bumps, torch.cat([slope, bias], 1), driver="gelsd").solution.T)


def test_it_converges_to_the_exact_flow():
    """One step from sigma then has the slope s / sqrt(s^2 + sigma^2) about the mean, and no more the denoiser's s^2 / V."""
    schedule = EDM(0.05, 10.0)
    network = Gaussian(schedule, "edm", mean=0.4, std=0.6)
    student = Bumps(schedule)
    student.start_as(network, 0.05, 10.0)
    teacher = ClosedFormTeacher(network, (1,))
    method = objective(SCM, teacher, times=[10.0], noise_mean=0.0, tangent_warmup=20, tangent_floor=1.0)
    method.generator.denoiser = denoiser(student)
    sigma, std = torch.tensor([0.1, 0.3, 1.0, 4.0, 9.0], dtype=torch.float64), 0.6
    one, exact, by_teacher = (
        torch.ones(5, 1, dtype=torch.float64),
        std / (std**2 + sigma**2).sqrt(),
        0.36 / (0.36 + sigma**2),
    )

    def answers() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            high, low = (method.generator.denoiser(x * one, sigma, {}).flatten() for x in (1.4, 0.4))
        return high - low, low

    torch.testing.assert_close(answers()[0], by_teacher, atol=0.02, rtol=0)
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 120)
        rng = Rng(1, step, 512, dtype=torch.float64)
        optimizer.zero_grad()
        play(method, step, Batch(torch.zeros(512, dtype=torch.long), 0.4 + std * rng.normal((1,)), rng))
        optimizer.step()
    slope, low = answers()
    torch.testing.assert_close(slope, exact, atol=0.005, rtol=0.03)
    torch.testing.assert_close(low, torch.full_like(low, 0.4), atol=0.03, rtol=0)


# --- a step


@pytest.mark.parametrize("how, passes", [("forward", 2), ("difference", 3)])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(guidance, how, passes):
    teacher = dit()
    method = objective(SCM, teacher, guidance=guidance, jvp=how)
    networks = (method.generator.denoiser.network, teacher.denoiser.network)
    student, real = (Calls(network) for network in networks)
    graphs: list[bool] = []
    networks[0].register_forward_hook(lambda module, args, out: graphs.append(out[0].requires_grad))
    assert play(method, 0, batch(teacher, size=2)) == ["generator"]
    assert student.finished == 2 * passes and graphs == [False] * (passes - 1) + [True]
    assert real.finished == 2 * (2 if guidance > 1 else 1) and real.stopped == student.stopped == 0
    assert any(has_gradient(method.generator)) and not any(has_gradient(teacher.denoiser))


def test_levels():
    """ln tan(theta) ~ N(mean, std^2), cut to the schedule; a share of them where the student starts."""
    method = objective(SCM, EDMTeacher(edm_pipeline(), Facts("x")), times=[80.0], noise_mean=0.4, noise_std=0.7)
    log_q = method.levels(Rng(0, 0, 20_000)) - math.log(0.5)
    assert float(log_q.mean()) == pytest.approx(0.4, abs=0.02) and float(log_q.std()) == pytest.approx(0.7, abs=0.02)
    method = objective(SCM, dit(), times=[499], max_noise=0.5, noise_std=9.0)
    log_q = method.levels(Rng(0, 0, 1000))
    alpha, sigma = linear_vp().coefficients(torch.tensor([499]))
    (low, high), start = linear_vp().log_range(), float((sigma / alpha).log())
    assert float(log_q.min()) == pytest.approx(low, abs=1e-3) and float(log_q.max()) == pytest.approx(high, abs=1e-5)
    assert float(((log_q - start).abs() < 1e-5).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_without_real_samples():
    teacher = dit()
    method = objective(SCM, teacher)
    assert SCM.uses_real(method.config)
    with pytest.raises(ValueError, match="--data"):
        play(method, 0, batch(teacher, real=False))


def test_defaults():
    train, options = resolve(SCM.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and (train.beta1, train.clip_norm) == (0.9, 1.0)
    assert (options.noise_std, options.tangent_floor, options.jvp, options.max_noise) == (1.6, 0.1, "forward", 0.0)
    with pytest.raises(ValueError, match="forward, difference"):
        resolve(SCM.Config, {}, {}, {"jvp": "backward"})
