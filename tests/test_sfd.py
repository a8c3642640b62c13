"""SFD against closed forms: gradients, fixed point, which condition each network is asked for, what may be forgotten."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import playing
import pytest
import torch
from gaussian import TYPES, Calls, ClosedFormTeacher, GridRng, denoiser, fixed_level, grid
from guided import Classes
from playing import LEVELS, MU, TAU, M, S, dit, has_gradient, linear_vp, play, zeros
from tiny import dit_pipeline, edm_pipeline
from tiny_text import sd15
from torch import Tensor, nn

from onestep.config import resolve
from onestep.denoiser import Denoiser
from onestep.generator import Generator
from onestep.metrics.classifier import Classifier
from onestep.objectives import score, sfd, sid
from onestep.objectives.base import Batch
from onestep.objectives.sfd import SFD
from onestep.plan_memory import Run
from onestep.plan_teacher import Blank
from onestep.rng import Rng
from onestep.schedule import Schedule
from onestep.teacher import DiTTeacher, EDMTeacher, Facts
from onestep.teacher.stable_diffusion import SDTeacher

REMAINS, GONE, OVERRIDE, NULL = 0, 1, 2, 3
MEANS = (0.2, -2.0, M, 5.0)  # the teacher's, by class; the override's is M
STUDENT = (0.5, MU, 1.1, 0.0)  # the student's; that of the forgotten class is MU


class Student(Classes):
    """G(z, c) = means[c] + std z."""

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.means[self.labels[-1]].view(-1, 1) + self.std * x_t


class Grid(GridRng):
    """With the first of every range of integers, and no thinning."""

    def integers(self, high: int) -> Tensor:
        return zeros(self.rows)


def closed(
    schedule: Schedule,
    kind: str = "epsilon",
    student: Sequence[float] = STUDENT,
    tau: float = TAU,
    guidance: float = 1.0,
    **options: Any,
) -> SFD:
    """SFD on closed forms with the exact critic of the student."""
    options = {"forget": str(GONE), "override": str(OVERRIDE)} | options
    teacher = ClosedFormTeacher(Classes(schedule, kind, MEANS, S))
    time = schedule.at(torch.tensor([0.35], dtype=torch.float64)).item()
    generator = Generator(denoiser(Student(schedule, kind, student, tau)), [time])
    method = SFD(SFD.Config(**options), teacher, generator, guidance, Path(), Path())
    method.fake = denoiser(Classes(schedule, kind, student, tau))
    return method


def generator_turn(method: SFD, item: Batch) -> None:
    """The critic's loss is thrown away, the generator's walked back."""
    for player, loss in method.step(item, 0):
        if player == "generator":
            loss.backward()


# --- losses


def gradients(level: str, kind: str, monkeypatch: pytest.MonkeyPatch, asked: int = OVERRIDE, **options: Any) -> list[float]:
    """d/dmu of the remaining, the forgotten and the override's class and d/dtau, without the per-sample weight, alpha 1.

    The loss is quadratic in the draws, so two equally weighted points for each of them give its expectation.
    """
    for module in (sid, sfd):
        monkeypatch.setattr(module, "per_sample_weight", lambda x, real: torch.ones((), dtype=torch.float64))
    method = closed(fixed_level(level)[0], kind, alpha=1.0, **options)
    method.instead[GONE] = asked
    (z, eps), _ = grid(2, 2)
    generator_turn(method, Batch(zeros(len(z)), None, Grid([z, eps] * 4)))  # critic and generator, each two terms
    student = method.generator.denoiser.network
    return [*student.means.grad[:3].tolist(), float(student.std.grad)]


def s4(level: str, mean: float, mu: float) -> tuple[float, float]:
    """Half the gradient of E|fake - real|^2 with the law of x_t held still: teacher N(mean, S^2), student mu + TAU z."""
    _, alpha, sigma = fixed_level(level)
    p, q = alpha**2 * TAU**2 + sigma**2, alpha**2 * S**2 + sigma**2
    a, b = alpha * S**2 / q, alpha * TAU**2 / p
    return -(1 - a * alpha) * (mean - mu) * (1 - b * alpha), -2 * (a - b) * alpha * TAU * sigma**2 / p


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "level, golden",
    list(zip(LEVELS, [(-0.61301659, -0.14679776), (-0.27489004, -0.14628295), (-0.12935055, -0.09770022)])),
)
def test_gradients_of_remaining_and_forgotten_class(level, golden, kind, monkeypatch):
    g = 0.3
    remains, gone, override, tau = gradients(level, kind, monkeypatch, forgetting=g)
    assert gone == pytest.approx(g * golden[0], abs=1e-8) and gone == pytest.approx(g * s4(level, M, MU)[0], abs=1e-12)
    assert remains == pytest.approx(s4(level, MEANS[REMAINS], STUDENT[REMAINS])[0], abs=1e-12)
    assert tau == pytest.approx((1 + g) * golden[1], abs=1e-8) and override == 0


def test_a_teacher_asked_for_the_forgotten_class_gives_another_gradient(monkeypatch):
    _, gone, _, _ = gradients("vp", "epsilon", monkeypatch, asked=GONE, forgetting=1.0)
    assert gone == pytest.approx(s4("vp", MEANS[GONE], MU)[0], abs=1e-12)
    assert abs(gone - s4("vp", M, MU)[0]) > 0.1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("forgetting", [0.01, 1.0, 7.0])
def test_fixed_point(forgetting, kind):
    """Remaining classes are the teacher's, the forgotten one is the override: no gradient whatever the weights."""
    there = (MEANS[0], MEANS[OVERRIDE], *MEANS[2:])
    for student, least, most in ((there, 0.0, 1e-12), (MEANS, 1e-3, 1e9)):
        method = closed(linear_vp(), kind, student, S, forgetting=forgetting)
        generator_turn(method, Batch(torch.arange(64) % 3, None, Rng(3, 0, 64, dtype=torch.float64)))
        network = method.generator.denoiser.network
        size = float(torch.cat([network.means.grad, network.std.grad[None]]).abs().max())
        assert least <= size <= most
        assert method.log["forgetting"].isfinite()


def test_losses_are_weighted_as_configured():
    method = playing.objective(SFD, dit(), forget="1", forgetting=0.5, forgetting_critic=0.25)
    losses = {player: loss.detach() for player, loss in method.step(playing.batch(method.teacher), 0)}
    log = method.log
    assert float(losses["generator"]) == pytest.approx(float(log["sid"] + 0.5 * log["forgetting"]), rel=1e-5)
    assert float(losses["critic"]) == pytest.approx(float(log["denoising"] + 0.25 * log["forgetting_critic"]), rel=1e-5)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_micro_batches_are_one_batch(every):
    """Of the forgotten class the same samples are drawn, however the batch is split."""
    method = closed(linear_vp(), override="random", forget_every=every, forgetting=1.0, forgetting_critic=1.0)
    conditions = torch.arange(8) % 3

    def losses(start: int, stop: int) -> Tensor:
        item = Batch(conditions[start:stop], None, Rng(5, 0, 8, start, stop, dtype=torch.float64))
        return torch.stack([loss.detach() for _, loss in method.step(item, 0)])

    torch.testing.assert_close((losses(0, 4) + losses(4, 8)) / 2, losses(0, 8), atol=1e-13, rtol=0)


# --- which condition each network is asked for


def asked(denoiser: Denoiser) -> list[list[int]]:
    """The classes of every call."""
    return [labels.tolist() for labels in denoiser.network.labels]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teacher_is_asked_for_the_override_and_the_critic_for_the_forgotten(guidance):
    method = closed(linear_vp(), guidance=guidance)
    play(method, 0, Batch(torch.tensor([REMAINS, OVERRIDE, REMAINS]), None, Rng(0, 0, 3, dtype=torch.float64)))
    remain, gone, override, null = [0, 2, 0], [GONE] * 3, [OVERRIDE] * 3, [NULL] * 3 * (guidance > 1)
    assert asked(method.generator.denoiser) == [remain, gone, remain, gone]
    assert asked(method.fake) == [remain, gone, remain, gone]  # denoising of both, then the two estimates
    assert asked(method.teacher.denoiser) == [remain + null, override + null]


def test_forgotten_conditions_of_a_batch_are_replaced_by_remaining_ones():
    method = closed(linear_vp())
    conditions = torch.arange(6000) % 3
    next(method.step(Batch(conditions, None, Rng(0, 0, 6000, dtype=torch.float64)), 0))
    seen = torch.tensor(asked(method.generator.denoiser)[0])
    assert torch.equal(seen[conditions != GONE], conditions[conditions != GONE])
    counts = Counter(seen[conditions == GONE].tolist())
    assert counts.keys() == {REMAINS, OVERRIDE} and abs(counts[REMAINS] - 1000) < 4 * 2000**0.5 / 2


def test_random_overrides_are_uniform_over_the_others():
    method = playing.objective(SFD, dit(), forget="class 4")
    counts = Counter(method._override(torch.empty(0), Batch(zeros(9000), None, Rng(0, 0, 9000))).tolist())
    assert counts.keys() == {0, 1, 2, 3, 5, 6, 7, 8, 9}
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 26.1  # 99.9 % of chi^2 with 8 degrees


class Fixed(nn.Module):
    """A classifier that is most certain of the forgotten class, then of 7."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.min() >= -1 and images.max() <= 1
        logits = torch.tensor([0.0, 0.2, 0.0, -1.0, 9.0, 0.3, 0.0, 1.0, 0.0, 0.5])
        return logits.expand(len(images), 10)


def classified(override: str, size: int) -> list[int]:
    method = playing.objective(
        SFD, DiTTeacher(dit_pipeline(), Facts("x", protocol="fashion-10k")), forget="4", override=override
    )
    assert isinstance(method.classifier, Classifier) and list(method.kept()) == [method.classifier]
    assert not any(p.requires_grad for p in method.classifier.parameters())
    x = torch.randn(1, *method.teacher.shape)
    first = method._override(x, Batch(zeros(1), None, Rng(0, 0, 1)))  # the classifier that scores are measured in
    assert 0 <= int(first) < 10 and int(first) != 4
    method.classifier = Fixed()
    method.teacher.to_images = lambda x_0: torch.rand(len(x_0), 1, 1, 1)  # type: ignore[method-assign]
    return method._override(x.expand(size, -1, -1, -1), Batch(zeros(size), None, Rng(0, 0, size))).tolist()


def test_overrides_by_classifier():
    assert classified("classifier", 5) == [7] * 5
    counts = Counter(classified("classifier-sampled", 9000))
    logits = Fixed()(torch.zeros(1))[0].index_fill(0, torch.tensor([4]), -torch.inf)
    expected = 9000 * logits.softmax(0)
    assert counts.keys() == {0, 1, 2, 3, 5, 6, 7, 8, 9}
    assert sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in counts) < 26.1


# --- passes and leaks


@pytest.mark.parametrize(
    "options, gone", [({}, 4), ({"forget_every": 2}, 2), ({"forgetting": 0.0, "forgetting_critic": 0.0}, 0)]
)
def test_number_of_network_passes(options, gone):
    """A step of both: student 4, critic 2 + 2, teacher 2 (4 guided), in units of a batch, half of them on c_f."""
    teacher, size = dit(), 4
    method = playing.objective(SFD, teacher, guidance=1.5, forget="1", override="2", **options)
    student, real, fake = (Calls(d.network) for d in (method.generator.denoiser, teacher.denoiser, method.fake))
    assert play(method, 0, playing.batch(teacher, 0, size, real=False)) == ["critic", "generator"]
    assert (student.finished, real.finished, fake.finished) == (2 * (size + gone), 2 * (size + gone), 2 * (size + gone))


def leaks(method: SFD) -> tuple[bool, bool]:
    """Whether the critic's loss reaches the generator, and whether the generator's reaches the critic."""
    found = []
    for player, loss in method.step(playing.batch(method.teacher, real=False), 0):
        playing.clear(method.generator, method.fake)
        loss.backward()
        mine, other = (method.fake, method.generator) if player == "critic" else (method.generator, method.fake)
        assert any(has_gradient(mine)) and not any(has_gradient(method.teacher.denoiser))
        found.append(any(has_gradient(other)))
    return found[0], found[1]


def test_no_gradient_leaks(monkeypatch):
    assert leaks(playing.objective(SFD, dit(), forget="1")) == (False, False)
    monkeypatch.setattr(score, "frozen", lambda *modules: contextlib.nullcontext())
    assert leaks(playing.objective(SFD, dit(), forget="1")) == (False, True)


# --- what can be forgotten


def test_classes_by_number_and_by_name():
    for forget, override in (("3", "5"), ("class 3", "5"), ("CLASS 3", " class 5")):
        method = playing.objective(SFD, dit(), forget=forget, override=override)
        assert method.gone.tolist() == [3] and method.instead[3] == 5 and len(method.remaining) == 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "type --forget CLASS, or --forget WORDS"),
        ({"forget": "10"}, r"--forget '10' is no class; allowed is 0 .. 9"),
        ({"forget": "clas 3"}, r"--forget 'clas 3' is no class; .* did you mean 'class 3'\?"),
        ({"forget": "3", "override": "trouser"}, r"--override 'trouser' is no class; .* or a name such as 'class 0'"),
        ({"forget": "3", "override": "class 3"}, "the forgotten class itself; type another class, or random"),
        ({"forget": "3", "override": "classifier"}, "no classifier for this teacher; type --override random"),
    ],
)
def test_what_cannot_be_forgotten(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        playing.objective(SFD, dit(), **options)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_one_class_forgets_nothing():
    with pytest.raises(ValueError, match="one of several classes"):
        playing.objective(SFD, EDMTeacher(edm_pipeline(classes=None), Facts("x")), forget="0")


def test_a_batch_that_cannot_be_thinned_is_refused():
    method = playing.objective(SFD, dit(), forget="1", forget_every=3)
    with pytest.raises(ValueError, match=r"forget_every 3 does not divide the 4 samples .* type --forget-every 1"):
        play(method, 0, playing.batch(method.teacher, size=4))


PROMPTS = ["a photo of brad", "a photo of a man", "brad at sea", "a man at sea", "a dog"]


def by_text(prompts: list[str], **options: Any) -> SFD:
    teacher = SDTeacher(sd15(), Facts("x"))
    teacher.use_texts(prompts)
    return playing.objective(SFD, teacher, **options)


def test_words_are_forgotten_in_every_prompt_that_has_them():
    method = by_text(PROMPTS, forget="brad", override="a man", forgetting=1.0, forgetting_critic=1.0)
    assert method.gone.tolist() == [0, 2] and method.remaining.tolist() == [1, 3, 4]
    assert method.instead.tolist() == [1, 1, 3, 3, 4]
    item = Batch(torch.tensor([0, 4, 2, 1]), None, Rng(0, 0, 4))
    assert play(method, 0, item) == ["critic", "generator"]
    assert by_text(PROMPTS, forget="a dog", override="a man at sea").instead.tolist() == [0, 1, 2, 3, 3]
    assert by_text(PROMPTS, forget="brad").remaining.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget": "a cat"}, "none of the 5 prompts have --forget 'a cat'"),
        ({"forget": "a"}, "all of the 5 prompts have --forget 'a'"),
        ({"forget": "brad", "override": "a cat"}, "2 prompts are not in the data; add the line 'a photo of a cat'"),
        ({"forget": "dog", "override": "dog"}, "1 prompts are not in the data; add the line 'a dog'"),
    ],
)
def test_words_that_cannot_be_forgotten(options, message):
    with pytest.raises(ValueError, match=message):
        by_text(PROMPTS, **options)


# --- memory


def test_it_is_planned(tiny_teacher: Path) -> None:
    given = {"teacher": str(tiny_teacher), "forget": "3", "batch_size": "4", "device": "cpu"}
    plain, doubled = (
        Run(*resolve(SFD.Config, {}, {}, {"method": "sfd", **given, **extra}), Blank(str(tiny_teacher))).turns()
        for extra in ({"forgetting": "0", "forgetting_critic": "0"}, {})
    )
    for player in ("generator", "critic"):
        assert doubled[player].kept == pytest.approx(2 * plain[player].kept, rel=0.15)
