"""The Inception Score against values known without computing it."""

import math

import pytest
import torch

from onestep.metrics.inception_score import inception_score


def test_sure_and_equally_frequent_classes_give_their_number():
    logits = 1e4 * torch.eye(7).repeat(20, 1)
    assert inception_score(logits, splits=4) == pytest.approx((7, 0), abs=1e-12)


def test_one_distribution_for_all_images_gives_one():
    for row in (torch.zeros(5), torch.tensor([3.0, 1, 0, -2, 5]), torch.tensor([1e4, 0, 0, 0, 0])):
        assert inception_score(row.expand(30, 5), splits=3) == pytest.approx((1, 0), abs=1e-12)


def test_two_classes_have_the_closed_form():
    """Images of (q, 1 - q) and of (1 - q, q) in turn: exp(log 2 - H(q))."""
    q = 0.8
    logits = torch.tensor([[q, 1 - q], [1 - q, q]], dtype=torch.float64).log().repeat(10, 1)
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert inception_score(logits, splits=5)[0] == pytest.approx(2 * math.exp(-entropy), rel=1e-14)


def test_splits_are_those_of_the_paper_s_code():
    """10 images in 4 splits of 2, 3, 2 and 3; a split of equal images scores 1, one of two and of one image 2 at best."""
    classes = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 2])
    kinds = [1.0, 3 / 2 ** (2 / 3), 2.0, 3.0]  # exp of the entropy of the classes in each split
    mean, spread = inception_score(1e4 * torch.eye(3)[classes], splits=4)
    assert mean == pytest.approx(sum(kinds) / 4, rel=1e-12)
    assert spread == pytest.approx(torch.tensor(kinds, dtype=torch.float64).std(correction=0).item(), rel=1e-12)


def test_a_class_of_no_probability_is_no_trouble():
    """exp(-2000) is 0 in float64: a marginal of 0 would make 0 * infinity."""
    logits = torch.tensor([[0.0, -2000], [0.0, -3000]])
    assert inception_score(logits, splits=1) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "splits", "words"),
    [
        (torch.zeros(5), 1, r"\(5,\); allowed is \(N, classes\)"),
        (torch.full((5, 2), math.nan), 1, "finite"),
        (torch.zeros(5, 2), 6, "5 images do not make 6 splits; allowed are 1 to 5"),
        (torch.zeros(5, 2), 0, "0 splits"),
    ],
)
def test_bad_input_is_refused(logits: torch.Tensor, splits: int, words: str):
    with pytest.raises(ValueError, match=words):
        inception_score(logits, splits)
