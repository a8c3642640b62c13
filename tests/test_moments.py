"""Moments do not depend on how their vectors come, and the Fréchet distance of Gaussians is the closed form."""

import math

import pytest
import torch
from torch import Tensor

from onestep.metrics.frechet import BLOCK, Moments, frechet_distance


def draws(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def streamed(features: Tensor, size: int) -> Moments:
    moments = Moments(features.shape[1])
    for part in features.split(size):
        moments.update(part)
    return moments


def equal(a: Moments, b: Moments) -> bool:
    return a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)


@pytest.mark.parametrize("count", [2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 9])
def test_every_batch_size_gives_the_same_bits(count: int):
    features = draws(count, 19) * 3 + 7
    whole = streamed(features, count)
    torch.testing.assert_close(whole.covariance, torch.cov(features.double().T), rtol=1e-12, atol=1e-12)
    for size in (1, 7, BLOCK, BLOCK + 1, 100):
        assert equal(streamed(features, size), whole)


def test_looking_in_between_changes_nothing():
    features = draws(3 * BLOCK + 5, 8)
    looked = Moments(8)
    for part in features.split(10):
        looked.update(part)
        if looked.count > 1:
            torch.testing.assert_close(looked.covariance, torch.cov(features[: looked.count].double().T))
        torch.testing.assert_close(looked.mean, features[: looked.count].double().mean(0), rtol=1e-12, atol=1e-14)
    assert equal(looked, streamed(features, 50))


def test_merged_parts_equal_the_whole_up_to_rounding():
    features = draws(1000, 8) + 100
    whole, merged = streamed(features, 1000), Moments(8)
    for part in features.tensor_split([3, 70, 500]):
        merged.merge(streamed(part, 64))
    merged.update(features[:0])
    assert merged.count == 1000 and not equal(merged, whole)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


# Gaussians


def rotation(dimensions: int, seed: int) -> Tensor:
    return torch.linalg.qr(draws(dimensions, dimensions, seed).double())[0]


@pytest.mark.parametrize("smallest", [0.5, 1e-14, 0.0])
def test_gaussians_with_one_basis_have_the_closed_form(smallest: float):
    """|m_a - m_b|^2 + sum (s_a - s_b)^2 over standard deviations, in a rotated basis; singular ones too."""
    s_a = torch.cat([torch.linspace(1, 3, 20), torch.full((12,), smallest)]).double()
    s_b, basis = s_a.roll(1) * 1.1, rotation(32, 1)
    mean = torch.linspace(-1, 1, 32).double()
    a = Moments.of(50, mean, (basis * s_a.square()) @ basis.T, "a")
    b = Moments.of(50, mean + 0.1, (basis * s_b.square()) @ basis.T, "b")
    expected = 32 * 0.01 + float((s_a - s_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12 * float(s_a.square().sum()))


def test_scaled_covariances_without_a_common_basis_have_the_closed_form():
    """C_b = A C_a A for a positive A: A is the optimal transport, so that d^2 = tr((1 - A) C_a (1 - A))."""
    base = draws(10, 10, 2).double()
    c_a, transport = base @ base.T + torch.eye(10), draws(10, 10, 3).double()
    transport = transport @ transport.T / 10 + 0.2 * torch.eye(10)
    c_b = transport @ c_a @ transport
    assert (c_a @ c_b - c_b @ c_a).abs().max() > 1
    a, b = (Moments.of(9, torch.zeros(10), (c + c.T) / 2, "test") for c in (c_a, c_b))
    move = torch.eye(10).double() - transport
    assert frechet_distance(a, b) == pytest.approx(float((move @ c_a @ move).trace()), rel=1e-11)


def test_samples_of_gaussians_come_near_the_closed_form():
    """With n vectors the distance lies around the closed form with a bias and a spread that fall with n."""
    s_b = torch.linspace(0.5, 2, 6)
    expected = 6 * 0.25 + float((1 - s_b).square().sum())
    values = [frechet_distance(streamed(draws(5000, 6, 2 * i), 5000), streamed(draws(5000, 6, 2 * i + 1) * s_b + 0.5, 5000))
              for i in range(20)]  # fmt: skip
    mean, spread = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    assert 0.01 < spread < 0.2  # a standard error of 0.02 at most
    assert abs(mean - expected) < 4 * spread / math.sqrt(20) + 0.02  # the bias at this n is below 0.02
