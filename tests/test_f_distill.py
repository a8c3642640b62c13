"""f-distill against closed forms: gradients of seven divergences, the density ratio, exact resuming, updates and passes."""

import contextlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from gaussian import TYPES, Calls, ClosedFormTeacher, Gaussian, GridRng, denoiser, fixed_level, grid
from playing import LEVELS, MU, TAU, batch, dit, has_gradient, linear_vp, play
from tiny import edm_pipeline
from torch import Tensor, nn

from onestep.config import resolve
from onestep.denoiser import Denoiser
from onestep.objectives import dmd2, f_distill, score
from onestep.objectives.base import Batch
from onestep.objectives.dmd2 import DMD2
from onestep.objectives.f_distill import WEIGHTS, FDistill, FDistillConfig, HeadsAndMeans
from onestep.rng import Rng
from onestep.run import make_trainer
from onestep.teacher import EDMTeacher, Facts
from onestep.trainer import Trainer

# --- the pass that gives an estimate and features


@pytest.mark.parametrize("kind", [*TYPES, "dit", "unet"])
def test_estimate_and_features_come_from_one_pass(kind):
    if kind in TYPES:
        teacher: Any = ClosedFormTeacher(Gaussian(linear_vp(), kind), shape=(2, 3))
    else:
        teacher = dit() if kind == "dit" else EDMTeacher(edm_pipeline(), Facts("x"))
    each: Denoiser = teacher.copy()
    dtype = next(each.parameters()).dtype
    x_t = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    t = each.schedule.at(torch.tensor([0.3, 0.7]))
    cond, _ = teacher.encode(torch.arange(2))
    calls = Calls(each.network)
    x_0, features = each.with_features(x_t, t, cond)
    assert (calls.passes, calls.finished, calls.stopped) == (1, 2, 0)
    assert torch.equal(x_0, each(x_t, t, cond))
    alone = each.features(x_t, t, cond)
    assert len(features) == len(alone) == 1 and torch.equal(features[0], alone[0])
    (slope,) = torch.autograd.grad(features[0].square().sum() + x_0.sum(), x_t)
    assert slope.abs().sum() > 0
    hooks = [module._forward_hooks for name, module in each.network.named_modules() if name]
    assert not any(hooks)


# --- divergences

F: dict[str, Callable[[float], float]] = {
    "reverse-kl": lambda r: -math.log(r),
    "forward-kl": lambda r: r * math.log(r),
    "js": lambda r: r * math.log(r) - (r + 1) * math.log((r + 1) / 2),
    "softened-reverse-kl": lambda r: (r + 1) * math.log((r + 1) / r),
    "squared-hellinger": lambda r: (1 - math.sqrt(r)) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
    "jeffreys": lambda r: (r - 1) * math.log(r),
}
FACTOR = {**dict.fromkeys(F, 1.0), "squared-hellinger": 0.5, "neyman": 2.0}
"""f''(r) r^2 over h(r)."""


@pytest.mark.parametrize("name", F)
def test_weights_are_the_second_derivatives(name):
    assert set(F) == set(WEIGHTS)
    for r in (0.3, 1.0, 4.0):
        step = 1e-3 * r
        curvature = (F[name](r + step) - 2 * F[name](r) + F[name](r - step)) / step**2
        assert float(WEIGHTS[name](torch.tensor(r))) == pytest.approx(curvature * r**2 / FACTOR[name], rel=1e-4)


MEAN, STD = 0.2, 0.5  # a teacher lighter than the student, so that the ratio is bounded
GOLDEN = {  # d/dmu, d/dtau of E_p f(q / p) at VE, VP and flow: central differences of quadrature on 40,001 points
    "reverse-kl": [(-0.30927835, 0.01659542), (-0.73846154, 0.08805503), (-1.11123288, 0.18807192)],
    "forward-kl": [(-0.29268293, -0.03569304), (-0.65040650, -0.17626193), (-0.92316096, -0.35509423)],
    "js": [(-0.14374742, -0.00585477), (-0.31198470, -0.03309423), (-0.43444857, -0.07198198)],
    "softened-reverse-kl": [(-0.16553093, 0.02245020), (-0.42647684, 0.12114926), (-0.67678431, 0.26005389)],
    "squared-hellinger": [(-0.14699403, -0.00537513), (-0.32800935, -0.02894735), (-0.46651598, -0.06218888)],
    "neyman": [(-0.79958455, 0.20019986), (-2.87811762, 1.81809743), (-6.58601768, 6.62929245)],
    "jeffreys": [(-0.60196128, -0.01909762), (-1.38886804, -0.08820689), (-2.03439384, -0.16702232)],
}


class Holder(nn.Module):
    """A discriminator around any network of features."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.network(features)


class LogRatio(nn.Module):
    """log q(x_t) - log p(x_t), q and p Gaussians of mean m and variance v, from a feature that is x_t / scale."""

    def __init__(self, q: tuple[float, float], p: tuple[float, float], scale: float):
        super().__init__()
        self.q, self.p, self.scale = q, p, scale

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[0] * self.scale
        logs = [-0.5 * (x - m) ** 2 / v - 0.5 * math.log(v) for m, v in (self.q, self.p)]
        return logs[0] - logs[1]


def exact(monkeypatch: pytest.MonkeyPatch, level: str, kind: str, divergence: str) -> tuple[FDistill, LogRatio]:
    """f-distill with the denoiser of MU + TAU z for its critic, an exact discriminator, and ratios without limits."""
    schedule, alpha, sigma = fixed_level(level)
    laws = [(alpha * m, alpha**2 * s**2 + sigma**2) for m, s in ((MEAN, STD), (MU, TAU))]
    head = LogRatio(*laws, scale=math.hypot(sigma, 0.5) if kind == "edm" else 1.0)
    monkeypatch.setattr(dmd2, "heads_on", lambda *args: Holder(head))
    for limit, value in (("LEAST", 0.0), ("MOST", math.inf)):
        monkeypatch.setattr(f_distill, limit, value)
    monkeypatch.setattr(HeadsAndMeans, "mean", lambda self, r, u: torch.ones_like(r))
    teacher = ClosedFormTeacher(Gaussian(schedule, kind, MEAN, STD))
    made = playing.objective(FDistill, teacher, times=[0], divergence=divergence)
    made.fake = denoiser(Gaussian(schedule, kind, MU, TAU))
    return made, head


@pytest.mark.parametrize("divergence", GOLDEN)
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_is_the_divergences(monkeypatch, level, divergence):
    """E[h(r) alpha^2 / sigma^2 (fake - real) dx/dtheta] = d D_f / dtheta, for every prediction type."""
    _, alpha, sigma = fixed_level(level)
    (z, eps), weights = grid(28, 2)  # far nodes would have weights h whose plain mean drowns all others
    golden = [each / FACTOR[divergence] for each in GOLDEN[divergence][LEVELS.index(level)]]
    monkeypatch.setattr(f_distill, "per_sample_weight", lambda x, real: alpha**2 / sigma**2 * weights * len(weights))
    for kind in TYPES:
        with monkeypatch.context() as patch:
            made, head = exact(patch, level, kind, divergence)
            mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, TAU))
            x = mu + tau * z
            cond, uncond = made.teacher.encode(torch.zeros(len(z), dtype=torch.long))
            made.match(x, Batch(cond["class_labels"], None, GridRng([eps])), cond, uncond).backward()
            # h is divided by its plain mean over the nodes
            r = head([(alpha * x.detach() + sigma * eps) / head.scale]).exp()
            divisor = float(WEIGHTS[divergence](r).mean())
            assert mu.grad is not None and tau.grad is not None
            got = (float(mu.grad) * divisor, float(tau.grad) * divisor)
            assert got == pytest.approx(golden, abs=1e-7, rel=2e-7), kind
            assert not any(has_gradient(made.fake)) and not any(has_gradient(made.teacher.denoiser))


def test_divergences_differ():
    """The gradients that the test above tells apart do lie apart, also up to a factor."""
    slopes = {name: (tau / mu) for name, ((mu, tau), *_) in GOLDEN.items()}
    ordered = sorted(slopes.values())
    assert min(b - a for a, b in pairwise(ordered)) > 1e-3


def test_reverse_kl_is_dmd2_bit_for_bit():
    """h = 1: the same x, levels and noise give the same loss as without a density ratio."""
    teacher = dit()
    losses = []
    for kind, options in ((FDistill, {"divergence": "reverse-kl"}), (DMD2, {})):
        torch.manual_seed(0)
        made = playing.objective(kind, teacher, **options)
        with torch.no_grad():
            for parameter in made.fake.parameters():
                parameter.mul_(1.01)
        losses.append([float(loss.detach()) for _, loss in made.step(batch(teacher), 0)])
    assert losses[0] == losses[1]


def test_equal_denoisers_give_no_gradient():
    teacher = ClosedFormTeacher(Gaussian(linear_vp()), shape=(4, 1, 1))
    made = playing.objective(FDistill, teacher)
    x = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    cond, uncond = teacher.encode(torch.zeros(6, dtype=torch.long))
    made.match(x, Batch(cond["class_labels"], None, Rng(0, 0, 6, dtype=torch.float64)), cond, uncond).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


# --- the density ratio


class Logits(nn.Module):
    """The first feature, as it is."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return features[0]


def on_logits(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[FDistill, HeadsAndMeans]:
    monkeypatch.setattr(dmd2, "heads_on", lambda *args: Holder(Logits()))
    made = playing.objective(FDistill, ClosedFormTeacher(Gaussian(linear_vp())), **options)
    assert made.gan is not None and isinstance(made.gan.head.network, HeadsAndMeans)
    return made, made.gan.head.network


def test_ratios_are_clamped_averaged_in_bins_and_their_weights_over_the_batch(monkeypatch):
    made, heads = on_logits(monkeypatch, divergence="forward-kl", density_decay=0.5)
    logits = torch.tensor([[1.0, 3.0], [-99.0, -99.0], [99.0, 99.0], [0.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    u = torch.tensor([0.05, 0.06, 0.31, 0.39, 0.999], dtype=torch.float64)
    r = torch.tensor([math.e**2, 0.1, 20.0, 1.0, math.e**0.5], dtype=torch.float64)  # heads are averaged first
    first, second = (math.e**2 + 0.1) / 2, 10.5
    normalised = r / torch.tensor([first, first, second, second, math.e**0.5])
    torch.testing.assert_close(made._weight([logits], u), normalised / normalised.mean(), atol=1e-6, rtol=0)

    # a second batch: the sums of the first count half
    heads_only = made._weight([torch.zeros(1, 1, dtype=torch.float64)], torch.tensor([0.07], dtype=torch.float64))
    assert float(heads_only) == pytest.approx(1)
    expected = (0.5 * (math.e**2 + 0.1) + 1) / (0.5 * 2 + 1)
    assert float(heads.sums[0, 0] / heads.sums[1, 0]) == pytest.approx(expected, rel=1e-6)
    assert float(heads.sums[0, 3] / heads.sums[1, 3]) == pytest.approx(second, rel=1e-6)  # no sample, the same mean


def test_a_logit_of_any_size_gives_a_ratio_within_its_limits(monkeypatch):
    made, _ = on_logits(monkeypatch, divergence="neyman")
    weight = made._weight([torch.tensor([[1e4], [-1e4]])], torch.tensor([0.5, 0.5]))
    assert weight.tolist() == pytest.approx([0.2 / 20.1, 40 / 20.1], rel=1e-4)  # 1/20 and 10, over their mean


def test_the_ratio_is_real_over_fake():
    """The discriminator is taught softplus(D(fake)) + softplus(-D(real)), least at D = log(p_real / p_fake)."""
    fit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    real, fake = 0.3, 0.1  # densities at one point
    loss = fake * nn.functional.softplus(fit) + real * nn.functional.softplus(-fit)
    (slope,) = torch.autograd.grad(loss, fit)
    assert slope < 0  # D grows where there are more real samples
    at_optimum = torch.tensor(math.log(real / fake), dtype=torch.float64, requires_grad=True)
    loss = fake * nn.functional.softplus(at_optimum) + real * nn.functional.softplus(-at_optimum)
    assert float(torch.autograd.grad(loss, at_optimum)[0]) == pytest.approx(0, abs=1e-15)


def test_means_are_those_of_all_processes(monkeypatch):
    """Two processes with the same rows: sums are twice what one has, means and weights the same."""
    made, heads = on_logits(monkeypatch)
    logits, u = torch.tensor([[1.0], [0.2]]), torch.tensor([0.5, 0.52])
    alone = made._weight([logits], u)
    sums = heads.sums.clone()
    heads.sums.zero_()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2))
    together = made._weight([logits], u)
    assert torch.equal(heads.sums, 2 * sums)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gan_critic": 0.0}, r"gan_critic 0 does not train one; type for example --gan-critic 0.01"),
        ({"gan_t_max": 0.5}, r"gan_t_max 0.5 is below t_max 0.98: .* type --gan-t-max 0.98 or more, or --t-max 0.5"),
    ],
)
def test_options_without_a_density_ratio_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FDistillConfig(**options)
    with pytest.raises(ValueError, match=message):
        resolve(FDistillConfig, {}, options, {})


# --- a run


def test_a_resumed_run_is_the_run(tiny_teacher: Path, tiny_images: Path, tmp_path: Path):
    """The moving means are in the checkpoint; without them the student would be another one."""
    recipe = {"method": "f-distill", "teacher": str(tiny_teacher), "data": str(tiny_images), "output": str(tmp_path)}
    recipe |= {"batch_size": 8, "ratio": 1, "warmup": 0, "lr": 1e-3, "critic_lr": 1e-2, "init_rho": 2.5, "device": "cpu"}
    config, options = resolve(FDistillConfig, {}, recipe, {})

    def advance(run: Trainer, steps: int) -> Trainer:
        for _ in range(steps):
            run.update()
            run.step += 1
        return run

    def same(one: Trainer, other: Trainer, *names: str) -> bool:
        states = [[each for name in names for each in run._saved[name].state_dict().values()] for run in (one, other)]
        return all(torch.equal(a, b) for a, b in zip(*states))

    whole, later, forgetful = (make_trainer(config, options) for _ in range(3))
    advance(whole, 2).save()
    advance(whole, 2)
    later.resume()
    assert later.step == 2
    assert same(advance(later, 2), whole, *whole._saved)
    forgetful.resume()
    (sums,) = [buffer for module in forgetful._saved.values() for name, buffer in module.named_buffers() if name == "sums"]
    assert sums[1].sum() > 8
    sums.zero_()
    assert not same(advance(forgetful, 2), whole, "generator-0")


# --- updates


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(guidance):
    """Those of DMD2, at ratio 5: the density ratio takes no pass of its own."""
    teacher = dit()
    made = playing.objective(FDistill, teacher, guidance=guidance)
    student, real, fake = (Calls(each.network) for each in (made.generator.denoiser, teacher.denoiser, made.fake))
    order = [play(made, step, batch(teacher, step)) for step in range(5)]
    assert order == [["generator", "critic"], *[["critic"]] * 4]
    assert (student.finished, student.stopped) == (10, 0)
    assert (real.finished, real.stopped) == (4 if guidance > 1 else 2, 0)
    assert (fake.finished, fake.stopped) == (12, 22)


def test_no_players_loss_reaches_another():
    teacher = dit()
    made = playing.objective(FDistill, teacher)
    reached = {}
    for player, loss in made.step(batch(teacher), 0):
        loss.backward()
        reached[player] = [any(has_gradient(each)) for each in (made.generator, made.fake, made.gan.head, teacher.denoiser)]
        playing.clear(made.generator, made.fake, made.gan.head)
    assert reached == {"generator": [True, False, False, False], "critic": [False, True, True, False]}


def test_the_leak_test_can_fail(monkeypatch):
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    teacher = dit()
    made = playing.objective(FDistill, teacher)
    _, loss = next(made.step(batch(teacher), 0))
    loss.backward()
    assert any(has_gradient(made.fake)) and any(has_gradient(made.gan.head))


def test_real_images_are_needed():
    teacher = dit()
    assert FDistill.uses_real(FDistillConfig())
    with pytest.raises(ValueError, match="real images"):
        play(playing.objective(FDistill, teacher), 0, batch(teacher, real=False))
