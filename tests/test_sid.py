"""SiD against closed forms: its gradient at each sample and in expectation, the order of updates, passes and leaks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gaussian import TYPES, Calls, ClosedForm, ClosedFormTeacher, Gaussian, denoiser, fixed_level, grid
from playing import LEVELS, MU, TAU, M, S, batch, clear, dit, has_gradient, linear_vp, objective, play, zeros
from tiny import edm_pipeline
from torch import Tensor, nn

from onestep.config import resolve
from onestep.objectives import score
from onestep.objectives.base import Batch
from onestep.objectives.score import per_sample_weight
from onestep.objectives.sid import SiD, sid_loss
from onestep.prediction import add_noise
from onestep.rng import Rng
from onestep.schedule import EDM, Schedule
from onestep.teacher import EDMTeacher, Facts

SIZE, D = 4, 5
ALPHAS = (0.5, 1.0, 1.2)


class Linear(ClosedForm):
    """x0 = W x_t + b + class, with a random W and b for each seed."""

    def __init__(self, schedule: Schedule, kind: str, seed: int, identity: bool = False):
        super().__init__(schedule, kind)
        source = torch.Generator().manual_seed(seed)
        w, b = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((D, D), (D,)))
        self.w = nn.Parameter(torch.eye(D, dtype=torch.float64) if identity else w)
        self.b = nn.Parameter(torch.zeros(D, dtype=torch.float64) if identity else b)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t @ self.w.T + self.b + self.label

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.label = cond["class_labels"].double().view(-1, 1)
        return super().forward(x, timestep, return_dict)


def linear(kind: str, schedule: Schedule, identity: bool = False, guidance: float = 1.0, **options: Any) -> SiD:
    """An objective whose teacher and critic are different linear networks."""
    teacher = ClosedFormTeacher(Linear(schedule, kind, 1, identity), shape=(D,))
    method = objective(SiD, teacher, guidance=guidance, times=[0], **options)
    method.fake = denoiser(Linear(schedule, kind, 2))
    return method


def gradient(method: SiD) -> tuple[Tensor, Tensor]:
    """(x, d loss / dx) at random samples x, shape (SIZE, D), of the classes 0, 1, 2, 0."""
    x = torch.randn(SIZE, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    conditions = torch.arange(SIZE) % 3
    cond, uncond = method.teacher.encode(conditions)
    item = Batch(conditions, None, Rng(1, 0, SIZE, dtype=torch.float64))
    return x.detach(), torch.autograd.grad(method.generator_loss(x, item, cond, uncond), x)[0]


def by_hand(method: SiD, x: Tensor, guidance: float = 1.0) -> Tensor:
    """w/(B D) (alpha_t M^T (f_real - x - a y) + (alpha_t A^T - 1 - a alpha_t M^T) y), M = A - B, y = f_real - f_fake."""
    rng, a = Rng(1, 0, SIZE, dtype=torch.float64), method.config.alpha
    t = method.schedule.at(rng.uniform(method.config.t_min, method.config.t_max))
    alpha, sigma = (c.view(-1, 1) for c in method.schedule.coefficients(t))
    x_t = alpha * x + sigma * rng.normal((D,))
    real, fake = method.teacher.denoiser.network, method.fake.network
    label = (torch.arange(SIZE) % 3).double().view(-1, 1)
    f_real = x_t @ real.w.T + real.b + 3 + guidance * (label - 3)  # the null class is 3
    f_fake = x_t @ fake.w.T + fake.b + label
    y, m = f_real - f_fake, real.w - fake.w
    inner = alpha * (f_real - x - a * y) @ m + alpha * y @ real.w - y - a * alpha * y @ m
    weight = 1 / (x - f_real).abs().mean(1, keepdim=True).clamp_min(1e-5)
    return (weight * inner / (SIZE * D)).detach()


@pytest.mark.parametrize("a", ALPHAS)
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_at_each_sample(kind, a):
    method = linear(kind, linear_vp(), alpha=a)
    x, got = gradient(method)
    torch.testing.assert_close(got, by_hand(method, x), atol=1e-12, rtol=1e-9)


def test_guidance_is_the_teachers_alone():
    """The real estimate is u + w (c - u) of the class and the null class, the fake one stays conditional."""
    method = linear("epsilon", linear_vp(), guidance=2.5)
    x, got = gradient(method)
    torch.testing.assert_close(got, by_hand(method, x, guidance=2.5), atol=1e-12, rtol=1e-9)


def test_weight_has_a_limit():
    """At next to no noise an identity is 1e-7 from x: the weight is 1e5, not 1e7."""
    method = linear("sample", EDM(1e-7, 1e-7), identity=True)
    x, got = gradient(method)
    expected = by_hand(method, x)
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-6)
    assert float(expected.abs().max()) > 1e3


@pytest.mark.parametrize("owner", ["teacher", "fake"])
def test_a_denoiser_without_gradient_is_not_sid(owner):
    """The comparison above sees a no_grad around either network."""
    method = linear("epsilon", linear_vp())
    if owner == "teacher":
        real = method.real
        method.real = lambda *args: real(*args).detach()  # type: ignore[method-assign]
    else:
        forward = method.fake.forward
        method.fake.forward = lambda *args: forward(*args).detach()  # type: ignore[method-assign]
    x, got = gradient(method)
    assert not torch.allclose(got, by_hand(method, x), rtol=0.1)


# --- in expectation


def expected_gradient(level: str, kind: str, a: float, normalised: bool = False) -> tuple[float, float]:
    """d/dmu, d/dtau of E[loss] for x = mu + tau z by quadrature, exact without the weight: the loss is quadratic."""
    schedule, _, _ = fixed_level(level)
    (z, eps), weights = grid(80 if normalised else 20, 2)
    x = (MU + TAU * z).requires_grad_()
    t = schedule.at(torch.full((len(z),), 0.35, dtype=torch.float64))
    x_t = add_noise(schedule, x, eps, t)
    fake, real = denoiser(Gaussian(schedule, kind, MU, TAU))(x_t, t, {}), denoiser(Gaussian(schedule, kind))(x_t, t, {})
    weight = per_sample_weight(x.detach(), real.detach()).clamp_max(5) if normalised else 1.0
    # the loss is a plain mean over the nodes: their weights ride on its own weight
    (by_x,) = torch.autograd.grad(sid_loss(x, fake, real, a, weight * weights * len(z)), x)
    return float(by_x.sum()), float((by_x * z).sum())


def exact_gradient(level: str, a: float) -> tuple[float, float]:
    """T/2 + (1 - a) dL1: the sampling law held still, and the part by which alpha moves away from that."""
    _, alpha, sigma = fixed_level(level)
    p, q = alpha**2 * TAU**2 + sigma**2, alpha**2 * S**2 + sigma**2
    gap, pull = alpha * S**2 / q - alpha * TAU**2 / p, (1 - alpha**2 * S**2 / q) * (M - MU)
    half = (-pull * (1 - alpha**2 * TAU**2 / p), -2 * gap * alpha * TAU * sigma**2 / p)
    moving = (2 * gap * alpha * pull, 2 * gap**2 * alpha**2 * TAU)
    return half[0] + (1 - a) * moving[0], half[1] + (1 - a) * moving[1]


GOLDEN = {
    (0.5, "ve"): (-0.50267360, -0.13358596),
    (0.5, "vp"): (-0.18476216, -0.12230214),
    (0.5, "flow"): (-0.07643157, -0.07771501),
    (1.0, "ve"): (-0.61301659, -0.14679776),
    (1.0, "vp"): (-0.27489004, -0.14628295),
    (1.0, "flow"): (-0.12935055, -0.09770022),
    (1.2, "ve"): (-0.65715378, -0.15208248),
    (1.2, "vp"): (-0.31094120, -0.15587527),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("a", ALPHAS)
def test_expected_gradient(a, level, kind):
    got = expected_gradient(level, kind, a)
    assert got == pytest.approx(exact_gradient(level, a), abs=1e-10)
    if (a, level) in GOLDEN:
        assert got == pytest.approx(GOLDEN[a, level], abs=1e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_of_one_half_is_the_fisher_divergence(level):
    """1/2 dF by finite differences, F = E|y|^2 = ((1 - A alpha)(m - mu))^2 + (A - B)^2 P, the sampling law included."""
    _, alpha, sigma = fixed_level(level)
    gain = alpha * S**2 / (alpha**2 * S**2 + sigma**2)

    def f(mu: float, tau: float) -> float:
        p = alpha**2 * tau**2 + sigma**2
        return ((1 - gain * alpha) * (M - mu)) ** 2 + (gain - alpha * tau**2 / p) ** 2 * p

    h = 1e-6
    numeric = ((f(MU + h, TAU) - f(MU - h, TAU)) / 4 / h, (f(MU, TAU + h) - f(MU, TAU - h)) / 4 / h)
    assert expected_gradient(level, "epsilon", 0.5) == pytest.approx(numeric, abs=1e-8)


def test_the_weight_of_a_sample_bends_the_gradient():
    """It depends on x, not on x_t alone: no single factor takes the exact gradient to the weighted one.

    One element a sample has a weight without a mean, so that it is cut off at 5 here.
    """
    by_mu, by_tau = (w / g for w, g in zip(expected_gradient("vp", "epsilon", 1.0, True), exact_gradient("vp", 1.0)))
    assert by_mu > 1 and by_tau > 1 and abs(by_tau / by_mu - 1) > 0.2


@pytest.mark.parametrize("a", ALPHAS)
@pytest.mark.parametrize("kind", TYPES)
def test_equal_denoisers_give_no_gradient(kind, a):
    method = linear(kind, linear_vp(), alpha=a)
    method.fake = method.teacher.copy()
    _, got = gradient(method)
    assert float(got.abs().max()) < 1e-13


# --- updates


@pytest.mark.parametrize("ratio", [1, 3])
def test_critic_first_and_generator_every_ratio_th_step(ratio):
    teacher = ClosedFormTeacher(Gaussian(linear_vp()))
    method = objective(SiD, teacher, ratio=ratio)
    order = [play(method, step, batch(teacher, step, real=False)) for step in range(7)]
    assert order == [["critic", "generator"] if step % ratio == 0 else ["critic"] for step in range(7)]
    assert SiD.Config().ratio == 1 and not SiD.uses_real(method.config)


def test_each_player_has_samples_of_its_own(monkeypatch):
    """The generator's are made after the critic's update and carry its gradient."""
    teacher = dit()
    method = objective(SiD, teacher)
    made: list[Tensor] = []
    sample = method.sample
    monkeypatch.setattr(method, "sample", lambda *args, **kwargs: (made.append(sample(*args, **kwargs)), made[-1])[1])
    turns = method.step(batch(teacher), 0)
    assert next(turns)[0] == "critic" and len(made) == 1 and not made[0].requires_grad
    assert next(turns)[0] == "generator" and len(made) == 2 and made[1].requires_grad
    assert not torch.allclose(made[0], made[1])
    turns.close()


@pytest.mark.parametrize("make, guidance", [(dit, 1.5), (lambda: EDMTeacher(edm_pipeline(), Facts("x")), 1.0)])
def test_number_of_network_passes(make, guidance):
    """A step: student 1 without gradient and 1 with, critic 1 and 1, teacher 1 (2 guided), nothing cut short."""
    teacher, size, steps = make(), 2, 3
    method = objective(SiD, teacher, guidance=guidance)
    networks = (method.generator.denoiser.network, method.fake.network, teacher.denoiser.network)
    graphs: list[list[bool]] = [[], [], []]
    for network, graph in zip(networks, graphs):
        network.register_forward_hook(lambda m, a, out, graph=graph: graph.append(out[0].requires_grad))
    student, fake, real = (Calls(network) for network in networks)
    for step in range(steps):
        play(method, step, batch(teacher, step, size, real=False))
    assert (student.finished, fake.finished) == (2 * steps * size, 2 * steps * size)
    assert real.finished == steps * size * (2 if guidance > 1 else 1)
    assert student.stopped == fake.stopped == real.stopped == 0
    assert graphs == [[False, True] * steps, [True, True] * steps, [True] * steps]


def turns_of(method: SiD) -> Iterator[str]:
    """The players of one step, each with nothing but its own turn's gradients."""
    for player, loss in method.step(batch(method.teacher), 0):
        clear(method.fake, method.generator, method.teacher.denoiser)
        loss.backward()
        yield player


def test_no_gradient_leaks():
    method = objective(SiD, dit(), guidance=1.5)
    turns = turns_of(method)
    assert next(turns) == "critic"
    assert any(has_gradient(method.fake)) and not any(has_gradient(method.generator))
    assert next(turns) == "generator"
    assert not any(has_gradient(method.fake)) and not any(has_gradient(method.teacher.denoiser))
    assert sum(float(p.grad.abs().sum()) for p in method.generator.parameters() if p.grad is not None) > 0
    assert list(turns) == [] and all(p.requires_grad for p in method.fake.parameters())


def test_the_leak_test_can_fail(monkeypatch):
    """Without `frozen` the same step does give the critic gradients: the test above would see them."""
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    method = objective(SiD, dit(), guidance=1.5)
    turns = turns_of(method)
    assert [next(turns), next(turns)] == ["critic", "generator"]
    assert any(has_gradient(method.fake))


def test_a_distributed_critic_passes_gradients_on(tmp_path):
    """Its wrapper sees forwards with a graph whose parameters stay out of the backward pass, and takes no harm."""
    plain, spread = (objective(SiD, dit(), guidance=1.5) for _ in range(2))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for member in (spread.fake, spread.generator.denoiser):
            member.network = nn.parallel.DistributedDataParallel(member.network)
        for step in range(3):
            for method in (plain, spread):
                clear(method.fake, method.generator)
                assert play(method, step, batch(method.teacher, step)) == ["critic", "generator"]
            for ours, theirs in zip(plain.generator.parameters(), spread.generator.parameters()):
                torch.testing.assert_close(theirs.grad, ours.grad)
            for ours, theirs in zip(plain.fake.parameters(), spread.fake.parameters()):
                torch.testing.assert_close(theirs.grad, ours.grad)
    finally:
        torch.distributed.destroy_process_group()


# --- options


def test_defaults():
    train, options = resolve(SiD.Config, {}, {}, {})
    assert (train.beta1, train.beta2) == (0.0, 0.999)
    assert (options.alpha, options.ratio, options.t_min, options.t_max) == (1.2, 1, 0.0, 0.8)


def test_noise_levels_are_the_papers():
    """All of EDM's grid up to 0.8 of it, where sigma is 24.4."""
    schedule = EDM()
    method = objective(SiD, ClosedFormTeacher(Gaussian(schedule)))
    _, t = method.noised(torch.zeros(1000, 1), Batch(zeros(1000), None, Rng(0, 0, 1000, dtype=torch.float64)))
    assert float(schedule.at(torch.tensor(0.8, dtype=torch.float64))) == pytest.approx(24.41, abs=0.01)
    assert 23 < float(t.max()) < 24.42 and float(t.min()) < 0.003
