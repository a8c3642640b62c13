"""Intervals hold what they promise: on Gaussians, over many seeded experiments."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.metrics.bootstrap import (
    Interval,
    frechet_influence,
    frechet_interval,
    kid_interval,
    manifold_intervals,
    mean_interval,
)
from onestep.metrics.frechet import Moments, frechet_distance
from onestep.metrics.kernel import cubic_means, kid
from onestep.metrics.manifold import manifold


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(fake: Tensor, real: Moments) -> float:
    moments = Moments(real.dimensions)
    moments.update(fake)
    return frechet_distance(moments, real)


def gaussian(dimensions: int) -> Moments:
    """N(0, C) of a covariance that is not diagonal."""
    base = draws(dimensions, dimensions, seed=99)
    return Moments.of(10**6, torch.zeros(dimensions), base @ base.T / dimensions + 0.1 * torch.eye(dimensions), "test")


def check(intervals: list[Interval], expected: float) -> None:
    """95 % of the intervals hold what is to be expected, and they are as wide as the spread of the estimates demands.

    Of 300 experiments 285 hold it on average, with a standard deviation of 3.8.
    """
    held = sum(each.low <= expected <= each.high for each in intervals)
    width = np.mean([each.high - each.low for each in intervals])
    spread = np.std([each.estimate for each in intervals])
    assert 0.91 < held / len(intervals) < 0.99
    assert 0.85 < width / (2 * 1.96 * spread) < 1.25


def test_means_are_held():
    check([mean_interval((draws(150, seed=i) > 0.5).double(), resamples=200, seed=i) for i in range(300)], 0.3085)


def test_frechet_distances_are_held():
    """Of a shifted and stretched Gaussian; expected is the mean over experiments, with the bias of 200 images in it."""
    real, stretch = gaussian(4), torch.tensor([1.5, 1.0, 0.7, 1.2])
    fakes = [draws(200, 4, seed=i) * stretch + 0.5 for i in range(300)]
    values = [distance(fake, real) for fake in fakes]
    intervals = [frechet_interval(fake, real, resamples=200, seed=i) for i, fake in enumerate(fakes)]
    assert [each.estimate for each in intervals] == values
    check(intervals, float(np.mean(values)))


def test_small_distances_are_held_too_and_by_the_plain_bootstrap_not_at_all():
    """16 dimensions, 300 images of the reference's own Gaussian: all of the distance is bias."""
    real = gaussian(16)
    factor = torch.linalg.cholesky(real.covariance)
    fakes = [draws(300, 16, seed=i) @ factor.T for i in range(40)]
    expected = float(np.mean([distance(fake, real) for fake in fakes]))
    for i, fake in enumerate(fakes):
        found = frechet_interval(fake, real, resamples=200, seed=i)
        assert found.low < expected < found.high < 2.5 * expected
    draw = np.random.default_rng(0)
    again = [distance(fakes[0][torch.from_numpy(draw.integers(300, size=300))], real) for _ in range(100)]
    assert np.quantile(again, 0.025) > frechet_interval(fakes[0], real).high


def test_the_influence_is_the_derivative():
    """Of the distance along (1 - e) (moments of all) + e (moment of one image), n - 1 in the covariance being n here."""
    fake, real = draws(40, 5, seed=0) * 1.3 + 0.4, gaussian(5)
    moments, influence, n = Moments(5), frechet_influence(fake, real), 40
    moments.update(fake)
    m, c = moments.mean, moments.covariance

    def along(i: int, e: float) -> float:
        """All images at weight 1 - e and image i at weight e: mean and covariance of the mixture."""
        step = fake[i] - m
        mixed = (1 - e) * c + e * (1 - e) * torch.outer(step, step)
        return frechet_distance(Moments.of(n, m + e * step, mixed, "test"), real)

    for i in range(5):
        slope = (along(i, 1e-5) - along(i, -1e-5)) / 2e-5
        assert influence[i].item() == pytest.approx(slope, rel=1e-6)
    assert abs(influence.mean().item()) < 0.05 * influence.std().item()  # 0 with n in the place of n - 1


def test_fewer_images_than_dimensions_have_an_interval():
    found = frechet_interval(draws(12, 30, seed=0), gaussian(30))
    assert found.low < found.estimate < found.high


def test_kid_is_held():
    real = draws(400, 5, seed=1000)
    intervals, whole = [], []
    for i in range(300):
        fake = draws(400, 5, seed=i) * 1.2 + 0.4
        intervals.append(kid_interval(real, fake, resamples=200, seed=i))
        whole.append(intervals[-1].estimate)
    check(intervals, float(np.mean(whole)))
    fake = draws(400, 5, seed=7) + 0.4
    assert kid_interval(real, fake).estimate == pytest.approx(kid(real, fake, subsets=1, subset_size=400)[0], rel=1e-12)


def test_kid_s_influence_is_what_an_image_less_changes():
    """n (MMD^2 of all - MMD^2 without image i) is its influence, less the mean of all, but for the order 1 / n."""
    real, fake = draws(50, 3, seed=0), draws(200, 3, seed=1) + 0.5
    among, across, _ = cubic_means(real, fake)
    influence = 2 * (among - across)
    whole = kid_interval(real, fake).estimate
    without = torch.tensor([kid_interval(real, torch.cat([fake[:i], fake[i + 1 :]])).estimate for i in range(20)])
    left = 199 * (whole - without.double())
    torch.testing.assert_close(left, (influence - influence.mean())[:20], rtol=0.02, atol=0.02 * influence.std().item())


def test_the_four_numbers_have_intervals_of_their_images():
    real, fake = draws(150, 3, seed=0), 0.7 * draws(120, 3, seed=1) + 0.8
    found, expected = manifold_intervals(real, fake), manifold(real, fake)
    assert list(found) == ["precision", "recall", "density", "coverage"]
    for name, count in (("precision", 120), ("recall", 150), ("density", 120), ("coverage", 150)):
        interval, value = found[name], vars(expected)[name]
        assert interval.estimate == pytest.approx(value, rel=1e-12) and interval.low < value < interval.high
        if name != "density":
            normal = 2 * 1.96 * math.sqrt(value * (1 - value) / count)
            assert interval.high - interval.low == pytest.approx(normal, rel=0.15)


def test_intervals_are_those_of_the_seed():
    values = draws(50, seed=0)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    equal = mean_interval(torch.ones(9))
    assert (equal.estimate, equal.low, equal.high) == (1, 1, 1)


def test_bad_input_is_refused():
    for values in (torch.zeros(0), torch.zeros(1), torch.zeros(3, 2), torch.tensor([0.0, math.nan])):
        with pytest.raises(ValueError, match="an interval needs 2 finite ones"):
            mean_interval(values)
    with pytest.raises(ValueError, match=r"50 resamples .* type 100 or more"):
        mean_interval(torch.zeros(9), resamples=50)
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_interval(torch.zeros(1, 4), gaussian(4))
