"""Bad input is one line on stderr, exit code 2, and nothing new on disk."""

import os
import shutil
from pathlib import Path

import pytest
from background import TINY
from safetensors import SafetensorError

import onestep.export
from onestep.train import main


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """refused(argv) runs the command line in tmp_path and returns its one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object, command=main) -> str:
        before = listing(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            command([str(each) for each in argv])
        captured = capfd.readouterr()
        assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured
        assert captured.err.startswith("error: ") and listing(tmp_path) == before
        return captured.err

    return run


@pytest.fixture
def small(tiny_teacher: Path) -> list[str]:
    return [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "2"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--method", "dmd3"], "did you mean --method dmd?"),
        (["--teacher", "fashon"], "did you mean --teacher fashion?"),
        (["--teacher", "./nowhere"], "no teacher './nowhere'"),
        (["--bacth-size", "4"], "no flag --bacth-size; did you mean --batch-size?"),
        (["--batch-size", "0"], "--batch-size is '0'; allowed is an integer at least 1"),
        (["--batch-size", "-4"], "--batch-size is '-4'"),
        (["--lr", "nan"], "--lr is 'nan'"),
        (["--device", "gpu"], "--device is 'gpu'; allowed is one of auto, cpu"),
        (["--config", "missing.yaml"], "no file missing.yaml; type --config FILE with an existing YAML file"),
        (["--config", "typo.yaml"], "no option 'bacth_size' in typo.yaml; did you mean batch_size?"),
        (["--config", "broken.yaml"], "broken.yaml, line 3: not valid YAML"),
    ],
)
def test_before_anything_is_loaded(refused, tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "typo.yaml").write_text("bacth_size: 4\n")
    (tmp_path / "broken.yaml").write_text("lr: 1\nseed: [\n")
    assert message in refused(*argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "missing"], "no data 'missing': allowed are fashion, digits, emoji, or a folder"),
        (["--data", "empty"], "empty holds no class folders with images"),
        (["--init-rho", "1000"], "init_rho 1000.0 is outside this teacher's schedule"),
        (["--accumulation", "3"], "batch_size 8 is no multiple of accumulation 3; type for example --batch-size 9"),
        (["--guidance", "2"], "--guidance 1"),
        (["--gan", "1", "--gan-critic", "1"], "needs real images: type --data FOLDER"),
    ],
)
def test_what_does_not_fit_the_teacher(refused, small: list[str], tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    assert message in refused(*small, *argv)
    assert message in refused(*small, *argv, "--output", "a/b/run")
    (tmp_path / "ready").mkdir()
    assert message in refused(*small, *argv, "--output", "ready")


def test_a_damaged_teacher(refused, tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    weights = teacher / "unet/diffusion_pytorch_model.safetensors"
    argv = [*TINY, "--teacher", teacher, "--gan", "0", "--gan-critic", "0"]
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "could not be loaded" in refused(*argv)
    weights.unlink()
    assert "could not be loaded" in refused(*argv)
    weights.write_bytes(content)
    (teacher / "unet/config.json").write_text("{")
    assert "could not be loaded" in refused(*argv)
    (teacher / "model_index.json").write_text("{")
    assert "could not be loaded" in refused(*argv)


def test_folders_that_cannot_be_written(refused, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/run", "file/a/b"):
        assert "file is no writable folder; type --output with another one" in refused(*small, "--output", output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    for argv in ([], ["--restart"]):
        assert "mine holds other things than a run" in refused(*small, "--output", "mine", *argv)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        assert "is no writable folder" in refused(*small, "--output", "run")
    with monkeypatch.context() as patch:
        patch.setattr("onestep.config.os.replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*small, "--output", "other"])
        shutil.rmtree("other")


def test_an_error_of_safetensors_is_one_line(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(argv: list[str]) -> int:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("onestep.train._main", full)
    assert refused() == "error: I/O error: No space left on device\n"


def test_a_damaged_run(refused, small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--output", "run"]
    assert main(argv) == 0
    assert "run holds a run with other options (lr: 0.0001 -> 0.5)" in refused(*argv, "--lr", "0.5")
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    average = checkpoint / "average.safetensors"
    content = average.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    for damaged in (content[:-100], bytes(flipped), b""):
        average.write_bytes(damaged)
        line = refused(*argv)
        assert f"{checkpoint.relative_to(tmp_path)} cannot be used" in line and "--restart" in line
        assert "cannot be used" in refused("run", command=onestep.export.main)
    average.write_bytes(content)
    (tmp_path / "run/config.yaml").write_text("lr: [\n")
    assert "not valid YAML" in refused(*argv) and "not valid YAML" in refused("run", command=onestep.export.main)


def test_a_wrong_export(refused, tmp_path: Path) -> None:
    export = onestep.export.main
    assert "no file nowhere/config.yaml" in refused("nowhere", command=export)
    assert "invalid choice: 'fp8'" in refused("nowhere", "--dtype", "fp8", command=export)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("lr: 1\n")
    assert "names no method" in refused("run", command=export)
    (tmp_path / "run/config.yaml").write_text("method: dmd2\nteacher: fashion\n")
    assert "holds no checkpoint yet; type python -m onestep.train --config run/config.yaml" in refused("run", command=export)
