"""Diversity against its closed forms, and LPIPS against its own package."""

import math

import pytest
import torch
from torch import Tensor

from onestep.metrics.diversity import DISTANCES, cosine, diversity, euclidean, squared
from onestep.metrics.lpips import LPIPS


def features(count: int, dimensions: int = 5) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_squared_distance_is_twice_the_trace_of_the_covariance():
    """Exactly, for any set: the mean over pairs of |f_i - f_j|^2 is 2 tr C with C unbiased."""
    given = features(9) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.1, 5.0], dtype=torch.float64)) + 100
    found = diversity(given, ["a"] * 9, squared)
    assert found.mean == pytest.approx(2 * float(given.T.cov().trace()), rel=1e-12)
    assert math.isnan(found.std) and found.groups == 1


def test_euclidean_distance_of_a_gaussian_line_has_the_closed_form():
    """E |x - y| = 2 sigma / sqrt(pi)."""
    found = diversity(3 * features(4000, 1), [0] * 4000, euclidean)
    assert found.mean == pytest.approx(2 * 3 / math.sqrt(math.pi), rel=0.03)


def test_cosine_distance_knows_angles_and_no_lengths():
    given = torch.tensor([[1.0, 0.0], [7.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    expected = torch.tensor([[0.0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(cosine(given, given), expected)
    assert set(DISTANCES) == {"cosine", "euclidean", "squared"}


def test_groups_count_the_same_whatever_their_number_of_images():
    given = torch.tensor([[0.0], [10.0], [1.0], [0.0], [4.0], [9.0], [1.0]])
    found = diversity(given, ["p", "q", "p", "p", "q", "alone", "p"], euclidean)
    # p: 0, 1, 0, 1 -> 4 of 6 pairs at 1; q: 10, 4 -> 6; the picture alone says nothing
    assert found.by_group == pytest.approx({"p": 4 / 6, "q": 6})
    assert found.mean == pytest.approx((4 / 6 + 6) / 2) and found.groups == 2
    assert found.std == pytest.approx((6 - 4 / 6) / math.sqrt(2))


def test_distances_between_groups_play_no_part():
    near, far = features(6), features(6)
    far[3:] += 1e3
    groups = [0, 0, 0, 1, 1, 1]
    assert diversity(far, groups, euclidean).mean == pytest.approx(diversity(near, groups, euclidean).mean, rel=1e-9)


def test_what_has_no_diversity_is_refused():
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        diversity(features(3), ["a", "b"], cosine)
    with pytest.raises(ValueError, match="2 images or more of a prompt"):
        diversity(features(3), ["a", "b", "c"], cosine)
    with pytest.raises(ValueError, match="2 images or more of a prompt"):
        diversity(features(0), [], cosine)


# LPIPS on an AlexNet with random weights


def alexnet() -> dict[str, Tensor]:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    return {name: value for name, value in alexnet().state_dict().items() if name.startswith("features.")}


def test_lpips_is_that_of_the_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.save(state := alexnet(), tmp_path / "alexnet.pth")
    distance = LPIPS(tmp_path / "alexnet.pth")
    known = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for number, part in enumerate(
        (known.net.slice1, known.net.slice2, known.net.slice3, known.net.slice4, known.net.slice5)
    ):
        for name, parameter in part.named_parameters():
            assert parameter.shape == state[f"features.{name}"].shape, number
            parameter.data.copy_(state[f"features.{name}"])
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = torch.tensor([[float(known(a[None], b[None])) for b in images] for a in images])
    found = distance(images, images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert found.diag().abs().max() < 1e-6 and found[0, 1] > 1e-4
    groups = diversity(images, ["p", "p", "p"], distance)
    assert groups.mean == pytest.approx(float(expected[0, 1] + expected[0, 2] + expected[1, 2]) / 3, rel=1e-3)


def test_lpips_without_its_weights_is_refused(tmp_path):
    pytest.importorskip("lpips")
    with pytest.raises(ValueError, match=r"no file .*nowhere; download https://download.pytorch.org/models/alexnet"):
        LPIPS(tmp_path / "nowhere")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"is not torchvision's AlexNet: features\.0\.weight"):
        LPIPS(tmp_path / "other.pth")
