"""Streaming first and second moments, and the Fréchet distance between two Gaussians that have them.

Everything here is float64 on the CPU, whatever device and precision the features come in.
"""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import replaced

BLOCK = 64
"""Vectors whose moments are taken at once, whatever the size of the batches that they come in."""


class Moments:
    """Count, mean and scatter of feature vectors of `dimensions` entries, in one pass and constant memory.

    Vectors are taken in blocks of BLOCK, in the order in which they come, and blocks are merged in that order by Chan,
    Golub & LeVeque 1979, eq. 2.1: with n = n_a + n_b and delta = mean_b - mean_a, mean = mean_a + delta n_b / n and
    scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n. The same vectors in the same order thus give the same
    bits for every size of batches; `measure.seen` makes that the order of images for several processes.
    """

    def __init__(self, dimensions: int):
        self.dimensions = dimensions
        self._count, self._mean = 0, torch.zeros(dimensions, dtype=torch.float64)  # of whole blocks
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)
        self._block, self._filled = torch.empty(BLOCK, dimensions, dtype=torch.float64), 0

    def update(self, features: Tensor) -> None:
        """Take in features, shape (B, dimensions). Raises ValueError for another shape or values not finite."""
        if features.ndim != 2 or features.shape[1] != self.dimensions:
            raise ValueError(f"features of shape {tuple(features.shape)}; allowed is (B, {self.dimensions})")
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise ValueError("features are not finite: the images or the extractor's weights hold NaN or infinity")
        while len(features):
            taken = features[: BLOCK - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            features = features[len(taken) :]
            if self._filled == BLOCK:
                self._close_block()

    def merge(self, other: "Moments") -> None:
        """Take in all that `other` has seen. Raises ValueError where the dimensions differ.

        Where the parts were cut shows in the last digits: `update` with all vectors has no such trace.
        """
        if other.dimensions != self.dimensions:
            raise ValueError(f"moments of {other.dimensions} dimensions cannot join those of {self.dimensions}")
        part = other._closed()
        self._close_block()
        if part.count:
            self._add(part._count, part._mean, part._scatter)

    def _close_block(self) -> None:
        block, self._filled = self._block[: self._filled], 0
        if len(block):
            mean = block.mean(0)
            centred = block - mean
            self._add(len(block), mean, centred.T @ centred)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._count + count
        delta = mean - self._mean
        self._scatter.add_(scatter).addr_(delta, delta, alpha=self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def _closed(self) -> "Moments":
        """The same moments with the last, open block counted in; the object goes on with its blocks where it was."""
        if not self._filled:
            return self
        closed = copy.deepcopy(self)
        closed._close_block()
        return closed

    @property
    def count(self) -> int:
        return self._count + self._filled

    @property
    def mean(self) -> Tensor:
        """Mean of all vectors, shape (D,)."""
        return self._closed()._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance scatter / (N - 1), shape (D, D). Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, and there are {self.count}: type --count 2 or more")
        return self._closed()._scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write n, mean and cov (unbiased, its lower triangle by rows, D (D + 1) / 2 numbers) as safetensors.

        An older file stays whole until this one is complete.
        """
        row, column = torch.tril_indices(self.dimensions, self.dimensions)
        tensors = {"n": torch.tensor([self.count]), "mean": self.mean, "cov": self.covariance[row, column]}
        with replaced(path) as partial:
            save_file(tensors, partial)

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Moments that `save` wrote. Raises ValueError for a file that is missing, damaged or something else."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is not a readable statistics file ({error}); {_EXPECTED}") from error
        if set(tensors) != {"n", "mean", "cov"} or tensors["n"].numel() != 1 or tensors["mean"].ndim != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{path} is not a statistics file: it holds {shapes}; {_EXPECTED}")
        mean, triangle = tensors["mean"], tensors["cov"]
        if triangle.shape != (len(mean) * (len(mean) + 1) // 2,):
            raise ValueError(f"{path} holds mean {tuple(mean.shape)} and cov {tuple(triangle.shape)}; {_EXPECTED}")
        row, column = torch.tril_indices(len(mean), len(mean))
        covariance = triangle.new_zeros(len(mean), len(mean))
        covariance[row, column] = covariance[column, row] = triangle
        return cls.of(int(tensors["n"]), mean, covariance, str(path))

    @classmethod
    def of(cls, count: int, mean: Tensor, covariance: Tensor, name: str) -> "Moments":
        """Moments from known values; `name` says in errors where they came from.

        Raises ValueError where they cannot be the moments of `count` vectors.
        """
        mean, covariance = mean.double(), covariance.double()
        if count < 2 or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{name} holds n = {count}, mean {tuple(mean.shape)} and cov {tuple(covariance.shape)}; {_EXPECTED}"
            )
        symmetric = torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8)
        if not (mean.isfinite().all() and covariance.isfinite().all() and symmetric and (covariance.diag() >= 0).all()):
            raise ValueError(f"{name} holds values that no images have: not finite, or not a covariance; {_EXPECTED}")
        moments = cls(len(mean))
        moments._count, moments._mean, moments._scatter = count, mean, covariance * (count - 1)
        return moments


_EXPECTED = "expected is n >= 2, a mean (D,) and a symmetric covariance (D, D): write the file again from its images"


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    The eigenvalues of (C_a C_b)^(1/2) are the singular values of C_a^(1/2) C_b^(1/2). Taken so, and not as square roots
    of eigenvalues of a product, those that are zero come out as 1e-16 of the largest and not as 1e-8 of it: the
    distance keeps its digits where covariances are singular. Raises ValueError for unequal dimensions.
    """
    if a.dimensions != b.dimensions:
        raise ValueError(
            f"statistics of {a.dimensions} and {b.dimensions} dimensions cannot be compared: they come from different "
            "extractors; compute both with the same one"
        )
    c_a, c_b = a.covariance, b.covariance
    trace_root = torch.linalg.svdvals(root(c_a) @ root(c_b)).sum()
    return float((a.mean - b.mean).square().sum() + c_a.trace() + c_b.trace() - 2 * trace_root)


def root(covariance: Tensor) -> Tensor:
    """The symmetric positive square root of a covariance (D, D).

    Eigenvalues that float64 cannot tell from 0, up to D * 2.2e-16 of the largest, are 0: their roots would be 1e-8 of its.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, 0)
    return (vectors * values.sqrt()) @ vectors.T
