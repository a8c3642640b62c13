"""The measure of a colour that a negative prompt takes away, on known colours and on the embedded emoji."""

import colorsys
import json
import math
from pathlib import Path

import pytest
import torch
from scripts import load_script

from onestep.teacher.table import ASSETS

negative = load_script("negative")


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    """One image of a pixel a colour, (1, 3, 1, N)."""
    return torch.tensor(colours, dtype=torch.float64).T[None, :, None]


def test_hues_are_those_of_hsv():
    colours = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    degrees, coloured = negative.hue(flat(*colours))
    known = [colorsys.rgb_to_hsv(*colour) for colour in colours]
    torch.testing.assert_close(degrees.flatten(), torch.tensor([360 * h for h, _, _ in known], dtype=torch.float64))
    assert coloured.flatten().tolist() == [s >= negative.COLOURED and v >= negative.COLOURED for _, s, v in known]


def test_shares_and_mean_hues_of_known_pixels():
    red, yellow, grey, black = (1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)
    image = flat(red, yellow, yellow, grey, black)
    assert [float(negative.share(image, name)) for name in ("red", "yellow", "blue")] == [0.2, 0.4, 0.0]
    # of angles 0, 60 and 60
    assert float(negative.mean_hue(image)) == pytest.approx(math.degrees(math.atan2(math.sqrt(3), 2)))
    assert math.isnan(float(negative.mean_hue(flat(grey, black))))
    assert float(negative.shift(torch.tensor(350.0), torch.tensor(10.0))) == 20
    assert float(negative.shift(torch.tensor(10.0), torch.tensor(200.0))) == 170


def test_yellow_goes_where_it_is_not_wanted(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("yellow heart\ngrinning face\nblue heart\nsun\n")
    argv = [
        str(ASSETS / "emoji"), "--steps", "4", "--prompts", str(prompts), "--negative", "yellow heart", "--scales", "0,0.5",
        "--picture", str(tmp_path / "rows.png"), "--output", str(tmp_path / "rows.jsonl"),
    ]  # fmt: skip
    assert negative.main(argv) == 0
    row = json.loads(Path(tmp_path / "rows.jsonl").read_text())
    plain, zero, half = row["scales"]
    assert row["prompts"] == 3 and plain["share"] > 0.2
    assert zero == plain  # scale 0 is the plain picture
    assert half["share"] < 0.6 * plain["share"] and half["hue_shift"] > 10
    assert (tmp_path / "rows.png").is_file()


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    base = [str(ASSETS / "emoji"), "--output", str(tmp_path / "rows.jsonl")]
    assert negative.main([*base, "--colour", "mauve"]) == 2
    assert "allowed are red, orange" in capsys.readouterr().err
    assert negative.main([*base, "--scales", "a"]) == 2
    assert "--scales 0.1,0.5" in capsys.readouterr().err
