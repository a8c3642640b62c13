"""Full disks, folders that cannot be written, vanished files, kills: a clear line, and a run that goes on."""

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY
from torch import nn

import onestep.data.shards
from onestep.checkpoint import latest_checkpoint, save_checkpoint
from onestep.data.shards import IN_USE, Shards
from onestep.data.tables import _bytes
from onestep.files import save_tensors, sha256_of
from onestep.train import main
from onestep.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from kill import Ending, play


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def argv(tiny_teacher: Path) -> list[str]:
    run = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--no-evaluate"]
    return [*run, "--iterations", "8", "--checkpoint-every", "2", "--log-every", "2", "--warmup", "0"]


def stopped(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def at_step(patch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """act(trainer) is called before the update that follows so many."""
    update = Trainer.update

    def acting(trainer: Trainer) -> None:
        if trainer.step == step:
            act(trainer)
        update(trainer)

    patch.setattr(Trainer, "update", acting)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def same(one: Path, other: Path) -> None:
    assert Ending.of(one).differences(Ending.of(other)) == []


def test_a_full_disk_stops_a_run_that_then_goes_on(small_disk, argv, tmp_path, monkeypatch, capsys) -> None:
    run = small_disk / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda trainer: fill(small_disk))
        line = stopped([*argv, "--output", str(run)], capsys)
    assert line.startswith("error: ") and "No space left on device" in line and "the same command" in line
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    (small_disk / "filler").unlink()
    assert main([*argv, "--output", str(run)]) == 0
    assert main([*argv, "--output", str(tmp_path / "whole")]) == 0
    same(tmp_path / "whole", run)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    network = nn.Linear(512, 512)
    first = save_checkpoint(small_disk / "checkpoints", 1, {"network": network}, {}, keep=2)
    fill(small_disk)
    with pytest.raises(OSError, match=r"step-00000002 could not be written \(.*No space left on device.*make room"):
        save_checkpoint(small_disk / "checkpoints", 2, {"network": network}, {}, keep=2)
    assert [*first.parent.iterdir()] == [first] and latest_checkpoint(first.parent) == first


def test_a_read_only_disk(small_disk: Path) -> None:
    first = save_checkpoint(small_disk / "checkpoints", 1, {"network": nn.Linear(2, 2)}, {}, keep=2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"could not be written \(Read-only file system\); .*make the folder writable"):
        save_checkpoint(small_disk / "checkpoints", 2, {"network": nn.Linear(2, 2)}, {}, keep=1)
    assert latest_checkpoint(first.parent) == first


def test_tensors_that_do_not_fit_are_an_os_error_and_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*File too large"):
            save_tensors({"x": torch.zeros(10_000)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*tmp_path.iterdir()]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(argv, tmp_path, capsys) -> None:
    for run in ("run", "whole"):
        assert main([*argv, "--output", str(tmp_path / run)]) == 0
    average = tmp_path / "run/checkpoints/step-00000008/average.safetensors"
    content = bytearray(average.read_bytes())
    content[-1] ^= 1
    average.write_bytes(content)
    capsys.readouterr()
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert "step-00000008 is damaged and passed over: average.safetensors has changed" in line
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("damage", ("vanished", "truncated"))
def test_a_shard_that_vanishes_while_it_is_used(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onestep.data.shards, "IN_MEMORY", 0)
    made = Shards.build(tmp_path, "x", {}, 4, lambda start, stop: {"x": torch.arange(start, stop)}, 2)
    assert IN_USE[made.folder.name] == sha256_of(made.folder / "index.json")
    path = made.folder / "shard-00001.safetensors"
    assert made[torch.tensor([1])]["x"].tolist() == [1]
    if damage == "vanished":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors has vanished or changed since .* Delete that folder"):
        made[torch.tensor([3])]


def test_a_path_in_a_table_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "data"):
        (folder / "a.png").write_bytes(b"picture")
    assert _bytes({"bytes": None, "path": "a.png"}, tmp_path / "data") == b"picture"
    (tmp_path / "data/link.png").symlink_to(tmp_path / "a.png")
    for path in ("../a.png", str(tmp_path / "a.png"), "link.png"):
        with pytest.raises(ValueError, match=r"a\.png|link\.png is outside of .*data; copy"):
            _bytes({"bytes": None, "path": path}, tmp_path / "data")


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_before_the_training_is_a_line(number, argv, tmp_path, monkeypatch, capsys) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(Trainer, "resume", lambda trainer: os.kill(os.getpid(), number))
    assert main([*argv, "--output", str(tmp_path / "run")]) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()


def test_a_kill_in_the_first_moment_is_no_obstacle(argv, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml.partial").write_text("metho")
    assert main([*argv, "--output", str(run)]) == 0
    assert not (run / "config.yaml.partial").exists()


def test_five_kills_lose_nothing(tiny_teacher: Path, tiny_images: Path, tmp_path: Path) -> None:
    run = [*TINY, "--teacher", str(tiny_teacher), "--data", str(tiny_images), "--no-evaluate", "--init-rho", "2.5"]
    run += ["--iterations", "40", "--checkpoint-every", "2", "--log-every", "1"]
    assert play(run, 5, 1, tmp_path, seed=random.SystemRandom().randrange(1000)) == []
