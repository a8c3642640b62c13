"""Prompt retrieval against places that are known by hand."""

import math

import pytest
import torch

from onestep.metrics.measure import Measured, by_prompt, means, scores
from onestep.metrics.retrieval import ranks, retrieval

CAPTIONS = ["fox", "cat", "fox", "sun"]


def at(*degrees: float) -> torch.Tensor:
    """Features of these angles and of different lengths, which are not to matter."""
    return torch.tensor(
        [[(i + 1) * math.cos(math.radians(d)), (i + 1) * math.sin(math.radians(d))] for i, d in enumerate(degrees)]
    )


def test_places_by_hand() -> None:
    real = at(0, 30, 90, 180)
    # 80 degrees: foxes at 80 and 10, cat at 50; 20: cat 10, fox 20; 100: fox 10, cat 70, sun 80; 0 asks for the farthest
    found = ranks(at(80, 20, 100, 0), real, ["fox", "fox", "sun", "sun"], CAPTIONS)
    assert found.tolist() == [1, 2, 3, 4]
    assert {name: each.tolist() for name, each in retrieval(found).items()} == {
        "retrieval@1": [1, 0, 0, 0],
        "retrieval@10": [1, 1, 1, 1],
    }


def test_real_pictures_find_themselves_and_chance_is_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(500, 16, generator=draw)
    captions = [f"picture {i}" for i in range(500)]
    assert ranks(real, real, captions, captions).eq(1).all()
    places = ranks(torch.randn(500, 16, generator=draw), real, captions, captions).double()
    assert float(places.mean()) == pytest.approx(250.5, abs=4 * 144.3 / math.sqrt(500))  # uniform over 1 .. 500


def test_as_near_counts_as_behind() -> None:
    real = at(10, 10).div(torch.tensor([[1.0], [2.0]]))
    assert ranks(real[:1], real, ["b"], ["a", "b"]).tolist() == [1]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="'dog'"):
        ranks(at(0), at(0), ["dog"], ["cat"])
    with pytest.raises(ValueError, match="one an image"):
        ranks(at(0), at(0), ["cat", "cat"], ["cat"])
    bare = Measured(None, pooled=at(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave it out of --metrics"):
        scores(bare, bare, ["retrieval"], None, "none")  # type: ignore[arg-type]


def test_scores_of_each_prompt_average_to_those_of_all() -> None:
    real = Measured(None, pooled=at(0, 30, 90, 180), prompts=CAPTIONS)  # type: ignore[arg-type]
    fake = Measured(None, pooled=at(80, 20, 100, 0), prompts=["fox", "fox", "sun", "sun"])  # type: ignore[arg-type]
    found = scores(real, fake, ["retrieval"], None, "none")  # type: ignore[arg-type]
    assert means(found) == {"retrieval@1": 0.25, "retrieval@10": 1.0}
    assert by_prompt(found, fake.prompts or []) == {
        "retrieval@1": {"fox": 0.5, "sun": 0.0},
        "retrieval@10": {"fox": 1.0, "sun": 1.0},
    }
