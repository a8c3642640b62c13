"""eval/zoo.py: a comparison from end to end, killed, resumed, and what it refuses."""

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from background import CONTEXT, wait_for
from filelock import FileLock
from PIL import Image
from tiny import dit_pipeline

from onestep.config import flat
from onestep.methods import METHODS

ROOT = Path(__file__).parents[1]
MINUTES = 0.02
SMALL = "batch_size: 8, grid_steps: 1, grid_columns: 1"
ENTRIES = f"""
dmd2: {{{SMALL}}}
plain: {{method: dmd2, gan: 0, gan_critic: 0, ratio: 2, {SMALL}}}
diverging: {{method: dmd2, gan: 0, gan_critic: 0, lr: 1e38, warmup: 0, clip_norm: 1e9, {SMALL}}}
"""


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("eval_zoo", ROOT / "eval" / "zoo.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["eval_zoo"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


zoo = loaded()


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def argv(folder: Path, *more: str) -> list[str]:
    entries = folder / "entries.yaml"
    entries.write_text(ENTRIES)
    shared = ["--teacher", "digits", "--minutes", str(MINUTES), "--entries", str(entries), "--threads", "1"]
    return [*shared, "--output", str(folder / "zoo"), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of all three entries."""
    folder = tmp_path_factory.mktemp("whole")
    assert zoo.main(argv(folder)) == 0
    return folder / "zoo"


def passes_of(steps: int, ratio: int, gan: bool) -> dict[str, float]:
    """What DMD2 needs: on a generator's turn teacher, critic and, for the GAN, features of the critic once; else below."""
    turns = math.ceil(steps / ratio) / steps
    return {"student": 1.0, "teacher": turns, "critic": turns * (1 + gan) + 1 + 2 * gan}


def test_every_entry_has_a_row(whole: Path):
    rows = {row["name"]: row for row in zoo.rows_of(whole / "zoo.jsonl")}
    assert list(rows) == ["dmd2", "plain", "diverging"]
    for name, ratio, gan in (("dmd2", 5, True), ("plain", 2, False)):
        row = rows[name]
        steps = row["iterations"]
        assert row["passes"] == pytest.approx(passes_of(steps, ratio, gan))
        partial = math.ceil(steps / ratio) / steps + 2
        assert row["partial_passes"] == (pytest.approx({"critic": partial}) if gan else {})
        assert row["planned_seconds"] == pytest.approx(60 * MINUTES, rel=0.2) and row["planned_seconds"] <= 60 * MINUTES
        assert 0.4 < row["seconds"] / row["planned_seconds"] < 2.5  # of a second or two: more would be better
        assert row["wall_seconds"] > 0 and row["images_per_second"] == pytest.approx(8 * steps / row["seconds"])
        assert row["protocol"]["name"] == "digits-1797" and row["protocol"]["manifold"]["precision_recall_k"] == 3
        assert row["FD"] > 0 and 0 <= row["recall"] <= row["precision"] <= 1 and row["class_accuracy"] > 0.5
        assert row["minutes"] == MINUTES and row["seed"] == 0 and row["machine"]["threads"] == 1 and row["commit"]
        with Image.open(whole / row["picture"]) as picture:
            assert picture.format == "PNG"
    assert rows["plain"]["method"] == "dmd2" and rows["plain"]["options"]["gan"] == 0
    assert "not finite" in rows["diverging"]["error"] or "is nan" in rows["diverging"]["error"]
    assert "FD" not in rows["diverging"]


def test_a_run_of_it_is_one_of_the_library(whole: Path):
    row = zoo.rows_of(whole / "zoo.jsonl")[1]
    config = zoo.load_config(whole / "plain-seed-0")
    assert config["iterations"] == row["iterations"] and config["ratio"] == 2 and config["device"] == "cpu"
    assert f"| FD | {row['FD']} |" in (whole / "plain-seed-0/export/README.md").read_text()
    assert json.loads((whole / "plain-seed-0/results.jsonl").read_text())["weights_sha256"] == row["weights_sha256"]


def test_the_table_and_the_pictures(whole: Path):
    lines = (whole / "zoo.md").read_text().splitlines()
    assert lines[0].startswith("teacher digits; minutes of CPU time per thread 0.02; batch size 8; protocol digits-1797; ")
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert {len(row) for row in rows} == {16} and [row[0] for row in rows] == [
        "| method",
        "| dmd2",
        "| plain",
        "| diverging",
    ]
    assert rows[2][1].startswith("method dmd2, gan 0, gan_critic 0, ratio 2") and rows[3][9] == "-"
    assert [row[3] for row in rows] == ["steps", "1", "1", "-"]
    with Image.open(whole / "zoo.png") as sheet:
        shares = [sheet.crop((i * sheet.width // 3, 44, (i + 1) * sheet.width // 3, sheet.height)) for i in range(3)]
        assert sheet.height == 44 + 20 * 72 + 8 and len({share.tobytes() for share in shares}) == 3


def test_what_is_there_is_passed_over(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(zoo, "train", lambda *args: pytest.fail("trained again"))
    before = (whole / "zoo.jsonl").read_bytes()
    assert zoo.main(argv(whole.parent)) == 0
    assert (whole / "zoo.jsonl").read_bytes() == before and "| plain |" in capsys.readouterr().out
    assert zoo.main([*argv(whole.parent), "--minutes", "3"]) == 2
    assert "has a row of dmd2, seed 0 with {'minutes': 0.02}" in capsys.readouterr().err
    with FileLock(whole / ".lock"):
        assert zoo.main(argv(whole.parent)) == 2
    assert "another process is at work" in capsys.readouterr().err


def run_apart(arguments: list[str], log: Path) -> None:
    """The script in a process that can be killed."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(zoo.main(arguments))


def test_a_killed_comparison_goes_on_and_counts_what_was_spent(tmp_path: Path):
    arguments = argv(tmp_path, "--methods", "plain", "--minutes", "0.05")
    process = CONTEXT.Process(target=run_apart, args=(arguments, tmp_path / "log"))
    process.start()
    run = tmp_path / "zoo" / "plain-seed-0"
    try:
        wait_for(run / "checkpoints", "step-*", process)
    finally:
        process.kill()
        process.join()
    plan = json.loads((run / "plan.json").read_text())
    assert not (tmp_path / "zoo/zoo.jsonl").exists() and not (run / "export").exists()
    with (run / "costs.jsonl").open("a") as file:  # what a kill before a later checkpoint would have left
        file.write('{"step": 100000, "seconds": 1e9}\n{"step": 1000')
    assert zoo.main(arguments) == 0
    (row,) = zoo.rows_of(tmp_path / "zoo/zoo.jsonl")
    costs = zoo.rows_of(run / "costs.jsonl")
    steps = [cost["step"] for cost in costs]
    assert steps == [*range(steps[0], plan["iterations"], steps[0]), plan["iterations"]]  # none lost, none twice
    assert all(a["seconds"] < b["seconds"] and a["wall_seconds"] < b["wall_seconds"] for a, b in pairwise(costs))
    assert row["iterations"] == plan["iterations"] and row["planned_seconds"] == plan["planned_seconds"]
    assert row["seconds"] == costs[-1]["seconds"] > 0.4 * row["planned_seconds"]
    assert row["passes"] == pytest.approx(passes_of(row["iterations"], 2, False))  # of all steps, on both sides of the kill


def test_a_stop_is_no_row(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def train(*args: Any) -> Iterator[Any]:
        raise zoo.Stopped
        yield

    monkeypatch.setattr(zoo, "train", train)
    assert zoo.main([*argv(whole.parent), "--methods", "dmd2,plain", "--seeds", "0,7"]) == 130
    assert "stopped in dmd2, seed 7; the same command goes on" in capsys.readouterr().out
    assert len(zoo.rows_of(whole / "zoo.jsonl")) == 3


def test_an_entry_that_does_not_fit_stops_no_other(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def train(job: Any, entry: Any, counts: Any) -> Iterator[Any]:
        raise ValueError("no way") if entry.seed == 8 else zoo.Stopped
        yield

    monkeypatch.setattr(zoo, "train", train)
    assert zoo.main([*argv(whole.parent), "--methods", "plain", "--seeds", "8,9"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "error: plain, seed 8: no way\n" and "stopped in plain, seed 9" in captured.out


# Numbers of steps


def test_one_training_is_scored_at_several_numbers_of_steps(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = zoo.rows_of(whole / "zoo.jsonl")
    checkpoints = sorted((whole / "plain-seed-0/checkpoints").iterdir())
    monkeypatch.setattr(zoo.Timed, "update", lambda self: pytest.fail("trained again"))
    command = [*argv(whole.parent), "--methods", "plain", "--steps", "1,2,4"]
    honest = zoo.evaluate

    def evaluate(folder: Path, *args: Any, **kwargs: Any) -> Any:
        if kwargs["steps"] == 4:
            raise ValueError("cut off")
        return honest(folder, *args, **kwargs)

    monkeypatch.setattr(zoo, "evaluate", evaluate)
    assert zoo.main(command) == 2 and "plain, seed 0: cut off" in capsys.readouterr().err
    monkeypatch.setattr(zoo, "evaluate", honest)
    assert zoo.main(command) == 0
    rows = zoo.rows_of(whole / "zoo.jsonl")
    assert rows[: len(before)] == before and [row["steps"] for row in rows[len(before) :]] == [2, 4]  # 2 not twice
    assert sorted((whole / "plain-seed-0/checkpoints").iterdir()) == checkpoints
    one, two, four = before[1], *rows[len(before) :]
    for row, name in ((two, "export-2"), (four, "export-4")):
        assert row["export"].endswith(f"plain-seed-0/{name}") and row["passes_per_image"] == row["steps"]
        for key in ("seconds", "iterations", "weights_sha256", "protocol", "seeds", "passes"):
            assert row[key] == one[key], key
        text = (whole / f"plain-seed-0/{name}/README.md").read_text()
        assert f"| FD | {row['FD']} |" in text and "trained with student_steps 1" in text
    assert len({one["FD"], two["FD"], four["FD"]}) == 3
    assert f"| FD | {one['FD']} |" in (whole / "plain-seed-0/export/README.md").read_text()
    lines = [line.split(" | ") for line in (whole / "zoo.md").read_text().splitlines() if line.startswith("| plain")]
    assert [(line[3], line[4]) for line in lines] == [(str(row["steps"]), f"{row['FD']:.2f}") for row in (one, two, four)]
    with Image.open(whole / "zoo.png") as sheet:
        assert sheet.width > 5 * 72  # the teacher, dmd2, and plain at three numbers of steps
    (whole / "zoo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))


# Counting and planning


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "dit"
    dit_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("critic", ("full", "lora"))
def test_passes_of_a_guided_teacher_and_of_adapters_on_its_network(critic: str, guided: Path, tmp_path: Path):
    options = {"guidance": 2.0, "gan": 0, "gan_critic": 0, "ratio": 2, "batch_size": 4, "critic": critic, "rank": 2}
    job = zoo.Job(str(guided), None, 1.0, 1, zoo.PROTOCOLS["fashion-10k"], tmp_path)
    trainer = zoo.Timed(*job.resolved(zoo.Entry("dmd2", "dmd2", options, 0), 4))
    z, labels = torch.zeros(1, *trainer.teacher.shape), torch.zeros(1, dtype=torch.long)
    trainer.update()
    assert not trainer.passes.entered  # nothing is watched yet
    with trainer.passes.watching():
        for trainer.step in range(1, 5):
            trainer.update()
        with torch.no_grad():
            trainer.teacher.denoiser(z, labels, {"class_labels": labels})  # not within an update
    assert trainer.step == 4
    assert trainer.per_step() == {"passes": {"student": 1.0, "teacher": 1.0, "critic": 1.5}, "partial_passes": {}}
    assert trainer.seconds > 0 and trainer.wall_seconds > 0


def test_whole_cycles_are_timed_and_the_first_is_not(monkeypatch: pytest.MonkeyPatch):
    clock, seen = [0.0], []

    class Fake:
        step = 0

        def update(self) -> None:
            seen.append(self.step)
            clock[0] += 100.0 if len(seen) <= 3 else 9.0 if self.step % 3 == 0 else 1.5

    monkeypatch.setattr(zoo, "seconds", lambda: clock[0])
    assert zoo.per_step(Fake(), 6, 3, enough=30.0) == 4.0
    assert seen == list(range(6, 6 + 3 * 4))  # one cycle to warm up, and three of 12 seconds


@pytest.mark.parametrize("options, iterations", [({}, 250), ({"backtrack": 40}, 280), ({"ratio": 1}, 250)])
def test_the_plan_fills_the_time(options: dict[str, Any], iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 seconds at 0.4 a step; the 40 steps of a recording take 0.1 each."""
    places = []

    def per_step(trainer: Any, start: int, cycle: int, enough: float) -> float:
        places.append((start, cycle))
        return 0.4 if options.get("backtrack", 0) <= start else 0.1

    settled = 140 if options.get("backtrack") else 0
    made = SimpleNamespace(objective=SimpleNamespace(settled=settled))
    monkeypatch.setattr(zoo, "make_trainer", lambda config, options: made)
    monkeypatch.setattr(zoo, "per_step", per_step)
    job, entry = zoo.Job("digits", None, 100.0, 1, None, tmp_path), zoo.Entry("dmd2", "dmd2", options, 0)
    plan = zoo.measured(job, entry)
    assert plan.iterations == iterations and plan.planned_seconds == pytest.approx(100)
    assert places[-1] == (settled, options.get("ratio", 5)) and len(places) == (2 if settled else 1)
    config, _ = job.resolved(entry, plan.iterations)
    assert config.iterations == iterations and config.checkpoint_every == iterations // 10
    made.objective.settled = 300
    with pytest.raises(
        ValueError, match=f"are {iterations} steps of dmd2, whose last stage begins at step 300: type more --min"
    ):
        zoo.measured(job, entry)


def test_a_plan_is_kept_and_belongs_to_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = ["a"]
    monkeypatch.setattr(zoo, "provenance", lambda device: {"commit": commit[0]})
    monkeypatch.setattr(zoo, "measured", lambda job, entry: zoo.Plan(1.0, 1, 10, 6.0, 60.0))
    job, entry = zoo.Job("digits", None, 60.0, 1, None, tmp_path), zoo.Entry("dmd2", "dmd2", {}, 0)
    zoo.plan_of(job, entry)
    monkeypatch.setattr(zoo, "measured", lambda job, entry: pytest.fail("measured again"))
    commit[0] = "b-dirty"
    assert zoo.plan_of(job, entry) == zoo.plan_of(job, entry) == zoo.Plan(1.0, 1, 10, 6.0, 60.0, ["a", "b-dirty"])
    assert zoo.commits(zoo.plan_of(job, entry)) == "a, b-dirty"
    for other in (zoo.Job("digits", None, 61.0, 1, None, tmp_path), zoo.Job("digits", None, 60.0, 2, None, tmp_path)):
        with pytest.raises(ValueError, match="planned for 1 minutes on 1 threads; type --minutes 1 --threads 1"):
            zoo.plan_of(other, entry)
    (tmp_path / "dmd2-seed-0/plan.json").rename(tmp_path / "dmd2-seed-0/other.json")
    with pytest.raises(ValueError, match="holds other things"):
        zoo.plan_of(job, entry)


def test_a_run_of_other_options_is_not_resumed(whole: Path):
    job = zoo.Job("digits", None, 60 * MINUTES, 1, zoo.PROTOCOLS["digits-1797"], whole)
    given = zoo.entries_in(whole.parent / "entries.yaml", None)["plain"].options
    with pytest.raises(ValueError, match=r"plain-seed-0 holds a run of other options \(ratio: 2 -> 3"):
        list(zoo.train(job, zoo.Entry("plain", "dmd2", given | {"ratio": 3}, 0), [1]))


# Rows, entries, flags


def test_means_over_seeds(whole: Path):
    row = zoo.rows_of(whole / "zoo.jsonl")[0]
    twice = [{**row, "FD": value, "precision": value / 10, "seed": seed} for seed, value in enumerate((2.0, 4.0))]
    assert zoo.over_seeds([row]) == []
    more = [*twice, {**row, "name": "other"}, {**row, "steps": 4}]
    assert zoo.over_seeds(more)[2:] == zoo.over_seeds(twice)[2:]
    assert zoo.over_seeds(more)[2].startswith("| dmd2 | 1 | 2 | 3.000 ± 1.414 | 0.300 ± 0.141 |")
    assert "| dmd2 | 1 | 2 |" in zoo.table(twice)


def test_a_torn_line_costs_no_other(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    zoo.append({"a": 1}, path)
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    zoo.append({"a": 3}, path)
    assert zoo.rows_of(path) == [{"a": 1}, {"a": 3}] and zoo.rows_of(tmp_path / "none") == []


def test_a_row_goes_into_what_is_no_file_too(tmp_path: Path):
    zoo.append({"a": 1}, Path(os.devnull))
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    zoo.append({"a": 2}, tmp_path / "pipe")
    assert os.read(reader, 100) == b'{"a": 2}\n'
    os.close(reader)


@pytest.mark.parametrize("teacher", ("fashion", "digits"))
def test_the_entries_of_the_project_resolve_to_what_they_say(teacher: str, tmp_path: Path):
    job, entries = zoo.parse(["--teacher", teacher, "--output", str(tmp_path)])
    assert {entry.method for entry in entries} <= set(METHODS) and len(entries) >= 9
    assert job.protocol.name == {"fashion": "fashion-10k", "digits": "digits-1797"}[teacher]
    for entry in entries:
        found = flat(*job.resolved(entry, 100))
        assert {key: type(found[key])(value) for key, value in entry.options.items()} == {k: found[k] for k in entry.options}
        assert (found["teacher"], found["device"], found["evaluate"]) == (teacher, "cpu", False)


def test_methods_are_taken_from_the_file_or_plain(tmp_path: Path):
    path = tmp_path / "e.yaml"
    path.write_text("dmd2: {gan: 0, steps: [1, 4, 4]}\nother: {method: sid, steps: 3}\n")
    plain = zoo.Entry("sid", "sid", {}, 0)
    first = zoo.Entry("dmd2", "dmd2", {"gan": 0}, 0, (1, 4))
    assert list(zoo.entries_in(path, ["sid", "dmd2"]).values()) == [plain, first]
    assert zoo.entries_in(path, None)["other"] == zoo.Entry("other", "sid", {"steps": 3}, 0)  # of methods that have such
    assert zoo.entries_in(None, ["dmd2"]) == {"dmd2": zoo.Entry("dmd2", "dmd2", {}, 0)}
    given = ["--entries", str(path), "--output", str(tmp_path), "--methods", "dmd2", "--teacher", "digits"]
    assert [zoo.parse([*given, *flags])[1][0].steps for flags in ([], ["--steps", "2,1"])] == [(1, 4), (2, 1)]
    job, entries = zoo.parse(["--methods", "dmd2", "--seeds", "3,1,3", "--data", "digits", "--output", str(tmp_path)])
    assert [entry.seed for entry in entries] == [3, 1] and job.resolved(entries[0])[0].data == "digits"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("dmd2: 5", [], "dmd2 in .* is no mapping"),
        ("dmd2: {iterations: 3}", [], "iterations of dmd2 in .* the same for all; leave it out"),
        ("a/b: {method: dmd2}", [], "'a/b' in .* is no name of a folder"),
        ("dmd2: {gann: 0}", [], "no option 'gann' in the entry dmd2; did you mean gan"),
        ("x: {method: dmd3}", [], "no method 'dmd3'"),
        ("dmd2: {}", ["--methods", "dmd3"], "no method 'dmd3'; allowed are .*; did you mean dmd"),
        ("dmd2: {}", ["--minutes", "0"], "--minutes 0.0"),
        ("dmd2: {}", ["--seeds", "one"], "--seeds one"),
        ("dmd2: {}", ["--threads", "0"], "--threads 0"),
        ("dmd2: {steps: [1, x]}", [], r"steps of dmd2 in .*'x'\] is not allowed; .* type for example 1,2,4"),
        ("dmd2: {steps: 4}", [], "no option 'steps' in the entry dmd2"),
        ("dmd2: {}", ["--steps", "1,0"], r"--steps: \[1, 0\] is not allowed"),
        ("dmd2: {}", ["--teacher", "sdxl"], "no protocol is known for sdxl; type --protocol"),
        ("dmd2: {}", ["--protocol", "fashion"], "no protocol 'fashion'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    text: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "e.yaml").write_text(text)
    assert zoo.main(["--entries", str(tmp_path / "e.yaml"), "--output", str(tmp_path / "zoo"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]


def test_a_teacher_without_entries_asks_for_some(guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert zoo.main(["--teacher", str(guided), "--output", str(tmp_path)]) == 2
    assert "type --methods" in capsys.readouterr().err
