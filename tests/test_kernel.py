"""KID and CMMD against loops, and against closed forms for Gaussians."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.metrics.kernel import cmmd, cubic_means, kid

SOURCE = torch.Generator().manual_seed(0)


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=SOURCE, dtype=torch.float64)


def unbiased(real: Tensor, fake: Tensor) -> float:
    """The definition, one pair at a time."""

    def k(x: Tensor, y: Tensor) -> float:
        return (sum(a * b for a, b in zip(x.tolist(), y.tolist())) / len(x) + 1) ** 3

    n, m = len(real), len(fake)
    xx = sum(k(real[i], real[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(fake[i], fake[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(x, y) for x in real for y in fake) / (n * m)


def test_a_subset_of_everything_is_the_definition():
    real, fake = draws(12, 5), draws(12, 5) * 1.5 + 0.4
    expected = unbiased(real, fake)
    mean, spread = kid(real, fake, subsets=3, subset_size=12)
    assert mean == pytest.approx(expected, rel=1e-12) and spread == pytest.approx(0, abs=1e-12)


def test_subsets_are_those_of_the_seed():
    real, fake, draw = draws(30, 4), draws(25, 4) + 0.5, np.random.RandomState(7)
    values = []
    for _ in range(5):
        x, y = draw.choice(30, 8, replace=False), draw.choice(25, 8, replace=False)
        values.append(unbiased(real[x], fake[y]))
    mean, spread = kid(real, fake, subsets=5, subset_size=8, seed=7)
    assert mean == pytest.approx(np.mean(values), rel=1e-12) and spread == pytest.approx(np.std(values), rel=1e-9)
    assert kid(real, fake, subsets=5, subset_size=8, seed=8)[0] != mean


def test_unequal_sets_whatever_the_chunk():
    real, fake = draws(9, 3), draws(14, 3) * 2
    for chunk in (1, 4, 100):
        among, across, pairs = cubic_means(real, fake, chunk)
        assert float(among.mean() - 2 * across.mean()) + pairs == pytest.approx(unbiased(real, fake), rel=1e-12)


def test_gaussians_have_the_kid_of_their_moments():
    """(x.y / D + 1)^3 = sum over p of binom(3, p) D^-p <x^p, y^p>: MMD^2 compares the tensors E x, E x x, E x x x.

    For Gaussians E x_i x_j x_k = m_i m_j m_k + m_i C_jk + m_j C_ik + m_k C_ij.
    """

    def tensors(mean: Tensor, c: Tensor) -> list[Tensor]:
        third = torch.einsum("i,j,k->ijk", mean, mean, mean)
        third = third + sum(torch.einsum(f"{a},{b}->ijk", mean, c) for a, b in (("i", "jk"), ("j", "ik"), ("k", "ij")))
        return [mean, c + torch.outer(mean, mean), third]

    d, factor = 3, draws(3, 3)
    m_x, m_y = torch.zeros(d).double(), torch.tensor([0.5, -0.2, 0.3]).double()
    pairs = zip(tensors(m_x, torch.eye(d).double()), tensors(m_y, factor @ factor.T))
    expected = sum(math.comb(3, p) * d**-p * float((x - y).square().sum()) for p, (x, y) in enumerate(pairs, 1))
    values = [kid(draws(200, d), draws(200, d) @ factor.T + m_y, subsets=1, subset_size=200)[0] for _ in range(200)]
    error = np.std(values) / math.sqrt(200)
    assert error < 0.1 * expected and abs(np.mean(values) - expected) < 4 * error
    same = [kid(draws(50, d), draws(50, d), subsets=1, subset_size=50)[0] for _ in range(200)]
    assert min(same) < 0 and abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(200)


def test_cmmd_is_its_definition_whatever_the_chunk():
    real, fake = draws(11, 4), draws(7, 4) + 1
    wide = [each.numpy().astype(np.longdouble) for each in (real, fake)]

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * 3.0**2)).mean()

    expected = 500 * float(mean(wide[0], wide[0]) + mean(wide[1], wide[1]) - 2 * mean(*wide))
    for chunk in (1, 5, 100):
        assert cmmd(real, fake, sigma=3.0, scale=500.0, chunk=chunk) == pytest.approx(expected, rel=1e-13)


def test_gaussians_have_the_cmmd_of_the_integral():
    """E exp(-|x - y|^2 / 2 s^2) = det(1 + S / s^2)^-1/2 exp(-d^T (s^2 + S)^-1 d / 2), x - y ~ N(d, S); 1 on the diagonal."""
    d, n, s, c = 4, 60, 2.0, 1.5

    def mean(shift: float, variance: float) -> float:
        return (1 + variance / s**2) ** (-d / 2) * math.exp(-d * shift**2 / (s**2 + variance) / 2)

    within = sum(1 / n + (1 - 1 / n) * mean(0.0, 2 * v) for v in (1.0, c**2))
    expected = 1000 * (within - 2 * mean(0.7, 1 + c**2))
    values = [cmmd(draws(n, d), draws(n, d) * c + 0.7, sigma=s) for _ in range(300)]
    error = np.std(values) / math.sqrt(300)
    assert error < 0.05 * expected and abs(np.mean(values) - expected) < 4 * error


def test_cmmd_keeps_the_digits_of_near_sets_far_from_the_origin():
    """For small differences CMMD is scale |m_x - m_y|^2 / sigma^2; a float32 kernel near 1 has none of it left."""
    real = draws(40, 6) * 1e-3
    fake = real + 1e-7
    expected = 1000 * 6 * 1e-14 / 100
    assert cmmd(real + 5, fake + 5) == pytest.approx(expected, rel=1e-4, abs=0)
    single = [torch.exp(-torch.cdist(x.float(), y.float()).square() / 200).mean() for x, y in ((real, real), (fake, fake))]
    across = torch.exp(-torch.cdist(real.float(), fake.float()).square() / 200).mean()
    assert abs(float(1000 * (single[0] + single[1] - 2 * across)) - expected) > 0.5 * expected


@pytest.mark.parametrize(
    ("real", "fake", "words"),
    [
        (torch.zeros(9), torch.zeros(9, 2), r"real features of shape \(9,\)"),
        (torch.zeros(9, 2), torch.zeros(0, 2), r"generated features of shape \(0, 2\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "2 and 3 dimensions"),
        (torch.zeros(9, 2), torch.full((9, 2), math.inf), "generated images .* NaN or infinity"),
    ],
)
def test_what_cannot_be_compared_is_refused(real: Tensor, fake: Tensor, words: str):
    for distance in (lambda x, y: kid(x, y, subset_size=2), cmmd, cubic_means):
        with pytest.raises(ValueError, match=words):
            distance(real, fake)


def test_subsets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"5 subsets of 1000 .* 9 real and 8 generated ones; allowed are .* 2 to 8"):
        kid(torch.zeros(9, 2), torch.zeros(8, 2), subsets=5)
    for options in ({"subset_size": 1}, {"subset_size": 3, "subsets": 0}):
        with pytest.raises(ValueError, match="is not possible"):
            kid(torch.zeros(9, 2), torch.zeros(9, 2), **options)
    with pytest.raises(ValueError, match="a sigma above 0"):
        cmmd(torch.zeros(9, 2), torch.zeros(9, 2), sigma=0.0)
