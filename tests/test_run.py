"""Whole runs of a tiny teacher: to the end, killed and resumed, accumulated, on two processes."""

import ast
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY, finished, start, train, train_on, wait_for
from safetensors.torch import load_file
from torch import Tensor

import onestep.export
import onestep.metrics
import onestep.teacher
from onestep.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from onestep.data.shards import Shards
from onestep.metrics.provenance import sha256_of_weights
from onestep.teacher import Facts
from onestep.train import main
from onestep.trainer import keep_rows

STEPS = 12
LAST = f"checkpoints/step-{STEPS:08d}"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def argv(tiny_teacher: Path, tiny_images: Path) -> list[str]:
    """A run with everything in it, GAN included, but for its folder."""
    run = ["--teacher", str(tiny_teacher), "--data", str(tiny_images), "--iterations", str(STEPS)]
    return [*run, *TINY, "--checkpoint-every", "2", "--log-every", "3", "--init-rho", "2.5", "--warmup", "2"]


@pytest.fixture(scope="module")
def whole(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """That run, not interrupted: its folder and its output."""
    folder = tmp_path_factory.mktemp("whole")
    output = train([*argv, "--output", str(folder / "run"), "--grid-every", "8"], folder / "log")
    return folder / "run", output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def distance(a: Path, b: Path) -> float:
    """The largest |a - b| / |a| over the files of two checkpoints: weights, averages, moments of the optimisers."""
    worst = 0.0
    for path in a.glob("*.safetensors"):
        x, y = load_file(path), load_file(b / path.name)
        assert x.keys() == y.keys()
        difference = flat([x[key] - y[key] for key in x])
        worst = max(worst, float(difference.norm() / flat([*x.values()]).norm()))
    return worst


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_pictures_numbers_checkpoints_and_an_export(whole: tuple[Path, str]) -> None:
    from diffusers import DiffusionPipeline

    folder, output = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "export",
        "grid.png",
        "grids",
        "health",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert [path.name for path in (folder / "grids").iterdir()] == ["step-00000008.png"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert [row["step"] for row in rows(folder)] == [3, 6, 9, 12]
    assert {"matching", "denoising", "gan", "gan_critic", "lr", "images_per_second"} <= rows(folder)[0].keys()
    assert list((folder / "tensorboard").iterdir())
    assert f"export:  {folder / 'export'}" in output and "Use it:" in output and "Traceback" not in output
    code = output.split("Use it:\n\n")[1]
    pipe = DiffusionPipeline.from_pretrained(folder / "export")
    assert len(code.strip().splitlines()) == 5
    average = load_file(folder / LAST / "average.safetensors")
    assert all(torch.equal(pipe.unet.state_dict()[key], value) for key, value in average.items())


def test_the_run_that_needs_no_flags(
    tiny_teacher: Path,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"device": "cpu", "iterations": 2, "batch_size": 4, "grid_steps": 1, "data": str(tiny_images)}
    facts = Facts(source=str(tiny_teacher), protocol="fashion-10k", train=options)
    monkeypatch.setitem(onestep.teacher.TEACHERS, "fashion", facts)
    row = {"fd": 1.5, "class_accuracy": 0.5, "protocol": {"name": "fashion-10k", "metric": "fd"}}
    monkeypatch.setattr(onestep.metrics, "evaluate", lambda *args, **kwargs: row)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "fd 1.50, class accuracy 50.0% (fashion-10k)" in capsys.readouterr().out
    assert (tmp_path / "runs/dmd2-fashion/grid.png").is_file()
    assert "| fd | 1.5 |" in (tmp_path / "runs/dmd2-fashion/export/README.md").read_text()


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    argv: list[str], whole: tuple[Path, str], tmp_path: Path
) -> None:
    argv = [*argv, "--output", str(tmp_path / "run")]
    process = start(argv, tmp_path / "log")
    wait_for(tmp_path / "run/checkpoints", "step-*", process)
    process.kill()
    process.join()
    reached = latest_checkpoint(tmp_path / "run/checkpoints")
    assert process.exitcode == -signal.SIGKILL and reached is not None and reached.name < Path(LAST).name
    with (tmp_path / "run/metrics.jsonl").open("a") as file:  # what a later kill would have left
        file.write('{"step": 12}\n{"step": 12, "lo')
    train(argv, tmp_path / "log")
    assert contents(tmp_path / "run" / LAST) == contents(whole[0] / LAST)
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(whole[0])]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    number: signal.Signals, argv: list[str], whole: tuple[Path, str], tmp_path: Path
) -> None:
    argv = [*argv, "--output", str(tmp_path / "run"), "--checkpoint-every", "1000"]
    process = start(argv, tmp_path / "log")
    wait_for(tmp_path / "run", "metrics.jsonl", process)
    while not (tmp_path / "run/metrics.jsonl").stat().st_size:  # in mid-training
        assert process.is_alive()
    os.kill(process.pid or 0, number)
    assert finished(process) == 0
    (reached,) = (tmp_path / "run/checkpoints").iterdir()
    assert reached.name < Path(LAST).name and not (tmp_path / "run/export").exists()
    step = int(reached.name.removeprefix("step-"))
    assert f"stopped and saved at step {step}; the same command goes on from there" in (tmp_path / "log").read_text()
    train(argv, tmp_path / "log")
    assert contents(tmp_path / "run" / LAST) == contents(whole[0] / LAST)


def test_eight_micro_batches_are_one_batch(argv: list[str], whole: tuple[Path, str], tmp_path: Path) -> None:
    train([*argv, "--output", str(tmp_path / "run"), "--accumulation", "8"], tmp_path / "log")
    assert distance(whole[0] / LAST, tmp_path / "run" / LAST) < 1e-5


def test_two_processes_are_one(argv: list[str], whole: tuple[Path, str], tmp_path: Path) -> None:
    train_on(2, [*argv, "--output", str(tmp_path / "run"), "--accumulation", "2"], tmp_path / "log")
    assert distance(whole[0] / LAST, tmp_path / "run" / LAST) < 1e-5
    assert sorted(contents(tmp_path / "run/export")) == sorted(contents(whole[0] / "export"))
    assert "Use it" not in (tmp_path / "log-1").read_text()


@pytest.fixture
def small(tiny_teacher: Path) -> list[str]:
    """Two steps without data."""
    return [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "2"]


def test_a_complete_run_is_exported_again(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*small, "--output", str(tmp_path / "run")]
    assert main(argv) == 0
    before = contents(tmp_path / "run/export")
    (tmp_path / "run/export/README.md").write_text("lost")
    capsys.readouterr()
    weights = sha256_of_weights(tmp_path / "run/export/unet")
    (tmp_path / "run/results.jsonl").write_text(json.dumps({"fd": 1.5, "weights_sha256": weights}) + "\n")
    assert main([*argv, "--log-every", "7"]) == 0
    assert "Use it" in capsys.readouterr().out and contents(tmp_path / "run/export") == {
        **before,
        "README.md": (tmp_path / "run/export/README.md").read_bytes(),
    }
    assert "log_every: 7" in (tmp_path / "run/config.yaml").read_text()
    assert onestep.export.main([str(tmp_path / "run"), "--output", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    half = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    full = load_file(tmp_path / "run/export/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)
    assert "torch_dtype=torch.bfloat16" in capsys.readouterr().out
    assert "not scored" in (tmp_path / "half/README.md").read_text()  # its weights are rounded: other ones
    assert onestep.export.main([str(tmp_path / "run"), "--output", str(tmp_path / "same")]) == 0
    assert "| fd | 1.5 |" in (tmp_path / "same/README.md").read_text()


def test_no_average_is_the_student_itself(small: list[str], tmp_path: Path) -> None:
    small = [*small, "--iterations", "3", "--no-evaluate"]  # the first gradient is zero: the critic is the teacher yet
    assert main([*small, "--output", str(tmp_path / "run"), "--ema", "0"]) == 0
    saved = tmp_path / "run/checkpoints/step-00000003"
    assert (saved / "average.safetensors").read_bytes() == (saved / "generator-0.safetensors").read_bytes()
    assert main([*small, "--output", str(tmp_path / "slow"), "--ema", "0.9"]) == 0
    assert distance(saved, tmp_path / "slow/checkpoints/step-00000003") > 0


def test_a_dry_run_writes_nothing(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*small, "--dry-run", "--regression", "1", "--pairs", "4", "--pair-steps", "1"]) == 0
    output = capsys.readouterr().out
    assert "method: dmd2\n" in output and "  critic: UNet2DModel, " in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["dmd", "kd", "regression", "hipa", "instaflow", "agd"])
def test_a_dry_run_makes_no_samples_of_the_teacher(
    method: str, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("samples are made")

    monkeypatch.setattr(Shards, "build", build)
    teacher = "fashion" if method == "agd" else str(tiny_teacher)  # the small one has no unconditional branch
    argv = ["--teacher", teacher, "--device", "cpu", "--method", method, "--iterations", "5000", "--warmup", "0"]
    assert main([*argv, "--dry-run"]) == 0
    assert f"method: {method}\n" in capsys.readouterr().out


def test_restart_moves_the_old_run_aside(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*small, "--output", str(tmp_path / "run")]
    assert main(argv) == 0
    before = contents(tmp_path / "run")
    with pytest.raises(SystemExit):  # the restart is taken back where the new options do not fit
        main([*argv, "--restart", "--init-rho", "1000"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and contents(tmp_path / "run") == before
    assert main([*argv, "--restart", "--lr", "1e-3"]) == 0
    (aside,) = tmp_path.glob("run.before-*")
    assert contents(aside) == before and f"the run that was in {tmp_path / 'run'} is in {aside}" in capsys.readouterr().out
    assert "lr: 0.001\n" in (tmp_path / "run/config.yaml").read_text()


def test_a_divergence_is_told_and_never_saved(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*small, "--output", str(tmp_path / "run"), "--iterations", "6", "--checkpoint-every", "1"]
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--lr", "1e38", "--warmup", "4", "--log-every", "100", "--clip-norm", "1e9"])
    assert caught.value.code == 2 and "train again with a smaller --lr" in capsys.readouterr().err.splitlines()[-1]
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_chain_learns_in_bf16(tiny_teacher: Path, small: list[str], tmp_path: Path) -> None:
    """Autocast must not reuse, in a chain's last call, weights that its first call cast without gradient."""
    argv = [*small, "--student-steps", "2", "--mixed-precision", "bf16", "--iterations", "3", "--seed", "1", "--warmup", "0"]
    assert main([*argv, "--output", str(tmp_path / "run"), "--ema", "0", "--init-rho", "2.5"]) == 0
    before = load_file(tiny_teacher / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step-00000003/average.safetensors")
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert still <= {key for key in before if "to_k.bias" in key}


def test_rows_past_a_step_and_a_torn_last_row_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_rows(path, 5)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 6}\n{"step": 7, "lo')
    keep_rows(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def linear() -> Iterator[tuple[torch.nn.Linear, torch.optim.AdamW]]:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    yield network, optimizer


def test_checkpoints_are_whole_or_absent(tmp_path: Path, linear: tuple[Any, Any]) -> None:
    network, optimizer = linear
    (tmp_path / ".step-00000001.tmp").mkdir()  # of a run that was killed while it wrote
    for step in (2, 3, 10):
        save_checkpoint(tmp_path, step, {"network": network}, {"all": optimizer}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    path = latest_checkpoint(tmp_path)
    assert path is not None and path.name == "step-00000010"
    other = torch.nn.Linear(2, 2)
    fresh = torch.optim.AdamW(other.parameters(), 0.1)
    assert load_checkpoint(path, {"network": other}, {"all": fresh}) == 10
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters()))
    moments: tuple[dict[Any, dict[str, Tensor]], ...] = (fresh.state_dict()["state"], optimizer.state_dict()["state"])
    assert all(torch.equal(moments[0][i][slot], moments[1][i][slot]) for i in (0, 1) for slot in moments[1][i])


@pytest.mark.parametrize("name", ("state.json", "network.safetensors", "optimizer-all.safetensors"))
@pytest.mark.parametrize("damage", ("truncated", "flipped", "missing"))
def test_every_damaged_file_is_noticed(name: str, damage: str, tmp_path: Path, linear: tuple[Any, Any]) -> None:
    network, optimizer = linear
    folder = save_checkpoint(tmp_path, 2, {"network": network}, {"all": optimizer}, keep=2)
    content = (folder / name).read_bytes()
    places = range(0, len(content), 7) if damage == "flipped" else range(1)
    for place in places:
        if damage == "missing":
            (folder / name).unlink()
        else:
            changed = content[:-9] if damage == "truncated" else bytearray(content)
            if isinstance(changed, bytearray):
                changed[place] ^= 4
            (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match=r"the checkpoint .* cannot be used: .*--restart") as caught:
            load_checkpoint(folder, {"network": network}, {"all": optimizer})
        assert "\n" not in str(caught.value)


def imports(path: Path, package: str) -> set[str]:
    """The absolute names of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{each.name}" for each in node.names}
    return found


def test_the_trainer_knows_no_method_and_no_method_knows_accelerate() -> None:
    objectives = sorted((ROOT / "onestep/objectives").glob("*.py"))
    methods = {f"onestep.objectives.{path.stem}" for path in objectives if path.stem not in ("__init__", "base")}
    assert "onestep.objectives.dmd2" in methods
    trainer = imports(ROOT / "onestep/trainer.py", "onestep")
    assert "onestep.objectives.Objective" in trainer and not trainer & methods
    for path in objectives:
        assert not {name for name in imports(path, "onestep.objectives") if name.split(".")[0] == "accelerate"}, path


def test_pipelines_stand_alone() -> None:
    assert (ROOT / "pipelines/README.md").is_file()
    for path in (ROOT / "pipelines").rglob("*.py"):
        assert not {name for name in imports(path, "") if name.split(".")[0] == "onestep"}, path
