"""`eval/curve.py`: times to a score, and a curve that goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("curve")


def test_the_time_to_a_target(script: Any) -> None:
    rows = [{"seconds": 10.0, "FD": 8.0}, {"seconds": 20.0, "FD": 4.0}, {"seconds": 30.0, "FD": 5.0}]
    assert script.reached(rows, "FD", 9.0) == 10.0  # at the first point, before which nothing is known
    assert script.reached(rows, "FD", 5.0) == 17.5
    assert script.reached(rows, "FD", 4.0) == 20.0
    assert script.reached(rows, "FD", 3.9) is None


def test_seeds_are_averaged_over_those_that_reached_it(script: Any) -> None:
    def entry(seed: int) -> Any:
        return script.Entry("dmd2", "dmd2", {}, seed)

    curves = [
        (entry(0), [{"seconds": 10.0, "FD": 6.0}, {"seconds": 20.0, "FD": 4.0}]),
        (entry(1), [{"seconds": 10.0, "FD": 8.0}, {"seconds": 20.0, "FD": 6.0}]),
    ]
    line = script.table(curves, "FD", [7.0, 5.0]).splitlines()[2]
    assert line == "| dmd2 | 0, 1 | 12.5 ± 3.5 (2 of 2) | 15.0 (1 of 2) | 5.0 ± 1.4 |"


def test_a_curve_is_drawn_and_not_drawn_twice(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = tmp_path / "entries.yaml"
    entries.write_text("dmd2: {batch_size: 4, gan: 0, gan_critic: 0}\n")
    argv = ["--teacher", "digits", "--entries", str(entries), "--minutes", "0.02", "--points", "2", "--count", "20"]
    argv += ["--targets", "1e9,0", "--output", str(tmp_path / "out")]
    assert script.main(argv) == 0
    shown = capsys.readouterr().out
    assert "seconds to FD_proxy 1e+09" in shown and "never (0 of 1)" in shown
    assert (tmp_path / "out/curve.png").stat().st_size > 5000
    path = tmp_path / "out/dmd2-seed-0/curve.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert len(rows) >= 2 and [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert all(row["seconds"] > 0 for row in rows)
    assert script.main(argv) == 0 and path.read_text() == before
