"""Checkpoints: what is kept, what is deleted when, and what is read where some of them are damaged."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onestep.checkpoint
import onestep.files
from onestep.checkpoint import latest_checkpoint, load_checkpoint, read_weights, save_checkpoint, tell_changed_caches
from onestep.files import replaced
from onestep.manifest import STATE


class Run:
    """One weight that is the step, and an optimiser of it."""

    def __init__(self, folder: Path):
        self.folder, self.network = folder, nn.Linear(1, 1)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 0.1)
        self.network(torch.ones(1, 1)).sum().backward()
        self.optimizer.step()

    def save(self, step: int, keep: int = 2, **caches: str) -> Path:
        nn.init.constant_(self.network.weight, step)
        return save_checkpoint(self.folder, step, {"network": self.network}, {"all": self.optimizer}, keep, caches)

    def resume(self) -> tuple[int, float]:
        path = latest_checkpoint(self.folder)
        assert path is not None
        step = load_checkpoint(path, {"network": self.network}, {"all": self.optimizer})
        return step, self.network.weight.item()

    def steps(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def sign(folder: Path, **changes: Any) -> None:
    """Change state.json as somebody does who knows how its check is made."""
    state = json.loads((folder / STATE).read_text()) | changes
    state.pop("check", None)
    check = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    (folder / STATE).write_text(json.dumps(state | {"check": check}))


def test_the_newest_are_kept_by_number_not_by_name(run: Run) -> None:
    for step in (99_999_999, 100_000_000):
        run.save(step, keep=1)
    assert run.steps() == ["step-100000000"] and run.resume() == (100_000_000, 1e8)


def test_nothing_is_deleted_before_its_successor_is_on_the_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1, keep=1)
    events: list[str] = []
    fsync, rename, rmtree = onestep.files.fsync, Path.rename, shutil.rmtree
    for module in (onestep.files, onestep.checkpoint, onestep.manifest):
        monkeypatch.setattr(module, "fsync", lambda path: (events.append(f"fsync {Path(path).name}"), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, new: (events.append(f"rename {path.name}"), rename(path, new))[1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (events.append(f"delete {path.name}"), rmtree(path, **how)))
    run.save(2, keep=1)
    files = {"fsync network.safetensors", "fsync optimizer-all.safetensors", f"fsync {STATE}"}
    assert set(events[:3]) == files
    assert events[3:6] == ["fsync .step-00000002.tmp", "rename .step-00000002.tmp", "fsync checkpoints"]
    assert events[-2:] == ["rename step-00000001", "delete .step-00000001.tmp"]


@pytest.mark.parametrize("name", (STATE, "network.safetensors", "optimizer-all.safetensors"))
@pytest.mark.parametrize("damage", ("truncated", "flipped", "missing", "empty folder"))
def test_a_damaged_one_is_passed_over_aloud(name: str, damage: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    newest = run.save(2)
    if damage == "truncated":
        (newest / name).write_bytes((newest / name).read_bytes()[:-3])
    elif damage == "flipped":
        flip(newest / name)
    elif damage == "missing":
        (newest / name).unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert run.resume() == (1, 1.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {newest} is damaged and passed over: ") and "step-00000001 is whole" in line
    if damage == "truncated" and name != STATE:
        assert "bytes of" in line
    assert latest_checkpoint(run.folder, aloud=False) is not None and capsys.readouterr().err == ""
    assert run.save(2, keep=2) == newest and run.steps() == ["step-00000001", "step-00000002"] and run.resume() == (2, 2.0)


def test_a_damaged_later_one_costs_no_whole_one(run: Run) -> None:
    for step in (10, 20):
        run.save(step)
    flip(run.folder / "step-00000020" / "network.safetensors")
    assert run.resume() == (10, 10.0)
    run.save(15, keep=1)
    assert run.steps() == ["step-00000015"] and run.resume() == (15, 15.0)


def test_all_damaged_is_an_error_and_none_is_none(run: Run) -> None:
    assert latest_checkpoint(run.folder) is None
    for step in (1, 2):
        flip(run.save(step) / STATE)
    (run.folder / "best").mkdir()
    (run.folder / "step-x").mkdir()
    with pytest.raises(ValueError, match=r"step-00000002 cannot be used: .*--restart") as caught:
        latest_checkpoint(run.folder)
    assert "\n" not in str(caught.value)


def test_weights_alone_need_only_their_own_file(run: Run) -> None:
    newest = run.save(3)
    flip(newest / "optimizer-all.safetensors")
    assert latest_checkpoint(run.folder, "network") == newest and read_weights(newest, "network")["weight"].item() == 3
    with pytest.raises(ValueError, match=r"optimizer-all\.safetensors has changed"):
        latest_checkpoint(run.folder)


def test_caches_that_were_made_again_are_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.save(1, pairs="1a2b", images="3c")
    tell_changed_caches(folder, {"pairs": "1a2b", "images": "3c", "text": "4d"})
    assert capsys.readouterr().err == ""
    tell_changed_caches(folder, {"pairs": "5e", "images": "3c"})
    assert capsys.readouterr().err.startswith("warning: the cache pairs was made again since step-00000001: ")


def test_a_checkpoint_from_before_sizes_were_kept_is_read(run: Run) -> None:
    folder = run.save(4)
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({key: state[key] for key in ("step", "groups", "sha256")}))
    sign(folder)
    assert run.resume() == (4, 4.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sha256": {"../step-00000001/network.safetensors": "0"}}, "a file outside of the checkpoint"),
        ({"step": 7}, "that of step 7"),
        ({"groups": {"all": [{"params": [0]}]}}, "doesn't match the size"),
        ({"groups": {}}, "'all' is missing in it"),
        ({"bytes": 3}, "cannot be used"),
    ],
)
def test_a_forged_state_is_refused(changes: dict[str, Any], message: str, run: Run) -> None:
    folder = run.save(2)
    sign(folder)
    assert run.resume() == (2, 2.0)
    sign(folder, **changes)
    with pytest.raises(ValueError, match=r"cannot be used: ") as caught:
        load_checkpoint(folder, {"network": run.network}, {"all": run.optimizer})
    assert message in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "notes.json"
    with replaced(file) as partial:
        partial.write_text("first")
        assert not file.exists() and partial.parent == tmp_path
    with pytest.raises(OSError, match="full"), replaced(file) as partial:
        partial.write_text("half of the sec")
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"] and file.read_text() == "first"
