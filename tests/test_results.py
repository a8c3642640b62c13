"""The numbers of eval/RESULTS.md are those that the report shows of the rows in eval/rows/."""

import json
from pathlib import Path

import pytest

from onestep.reporting.sources import read
from onestep.reporting.tables import tables

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "eval" / "RESULTS.md").read_text()
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in RESULTS.splitlines() if line.startswith("|")]
SCORES = ("FD", "precision", "recall", "density", "coverage", "class_accuracy")


@pytest.mark.parametrize("name", ["fashion", "digits"])
def test_every_row_is_a_line_of_the_results(name: str) -> None:
    path = ROOT / "eval" / "rows" / f"{name}.jsonl"
    shown = [line for table in tables(read([path])) for line in table.rows]
    assert len(shown) == len(path.read_text().splitlines())
    for line in shown:
        method, texts = str(line.row["name"]), [line.numbers[score].text for score in SCORES]
        same = [
            cells for cells in LINES if cells[0] == method and cells[2] == str(line.row["steps"]) and cells[3] == texts[0]
        ]
        assert any([cells[3], *cells[5:10]] == texts and cells[12] == str(line.row["iterations"]) for cells in same), (
            f"{line.name} with {line.row['steps']} steps: no line with {texts}"
        )


@pytest.mark.parametrize("name", ["digits_seeds", "digits_wide"])
def test_means_over_seeds_are_those_of_the_results(name: str) -> None:
    path = ROOT / "eval" / "rows" / f"{name}.jsonl"
    lines = {(cells[0], cells[1]): cells for cells in LINES if len(cells) == 9 and cells[2] == "3"}
    for table in tables(read([path])):
        assert len(table.seeds) == 3 * len({line.row["name"] for line in table.rows})
        for shown, seeds, texts in table.seeds:
            method, _, steps = shown.partition(", steps ")
            line = lines[method, steps]
            assert seeds == "0, 1, 2"
            assert [line[3], line[5], line[6]] == [texts[score] for score in ("FD", "precision", "recall")]


def test_several_and_smaller_students_are_those_of_the_results() -> None:
    means = [row for table in tables(read([ROOT / "eval" / "rows" / "students.jsonl"])) for row in table.seeds]
    assert len(means) == 5
    for name, seeds, texts in means:
        students, _, iterations = name.partition(",")[0].partition(" x ")
        (line,) = (cells for cells in LINES if cells[:2] == [students, iterations] and len(cells) == 5)
        assert seeds == "0, 1, 2" and line[3:] == [texts["FD"], texts["class_accuracy"]]
    shown = [row for table in tables(read([ROOT / "eval" / "rows" / "smaller.jsonl"])) for row in table.rows]
    assert len(shown) == 4
    for row in shown:
        size, way = str(row.row["name"]).split(", ")
        (line,) = (cells for cells in LINES if cells[0] == size and (cells[2] == "none") == way.startswith("without"))
        assert line[3:] == [row.numbers["FD"].text, row.numbers["class_accuracy"].text]


def test_guidance_in_one_pass_is_that_of_the_rows() -> None:
    rows = [json.loads(line) for line in (ROOT / "eval" / "rows" / "agd.jsonl").read_text().splitlines()]
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert (
            one["guidance"] == two["guidance"]
            and one["name"] == two["name"]
            and one["weights_sha256"] == two["weights_sha256"]
        )
        fd = [row["FD"] if "FD" in row else row["FD_proxy"] for row in (one, two)]
        kind = "retrieval@10" if "retrieval@10" in one else "class_accuracy"
        right = [row[kind] for row in (one, two)]
        line = [f"{one['guidance']:g}", *(f"{each:.2f}" for each in (*fd, fd[0] / fd[1]))]
        line += [*(f"{each:.1%}".replace("%", " %") for each in right), f"{right[0] / right[1]:.3f}"]
        line += [f"{one['passes_per_image']:.0f}, {two['passes_per_image']:.0f}"]
        line += [f"{one['seconds_per_image'] / two['seconds_per_image']:.2f}"]
        assert line in LINES


def test_one_step_students_of_emoji_are_those_of_the_rows() -> None:
    rows = [json.loads(line) for line in (ROOT / "eval" / "rows" / "emoji.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        (line,) = (cells for cells in LINES if cells[0].lower().startswith(row["name"]) and cells[1] == f"{row['FD']:.2f}")
        assert line[2:] == [f"{row[name]:.1%}".replace("%", " %") for name in ("retrieval@1", "retrieval@10")]
