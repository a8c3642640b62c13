"""Health of a run: its numbers in closed form, collapse with its reason, the best checkpoint; training stays as it is."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY
from gaussian import ClosedFormTeacher, Gaussian, denoiser
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from onestep.best import Best, kept_in, read_best
from onestep.checkpoint import latest_checkpoint
from onestep.config import TrainConfig
from onestep.generator import Generator
from onestep.health import Health, balance, diversity, drift, due, saturation
from onestep.metrics import evaluate
from onestep.panel import Panel, health_samples
from onestep.run import export_run, make_trainer
from onestep.schedule import EDM
from onestep.train import main
from onestep.trainer import Trainer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the numbers


def test_diversity_is_the_mean_distance_within_a_condition() -> None:
    """Corners of a square of side 3 and the ends of a line: (4 * 3 + 2 * 3 sqrt 2) / 6, and 2; conditions do not mix."""
    square = torch.tensor([[0.0, 0], [3, 0], [0, 3], [3, 3]])
    assert diversity(square, 4) == pytest.approx((12 + 6 * math.sqrt(2)) / 6, rel=1e-12)
    assert diversity(torch.cat([torch.zeros(1, 2), torch.full((1, 2), 2.0), square[:2] + 1000]), 2) == pytest.approx(
        (math.sqrt(8) + 3) / 2, rel=1e-12
    )
    assert diversity(normal(1, 3, 4, 4).expand(6, -1, -1, -1), 3) == 0


def test_diversity_of_gaussians_is_their_expected_distance() -> None:
    """E |x - y| for x, y ~ N(m, s^2 I) in two dimensions is s sqrt(pi)."""
    x = normal(4000, 2)
    assert diversity(7 + 0.3 * x, 4000) == pytest.approx(0.3 * math.sqrt(math.pi), rel=0.02)


def test_drift_of_an_affine_map_is_known() -> None:
    """x = s_c ref + b_c of two channels: mean_drift is rms(m + b - m_ref) / std, std_drift rms ln s, std_ratio the mean."""
    ref = normal(5, 2, 3, 3)
    ref = (ref - ref.mean((0, 2, 3), keepdim=True)) / ref.std((0, 2, 3), correction=0, keepdim=True)
    ref = ref * torch.tensor([1.0, 4.0]).view(1, 2, 1, 1) + 3
    scale, shift = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1), torch.tensor([0.25, 8.0]).view(1, 2, 1, 1)
    found = drift((ref - 3) * scale + 3 + shift, ref)
    assert found["mean_drift"] == pytest.approx(math.sqrt((0.25**2 + 2**2) / 2), rel=1e-12)
    assert found["std_ratio"] == pytest.approx(1.0, rel=1e-12)  # halved and doubled
    assert found["std_drift"] == pytest.approx(math.log(2), rel=1e-12)
    assert drift(ref, ref) == {"mean_drift": 0.0, "std_ratio": 1.0, "std_drift": 0.0}
    assert math.isfinite(drift(torch.zeros_like(ref), ref)["std_drift"])


def test_saturation_counts_the_two_ends() -> None:
    levels = torch.tensor([0, 1, 2, 128, 253, 254, 255, 100]) / 255
    assert saturation(levels.view(1, 1, 2, 4)) == 4 / 8


def test_balance_is_the_ratio_of_mean_norms() -> None:
    norms = {"generator": [torch.tensor(1.0), torch.tensor(3.0)], "critic": [torch.tensor(8.0)]}
    assert balance(norms) == {"gradient_generator": 2.0, "gradient_critic": 8.0, "balance": 0.25}
    assert balance({"generator": [torch.tensor(1.0)]}) == {"gradient_generator": 1.0}
    assert balance({"generator": [torch.tensor(float("inf"))], "critic": []}) == {}


@pytest.mark.parametrize(
    "every, log_every, expected", [(8, 3, [9, 18, 24]), (20, 10, [20]), (2, 10, [10, 20, 25]), (0, 5, [])]
)
def test_a_check_is_in_the_first_log_line_after_each_multiple(every: int, log_every: int, expected: list[int]) -> None:
    config = TrainConfig(health_every=every, log_every=log_every)
    assert [step for step in range(1, 26) if due(step, config, last=step == 25)] == expected


def test_samples_follow_the_steps_between_checks() -> None:
    assert health_samples(TrainConfig(grid_every=200, batch_size=64), 10) == 6  # as the grid's
    assert health_samples(TrainConfig(grid_every=200, batch_size=64), 1) == 32
    assert health_samples(TrainConfig(grid_every=200, batch_size=64, health_every=1), 10) == 2
    assert health_samples(TrainConfig(health_every=0), 10) == 0


# ---- students in closed form


class Point(Generator):
    """x0 = scale * z + shift, whatever the network."""

    scale, shift = 1.0, 0.0

    def forward(self, z: Tensor, cond: Any, noises: Any = ()) -> Tensor:
        return self.scale * z + self.shift


def checker(tmp_path: Path, scale: float, shift: float = 0.0) -> tuple[Health, Point]:
    """Health beside the exact teacher of N(.7, .9^2), and a student of N(shift, scale^2)."""
    teacher = ClosedFormTeacher(Gaussian(EDM(), "edm"))
    student = Point(teacher.denoiser, [80.0])
    student.scale, student.shift = scale, shift
    config = TrainConfig(grid_steps=200, grid_columns=60, grid_every=200, batch_size=64)
    return Health(config, Panel(config, teacher, student, 1.0, 64)), student


def test_a_student_equal_to_the_teacher_has_the_numbers_of_no_drift(tmp_path: Path) -> None:
    checked, student = checker(tmp_path, 0.9, 0.7)
    values = checked.measure(student, student.denoiser, tmp_path / "health/a.png")
    assert values["finite"] == 1 and values["critic_error"] == pytest.approx(1, abs=1e-6)
    assert values["diversity"] == pytest.approx(1, abs=0.03) and values["std_drift"] < 0.03 and values["mean_drift"] < 0.05
    assert abs(values["saturation"]) < 0.05 and not checked.collapse(values) and not checked.collapse(values)
    half = checker(tmp_path, 0.45, 0.7)
    values = half[0].measure(half[1], None, tmp_path / "health/b.png")
    assert values["diversity"] == pytest.approx(0.5, abs=0.02) and values["std_ratio"] == pytest.approx(0.5, abs=0.02)
    assert "critic_error" not in values
    wide, narrow = (Image.open(tmp_path / f"health/{name}.png").width for name in "ab")
    assert wide > 1.3 * narrow  # four blocks, and three without a critic


@pytest.mark.parametrize(
    "scale, shift, reasons",
    [
        (0.0, 0.7, {"diversity", "std_drift"}),
        (0.9, 3.0, {"mean_drift", "saturation"}),
        (9.0, 0.7, {"std_drift", "saturation"}),
        (float("nan"), 0.0, {"finite"}),
        (0.9, 0.7, set()),
    ],
)
def test_a_collapse_has_its_reason(scale: float, shift: float, reasons: set[str], tmp_path: Path) -> None:
    checked, student = checker(tmp_path, scale, shift)
    values = checked.measure(student, None, tmp_path / "health.png")
    first, second, third = (checked.collapse(values) for _ in range(3))
    said = {line.split(" is ")[0] for line in (first + second).split("; ") if line}
    assert said == reasons and bool(first) == ("finite" in reasons)
    assert third == ""  # it is not told again


def test_what_gets_better_is_no_collapse() -> None:
    checked = Health.__new__(Health)
    checked.before, checked.known = {}, set()
    early = [checked.collapse({"diversity": value}) for value in (0.05, 0.1, 0.2, 0.5, 0.2, 0.1, 0.1, 0.6, 0.1, 0.1)]
    assert [bool(each) for each in early] == [False] * 5 + [True] + [False] * 3 + [True]
    assert early[5] == "diversity is 0.1, below 0.3: the samples of a condition are nearly alike"


# ---- in a run


@pytest.fixture
def small(tiny_teacher: Path) -> list[str]:
    """Four steps without data, by DMD2."""
    argv = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "4"]
    return [*argv, "--log-every", "1", "--checkpoint-every", "2", "--init-rho", "2.5"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_training_is_the_same_with_health_and_without(small: list[str], ended: list[int], tmp_path: Path) -> None:
    assert main([*small, "--output", str(tmp_path / "with"), "--health-every", "1"]) == 0
    assert main([*small, "--output", str(tmp_path / "without"), "--health-every", "0"]) == 0
    assert ended == [4, 4]
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    pictures = [f"step-{step:08d}.png" for step in range(1, 5)]
    assert sorted(each.name for each in (tmp_path / "with/health").iterdir()) == pictures
    assert not (tmp_path / "without/health").exists()
    names = {"finite", "diversity", "saturation", "mean_drift", "std_ratio", "std_drift", "critic_error", "balance"}
    assert all({f"health/{name}" for name in names} <= row.keys() for row in rows(tmp_path / "with"))
    assert not any(key.startswith("health/") for row in rows(tmp_path / "without") for key in row)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last steps of runs that came to their end, in place of their exports."""
    steps: list[int] = []
    monkeypatch.setattr("onestep.run.finish", lambda trainer, options: steps.append(trainer.step))
    return steps


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every student gives a constant where it is checked."""
    honest = Panel.of
    monkeypatch.setattr(Panel, "of", lambda self, student: torch.zeros_like(honest(self, student)))


@pytest.mark.parametrize("choice", ("warn", "stop", "ignore"))
def test_a_generator_that_returns_a_constant_is_told(
    choice: str,
    collapsing: None,
    ended: list[int],
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*small, "--output", str(tmp_path / "run"), "--health-every", "1", "--on-collapse", choice]
    assert main(argv) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "collapsed" in line]
    assert ended == ([] if choice == "stop" else [4])
    if choice == "ignore":
        assert not lines
        return
    (line,) = lines
    assert "collapsed at step 2: diversity is 0, below 0.3: the samples of a condition are nearly alike" in line
    assert "see health/step-00000002.png" in line and (tmp_path / "run/health/step-00000002.png").is_file()
    if choice == "warn":
        assert line.strip().startswith("warning: ")
        return
    assert "add --on-collapse warn" in line and "stopped and saved at step 2" in said.out
    reached = latest_checkpoint(tmp_path / "run/checkpoints")
    assert reached is not None and reached.name == "step-00000002"
    assert main([*argv[:-1], "warn"]) == 0 and ended == [4]  # as the line says


def test_no_collapse_before_the_method_has_settled(
    collapsing: None, ended: list[int], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backtrack = ["--backtrack", "2", "--backtrack-nodes", "2", "--backtrack-steps", "1"]
    assert main([*small, "--output", str(tmp_path / "run"), "--health-every", "1", *backtrack, "--iterations", "5"]) == 0
    assert "collapsed at step 5" in capsys.readouterr().err  # settled after 3: steps 4 and 5 are its first two checks


# ---- the best checkpoint


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Four steps on the digits, scored on 40 images."""
    argv = ["--teacher", "digits", *TINY, "--log-every", "3", "--ratio", "1", "--warmup", "0"]
    return [*argv, "--iterations", "4", "--checkpoint-every", "1", "--keep-best", "40", "--lr", "1e-3", "--no-evaluate"]


def test_a_run_keeps_its_best_and_goes_on_with_it(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after two steps and resumed, it has the best of a run that was not: of step 2 here, by given distances."""
    given = {1: 9.0, 2: 5.0, 3: 7.0, 4: 6.0}
    asked: list[int] = []

    def distance(self: Best, student: Generator) -> float:
        asked.append(max([0, *asked]) + 1)
        return given[asked[-1]]

    with monkeypatch.context() as patch:
        patch.setattr(Best, "distance", distance)
        honest = Trainer.save

        def killed(self: Trainer) -> None:
            honest(self)
            if self.step == 2:
                raise KeyboardInterrupt

        patch.setattr(Trainer, "save", killed)
        folder = tmp_path / "run"
        assert main([*digits, "--output", str(folder)]) == 130
        patch.setattr(Trainer, "save", honest)
        assert main([*digits, "--output", str(folder)]) == 0
    assert asked == [1, 2, 3, 4]
    assert [row.get("health/FD_proxy") for row in rows(folder)] == [9.0, 5.0, 7.0, 6.0]
    assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == ["best", "step-00000003", "step-00000004"]
    assert sorted(each.name for each in (folder / "checkpoints/best").iterdir()) == [
        "average-00000002.safetensors",
        "state.json",
    ]
    kept, best = read_best(folder)
    assert (kept.step, kept.metric, kept.value, kept.count, kept.protocol) == (2, "FD_proxy", 5.0, 40, "digits-1797")
    assert f"best:    step 2, FD_proxy 5.00 of 40 images; export it with python -m onestep.export {folder} --best" in (
        capsys.readouterr().out
    )
    assert "export-best" in export_run(folder, best=True)
    exported = load_file(folder / "export-best/unet/diffusion_pytorch_model.safetensors")
    last = load_file(folder / "checkpoints/step-00000004/average.safetensors")
    assert all(torch.equal(exported[key], best[key]) for key in best)
    assert any(not torch.equal(last[key], best[key]) for key in best)


def trainer_of(folder: Path, count: int, **options: Any) -> Trainer:
    from onestep.objectives import objective_class

    config = TrainConfig(
        method="sid", teacher="digits", device="cpu", data="digits", init_rho=2.5, guidance=1.0, keep_best=count,
        output=str(folder), **options,
    )  # fmt: skip
    return make_trainer(config, objective_class("sid").Config())


def test_the_distance_is_that_of_an_export(digits: list[str], tmp_path: Path) -> None:
    """The same classes and noise as `evaluate` takes for as many images, also of a chain."""
    argv = [*digits, "--output", str(tmp_path / "run"), "--student-steps", "2", "--checkpoint-every", "4"]
    assert main([*argv, "--init-rho", "2.5"]) == 0
    with pytest.warns(UserWarning, match="biased"):
        row = evaluate(tmp_path / "run/export", "digits-1797", steps=2, guidance=1.0, count=40)
    assert rows(tmp_path / "run")[-1]["health/FD_proxy"] == pytest.approx(row["FD_proxy"], rel=1e-4)


def test_only_a_better_one_of_as_many_images_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = trainer_of(tmp_path, 40).best
    assert best is not None
    student = Generator(denoiser(Gaussian(EDM(), "edm")), [80.0])
    values = iter((5.0, 5.0, 6.0, 4.0, 9.0))
    monkeypatch.setattr(best, "distance", lambda student: next(values))
    steps = []
    for step in range(1, 6):
        best.count = 40 if step < 5 else 50  # other images: the distances cannot be compared
        assert best.offer(step, student).keys() == {"FD_proxy"}
        kept = kept_in(best.folder)
        assert kept is not None
        steps.append(kept.step)
    assert steps == [1, 1, 1, 4, 5]


def test_the_best_is_there_wherever_a_kill_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = trainer_of(tmp_path, 40).best
    assert best is not None
    student = Generator(denoiser(Gaussian(EDM(), "edm")), [80.0])
    values = iter((5.0, 4.0, 3.0, 2.0, 1.0))
    monkeypatch.setattr(best, "distance", lambda student: next(values))
    best.offer(1, student)
    replace = os.replace
    for step, number in ((2, 1), (3, 2)):  # before the weights, and before state.json take their names
        calls: list[int] = []

        def cut(source: Any, target: Any, calls: list[int] = calls, number: int = number) -> None:
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", cut)
            best.offer(step, student)
        assert read_best(tmp_path)[0].step == 1
    best.offer(4, student)
    assert sorted(each.name for each in best.folder.iterdir()) == ["average-00000004.safetensors", "state.json"]


def test_a_best_that_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps no best checkpoint: train it with --keep-best"):
        read_best(tmp_path)
    best = trainer_of(tmp_path, 40).best
    assert best is not None
    best.offer(1, trainer_of(tmp_path, 40).generator)
    path = tmp_path / "checkpoints/best/average-00000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be used: .* has changed since it was written. Delete that folder"):
        read_best(tmp_path)
    (path.parent / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be used: "):
        kept_in(path.parent)


@pytest.mark.parametrize("options, message", [
    ({"teacher": "TINY"}, "has no protocol to find the best checkpoint by: leave --keep-best out"),
    ({"keep_best": 1}, "takes 2 to 1797 images; type for example --keep-best 1000"),
    ({"keep_best": 9999}, "takes 2 to 1797 images"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    options: dict[str, Any], message: str, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"teacher": "digits", "keep_best": 40, **options}
    given["teacher"] = str(tiny_teacher) if given["teacher"] == "TINY" else given["teacher"]
    with pytest.raises(SystemExit):
        main(["--teacher", given["teacher"], "--keep-best", str(given["keep_best"]), "--gan", "0", "--gan-critic", "0",
              "--device", "cpu", "--output", str(tmp_path / "run")])  # fmt: skip
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
