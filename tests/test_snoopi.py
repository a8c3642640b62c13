"""SwiftBrush and PG-SB against closed forms: guidance on both denoisers, its fixed points, the critic's loss, passes."""

from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from background import TINY
from gaussian import TYPES, Calls, ClosedFormTeacher, Gaussian, fixed_level, grid
from guided import Classes, Draws
from playing import LEVELS, batch, clear, dit, has_gradient, linear_vp, play, zeros
from tiny import dit_pipeline, edm_pipeline
from torch import Tensor, nn

from onestep.config import resolve
from onestep.objectives import objective_class, swiftbrush
from onestep.objectives.base import Batch
from onestep.objectives.snoopi import Snoopi, SnoopiConfig
from onestep.objectives.swiftbrush import SwiftBrush, SwiftBrushConfig, guided
from onestep.objectives.vsd import VSD
from onestep.rng import Rng
from onestep.schedule import VP
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher, load_teacher
from onestep.train import main

MEANS = (-1.0, 0.5, 2.0)
NULL = sum(MEANS) / 3
LEVEL = VP(torch.tensor([0.64], dtype=torch.float64))  # alpha .8, sigma .6
ALPHA, SIGMA, S = 0.8, 0.6, 0.7
RATE = SIGMA**2 * SIGMA * ALPHA / (ALPHA**2 * S**2 + SIGMA**2)  # w k: of an error in a mean, the part in the gradient


def made(kind: type, means: tuple[float, ...] = (*MEANS, NULL), guidance: float = 4.5, **options: Any) -> Any:
    teacher = ClosedFormTeacher(Classes(LEVEL, means=means, std=S))
    return playing.objective(kind, teacher, guidance=guidance, times=[0], **options)


def know(method: Any, means: Tensor, null: float | None = None) -> None:
    """Make the critic exact for x ~ N(means[class], S^2), its null branch the average of the classes or `null`."""
    with torch.no_grad():
        method.fake.network.means[:3] = means
        method.fake.network.means[3] = means.mean() if null is None else null


def by_class(method: Any, means: Tensor, fractions: list[Any]) -> Tensor:
    """Expected gradients of the generator's loss in the means of x = means[class] + S z, all classes being as likely.

    The integrand is affine in (z, eps): two equally weighted nodes for each make the mean exact.
    """
    (z, eps), _ = grid(2, 2)
    z, eps, labels = z.repeat(3, 1), eps.repeat(3, 1), torch.arange(3).repeat_interleave(4)
    means = means.clone().requires_grad_()
    cond, uncond = method.teacher.encode(labels)
    x = means[labels].view(-1, 1) + S * z
    method.generator_loss(x, Batch(labels, None, Draws([eps], fractions)), cond, uncond).backward()
    assert means.grad is not None
    return 3 * means.grad


def settled(method: Any, fractions: Any = (), null: float | None = None, steps: int = 80) -> list[float]:
    """Where the classes' means end under gradient descent with a critic that is always exact."""
    means = torch.zeros(3, dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        know(method, means, null)
        drawn = fractions if fractions != "random" else [0.5, torch.rand(12, generator=source, dtype=torch.float64)]
        means = means - 0.25 / RATE * by_class(method, means, list(drawn))
    return means.tolist()


# --- the gradient under guidance


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.25, 4.5])
def test_common_errors_move_at_rate_one_and_differences_at_kappa(kappa):
    """w k (null_g + kappa (m - null_g) - null - kappa (mu - null)), m the student's means and null_g their average."""
    method = made(SwiftBrush, guidance=kappa)
    means = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
    know(method, means)
    got = by_class(method, means, [])
    common = means.mean() - NULL
    differences = (means - means.mean()) - (torch.tensor(MEANS, dtype=torch.float64) - NULL)
    torch.testing.assert_close(got, RATE * (common + kappa * differences), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_all_prediction_types_give_the_same_gradient(kind):
    found = []
    for each in (kind, "sample"):
        teacher = ClosedFormTeacher(Classes(linear_vp(), each), shape=(2, 3))
        method = playing.objective(Snoopi, teacher)
        know(method, torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64))
        x = torch.linspace(-2, 2, 18, dtype=torch.float64).view(3, 2, 3).requires_grad_()
        cond, uncond = teacher.encode(torch.arange(3))
        rng = Rng(1, 0, 3, dtype=torch.float64)
        method.generator_loss(x, Batch(torch.arange(3), None, rng), cond, uncond).backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    assert found[0].abs().min() > 1e-9


def at(method: Any, kappas: float | Tensor) -> Tensor:
    """Gradient at samples of shape (2, 3) with fixed noise and kappas at these fractions of their range."""
    x = torch.linspace(-2, 2, 18, dtype=torch.float64).view(3, 2, 3).requires_grad_()
    know(method, torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64))
    cond, uncond = method.teacher.encode(torch.arange(3))
    eps = torch.linspace(1, -1, 18, dtype=torch.float64).view(3, 2, 3)
    draws = Draws([eps], [torch.tensor([0.2, 0.5, 0.9]), kappas])
    method.generator_loss(x, Batch(torch.arange(3), None, draws), cond, uncond).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("guidance_on", ["both", "teacher"])
@pytest.mark.parametrize("low, high, mean", [(0.5, 4.0, 2.25), (0.5, 3.0, 1.75)])
def test_the_expected_gradient_is_that_at_the_mean_of_kappa(low, high, mean, guidance_on):
    """It is linear in kappa: the ends average to the middle, and per-sample kappas mix per sample."""
    teacher = ClosedFormTeacher(Classes(linear_vp()), shape=(2, 3))
    method = playing.objective(Snoopi, teacher, kappa_min=low, kappa_max=high, guidance_on=guidance_on)
    fixed = playing.objective(SwiftBrush, teacher, guidance=mean, guidance_on=guidance_on)
    least, most, middle = at(method, 0.0), at(method, 1.0), at(fixed, 0.7)
    torch.testing.assert_close((least + most) / 2, middle, atol=1e-13, rtol=0)
    assert (most - least).abs().max() > 1e-2
    mixed = at(method, torch.tensor([0.0, 1.0, 0.25]))
    expected = torch.stack([least[0], most[1], 0.75 * least[2] + 0.25 * most[2]])
    torch.testing.assert_close(mixed, expected, atol=1e-13, rtol=0)
    drawn = torch.linspace(0, 1, 21)
    average = sum(at(method, float(u)) for u in drawn) / 21
    torch.testing.assert_close(average, middle, atol=1e-8, rtol=0)  # the fractions are float32


def test_a_span_of_zero_is_swiftbrush():
    teacher = dit()
    made = [
        playing.objective(SwiftBrush, teacher, guidance=2.25),
        playing.objective(Snoopi, teacher, kappa_min=2.25, kappa_max=2.25),
    ]
    gradients = []
    for method in made:
        with torch.no_grad():
            for p in method.fake.parameters():
                p.add_(0.01)
        play(method, 0, batch(teacher))
        gradients.append([p.grad for p in method.generator.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_kappas_are_one_a_sample_and_the_same_on_both(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(swiftbrush, "guided", lambda *args: (seen.append(args[-1]), guided(*args))[1])
    teacher = dit()
    method = playing.objective(Snoopi, teacher)
    play(method, 0, batch(teacher, size=64))
    on_fake, on_real = seen
    assert on_fake is on_real and on_fake.shape == (64, 1, 1, 1)
    assert len(on_fake.unique()) == 64 and 0.5 <= on_fake.min() < 1 and 3.5 < on_fake.max() <= 4
    assert float(on_fake.mean()) == pytest.approx(2.25, abs=0.4)


def test_guided_is_the_teachers_own_guidance():
    """One doubled pass with kappas in a tensor is, sample by sample, the teacher's with a number."""
    teacher = dit()
    x, t = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([200, 700])
    cond, uncond = teacher.encode(torch.arange(2))
    got = guided(teacher.denoiser, x, t, cond, uncond, torch.tensor([1.5, 4.0]).view(2, 1, 1, 1))
    expected = torch.stack([teacher(x, t, cond, uncond, w)[i] for i, w in enumerate((1.5, 4.0))])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(guided(teacher.denoiser, x, t, cond, None, None), teacher.denoiser(x, t, cond))


# --- fixed points


@pytest.mark.parametrize("kappa", [1.0, 2.25, 4.5])
def test_guidance_on_both_ends_at_the_unguided_teacher(kappa):
    assert settled(made(SwiftBrush, guidance=kappa)) == pytest.approx(MEANS, abs=1e-6)


def test_random_guidance_on_both_ends_at_the_unguided_teacher():
    assert settled(made(Snoopi), "random") == pytest.approx(MEANS, abs=1e-6)


@pytest.mark.parametrize("kappa", [1.0, 2.25, 4.5])
def test_guidance_on_the_teacher_ends_at_the_guided_teacher(kappa):
    guided = [NULL + kappa * (mean - NULL) for mean in MEANS]
    assert settled(made(SwiftBrush, guidance=kappa, guidance_on="teacher")) == pytest.approx(guided, abs=1e-6)


def test_one_conditional_mean_with_a_null_branch_that_stays():
    """mu = 1, null = .2 on both: 1 with guidance on both, .2 + 4.5 (1 - .2) = 3.8 with guidance on the teacher."""
    means = (1.0, 1.0, 1.0, 0.2)
    assert settled(made(SwiftBrush, means), null=0.2) == pytest.approx([1.0] * 3, abs=1e-6)
    assert settled(made(SwiftBrush, means, guidance_on="teacher"), null=0.2) == pytest.approx([3.8] * 3, abs=1e-6)


def test_a_null_branch_that_is_not_the_generators_moves_the_fixed_point():
    """With the critic's null at f and the teacher's at n the means end at mu + (kappa - 1) / kappa (f - n)."""
    off = 3.5 / 4.5 * (0.9 - NULL)
    assert settled(made(SwiftBrush), null=0.9) == pytest.approx([mean + off for mean in MEANS], abs=1e-6)


def test_grids_show_the_teacher_that_the_student_ends_at():
    guidances = [made(kind, guidance_on=on).guidance for kind in (SwiftBrush, Snoopi) for on in ("both", "teacher")]
    assert guidances == [1.0, 4.5, 1.0, 2.25]


# --- the critic


def critic(schedule: Any, kind: str, **options: Any) -> Any:
    """SwiftBrush on N(.7, .9^2) with the critic of N(-.4, .6^2)."""
    method = playing.objective(SwiftBrush, ClosedFormTeacher(Gaussian(schedule, kind)), times=[0], **options)
    with torch.no_grad():
        method.fake.network.mean.fill_(-0.4)
        method.fake.network.std.fill_(0.6)
    return method


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_critics_loss_is_that_on_the_noise_times_alpha_squared(level, kind):
    """mean alpha^2 (eps_critic - eps)^2; elsewhere than in VP with alpha^2 / (alpha^2 + sigma^2) in place of alpha^2."""
    schedule, alpha, sigma = fixed_level(level)
    x, eps = (torch.linspace(a, -1, 20, dtype=torch.float64).view(-1, 1) for a in (2, 1.3))
    x_t, v = alpha * x + sigma * eps, alpha**2 * 0.6**2 + sigma**2
    predicted = sigma / v * (x_t + 0.4 * alpha)
    expected = (alpha**2 / (alpha**2 + sigma**2) * (predicted - eps) ** 2).mean()
    method = critic(schedule, kind)
    cond, _ = method.teacher.encode(zeros(20))
    got = method.denoising(x, Batch(zeros(20), None, Draws([eps], [0.5, 0.35])), cond)
    assert float(got.detach()) == pytest.approx(float(expected), rel=1e-12)
    if level == "vp" and kind == "epsilon":
        plain = method.fake.loss(x, cond, Draws([eps]))  # the network's own loss, without a weight
        assert float(got.detach()) == pytest.approx(alpha**2 * float(plain.detach()), rel=1e-12)


def test_critics_loss_at_its_optimum():
    """alpha^2 (1 - sigma^2 / v) for x ~ N(-.4, .6^2), where its gradient is zero."""
    (z, eps), _ = grid(2, 2)
    method = critic(LEVEL, "epsilon")
    cond, _ = method.teacher.encode(zeros(4))
    loss = method.denoising(-0.4 + 0.6 * z, Batch(zeros(4), None, Draws([eps])), cond)
    v = ALPHA**2 * 0.6**2 + SIGMA**2
    assert float(loss.detach()) == pytest.approx(ALPHA**2 * (1 - SIGMA**2 / v), rel=1e-12)
    loss.backward()
    assert abs(float(method.fake.network.mean.grad)) < 1e-12 and abs(float(method.fake.network.std.grad)) < 1e-12


class Still(nn.Module):
    """A network with one output for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        return (self.output.expand_as(x),)


def test_critics_loss_is_finite_at_the_ends_of_a_flow():
    """At t = 0 the error is 0 and at t = 1 the weight: nothing is divided by zero."""
    method = critic(fixed_level("flow")[0], "flow_prediction")
    method.fake.network = Still()
    x, cond = torch.full((2, 1), 0.7, dtype=torch.float64), method.teacher.encode(zeros(2))[0]
    draws = Draws([torch.ones(2, 1, dtype=torch.float64)], [0.5, torch.tensor([0.0, 1.0])])
    loss = method.denoising(x, Batch(zeros(2), None, draws), cond)
    loss.backward()
    assert float(loss.detach()) == 0 and float(method.fake.network.output.grad) == 0


def null_gradient(null: float, u: float, **options: float) -> Tensor:
    """Gradient of the critic's loss in the means of its classes and of its null branch, which is at `null`."""
    method = made(SwiftBrush, **options)
    means = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
    know(method, means + 0.1, null)
    (z, eps), _ = grid(2, 2)
    labels = torch.arange(3).repeat_interleave(4)
    x = means[labels].view(-1, 1) + S * z.repeat(3, 1)
    cond, _ = method.teacher.encode(labels)
    method.denoising(x, Batch(labels, None, Draws([eps.repeat(3, 1)], [u])), cond).backward()
    return method.fake.network.means.grad


def test_the_critics_null_branch_learns_the_average_of_the_classes():
    average = (0.3 - 0.2 + 1.1) / 3
    lost = null_gradient(average, u=0.05)
    assert lost.abs().max() < 1e-12  # all lost their class: nothing reaches the classes, and the average is the optimum
    assert null_gradient(average + 0.1, u=0.05)[3] > 1e-3 > -1e-3 > null_gradient(average - 0.1, u=0.05)[3]
    kept = null_gradient(average + 0.1, u=0.15)
    assert kept[3] == 0 and kept[:3].min() > 1e-3
    assert null_gradient(average + 0.1, u=0.0, cond_dropout=0.0)[3] == 0


def test_a_tenth_of_the_critics_conditions_are_dropped():
    method = made(SwiftBrush)
    labels = torch.arange(2000) % 3
    cond, _ = method.teacher.encode(labels)
    rng = Rng(0, 0, 2000, dtype=torch.float64)
    method.denoising(torch.zeros(2000, 1, dtype=torch.float64), Batch(labels, None, rng), cond)
    given = method.fake.network.labels[-1]
    assert float((given == 3).double().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(given[given != 3], labels[given != 3]) and torch.equal(cond["class_labels"], labels)


# --- updates, passes, leaks


@pytest.mark.parametrize(
    "kind, options, passes",
    [
        (SwiftBrush, {}, (2, 2, 3)),
        (Snoopi, {}, (2, 2, 3)),
        (SwiftBrush, {"guidance_on": "teacher"}, (2, 2, 2)),
        (Snoopi, {"guidance_on": "teacher"}, (2, 2, 2)),
        (SwiftBrush, {"guidance": 1.0}, (2, 1, 2)),
    ],
)
def test_number_of_network_passes(kind, options, passes):
    """Student, teacher and critic in a step, in units of one batch; a guided pass counts twice."""
    teacher = dit()
    method = playing.objective(kind, teacher, **{"guidance": 4.5, "ratio": 2} | options)
    counted = (method.generator.denoiser, teacher.denoiser, method.fake)
    calls = [Calls(each.network) for each in counted]
    assert play(method, 0, batch(teacher)) == ["generator", "critic"]
    assert tuple(each.finished // 2 for each in calls) == passes
    assert [each.passes for each in calls] == [2, 1, 2]
    assert play(method, 1, batch(teacher)) == ["critic"]
    assert tuple(each.finished // 2 for each in calls) == (passes[0] + 1, passes[1], passes[2] + 1)


@pytest.mark.parametrize("kind", [SwiftBrush, Snoopi])
def test_equal_denoisers_give_no_gradient(kind):
    """A critic that is the teacher, whatever the guidance; with guidance on the teacher alone there is one."""
    teacher = dit()
    for on, moved in (("both", False), ("teacher", True)):
        method = playing.objective(kind, teacher, guidance=4.5, guidance_on=on)
        turns = method.step(batch(teacher), 0)
        next(turns)[1].backward()
        assert moved == any(bool(p.grad.any()) for p in method.generator.parameters() if p.grad is not None)


def test_players_leave_each_other_alone():
    teacher = dit()
    method = playing.objective(Snoopi, teacher)
    with torch.no_grad():
        for p in method.fake.parameters():
            p.add_(0.01)
    turns = method.step(batch(teacher), 0)
    next(turns)[1].backward()
    assert not any(has_gradient(method.fake)) and not any(has_gradient(teacher.denoiser))
    clear(method.generator)
    player, loss = next(turns)
    loss.backward()
    assert player == "critic" and any(has_gradient(method.fake)) and not any(has_gradient(method.generator))


@pytest.mark.parametrize("kind", [SwiftBrush, Snoopi])
def test_a_recorded_teacher_is_followed_without_guidance(kind, tmp_path):
    """Node and critic are compared as they are, a pass each; the critic learns its null branch on the way there too."""
    teacher = dit()
    options = {"guidance": 4.5, "backtrack": 2, "backtrack_nodes": 2, "backtrack_steps": 1}
    method = playing.objective(kind, teacher, tmp_path, **options)
    real, fake = Calls(teacher.denoiser.network), Calls(method.fake.network)
    assert [play(method, step, batch(teacher, step)) for step in range(2)] == [["critic"]] * 2
    assert (real.finished, fake.finished) == (0, 4)
    node = Calls(method.kept()[0].network)
    assert play(method, 2, batch(teacher, 2)) == ["generator", "critic"]
    assert (real.finished, fake.finished, node.finished) == (0, 8, 2)
    play(method, 3, batch(teacher, 3))
    assert (real.finished, fake.finished, node.finished) == (4, 14, 2)


# --- options, adapters, a whole run


def test_defaults_are_the_papers():
    for kind in (SwiftBrush, Snoopi):
        config, options = resolve(kind.Config, {}, {}, {})
        assert (config.critic, config.lr, config.critic_lr, config.clip_norm) == ("lora", 1e-6, 1e-3, 1.0)
        assert (options.ratio, options.cond_dropout, options.guidance_on, options.clip) == (1, 0.1, "both", 0.0)
    assert resolve(SwiftBrushConfig, {}, {}, {})[0].guidance == 4.5
    assert (SnoopiConfig().kappa_min, SnoopiConfig().kappa_max, SnoopiConfig().clip_tau) == (0.5, 4.0, 0.37)
    with pytest.raises(ValueError, match=r"kappa_min 3.0 is above kappa_max 2.0; type for example --kappa-min 2.0"):
        resolve(SnoopiConfig, {}, {}, {"kappa_min": "3", "kappa_max": "2"})


def test_a_teacher_without_null_branch_is_refused():
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    for kind in (SwiftBrush, Snoopi):
        with pytest.raises(ValueError, match=r"no unconditional branch.*--method vsd"):
            playing.objective(kind, teacher)


@pytest.mark.parametrize("name", ["fashion", "tiny"])
def test_the_critic_can_be_an_adapter(name):
    teacher: Teacher = dit() if name == "tiny" else load_teacher(name)
    teacher.copies = Copies(lora=frozenset({"critic"}), rank=4)
    method = playing.objective(objective_class("snoopi"), teacher)
    turns = method.step(batch(teacher, real=False), 0)
    assert float(next(turns)[1].detach()) == 0  # an adapter starts as its base
    player, loss = next(turns)
    loss.backward()
    assert player == "critic" and all(has_gradient(method.fake.network))
    assert sum(p.numel() for p in method.fake.parameters()) < sum(p.numel() for p in method.generator.parameters()) / 2
    with torch.no_grad():
        for p in method.fake.parameters():
            p.sub_(p.grad, alpha=10.0)
    turns = method.step(batch(teacher, 1, real=False), 1)
    assert float(next(turns)[1].detach()) > 0
    assert isinstance(method, VSD)


def test_a_run_from_the_command_line(tmp_path: Path):
    dit_pipeline().save_pretrained(tmp_path / "teacher")
    argv = [*TINY, "--method", "snoopi", "--teacher", str(tmp_path / "teacher"), "--rank", "4", "--iterations", "3"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/export/model_index.json").is_file()


@pytest.mark.parametrize(
    "kind, options, end",
    [
        (SwiftBrush, {}, 1.0),
        (SwiftBrush, {"guidance_on": "teacher"}, 3.0),
        (Snoopi, {}, 1.0),
        (Snoopi, {"guidance_on": "teacher", "kappa_min": 1.0, "kappa_max": 4.0}, 2.5),
    ],
)
def test_cards_and_grids_name_the_guidance_that_the_student_ends_at(kind, options, end):
    assert kind.ends_at(kind.Config(**options), 3.0) == end
    assert playing.objective(kind, dit(), guidance=3.0, **options).guidance == end
