"""Moments do not depend on how their vectors come, and the Fréchet distance of Gaussians is the closed form."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from onestep.metrics.distributed import in_order, mine
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


# Processes


@pytest.mark.parametrize("count", [1, 64, 65, 128, 200, 1000])
def test_each_image_is_made_by_one_process(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(mine(count))
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert all(share == sorted(share) and len(share) <= math.ceil(count / (3 * BLOCK)) * BLOCK for share in shares)


def _one_of(rank: int, world: int, folder: Path, count: int, batch: int) -> None:
    """Reads its images' features from a file and writes the moments of all, for the test below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    features = load_file(folder / "features.safetensors")["features"][:count]
    seen = Moments(features.shape[1])
    kept = []
    for block in in_order(features[mine(count)].split(batch), count, features.shape[1]):
        seen.update(block)
        kept.append(block)
    assert torch.equal(torch.cat(kept), features)
    seen.save(folder / f"moments-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_store_the_bits_of_one(tmp_path: Path):
    features, spawn = draws(2 * BLOCK + 9, 21) * 2 + 3, multiprocessing.get_context("spawn")  # two blocks, and a part
    save_file({"features": features}, tmp_path / "features.safetensors")
    ranks = [spawn.Process(target=_one_of, args=(r, 2, tmp_path, len(features), 50)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    streamed(features, 1).save(tmp_path / "alone.safetensors")
    alone = (tmp_path / "alone.safetensors").read_bytes()
    assert all((tmp_path / f"moments-{r}.safetensors").read_bytes() == alone for r in range(2))


def test_alone_the_blocks_are_the_features():
    features = draws(200, 3)
    blocks = list(in_order(features.split(9), 200, 3))
    assert torch.equal(torch.cat(blocks), features) and [len(block) for block in blocks] == [64, 64, 64, 8]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.zeros(69, 3), "features of 69 images; this process is to give those of 70"),
        (torch.zeros(71, 3), "features of 71 images or more"),
        (torch.zeros(70, 4), r"allowed is float32 \(B, 3\)"),
        (torch.zeros(70, 3, dtype=torch.float64), "torch.float64; allowed is float32"),
    ],
)
def test_wrong_features_are_refused(features: Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        list(in_order(iter(features.split(10)), 70, 3))


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
