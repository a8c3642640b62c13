"""Distances between sets of features by kernels: KID and CMMD, both of them squared maximum mean discrepancies.

For a kernel k and sets x (N, D) and y (M, D),

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),

which is 0 for equal distributions. The mean of k over all pairs but those of a vector with itself estimates the first two
terms without bias and can end below 0; with these pairs the estimate is never negative (Gretton et al. 2012, JMLR 13, eq. 3
and 5). Everything here is float64 on the CPU.
"""

import numpy as np
import torch
from torch import Tensor


def kid(real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    Bińkowski et al. 2018, arXiv 1801.01401, section 4. Each of the `subsets` draws `subset_size` vectors without
    replacement from real (N, D), then from fake (M, D), by numpy's RandomState(seed), as torch-fidelity does: its numbers
    are the same for the same seed. The standard deviation is that between subsets, no error of the mean: subsets overlap.

    Raises ValueError for sets that cannot be compared or are smaller than a subset, and for fewer than 2 in a subset.
    """
    real, fake = checked(real, fake)
    fewest = min(len(real), len(fake))
    if not 2 <= subset_size <= fewest or subsets < 1:
        raise ValueError(
            f"KID of {subsets} subsets of {subset_size} images is not possible with {len(real)} real and {len(fake)} "
            f"generated ones; allowed are 1 subset or more of 2 to {fewest}: take smaller subsets or more images"
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = real[torch.from_numpy(draw.choice(len(real), subset_size, replace=False))]
        y = fake[torch.from_numpy(draw.choice(len(fake), subset_size, replace=False))]
        among_x, among_y = ((_cubic(z, z).sum() - _cubic_diagonal(z).sum()) / (subset_size - 1) for z in (x, y))
        values.append(float((among_x + among_y - 2 * _cubic(x, y).sum() / subset_size) / subset_size))
    return float(np.mean(values)), float(np.std(values))


def cubic_means(real: Tensor, fake: Tensor, chunk: int = 1000) -> tuple[Tensor, Tensor, float]:
    """Means of KID's kernel for each generated image, over the other generated ones (M,) and over the real ones (M,),

    and the mean over all pairs of different real images. With a and b the first two and c the third, the unbiased MMD^2
    of whole sets is a.mean() - 2 b.mean() + c. Memory is proportional to chunk (N + M). Raises ValueError as `kid`.
    """
    real, fake = checked(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{len(real)} real and {len(fake)} generated images; KID needs 2 of each: type --count 2 or more")
    among, across = (torch.cat([_cubic(part, z).sum(1) for part in fake.split(chunk)]) for z in (fake, real))
    pairs = sum(float(_cubic(part, real).sum()) for part in real.split(chunk)) - float(_cubic_diagonal(real).sum())
    among = (among - _cubic_diagonal(fake)) / (len(fake) - 1)
    return among, across / len(real), pairs / (len(real) * (len(real) - 1))


def cmmd(real: Tensor, fake: Tensor, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 1000) -> float:
    """scale times the biased MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), pairs of a vector with itself included.

    Jayasumana et al. 2024, arXiv 2401.09603, section 4 and its published code, whose sigma and scale are the defaults.
    Features real (N, D) and fake (M, D) are taken as they are: the paper's are CLIP's image embeddings divided by their
    length. Memory is proportional to chunk (N + M). Raises ValueError for sets that cannot be compared.
    """
    real, fake = checked(real, fake)
    if not sigma > 0:
        raise ValueError(f"a kernel of width {sigma} is not possible; type a sigma above 0, such as CMMD's own 10")
    centre = real.mean(0)  # distances do not know of it, and their digits do
    real, fake = real - centre, fake - centre

    def mean(x: Tensor, y: Tensor) -> float:
        # of the kernel - 1: ones cancel in the sum of the three, and with them the digits of a small distance would go
        parts = (torch.expm1(squared_distances(part, y) / (-2 * sigma**2)).sum() for part in x.split(chunk))
        return sum(map(float, parts)) / (len(x) * len(y))

    return scale * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2, shape (N, M), to about 1e-16 of the larger of the lengths squared."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def checked(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU. Raises ValueError where they are no sets of finite features from one extractor."""
    for name, features in (("real", real), ("generated", fake)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name} features of shape {tuple(features.shape)}; allowed is (N, D) with N of 1 or more")
        if not features.isfinite().all():
            raise ValueError(f"the {name} images or the extractor's weights hold NaN or infinity")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and {fake.shape[1]} dimensions cannot be compared: use one extractor")
    return real.detach().to("cpu", torch.float64), fake.detach().to("cpu", torch.float64)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _cubic_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
