"""AGD: adapters that start as nothing, what they can express, guided trajectories and their cache, one pass a step."""

import ast
import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Calls, ClosedForm, ClosedFormTeacher
from playing import batch, dit, linear_vp, objective, play
from tiny import dit_pipeline, edm_pipeline, randomise
from tiny_text import PIPELINES
from torch import Tensor, nn

from onestep.card import Card
from onestep.data.keys import weights_key
from onestep.data.trajectories import GuidedTrajectories, guided_output, guided_way
from onestep.denoiser import Denoiser, body
from onestep.export import main as reexport
from onestep.generator import Generator
from onestep.guided import KEY, Guided, adapter_for, count, told
from onestep.guided_export import export_guided
from onestep.guided_sampler import GuidedSampler
from onestep.guided_strength import Strength, matched_strength
from onestep.objectives.agd import AGD
from onestep.objectives.dmd2 import DMD2
from onestep.pipelines.adapter_guidance import KINDS, AdapterGuidancePipeline, GuidanceAdapter, mean, zeroed
from onestep.prediction import PREDICTIONS
from onestep.rng import Rng
from onestep.schedule import VP
from onestep.teacher import Copies, DiTTeacher, EDMTeacher, Facts, Teacher, family_named, load_teacher
from onestep.train import main as train
from onestep.trajectory import Grid, gains, jump

ROOT = Path(__file__).parents[1]
FAMILIES = ["dit", "sd15", "sdxl", "pixart-alpha", "pixart-sigma", "sd3", "sana"]
SITES = {"dit": 2, "sd15": 4, "sdxl": 8, "pixart-alpha": 2, "pixart-sigma": 2, "sd3": 3, "sana": 2}
SMALL = {"trajectories": 3, "trajectory_steps": 4, "trajectory_points": 2, "hidden": 8}


def teacher_of(family: str) -> Any:
    if family == "dit":
        return dit()
    pipeline = PIPELINES[family]()
    kind = family_named(type(pipeline).__name__)
    teacher: Any = kind(pipeline, Facts(""), (32 if family == "sana" else 16) if kind.any_resolution else None)
    teacher.use_texts(["a cat", "two dogs in the rain", "a red boat"])
    return teacher


def student_of(teacher: Teacher, kind: str = "offset", seed: int | None = 3) -> GuidedSampler:
    """AGD's student; a `seed` gives its adapters random weights."""
    made = AGD.student(AGD.Config(adapter=kind, hidden=8), teacher, 3)
    assert isinstance(made, GuidedSampler)
    if seed is not None:
        randomise(made.denoiser.network, seed, 0.2)
    return made


def inputs(teacher: Teacher, size: int = 3) -> tuple[Tensor, Tensor, Any, Any]:
    x = torch.randn(size, *teacher.shape, generator=torch.Generator().manual_seed(5))
    t = teacher.denoiser.schedule.at(torch.linspace(0.2, 0.9, size))
    return (x, t if t.dtype == torch.long else t.float(), *teacher.encode(torch.arange(size) % 3))


# --- adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_the_base_and_then_depend_on_guidance(family: str, kind: str) -> None:
    """Bit for bit; trained ones change every sample by its own guidance, and leave nothing on the base."""
    teacher = teacher_of(family)
    x, t, cond, _ = inputs(teacher)
    w = torch.tensor([1.5, 3.0, 6.0])
    plain = teacher.denoiser.output(x, t, cond)
    fresh = student_of(teacher, kind, seed=None).denoiser
    assert torch.equal(fresh.output(x, t, cond | {KEY: w}), plain)
    made = student_of(teacher, kind)
    trained = made.denoiser
    layers = trained.network.adapter.config.layers
    assert (
        len(layers) == SITES[family] if kind != "low-rank" else {"to_q", "to_v"} < {path.split(".")[-1] for path in layers}
    )
    before = trained.output(x, t, cond | {KEY: w})
    after = trained.output(x, t, cond | {KEY: w + torch.tensor([0.0, 1.0, 0.0])})
    moved = (before - after).flatten(1).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, True, False] and not torch.equal(before, plain)
    assert torch.equal(trained.output(x, t, cond), plain) and torch.equal(teacher.denoiser.output(x, t, cond), plain)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in teacher.denoiser.network.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_1_is_the_plain_conditional(kind: str) -> None:
    """Adapters, trained ones too, are times w - 1: bit for bit nothing at 1."""
    teacher = teacher_of("dit")
    x, t, cond, _ = inputs(teacher)
    denoiser: Any = student_of(teacher, kind).denoiser
    assert torch.equal(denoiser.output(x, t, cond | {KEY: torch.ones(3)}), teacher.denoiser.output(x, t, cond))
    gain = denoiser.network.adapter.gain(torch.tensor([1.0, 3.5, 6.0]))
    torch.testing.assert_close(gain, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_adapters_also_move_what_embeds_the_time(family: str) -> None:
    """In a DiT that of every block; they alone change the output, and leave nothing on the base."""
    teacher = teacher_of(family)
    x, t, cond, _ = inputs(teacher)
    plain = teacher.denoiser.output(x, t, cond)
    for number in range(2 if family == "dit" else 1):
        denoiser: Any = student_of(teacher, "mlp").denoiser
        adapter = denoiser.network.adapter
        assert len(adapter.offsets) == len(adapter.config.embedders) == (2 if family == "dit" else 1)
        for each in (*adapter.blocks, *adapter.offsets[:number], *adapter.offsets[number + 1 :]):
            zeroed(each.last)
        with torch.no_grad():
            moved = denoiser.output(x, t, cond | {KEY: torch.full((3,), 3.0)})
        assert float((moved - plain).flatten(1).abs().amax(1).min()) > 1e-5
    assert torch.equal(teacher.denoiser.output(x, t, cond), plain)


def test_only_adapters_are_trained_and_copies_share_the_base() -> None:
    teacher = dit()
    made = student_of(teacher)
    network = made.denoiser.network
    assert isinstance(network, Guided) and network.base is teacher.denoiser.network
    assert all(name.startswith("adapter.") for name in network.state_dict())
    twin = copy.deepcopy(network)
    assert twin.base is network.base and twin.adapter is not network.adapter
    assert all(torch.equal(a, b) and a is not b for a, b in zip(twin.parameters(), network.parameters()))
    x, t, cond, _ = inputs(teacher)
    made.denoiser.output(x, t, cond | {KEY: torch.full((3,), 2.0)}).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_about_two_percent_of_the_parameters(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher("fashion")
    network = teacher.denoiser.network
    adapter = adapter_for(network, kind, 0, 0.02, "DiTPipeline", (1.0, 6.0))
    assert 0.017 < count(adapter) / count(network) < 0.023
    AGD.student(AGD.Config(adapter=kind), teacher, 2)
    assert f"{count(adapter):,} parameters" in capsys.readouterr().out


def test_padding_of_a_prompt_is_not_seen() -> None:
    tokens = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    got = mean(tokens, mask)
    torch.testing.assert_close(got, torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))
    for kind in KINDS:
        teacher = teacher_of("pixart-sigma")
        student = student_of(teacher, kind).denoiser
        cond = inputs(teacher)[2]
        adapter, text, seen = student.network.adapter, cond["encoder_hidden_states"], cond["encoder_attention_mask"]
        hidden, flags = torch.randn(3, 5, adapter.config.widths[0][0]), nn.functional.pad(seen.bool(), (2, 0), value=True)
        other = torch.where(seen.bool()[..., None], text, text + 1.0)
        time = torch.randn(3, adapter.config.time_width)
        results = [adapter.blocks[0](hidden, adapter.tokens(torch.ones(1), time, each), flags) for each in (text, other)]
        torch.testing.assert_close(*results)
        assert not torch.allclose(adapter.blocks[0](hidden, adapter.tokens(torch.ones(1), time, other), None), results[0])


# --- Gaussians

MU = {0: 0.8, 3: -0.3}  # of the class, and of the null class, which is 3


class Classes(ClosedForm):
    """N(mean, std^2) by class; `block` is where adapters go, on one token of width 1."""

    def __init__(self, stds: dict[int, float]):
        super().__init__(linear_vp(), "epsilon")
        self.stds = stds
        self.block, self.clock = Block(), Clock()
        self.unit = nn.Parameter(torch.ones((), dtype=torch.float64))  # networks compute in their weights' precision

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        own = (self.label == 0).double()[:, None]
        mu, std = (own * each[0] + (1 - own) * each[3] for each in (MU, self.stds))
        return mu + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mu)

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.label = cond["class_labels"]
        self.clock(timestep)
        (eps,) = super().forward(x, timestep)
        return (self.block(x[:, None], eps[:, None])[:, 0],)


class Block(nn.Module):
    def forward(self, hidden_states: Tensor, result: Tensor) -> Tensor:
        return result


class Clock(nn.Module):
    def forward(self, timestep: Tensor) -> Tensor:
        self.now = timestep
        u = timestep.double()[:, None] / 1000
        return torch.cat([u, (3 * u).sin()], dim=1)


def closed(stds: tuple[float, float]) -> ClosedFormTeacher:
    return ClosedFormTeacher(Classes({0: stds[0], 3: stds[1]}))


def fitted(kind: str, stds: tuple[float, float], t: list[int], w: list[float]) -> tuple[float, float, float]:
    """(loss at first, loss when fitted, floor of an offset) over pairs of times and guidance; x_t is N(0, 1)'s quantiles."""
    teacher = closed(stds)
    base = teacher.denoiser.network
    torch.manual_seed(0)
    adapter = GuidanceAdapter(kind, 8, ["block"], [(1, 1)], ["clock"], 2).double()
    student = Denoiser(Guided(base, adapter), base.schedule, PREDICTIONS["epsilon"], told(teacher.call))
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(24, dtype=torch.float64) + 0.5) / 24)
    rows = torch.cartesian_prod(quantiles, torch.tensor(t).double(), torch.tensor(w).double())
    x, times, guidance = rows[:, :1], rows[:, 1].long(), rows[:, 2]
    cond, uncond = teacher.encode(torch.zeros(len(rows), dtype=torch.long))
    assert uncond is not None
    target = guided_output(teacher.denoiser, x, times, cond, uncond, guidance)
    optimizer = torch.optim.LBFGS(adapter.parameters(), max_iter=150, line_search_fn="strong_wolfe", tolerance_change=1e-14)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (student.output(x, times, cond | {KEY: guidance}) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    alpha, sigma = (c[:, None] for c in base.schedule.coefficients(times))
    slope = sigma / (alpha**2 * stds[0] ** 2 + sigma**2) - sigma / (alpha**2 * stds[1] ** 2 + sigma**2)
    floor = ((guidance[:, None] - 1) * slope).square().mean() * quantiles.var(correction=0)
    return losses[0], min(losses), float(floor)


def test_guidance_of_equal_variances_is_an_offset() -> None:
    """o_w - o_c = -(w - 1) (sigma alpha / v) (mu_c - mu_u) in eps, whatever x is."""
    teacher = closed((0.6, 0.6))
    x, t = torch.tensor([[-1.0], [0.4], [2.0]], dtype=torch.float64), torch.tensor([150, 400, 800])
    cond, uncond = teacher.encode(torch.zeros(3, dtype=torch.long))
    assert uncond is not None
    w = torch.tensor([1.0, 2.5, 5.0], dtype=torch.float64)
    got = guided_output(teacher.denoiser, x, t, cond, uncond, w) - teacher.denoiser.output(x, t, cond)
    alpha, sigma = (c[:, None] for c in linear_vp().coefficients(t))
    expected = -(w[:, None] - 1) * sigma * alpha / (alpha**2 * 0.36 + sigma**2) * (MU[0] - MU[3])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert float(got[0].abs()) < 1e-12  # w = 1 is the conditional output


def test_offsets_are_exact_for_equal_variances() -> None:
    first, last, floor = fitted("offset", (0.6, 0.6), [150, 400, 800], [2.0, 5.0])
    assert first > 0.1 and last < 1e-6 * first and floor == 0


def test_offsets_have_a_floor_for_unequal_variances_and_others_have_not() -> None:
    """The floor is (w - 1)^2 (sigma / v_c - sigma / v_u)^2 Var(x_t)."""
    case: Any = ((0.4, 1.1), [400], [3.0])
    first, last, floor = fitted("offset", *case)
    assert first > 1.1 * floor > 0.01 and last == pytest.approx(floor, rel=1e-6)
    for kind in ("attention", "mlp", "low-rank"):
        _, last, floor = fitted(kind, *case)
        assert last < 0.02 * floor


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_gains_are_how_far_an_error_of_the_output_moves_the_next_point(kind: str) -> None:
    """d x_(n-1) / d eps = sigma' - alpha' sigma / alpha; of v times alpha, of x0 times -alpha / sigma."""
    grid, prediction = Grid(linear_vp(), 5), PREDICTIONS[kind]
    got = gains(grid, prediction)
    alpha, sigma = grid.alpha, grid.sigma
    eps = (sigma[:-1] - alpha[:-1] * sigma[1:] / alpha[1:]).abs()
    turned = {"epsilon": 1.0, "v_prediction": alpha[1:], "sample": alpha[1:] / sigma[1:]}[kind]
    torch.testing.assert_close(got, torch.cat([torch.zeros(1), eps * turned]).double(), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_guided_trajectories_have_the_moments_of_the_guided_gaussian(w: float) -> None:
    """Mean alpha_t mu_w and variance v_t by DDIM in 100 steps; the noised class itself has alpha_t mu_c."""
    teacher = closed((0.6, 0.6))
    half = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.cat([half, -half]) / half.square().mean().sqrt()
    cond, uncond = teacher.encode(torch.zeros(len(z), dtype=torch.long))
    assert uncond is not None
    grid, mu = Grid(linear_vp(), 100), MU[3] + w * (MU[0] - MU[3])
    far = 0.0
    guidance = torch.full((len(z),), w, dtype=torch.float64)
    for level, x_t, _ in guided_way(teacher.denoiser, grid, z, cond, uncond, guidance):
        alpha, sigma = (float(c[0]) for c in grid.levels(level, x_t))
        assert float(x_t.mean()) == pytest.approx(alpha * mu, abs=0.02)
        assert float(x_t.var()) == pytest.approx(alpha**2 * 0.36 + sigma**2, abs=0.02)
        far = max(far, abs(float(x_t.mean()) - alpha * MU[0]))
    assert (far > 1.0) == (w > 1)


class PartOfTheOffset(nn.Module):
    """`part` of the exact guidance between Gaussians of equal variances, whatever x_t is."""

    def __init__(self, base: Classes, part: float | Tensor):
        super().__init__()
        self.base, self.part = base, part

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        alpha, sigma = (c[:, None, None] for c in linear_vp().coefficients(self.base.clock.now))
        own = (self.base.label == 0).double()[:, None, None]  # others are the null class's
        return -2.5 * own * self.part * sigma * alpha / (alpha**2 * 0.36 + sigma**2) * (MU[0] - MU[3])  # 2.5: half the range


@pytest.mark.parametrize(("to", "passes"), [("distance", 5), ("samples", 4)])
@pytest.mark.parametrize(("part", "expected"), [(0.8, 1.25), (1.25, 0.8), (0.3, 2.0)])
def test_strength_is_how_much_less_adapters_guide_than_two_passes(
    part: float, expected: float, to: str, passes: int
) -> None:
    """DDIM moves a sample in proportion to an offset here, so that 1 / part is exact; never beyond 2."""
    teacher = closed((0.6, 0.6))
    base = teacher.denoiser.network
    adapter = GuidanceAdapter("offset", 8, ["block"], [(1, 1)], ["clock"], 2, strength=1.5).double()
    adapter.blocks[0] = PartOfTheOffset(base, part)
    denoiser = Denoiser(Guided(base, adapter), base.schedule, PREDICTIONS["epsilon"], told(teacher.call))
    calls = Calls(base)
    found = matched_strength(GuidedSampler(denoiser, 10, 3.0), teacher, 70, to)
    assert found == pytest.approx((expected, 0), rel=1e-5, abs=1e-5) and adapter.config.strength == 1.5
    assert calls.finished == 10 * 70 * passes


@pytest.mark.parametrize(("to", "expected"), [("distance", 1.0), ("samples", 0.8)])
def test_adapters_that_err_are_as_far_at_1_and_the_closest_below(to: str, expected: float) -> None:
    """They guide every other sample by 1/2 and by 3/2: k E p = 1, and E p (k p - 1) = 0 at k = E p / E p^2 = 1 / 1.25."""
    teacher = closed((0.6, 0.6))
    base = teacher.denoiser.network
    adapter = GuidanceAdapter("offset", 8, ["block"], [(1, 1)], ["clock"], 2).double()
    adapter.blocks[0] = PartOfTheOffset(base, 0.5 + torch.arange(64)[:, None, None] % 2)
    denoiser = Denoiser(Guided(base, adapter), base.schedule, PREDICTIONS["epsilon"], told(teacher.call))
    assert matched_strength(GuidedSampler(denoiser, 10, 3.0), teacher, 256, to) == pytest.approx((expected, 0), abs=0.03)


@pytest.mark.parametrize("to", ["distance", "samples"])
@pytest.mark.parametrize(("middle", "tilt"), [(1.25, -0.15), (0.9, 0.2)])
def test_strength_follows_guidance(middle: float, tilt: float, to: str) -> None:
    """Adapters that are too weak by a factor linear in w; and the line within the range, its ends beyond it."""
    teacher = closed((0.6, 0.6))
    base = teacher.denoiser.network
    adapter = GuidanceAdapter("offset", 8, ["block"], [(1, 1)], ["clock"], 2).double()
    adapter.blocks[0] = PartOfTheOffset(base, 1.0)
    adapter.gain = lambda w: GuidanceAdapter.gain(adapter, w) / (middle + tilt * (w - 3.5) / 2.5)  # type: ignore[method-assign]
    denoiser = Denoiser(Guided(base, adapter), base.schedule, PREDICTIONS["epsilon"], told(teacher.call))
    found = matched_strength(GuidedSampler(denoiser, 10, 3.0), teacher, 200, to)
    assert found == pytest.approx((middle, tilt), abs=0.02)
    adapter.register_to_config(**found._asdict())
    w = torch.tensor([1.0, 3.5, 6.0, 11.0])
    wanted = torch.tensor([-1.0, 0.0, 1.0, 1.0]) * found.tilt + found.strength
    torch.testing.assert_close(GuidanceAdapter.gain(adapter, w), wanted * (w - 1) / 2.5)


@pytest.mark.parametrize("to", ["distance", "samples"])
def test_strength_is_1_where_guidance_moves_nothing(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as with a teacher that has not learnt its conditions."""
    monkeypatch.setitem(MU, 0, MU[3])
    teacher = closed((0.6, 0.6))
    adapter = GuidanceAdapter("offset", 8, ["block"], [(1, 1)], ["clock"], 2).double()
    denoiser = teacher.guided_by(adapter)
    assert matched_strength(GuidedSampler(denoiser, 3, 3.0), teacher, 4, to) == (1.0, 0.0) == Strength()


# --- trajectories


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher, GuidedTrajectories]:
    """Five trajectories of six steps, all of them kept."""
    folder, teacher = tmp_path_factory.mktemp("trajectories"), DiTTeacher(dit_pipeline("sample"), Facts("x"))
    return folder, teacher, GuidedTrajectories(folder, teacher, 5, 6, 6, 1.0, 6.0, batch=2)


def test_a_step_from_a_point_leads_to_the_next(whole: tuple[Path, Teacher, GuidedTrajectories]) -> None:
    """To the precision of fp16; with the output of the point before or after it does not."""
    _, teacher, cache = whole
    denoiser, grid = teacher.denoiser, cache.grid
    for number in range(5):
        index = torch.arange(5) * 6 + number
        here, after = cache[index], cache[index + 1]
        now = torch.full((5,), 6 - number)
        levels = grid.levels(now, here.x_t), grid.levels(now - 1, here.x_t)

        def stepped(output: Tensor, here: Any = here, levels: Any = levels) -> Tensor:
            return jump(here.x_t, denoiser.prediction.to_x0(output, here.x_t, *levels[0]), *levels)

        size = after.x_t.abs().max()
        assert torch.equal(here.t, grid.times[now])
        assert float((stepped(here.output) - after.x_t).abs().max() / size) < 3e-3
        assert float((stepped(after.output) - after.x_t).abs().max() / size) > 3e-3
        cond, uncond = teacher.encode(here.conditions)
        assert uncond is not None
        with torch.no_grad():
            own = guided_output(denoiser, here.x_t, here.t, cond, uncond, here.guidance)
        torch.testing.assert_close(own, here.output, atol=2e-3, rtol=2e-3)


def test_every_trajectory_has_one_guidance_and_one_condition(whole: tuple[Path, Teacher, GuidedTrajectories]) -> None:
    point = whole[2][torch.arange(30)]
    for each in (point.guidance, point.conditions):
        assert torch.equal(each, each[::6].repeat_interleave(6))
    assert len(point.guidance.unique()) == 5 and 1 <= float(point.guidance.min()) < float(point.guidance.max()) <= 6
    drawn = whole[2].draw(Rng(1, 0, 64))
    assert len(drawn.guidance.unique()) == 5 and len(drawn.t.unique()) == 6


def test_kept_steps_are_those_of_the_whole(
    whole: tuple[Path, Teacher, GuidedTrajectories], capsys: pytest.CaptureFixture[str]
) -> None:
    """Trajectory j keeps every third step from j mod 3 on; its size is printed before, and it is made once."""
    folder, teacher, cache = whole
    calls = Calls(teacher.denoiser.network)
    part = GuidedTrajectories(folder, teacher, 5, 6, 2, 1.0, 6.0)
    assert (calls.passes, calls.finished) == (6, 6 * 2 * 5)
    index = torch.tensor([6 * j + j % 3 + 3 * k for j in range(5) for k in range(2)])
    for mine, theirs in zip(part[torch.arange(10)], cache[index]):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
    said = capsys.readouterr().out
    assert "5 guided trajectories" in said and "MB in" in said and part.row_bytes() == 2 * 2 * 4 * 8 * 8 + 20
    GuidedTrajectories(folder, teacher, 5, 6, 2, 1.0, 6.0)
    assert calls.passes == 6 and not capsys.readouterr().out


# --- the objective


def test_number_of_network_passes(tmp_path: Path) -> None:
    """One pass of the student a step; trajectories made in the step take two passes of the teacher for each of theirs."""
    teacher = dit()
    method = objective(AGD, teacher, tmp_path, **SMALL)
    calls = Calls(teacher.denoiser.network)
    for step in range(3):
        assert play(method, step, batch(teacher, step, 2, real=False)) == ["generator"]
    assert (calls.passes, calls.finished) == (3, 3 * 2)
    method = objective(AGD, teacher, tmp_path, **SMALL | {"trajectories": 0})
    calls = Calls(teacher.denoiser.network)
    play(method, 0, batch(teacher, 0, 2, real=False))
    assert (calls.passes, calls.finished) == (4 + 1, 4 * 2 * 2 + 2)
    assert not AGD.uses_real(method.config)


def test_errors_weigh_by_their_gains(tmp_path: Path) -> None:
    """By hand on one batch; over all levels the mean weight is 1, as without."""
    teacher, losses = dit(), {}
    for weight in ("output", "step"):
        method = objective(AGD, teacher, tmp_path, weight=weight, **SMALL)
        ((_, loss),) = list(method.step(batch(teacher, 0, 8, real=False), 0))
        losses[weight] = float(loss.detach())
    point = method.cache.draw(batch(teacher, 0, 8, real=False).rng)
    with torch.no_grad():
        plain = teacher.denoiser.output(point.x_t, point.t, teacher.encode(point.conditions)[0])
    error = (plain - point.output).square().flatten(1).mean(1)
    squares = gains(method.grid, teacher.denoiser.prediction)[1:].square()
    by_hand = (squares[point.level - 1] / squares.mean() * error).mean()
    assert losses["output"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert losses["step"] == pytest.approx(float(by_hand), rel=1e-5) and len(set(losses.values())) == 2


def test_points_made_in_the_step_are_points_of_trajectories() -> None:
    teacher = dit()
    method = objective(AGD, teacher, **SMALL | {"trajectories": 0})
    item = batch(teacher, 0, 6, real=False)
    point = method.on_the_way(item)
    rng = Rng(11, 0, 6)
    z, w, stop = rng.normal(teacher.shape), rng.uniform(1.0, 6.0), rng.integers(4) + 1
    cond, uncond = teacher.encode(item.conditions)
    assert uncond is not None and torch.equal(point.guidance, w) and torch.equal(point.t, method.grid.times[stop])
    assert torch.equal(point.level, stop)
    for level, x_t, output in guided_way(teacher.denoiser, method.grid, z, cond, uncond, w):
        here = level == stop
        assert torch.equal(point.x_t[here], x_t[here]) and torch.equal(point.output[here], output[here])
    assert not point.output.requires_grad


def test_the_loss_falls_and_is_the_mean_square_of_raw_outputs(tmp_path: Path) -> None:
    teacher = DiTTeacher(dit_pipeline("sample"), Facts("x"))
    method = objective(AGD, teacher, tmp_path, **SMALL)
    item = batch(teacher, 0, 8, real=False)
    point = method.cache.draw(batch(teacher, 0, 8, real=False).rng)
    ((_, loss),) = list(method.step(item, 0))
    with torch.no_grad():
        plain = teacher.denoiser.output(point.x_t, point.t, teacher.encode(point.conditions)[0])
    torch.testing.assert_close(loss, (plain - point.output).square().mean())  # adapters start as nothing
    optimizer = torch.optim.Adam(method.generator.denoiser.parameters(), 1e-2)
    losses = []
    for step in range(60):
        for _, each in method.step(batch(teacher, step, 16, real=False), step):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
            losses.append(float(each.detach()))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@pytest.mark.parametrize(
    "make, options, said",
    [
        (lambda: EDMTeacher(edm_pipeline(), Facts("x")), {}, "needs an unconditional branch"),
        (lambda: teacher_of("flux-dev"), {}, "no guidance adapters are known for a FluxTransformer2DModel; allowed are DiT"),
        (dit, {"guidance_min": 3.0, "guidance_max": 2.0}, "guidance_max 2.0 is not above guidance_min 3.0; type .*-max 8"),
        (dit, {"trajectory_steps": 6, "trajectory_points": 4}, "--trajectory-points with one of 1, 2, 3, 6"),
    ],
)
def test_what_cannot_be_is_said(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AGD.student(AGD.Config(**options), make(), 2)


@pytest.mark.parametrize(
    "make", [*(partial(teacher_of, each) for each in FAMILIES), lambda: EDMTeacher(edm_pipeline(), Facts("x"))]
)
def test_teachers_say_whether_they_can_be_guided(make: Any) -> None:
    teacher = make()
    assert teacher.unconditional == (teacher.encode(torch.zeros(1, dtype=torch.long))[1] is not None)


def test_a_run_with_prompts_and_its_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    import agd as script

    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    PIPELINES["sd15"]().save_pretrained(tmp_path / "sd")
    small = ["--trajectories", "2", "--trajectory-steps", "2", "--trajectory-points", "2", "--batch-size", "2"]
    given = [
        "--method",
        "agd",
        "--teacher",
        str(tmp_path / "sd"),
        "--data",
        str(tmp_path / "prompts.txt"),
        "--device",
        "cpu",
    ]
    run = [*given, *small, "--iterations", "2", "--warmup", "1", "--student-steps", "2", "--guidance", "2"]
    assert train([*run, "--output", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]) == 0
    kept = tmp_path / "run/strength.json"
    strength = json.loads(kept.read_text())["strength"]
    about = tmp_path / "run/export/guidance_adapter/config.json"
    assert 0.5 <= strength <= 2 and json.loads(about.read_text())["strength"] == strength != 1
    shutil.rmtree(tmp_path / "run/export")
    assert reexport([str(tmp_path / "run")]) == 0 and json.loads(about.read_text())["strength"] == strength
    for tilt, more in ((-0.5, {"tilt": -0.5}), (0.0, dict[str, float]())):  # runs of before had none
        shutil.rmtree(tmp_path / "run/export")
        kept.write_text(json.dumps({"strength": 1.25, "samples": 32, **more}))
        assert reexport([str(tmp_path / "run")]) == 0
        assert [json.loads(about.read_text())[name] for name in ("strength", "tilt")] == [1.25, tilt]
    argv = [str(tmp_path / "run" / "export"), "--output", str(tmp_path / "rows.jsonl")]
    assert script.main([*argv, "--protocol", "fashion-10k"]) == 2
    assert "fashion-10k is not for a StableDiffusionPipeline" in capsys.readouterr().err


def test_recomputed_activations_are_refused() -> None:
    teacher = dit()
    teacher.copies = Copies(checkpointing=True)
    with pytest.raises(ValueError, match="leave --gradient-checkpointing out"):
        AGD.student(AGD.Config(), teacher, 2)


# --- sampling, exporting, teaching


def card(guidance: float = 2.5) -> Card:
    return Card("agd", "tiny", guidance, "Apache-2.0", {"method": "agd"}, command="train")


def exported(teacher: Teacher, folder: Path, kind: str = "offset", scale: float = 2.5) -> GuidedSampler:
    student = student_of(teacher, kind)
    student.guidance = scale
    export_guided(student, teacher, folder, torch.float32, card(scale))
    return student


def loaded(folder: Path, code: Path | None = None) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(code or "adapter_guidance"), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher, GuidedSampler]:
    folder, teacher = tmp_path_factory.mktemp("export") / "agd", dit()
    return folder, teacher, exported(teacher, folder)


def test_the_pipeline_is_the_sampler_at_one_pass_a_step(export: tuple[Path, Teacher, GuidedSampler]) -> None:
    from diffusers import DDIMScheduler, DiTPipeline

    folder, teacher, student = export
    pipe = loaded(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    calls, sources = Calls(pipe.transformer), [torch.Generator().manual_seed(seed) for seed in range(3)]
    given: Any = {"class_labels": [0, 1, 2], "num_inference_steps": 3, "output_type": "pt"}
    images = pipe(**given, guidance_scale=2.5, generator=sources).images
    assert (calls.passes, calls.started) == (3, 3 * 3) and type(pipe).__name__ == "AdapterGuidancePipeline"
    z = torch.cat([torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    with torch.no_grad():
        wanted = teacher.to_images(student(z, teacher.encode(torch.arange(3))[0]))
    torch.testing.assert_close(torch.as_tensor(images), wanted, atol=3e-4, rtol=0)

    def by(pipe: Any, **more: Any) -> Tensor:
        return torch.as_tensor(pipe(**given, generator=torch.Generator().manual_seed(0), **more).images)

    stock = DiTPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = pipe.scheduler
    assert torch.equal(by(pipe, guidance_scale=1.0), by(stock, guidance_scale=1.0))
    assert not torch.allclose(by(pipe, guidance_scale=2.5), by(stock, guidance_scale=1.0), atol=1e-3)
    assert not torch.allclose(by(pipe, guidance_scale=2.5), by(pipe, guidance_scale=5.0), atol=1e-3)


@pytest.mark.parametrize("family, kind", [*zip(FAMILIES[1:], [*KINDS, *KINDS])])
def test_every_family_is_exported_and_compared(family: str, kind: str, tmp_path: Path) -> None:
    teacher = teacher_of(family)
    exported(teacher, tmp_path / "agd", kind)
    assert sorted(path.name for path in (tmp_path / "agd" / "guidance_adapter").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert f"stock {type(teacher.pipeline).__name__} loads" in (tmp_path / "agd/README.md").read_text()


def test_an_export_that_is_not_the_student_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(dit())
    save = GuidanceAdapter.save_pretrained

    def spoilt(self: Any, folder: Path) -> None:
        other = copy.deepcopy(self)
        randomise(other, 9)
        save(other, folder)

    monkeypatch.setattr(GuidanceAdapter, "save_pretrained", spoilt)
    with pytest.raises(RuntimeError, match="was not stored as it is"):
        export_guided(student, dit(), tmp_path / "agd", torch.float32, card())
    assert not list(tmp_path.iterdir())


def test_adapters_go_with_another_checkpoint_of_the_base(
    export: tuple[Path, Teacher, GuidedSampler], tmp_path: Path
) -> None:
    folder, _, student = export
    other = dit_pipeline()
    randomise(other.transformer, 8)
    other.save_pretrained(tmp_path / "other")
    pipe = loaded(tmp_path / "other", ROOT / "pipelines/adapter_guidance.py")
    with pytest.raises(ValueError, match=r"has no guidance adapters .* call load_adapter"):
        pipe(class_labels=[0], num_inference_steps=1)
    pipe.load_adapter(folder)
    mine: Any = {"class_labels": [0], "num_inference_steps": 2, "output_type": "pt"}
    made = [pipe(**mine, guidance_scale=w, generator=torch.Generator().manual_seed(0)).images for w in (1, 4)]
    assert abs(made[0] - made[1]).max() > 1e-3
    assert all(torch.equal(x, y) for x, y in zip(pipe.adapter.parameters(), student.denoiser.network.parameters()))
    with pytest.raises(ValueError, match="negative prompt needs a second pass"):
        pipe(class_labels=[0], negative_prompt="blur")
    PIPELINES["sd15"]().save_pretrained(tmp_path / "sd15")
    with pytest.raises(ValueError, match="these adapters do not fit a UNet2DConditionModel"):
        loaded(tmp_path / "sd15", ROOT / "pipelines/adapter_guidance.py").load_adapter(folder)


def test_the_pipeline_is_one_file_of_torch_and_diffusers() -> None:
    text = (ROOT / "pipelines/adapter_guidance.py").read_text()
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            names.add(node.module.split(".")[0])
    assert names == {"torch", "diffusers", "inspect", "os", "collections", "contextlib", "typing"}
    assert AdapterGuidancePipeline._optional_components


def test_an_export_teaches_other_methods_in_one_pass(export: tuple[Path, Teacher, GuidedSampler]) -> None:
    """Its guided x0 is the student's, guidance 1 the base's; copies of it are copies of the base."""
    folder, base, student = export
    teacher = load_teacher(str(folder))
    x, t, cond, uncond = inputs(teacher)
    calls = Calls(body(teacher.denoiser.network))
    with torch.no_grad():
        found = teacher(x, t, cond, uncond, 3.0)
        assert (calls.passes, calls.finished) == (1, 3)
        torch.testing.assert_close(found, student.denoiser(x, t, cond | {KEY: torch.full((3,), 3.0)}))
        torch.testing.assert_close(teacher(x, t, cond, uncond, 1.0), base(x, t, cond, uncond, 1.0))
        torch.testing.assert_close(teacher.copy()(x, t, cond), base.denoiser(x, t, cond))
    assert weights_key(teacher.denoiser.network) != weights_key(base.denoiser.network)
    other = load_teacher(str(folder))
    randomise(body(other.denoiser.network), 4)  # another base with the same adapters
    assert weights_key(teacher.denoiser.network) != weights_key(other.denoiser.network)
    for copies in (Copies(), Copies(frozenset({"student", "critic"}), rank=2)):
        teacher.copies = copies
        method = objective(DMD2, teacher, guidance=3.0, gan=0.0, gan_critic=0.0)
        assert isinstance(method.generator, Generator)
        assert play(method, 0, batch(teacher, 0, 2)) == ["generator", "critic"]


def test_the_sampler_is_ddim_with_the_guidance_of_the_teacher(export: tuple[Path, Teacher, GuidedSampler]) -> None:
    """On exact adapters it would be the two-pass sample: here the adapters are the teacher's own."""
    folder, _, student = export
    teacher = load_teacher(str(folder))
    z = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(2))
    cond, uncond = teacher.encode(torch.tensor([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(student(z, cond), teacher.sample(z, cond, uncond, 2.5, 3), atol=1e-4, rtol=1e-4)
    assert student.draws == 1 and isinstance(student.around(student.denoiser), GuidedSampler)
    assert isinstance(teacher.denoiser.schedule, VP) and isinstance(teacher, DiTTeacher)
