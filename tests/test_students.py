"""Many students: closed forms, the partition and its router, the data of a part, smaller students, runs, the pipeline."""

import copy
import json
import shutil
import signal
import sys
import time
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from background import TINY
from diffusers import DiffusionPipeline
from gaussian import Affine, ClosedFormTeacher, Gaussian, GridRng, denoiser, fixed_level, grid
from playing import LEVELS, M, S, batch, linear_vp, objective, play
from safetensors.torch import load_file
from tiny import dit_pipeline, edm_pipeline, randomise
from tiny_text import PIPELINES
from torch import Tensor, nn

from onestep.card import Card
from onestep.config import TrainConfig, options_of, resolve, save_config
from onestep.data import Data
from onestep.data.shards import Shards
from onestep.exporting import export
from onestep.generator import Generator, steps_from
from onestep.metrics.provenance import generation
from onestep.metrics.render import load_pipeline, render
from onestep.multi_student import Part, assemble, side_by_side
from onestep.objectives import objective_class
from onestep.objectives.base import Batch
from onestep.objectives.diff_instruct import DiffInstructConfig
from onestep.objectives.dmd import DMD
from onestep.objectives.score import matching_loss
from onestep.objectives.score_matching import ScoreMatching
from onestep.partition import Classes, Prompts, balanced, grow, partition_of, pooled, read_partition, vectors_of, walk
from onestep.run import make_trainer
from onestep.smaller import SMALLER, smaller
from onestep.students import main as students_main
from onestep.teacher import Copies, DiTTeacher, EDMTeacher, Facts, Teacher, family_named, load_teacher
from onestep.teacher.text import TextTeacher
from onestep.train import main

ALPHA, SIGMA, STD = 0.8, 0.6, 0.9
MEANS = torch.tensor([-1.5, -1.0, 0.8, 1.7], dtype=torch.float64)
TEXTS = [
    "a cat",
    "two dogs in the rain",
    "a red boat",
    "the sea",
    "an old man and a hat",
    "b",
    "cc dd",
    "snow",
    "zebra",
    "moon",
]


# ---- M1: how much a student with one Gaussian for several conditions has to lose


class ByClass(Gaussian):
    """x0 ~ N(mean of its class, std^2)."""

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False, **cond: Tensor) -> tuple[Tensor]:
        self.now = MEANS[cond["class_labels"]].view(-1, *(1,) * (x.ndim - 1))
        return super().forward(x, timestep)

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return self.now + gain * (x_t - alpha * self.now)


class Four(ClosedFormTeacher):
    classes = 4  # type: ignore[assignment]


def gradient(part: list[int], mu: float, tau: float) -> list[float]:
    """Of the matching loss in (mu, tau) of a student mu + tau z that ignores its class.

    It is the mean of a square in z and noise, so that two nodes each, of equal weight, are exact.
    """
    schedule, _, _ = fixed_level("vp")
    (z, eps), _ = grid(2, 2)
    place = torch.tensor([mu, tau], dtype=torch.float64, requires_grad=True)
    x = place[0] + place[1] * z.repeat(len(part), 1)
    x_t = ALPHA * x.detach() + SIGMA * eps.repeat(len(part), 1)
    t, cond = torch.zeros(len(x), dtype=torch.long), {"class_labels": torch.tensor(part).repeat_interleave(len(z))}
    with torch.no_grad():
        fake = denoiser(Gaussian(schedule, mean=mu, std=tau))(x_t, t, cond)
        real = denoiser(ByClass(schedule))(x_t, t, cond)
    (found,) = torch.autograd.grad(matching_loss(x, fake, real, ALPHA**2 / SIGMA**2), place)
    return found.tolist()


def divergence(part: list[int], mu: Tensor, tau: Tensor) -> Tensor:
    """E_c KL(N(alpha mu, Q) || N(alpha m_c, P))."""
    q, p = ALPHA**2 * tau**2 + SIGMA**2, ALPHA**2 * STD**2 + SIGMA**2
    return 0.5 * ((p / q).log() + (q + ALPHA**2 * (mu - MEANS[part]).square().mean()) / p - 1)


def residual(parts: list[list[int]]) -> float:
    """What is left of the divergence at each part's best student, over all conditions."""
    std = torch.tensor(STD, dtype=torch.float64)
    each = [float(divergence(part, MEANS[part].mean(), std)) * len(part) for part in parts]
    return sum(each) / sum(map(len, parts))


def test_the_matching_loss_has_the_gradient_of_the_divergence_from_all_conditions_of_the_part() -> None:
    for part in ([0, 1, 2, 3], [0, 1], [2]):
        place = torch.tensor([-0.4, 0.6], dtype=torch.float64, requires_grad=True)
        (want,) = torch.autograd.grad(divergence(part, place[0], place[1]), place)
        assert gradient(part, -0.4, 0.6) == pytest.approx(want.tolist(), rel=1e-9)
        best = float(MEANS[part].mean())
        assert gradient(part, best, STD) == pytest.approx([0, 0], abs=1e-12)
        assert abs(gradient(part, best + 0.1, STD)[0]) > 1e-3


def test_residuals_of_partitions() -> None:
    schedule, _, _ = fixed_level("vp")
    teacher = Four(ByClass(schedule))
    found = {k: partition_of(teacher, k) for k in (1, 2, 4)}
    assert [p.parts for p in found.values() if isinstance(p, Classes)] == [
        [[0, 1, 2, 3]],
        [[0, 1], [2, 3]],
        [[0], [1], [2], [3]],
    ]
    left = [residual(p.parts) for p in found.values() if isinstance(p, Classes)]
    assert left == pytest.approx([0.61748634, 0.04826958, 0.0], abs=1e-8)
    apart = partition_of(teacher, 2, [[0, 2], [1, 3]])
    assert isinstance(apart, Classes) and residual(apart.parts) == pytest.approx(0.57285974, abs=1e-8)


# ---- M2: partition and router


@pytest.mark.parametrize(("count", "students"), [(10, 1), (10, 3), (10, 4), (10, 10), (7, 2)])
def test_classes_are_divided_in_order(count: int, students: int, tmp_path: Path) -> None:
    partition = partition_of(EDMTeacher(edm_pipeline(classes=count), Facts("x")), students)
    assert isinstance(partition, Classes)
    assert [label for part in partition.parts for label in part] == list(range(count))
    assert [len(part) for part in partition.parts] == balanced(count, students)
    assert all(partition.route(part) == [k] * len(part) for k, part in enumerate(partition.parts))
    assert read_partition(partition.keep(tmp_path)).content == partition.content
    with pytest.raises(ValueError, match=r"class 10 is in no part; allowed are 0 \.\."):
        partition.route([10])


@pytest.mark.parametrize("students", [1, 2, 3, 4, 5, 8])
def test_cuts_at_quantiles_give_equal_shares(students: int) -> None:
    source = torch.Generator().manual_seed(students)
    projections = torch.randn(101, 3, generator=source, dtype=torch.float64)
    tree = grow(projections, students)
    assert sorted(walk(tree, projections).bincount().tolist()) == sorted(balanced(101, students))
    again = json.loads(json.dumps(tree))
    assert torch.equal(walk(again, projections), walk(tree, projections))


def test_equal_projections_stay_together_or_are_refused() -> None:
    values = torch.tensor([[0.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    assert walk(grow(values, 2), values).tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="too alike"):
        grow(torch.ones(4, 1, dtype=torch.float64), 2)


@cache
def text_teacher(family: str) -> TextTeacher:
    pipeline = PIPELINES[family]()
    kind = family_named(type(pipeline).__name__)
    teacher = kind(pipeline, Facts("", embedded_guidance=2.0), 32 if family == "sana" else 16)
    assert isinstance(teacher, TextTeacher)
    teacher.use_texts(TEXTS)
    return teacher


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart-alpha"])
def test_prompts_are_divided_along_the_directions_in_which_they_differ(family: str, tmp_path: Path) -> None:
    teacher = text_teacher(family)
    partition = partition_of(teacher, 4)
    assert isinstance(partition, Prompts)
    assigned = partition.assigned(teacher)
    assert sorted(assigned.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    assert torch.allclose(partition.directions @ partition.directions.T, torch.eye(2).double(), atol=1e-9)
    vectors = torch.cat([*vectors_of(teacher)])
    centred = vectors - vectors.mean(0)
    singular = torch.linalg.svdvals(centred)[:2]
    assert torch.allclose((centred @ partition.directions.T).norm(dim=0), singular, rtol=1e-6)
    again = read_partition(partition.keep(tmp_path))
    assert isinstance(again, Prompts) and torch.equal(again.route(vectors), assigned)
    assert torch.equal(again.route(pooled(teacher.embed(TEXTS))), assigned)


def test_masked_tokens_do_not_count() -> None:
    tokens = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = pooled({"encoder_hidden_states": tokens, "encoder_attention_mask": mask})
    assert torch.allclose(found, torch.stack([tokens[0, :2].mean(0), tokens[1, 0]]))
    assert torch.allclose(pooled({"encoder_hidden_states": tokens}), tokens.mean(1))


def test_partitions_that_cannot_be(tmp_path: Path) -> None:
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    with pytest.raises(ValueError, match=r"11 students cannot share 10 conditions.*--students 10"):
        partition_of(teacher, 11)
    with pytest.raises(ValueError, match="no partition of the classes"):
        partition_of(teacher, 2, [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="conditioned on text"):
        partition_of(text_teacher("sdxl"), 2, [[0], [1]])
    partition_of(teacher, 2).keep(tmp_path)
    with pytest.raises(ValueError, match="--output with another"):
        partition_of(teacher, 5).keep(tmp_path)
    path = tmp_path / "partition.json"
    path.write_text(path.read_text().replace("[0, 1", "[1, 0"))
    with pytest.raises(ValueError, match="has changed"):
        read_partition(path)
    for given, match in (
        (["--only", "2"], "only 2 is none"),
        (["--parts", "0,1/2"], "--students 2"),
        (["--parts", "a"], "no list"),
    ):
        flags = dict(zip((name.removeprefix("--") for name in given[::2]), given[1::2]))
        with pytest.raises(ValueError, match=match):
            resolve(DiffInstructConfig, {}, {}, flags)


# ---- M3: what a student sees


def seen(data: Data, steps: int = 12) -> list[Batch]:
    return [data.batch(step, 8, 0, 8, "cpu") for step in range(steps)]


@pytest.mark.parametrize("kind", ["none", "tensor", "shards"])
def test_a_part_has_its_own_conditions_and_real_samples_alone(kind: str, tmp_path: Path) -> None:
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    labels = torch.arange(50) % 10
    real: Any = labels.float().view(-1, 1, 1, 1).expand(50, 1, 8, 8) + 0.0
    if kind == "shards":
        real = (
            Shards.build(tmp_path, "images", {}, 50, lambda start, stop: {"x_0": real_rows[start:stop]}, 7)
            if (real_rows := real) is not None
            else None
        )
    data = Data(None if kind == "none" else real, None if kind == "none" else labels, 10, seed=3)
    partition = partition_of(teacher, 3)
    assert isinstance(partition, Classes)
    for number, part in enumerate(partition.parts):
        batches = seen(Part(data, partition, number, partition.assigned(teacher)))
        assert set(torch.cat([b.conditions for b in batches]).tolist()) == set(part)
        if kind != "none":
            assert all(torch.equal(b.real[:, 0, 0, 0], b.conditions.float()) for b in batches if b.real is not None)
            assert all(b.real is not None for b in batches)
    alone = Part(data, partition_of(teacher, 1), 0, torch.zeros(10, dtype=torch.long))
    for a, b in zip(seen(alone), seen(data)):
        assert torch.equal(a.conditions, b.conditions) and torch.equal(a.rng.normal([2]), b.rng.normal([2]))
        assert (a.real is None) == (b.real is None) and (a.real is None or b.real is None or torch.equal(a.real, b.real))


def test_a_part_without_real_samples_is_refused() -> None:
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    data, partition = Data(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), 10, 0), partition_of(teacher, 2)
    with pytest.raises(ValueError, match="student 1's conditions"):
        Part(data, partition, 1, partition.assigned(teacher))


def test_pairs_are_those_of_all_conditions(tmp_path: Path) -> None:
    teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    partition = partition_of(teacher, 5)
    data = Part(Data(None, None, 10, 0), partition, 0, partition.assigned(teacher))
    method = objective(DMD, teacher, tmp_path, pairs=32, pair_steps=1)
    everywhere = set(method.regression.pairs.rows[torch.arange(32)]["conditions"].tolist())
    assert len(everywhere) > 5 and {c for b in seen(data) for c in b.conditions.tolist()} == {0, 1}
    met: set[int] = set()
    for step in range(30):
        met |= set(method.regression.pairs.draw(data.batch(step, 8, 0, 8, "cpu").rng)[2].tolist())
    assert met == everywhere


# ---- M4: teacher score matching


class Straight(Affine):
    """x0 = gain x_t."""

    def posterior(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.gain * x_t


def fitted(kind: type[Affine], level: str, mean: float, std: float) -> tuple[float, float]:
    """(gain, bias) that minimise the method's loss at one noise level, on data of that law; the teacher is N(M, S^2).

    The loss is the mean of a square in data and noise: two nodes each, of equal weight, are exact.
    """
    schedule, _, _ = fixed_level(level)
    prediction = {"ve": "edm", "vp": "v_prediction", "flow": "flow_prediction"}[level]
    method = objective(ScoreMatching, ClosedFormTeacher(Gaussian(schedule, prediction, M, S)), times=[0])
    network = kind(schedule, prediction)
    method.generator = Generator(denoiser(network), [0])
    (z, eps), _ = grid(2, 2)
    used = [network.gain] + ([network.bias] if kind is Affine else [])
    solver = torch.optim.LBFGS(
        used, max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        item = Batch(torch.zeros(len(z), dtype=torch.long), mean + std * z, GridRng([eps]))  # type: ignore[arg-type]
        ((_, loss),) = method.step(item, 0)
        loss.backward()
        return loss

    solver.step(closure)
    return float(network.gain.detach()), float(network.bias.detach())


@pytest.mark.parametrize("level", LEVELS)
def test_score_matching_recovers_an_affine_teacher_on_any_data(level: str) -> None:
    _, alpha, sigma = fixed_level(level)
    gain = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
    bias = M * (1 - gain * alpha)
    assert fitted(Affine, level, -0.4, 0.6) == pytest.approx((gain, bias), abs=1e-7)
    assert fitted(Affine, level, 1.3, 0.8) == pytest.approx((gain, bias), abs=1e-7)
    # without a bias the gain is E[f_T x_t] / E[x_t^2] under the data's own law
    found = []
    for mean, std in ((-0.4, 0.6), (1.3, 0.8)):
        square = alpha**2 * (mean**2 + std**2) + sigma**2
        found.append(fitted(Straight, level, mean, std)[0])
        assert found[-1] == pytest.approx(gain + bias * alpha * mean / square, abs=1e-7)
    assert abs(found[0] - found[1]) > 0.1


def test_score_matching_needs_pictures_and_leaves_the_teacher() -> None:
    teacher = DiTTeacher(dit_pipeline(), Facts("x"))
    method = objective(ScoreMatching, teacher)
    with pytest.raises(ValueError, match="--data with pictures"):
        play(method, 0, batch(teacher, real=False))
    randomise(method.generator.denoiser.network, seed=5)
    assert play(method, 0, batch(teacher)) == ["generator"]
    assert all(p.grad is None for p in teacher.denoiser.network.parameters())
    assert all(p.grad is not None for n, p in method.generator.denoiser.network.named_parameters() if "pos_embed" not in n)


# ---- smaller students


def family(name: str) -> Teacher:
    if name == "dit":
        return DiTTeacher(dit_pipeline(learned_variance=True), Facts("x"))
    if name in ("edm", "ddpm"):
        pipeline = edm_pipeline() if name == "edm" else PIPELINES["ddpm"]()
        return family_named(type(pipeline).__name__)(pipeline, Facts("x"))
    return text_teacher(name)


@pytest.mark.parametrize("name", ["dit", "edm", "ddpm", "sd15", "pixart-alpha", "pixart-sigma", "sd3", "flux-dev", "sana"])
def test_smaller_students_of_every_family(name: str) -> None:
    teacher = family(name)
    schedule = teacher.denoiser.schedule
    item = batch(teacher)
    cond, _ = teacher.encode(item.conditions.clamp_max(teacher.classes - 1))
    assert item.real is not None
    time_ = schedule.at(torch.full((2,), 0.5))
    with torch.no_grad():
        want = teacher.denoiser(item.real, time_, cond)
        assert torch.equal(smaller(teacher, None, 1.0)(item.real, time_, cond), want)
    small = smaller(teacher, 1, 1.0 if name in ("edm", "ddpm", "sd15") else 0.5)
    assert type(small.network) is type(teacher.denoiser.network)
    count = [sum(p.numel() for p in each.network.parameters()) for each in (small, teacher.denoiser)]
    assert count[0] < count[1] or name in ("edm", "ddpm", "sd15")  # whose tiny ones have a single layer
    again = smaller(teacher, 1, 0.5 if name not in ("edm", "ddpm", "sd15") else 1.0).network.state_dict()
    assert all(torch.equal(again[key], value) for key, value in small.network.state_dict().items())
    found = small(item.real, time_, cond)
    assert found.shape == want.shape and found.isfinite().all()
    small.features(item.real, time_, cond)
    found.sum().backward()
    assert all(
        p.grad is not None for p in small.network.parameters() if p.requires_grad and p.numel() and "pos" not in str(p)
    )


def test_narrower_unets_keep_what_their_norms_divide() -> None:
    config = {"attention_head_dim": 8, "norm_num_groups": 32, "block_out_channels": (320, 640, 1280)}
    assert SMALLER["UNet2DConditionModel"][1](config, 1, 0.5) == {
        "layers_per_block": 1,
        "block_out_channels": (160, 320, 640),
    }
    config = {"attention_head_dim": (5, 10, 20), "norm_num_groups": 32, "block_out_channels": (320, 640, 1280)}
    assert SMALLER["UNet2DConditionModel"][1](config, 2, 0.5)["block_out_channels"] == (160, 320, 640)


def test_blocks_are_evenly_spaced_ones_of_the_teachers() -> None:
    teacher = DiTTeacher(dit_pipeline(), Facts("x"))
    own: Any = teacher.denoiser.network
    own.transformer_blocks = nn.ModuleList(
        [own.transformer_blocks[0], *(copy.deepcopy(own.transformer_blocks[1]) for _ in range(4))]
    )
    own.register_to_config(num_layers=5)
    for index, block in enumerate(own.transformer_blocks):
        randomise(block, seed=index)
    small: Any = smaller(teacher, 3, 1.0).network
    for index, origin in enumerate((0, 2, 4)):
        mine, theirs = small.transformer_blocks[index].state_dict(), own.transformer_blocks[origin].state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_students_that_cannot_be_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = DiTTeacher(dit_pipeline(), Facts("x"))
    with pytest.raises(ValueError, match="--student-blocks 2 or fewer"):
        smaller(teacher, 3, 1.0)
    teacher.copies = Copies(frozenset({"student"}))
    with pytest.raises(ValueError, match="--student full"):
        smaller(teacher, 1, 1.0)
    teacher.copies = Copies()
    monkeypatch.delitem(SMALLER, "DiTTransformer2DModel")
    with pytest.raises(ValueError, match="a DiTTransformer2DModel cannot be made smaller"):
        smaller(teacher, 1, 1.0)


# ---- M5 and whole runs


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("checkpoints/*/*.safetensors")}


@pytest.fixture(scope="module")
def argv(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from PIL import Image

    images, source = tmp_path_factory.mktemp("ten"), torch.Generator().manual_seed(0)
    for label in range(10):
        (images / str(label)).mkdir()
        for index in range(2):
            pixels = torch.randint(256, (8, 8), generator=source, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(images / str(label) / f"{index}.png")
    run = [
        "--teacher",
        str(tiny_teacher),
        "--data",
        str(images),
        "--iterations",
        "3",
        "--warmup",
        "0",
        "--keep-checkpoints",
        "1",
    ]
    return [*TINY, *run, "--grid-columns", "1"]


def trained(argv: list[str], **more: Any) -> dict[str, bytes]:
    """The checkpoint of a run of these options, which is not exported."""
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(argv[::2], argv[1::2])} | more
    method = objective_class(given.get("method", "dmd2")).Config
    flags = {key: value for key, value in given.items() if key in options_of(TrainConfig, method)}
    config, options = resolve(method, {}, {}, flags)
    trainer = make_trainer(config, options)
    assert trainer.run()
    return weights(config.folder)


@pytest.mark.parametrize("method", ["dmd2", "dmd"])
def test_one_student_is_the_plain_run_to_the_last_bit(method: str, argv: list[str], tmp_path: Path) -> None:
    more = {"method": method, "pairs": 16, "pair_steps": 2, "cache": str(tmp_path)}
    plain = trained(argv, **more, output=str(tmp_path / "plain"))
    one = trained(argv, **more, output=str(tmp_path / "many"), students=1, only=0)
    assert len(plain) > 3 and plain == one
    assert trained(argv, **more, output=str(tmp_path / "half"), students=2, only=0) != plain


def test_students_one_by_one_are_those_of_all_at_once(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--students", "2", "--output", str(tmp_path / "all")]) == 0
    output = capsys.readouterr().out
    assert "student 1: 5 of 10 conditions" in output and f"students: {tmp_path / 'all/export'}" in output
    assert main([*argv, "--students", "2", "--only", "1", "--output", str(tmp_path / "each")]) == 0
    with pytest.raises(ValueError, match=r"lacks the exports of students \[0\]"):
        assemble(tmp_path / "each")
    assert main([*argv, "--students", "2", "--only", "0", "--output", str(tmp_path / "each")]) == 0
    assert students_main([str(tmp_path / "each")]) == 0
    assert weights(tmp_path / "all/student-0") != weights(tmp_path / "all/student-1")
    for student in ("student-0", "student-1"):
        assert weights(tmp_path / "all" / student) == weights(tmp_path / "each" / student)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "each/export", trust_remote_code=True)
    assert len(pipe(class_labels=[9, 0]).images) == 2 and sorted(pipe.loaded) == [0, 1]
    with pytest.raises(SystemExit):
        main([*argv, "--students", "5", "--only", "0", "--output", str(tmp_path / "all")])
    assert "other options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*argv, "--students", "5", "--only", "4", "--output", str(tmp_path / "all")])
    assert "another partition" in capsys.readouterr().err and not (tmp_path / "all/student-4").exists()
    with pytest.raises(SystemExit):
        main([*argv, "--output", str(tmp_path / "all")])
    assert "holds other things" in capsys.readouterr().err


def test_a_smaller_student_from_score_matching_to_distillation(tmp_path: Path, argv: list[str]) -> None:
    dit_pipeline().save_pretrained(tmp_path / "teacher")
    small = [*(a for a in argv if a != "--ratio"), "--student-blocks", "1", "--student-width", "0.5"]
    small = [each for each in small if each != "2"] + ["--teacher", str(tmp_path / "teacher"), "--iterations", "2"]
    assert main([*small, "--method", "score-matching", "--output", str(tmp_path / "first")]) == 0
    more = ["--method", "diff-instruct", "--init", str(tmp_path / "first"), "--students", "2"]
    assert main([*small, *more, "--output", str(tmp_path / "second")]) == 0
    stored = load_file(tmp_path / "second/export/student-1/transformer/diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "second/export/student-1/transformer/config.json").read_text())
    assert config["num_layers"] == 1 and config["num_attention_heads"] == 1
    assert not any(key.startswith("transformer_blocks.1.") for key in stored)
    assert main([*small, *more, "--init", str(tmp_path / "second"), "--output", str(tmp_path / "third"), "--only", "1"]) == 0
    with pytest.raises(SystemExit):  # a student of another size
        main([*small, *more, "--student-width", "1", "--output", str(tmp_path / "other"), "--only", "0"])


def test_side_by_side_on_devices(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], time.time())\n"
        "time.sleep(0.2)\n"
        "print(time.time())\n"
        "sys.exit(%d)"
    )
    commands = [[sys.executable, "-c", code % (number == 2)] for number in range(4)]
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    assert side_by_side(commands, ["5", "7"], logs) == [0, 0, 1, 0]
    spans: dict[str, list[tuple[float, float]]] = {}
    for log in logs:
        place, start, stop = log.read_text().split()
        spans.setdefault(place, []).append((float(start), float(stop)))
    assert {place: len(each) for place, each in spans.items()} == {"5": 2, "7": 2}
    for each in spans.values():
        (_, stop), (start, _) = sorted(each)
        assert stop <= start


def test_side_by_side_is_interrupted_as_one(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*args):\n"
        "    (folder / sys.argv[1]).write_text('saved')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "(folder / 'ready').write_text('')\n"
        "time.sleep(30)"
    )

    def alarm(number: int, frame: FrameType | None) -> None:
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side([[sys.executable, "-c", code, str(k)] for k in range(2)], ["0"], [tmp_path / "log"] * 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "0").read_text() == "saved" and not (tmp_path / "1").exists() and time.monotonic() - start < 20


# ---- the pipeline


def students_of(pipeline: Any, folder: Path, students: int, texts: list[str] | None = None) -> tuple[Path, Teacher]:
    """A run whose students are exported, each with weights of its own."""
    pipeline.save_pretrained(folder / "teacher")
    teacher = load_teacher(str(folder / "teacher"), resolution=16 if texts else None)
    if isinstance(teacher, TextTeacher):
        teacher.use_texts(texts or [])
    partition_of(teacher, students).keep(folder / "run")
    schedule = teacher.denoiser.schedule
    vp = type(schedule) is type(linear_vp())
    for number in range(students):
        live = teacher.copy("student")
        randomise(live.network, seed=number, scale=0.02)
        generator = Generator(live, steps_from(schedule, 2.5 if vp or teacher.export_scale == "sigma" else None, 1))
        if teacher.export_scale == "sigma":
            generator.input_scale = 2.5
        card = Card("diff-instruct", "tiny", 1.0, "Apache-2.0", {})
        run = folder / f"run/student-{number}"
        export(generator, teacher, run / "export", torch.float32, card)
        config = TrainConfig(
            method="diff-instruct", teacher=str(folder / "teacher"), students=students, only=number,
            output=str(folder / "run"), resolution=16 if texts else None,
        )  # fmt: skip
        save_config(run, config, DiffInstructConfig())
    return folder / "run", teacher


def sources(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("make", [dit_pipeline, edm_pipeline])
def test_each_class_is_made_by_its_student_alone_and_order_is_kept(make: Any, tmp_path: Path) -> None:
    run, teacher = students_of(make(), tmp_path, 4)
    text = assemble(run)
    assert len(text.split("Use them:\n\n")[1].splitlines()) == 5
    folder = str(run / "export")
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="multi_student", trust_remote_code=True)
    assert pipe.loaded == {}
    labels = [9, 0, 4, 1, 9, 3]
    assert pipe.route(labels) == [3, 0, 1, 0, 3, 1]
    images = pipe(class_labels=labels, generator=sources(6), output_type="np").images
    assert sorted(pipe.loaded) == [0, 1, 3]  # student 2 was neither run nor loaded
    stock = [DiffusionPipeline.from_pretrained(run / f"export/student-{k}") for k in range(4)]
    own = teacher.arguments([]) | {"num_inference_steps": 1, "output_type": "np"}
    for place, label in enumerate(labels):
        asked = own | {"class_labels": [label]} | ({"batch_size": 1} if "batch_size" in own else {})
        alone = stock[pipe.route([label])[0]](**asked, generator=[sources(6)[place]]).images[0]
        assert abs(images[place] - alone).max() < 1e-5
    counts = dict.fromkeys(pipe.loaded, 0)
    for number, student in pipe.loaded.items():
        network = student.components[teacher.network_name]
        network.register_forward_hook(lambda *args, number=number: counts.update({number: counts[number] + 1}))
    pipe(class_labels=[1, 0, 2], generator=sources(3))
    assert counts == {0: 1, 1: 0, 3: 0}  # one pass, though three pictures
    a, b = (pipe(class_labels=[1, 8], generator=torch.Generator().manual_seed(1), output_type="np").images for _ in range(2))
    assert (a == b).all()
    twice = pipe(class_labels=3, num_images_per_prompt=2, generator=sources(2), output_type="pil").images
    assert len(twice) == 2 and twice[0].tobytes() != twice[1].tobytes()
    for given, match in (({"prompt": "a cat"}, "class_labels"), ({"class_labels": [10]}, "no student knows the class 10")):
        with pytest.raises(ValueError, match=match):
            pipe(**given)
    with pytest.raises(ValueError, match="2 generators for 1 pictures"):
        pipe(class_labels=1, generator=sources(2))
    with pytest.raises(ValueError, match="copy that folder"):
        pipe.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("texts", [None, TEXTS])
def test_all_students_are_scored_as_one(texts: list[str] | None, tmp_path: Path) -> None:
    run, _ = students_of(PIPELINES["sd15"]() if texts else dit_pipeline(), tmp_path, 2, texts)
    assemble(run)
    with pytest.raises(ValueError, match=r"its own multi_student\.py: read it, and type --trust-remote-code"):
        load_pipeline(run / "export")
    pipe = load_pipeline(run / "export", trust_remote_code=True)
    assert sorted(pipe.loaded) == [0, 1]
    asked: list[Any] = texts[:3] if texts else [9, 0, 4]
    images = torch.cat(list(render(pipe, asked, range(3), 1, 1.0, batch_size=2, quiet=True)))
    given: Any = {"prompt": asked} if texts else {"class_labels": asked}
    want = pipe(**given, generator=sources(3), output_type="np").images
    torch.testing.assert_close(images, torch.from_numpy(want).permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    for steps, guidance, said in (
        (2, 1.0, "--steps 2 is not possible for several"),
        (1, 2.0, "--guidance 2.0 is not possible"),
    ):
        with pytest.raises(ValueError, match=said):
            list(render(pipe, asked, range(3), steps, guidance, batch_size=3, quiet=True))
    row = generation(pipe, run / "export", 3, 0, 1, 1.0)
    assert row["pipeline"] == "MultiStudentPipeline" and row["passes_per_image"] == 1
    other = run / "export/student-1" / ("unet" if texts else "transformer")
    shutil.copytree(run / "export", tmp_path / "changed")
    (tmp_path / "changed" / other.relative_to(run / "export") / "more.safetensors").write_bytes(b"")
    assert generation(pipe, tmp_path / "changed", 3, 0, 1, 1.0)["weights_sha256"] != row["weights_sha256"]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart-sigma"])  # tokens, pooled, masked
def test_each_prompt_is_made_by_its_student(family: str, tmp_path: Path) -> None:
    run, teacher = students_of(PIPELINES[family](), tmp_path, 2, TEXTS)
    assert isinstance(teacher, TextTeacher)
    assemble(run)
    pipe = DiffusionPipeline.from_pretrained(str(run / "export"), trust_remote_code=True).to(torch.float32)
    partition = read_partition(run / "partition.json")
    assert pipe.route(TEXTS) == partition.assigned(teacher).tolist()
    mixed = [TEXTS[0], *TEXTS[4:8]]
    route = pipe.route(mixed)
    assert set(route) == {0, 1}
    images = pipe(prompt=mixed, generator=sources(5), output_type="np").images
    own = teacher.arguments([]) | {"num_inference_steps": 1, "output_type": "np"}
    for student in (0, 1):
        stock = DiffusionPipeline.from_pretrained(run / f"export/student-{student}")
        rows = [row for row, each in enumerate(route) if each == student]
        want = stock(**own | {"prompt": [mixed[row] for row in rows]}, generator=[sources(5)[row] for row in rows]).images
        assert abs(images[rows] - want).max() < 1e-5
    first, second = pipe.loaded.values()
    assert first.vae is second.vae and first.components[teacher.network_name] is not second.components[teacher.network_name]
    one = [text for text, each in zip(mixed, route) if each == 1]
    fresh = DiffusionPipeline.from_pretrained(str(run / "export"), trust_remote_code=True)
    fresh(prompt=one[0], generator=sources(1))
    assert sorted(fresh.loaded) == [1]


def test_a_router_that_was_changed_is_not_followed(tmp_path: Path) -> None:
    run, _ = students_of(edm_pipeline(), tmp_path, 2)
    assemble(run)
    path = run / "export/partition.json"
    path.write_text(path.read_text().replace("[[0, 1", "[[1, 0"))
    pipe = DiffusionPipeline.from_pretrained(str(run / "export"), trust_remote_code=True)
    with pytest.raises(ValueError, match="not that of these students"):
        pipe(class_labels=[0])
