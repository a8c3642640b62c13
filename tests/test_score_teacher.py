"""`eval/teacher.py`: the teacher's own score, by the sampler that distillation sees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load_script

from onestep.metrics.protocol import protocol_of
from onestep.metrics.teacher import evaluate_teacher
from onestep.teacher import load_teacher


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("teacher")


@pytest.mark.filterwarnings("ignore:a distance from")
def test_more_steps_are_better_and_batches_do_not_matter() -> None:
    teacher, protocol = load_teacher("digits"), protocol_of("digits-1797")
    rows = [
        evaluate_teacher(teacher, protocol, steps=steps, guidance=1.0, count=120, batch_size=size)
        for steps, size in ((1, 120), (8, 120), (8, 50))
    ]
    assert rows[1]["FD_proxy"] < 0.5 * rows[0]["FD_proxy"]
    assert rows[1]["recall_proxy"] > rows[0]["recall_proxy"] + 0.2  # one step of a denoiser is the mean of its class
    assert rows[2]["FD_proxy"] == pytest.approx(rows[1]["FD_proxy"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:a distance from")
def test_the_command(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    argv = ["digits", "--steps", "2", "--count", "30", "--sampler", "dpm++", "--output", str(tmp_path / "rows.jsonl")]
    assert script.main(argv) == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["teacher"] == "digits" and row["sampler"] == "dpm++" and row["steps"] == 2 and row["guidance"] == 1.0
    assert f"{row['FD_proxy']:.4f}" in capsys.readouterr().out
    assert script.main([*argv, "--init-rho", "10"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "init_rho" not in rows[0] and rows[1]["init_rho"] == 10 and rows[1]["FD_proxy"] != rows[0]["FD_proxy"]
    assert script.main([*argv[:2], "0"]) == 2 and "type 1 or more" in capsys.readouterr().err
