"""Distances equal those of clean-fid, torch-fidelity and torchmetrics on the same features, or those are shown to be off.

Their functions are called on features, so that no network and no weights are needed. The judge between packages is a
computation of 50 digits, or a closed form.
"""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from onestep.metrics.frechet import Moments, frechet_distance
from onestep.metrics.inception_score import inception_score
from onestep.metrics.kernel import kid
from onestep.metrics.manifold import manifold

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Metric `:UserWarning")
Pair = tuple[Tensor, Tensor]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(real: Tensor, fake: Tensor) -> float:
    a, b = Moments(real.shape[1]), Moments(fake.shape[1])
    a.update(real)
    b.update(fake)
    return frechet_distance(a, b)


def cleanfid(real: Tensor, fake: Tensor) -> float:
    statistics = [part for f in (real.numpy(), fake.numpy()) for part in (f.mean(0), np.cov(f, rowvar=False))]
    return float(clean_fid.frechet_distance(*statistics))


def fidelity(real: Tensor, fake: Tensor) -> float:
    statistics = fid_features_to_statistics(real), fid_features_to_statistics(fake)
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


class Identity(nn.Module):
    """In the place of a network: images are features already."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def metrics(real: Tensor, fake: Tensor) -> float:
    metric = FrechetInceptionDistance(Identity(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


PACKAGES: list[Callable[[Tensor, Tensor], float]] = [cleanfid, fidelity, metrics]


def exact(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance of the moments of both, with 50 digits."""
    with mpmath.workdps(50):
        means, covariances = [], []
        for features in (real, fake):
            x = mpmath.matrix(features.tolist())
            mean = mpmath.matrix(1, x.cols)
            for i in range(x.rows):
                mean += x[i, :] / x.rows
            for i in range(x.rows):
                x[i, :] -= mean
            means.append(mean)
            covariances.append(x.T * x / (x.rows - 1))
        roots = []
        for covariance in covariances:
            values, vectors = mpmath.eigsy(covariance)
            roots.append(vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T)
        traces = sum(c[i, i] for c in covariances for i in range(c.rows))
        nuclear = sum(mpmath.svd_r(roots[0] * roots[1], compute_uv=False))
        return float(sum(v * v for v in means[0] - means[1]) + traces - 2 * nuclear)


def small(name: str) -> Pair:
    """Features of 8 dimensions, regular or not."""
    a, b, span = draws(60, 8), 1.2 * draws(50, 8, seed=1) + 0.3, draws(3, 8, seed=2)
    graded = torch.logspace(0, -9, 8, dtype=torch.float64)
    turn = torch.linalg.qr(draws(8, 8, seed=3))[0]
    return {
        "regular": (a, b),
        "fewer than dimensions": (a[:4], b[:5]),
        "two images each": (a[:2], b[:2]),
        "rank 3, one span": (a[:, :3] @ span, b[:, :3] @ span),
        "rank 3, two spans": (a[:, :3] @ span, b[:, :3] @ draws(3, 8, seed=4)),
        "constant features": (torch.cat([a[:, :5], 0 * a[:, 5:] + 3], 1), torch.cat([b[:, :5], 0 * b[:, 5:] + 3], 1)),
        "nearly singular": (a * graded @ turn, b * graded @ turn),
        "far from the origin": (a + 1e3, b + 1e3),
    }[name]


SMALL = [
    "regular", "fewer than dimensions", "two images each", "rank 3, one span", "rank 3, two spans", "constant features",
    "nearly singular", "far from the origin",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_fid_is_that_of_the_packages_and_of_fifty_digits(name: str):
    real, fake = small(name)
    expected = exact(real, fake)
    assert ours(real, fake) == pytest.approx(expected, rel=1e-11)
    for package in PACKAGES:
        assert package(real, fake) == pytest.approx(ours(real, fake), rel=1e-6), package.__name__


def by_features(real: Tensor, fake: Tensor) -> float:
    """The distance without covariances: tr (C_a C_b)^1/2 is the sum of singular values of X_a X_b^T / sqrt((n-1)(m-1))."""
    a, b = real - real.mean(0), fake - fake.mean(0)
    n, m = len(a) - 1, len(b) - 1
    traces = float(a.square().sum() / n + b.square().sum() / m)
    nuclear = float(torch.linalg.svdvals(a @ b.T).sum()) / math.sqrt(n * m)
    return float((real.mean(0) - fake.mean(0)).square().sum()) + traces - 2 * nuclear


def test_fid_of_few_images_in_many_dimensions():
    real = draws(48, 384)
    far, near = 1.2 * draws(40, 384, seed=1) + 1, real + 0.01 * draws(48, 384, seed=2)
    assert ours(real, far) == pytest.approx(by_features(real, far), rel=1e-12)
    for package in PACKAGES:
        assert package(real, far) == pytest.approx(ours(real, far), rel=1e-6)
    # here it is the packages that are off: square roots of rounding errors, 336 of them, beside a distance of 0.04
    assert ours(real, near) == pytest.approx(by_features(real, near), rel=1e-9)
    for package in PACKAGES:
        assert abs(package(real, near) / by_features(real, near) - 1) > 1e-4


def test_fid_of_equal_sets_is_zero():
    real = draws(20, 64)
    assert abs(ours(real, real.flip(0))) < 1e-11  # of traces of 128
    assert min(abs(package(real, real.flip(0))) for package in PACKAGES) > 1e-7


def test_torchmetrics_loses_the_digits_of_means_and_of_its_dtype():
    """It sums x x^T without subtracting a mean, and returns its result in the features' dtype."""
    real, fake = draws(60, 8) + 1e6, 1.2 * draws(50, 8, seed=1) + 1e6
    expected = exact(real, fake)
    assert ours(real, fake) == pytest.approx(expected, rel=1e-8)
    assert fidelity(real, fake) == pytest.approx(expected, rel=1e-6)
    assert abs(metrics(real, fake) / expected - 1) > 1e-5
    single = draws(60, 8).float(), 1.2 * draws(50, 8, seed=1).float()
    assert ours(*single) == pytest.approx(exact(*single), rel=1e-11)
    assert metrics(*single) == float(np.float32(metrics(*single))) != ours(*single)


def test_kid_draws_the_subsets_of_torch_fidelity_and_clean_fid(monkeypatch: pytest.MonkeyPatch):
    real, fake = draws(70, 6), 1.3 * draws(55, 6, seed=1) + 0.3
    mean, spread = kid(real, fake, subsets=20, subset_size=30, seed=5)
    theirs = kid_features_to_metric(real, fake, kid_subsets=20, kid_subset_size=30, rng_seed=5, verbose=False)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    monkeypatch.setattr(np.random, "choice", np.random.RandomState(5).choice)  # it draws from numpy's global state
    assert clean_fid.kernel_distance(fake.numpy(), real.numpy(), 20, 30) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("count", [2, 5, 60])
def test_kid_of_whole_sets_is_that_of_torchmetrics(count: int):
    real, fake = draws(count, 9), 1.3 * draws(count, 9, seed=1) + 0.3
    metric = KernelInceptionDistance(Identity(9), subsets=2, subset_size=count)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert kid(real, fake, subsets=2, subset_size=count)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_packages_keep_kid_in_float32():
    """Features of a size as Inception's against near ones: the kernels are about 1, their differences 1e-6."""
    real = draws(200, 16).abs().float() * 0.4
    fake = real.flip(0) + 1e-3
    mean, _ = kid(real, fake, subsets=1, subset_size=200)
    wide = kid_features_to_metric(
        real.double(), fake.double(), kid_subsets=1, kid_subset_size=200, rng_seed=0, verbose=False
    )
    assert mean == pytest.approx(wide["kernel_inception_distance_mean"], rel=1e-6)
    single = kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=200, rng_seed=0, verbose=False)
    metric = KernelInceptionDistance(Identity(16), subsets=1, subset_size=200)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    for value in (single["kernel_inception_distance_mean"], float(metric.compute()[0])):
        assert abs(value / mean - 1) > 1e-6


@pytest.mark.parametrize("counts", [(300, 200), (9, 300), (5, 4)])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall_are_those_of_torch_fidelity(counts: tuple[int, int], save_cpu_ram: bool):
    real, fake = draws(counts[0], 4), 0.7 * draws(counts[1], 4, seed=1) + 0.8
    theirs = prc_features_to_metric(fake, real, save_cpu_ram=save_cpu_ram, verbose=False)  # the generated ones first
    found = manifold(real, fake, k_coverage=3)
    assert found.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert found.recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert counts[0] < 10 or (0 < found.recall < 1 and 0 < found.precision < 1)


def test_torch_fidelity_loses_neighbours_far_from_the_origin():
    """It takes distances from |x|^2 + |y|^2 - 2 x.y, which an offset spoils, and precision and recall with them."""
    real, fake = draws(300, 4), 0.7 * draws(200, 4, seed=1) + 0.8
    near, far = manifold(real, fake), manifold(real + 1e8, fake + 1e8)
    assert vars(far) == pytest.approx(vars(near), abs=0.011)  # 1e8 leaves 8 digits of the features themselves
    theirs = prc_features_to_metric(fake + 1e8, real + 1e8, verbose=False)
    assert max(abs(theirs[name] - vars(near)[name]) for name in ("precision", "recall")) > 0.1


@pytest.mark.parametrize(("count", "splits"), [(100, 10), (103, 10), (10, 10), (7, 1)])
def test_inception_score_is_that_of_torch_fidelity(count: int, splits: int):
    logits = 3 * draws(count, 12)
    mean, spread = inception_score(logits, splits)
    theirs = isc_features_to_metric(logits, splits, shuffle=False)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-7, abs=1e-12)


def test_inception_score_and_torchmetrics(monkeypatch: pytest.MonkeyPatch):
    """It shuffles, cuts unequal splits where N is no multiple of their number, and its spread is that of a sample."""
    monkeypatch.setattr(torch, "randperm", torch.arange)
    logits = 3 * draws(100, 12)
    mean, spread = inception_score(logits)
    metric = InceptionScore(Identity(12))
    metric.update(logits)
    theirs = metric.compute()
    assert float(theirs[0]) == pytest.approx(mean, rel=1e-9)
    assert float(theirs[1]) == pytest.approx(spread * math.sqrt(10 / 9), rel=1e-9)
    metric = InceptionScore(Identity(12))
    metric.update(logits[:81])  # 9 chunks of 9
    assert float(metric.compute()[0]) == pytest.approx(inception_score(logits[:81], 9)[0], rel=1e-9)


def test_torch_fidelity_has_no_inception_score_for_an_impossible_class():
    logits = torch.tensor([[0.0, -2000], [0.0, -3000]])
    assert math.isnan(isc_features_to_metric(logits, 1)["inception_score_mean"])
    assert inception_score(logits, 1)[0] == pytest.approx(1)
