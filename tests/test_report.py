"""python -m onestep.report: its numbers against the files, hostile texts, bad input, nearest images, and a real browser."""

import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from PIL import Image
from scripts import load_script

from onestep import report
from onestep.card import SCORE, update_score
from onestep.config import resolve, save_config
from onestep.data.images import load_embedded
from onestep.metrics import PROTOCOLS, evaluate
from onestep.objectives import objective_class
from onestep.reporting import chart, looks, samples, tables
from onestep.reporting.page import THUMBNAILS, page
from onestep.reporting.sources import Source, read

HOSTILE = '<img src=x onerror=alert(1)> & "quoted" \'</style><script>alert(2)</script>'
DIGITS = PROTOCOLS["digits-1797"]


class Page(HTMLParser):
    """Tags with their attributes, all text, and (value, text) of every <data>."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", []
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag == "data"
        if self.open:
            self.data.append((float(str(dict(attrs)["value"])), ""))

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open:
            self.data[-1] = (self.data[-1][0], self.data[-1][1] + data)

    @property
    def texts(self) -> dict[float, str]:
        return dict(self.data)


def a_row(**more: Any) -> dict[str, Any]:
    protocol = DIGITS.details()
    return {
        "protocol": protocol | {"shape": list(protocol["shape"])},
        "FD": 29.163456789012345,
        "class_accuracy": 0.97714,
        "export": "runs/a/export",
        "count": 1797,
        "seeds": [0, 1796],
        "steps": 1,
        "guidance": 1.0,
        "reference_count": 1797,
        "machine": {"cpu": "a processor", "threads": 2, "device": "cpu"},
        "torch": "2.14.1",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        **more,
    }


def a_run(folder: Path, method: str = "dmd2", grids: Sequence[int] = (100, 200), **flags: Any) -> Path:
    """A finished run of 200 steps, without an export, as onestep.train leaves it."""
    config, options = resolve(
        objective_class(method).Config, {}, {}, {"method": method, "teacher": "digits", "iterations": 200, **flags}
    )
    save_config(folder, config, options)
    rows = [
        {"step": step, "loss": 1 / step, "health/diversity": 0.5 + step / 1000, "lr": 1e-4, "images_per_second": 100 + step}
        for step in range(10, 201, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.jsonl").write_text(json.dumps(a_row()) + "\n")
    (folder / "grids").mkdir()
    for step in grids:
        Image.effect_noise((300, 150), step % 200 + 20).save(folder / "grids" / f"step-{step:08d}.png")
    Image.effect_noise((900, 450), 50).save(folder / "grid.png")
    return folder


def made(tmp_path: Path, *arguments: object) -> Page:
    output = tmp_path / "page.html"
    assert report.main([*map(str, arguments), "-o", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


# ---- numbers


def test_numbers_are_those_of_the_files(tmp_path: Path):
    run = a_run(tmp_path / "run")
    shown = made(tmp_path, run).texts
    row, last = a_row(), json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert shown[row["FD"]] == "29.16" and shown[row["class_accuracy"]] == "97.7 %"
    assert shown[last["loss"]] == "0.005" and shown[last["images_per_second"]] == "300"
    assert shown[last["health/diversity"]] == "0.7"


def test_numbers_are_those_of_the_comparison_s_own_table(tmp_path: Path):
    zoo, folder = load_script("zoo"), tmp_path / "zoo"
    folder.mkdir()
    scores = {"precision": 0.90444, "recall": 0.5, "density": 1.4481, "coverage": 0.96438}
    costs = {"images_per_second": 596.4, "iterations": 1909, "seconds": 180.2, "planned_seconds": 179.0, "minutes": 3.0}
    costs |= {"passes": {"student": 1.0}, "partial_passes": {}, "batch_size": 64, "picture": "x.png", "data": "digits"}
    rows = [
        a_row(name="dmd2", method="dmd2", options={}, teacher="digits", seed=seed, FD=29.16 + seed, **scores, **costs)
        for seed in (0, 1, 2)
    ]
    (folder / "zoo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = made(tmp_path, folder)
    lines = [line.strip("| ").split(" | ") for line in zoo.table(rows).splitlines() if line.startswith("| dmd2")]
    wanted = {cell for line in lines[:3] for cell in line[4:10]} | {"596", "1909"}
    assert wanted <= {text.replace(",", "") for _, text in shown.data}
    mean, deviation = statistics.mean([29.16, 30.16, 31.16]), statistics.stdev([29.16, 30.16, 31.16])
    assert f"{mean:.2f} ± {deviation:.2f}" in shown.text and "0, 1, 2" in shown.text


def test_rows_that_were_scored_otherwise_stand_apart(tmp_path: Path):
    run = a_run(tmp_path / "run")
    other = a_row(count=500, FD_proxy=88.25)
    del other["FD"]
    with (run / "results.jsonl").open("a") as file:
        file.write(json.dumps(a_row(FD=31.5)) + "\n" + json.dumps(other) + "\n")
    first, second = tables.tables(read([run]))
    assert [line.row.get("FD") for line in first.rows] == [a_row()["FD"], 31.5] and first.apart == ""
    assert [line.row["FD_proxy"] for line in second.rows] == [88.25] and "count: 1797 and 500" in second.apart
    assert "Not comparable with the first table: count: 1797 and 500" in made(tmp_path, run).text


def test_intervals_and_spreads_stand_at_their_scores():
    row = a_row(KID_proxy=0.0123456, KID_std_proxy=0.001, intervals={"FD": [28.0, 30.127], "class_accuracy": [0.97, 0.984]})
    found = tables.scores(row)
    assert (found["FD"].interval, found["class_accuracy"].interval) == ("28.00 – 30.13", "97.0 – 98.4 %")
    assert found["KID_proxy"].text == "0.01235 ± 0.00100" and "KID_std_proxy" not in found
    assert "count" not in found and "guidance" not in found


def test_speed_is_shown_with_its_quartiles(tmp_path: Path):
    times = {"median_s": 0.0123456, "lower_quartile_s": 0.012, "upper_quartile_s": 0.0131, "calls": 20}
    one = {"batch_size": 1, "images_per_s": 81.0005, "pipeline": times, "network": times, "passes_per_image": 1.0}
    best = one | {"batch_size": 64, "images_per_s": 1234.5, "peak_memory_bytes": 3 * 2**20 + 1}
    row = {"latency": one, "throughput": best, "warmup": 3, "export": "somewhere/export", "steps": 1}
    (tmp_path / "speed.jsonl").write_text(json.dumps(row) + "\n")
    shown = made(tmp_path, tmp_path / "speed.jsonl")
    assert shown.texts[0.0123456] == "12.35 ms" and shown.texts[3 * 2**20 + 1] == "3 MiB" and shown.texts[81.0005] == "81"
    assert "12.00 – 13.10 ms" in shown.text and "somewhere/export, steps 1" in shown.text
    assert "Scores" not in shown.text


def test_the_worst_prompts_come_first(tmp_path: Path):
    by_prompt = {"cosine": {f"prompt {i}": (7 * i % 30) / 30 for i in range(30)}}
    (tmp_path / "a.jsonl").write_text(json.dumps({"cosine": 0.5, "by_prompt": by_prompt}) + "\n")
    shown = made(tmp_path, tmp_path / "a.jsonl")
    assert [value for value, _ in shown.data][1:] == [i / 30 for i in range(20)]
    assert "the 20 lowest of 30 prompts" in shown.text


# ---- what is on disk


def test_options_that_differ(tmp_path: Path):
    one, two = (
        a_run(tmp_path / name, lr=lr, log_every=every, output=name) for name, lr, every in (("a", 1e-4, 10), ("b", 2e-4, 20))
    )
    text = (two / "config.yaml").read_text()
    (two / "config.yaml").write_text(re.sub(r"clip_norm: .*\n", "", text))  # as if the option came later
    assert tables.options_table(read([one, two])) == [("lr", ["0.0001", "0.0002"])]


def test_an_unfinished_run_with_a_torn_line_and_no_results(tmp_path: Path):
    run = a_run(tmp_path / "run")
    (run / "results.jsonl").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:12]) + '{"step": 130, "loss": NaN}\n' + lines[13][:20])
    (run / "grids" / "step-00000200.png").write_bytes(b"\x89PNG cut off")
    shown = made(tmp_path, run)
    for note in (
        "not finished: step 130 of 200",
        "metrics.jsonl is cut off",
        "no results yet",
        "00000200.png is no readable",
    ):
        assert note in shown.text
    assert "nan" not in re.sub(r"[^\d. nanMZHVL]", "", " ".join(str(a.get("d", "")) for _, a in shown.tags))
    assert shown.texts[json.loads(lines[11])["images_per_second"]] == "220"


def test_an_export_tells_what_its_card_says(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("not scored\n".join(SCORE) + "```yaml\nmethod: sid\nlr: 0.5\n```\n")
    update_score(folder, a_row())
    (source,) = read([folder])
    assert source.rows == [{key: value for key, value in a_row().items() if key != "export"}]
    assert source.config == {"method": "sid", "lr": 0.5} and source.export == folder


def test_a_folder_of_runs_is_all_of_them_once(tmp_path: Path):
    for name in ("a", "b"):
        a_run(tmp_path / "runs" / name)
    sources = read([tmp_path / "runs", tmp_path / "runs" / "b", tmp_path / "runs" / "a" / "results.jsonl"])
    assert [source.name for source in sources] == ["a", "b", "results.jsonl"]


def test_pictures_over_time_are_spread_evenly(tmp_path: Path):
    run = a_run(tmp_path / "run", grids=range(10, 410, 10))
    shown = made(tmp_path, run)
    texts = [str(attributes["alt"]) for tag, attributes in shown.tags if tag == "img"]
    steps = [int(text.removeprefix("step ")) for text in texts if text.startswith("step ")]
    assert len(steps) == THUMBNAILS and (steps[0], steps[-1]) == (10, 400)
    assert max(b - a for a, b in pairwise(steps)) <= 40
    assert f"{40 - THUMBNAILS} pictures between these" in shown.text


def test_texts_from_files_are_escaped(tmp_path: Path):
    run = a_run(tmp_path / HOSTILE.replace("/", "|"), init=HOSTILE)
    rows = [a_row(commit=HOSTILE, export=HOSTILE), a_row(**{HOSTILE: 0.5}), {"name": 1, "seed": 2, "error": HOSTILE}]
    rows[0]["protocol"]["dataset"] = HOSTILE
    rows += [{"protocol": HOSTILE, "FD": 1.5}]
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 210, HOSTILE: 3.0}) + "\n")
    shown = made(tmp_path, run, run / "results.jsonl")
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    addresses = [attributes[key] for _, attributes in shown.tags for key in ("src", "href") if key in attributes]
    assert addresses and all(str(each).startswith(("data:image/webp;base64,", "#")) for each in addresses)
    assert shown.text.count(HOSTILE) >= 5


# ---- bad input


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "there is no"),
        ("empty", "is empty"),
        ("other", "nothing that can be reported"),
        ("unnamed", "names no method"),
        ("broken", "config.yaml"),
        ("none.jsonl", "holds no row"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str):
    for folder, file, text in (
        ("other", "notes.txt", "x"),
        ("unnamed", "config.yaml", "lr: 1"),
        ("broken", "config.yaml", "a: [1"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("not json\n")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / name), "-o", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.glob("*page.html*"))


@pytest.mark.parametrize("flags", [("--samples", "-1"), ("-o", "."), ("-o", "nowhere/page.html")])
def test_bad_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str]):
    run = a_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        report.main([str(run), *flags])
    assert re.fullmatch(r"error: .*type.*\n", capsys.readouterr().err)


def test_an_older_page_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "page.html"
    output.write_text("old")
    run = a_run(tmp_path / "run")

    def full(*paths: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit):
        report.main([str(run), "-o", str(output)])
    assert output.read_text() == "old" and [each.name for each in tmp_path.glob("*page*")] == ["page.html"]


# ---- curves


def test_a_line_goes_through_its_points():
    points = [(10, 2.0), (20, 3.0), (40, 2.5)]
    drawing = str(chart.chart("loss", [chart.Line("a", 0, points)]))
    path = re.search(r'class="line c0 d0" d="M([^"]*)"', drawing)[1]
    places = [tuple(map(float, each.split())) for each in path.split("L")]
    rules = [float(y) for y in re.findall(r'class="rule" d="M\d+ ([\d.]+)H', drawing)]
    marks = [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', drawing)][: len(rules)]
    for (step, value), (x, y) in zip(points, places):
        assert x == pytest.approx(chart.LEFT + step / 40 * (chart.WIDTH - chart.LEFT - chart.RIGHT), abs=0.1)
        slope = (rules[-1] - rules[0]) / (marks[-1] - marks[0])
        assert y == pytest.approx(rules[0] + (value - marks[0]) * slope, abs=0.3)


def test_long_lines_are_means_in_a_band():
    points = [(step, float(step % 7)) for step in range(1, 1501)]
    groups = list(chart.grouped([*points, (1501, math.nan), (1502, math.inf)]))
    assert len(groups) == chart.GROUPS and [group[0] for group in groups] == list(range(10, 1501, 10))
    assert groups[3] == (40, statistics.mean([step % 7 for step in range(31, 41)]), 0.0, 6.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2e-5, 7e-5), (12.0, 13.0), (0.0, 98765.0)])
def test_ticks_are_round_and_inside(low: float, high: float):
    ticks = chart.Axis(low, high, 0, 1).ticks(5)
    assert 2 <= len(ticks) <= 6 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    step = ticks[1] - ticks[0]
    assert step / 10 ** math.floor(math.log10(step) + 1e-9) == pytest.approx(
        min((1, 2, 5), key=lambda each: abs(each - step / 10 ** math.floor(math.log10(step) + 1e-9)))
    )


def test_logarithms_where_values_span_orders_of_magnitude():
    assert chart.vertical([1e-4, 0.1]).log and not chart.vertical([1e-4, 0.1], may_log=False).log
    assert not chart.vertical([0.0, 0.1]).log and not chart.vertical([1.0, 40.0]).log
    axis = chart.vertical([1e-4, 1.0])
    assert axis(1e-2) == pytest.approx((axis(1e-4) + axis(1.0)) / 2)


# ---- samples


def digits(shift: float) -> looks.Looks:
    """The real digits themselves as samples, with all intensities (0 .. 16) larger by `shift`."""
    images, labels = load_embedded("digits")
    real = (images / 2 + 0.5).flatten(1) * 16
    made = looks.Samples(images / 2 + 0.5, labels, real + shift, labels)
    source = Source("copies", Path("copies"), export=Path(looks.__file__).parents[1] / "assets" / "digits")
    return looks.looks(0, source, DIGITS, made, real)


def test_copies_of_real_images_are_found_out():
    found = digits(shift=0.0)
    assert found.median.value == 0 and found.typical.value > 10
    for strip in found.strips:
        assert strip.nearest[0] == strip.sample and strip.nearest[1] != strip.sample
        assert strip.distances[0].value == 0 < strip.distances[1].value <= strip.distances[2].value
    assert [line.accuracy.value for line in found.classes] == [1.0] * 10
    assert sum(line.count for line in found.classes) == 1797


def test_distances_have_their_closed_forms():
    # equal covariances: FD is the squared distance of the means, 64 * 3^2; they are singular, as some pixels are always 0
    assert [line.distance.value for line in digits(shift=3.0).classes] == pytest.approx([576.0] * 10, rel=1e-6)
    distances, places = looks.nearest(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]), k=2)
    assert distances.tolist() == [[1.0, 5.0]] and places.tolist() == [[1, 0]]


def test_samples_give_the_stored_scores_their_intervals(tmp_path: Path, tiny_teacher: Path):
    run = a_run(tmp_path / "run")
    shutil.copytree(tiny_teacher, run / "export")
    with pytest.warns(UserWarning, match="biased"):
        stored = evaluate(run / "export", DIGITS, steps=1, guidance=1.0, count=100)
    (run / "results.jsonl").write_text(json.dumps(stored) + "\n")
    (source,) = read([run])
    with pytest.warns(UserWarning, match="biased"):
        (shown,) = samples.make_all([source], 100)
    (row,) = source.rows
    assert row["FD_proxy"] == stored["FD_proxy"] and row["class_accuracy"] == stored["class_accuracy"]
    for name, (low, high) in row["intervals"].items():
        assert low <= row[name] <= high, name
    low, high = row["intervals"]["FD_proxy"]
    assert low < row["FD_proxy"] < high and set(row["intervals"]) >= {"class_accuracy", "recall_proxy"}
    # ten images of a class are too few for a distance of its own
    assert shown.metric == "" and [line.count for line in shown.classes] == [10] * 10
    text = page([source], [shown], ["run", "--samples", "100"])
    assert Page(text).texts[row["FD_proxy"]] == f"{row['FD_proxy']:.2f}"


def test_why_no_samples_were_made(tmp_path: Path):
    (source,) = read([a_run(tmp_path / "run")])
    assert samples.make_all([source], 10) == [] and "it has no export" in source.notes[-1]


# ---- in a browser

needs_browser = pytest.mark.skipif(browser.browser() is None, reason=browser.NONE)


@needs_browser
def test_a_browser_shows_the_page_at_every_width(tmp_path: Path):
    runs = [a_run(tmp_path / f"run-with-a-name-that-is-rather-long-{i}", lr=1e-4 * (i + 1)) for i in range(3)]
    source = digits(shift=1.0)
    output = tmp_path / "page.html"
    output.write_text(page(read(runs), [source], [str(run) for run in runs]), encoding="utf-8")
    for width in (400, 1200):
        seen = browser.look(output, width, tmp_path)
        assert (seen.width, seen.asked, seen.broken, seen.console) == (width, [], 0, [])


@needs_browser
def test_the_browser_tells_of_bad_pages(tmp_path: Path):
    bad = tmp_path / "bad.html"
    bad.write_text('<p style="width:700px">wide</p><img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>')
    seen = browser.look(bad, 400, tmp_path)
    assert seen.width >= 700 and seen.asked == ["http://127.0.0.1:9/x.png"] and seen.broken == 1
    assert any("no" in line for line in seen.console)


@needs_browser
def test_light_and_dark(tmp_path: Path):
    output = tmp_path / "page.html"
    output.write_text(page(read([a_run(tmp_path / "run")]), [], ["run"]), encoding="utf-8")
    brightness = []
    for dark in (False, True):
        browser.picture(output, tmp_path / "seen.png", tmp_path, height=500, dark=dark)
        pixels = Image.open(tmp_path / "seen.png").convert("L")
        brightness.append(statistics.median(pixels.resize((60, 25)).tobytes()))
    assert brightness[0] > 230 and brightness[1] < 50
