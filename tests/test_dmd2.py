"""DMD2 against closed forms: gradients of KL divergences, optima, the order of updates and the number of passes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from gaussian import TYPES, Affine, Calls, ClosedFormTeacher, Gaussian, GridRng, Mixture, denoiser, fixed_level, grid
from playing import LEVELS, MU, TAU, M, S, batch, clear, dit, has_gradient, linear_vp, play
from safetensors.torch import load_file
from tiny import dit_pipeline, edm_pipeline
from torch import Tensor, nn

from onestep import discriminator
from onestep.data import PairCache
from onestep.denoiser import Denoiser
from onestep.discriminator import Discriminator, as_map
from onestep.objectives import score
from onestep.objectives.base import Batch
from onestep.objectives.dmd2 import DMD2
from onestep.objectives.score import matching_loss
from onestep.prediction import add_noise
from onestep.rng import Rng
from onestep.schedule import EDM
from onestep.teacher import DiTTeacher, EDMTeacher, Facts, Teacher

NO_GAN = {"gan": 0.0, "gan_critic": 0.0}


def objective(teacher: Teacher, folder: Path = Path("unused"), kind: type[DMD2] = DMD2, **options: Any) -> DMD2:
    return playing.objective(kind, teacher, folder, **options)


# --- the matching loss


def expected_gradient(level: str, kind: str, teacher: type[Gaussian] | type[Mixture]) -> tuple[float, float]:
    """d/dmu, d/dtau of E[matching_loss] for x = mu + tau z, by 80-node quadrature over (z, eps) instead of samples."""
    schedule, alpha, sigma = fixed_level(level)
    (z, eps), weights = grid(80, 2)
    mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (MU, TAU))
    rng = GridRng([eps])
    x = mu + tau * z
    t = schedule.at(rng.uniform())
    x_t = add_noise(schedule, x, eps, t)
    # the estimates are those of a network: they would pass a gradient on, were it not stopped in the loss
    fake, real = denoiser(Gaussian(schedule, kind, MU, TAU))(x_t, t, {}), denoiser(teacher(schedule, kind))(x_t, t, {})
    # the loss is a plain mean over the nodes: their weights ride on its own weight
    matching_loss(x, fake, real, alpha**2 / sigma**2 * weights * len(z)).backward()
    return float(mu.grad), float(tau.grad)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "level, golden", list(zip(LEVELS, [(-0.44, -0.05268293), (-0.80145719, -0.21324803), (-1.0000538, -0.37767707)]))
)
def test_matching_gradient_is_the_kl_of_gaussians(level, golden, kind):
    """alpha^2 (mu - m) / Q and alpha^2 tau (1/Q - 1/P), Q and P the noised variances of teacher and student."""
    _, alpha, sigma = fixed_level(level)
    p, q = alpha**2 * TAU**2 + sigma**2, alpha**2 * S**2 + sigma**2
    exact = (alpha**2 * (MU - M) / q, alpha**2 * TAU * (1 / q - 1 / p))
    got = expected_gradient(level, kind, Gaussian)
    assert got == pytest.approx(exact, abs=1e-10)
    assert got == pytest.approx(golden, abs=1e-8)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "level, golden", list(zip(LEVELS, [(-0.236357, -0.098023), (-0.368360, -0.425724), (-0.388445, -0.802321)]))
)
def test_matching_gradient_is_the_kl_to_a_mixture(level, golden, kind):
    """The golden numbers are finite differences of the KL integral on 40,001 points."""
    assert expected_gradient(level, kind, Mixture) == pytest.approx(golden, abs=2e-6)


def matched(kind: str, fake_mean: float = MU) -> tuple[DMD2, Tensor, Tensor]:
    """An objective on closed forms, an x of shape (5, 2, 3) and the gradient of its matching loss there."""
    teacher = ClosedFormTeacher(Gaussian(linear_vp(), kind), shape=(2, 3))
    method = objective(teacher, **NO_GAN)
    with torch.no_grad():
        method.fake.network.mean.fill_(fake_mean)
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    cond, uncond = teacher.encode(torch.arange(5) % 3)
    method.match(x, Batch(torch.arange(5), None, Rng(1, 0, 5, dtype=torch.float64)), cond, uncond).backward()
    return method, x, x.grad


@pytest.mark.parametrize("kind", TYPES)
def test_normalised_gradient_is_exact(kind):
    """(fake - real) / mean|x - real| / numel at each sample's own noise, whatever the prediction type."""
    method, x, gradient = matched(kind)
    rng = Rng(1, 0, 5, dtype=torch.float64)
    t = method.schedule.at(rng.uniform(0.02, 0.98))
    alpha_bar = method.schedule.alphas_cumprod[t].view(5, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = alpha * x.detach() + sigma * rng.normal((2, 3))

    def posterior(mean: float) -> Tensor:
        return mean + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x_t - alpha * mean)

    fake, real = posterior(MU), posterior(M)
    normaliser = (x.detach() - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, (fake - real) / normaliser / x.numel(), atol=1e-10, rtol=0)
    assert gradient.abs().min() > 1e-9
    assert not any(has_gradient(method.fake)) and not any(has_gradient(method.teacher.denoiser))


def test_equal_denoisers_give_no_gradient():
    _, _, gradient = matched("v_prediction", fake_mean=M)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_guidance_is_the_teachers_alone():
    """With guidance w the real estimate is u + w (c - u) and the fake one stays conditional."""

    class Labelled(Gaussian):
        def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            return super().posterior(x_t, alpha, sigma) + self.shift

        def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
            self.shift = cond["class_labels"].double().view(-1, 1)
            return super().forward(x, timestep, return_dict)

    method = objective(ClosedFormTeacher(Labelled(linear_vp())), guidance=2.5, **NO_GAN)
    conditions = torch.tensor([0, 1, 2])
    cond, uncond = method.teacher.encode(conditions)
    x = torch.zeros(3, 1, dtype=torch.float64)
    fake, real = method.estimates(x, Batch(conditions, None, Rng(0, 0, 3, dtype=torch.float64)), cond, uncond)
    # the student's estimate has the class's shift, the teacher's 3 + 2.5 (class - 3)
    torch.testing.assert_close(real - fake, (1.5 * (conditions - 3)).double().view(-1, 1), atol=1e-9, rtol=0)


# --- the fake denoiser


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_fake_denoiser_fits_the_students_posterior(level, kind):
    """The loss is quadratic in (gain, bias) of an affine denoiser, so four equally weighted points make it exact."""
    schedule, alpha, sigma = fixed_level(level)
    (z, eps), weights = grid(2, 2)
    assert torch.allclose(weights, torch.full_like(weights, 0.25))
    network = Affine(schedule, kind)
    fit = torch.optim.LBFGS(
        network.parameters(), max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    t = schedule.at(GridRng([z]).uniform())

    def closure() -> Tensor:
        fit.zero_grad()
        loss = denoiser(network).loss(MU + TAU * z, {}, GridRng([eps]), t)
        loss.backward()
        return loss

    fit.step(closure)
    gain = alpha * TAU**2 / (alpha**2 * TAU**2 + sigma**2)
    assert float(network.gain.detach()) == pytest.approx(gain, abs=1e-6)
    assert float(network.bias.detach()) == pytest.approx(MU * (1 - alpha * gain), abs=1e-6)


# --- the GAN


class LinearHead(nn.Module):
    """logit = a x + b of the only feature, which is the noised sample."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1).double()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.network(features[0])


class LinearGAN(DMD2):
    """DMD2 whose critic is one line; everything else, the noising and the losses included, is the real thing."""

    def _discriminator(self) -> Any:
        return LinearHead()


VARIANCE = 0.8  # of both noised laws, real N(.7, .8) and fake N(-.4, .8)


def linear_gan(monkeypatch: pytest.MonkeyPatch, **options: float) -> tuple[LinearGAN, Tensor, Tensor, Tensor]:
    """The objective, quadrature nodes z and eps, and weights; the objective's mean becomes their weighted sum."""
    schedule = EDM(0.5, 0.5)
    teacher = ClosedFormTeacher(Gaussian(schedule, "epsilon"))
    method = objective(teacher, kind=LinearGAN, times=[0.5], **options)
    (z, eps), weights = grid(40, 2)

    class Weighted:
        @staticmethod
        def softplus(logits: Tensor) -> Tensor:
            return torch.nn.functional.softplus(logits) * weights * len(weights)

    monkeypatch.setattr(discriminator, "F", Weighted)
    return method, z, eps, weights


def test_gan_critic_optimum(monkeypatch):
    """Between Gaussians of equal variance V the best line is a = (m_r - m_f)/V, b = (m_f^2 - m_r^2)/(2V)."""
    method, z, eps, _ = linear_gan(monkeypatch, gan_critic=1.0)
    deviation = (VARIANCE - 0.25) ** 0.5  # the noise adds the rest
    fake, real = -0.4 + deviation * z, 0.7 + deviation * z
    cond, _ = method.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    fit = torch.optim.LBFGS(
        method.gan.head.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        fit.zero_grad()
        loss = method.gan.tell(fake, real, cond, GridRng([eps, eps]))
        loss.backward()
        return loss

    fit.step(closure)
    assert float(method.gan.head.network.weight.detach()) == pytest.approx(1.375, abs=1e-5)
    assert float(method.gan.head.network.bias.detach()) == pytest.approx(-0.20625, abs=1e-5)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("channels", [4, 16, 18, 32, 48, 64, 192, 768])
def test_heads_of_every_width_see_their_input(channels, side):
    """Group norm on the last 1x1 map must not leave a constant: logits differ and a gradient comes back."""
    torch.manual_seed(0)
    if channels > 100 and side > 4:
        pytest.skip("slow, and the same layers")
    head = Discriminator([torch.zeros(1, channels, side, side)])
    feature = torch.randn(6, channels, side, side, requires_grad=True)
    logits = head([feature])
    assert logits.shape == (6, 1) and logits.std() > 0.02
    (gradient,) = torch.autograd.grad(logits.sum(), feature)
    assert gradient.square().sum() > 1e-3


def test_published_heads_keep_their_groups():
    for channels in (768, 1280):
        norms = [m for m in Discriminator([torch.zeros(1, channels, 4, 4)]).modules() if isinstance(m, nn.GroupNorm)]
        assert norms and all(norm.num_groups == 32 for norm in norms)


def test_tokens_become_the_map_they_were_cut_from():
    tokens = torch.arange(2 * 9 * 5).view(2, 9, 5)
    cut = as_map(tokens)
    assert cut.shape == (2, 5, 3, 3)
    assert torch.equal(cut[1, :, 2, 1], tokens[1, 2 * 3 + 1])
    with pytest.raises(ValueError, match="square"):
        as_map(tokens[:, :8])


def test_gan_critic_loss_trains_the_fake_denoiser_too():
    teacher = dit()
    method = objective(teacher)
    cond, _ = teacher.encode(torch.arange(2))
    item = batch(teacher)
    method.gan.tell(torch.ones(2, *teacher.shape), item.real, cond, item.rng).backward()
    assert all(has_gradient(method.gan.head)) and any(has_gradient(method.fake))


def test_gan_critic_noises_every_sample_on_its_own():
    """Fake and real get independent times and noise."""
    teacher = ClosedFormTeacher(Gaussian(linear_vp()))
    method = objective(teacher, kind=LinearGAN)
    seen: list[Tensor] = []
    features = method.fake.features
    method.fake.features = lambda x_t, t, cond: (seen.extend((x_t, t)), features(x_t, t, cond))[1]  # type: ignore[method-assign]
    zero = torch.zeros(2, 1, dtype=torch.float64)
    cond, _ = teacher.encode(torch.arange(2))
    method.gan.tell(zero, zero, cond, Rng(0, 0, 2, dtype=torch.float64))
    x_t, t = seen
    assert len(set(t.tolist())) == 4 and len(set(x_t.flatten().tolist())) == 4


def test_gan_generator_gradient(monkeypatch):
    """d/dx softplus(-(a x_t + b)) = -sigmoid(-l) a, through the noising, whose alpha is 1 here."""
    weight_of_gan = 0.3
    method, z, eps, weights = linear_gan(monkeypatch, gan=weight_of_gan, matching=0.0)
    a, b = 1.375, -0.20625
    with torch.no_grad():
        method.gan.head.network.weight.fill_(a)
        method.gan.head.network.bias.fill_(b)
    x = (MU + TAU * z).requires_grad_()
    cond, uncond = method.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    item = Batch(cond["class_labels"], None, GridRng([eps]))
    method.generator_loss(x, item, cond, uncond).backward()
    logit = a * (x.detach() + 0.5 * eps) + b
    torch.testing.assert_close(x.grad, -weight_of_gan * torch.sigmoid(-logit) * a * weights, atol=1e-14, rtol=1e-9)


def test_gan_without_real_images_is_refused():
    teacher = dit()
    with pytest.raises(ValueError, match="real images"):
        play(objective(teacher), 0, batch(teacher, real=False))
    assert play(objective(teacher, **NO_GAN), 0, batch(teacher, real=False)) == ["generator", "critic"]


# --- updates


@pytest.mark.parametrize("gan", [True, False])
def test_generator_every_fifth_step_and_critic_every_step(gan):
    teacher = ClosedFormTeacher(Gaussian(linear_vp()))
    method = objective(teacher, kind=LinearGAN, **({} if gan else NO_GAN))
    order = [play(method, step, batch(teacher, step)) for step in range(11)]
    assert order == [["generator", "critic"] if step in (0, 5, 10) else ["critic"] for step in range(11)]


def test_both_players_learn_from_the_same_samples(monkeypatch):
    """On a generator's turn the critic is told about the x that was made before the generator moved."""
    teacher = dit()
    method = objective(teacher)
    made: dict[str, list[Tensor]] = {"sample": [], "generator": [], "fake": [], "critic": []}

    def spy(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            made[key].append(result if key == "sample" else args[0])
            return result

        monkeypatch.setattr(owner, name, wrapped)

    spy(method, "sample", "sample")
    spy(method, "generator_loss", "generator")
    spy(method.fake, "loss", "fake")
    spy(method.gan, "tell", "critic")
    for player, loss in method.step(batch(teacher), 0):
        loss.backward()
        if player == "generator":
            with torch.no_grad():
                for p in method.generator.parameters():
                    p.add_(0.1)
    x = made["sample"][0]
    assert len(made["sample"]) == 1 and made["generator"] == [x] and x.requires_grad
    for detached in made["fake"] + made["critic"]:
        assert detached.data_ptr() == x.data_ptr() and detached.shape == x.shape and not detached.requires_grad


TEACHERS = {
    "guided": (lambda: DiTTeacher(dit_pipeline(), Facts("x")), 1.5),
    "unguided": (lambda: EDMTeacher(edm_pipeline(), Facts("x")), 1.0),
}


@pytest.mark.parametrize("gan", [True, False])
@pytest.mark.parametrize("name", TEACHERS)
def test_number_of_network_passes(name, gan):
    """Five steps at ratio 5, in units of one batch: student 5, teacher 1 (2 guided), fake 6, and 11 short passes."""
    make, guidance = TEACHERS[name]
    teacher = make()
    method = objective(teacher, guidance=guidance, **({} if gan else NO_GAN))
    size = 2
    student, real, fake = (Calls(d.network) for d in (method.generator.denoiser, teacher.denoiser, method.fake))
    for step in range(5):
        play(method, step, batch(teacher, step, size))
        if step == 0:  # the generator's turn: its x is reused, so one student pass in all
            first = (student.finished, real.finished, fake.finished, fake.stopped)
            assert first == (size, size * (2 if guidance > 1 else 1), 2 * size, 3 * size if gan else 0)
    assert (student.finished, student.stopped) == (5 * size, 0)
    assert (real.finished, real.stopped) == (size * (2 if guidance > 1 else 1), 0)
    assert (fake.finished, fake.stopped) == (6 * size, 11 * size if gan else 0)


@pytest.mark.parametrize("name", TEACHERS)
def test_number_of_network_passes_with_a_shared_critic_pass(name):
    """Of the short passes remain the generator's and those over real samples, 6; all others are as many as before."""
    make, guidance = TEACHERS[name]
    teacher = make()
    method = objective(teacher, guidance=guidance, share_critic_pass=True)
    student, real, fake = (Calls(d.network) for d in (method.generator.denoiser, teacher.denoiser, method.fake))
    for step in range(5):
        play(method, step, batch(teacher, step))
    assert (student.finished, real.finished) == (2 * 5, 2 * (2 if guidance > 1 else 1))
    assert (fake.finished, fake.stopped) == (2 * 6, 2 * 6)


def test_a_shared_critic_pass_gives_the_gradient_of_two_with_the_same_noise():
    teacher = dit()
    method, item = objective(teacher, share_critic_pass=True), batch(teacher)
    fake, gan, networks = method.fake, method.gan, (method.fake, method.gan.head)
    cond, _ = teacher.encode(item.conditions)
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(5))
    method.critic_loss(x, item, cond).backward()
    found = [p.grad.clone() for each in networks for p in each.parameters() if p.grad is not None]

    clear(*networks)
    rng = batch(teacher).rng
    t, eps = fake.schedule.at(rng.uniform()), rng.normal(teacher.shape)
    t_real, eps_real = fake.schedule.at(rng.uniform()), rng.normal(teacher.shape)
    of_x = fake.features(add_noise(fake.schedule, x, eps, t), t, cond)
    of_real = fake.features(add_noise(fake.schedule, item.real, eps_real, t_real), t_real, cond)
    tell = torch.nn.functional.softplus(gan.head(of_x)).mean() + torch.nn.functional.softplus(-gan.head(of_real)).mean()
    (fake.loss(x, cond, batch(teacher).rng) + 1e-2 * tell).backward()
    expected = [p.grad for each in networks for p in each.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert float(method.log["gan_critic"]) == pytest.approx(float(tell.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "options, flag", [({"gan_critic": 0.0}, "--gan-critic 0.01"), ({"gan_t_max": 0.5}, "--gan-t-max 1")]
)
def test_a_critic_pass_that_cannot_be_shared_is_refused(options, flag):
    with pytest.raises(ValueError, match=flag):
        DMD2.Config(share_critic_pass=True, **options)


def generator_turn(method: DMD2, item: Batch) -> None:
    """Backward of the generator's loss alone, then the step is abandoned as an exception would."""
    turn = method.step(item, 0)
    player, loss = next(turn)
    assert player == "generator"
    loss.backward()
    turn.close()


@pytest.mark.parametrize("options", [{}, {"matching": 0.0, "gan": 1.0}])
def test_generators_loss_leaves_the_critic_alone(options):
    teacher = dit()
    method = objective(teacher, **options)
    generator_turn(method, batch(teacher))
    assert not any(has_gradient(method.fake)) and not any(has_gradient(method.gan.head))
    assert not any(has_gradient(teacher.denoiser))
    # the GAN's gradient does come through the fake denoiser to the student
    assert sum(float(p.grad.abs().sum()) for p in method.generator.parameters() if p.grad is not None) > 0
    assert all(p.requires_grad for p in [*method.fake.parameters(), *method.gan.head.parameters()])


def test_the_leak_test_can_fail(monkeypatch):
    """Without `frozen` the same step does give the critic gradients: the test above would see them."""
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    teacher = dit()
    method = objective(teacher)
    generator_turn(method, batch(teacher))
    assert any(has_gradient(method.fake)) and any(has_gradient(method.gan.head))


@pytest.mark.parametrize("step", [0, 1])
def test_critics_loss_leaves_the_generator_alone(step):
    teacher = dit()
    method = objective(teacher)
    for player, loss in method.step(batch(teacher), step):
        if player == "generator":
            continue
        loss.backward()
    assert not any(has_gradient(method.generator)) and not any(has_gradient(teacher.denoiser))
    assert any(has_gradient(method.fake)) and all(has_gradient(method.gan.head))


def test_losses_are_weighted_as_configured():
    """The generator's loss is matching + gan, the critic's denoising + gan_critic, each times its weight."""
    teacher = dit()
    method = objective(teacher, matching=2.0, gan=0.5, gan_critic=0.25)
    losses = dict(method.step(batch(teacher), 0))
    log = method.log
    assert float(losses["generator"]) == pytest.approx(float(2 * log["matching"] + 0.5 * log["gan"]), rel=1e-5)
    assert float(losses["critic"]) == pytest.approx(float(log["denoising"] + 0.25 * log["gan_critic"]), rel=1e-5)


# --- several steps

CHAIN = [999, 749, 499, 249]


def chain() -> DMD2:
    """The student is the teacher of N(M, S^2) itself, read at 999, 749, 499, 249."""
    return objective(ClosedFormTeacher(Gaussian(linear_vp())), times=CHAIN, **NO_GAN)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_backward_simulation_moments(last):
    """Every call is affine, so two equally weighted points a draw give its mean and variance exactly."""
    method = chain()
    schedule = method.schedule
    normals, weights = grid(2, 4)
    rng = GridRng(normals, shared=last)
    cond, _ = method.teacher.encode(torch.zeros(len(weights), dtype=torch.long))
    x = method.sample(Batch(cond["class_labels"], None, rng), cond, grad=False)
    mean, variance = 0.0, 0.0
    for k in range(last + 1):
        alpha_bar = float(schedule.alphas_cumprod[CHAIN[k]])
        alpha, sigma2 = alpha_bar**0.5, 1 - alpha_bar
        gain = alpha * S**2 / (alpha_bar * S**2 + sigma2)
        # the first call reads N(0, 1) itself, not a noised sample
        mean, variance = (
            (M - gain * alpha * M, gain**2)
            if k == 0
            else (M + gain * alpha * (mean - M), gain**2 * (alpha_bar * variance + sigma2))
        )
    assert float(x.mean()) == pytest.approx(mean, abs=1e-10)
    assert float(x.var(unbiased=False)) == pytest.approx(variance, abs=1e-10)
    assert len(rng.normals) == 3 - last  # no draw is wasted


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_backward_simulation_learns_in_its_last_call_only(last):
    method = chain()
    calls = []
    method.generator.denoiser.network.register_forward_hook(lambda m, a, out: calls.append(out[0].requires_grad))
    normals, weights = grid(2, 4)
    cond, _ = method.teacher.encode(torch.zeros(len(weights), dtype=torch.long))
    x = method.sample(Batch(cond["class_labels"], None, GridRng(normals, shared=last)), cond, grad=True)
    assert calls == [False] * last + [True]
    x.sum().backward()
    got = method.generator.denoiser.network.mean.grad
    # d x_0 / d mean of one call is 1 - gain alpha, were the earlier calls differentiated it would be more
    alpha_bar = float(method.schedule.alphas_cumprod[CHAIN[last]])
    expected = 1 - alpha_bar * S**2 / (alpha_bar * S**2 + 1 - alpha_bar)
    assert float(got) == pytest.approx(expected * len(weights), abs=1e-9)


def test_backward_simulation_is_the_same_on_every_rank_and_free_of_real_images():
    method = chain()
    seen, lengths = [], []
    method.generator.denoiser.network.register_forward_hook(lambda *a: seen.append(1))
    for step in range(20):
        samples = []
        for start, stop, real in ((0, 4, None), (0, 2, torch.ones(2, 1)), (2, 4, None)):
            seen.clear()
            conditions = torch.zeros(stop - start, dtype=torch.long)
            rng = Rng(0, step, 4, start, stop, dtype=torch.float64)
            samples.append(method.sample(Batch(conditions, real, rng), {"class_labels": conditions}, grad=False))
            lengths.append(len(seen))
        assert lengths[-3] == lengths[-2] == lengths[-1]
        torch.testing.assert_close(torch.cat(samples[1:]), samples[0], atol=1e-12, rtol=0)
    assert set(lengths) == {1, 2, 3, 4}


def test_passes_of_a_chain():
    """s extra student passes without gradient, on any turn; the losses ask for no more than those of one step."""
    teacher = dit()
    method = objective(teacher, times=CHAIN)
    student, fake = Calls(method.generator.denoiser.network), Calls(method.fake.network)
    expected = sum(Rng(11, step, 2).shared_integer(4) + 1 for step in range(5))
    for step in range(5):
        play(method, step, batch(teacher, step))
    assert expected > 5
    assert student.finished == 2 * expected
    assert (fake.finished, fake.stopped) == (12, 22)


# --- regression


def test_regression_is_on_cached_pairs_made_once(tmp_path, monkeypatch):
    teacher = dit()
    options: dict[str, float] = {**NO_GAN, "matching": 0.0, "regression": 0.25, "pairs": 5, "pair_steps": 2}
    objective(teacher, tmp_path, guidance=1.5, **options)
    (path,) = tmp_path.glob("pairs-*/shard-*.safetensors")
    stored = load_file(path)
    assert stored["z"].shape == stored["y"].shape == (5, *teacher.shape)
    y = teacher.sample(stored["z"], *teacher.encode(stored["conditions"]), 1.5, 2)
    torch.testing.assert_close(stored["y"], y, atol=1e-5, rtol=1e-4)

    monkeypatch.setattr(PairCache, "_make", lambda *a: pytest.fail("the pairs were made again"))
    again = objective(teacher, tmp_path, guidance=1.5, **options)
    assert torch.equal(again.pairs.rows[torch.arange(5)]["z"], stored["z"])

    item = batch(teacher, real=False)
    (turn,) = list(again.step(item, 0))  # regression alone has no critic
    rng = Rng(11, 0, 2)
    rng.normal(teacher.shape)  # the step's own z comes first
    index = rng.integers(5)
    x = again.generator.first(stored["z"][index], teacher.encode(stored["conditions"][index])[0])
    assert turn[0] == "generator"
    assert float(turn[1].detach()) == pytest.approx(0.25 * float((x - stored["y"][index]).square().mean()), rel=1e-5)


def test_other_pairs_have_another_file(tmp_path):
    teacher = dit()
    for guidance, steps in ((1.0, 1), (1.5, 1), (1.0, 2)):
        PairCache(tmp_path, teacher, 3, steps, guidance)
    assert len(list(tmp_path.iterdir())) == 3


def test_fake_starts_as_the_teacher_and_is_its_own():
    teacher = dit()
    method = objective(teacher)
    assert isinstance(method.fake, Denoiser)
    for theirs, ours, student in zip(teacher.denoiser.parameters(), method.fake.parameters(), method.generator.parameters()):
        assert torch.equal(theirs, ours) and torch.equal(theirs, student)
        assert len({theirs.data_ptr(), ours.data_ptr(), student.data_ptr()}) == 3
        assert ours.requires_grad and student.requires_grad and not theirs.requires_grad
    assert {name: len(modules) for name, modules in method.players().items()} == {"generator": 1, "critic": 2}
    assert len(objective(teacher, **NO_GAN).players()["critic"]) == 1
