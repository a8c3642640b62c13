"""DMD against closed forms: the gradient with the paper's own weight, the regression beside it, updates and passes."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import playing
import pytest
import torch
from gaussian import TYPES, Affine, Calls, ClosedFormTeacher, Gaussian, GridRng, Mixture, denoiser, fixed_level, grid
from playing import LEVELS, MU, TAU, M, S, batch, dit, has_gradient, linear_vp, play
from tiny import edm_pipeline
from torch import Tensor

from onestep.objectives import dmd2, score
from onestep.objectives.base import Batch
from onestep.objectives.dmd import DMD
from onestep.objectives.dmd2 import DMD2
from onestep.objectives.regression import PERCEPTUAL, Regression, l2, pseudo_huber
from onestep.rng import Rng
from onestep.teacher import EDMTeacher, Facts, Teacher

ALONE = {"regression": 0.0}
NO_GAN = {"gan": 0.0, "gan_critic": 0.0}


# --- the matching loss


def at_level(level: str, kind: str, teacher: type[Gaussian] | type[Mixture], method: Any = DMD, **options: Any) -> Any:
    """The method at one noise level, its critic the exact denoiser of x = MU + TAU z."""
    schedule, _, _ = fixed_level(level)
    made = playing.objective(method, ClosedFormTeacher(teacher(schedule, kind)), times=[0], **options)
    made.fake = denoiser(Gaussian(schedule, kind, MU, TAU))
    return made


def expected_gradient(monkeypatch: pytest.MonkeyPatch, level: str, made: Any, module: Any) -> tuple[float, float]:
    """d/dmu, d/dtau of the expected matching loss, by quadrature, with w_t = 1 in place of the sample's normaliser."""
    _, alpha, sigma = fixed_level(level)
    (z, eps), weights = grid(80, 2)
    # w_t = 1 is alpha / sigma^2 = w_t / (sigma^2 / alpha) for the function; the nodes' weights ride on it
    monkeypatch.setattr(module, "per_sample_weight", lambda x, real: alpha / sigma**2 * weights * len(weights))
    mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, TAU))
    cond, uncond = made.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    made.match(mu + tau * z, Batch(cond["class_labels"], None, GridRng([eps])), cond, uncond).backward()
    return float(mu.grad), float(tau.grad)


GAUSSIAN = dict(zip(LEVELS, [(-0.44, -0.05268293), (-0.80145719, -0.21324803), (-1.0000538, -0.37767707)]))
MIXTURE = dict(zip(LEVELS, [(-0.236357, -0.098023), (-0.368360, -0.425724), (-0.388445, -0.802321)]))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_with_weight_one_is_the_kls(monkeypatch, level, kind):
    """E[alpha_t (s_fake - s_real) dx/dtheta] is that of KL(p_t || q_t), in closed form and by the KL's own quadrature."""
    _, alpha, sigma = fixed_level(level)
    p, q = alpha**2 * TAU**2 + sigma**2, alpha**2 * S**2 + sigma**2
    exact = (alpha**2 * (MU - M) / q, alpha**2 * TAU * (1 / q - 1 / p))
    got = expected_gradient(monkeypatch, level, at_level(level, kind, Gaussian, **ALONE), score)
    assert got == pytest.approx(exact, abs=1e-10) and got == pytest.approx(GAUSSIAN[level], abs=1e-8)
    mixture = expected_gradient(monkeypatch, level, at_level(level, kind, Mixture, **ALONE), score)
    assert mixture == pytest.approx(MIXTURE[level], abs=2e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_without_the_papers_alpha_it_is_not(monkeypatch, level):
    """DMD2's weight, the same but for alpha_t, gives 1 / alpha_t of that gradient."""
    _, alpha, _ = fixed_level(level)
    made = at_level(level, "epsilon", Gaussian, DMD2, **NO_GAN)
    got = expected_gradient(monkeypatch, level, made, dmd2)
    assert got == pytest.approx([each / alpha for each in GAUSSIAN[level]], abs=1e-7)
    assert (got == pytest.approx(GAUSSIAN[level], abs=1e-3)) == (alpha == 1)


def matched(kind: str, fake_mean: float = MU, method: Any = DMD, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """An objective on closed forms, an x of shape (5, 2, 3) and the gradient of its matching loss there."""
    teacher = ClosedFormTeacher(Gaussian(linear_vp(), kind), shape=(2, 3))
    made = playing.objective(method, teacher, **options)
    with torch.no_grad():
        made.fake.network.mean.fill_(fake_mean)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    cond, uncond = teacher.encode(torch.arange(5) % 3)
    made.match(x, Batch(torch.arange(5), None, Rng(1, 0, 5, dtype=torch.float64)), cond, uncond).backward()
    return made, x, x.grad


@pytest.mark.parametrize("kind", TYPES)
def test_normalised_gradient_is_exact(kind):
    """alpha_t (fake - real) / mean|x - real| / numel at each sample's own noise, whatever the prediction type."""
    made, x, gradient = matched(kind, **ALONE)
    rng = Rng(1, 0, 5, dtype=torch.float64)
    alpha_bar = made.schedule.alphas_cumprod[made.schedule.at(rng.uniform(0.02, 0.98))].view(5, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = alpha * x.detach() + sigma * rng.normal((2, 3))

    def posterior(mean: float) -> Tensor:
        return mean + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x_t - alpha * mean)

    fake, real = posterior(MU), posterior(M)
    normaliser = (x.detach() - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, alpha * (fake - real) / normaliser / x.numel(), atol=1e-10, rtol=0)
    _, _, of_dmd2 = matched(kind, method=DMD2, **NO_GAN)
    torch.testing.assert_close(gradient, alpha * of_dmd2, atol=1e-15, rtol=1e-12)
    assert not any(has_gradient(made.fake)) and not any(has_gradient(made.teacher.denoiser))


def test_equal_denoisers_give_no_gradient():
    _, _, gradient = matched("v_prediction", fake_mean=M, **ALONE)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("level", LEVELS)
def test_the_critic_becomes_the_denoiser_of_the_samples(level):
    """Its loss is quadratic in (gain, bias) of an affine denoiser, so four equally weighted points make it exact."""
    schedule, alpha, sigma = fixed_level(level)
    made = at_level(level, "epsilon", Gaussian, **ALONE)
    made.fake = denoiser(Affine(schedule, "epsilon"))
    (z, eps), _ = grid(2, 2)
    cond, _ = made.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    precise = {"max_iter": 200, "tolerance_grad": 1e-13, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    fit = torch.optim.LBFGS(made.fake.parameters(), **precise)

    def closure() -> Tensor:
        fit.zero_grad()
        loss = made.critic_loss(MU + TAU * z, Batch(cond["class_labels"], None, GridRng([eps])), cond)
        loss.backward()
        return loss

    fit.step(closure)
    gain = alpha * TAU**2 / (alpha**2 * TAU**2 + sigma**2)
    assert float(made.fake.network.gain.detach()) == pytest.approx(gain, abs=1e-6)
    assert float(made.fake.network.bias.detach()) == pytest.approx(MU * (1 - alpha * gain), abs=1e-6)


# --- the regression


def with_pairs(folder: Path, teacher: Teacher, **options: Any) -> DMD:
    return playing.objective(DMD, teacher, folder, pairs=5, pair_steps=2, **options)


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
def test_the_regression_is_added_with_its_weight(tmp_path, distance):
    teacher = dit()
    made = with_pairs(tmp_path, teacher, distance=distance)
    item = batch(teacher)
    losses = dict(made.step(item, 0))
    total = made.log["matching"] + 0.25 * made.log["regression"]
    assert float(losses["generator"].detach()) == pytest.approx(float(total), rel=1e-6)

    rng = Rng(11, 0, 2)
    rng.normal(teacher.shape), rng.uniform(), rng.normal(teacher.shape)  # of x and of the matching loss
    index = rng.integers(5)
    assert made.regression is not None
    rows = made.regression.pairs.rows[index]
    x = made.generator.first(rows["z"], teacher.encode(rows["conditions"])[0])
    c = 0.00054 * x[0].numel() ** 0.5
    expected = l2(x, rows["y"]) if distance == "l2" else pseudo_huber(x, rows["y"], c)
    assert float(made.log["regression"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_no_pairs_are_made_for_a_weight_of_zero(tmp_path):
    assert with_pairs(tmp_path, dit(), **ALONE).regression is None and not list(tmp_path.iterdir())


def test_lpips_is_asked_of_the_regression(tmp_path, monkeypatch):
    """Pictures, not latents, are compared, and the gradient comes back through the decoder."""
    seen: list[torch.Size] = []

    class Mean(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.extend((x.shape, y.shape))
            return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setitem(PERCEPTUAL, "lpips", lambda device: Mean())
    made = with_pairs(tmp_path, dit(), distance="lpips")
    _, loss = next(made.step(batch(made.teacher), 0))
    loss.backward()
    assert seen == [(2, *(1, 16, 16))] * 2 and any(has_gradient(made.generator))


# --- updates


def test_generator_and_critic_take_turns_on_the_same_samples(tmp_path, monkeypatch):
    teacher = dit()
    made = with_pairs(tmp_path, teacher)
    samples, told = [], []
    sample, denoising = made.sample, made.denoising
    monkeypatch.setattr(made, "sample", lambda *a, **k: samples.append(sample(*a, **k)) or samples[-1])
    monkeypatch.setattr(made, "denoising", lambda x, *a: told.append(x) or denoising(x, *a))
    assert [play(made, step, batch(teacher, step)) for step in range(3)] == [["generator", "critic"]] * 3
    assert len(samples) == len(told) == 3
    assert all(x.data_ptr() == y.data_ptr() and not y.requires_grad for x, y in zip(samples, told))


@pytest.mark.parametrize("weight", [0.25, 0.0])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(tmp_path, guidance, weight):
    """Of one step, in batches: student 1 and 1 for the pairs, teacher 1 (2 guided), critic 2, none of them cut short."""
    teacher = dit()
    made = with_pairs(tmp_path, teacher, guidance=guidance, regression=weight)
    calls = [Calls(each.network) for each in (made.generator.denoiser, teacher.denoiser, made.fake)]
    play(made, 0, batch(teacher))
    assert [each.finished for each in calls] == [4 if weight else 2, 4 if guidance > 1 else 2, 4]
    assert [each.stopped for each in calls] == [0, 0, 0]


def test_an_unconditional_teacher_and_no_real_images(tmp_path):
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    assert not DMD.uses_real(DMD.Config())
    assert play(with_pairs(tmp_path, teacher), 0, batch(teacher, real=False)) == ["generator", "critic"]


def generator_turn(made: DMD, item: Batch) -> None:
    """Backward of the generator's loss alone, then the step is abandoned as an exception would."""
    turn = made.step(item, 0)
    player, loss = next(turn)
    assert player == "generator"
    loss.backward()
    turn.close()


def test_no_players_loss_reaches_another(tmp_path):
    teacher = dit()
    made = with_pairs(tmp_path, teacher)
    generator_turn(made, batch(teacher))
    assert any(has_gradient(made.generator))
    assert not any(has_gradient(made.fake)) and not any(has_gradient(teacher.denoiser))
    assert all(p.requires_grad for p in made.fake.parameters())
    playing.clear(made.generator)
    for player, loss in made.step(batch(teacher), 0):
        if player == "critic":
            loss.backward()
    assert any(has_gradient(made.fake)) and not any(has_gradient(made.generator))


def test_the_leak_test_can_fail(tmp_path, monkeypatch):
    """Had the matching loss a graph through the critic, only `frozen` would keep its parameters out."""
    monkeypatch.setattr(score, "matching_loss", lambda x, fake, real, weight: ((fake - real) * weight * x).mean())
    teacher = dit()
    made = with_pairs(tmp_path, teacher)
    monkeypatch.setattr(score, "torch", SimpleNamespace(no_grad=contextlib.nullcontext))
    generator_turn(made, batch(teacher))
    assert not any(has_gradient(made.fake))
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    generator_turn(made, batch(teacher))
    assert any(has_gradient(made.fake))


def test_options_are_those_of_both_parents():
    options = DMD.Config()
    assert (options.ratio, options.regression, options.distance) == (1, 0.25, "pseudo-huber")
    assert not DMD.Config.DEFAULTS and Regression.Config.DEFAULTS  # the regression's momentum is not DMD's
