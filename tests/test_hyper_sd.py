"""Hyper-SD against closed forms: fixed points of segmented consistency, indices, the GAN, updates; the one-step stage."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import playing
import pytest
import torch
from gaussian import Calls, ClosedForm, ClosedFormTeacher, Gaussian, GridRng, denoiser, grid
from playing import batch, clear, dit, has_gradient, linear_vp, play, zeros
from tiny import edm_pipeline, randomise
from torch import Tensor, nn

from onestep.config import resolve
from onestep.denoiser import Denoiser, call_network
from onestep.generator import Generator
from onestep.lora import Adapter
from onestep.methods.hyper_sd import stages_of
from onestep.objectives import hyper_sd
from onestep.objectives.base import Batch
from onestep.objectives.hyper_sd import HyperSD, end_of
from onestep.objectives.hyper_sd_score import HyperSDScore
from onestep.objectives.segments import SegmentGAN, edge_below, renoised
from onestep.rng import Rng
from onestep.schedule import EDM, RectifiedFlow, Schedule
from onestep.second_time import KEY, layers
from onestep.teacher import Copies, EDMTeacher, Facts
from onestep.trajectory import Grid, jump

STD, TOP = 0.7, 0.95  # data N(0, STD^2); the last time of the trajectories


class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in (0, 1]."""

    init_sigma = 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (math.pi / 2 * t.double()).cos(), (math.pi / 2 * t.double()).sin()

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def at(self, u: Tensor) -> Tensor:
        return u

    def fraction(self, t: float) -> float:
        return t

    def at_rho(self, rho: float) -> float:
        return math.atan(rho) * 2 / math.pi

    def log_range(self) -> tuple[float, float]:
        raise NotImplementedError

    def time_at(self, q: Tensor) -> Tensor:
        return q.atan() * 2 / math.pi


class Table(ClosedForm):
    """x0 = slope[n, e] x_t / alpha_t at the level n of a grid, with e the level of the end that it is told, or 0."""

    def __init__(self, size: int, kind: str = "sample"):
        super().__init__(Cosine(), kind)
        self.size = size
        self.slope = nn.Parameter(torch.zeros(size + 1, size + 1, dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.level = (timestep / TOP * self.size).round().long()
        second = cond.get(KEY, torch.zeros_like(timestep))
        self.end_level = (second.double() / TOP * self.size).round().long()
        return super().forward(x, timestep, return_dict)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.slope[self.level, self.end_level][:, None] * x_t / alpha


class Leading(ClosedForm):
    """A teacher whose DDIM step from a level to the one below is the exact one of the probability-flow ODE."""

    def __init__(self, size: int):
        super().__init__(Cosine(), "epsilon")
        self.size, self.std = size, nn.Parameter(torch.tensor(STD, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        t = torch.atan2(sigma, alpha) * 2 / math.pi
        here, there = sigma / alpha, (math.pi / 2 * (t - TOP / self.size)).tan().clamp_min(0)
        c = ((STD**2 + there**2) / (STD**2 + here**2)).sqrt()
        return (c - there / here) / (1 - there / here) * x_t / alpha


class Chosen:
    """Draws that are given: a level and an end for each row; every normal draw is 1."""

    def __init__(self, level: Tensor, end: Tensor, count: int, size: int):
        self.level, width = level, size // count
        edge = edge_below(level, width)
        self.share = (end - edge + 0.5) / (level - edge)

    def integers(self, high: int) -> Tensor:
        return self.level - 1

    def uniform(self) -> Tensor:
        return self.share

    def normal(self, shape: Any) -> Tensor:
        return torch.ones(len(self.level), *shape, dtype=torch.float64)


def table_objective(teacher: ClosedForm, size: int, end: str, segments: str = "1", **options: Any) -> Any:
    """The method with a Table as its student, which is told where jumps end by its argument `second_time`."""
    given = {"levels": size, "segments": segments, "segment_end": "hidden", "segment_gan": "0", "target_ema": 0.0}
    method = playing.objective(HyperSD, ClosedFormTeacher(teacher), times=[TOP], **given | options)
    method.end, method.segments.shown = end, end == "network"
    student = denoiser(Table(size))
    method.generator.denoiser = method.target = student
    return method


def loss_at(method: Any, level: int, stage: int = 0) -> Tensor:
    """The loss on one sample for each end that a jump from `level` may have."""
    count = method.stages[stage][0]
    size = method.grid.size
    edge = int(edge_below(torch.tensor(level), size // count))
    end = torch.arange(edge, edge + 1 if method.end == "edge" else level)
    n = torch.full_like(end, level)
    x = torch.full((len(end), 1), 0.8, dtype=torch.float64)
    ((_, loss),) = method.stage(Batch(zeros(len(end)), x, Chosen(n, end, count, size)), stage)  # type: ignore[arg-type]
    return loss


def solve(method: Any, stage: int = 0) -> Tensor:
    """Backward induction: each level's least squares, whose gradient is a line in each slope; returns the slopes."""
    slope = method.generator.denoiser.network.slope
    for level in range(1, method.grid.size + 1):
        gradients = []
        for value in (0.0, 1.0):
            slope.data[level] = value
            (gradient,) = torch.autograd.grad(loss_at(method, level, stage), slope)
            gradients.append(gradient[level])
        slope.data[level] = torch.where(gradients[0] == gradients[1], 0, gradients[0] / (gradients[0] - gradients[1]))
    return slope.detach()


def variances(size: int) -> tuple[Tensor, Tensor]:
    """(q, STD^2 + q^2) of the levels 0 .. size."""
    q = (math.pi / 2 * torch.linspace(0, TOP, size + 1, dtype=torch.float64)).tan()
    return q, STD**2 + q**2


EXACT = 0.0550078
"""STD / sqrt(STD^2 + q^2) at TOP."""


@pytest.mark.parametrize("end", ["edge", "network", "hidden"])
def test_the_fixed_point_of_one_segment(end):
    """Hidden ends under-disperse: one-step samples of std .480 in place of .700, which being told, or edges, restores."""
    method = table_objective(Leading(20), 20, end)
    slope, (_, v) = solve(method), variances(20)
    std = float(slope[20, 0] * v[20].sqrt())
    if end == "hidden":
        assert float(slope[20, 0]) == pytest.approx(0.03775, abs=5e-6) and std == pytest.approx(0.480, abs=5e-4)
        assert max(float(loss_at(method, level).detach()) for level in range(1, 21)) > 1e-4  # and the loss has a floor
    else:
        assert float(slope[20, 0]) == pytest.approx(EXACT, abs=5e-8) and std == pytest.approx(0.700, abs=1e-6)
        assert max(float(loss_at(method, level).detach()) for level in range(1, 21)) < 1e-25


def test_a_told_student_has_the_exact_slope_for_every_end():
    """x0's slope is [sqrt(V_e / V_t) - q_e / q_t] / (1 - q_e / q_t), from the ODE's map at e = 0 to the denoiser's."""
    slope, (q, v) = solve(table_objective(Leading(12), 12, "network")), variances(12)
    for n in range(1, 13):
        for e in range(n):
            share = float(q[e] / q[n])
            assert float(slope[n, e]) == pytest.approx((math.sqrt(v[e] / v[n]) - share) / (1 - share), abs=1e-9)


@pytest.mark.parametrize("end", ["edge", "network"])
@pytest.mark.parametrize("count", [8, 4, 2, 1])
def test_segments_compose_to_the_whole_map(end, count):
    """With k jumps from edge to edge, for every k, the noise ends where the ODE leads it."""
    method = table_objective(Leading(16), 16, end, segments="8,4,2,1")
    solve(method, [k for k, _ in method.stages].index(count))
    x, width = torch.ones(1, 1, dtype=torch.float64), 16 // count
    for level in range(16, 0, -width):
        here, there = torch.tensor([level]), torch.tensor([level - width])
        x = method.segments.landed(method.generator.denoiser, x, here, there, {})
    assert float(x.detach()) == pytest.approx(EXACT / math.cos(math.pi / 2 * TOP), abs=1e-6)


@pytest.mark.parametrize("size, product", [(10, 0.04867), (50, 0.05368)])
@pytest.mark.parametrize("end", ["edge", "network"])
def test_one_segment_with_the_teachers_own_steps_is_consistency_distillation(end, size, product):
    """The slope is that of its DDIM steps one after the other."""
    method = table_objective(Gaussian(Cosine(), mean=0.0, std=STD), size, end)
    q, v = variances(size)
    share = q[:-1] / q[1:]
    known = float((share + (1 - share) * STD**2 / v[1:]).prod())
    slope = float(solve(method)[size, 0])
    assert known == pytest.approx(product, abs=5e-6) and slope == pytest.approx(known, abs=1e-10)


@pytest.mark.parametrize("segment_end", ["edge", "hidden", "network"])
def test_one_level_a_segment_is_the_teacher(segment_end):
    """A student that is the teacher has no loss and no gradient, and any other has."""
    teacher = dit()
    given = {"levels": 10, "segments": "10,1", "segment_gan": "0", "segment_end": segment_end}
    method = playing.objective(HyperSD, teacher, times=[999], **given)
    for moved in (False, True):
        if moved:
            randomise(method.generator.denoiser.network, seed=9)
        ((player, loss),) = method.stage(batch(teacher, size=6), 0)
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in method.generator.parameters() if p.grad is not None)
        assert player == "generator" and (float(loss.detach()) > 1e-6) == moved
        assert (largest > 1e-4) == moved


def test_one_segment_at_edges_is_the_loss_of_consistency_distillation():
    """mean (f(x_n) - sg f(x_{n-1}))^2, x_{n-1} a DDIM step of the guided teacher below, the boundary condition included."""
    teacher = dit()
    given = {"levels": 20, "segments": "1", "segment_gan": "0", "segment_end": "edge"}
    method = playing.objective(HyperSD, teacher, guidance=1.5, times=[999], **given)
    randomise(method.target.network, seed=9)
    item = batch(teacher, size=30)
    ((_, loss),) = method.step(item, 0)
    rng, grid = Rng(11, 0, 30), Grid(teacher.denoiser.schedule, 20)
    level = rng.integers(20) + 1
    assert 1 in level.tolist()  # whose target is x at level 0
    x_t = grid.noised(item.real, rng.normal(teacher.shape), level)
    cond, uncond = teacher.encode(item.conditions)
    with torch.no_grad():
        x_0 = teacher(x_t, grid.time(level), cond, uncond, 1.5)
        x_s = jump(x_t, x_0, grid.levels(level, x_t), grid.levels(level - 1, x_t))
        target = grid.consistency(method.target, x_s, level - 1, cond)
        ours = grid.consistency(method.generator.denoiser, x_t, level, cond)
        torch.testing.assert_close(loss.detach(), (ours - target).square().mean())


# --- indices


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_indices(count):
    """t_b <= t_end <= t_{n-1} < t_n; an edge belongs to the lower segment; every level and end is drawn."""
    level, width = torch.arange(1, 17), 16 // count
    edge = edge_below(level, width)
    assert edge.tolist() == [width * math.ceil(n / width) - width for n in range(1, 17)]
    assert all(int(edge_below(torch.tensor(n), width)) == n - width for n in range(width, 17, width))
    method = table_objective(Leading(16), 16, "hidden", segments=f"{count},1")
    n, e, ceiling = method.segments.draw(Rng(0, 0, 20000), count, False)
    assert bool(((edge_below(n, width) <= e) & (e < n) & (n <= ceiling)).all())
    assert torch.equal(ceiling, edge_below(n, width) + width)
    seen = torch.zeros(17, 17).index_put_((n, e), torch.ones(20000), accumulate=True)
    for a in range(1, 17):
        ends = range(int(edge[a - 1]), a)
        assert float(seen[a].sum()) == pytest.approx(1250, abs=150)
        assert all(float(seen[a, b]) == pytest.approx(1250 / len(ends), rel=0.6) for b in ends)
    n, e, _ = method.segments.draw(Rng(0, 0, 200), count, True)
    assert torch.equal(e, edge_below(n, width))


def test_stages_and_their_steps():
    stages = [(8, 0.001), (4, 0.001), (2, 0.1), (1, 0.1)]
    assert stages_of(HyperSD.Config()) == stages
    assert stages_of(HyperSD.Config(segments="4,1", segment_gan="0.5")) == [(4, 0.5), (1, 0.5)]
    teacher = dit()
    method = playing.objective(HyperSD, teacher, times=[999], segment_steps=3)
    assert method.settled == 9
    seen: list[int] = []
    method.stage = lambda batch, index: iter((seen.append(index), [])[1])
    for step in range(14):
        list(method.step(batch(teacher), step))
    assert seen == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segments": "8,4"}, r"the last is 1: type --segments 8,4,1"),
        ({"levels": 42}, r"levels 42 are no multiple of 8 segments; type for example --levels 40"),
        ({"segments": "8,four,1"}, r"segments is '8,four,1'; allowed are integers from 1 on.*--segments 8,4,2,1"),
        ({"segments": "0,1"}, "allowed are integers from 1 on"),
        ({"segment_gan": "-1"}, r"allowed are finite numbers from 0 on.*type for example --segment-gan"),
        ({"segment_gan": "inf"}, "finite numbers"),
        ({"segment_gan": "1,2"}, r"2 weights for 4 stages; allowed is one for all, or one for each.*--segment-gan 1"),
    ],
)
@pytest.mark.parametrize("kind", [HyperSD, HyperSDScore])
def test_wrong_segments_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        playing.objective(kind, dit(), times=[999], **options)


# --- the end as an input


@pytest.mark.parametrize("kind", [HyperSD, HyperSDScore])
def test_whom_the_end_is_told(kind):
    """Full students of `auto` and `network`; adapters of neither, and `network` is refused for them."""
    told = {"auto": True, "network": True, "edge": False, "hidden": False}
    for choice, shown in told.items():
        method = playing.objective(kind, dit(), times=[999], segment_end=choice)
        assert bool(layers(method.generator.denoiser.network)) == method.segments.shown == shown
    teacher = dit()
    teacher.copies = Copies(frozenset({"student"}), rank=2)
    method = playing.objective(kind, teacher, times=[999])
    assert isinstance(method.generator.denoiser.network, Adapter) and not method.segments.shown
    assert end_of(method.config, method.generator) == "edge"
    with pytest.raises(ValueError, match=r"an adapter cannot be told .* type --segment-end edge, or --student full"):
        playing.objective(kind, teacher, times=[999], segment_end="network")


def test_the_student_is_told_the_fraction_of_the_schedule_where_a_jump_ends():
    schedule = RectifiedFlow(shift=3.0)
    grid = Grid(schedule, 8)
    segments = hyper_sd.Segments(grid, True)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append(cond[KEY])
        return x

    segments.landed(network, torch.ones(3, 1), torch.tensor([8, 8, 3]), torch.tensor([0, 4, 2]), {})  # type: ignore[arg-type]
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 0.5, 0.25]).to(seen[0]))


def test_the_one_step_sample_is_the_jump_to_clean_data():
    """What is exported, a call without a second time, is the jump from the last level to level 0."""
    method = playing.objective(HyperSD, dit(), times=[999])
    for layer in layers(method.generator.denoiser.network):
        nn.init.normal_(layer.second_weight, generator=torch.Generator().manual_seed(0))
    z, cond = torch.randn(2, *method.teacher.shape), method.teacher.encode(torch.arange(2))[0]
    top, ends = torch.tensor([40, 40]), torch.tensor([0, 20])
    landed = [method.segments.landed(method.generator.denoiser, z, top, end.expand(2), cond) for end in ends]
    torch.testing.assert_close(method.generator(z, cond), landed[0])
    assert float((landed[0] - landed[1]).detach().abs().max()) > 1e-2


# --- the GAN


@pytest.mark.parametrize("schedule", [EDM(), linear_vp(), RectifiedFlow()])
def test_renoising_gives_the_law_of_the_higher_level(schedule):
    """Mean alpha_t x0 and variance sigma_t^2, from every level below, clean data included."""
    grid, x_0 = Grid(schedule, 8), torch.full((2, 1), 1.7, dtype=torch.float64)
    for end, above in [(0, 1), (0, 8), (3, 4), (3, 8), (7, 8)]:
        here, there = (grid.levels(torch.tensor([n, n]), x_0) for n in (end, above))
        x, z = (torch.tensor([[a], [b]], dtype=torch.float64) for a, b in ((1, 0), (0, 1)))
        mean = renoised(here[0] * x_0, here, there, 0 * z)
        spread = renoised(here[1] * x, here, there, z)  # of eps in the first row, of the new noise in the second
        torch.testing.assert_close(mean, there[0] * x_0)
        torch.testing.assert_close(spread.square().sum(), there[1][0, 0] ** 2)


class First(nn.Module):
    """The first feature itself as the logit."""

    def forward(self, features: Any) -> Tensor:
        return features[0]


def test_both_are_judged_at_the_same_level_within_the_segment():
    """Hinge losses of the noised samples, whose level is uniform over what is above the end."""
    grid, judge = Grid(EDM(), 8), denoiser(Gaussian(EDM()))
    gan = SegmentGAN(grid, judge, First())  # type: ignore[arg-type]
    seen: list[Tensor] = []
    features = judge.features
    judge.features = lambda x, t, cond: (seen.append(t), features(x, t, cond))[1]  # type: ignore[method-assign]
    end, ceiling = torch.full((4000,), 3), torch.full((4000,), 6)
    x, target = torch.zeros(4000, 1, dtype=torch.float64), torch.full((4000, 1), 0.4, dtype=torch.float64)
    told = gan.tell(x, target, end, ceiling, {}, Rng(0, 0, 4000, dtype=torch.float64))
    assert torch.equal(seen[0], seen[1])
    counts = [int((seen[0] == grid.times[n]).sum()) for n in range(9)]
    assert counts[:4] == [0] * 4 and counts[7:] == [0, 0] and all(abs(each - 4000 / 3) < 150 for each in counts[4:7])

    rng = Rng(0, 0, 4000, dtype=torch.float64)
    above = end + 1 + (rng.uniform() * 3).long()
    here, there = grid.levels(end, x), grid.levels(above, x)
    root = (there[1] ** 2 + 0.25).sqrt() if judge.prediction.name == "edm" else 1.0
    d = [renoised(each, here, there, rng.normal((1,))) / root for each in (x, target)]
    torch.testing.assert_close(told, (1 + d[0]).relu().mean() + (1 - d[1]).relu().mean())
    fool = gan.fool(x, end, ceiling, {}, Rng(0, 0, 4000, dtype=torch.float64))
    torch.testing.assert_close(fool, -d[0].mean())


# --- updates


def test_updates_of_a_stage():
    """Generator, then heads where the stage's GAN has a weight; the target follows the generator alone."""
    teacher = dit()
    method = playing.objective(HyperSD, teacher, times=[999], segment_gan="0,0,0.01,0", target_ema=0.5, segment_steps=1)
    assert [play(method, step, batch(teacher)) for step in range(5)] == [
        ["generator"],
        ["generator"],
        ["generator", "critic"],
        ["generator"],
        ["generator"],
    ]
    assert list(method.players()) == ["generator", "critic"] and method.kept() == [method.target.network]
    before = [p.clone() for p in method.target.network.parameters()]
    randomise(method.generator.denoiser.network, seed=9)
    method.updated("critic")
    assert all(torch.equal(a, b) for a, b in zip(before, method.target.network.parameters()))
    method.updated("generator")
    pairs = zip(method.target.network.parameters(), before, method.generator.denoiser.network.parameters())
    assert all(torch.allclose(p, (a + b) / 2) for p, a, b in pairs)
    assert method.state() == {"target": method.target.network}

    alone = playing.objective(HyperSD, teacher, times=[999], segment_gan="0", target_ema=0.0)
    assert list(alone.players()) == ["generator"] and alone.gan is None and alone.state() == {} and not alone.kept()
    assert alone.target is alone.generator.denoiser


@pytest.mark.parametrize("make, guidance", [(dit, 1.5), (lambda: EDMTeacher(edm_pipeline(), Facts("x")), 1.0)])
def test_number_of_network_passes(make, guidance):
    """Student 1 with gradient, target 1, teacher 1 (guided: 2) and, for the GAN, 3 short ones of it."""
    teacher, size = make(), 2
    method = playing.objective(HyperSD, teacher, guidance=guidance, times=teacher.denoiser.schedule.grid(1), blocks=1)
    networks = (method.generator.denoiser.network, method.target.network, teacher.denoiser.network)
    student, target, real = (Calls(network) for network in networks)
    for step in range(3):
        assert play(method, step, batch(teacher, step, size)) == ["generator", "critic"]
    assert (student.passes, target.passes) == (3, 3) and student.finished == target.finished == 3 * size
    assert real.finished == 3 * size * (2 if guidance > 1 else 1)
    assert real.stopped == 3 * 3 * size and real.passes == 12


def turns_apart(method: Any) -> dict[str, tuple[bool, bool]]:
    """Whose parameters (student's, heads') have a gradient after each player's backward; others' never."""
    found = {}
    for player, loss in method.step(batch(method.teacher), 0):
        loss.backward()
        found[player] = (any(has_gradient(method.generator)), any(has_gradient(method.gan.head)))
        clear(method.generator, method.gan.head)
    assert not any(has_gradient(method.teacher.denoiser)) and not any(has_gradient(method.target))
    return found


def test_no_gradient_leaks(monkeypatch):
    method = playing.objective(HyperSD, dit(), times=[999])
    assert turns_apart(method) == {"generator": (True, False), "critic": (False, True)}
    assert all(p.requires_grad for p in method.gan.head.parameters())
    monkeypatch.setattr(hyper_sd, "frozen", lambda *modules: contextlib.nullcontext())  # the test can fail
    assert turns_apart(playing.objective(HyperSD, dit(), times=[999]))["generator"] == (True, True)


def test_the_student_itself_as_target_gets_no_gradient_through_it():
    """The passes come in the order that gradient checkpointing needs: the one with gradient is the student's last."""
    method = playing.objective(HyperSD, dit(), times=[999], target_ema=0.0, segment_gan="0")
    graphs: list[bool] = []
    method.generator.denoiser.network.register_forward_hook(lambda m, a, out: graphs.append(out[0].requires_grad))
    play(method, 0, batch(method.teacher))
    assert graphs == [False, True]


def test_without_real_images_the_run_says_what_to_type():
    method = playing.objective(HyperSD, dit(), times=[999])
    assert HyperSD.uses_real(method.config) and not HyperSDScore.uses_real(HyperSDScore.Config())
    assert HyperSDScore.uses_real(HyperSDScore.Config(mix=2))
    with pytest.raises(ValueError, match="type --data FOLDER"):
        play(method, 0, batch(method.teacher, real=False))


def test_defaults():
    train, options = resolve(HyperSD.Config, {"init_rho": 2.5, "beta1": 0.0}, {}, {})
    assert train.init_rho is None and (train.beta1, train.clip_norm) == (0.0, 1.0)
    assert (options.levels, options.segments, options.segment_end) == (40, "8,4,2,1", "auto")
    train, _ = resolve(HyperSDScore.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and train.beta1 == 0.0


# --- the one-step stage


class Line(ClosedForm):
    """x0 = mean + std x_t: a generator whose samples are N(mean, std^2) where alpha_t is next to 0."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule, "sample")
        self.mean = nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.mean + self.std * x_t


def line_objective(**options: Any) -> Any:
    """The stage on a Gaussian teacher, an exact critic and a Line for its student."""
    schedule = linear_vp()
    given = {"segment_end": "edge", "anchor": 0.0, "t_min": 0.5, "t_max": 0.5}
    method = playing.objective(HyperSDScore, ClosedFormTeacher(Gaussian(schedule)), times=[999], **given | options)
    method.generator.denoiser = denoiser(Line(schedule))
    method.fake = denoiser(Gaussian(schedule, mean=-0.4, std=0.6))
    return method


def matching_gradient(method: Any) -> tuple[float, float]:
    """The expectation of d loss / d (mean, std) without DMD's normaliser, at one noise level, by quadrature."""
    (z, eps), weights = grid(40, 2)
    cond, uncond = method.teacher.encode(zeros(len(z)))
    x = (-0.4 + 0.6 * z).requires_grad_()
    item = Batch(zeros(len(z)), None, GridRng([eps], level=0.5))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(method.generator_loss(x, item, cond, uncond), x)
    each = gradient * len(z) * weights
    return float(each.sum()), float((each * z).sum())


def test_the_gradient_of_distribution_matching(monkeypatch):
    """sigma alpha times that of KL per unit noise: sigma^2 / alpha (s_fake - s_real) alpha, in closed form; 0 if matched."""
    monkeypatch.setattr("onestep.objectives.score.per_sample_weight", lambda x, real: torch.ones_like(x))
    method = line_objective()
    alpha, sigma = (float(c) for c in method.schedule.coefficients(torch.tensor(499)))
    m, s, mu, tau = 0.7, 0.9, -0.4, 0.6
    v, v_g = alpha**2 * s**2 + sigma**2, alpha**2 * tau**2 + sigma**2
    by_mean, by_std = matching_gradient(method)
    assert by_mean == pytest.approx(sigma**2 * alpha * (mu - m) / v, rel=1e-9)
    assert by_std == pytest.approx(sigma**2 * alpha * tau * (1 / v - 1 / v_g), rel=1e-9)
    method.fake = method.teacher.denoiser
    assert matching_gradient(method) == pytest.approx((0, 0), abs=1e-15)


def test_matching_moves_the_student_to_the_teacher():
    """With a critic that is exact at every step, from N(-.4, .6^2) to N(.7, .9^2)."""
    method = line_objective(t_min=0.02, t_max=0.98)
    line, fake = method.generator.denoiser.network, method.fake.network
    for step in range(250):
        fake.mean.data, fake.std.data = line.mean.data.clone(), line.std.data.abs().clone()
        line.zero_grad()
        item = Batch(zeros(256), None, Rng(0, step, 256, dtype=torch.float64))
        (loss,) = (loss for player, loss in method.step(item, step) if player == "generator")
        loss.backward()
        for parameter in line.parameters():
            parameter.data -= 0.1 * parameter.grad
    assert line.mean.item() == pytest.approx(0.7, abs=0.05) and line.std.item() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_anchor_is_the_student_of_the_start_in_jumps(steps):
    """mean (G(z) - y)^2, y made of z by jumps between evenly spread levels; it stays when the student moves."""
    teacher = dit()
    method = playing.objective(HyperSDScore, teacher, times=[999], matching=0.0, anchor=0.5, anchor_steps=steps)
    student = method.generator.denoiser
    item = batch(teacher, real=False)
    if steps == 1:
        ((player, loss),) = method.step(item, 0)
        assert player == "generator" and float(loss.detach()) == 0  # it starts there
    for network in (student.network, method.anchor.network):
        randomise(network, seed=9)
    expected = Denoiser(method.anchor.network, student.schedule, student.prediction, student.call)
    randomise(student.network, seed=10)
    item = batch(teacher, real=False)
    (loss,) = (loss for _, loss in method.step(item, 0))
    rng = Rng(11, 0, 2)
    rng.normal(teacher.shape)
    y = z = rng.normal(teacher.shape)
    cond, grid = teacher.encode(item.conditions)[0], Grid(student.schedule, 40)
    for i in range(steps, 0, -1):
        here, there = (torch.full((2,), 40 * j // steps) for j in (i, i - 1))
        told = cond | {KEY: there / 40}
        y = jump(y, expected(y, grid.time(here), told), grid.levels(here, y), grid.levels(there, y))
    x = student(z, torch.full((2,), 999), cond)
    torch.testing.assert_close(loss, 0.5 * (x - y).square().mean(), rtol=1e-4, atol=0)
    loss.backward()
    assert any(has_gradient(method.generator)) and not any(has_gradient(method.anchor))
    assert method.anchor in method.kept()


def test_more_jumps_of_the_anchor_need_the_end():
    with pytest.raises(ValueError, match=r"anchor_steps 2 asks .* type --anchor-steps 1, or --segment-end network"):
        playing.objective(HyperSDScore, dit(), times=[999], anchor_steps=2, segment_end="edge")


def test_the_order_of_the_one_step_stage_and_its_mixed_steps():
    """Every `mix`-th step is one of TSCD, in all its stages by turns; the others are distribution matching."""
    teacher = dit()
    method = playing.objective(HyperSDScore, teacher, times=[999], mix=2, levels=8, segments="2,1", segment_gan="0.1")
    seen: list[int] = []
    stage = method.tscd.stage
    method.tscd.stage = lambda batch, index: (seen.append(index), stage(batch, index))[1]
    orders = [play(method, step, batch(teacher, step)) for step in range(8)]
    assert orders == [["generator", "critic"]] * 8 and seen == [0, 1, 0, 1]
    assert {"matching", "denoising", "anchor", "consistency", "gan", "gan_critic"} <= set(method.log)
    assert method.players()["critic"] == [method.fake, method.tscd.gan.head]
    assert method.state() == {"target": method.tscd.target.network}
    before = [p.clone() for p in method.tscd.target.network.parameters()]
    randomise(method.generator.denoiser.network, seed=9)
    method.updated("generator")
    assert not all(torch.equal(a, b) for a, b in zip(before, method.tscd.target.network.parameters()))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_passes_of_the_one_step_stage(guidance):
    """Student 2 with gradient, critic 1 and 1 with gradient, teacher 1 (guided: 2), the anchor as many as its jumps."""
    teacher = dit()
    method = playing.objective(HyperSDScore, teacher, guidance=guidance, times=[999], anchor_steps=2, ratio=2)
    networks = (method.generator.denoiser.network, method.fake.network, teacher.denoiser.network, method.anchor.network)
    calls = [Calls(network) for network in networks]
    assert play(method, 0, batch(teacher)) == ["generator", "critic"]
    assert [each.finished for each in calls] == [4, 4, 4 if guidance > 1 else 2, 4]
    assert play(method, 1, batch(teacher)) == ["critic"]
    assert [each.finished for each in calls] == [6, 6, 4 if guidance > 1 else 2, 4]


def players_with_gradient(method: Any) -> Iterator[tuple[str, bool, bool]]:
    for player, loss in method.step(batch(method.teacher), 0):
        clear(method.generator, method.fake)
        loss.backward()
        yield player, any(has_gradient(method.generator)), any(has_gradient(method.fake))


def test_no_gradient_leaks_in_the_one_step_stage():
    method = playing.objective(HyperSDScore, dit(), times=[999])
    assert list(players_with_gradient(method)) == [("generator", True, False), ("critic", False, True)]
    assert not any(has_gradient(method.anchor)) and not any(has_gradient(method.teacher.denoiser))


def test_a_chain_is_a_generator_too():
    """Times of a few-step student are levels of the grid, and its calls have no second time."""
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    times = [80.0, 60.0, 40.0, 20.0]
    method = playing.objective(HyperSD, teacher, times=times, levels=16)
    assert set(times) <= set(method.grid.times.tolist())
    z, cond = torch.randn(2, *teacher.shape), teacher.encode(torch.arange(2))[0]
    assert isinstance(method.generator, Generator)
    assert method.generator(z, cond, [torch.randn_like(z) for _ in times[1:]]).shape == z.shape
    assert method.generator.denoiser.call is not call_network
