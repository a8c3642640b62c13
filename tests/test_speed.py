"""What an update costs: its passes, as the methods' papers count them, and the time of all that is beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load_script

from onestep.trainer import Trainer

speed = load_script("speed")
BATCH = 2


@pytest.fixture
def tiny(tiny_teacher: Path, tiny_images: Path, tmp_path: Path) -> Any:
    def made(method: str, **options: Any) -> Trainer:
        given = {"data": str(tiny_images), "batch_size": BATCH, "device": "cpu", **options}
        return speed.trainer_of(method, str(tiny_teacher), given, tmp_path / "run")

    return made


def passes_of(trainer: Trainer) -> dict[str, tuple[int, float]]:
    """Calls, and micro-batches in them, by "network: kind" with a "..." where they were stopped at a feature."""
    found = speed.Cycle.of(trainer).passes()
    name = "{network}: {kind}".format
    return {name(**each) + "..." * bool(each["stopped_at"]): (each["calls"], each["batches"]) for each in found}


CRITIC = {"critic: forward": (1, 1), "critic: forward + backward": (5, 5)}
DMD2 = {
    "student: forward + backward": (1, 1),
    "student: forward": (4, 4),
    "teacher: forward": (1, 1),
    **CRITIC,
    "critic: forward + input backward...": (1, 1),
    "critic: forward + backward...": (5, 10),
    "head: forward + input backward": (1, 1),
    "head: forward + backward": (5, 10),
}
SIM = {
    "student: forward": (1, 1),
    "critic: forward + backward": (1, 1),
    "student: forward + backward": (1, 1),
    "critic: forward + input backward": (1, 1),
    "teacher: forward + input backward": (1, 1),
}
STUDENT = {"teacher: forward": (1, 1), "student: forward + backward": (1, 1)}
LCM, SCM = {**STUDENT, "student: forward": (1, 1)}, {**STUDENT, "student: forward derivative": (1, 1)}


@pytest.mark.parametrize("method, expected", [("dmd2", DMD2), ("sim", SIM), ("lcm", LCM), ("scm", SCM)])
def test_an_update_makes_the_passes_of_its_method_and_no_others(method: str, expected: Any, tiny: Any) -> None:
    """Per generator update, in units of one batch; of the teacher as many as it is guided by, here one."""
    assert passes_of(tiny(method)) == expected


def test_passes_with_gradients_that_nothing_needs_are_told_apart(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph alone is no backward pass, and the frozen critic of a student's turn gives its input's gradient alone."""
    trainer = tiny("sim")
    step = trainer.objective.step

    def wasteful(batch: Any, number: int) -> Any:
        trainer.generator.first(batch.rng.normal(trainer.teacher.shape), trainer.teacher.encode(batch.conditions)[0])
        yield from step(batch, number)

    monkeypatch.setattr(trainer.objective, "step", wasteful)
    assert passes_of(trainer) == {**SIM, "student: forward": (2, 2)}


@pytest.mark.parametrize("method", ["dmd2", "sim", "scm"])
def test_bare_passes_are_made_again_and_change_no_weight(method: str, tiny: Any) -> None:
    trainer = tiny(method)
    cycle = speed.Cycle.of(trainer)
    tape = speed.Tape(trainer)
    members = [member.network for members in trainer.members.values() for member in members]
    before = [p.clone() for each in members for p in each.parameters()]
    with tape.recording():
        for bare in cycle.bare:
            bare()
    assert all(torch.equal(a, b) for a, b in zip(before, (p for each in members for p in each.parameters())))
    assert all(p.requires_grad and p.grad is None for each in members for p in each.parameters())

    def told(passes: Any) -> list[Any]:
        return [(each.role, each.kind, each.stop, each.rows) for each in passes]

    assert told(tape.passes) == told(each for bare in cycle.bare for each in bare.passes)


def test_ratio_of_an_update_to_its_passes(tmp_path: Path) -> None:
    """By CPU time, which other processes disturb least, and of three tries the best; the networks are no toys here."""
    trainer = speed.trainer_of("sim", "fashion", {"device": "cpu", "batch_size": 8}, tmp_path / "run")
    found = []
    while len(found) < 3 and (not found or min(found) > 1.25):
        row = speed.measure(trainer, cycles=3, warmup=1)
        found.append(row["cpu_ratio"])
    assert min(found) <= 1.25
    assert 0.9 < row["memory_ratio"] < 1.25


def test_a_step_against_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen times the batch on networks that are no toys takes longer, be the cost of a step's calls what it may."""
    argv = ["--methods", "kd", "--cycles", "2", "--output", str(tmp_path / "rows.jsonl"), "--set", "device=cpu", "pairs=64"]
    more = ["pair_steps=1", "batch_size=4", f"cache={tmp_path / 'cache'}"]
    assert speed.main([*argv, *more, "--against", "batch_size=64"]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    low, high = row["against_cpu_ratio_quartiles"]
    assert row["against"] == {"batch_size": 64} and 1.3 < low <= row["against_cpu_ratio"] <= high < 32
    assert "against_cpu_ratio" in capsys.readouterr().out
    assert speed.main([*argv, "--against", "batch_size"]) == 2
    assert "--against batch_size gives no value" in capsys.readouterr().err
