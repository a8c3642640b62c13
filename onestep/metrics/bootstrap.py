"""Confidence intervals of scores, by the bootstrap over images: what other images of the same kind would give.

The images that were scored are drawn anew, with replacement, `resamples` times (Efron 1979), and the interval holds the
middle 95 % of what comes out. Scores that are means over images are computed anew each time. Distances are not, for two
reasons: a resample holds images twice, which adds a second bias to that of a distance from finitely many images, so that
the resampled distances may all lie above the measured one; and each would cost another matrix root. They are replaced by
their linear part around the measured value (Hampel 1974; Efron 1982, The Jackknife, the Bootstrap and Other Resampling
Plans, section 6.3), a mean of one number an image, the influence of that image on the distance. Means have no bias.

The interval of a distance is thus one of its expectation *at this number of images* with this reference, bias of the number
included: that is what repeats with other seeds. It says nothing of the distance from infinitely many images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .frechet import Moments, frechet_distance, root
from .kernel import cubic_means
from .manifold import COVERAGE_K, members

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A score and where it lies with a confidence of LEVEL."""

    estimate: float
    low: float
    high: float


def mean_interval(values: Tensor, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Of the mean of one number an image, such as 1 for a right class and 0 for a wrong one; values (N,).

    Percentiles of the resampled means. Raises ValueError for fewer than 2 images and values that are not finite.
    """
    return _around(float(values.double().mean()) if len(values) else 0.0, values, resamples, seed)


def frechet_interval(fake: Tensor, real: Moments, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Of the Fréchet distance of generated features fake (N, D) from a fixed reference.

    Too wide, not too narrow, where the distance is hardly larger than its own bias or N is not well above D. Raises
    ValueError for features that `Moments` refuses and for fewer than 2.
    """
    moments = Moments(real.dimensions)
    moments.update(fake)
    return _around(frechet_distance(moments, real), frechet_influence(fake, real), resamples, seed)


def frechet_influence(fake: Tensor, real: Moments) -> Tensor:
    """What each generated image adds to d^2 = frechet_distance, to first order; fake (N, D), result (N,), its mean near 0.

    With the moments m, C of fake and m_r, C_r of real, d^2 changes with m by 2 (m - m_r) and with C by I - T, where
    T = C^(-1/2) (C^(1/2) C_r C^(1/2))^(1/2) C^(-1/2) is the optimal transport from N(m, C) to N(m_r, C_r) (Dowson &
    Landau 1982; Muzellec & Cuturi 2018, arXiv 1805.07594, eq. 3 and 6). The influence of x is therefore
    2 (x - m).(m - m_r) + (x - m)^T (I - T) (x - m) - tr((I - T) C). Where C is singular, its inverse is taken on its range.
    """
    moments = Moments(real.dimensions)
    moments.update(fake)
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    scale, basis = values[kept].sqrt(), vectors[:, kept]
    middle = root(basis.T @ real.covariance @ basis * torch.outer(scale, scale))
    transport = basis @ (middle / torch.outer(scale, scale)) @ basis.T
    centred = fake.detach().to("cpu", torch.float64) - moments.mean
    bend = torch.eye(real.dimensions, dtype=torch.float64) - transport
    influence = 2 * centred @ (moments.mean - real.mean) + (centred @ bend * centred).sum(1)
    return influence - (bend * moments.covariance).sum()


def kid_interval(real: Tensor, fake: Tensor, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Of KID of generated features fake (M, D) from fixed real ones (N, D).

    The estimate is the unbiased MMD^2 of both whole sets, which `kernel.kid` estimates from subsets. An image's influence
    is 2 (mean of k over the other generated images - mean of k over the real ones). Raises ValueError as
    `kernel.cubic_means`.
    """
    among, across, pairs = cubic_means(real, fake)
    return _around(float(among.mean() - 2 * across.mean()) + pairs, 2 * (among - across), resamples, seed)


def manifold_intervals(real: Tensor, fake: Tensor, *, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Of precision, recall, density and coverage, by these names, with the numbers of neighbours that `manifold` has.

    Precision and density are means over generated images, recall and coverage over real ones, and it is these that are
    drawn anew; balls stay where they are, as resampled copies of an image would have balls of radius 0.
    Raises ValueError as `manifold.members`.
    """
    of = members(real, fake)
    values = {"precision": of.inside, "recall": of.recalled, "density": of.within / COVERAGE_K, "coverage": of.covered}
    return {name: mean_interval(each, resamples=resamples, seed=seed) for name, each in values.items()}


def _around(estimate: float, values: Tensor, resamples: int, seed: int, chunk: int = 20) -> Interval:
    """The estimate, and around it the percentiles of the resampled means of `values` (N,), less their own mean."""
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}; an interval needs 2 finite ones or more: type --count 2")
    if resamples < 100:
        raise ValueError(f"{resamples} resamples do not tell {LEVEL:.0%} of anything; type 100 or more, such as 1000")
    numbers, draw = values.detach().to("cpu", torch.float64).numpy(), np.random.default_rng(seed)
    means = np.concatenate(
        [
            numbers[draw.integers(len(numbers), size=(min(chunk, resamples - start), len(numbers)))].mean(1)
            for start in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means - numbers.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, estimate + float(low), estimate + float(high))
