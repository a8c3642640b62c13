"""Precision, recall, density and coverage: fidelity and variety of generated images, told apart.

Each set of features is made a manifold: the union of balls B(x, r_k(x)) around its vectors, r_k(x) being the distance from
x to its k-th nearest neighbour in the same set, x itself not counted. With N real vectors x and M generated ones y:

    precision = 1/M #{y : y in the real manifold}                       k = 3, closed balls
    recall    = 1/N #{x : x in the generated manifold}                  k = 3, closed balls
    density   = 1/(k M) sum over y and x of [y in B(x, r_k(x))]         k = 5, open balls
    coverage  = 1/N #{x : some y in B(x, r_k(x))}                       k = 5, open balls

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2. Density and coverage: Naeem et al. 2020,
arXiv 2002.09797, section 3. The balls differ on their surface alone; open ones give equal sets the density 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PRECISION_K, COVERAGE_K = 3, 5


@dataclass(frozen=True)
class Manifold:
    """Fractions in [0, 1], but density, which has no upper limit and is 1 for equal distributions."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Members:
    """What each image adds to the four numbers, which are means of these but for density's 1/k; float64."""

    inside: Tensor
    """(M,): 1 for a generated image in the real manifold, else 0."""
    recalled: Tensor
    """(N,): 1 for a real image in the generated manifold, else 0."""
    within: Tensor
    """(M,): in how many open balls of real images a generated one lies."""
    covered: Tensor
    """(N,): 1 for a real image whose open ball holds a generated one, else 0."""


def manifold(real: Tensor, fake: Tensor, k: int = PRECISION_K, k_coverage: int = COVERAGE_K, chunk: int = 500) -> Manifold:
    """Compare features real (N, D) and fake (M, D); `k` is that of precision and recall, `k_coverage` that of the others.

    Distances are float64 sums of squared differences on the CPU, `chunk` rows at a time: N^2 + M^2 + N M of them, in
    memory proportional to chunk (N + M). The result does not depend on `chunk`. Raises ValueError for sets that cannot be
    compared, are too small for their k, or are not finite.
    """
    of = members(real, fake, k, k_coverage, chunk)
    return Manifold(
        precision=float(of.inside.sum()) / len(fake),
        recall=float(of.recalled.sum()) / len(real),
        density=float(of.within.sum()) / (k_coverage * len(fake)),
        coverage=float(of.covered.sum()) / len(real),
    )


def members(real: Tensor, fake: Tensor, k: int = PRECISION_K, k_coverage: int = COVERAGE_K, chunk: int = 500) -> Members:
    """The four numbers image by image, as `manifold` averages them; arguments and errors are its own."""
    real, fake = _checked(real, "real", max(k, k_coverage)), _checked(fake, "generated", k)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and {fake.shape[1]} dimensions cannot be compared: use one extractor")
    nearest = neighbours(real, max(k, k_coverage), chunk)
    real_radius, ball, fake_radius = nearest[:, k - 1], nearest[:, k_coverage - 1], neighbours(fake, k, chunk)[:, k - 1]
    inside, within = [], []
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for rows, distance in _distances(fake, real, chunk):
        inside.append((distance <= real_radius).any(1))
        recalled |= (distance <= fake_radius[rows, None]).any(0)
        in_ball = distance < ball
        within.append(in_ball.sum(1))
        covered |= in_ball.any(0)
    return Members(torch.cat(inside).double(), recalled.double(), torch.cat(within).double(), covered.double())


def neighbours(features: Tensor, k: int, chunk: int = 500) -> Tensor:
    """Distances of each vector to its k nearest among the others, ascending, shape (N, k); features (N, D), k < N."""
    # the first is the vector itself, at a distance of exactly 0 as its copies are
    return torch.cat([d.topk(k + 1, largest=False).values[:, 1:] for _, d in _distances(features, features, chunk)])


def _distances(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, |a_i - b_j|) for some rows i of `a` after the other, shape (rows, len(b)).

    Not |a|^2 + |b|^2 - 2 a b: that loses half of the digits where vectors are near each other.
    """
    for start in range(0, len(a), chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(features: Tensor, name: str, k: int) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"{name} features of shape {tuple(features.shape)}; allowed is (N, D)")
    if len(features) <= k:
        raise ValueError(f"{len(features)} {name} images have no {k} nearest neighbours each: type --count {k + 1} or more")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError(f"the {name} images or the extractor's weights hold NaN or infinity")
    return features
