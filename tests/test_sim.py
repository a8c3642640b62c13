"""SIM against closed forms: its gradient at each sample and in expectation, the order of updates, passes and leaks."""

import contextlib
import math
from typing import Any

import pytest
import torch
from gaussian import TYPES, Calls, ClosedForm, ClosedFormTeacher, Gaussian, Mixture, denoiser, fixed_level
from playing import LEVELS, MU, TAU, batch, clear, dit, has_gradient, linear_vp, objective, play, zeros
from tiny import edm_pipeline
from torch import Tensor, nn

from onestep.config import resolve
from onestep.objectives import score, sim
from onestep.objectives.base import Batch
from onestep.objectives.sid import sid_loss
from onestep.objectives.sim import SIM, pseudo_huber, sim_loss, squared_l2
from onestep.rng import Rng
from onestep.schedule import Schedule
from onestep.teacher import EDMTeacher, Facts

SIZE, D, C = 4, 5, 0.3


class Linear(ClosedForm):
    """x0 = W x_t + b + class, with a random W and b for each seed."""

    def __init__(self, schedule: Schedule, kind: str, seed: int):
        super().__init__(schedule, kind)
        source = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(D, D, generator=source, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(D, generator=source, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t @ self.w.T + self.b + self.label

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.label = cond["class_labels"].double().view(-1, 1)
        return super().forward(x, timestep, return_dict)


def linear(kind: str = "epsilon", guidance: float = 1.0, **options: Any) -> SIM:
    """An objective whose teacher and critic are different linear networks."""
    schedule = linear_vp()
    teacher = ClosedFormTeacher(Linear(schedule, kind, 1), shape=(D,))
    method = objective(SIM, teacher, guidance=guidance, **options)
    method.fake = denoiser(Linear(schedule, kind, 2))
    return method


def gradient(method: SIM) -> tuple[Tensor, Tensor]:
    """(x, d loss / dx) at random samples x, shape (SIZE, D), of the classes 0, 1, 2, 0."""
    x = torch.randn(SIZE, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    conditions = torch.arange(SIZE) % 3
    cond, uncond = method.teacher.encode(conditions)
    item = Batch(conditions, None, Rng(1, 0, SIZE, dtype=torch.float64))
    return x.detach(), torch.autograd.grad(method.generator_loss(x, item, cond, uncond), x)[0]


def by_hand(method: SIM, x: Tensor, c: float = C, guidance: float = 1.0) -> Tensor:
    """-(alpha_t (B - A)^T (r/n - y (y.r)/n^3) + (alpha_t B - 1)^T y/n) / (SIZE sqrt(D)), and with 2 y/D in place of y/n.

    y = f_fake - f_real, r = f_fake - x, n = sqrt(|y|^2 + c^2); A and B are the matrices of teacher and critic.
    """
    rng = Rng(1, 0, SIZE, dtype=torch.float64)
    t = method.schedule.at(rng.uniform(method.config.t_min, method.config.t_max))
    alpha, sigma = (each.view(-1, 1) for each in method.schedule.coefficients(t))
    x_t = alpha * x + sigma * rng.normal((D,))
    real, fake = method.teacher.denoiser.network, method.fake.network
    label = (torch.arange(SIZE) % 3).double().view(-1, 1)
    f_real = x_t @ real.w.T + real.b + 3 + guidance * (label - 3)  # the null class is 3
    f_fake = x_t @ fake.w.T + fake.b + label
    y, r = f_fake - f_real, f_fake - x
    if method.config.distance == "squared-l2":
        u, inner = 2 * y / D, 2 * r / D
    else:
        n = (y.square().sum(1, keepdim=True) + c**2).sqrt()
        u, inner = y / n / math.sqrt(D), (r / n - y * (y * r).sum(1, keepdim=True) / n**3) / math.sqrt(D)
    return (-(alpha * inner @ (fake.w - real.w) + alpha * u @ fake.w - u) / SIZE).detach()


@pytest.mark.parametrize("distance", sim.DISTANCES)
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_at_each_sample(kind, distance):
    method = linear(kind, distance=distance, huber_c=C)
    x, got = gradient(method)
    torch.testing.assert_close(got, by_hand(method, x), atol=1e-12, rtol=1e-9)


def test_guidance_is_the_teachers_alone():
    """The real estimate is u + w (c - u) of the class and the null class, the fake one stays conditional."""
    method = linear(guidance=2.5, huber_c=C)
    x, got = gradient(method)
    torch.testing.assert_close(got, by_hand(method, x, guidance=2.5), atol=1e-12, rtol=1e-9)


def test_c_follows_the_dimension_unless_it_is_given():
    """0.00054 sqrt(D), seen where the denoisers are so near that c decides."""
    method = linear()
    near = method.teacher.copy()
    with torch.no_grad():
        near.network.b.add_(1e-4)
    method.fake = near
    x, got = gradient(method)
    torch.testing.assert_close(got, by_hand(method, x, 0.00054 * math.sqrt(D)), atol=1e-12, rtol=1e-8)
    assert not torch.allclose(got, by_hand(method, x, 0.00054), rtol=0.5)


@pytest.mark.parametrize("stopped", ["teacher", "fake", "normaliser", "distance"])
def test_nothing_may_be_detached(stopped, monkeypatch):
    """The comparison above sees a no_grad around either network, and a detached norm or d'(y)."""
    method = linear(huber_c=C)
    if stopped == "teacher":
        real = method.real
        monkeypatch.setattr(method, "real", lambda *args: real(*args).detach())
    elif stopped == "fake":
        forward = method.fake.forward
        monkeypatch.setattr(method.fake, "forward", lambda *args: forward(*args).detach())
    elif stopped == "normaliser":

        def held(y: Tensor, c: float) -> Tensor:
            return y / (y.square().sum(1, keepdim=True) + c**2).sqrt().detach() / math.sqrt(D)

        monkeypatch.setitem(sim.DISTANCES, "pseudo-huber", held)
    else:
        monkeypatch.setitem(sim.DISTANCES, "pseudo-huber", lambda y, c: pseudo_huber(y, c).detach())
    x, got = gradient(method)
    assert not torch.allclose(got, by_hand(method, x), rtol=0.1)


# --- in expectation


def line(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes on [-8, 8], and weights that are N(0, 1): Gauss-Hermite is too coarse for a small c."""
    points = torch.linspace(-8, 8, nodes, dtype=torch.float64)
    density = torch.exp(-0.5 * points.square())
    return points, density / density.sum()


def expected_gradient(level: str, kind: str) -> tuple[float, float]:
    """d/dmu, d/dtau of E[loss] for x = mu + tau z, a critic that is exact and a mixture as teacher."""
    schedule, _, _ = fixed_level(level)
    nodes, weights = line(161)
    z, eps = (each.reshape(-1, 1) for each in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).view(-1, 1)
    method = objective(SIM, ClosedFormTeacher(Mixture(schedule, kind)), times=[0], huber_c=C)
    method.fake = denoiser(Gaussian(schedule, kind, MU, TAU))

    class Given:
        """The nodes in place of draws."""

        normal = staticmethod(lambda shape: eps)
        uniform = staticmethod(lambda low, high: torch.full((len(eps),), 0.35, dtype=torch.float64))

    x = (MU + TAU * z).requires_grad_()
    cond, uncond = method.teacher.encode(zeros(len(z)))
    loss = method.generator_loss(x, Batch(zeros(len(z)), None, Given()), cond, uncond)
    (by_x,) = torch.autograd.grad(loss, x)  # of a plain mean over the nodes, each of which owns its x
    by_x = by_x * len(z) * weight
    return float(by_x.sum()), float((by_x * z).sum())


def exact_gradient(level: str) -> tuple[float, float]:
    """E_{x ~ p_t}[d'(y) d fake(x)/d(mu, tau)], fake(x) = mu + B (x - alpha mu): the law of x held still."""
    schedule, alpha, sigma = fixed_level(level)
    variance = alpha**2 * TAU**2 + sigma**2
    nodes, weights = line(8001)
    x = alpha * MU + math.sqrt(variance) * nodes
    gain, slope = alpha * TAU**2 / variance, 2 * alpha * TAU * sigma**2 / variance**2
    level_of = torch.ones(len(x), 1, dtype=torch.float64)
    real = Mixture(schedule, "sample").posterior(x[:, None], alpha * level_of, sigma * level_of)[:, 0].detach()
    y = MU + gain * (x - alpha * MU) - real
    u = weights * y / (y.square() + C**2).sqrt()
    return float((u * (1 - gain * alpha)).sum()), float((u * slope * (x - alpha * MU)).sum())


GOLDEN = {"ve": (-0.41438504, -0.34701049), "vp": (-0.13816585, -0.46954249), "flow": (-0.05229843, -0.39266449)}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_expected_gradient_is_that_of_the_distance(level, kind):
    got = expected_gradient(level, kind)
    assert got == pytest.approx(exact_gradient(level), abs=1e-10)
    assert got == pytest.approx(GOLDEN[level], abs=1e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_a_detached_distance_loses_half_of_the_scale(level, monkeypatch):
    monkeypatch.setitem(sim.DISTANCES, "pseudo-huber", lambda y, c: pseudo_huber(y, c).detach())
    by_mu, by_tau = expected_gradient(level, "epsilon")
    assert (by_mu, 2 * by_tau) == pytest.approx(GOLDEN[level], abs=1e-8)


@pytest.mark.parametrize("distance", sim.DISTANCES)
@pytest.mark.parametrize("kind", TYPES)
def test_equal_denoisers_give_no_gradient(kind, distance):
    method = linear(kind, distance=distance)
    method.fake = method.teacher.copy()
    _, got = gradient(method)
    assert float(got.abs().max()) < 1e-12


def estimates() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    x, fake, real = (torch.randn(3, 2, 4, generator=source, dtype=torch.float64) for _ in range(3))
    return x, fake, real


def test_squared_distance_is_twice_sid_with_alpha_1():
    x, fake, real = estimates()
    ours = sim_loss(x, fake, real, lambda y: squared_l2(y, 0.0))
    torch.testing.assert_close(ours, 2 * sid_loss(x, fake, real, 1.0, 1.0), atol=1e-14, rtol=1e-12)


def test_pseudo_huber_between_its_limits():
    """Large c: c sqrt(D) times the loss is D/2 times the squared one. Small c: d'(y) has norm 1/sqrt(D)."""
    x, fake, real = estimates()
    c, size = 1e6, x[0].numel()
    wide = sim_loss(x, fake, real, lambda y: pseudo_huber(y, c))
    squared = sim_loss(x, fake, real, lambda y: squared_l2(y, c))
    torch.testing.assert_close(c * math.sqrt(size) * wide, size / 2 * squared, atol=0, rtol=1e-9)
    norm = pseudo_huber((fake - real).flatten(1), 1e-6).norm(dim=1)
    torch.testing.assert_close(norm, torch.full_like(norm, size**-0.5), atol=0, rtol=1e-9)


# --- updates


@pytest.mark.parametrize("make, guidance", [(dit, 1.5), (lambda: EDMTeacher(edm_pipeline(), Facts("x")), 1.0)])
def test_order_of_updates_and_number_of_network_passes(make, guidance):
    """A step: student 1 without gradient and 1 with, critic 1 and 1, teacher 1 (2 guided), nothing cut short."""
    teacher, size, steps = make(), 2, 2
    method = objective(SIM, teacher, guidance=guidance)
    networks = (method.generator.denoiser.network, method.fake.network, teacher.denoiser.network)
    graphs: list[list[bool]] = [[], [], []]
    for network, graph in zip(networks, graphs):
        network.register_forward_hook(lambda m, a, out, graph=graph: graph.append(out[0].requires_grad))
    student, fake, real = (Calls(network) for network in networks)
    for step in range(steps):
        assert play(method, step, batch(teacher, step, size, real=False)) == ["critic", "generator"]
    assert (student.finished, fake.finished) == (2 * steps * size, 2 * steps * size)
    assert real.finished == steps * size * (2 if guidance > 1 else 1)
    assert student.stopped == fake.stopped == real.stopped == 0
    assert graphs == [[False, True] * steps, [True, True] * steps, [True] * steps]


def leaks(method: SIM) -> tuple[bool, bool]:
    """Whether the generator's turn reached parameters of the critic or the teacher; also checks the critic's turn."""
    turns = method.step(batch(method.teacher), 0)
    player, loss = next(turns)
    loss.backward()
    assert player == "critic" and any(has_gradient(method.fake)) and not any(has_gradient(method.generator))
    clear(method.fake)
    player, loss = next(turns)
    loss.backward()
    assert player == "generator" and list(turns) == []
    assert sum(float(p.grad.abs().sum()) for p in method.generator.parameters() if p.grad is not None) > 0
    return any(has_gradient(method.fake)), any(has_gradient(method.teacher.denoiser))


def test_no_gradient_leaks():
    method = objective(SIM, dit(), guidance=1.5)
    assert leaks(method) == (False, False)
    assert all(p.requires_grad for p in method.fake.parameters())


def test_the_leak_test_can_fail(monkeypatch):
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    assert leaks(objective(SIM, dit(), guidance=1.5)) == (True, False)


def test_defaults():
    train, options = resolve(SIM.Config, {}, {}, {})
    assert (train.beta1, train.beta2) == (0.0, 0.999)
    assert (options.distance, options.huber_c, options.ratio) == ("pseudo-huber", 0.0, 1)
    assert (options.t_min, options.t_max) == (0.0, 0.8)
    with pytest.raises(ValueError, match="one of pseudo-huber, squared-l2"):
        resolve(SIM.Config, {}, {}, {"distance": "huber"})
