"""VSD, SDS and ASD against closed forms on Gaussians: gradients, where they end, updates and passes."""

import contextlib
import math
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from background import TINY
from gaussian import TYPES, Calls, ClosedFormTeacher, Gaussian, grid
from guided import Draws, at_ratio
from playing import LEVELS, batch, clear, dit, has_gradient, linear_vp, play, zeros
from tiny import edm_pipeline
from torch import Tensor

from onestep.denoiser import Cond
from onestep.objectives import vsd
from onestep.objectives.base import Batch
from onestep.objectives.sds import ASD, SDS
from onestep.objectives.vsd import VSD
from onestep.schedule import EDM, VP, RectifiedFlow
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher, load_teacher
from onestep.train import main

M, S = 1.3, 0.7  # the teacher N(M, S^2)
STUDENTS = [(0.2, 1.4), (2.0, 0.3)]  # mean below and deviation above the teacher's, and the other way round


def cosine(steps: int = 10) -> VP:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) at t = 1/steps, 2/steps, ..., where u is t."""
    return VP(torch.cos(math.pi / 2 * torch.arange(1, steps + 1, dtype=torch.float64) / steps) ** 2)


def slope(q: float) -> float:
    """k(q) = q / (S^2 + q^2) = sigma alpha / v, which rises up to q = S."""
    return q / (S**2 + q**2)


def q_at(t: float) -> float:
    return math.tan(math.pi / 2 * t)


def made(kind: type, schedule: Any, prediction: str = "epsilon", **options: Any) -> Any:
    return playing.objective(kind, ClosedFormTeacher(Gaussian(schedule, prediction, M, S)), times=[1], **options)


def gradient(method: Any, mean: float, deviation: float, fractions: list[float]) -> tuple[float, float]:
    """d/dmean, d/ddeviation of the generator's loss at x = mean + deviation z, the critic being exact.

    The integrand is quadratic in (z, eps) at most: two equally weighted nodes for each make the mean exact.
    """
    (z, eps), weights = grid(2, 2)
    assert torch.allclose(weights, torch.full_like(weights, 0.25))
    mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, deviation))
    if isinstance(method, VSD):
        with torch.no_grad():
            method.fake.network.mean.fill_(mean)
            method.fake.network.std.fill_(deviation)
    cond, uncond = method.teacher.encode(zeros(4))
    method.generator_loss(mu + tau * z, Batch(zeros(4), None, Draws([eps], fractions)), cond, uncond).backward()
    return float(mu.grad), float(tau.grad)


# --- gradients


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("student", STUDENTS)
def test_vsd_gradient(student, level, kind):
    """w k (mean - M), w sigma alpha s (1/v - 1/v_student): alpha sigma w times that of KL, whatever the schedule."""
    mean, s = student
    q = q_at(0.4)
    schedule, _, _, u = at_ratio(level, q)
    got = gradient(made(VSD, schedule, kind, t_min=0.0, t_max=1.0), mean, s, [u])
    w = q**2 / (1 + q**2)
    assert got == pytest.approx((w * slope(q) * (mean - M), w * q * s * (1 / (S**2 + q**2) - 1 / (s**2 + q**2))), abs=1e-12)
    if student == STUDENTS[0]:
        assert got == pytest.approx((w * -0.7851704604, w * 0.5904593361), abs=1e-9)
    # towards the teacher in both
    assert (got[0] > 0) == (mean > M) and (got[1] > 0) == (s > S)


def test_vsd_gradient_is_that_of_the_kl():
    """sigma / alpha of the KL's derivative, by finite differences of its closed form, times w = sigma^2."""
    t, h = 0.4, 1e-5
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    v = alpha**2 * S**2 + sigma**2

    def kl(mean: float, s: float) -> float:
        p = alpha**2 * s**2 + sigma**2
        return 0.5 * (p / v + alpha**2 * (mean - M) ** 2 / v - 1 - math.log(p / v))

    mean, s = STUDENTS[0]
    differences = ((kl(mean + h, s) - kl(mean - h, s)) / (2 * h), (kl(mean, s + h) - kl(mean, s - h)) / (2 * h))
    got = gradient(made(VSD, cosine(), t_min=0.0, t_max=1.0), mean, s, [t])
    assert got == pytest.approx(tuple(sigma**2 * sigma / alpha * each for each in differences), abs=1e-9)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("student", STUDENTS)
def test_sds_gradient(student, level, kind):
    """w k (mean - M), w k s: the deviation shrinks whether or not it is above the teacher's."""
    mean, s = student
    q = q_at(0.4)
    schedule, _, _, u = at_ratio(level, q)
    got = gradient(made(SDS, schedule, kind, t_min=0.0, t_max=1.0), mean, s, [u])
    w = q**2 / (1 + q**2)
    assert got == pytest.approx((w * slope(q) * (mean - M), w * slope(q) * s), abs=1e-12)
    if student == STUDENTS[0]:
        assert got == pytest.approx((w * -0.7851704604, w * 0.9993078587), abs=1e-9)
    assert got[1] > 0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("t_min, t_max, u, shift", [(0.0, 1.0, 0.4, 0.5), (0.2, 0.6, 0.5, 1.0)])
def test_asd_gradient(t_min, t_max, u, shift, kind):
    """SDS's with k(t) - k(t') in the place of k(t): t = .4 and t' = t + shift (t - t_min) .5 = .5."""
    mean, s = STUDENTS[0]
    got = gradient(made(ASD, cosine(), kind, t_min=t_min, t_max=t_max, shift=shift), mean, s, [u, 0.5])
    w, k = math.sin(math.pi / 2 * 0.4) ** 2, slope(q_at(0.4)) - slope(q_at(0.5))
    assert got == pytest.approx((w * k * (mean - M), w * k * s), abs=1e-12)
    assert got == pytest.approx((w * -0.0469154268, w * 0.0597105432), abs=1e-9)


def test_asd_pushes_away_at_little_noise():
    """Where sigma / alpha is below the data's deviation, k rises: the gradient has the other sign."""
    mean, s = STUDENTS[0]
    got = gradient(made(ASD, cosine(), t_min=0.0, t_max=1.0, shift=1.0), mean, s, [0.2, 0.5])  # t' = .3
    assert q_at(0.3) < S
    w, k = math.sin(math.pi / 2 * 0.2) ** 2, slope(q_at(0.2)) - slope(q_at(0.3))
    assert k < 0 and got == pytest.approx((w * k * (mean - M), w * k * s), abs=1e-12)


def test_asd_without_a_step_up_does_nothing():
    assert gradient(made(ASD, cosine(), shift=0.0), *STUDENTS[0], [0.4, 0.5]) == (0.0, 0.0)


@pytest.mark.parametrize("schedule", [linear_vp(), RectifiedFlow(), EDM()], ids=["vp", "flow", "edm"])
def test_asd_stays_on_the_schedule(schedule):
    """From the most noise there is no step up."""
    seen: list[Tensor] = []
    method = made(ASD, schedule, t_max=1.0, shift=0.5)
    method.teacher.denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gradient(method, *STUDENTS[0], [1.0, 1.0])
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("kind", TYPES)
def test_equal_denoisers_give_no_gradient(kind):
    assert gradient(made(VSD, linear_vp(), kind), M, S, [0.6]) == (0.0, 0.0)


def test_all_prediction_types_give_the_same_gradient():
    """At samples of any shape, each with its own noise level."""
    found: dict[type, list[Tensor]] = {VSD: [], SDS: [], ASD: []}
    for method_kind, gradients in found.items():
        for kind in TYPES:
            teacher = ClosedFormTeacher(Gaussian(linear_vp(), kind, M, S), shape=(2, 3))
            method = playing.objective(method_kind, teacher)
            if method_kind is VSD:
                with torch.no_grad():
                    method.fake.network.mean.fill_(0.2)
            x = torch.linspace(-2, 2, 30, dtype=torch.float64).view(5, 2, 3).requires_grad_()
            cond, uncond = teacher.encode(zeros(5))
            rng = playing.Rng(1, 0, 5, dtype=torch.float64)
            method.generator_loss(x, Batch(zeros(5), None, rng), cond, uncond).backward()
            gradients.append(x.grad)
    for gradients in found.values():
        for each in gradients[1:]:
            torch.testing.assert_close(each, gradients[0], atol=1e-12, rtol=0)
        assert gradients[0].abs().min() > 1e-9


# --- where they end


def descend(method: Any, mean: float, s: float, fractions: list[float], steps: int, rate: float) -> tuple[float, float]:
    """Gradient descent of a student mean + s z with an exact critic."""
    for _ in range(steps):
        by_mean, by_s = gradient(method, mean, s, list(fractions))
        mean, s = mean - rate * by_mean, s - rate * by_s
    return mean, s


@pytest.mark.parametrize("student", STUDENTS)
def test_vsd_ends_at_the_teacher_and_sds_at_a_point(student):
    """The same descent: VSD matches mean and deviation, SDS has collapsed to the mean."""
    vsd_method, sds_method = (made(kind, cosine(), t_min=0.0, t_max=1.0) for kind in (VSD, SDS))
    assert descend(vsd_method, *student, [0.4], 60, 3.0) == pytest.approx((M, S), abs=1e-6)
    assert descend(sds_method, *student, [0.4], 60, 1.5) == pytest.approx((M, 0.0), abs=1e-6)


def test_asd_collapses_or_diverges():
    """Even the teacher itself is left: at much noise for a point, at little noise for ever wider samples."""
    much = made(ASD, cosine(), t_min=0.0, t_max=1.0, shift=0.5)
    assert descend(much, M, S, [0.6, 0.5], 60, 8.0) == pytest.approx((M, 0.0), abs=1e-6)
    little = made(ASD, cosine(), t_min=0.0, t_max=1.0, shift=1.0)
    mean, s = descend(little, M + 0.1, S, [0.2, 0.5], 60, 5.0)
    assert s > 5 * S and mean - M > 0.5


# --- guidance, updates, passes


@pytest.mark.parametrize("kind", [SDS, ASD])
def test_without_a_critic_there_is_one_player(kind):
    teacher = dit()
    method = playing.objective(kind, teacher)
    assert list(method.players()) == ["generator"] and method.kept() == ()
    assert [play(method, step, batch(teacher, step)) for step in range(2)] == [["generator"]] * 2
    assert any(has_gradient(method.generator)) and not any(has_gradient(teacher.denoiser))


def test_generator_then_critic():
    teacher = dit()
    method = playing.objective(VSD, teacher, ratio=3)
    order = [play(method, step, batch(teacher, step)) for step in range(5)]
    assert order == [["generator", "critic"] if step in (0, 3) else ["critic"] for step in range(5)]


def test_the_critic_learns_from_new_samples_of_the_updated_generator(monkeypatch):
    teacher = dit()
    method = playing.objective(VSD, teacher)
    made_by: list[Tensor] = []
    told: list[Tensor] = []
    simulate, denoising = method.generator.simulate, method.denoising
    monkeypatch.setattr(method.generator, "simulate", lambda *a, **k: (made_by.append(simulate(*a, **k)), made_by[-1])[1])
    monkeypatch.setattr(method, "denoising", lambda x, *a: (told.append(x), denoising(x, *a))[1])
    turns = method.step(batch(teacher), 0)
    assert next(turns)[0] == "generator"
    with torch.no_grad():
        for p in method.generator.parameters():
            p.zero_()
    assert next(turns)[0] == "critic"
    first, second = made_by
    assert first.requires_grad and not second.requires_grad and told == [second]
    # a generator of zeros predicts eps = 0: its sample shows the noise it was given
    rng = batch(teacher).rng
    rng.normal(teacher.shape), rng.uniform(), rng.normal(teacher.shape)
    z = rng.normal(teacher.shape)
    assert torch.allclose(second / second.std(), z / z.std(), atol=1e-5)


GUIDED = {"guided": (dit, 1.5, 2), "unguided": (lambda: EDMTeacher(edm_pipeline(), Facts("x")), 1.0, 1)}


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("kind, student, real, fake", [(VSD, 2, 0, 2), (SDS, 1, 0, 0), (ASD, 1, 1, 0)])
def test_number_of_network_passes(kind, student, real, fake, name):
    """A step in units of one batch. The teacher's guided pass counts twice; ASD's second is without guidance."""
    make, guidance, doubled = GUIDED[name]
    teacher = make()
    method = playing.objective(kind, teacher, guidance=guidance)
    counted = [method.generator.denoiser, teacher.denoiser, *([method.fake] if kind is VSD else [])]
    calls = [Calls(each.network) for each in counted]
    size = 2
    play(method, 0, batch(teacher, 0, size))
    assert [each.finished // size for each in calls] == [student, real + doubled, *([fake] if kind is VSD else [])]
    if kind is VSD:
        method.config.ratio = 2
        play(method, 1, batch(teacher, 1, size))  # the critic alone
        assert [each.finished // size for each in calls] == [student + 1, doubled, fake + 1]


def test_guidance_is_the_teachers_alone():
    teacher = dit()
    plain, guided = (playing.objective(VSD, teacher, guidance=w) for w in (1.0, 3.0))
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    cond, uncond = teacher.encode(torch.arange(2))
    found = []
    for method in (plain, guided):
        t = torch.tensor([300, 600])
        found.append(method.compared(x, t, batch(teacher), cond, uncond))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[0][1])
    w = teacher(x, torch.tensor([300, 600]), cond, uncond, 3.0)
    assert torch.equal(found[1][1], w) and not torch.allclose(w, found[0][1], atol=1e-4)


def test_a_teacher_without_null_branch_has_no_guidance():
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    for kind in (VSD, SDS, ASD):
        with pytest.raises(ValueError, match="only --guidance 1"):
            play(playing.objective(kind, teacher, guidance=2.0), 0, batch(teacher))


# --- no leaks


class Through(VSD):
    """A generator's loss with a gradient through the critic, which VSD's own has not."""

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        x_t, t = self.noised(x, batch)
        return self.fake(x_t, t, cond).square().mean()


@pytest.mark.parametrize("kind", [VSD, Through])
def test_players_leave_each_other_alone(kind):
    teacher = dit()
    method = playing.objective(kind, teacher)
    with torch.no_grad():
        for p in method.fake.parameters():
            p.add_(0.01)  # else VSD has no gradient
    turns = method.step(batch(teacher), 0)
    next(turns)[1].backward()
    assert not any(has_gradient(method.fake)) and not any(has_gradient(teacher.denoiser))
    assert sum(float(p.grad.abs().sum()) for p in method.generator.parameters() if p.grad is not None) > 0
    clear(method.generator)
    player, loss = next(turns)
    loss.backward()
    assert player == "critic" and any(has_gradient(method.fake)) and not any(has_gradient(method.generator))
    assert all(p.requires_grad for p in method.fake.parameters())


def test_the_leak_test_can_fail(monkeypatch):
    monkeypatch.setattr(vsd, "frozen", lambda *modules: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        test_players_leave_each_other_alone(Through)


# --- adapters, backtracking, a whole run


@pytest.mark.parametrize("name", ["fashion", "digits", "tiny"])
def test_the_critic_can_be_an_adapter(name):
    teacher: Teacher = dit() if name == "tiny" else load_teacher(name)
    teacher.copies = Copies(lora=frozenset({"critic"}), rank=4)
    method = playing.objective(VSD, teacher)
    critic, student = method.fake.network, method.generator.denoiser.network
    assert sum(p.numel() for p in critic.parameters()) < sum(p.numel() for p in student.parameters()) / 2
    turns = method.step(batch(teacher, real=False), 0)
    player, loss = next(turns)
    assert player == "generator" and float(loss.detach()) == 0  # an adapter starts as its base
    loss.backward()
    clear(method.generator)
    next(turns)[1].backward()
    assert all(has_gradient(critic)) and not any(has_gradient(method.generator))
    assert not any(p.requires_grad for p in teacher.denoiser.parameters() if all(p is not q for q in critic.parameters()))


def test_a_recorded_teacher_takes_the_teachers_place(tmp_path):
    teacher = dit()
    method = playing.objective(VSD, teacher, tmp_path, guidance=1.5, backtrack=2, backtrack_nodes=2, backtrack_steps=2)
    real = Calls(teacher.denoiser.network)
    assert [play(method, step, batch(teacher, step)) for step in range(2)] == [["critic"]] * 2
    node = Calls(method.kept()[0].network)
    assert [play(method, step, batch(teacher, step)) for step in range(2, 4)] == [["generator", "critic"]] * 2
    assert (real.finished, node.finished) == (0, 4)
    play(method, 4, batch(teacher, 4))
    assert (real.finished, node.finished) == (4, 4)


def test_a_run_from_the_command_line(tiny_teacher: Path, tmp_path: Path):
    argv = [*TINY, "--method", "vsd", "--teacher", str(tiny_teacher), "--rank", "4", "--iterations", "3", "--init-rho", "80"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/export/model_index.json").is_file()
    assert "critic: lora" in (tmp_path / "run/config.yaml").read_text()
