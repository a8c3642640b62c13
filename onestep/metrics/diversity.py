"""Diversity: how far the pictures of one prompt, or of one class, lie apart."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Group = TypeVar("Group", bound=Hashable)
Distance = Callable[[Tensor, Tensor], Tensor]
"""(n, ...) and (m, ...) to all distances (n, m)."""


@dataclass(frozen=True)
class Diversity:
    """Means over groups, every group counting the same."""

    mean: float
    std: float
    """Between groups, of which each has its own mean distance; unbiased, NaN for one group."""
    groups: int
    """Those with two pictures or more; the others say nothing and are left out."""
    by_group: dict[Hashable, float]


def diversity(features: Tensor, groups: Sequence[Hashable], distance: Distance) -> Diversity:
    """Mean distance of two different pictures of the same prompt or class, over all pairs of a group, then over groups.

        d_g = 2 / (n (n - 1)) sum_{i < j} d(f_i, f_j)

    The diversity of repeated prompts in the papers (mean pairwise LPIPS in Zhu et al. 2017, arXiv 1711.11586) with
    any `distance`. features: one row an image, float64 inside. Every pair is counted once, so that the
    number of pictures of a group does not move what it estimates: for Gaussian features the squared distance has the mean
    2 tr(C). Raises ValueError for unequal numbers, and where no group has two pictures.
    """
    if len(features) != len(groups):
        raise ValueError(f"{len(features)} images and {len(groups)} prompts or classes; give one an image")
    by_group = {group: _mean(features[rows], distance) for group, rows in members(groups).items() if len(rows) > 1}
    if not by_group:
        raise ValueError(
            "diversity needs 2 images or more of a prompt or class, and every image has another: make more of each"
        )
    means = torch.tensor(list(by_group.values()), dtype=torch.float64)
    std = float(means.std()) if len(means) > 1 else float("nan")
    return Diversity(float(means.mean()), std, len(means), by_group)


def members(groups: Sequence[Group]) -> dict[Group, list[int]]:
    """The indices of each prompt or class, which come in the order in which they are first met."""
    found: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return found


def _mean(features: Tensor, distance: Distance) -> float:
    found = distance(features, features).double()
    row, column = torch.triu_indices(len(features), len(features), offset=1)
    return float(found[row, column].mean())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the angle between features, 0 to 2; the length of a feature plays no part."""
    return 1 - F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, exact in float64."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2."""
    return euclidean(a, b) ** 2


DISTANCES: dict[str, Distance] = {"cosine": cosine, "euclidean": euclidean, "squared": squared}
"""Of features, by name."""
