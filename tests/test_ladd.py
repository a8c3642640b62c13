"""LADD on identity features and on tiny teachers: optima, gradients, the penalty, noise levels, updates and passes."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
import torch.nn.functional as F
from gaussian import Calls, ClosedFormTeacher, Gaussian, GridRng, grid
from playing import MU, TAU, batch, dit, has_gradient, linear_vp, play
from tiny import edm_pipeline
from torch import Tensor, nn

from onestep import discriminator
from onestep.data import PairCache
from onestep.objectives import ladd
from onestep.objectives.ladd import LADD, blocks
from onestep.rng import Rng
from onestep.schedule import EDM
from onestep.teacher import EDMTeacher, Facts


class Head(nn.Module):
    """One logit from the only feature, which is the noised sample."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.network(features[0])


class OnIdentity(LADD):
    """LADD whose heads are one line; everything else, the noising and the losses included, is the real thing."""

    def _discriminator(self, judge: Any) -> Any:
        return Head(nn.Linear(1, 1).double())


NOISE, VARIANCE = 0.5, 0.8  # variance of both noised laws: real N(.7, .8) and fake N(-.4, .8)
A, B = 1.375, -0.20625  # the best line between them for softplus: (m_r - m_f) / V, (m_f^2 - m_r^2) / (2 V)


def on_identity(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[LADD, Tensor, Tensor, Tensor]:
    """The objective at one level, quadrature nodes z and eps, and weights; means become their weighted sums."""
    teacher = ClosedFormTeacher(Gaussian(EDM(NOISE, NOISE)))
    method = playing.objective(OnIdentity, teacher, times=[NOISE], noise="uniform", **options)
    (z, eps), weights = grid(40, 2)

    def weighted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda d: function(d) * weights * len(weights)

    kind = method.gan.adversary
    method.gan.adversary = discriminator.Adversary(*(weighted(each) for each in (kind.fool, kind.fake, kind.real)))
    return method, z, eps, weights


def set_line(method: LADD, a: float, b: float) -> None:
    with torch.no_grad():
        method.gan.head.network.weight.fill_(a)  # type: ignore[union-attr,operator]
        method.gan.head.network.bias.fill_(b)  # type: ignore[union-attr,operator]


def told(method: LADD, z: Tensor, eps: Tensor) -> Tensor:
    deviation = (VARIANCE - NOISE**2) ** 0.5  # the noise adds the rest
    cond, _ = method.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    return method.gan.tell(-0.4 + deviation * z, 0.7 + deviation * z, cond, GridRng([eps, eps]))  # type: ignore[arg-type]


def test_the_best_softplus_critic_is_the_log_ratio(monkeypatch):
    method, z, eps, _ = on_identity(monkeypatch, gan_loss="softplus", r1=0.0)
    precise = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    fit = torch.optim.LBFGS(method.gan.head.parameters(), **precise)

    def closure() -> Tensor:
        fit.zero_grad()
        loss = told(method, z, eps)
        loss.backward()
        return loss

    fit.step(closure)
    a, b = (float(each.detach()) for each in method.gan.head.parameters())
    assert (a, b) == pytest.approx((A, B), abs=1e-5)


@pytest.mark.parametrize("gan_loss", ["softplus", "hinge"])
def test_gradient_of_the_generator(monkeypatch, gan_loss):
    """d/dx of softplus(-l) is -sigmoid(-l) a, of -l it is -a; alpha is 1 here."""
    method, z, eps, weights = on_identity(monkeypatch, gan_loss=gan_loss)
    set_line(method, A, B)
    x = (MU + TAU * z).requires_grad_()
    cond, _ = method.teacher.encode(torch.zeros(len(z), dtype=torch.long))
    method.gan.fool(x, cond, GridRng([eps])).backward()  # type: ignore[arg-type]
    logit = A * (x.detach() + NOISE * eps) + B
    slope = torch.sigmoid(-logit) if gan_loss == "softplus" else 1.0
    torch.testing.assert_close(x.grad, -slope * A * weights, atol=1e-14, rtol=1e-9)


def test_hinge_loss_of_the_critic(monkeypatch):
    """E max(0, 1 + l(fake)) + E max(0, 1 - l(real)), and nothing to learn where the margin is kept."""
    method, z, eps, weights = on_identity(monkeypatch, r1=0.0)
    assert method.config.gan_loss == "hinge"
    set_line(method, 0.8, -0.3)
    loss = told(method, z, eps)
    deviation = (VARIANCE - NOISE**2) ** 0.5
    noised = [m + deviation * z + NOISE * eps for m in (-0.4, 0.7)]
    fake, real = (0.8 * each - 0.3 for each in noised)
    expected = (weights * ((1 + fake).clamp_min(0) + (1 - real).clamp_min(0))).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    loss.backward()
    slope = (weights * ((1 + fake > 0) * noised[0] - (1 - real > 0) * noised[1])).sum()
    assert float(method.gan.head.network.weight.grad) == pytest.approx(float(slope), rel=1e-10)  # type: ignore[union-attr,arg-type]
    assert 0.01 < float((weights * (1 + fake < 0)).sum()) < 0.99  # some are beyond the margin

    logits = torch.tensor([[-1.5], [2.0]], requires_grad=True)
    method.gan.adversary = discriminator.ADVERSARIES["hinge"]
    method.gan.told(logits).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 1))


# --- the penalty


def test_the_penalty_of_a_line_is_its_slope_squared(monkeypatch):
    weight = 0.6
    method, z, eps, _ = on_identity(monkeypatch, r1=weight)
    plain, _, _, _ = on_identity(monkeypatch, r1=0.0)
    for each in (method, plain):
        set_line(each, A, B)
    with_penalty, without = (told(each, z, eps) for each in (method, plain))
    assert float((with_penalty - without).detach()) == pytest.approx(weight / 2 * A**2, rel=1e-9)
    slopes = [
        torch.autograd.grad(each, m.gan.head.network.weight)[0]  # type: ignore[union-attr,arg-type]
        for each, m in ((with_penalty, method), (without, plain))
    ]
    assert float(slopes[0] - slopes[1]) == pytest.approx(weight * A, rel=1e-9)


def test_the_penalty_is_of_real_samples_and_a_mean_over_samples_and_heads(monkeypatch):
    """Logits x^2 / 2 and 3 x have slopes x and 3: r1 / 2 (mean x^2 + 9) / 2 at the noised real samples alone."""

    class Two(nn.Module):
        def forward(self, features: Sequence[Tensor]) -> Tensor:
            return torch.cat([features[0].square() / 2, 3 * features[1]], dim=1)

    teacher = ClosedFormTeacher(Gaussian(EDM(NOISE, NOISE)))
    cond, _ = teacher.encode(torch.zeros(3, dtype=torch.long))
    fake = torch.tensor([[5.0], [6.0], [7.0]], dtype=torch.float64)
    real = torch.tensor([[0.1], [-0.2], [0.4]], dtype=torch.float64)
    noise = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    losses = []
    for r1 in (1.0, 0.0):
        method = playing.objective(OnIdentity, teacher, times=[NOISE], noise="uniform", r1=r1)
        both = method.gan.both
        monkeypatch.setattr(method.gan, "both", lambda *args, both=both: both(*args) * 2)  # a feature for each of two heads
        method.gan.head = Two()
        losses.append(float(method.gan.tell(fake, real, cond, GridRng([noise, noise])).detach()))
    expected = ((real + NOISE * noise).square().mean() + 9) / 2 / 2
    assert losses[0] - losses[1] == pytest.approx(float(expected), rel=1e-12)


def test_the_penalty_of_real_heads_is_that_of_finite_differences():
    """mean (D(f + s n) - D(f))^2 / s^2 over normal n is |dD/df|^2 for small s."""
    teacher = dit()
    torch.manual_seed(0)
    with_penalty = playing.objective(LADD, teacher, r1=2.0, blocks=1)
    cond, _ = teacher.encode(torch.arange(2))
    item = batch(teacher)
    x, head = torch.ones(2, *teacher.shape), with_penalty.gan.head.double()
    both = with_penalty.gan.both(x, item.real, cond, Rng(0, 0, 2))
    feature = both[0][2:].double()
    source, step = torch.Generator().manual_seed(0), 1e-4
    noise = torch.randn(3000, *feature.shape, generator=source, dtype=torch.float64)

    only = head.network.heads[0]

    class Full(nn.Module):  # Heads compute in float32
        def forward(self, features: Sequence[Tensor]) -> Tensor:
            return only(discriminator.as_map(features[0].double()))

    full = Full()
    with torch.no_grad():
        moved = full([(feature + step * noise).flatten(0, 1)]).view(3000, 2)
        estimate = ((moved - full([feature])[:, 0]) / step).square().mean()
    with_penalty.gan.head.network = full
    told = with_penalty.gan.tell(x, item.real, cond, Rng(0, 0, 2))
    with_penalty.gan.r1 = 0.0
    plain = with_penalty.gan.tell(x, item.real, cond, Rng(0, 0, 2))
    assert float((told - plain).detach()) == pytest.approx(float(estimate), rel=0.1)


# --- features


def test_blocks_are_spread_over_the_list_and_end_with_it():
    class Net(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Identity() for _ in range(layers))
            self.mid = nn.Identity()

    assert blocks(Net(28), ["body.13"], 4) == ["body.6", "body.13", "body.20", "body.27"]
    assert blocks(Net(5), ["body.2"], 4) == ["body.0", "body.1", "body.2", "body.4"]
    assert blocks(Net(2), ["body.0"], 4) == ["body.0", "body.1"]
    assert blocks(Net(9), ["body.4"], 1) == ["body.8"]
    assert blocks(Net(3), ["mid"], 4) == ["mid"]


@pytest.mark.parametrize("count", [1, 2])
def test_every_block_has_a_head_on_its_own_output(count):
    teacher = dit()
    method = playing.objective(LADD, teacher, blocks=count)
    assert len(method.gan.head.network.heads) == count
    x_t, t = torch.randn(2, *teacher.shape), torch.tensor([100, 700])
    cond, _ = teacher.encode(torch.arange(2))
    outputs: list[Tensor] = []
    taken = list(teacher.denoiser.network.transformer_blocks)[-count:]  # type: ignore[arg-type]
    hooks = [each.register_forward_hook(lambda m, a, out: outputs.append(out)) for each in taken]
    teacher.denoiser(x_t, t, cond)
    for hook in hooks:
        hook.remove()
    features = method.gan.denoiser.features(x_t, t, cond)
    assert len(features) == count and all(torch.equal(a, b) for a, b in zip(features, outputs))
    assert method.gan.head(features).shape == (2, count)


def test_a_unets_mid_block_is_judged():
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    method = playing.objective(LADD, teacher)
    assert len(method.gan.head.network.heads) == 1
    assert play(method, 0, batch(teacher)) == ["generator", "critic"]


# --- noise levels


def levels_seen(method: LADD) -> list[Tensor]:
    """The times at which the features of the generator's, and of the critic's, samples are taken."""
    seen: list[Tensor] = []
    features = method.gan.denoiser.features

    def spy(x_t: Tensor, t: Tensor, cond: Any) -> list[Tensor]:
        seen.append(t)
        return features(x_t, t, cond)

    method.gan.denoiser.features = spy  # type: ignore[method-assign]
    item = batch(method.teacher, size=400)
    item.real = torch.zeros(400, 1, dtype=torch.float64)
    item.rng = Rng(0, 0, 400, dtype=torch.float64)
    list(method.step(item, 0))
    return seen


@pytest.mark.parametrize("law", [(1.0, 1.0), (-0.5, 0.5)])
def test_levels_are_logit_normal(law):
    """ln(sigma/alpha) ~ N(mean, std^2), which on a flow, sigma/alpha = t / (1 - t), is t's logit."""
    options = {"noise_mean": law[0], "noise_std": law[1]}
    method = playing.objective(OnIdentity, ClosedFormTeacher(Gaussian(EDM())), **options)
    for t, count in zip(levels_seen(method), (400, 800)):
        log = t.double().log()
        assert len(t) == count and len(set(t.tolist())) > 0.99 * count  # each has its own
        assert float(log.mean()) == pytest.approx(law[0], abs=0.12) and float(log.std()) == pytest.approx(law[1], abs=0.1)


def test_levels_may_be_uniform():
    method = playing.objective(OnIdentity, ClosedFormTeacher(Gaussian(linear_vp())), noise="uniform")
    for t in levels_seen(method):
        assert float(t.double().mean()) == pytest.approx(500, abs=40)
        assert float(t.double().std()) == pytest.approx(289, abs=25)


# --- real samples


def test_without_real_images_the_run_says_what_to_type():
    teacher = dit()
    assert LADD.uses_real(LADD.Config()) and not LADD.uses_real(LADD.Config(pairs=5))
    with pytest.raises(ValueError, match="--data FOLDER, or --pairs 2048"):
        play(playing.objective(LADD, teacher), 0, batch(teacher, real=False))


def test_samples_of_the_teacher_stand_for_real_ones(tmp_path: Path, monkeypatch):
    """Fake and real samples then have the conditions of the cached ones."""
    teacher = dit()
    method = playing.objective(LADD, teacher, tmp_path, guidance=1.5, pairs=5, pair_steps=2)
    assert isinstance(method.pairs, PairCache) and method.pairs.guidance == 1.5
    given: list[Any] = []
    tell = method.gan.tell
    monkeypatch.setattr(method.gan, "tell", lambda *args: given.extend(args) or tell(*args))
    play(method, 0, batch(teacher, real=False))
    rows = method.pairs.rows[Rng(11, 0, 2).integers(5)]
    assert torch.equal(given[1], rows["y"]) and torch.equal(given[2]["class_labels"], rows["conditions"])


# --- updates


def test_the_heads_learn_on_every_step_from_the_generators_samples(monkeypatch):
    teacher = dit()
    method = playing.objective(LADD, teacher, ratio=2)
    fooled, told = [], []
    fool, tell = method.gan.fool, method.gan.tell
    monkeypatch.setattr(method.gan, "fool", lambda x, *args: fooled.append(x) or fool(x, *args))
    monkeypatch.setattr(method.gan, "tell", lambda x, *args: told.append(x) or tell(x, *args))
    orders = [play(method, step, batch(teacher, step)) for step in range(3)]
    assert orders == [["generator", "critic"], ["critic"], ["generator", "critic"]]
    assert fooled[0].data_ptr() == told[0].data_ptr() and fooled[0].requires_grad
    assert not any(each.requires_grad for each in told)
    assert LADD.Config().ratio == 1


@pytest.mark.parametrize("r1", [0.0, 1e-5])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_number_of_network_passes(guidance, r1):
    """In batches: student 1 a step; teacher 1 short one on a generator's turn and 2 a step, guidance and R1 ask for none."""
    teacher = dit()
    method = playing.objective(LADD, teacher, guidance=guidance, ratio=5, r1=r1, blocks=1)
    student, judge = Calls(method.generator.denoiser.network), Calls(teacher.denoiser.network)
    for step in range(5):
        play(method, step, batch(teacher, step))
        if step == 0:
            assert (student.finished, judge.finished, judge.stopped) == (2, 0, 6)
    assert (student.finished, student.stopped) == (10, 0)
    assert (judge.finished, judge.stopped) == (0, 22)
    assert [len(each) for each in method.players().values()] == [1, 1]


def turns_apart(method: LADD) -> dict[str, tuple[bool, bool]]:
    """Whose parameters (student's, heads') have a gradient after each player's backward; the teacher's never."""
    found = {}
    for player, loss in method.step(batch(method.teacher), 0):
        loss.backward()
        found[player] = (any(has_gradient(method.generator)), any(has_gradient(method.gan.head)))
        playing.clear(method.generator, method.gan.head)
    assert not any(has_gradient(method.teacher.denoiser))
    return found


def test_no_players_loss_reaches_another():
    method = playing.objective(LADD, dit(), r1=1.0)
    assert turns_apart(method) == {"generator": (True, False), "critic": (False, True)}
    assert all(p.requires_grad for p in method.gan.head.parameters())
    assert not any(p.requires_grad for p in method.teacher.denoiser.parameters())


def test_the_leak_test_can_fail(monkeypatch):
    monkeypatch.setattr(ladd, "frozen", lambda *modules: contextlib.nullcontext())
    assert turns_apart(playing.objective(LADD, dit()))["generator"] == (True, True)


def test_equal_samples_give_no_gradient_on_average():
    """Real samples that are the generator's own, at the same levels and noise: hinge's slopes cancel within the margin."""
    method = playing.objective(OnIdentity, ClosedFormTeacher(Gaussian(EDM(NOISE, NOISE))), times=[NOISE], r1=0.0)
    set_line(method, 0.1, 0.0)
    x = torch.tensor([[0.3], [-0.2]], dtype=torch.float64)
    cond, _ = method.teacher.encode(torch.zeros(2, dtype=torch.long))
    noise = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    method.gan.law = None
    method.gan.tell(x, x, cond, GridRng([noise, noise])).backward()  # type: ignore[arg-type]
    assert all(float(p.grad.abs().max()) < 1e-15 for p in method.gan.head.parameters())


def test_the_adversaries_of_a_gan():
    d = torch.linspace(-3, 3, 7, dtype=torch.float64)
    soft, hinge = discriminator.ADVERSARIES["softplus"], discriminator.ADVERSARIES["hinge"]
    assert torch.equal(soft.fool(d), F.softplus(-d)) and torch.equal(soft.fake(d), F.softplus(d))
    assert torch.equal(soft.real(d), soft.fool(d))
    assert torch.equal(hinge.fool(d), -d) and hinge.fake(d).tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert hinge.real(d).tolist() == [4, 3, 2, 1, 0, 0, 0]
