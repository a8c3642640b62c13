"""Precision, recall, density and coverage against loops written out, and in the rows of the protocols."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import dit_pipeline

import onestep.data.images
from onestep.metrics import PROTOCOLS, evaluate
from onestep.metrics.manifold import Manifold, manifold, neighbours
from onestep.metrics.protocol import Comparison
from onestep.metrics.score import score

ROOT = Path(__file__).parents[1]
DIGITS = PROTOCOLS["digits-1797"]
SCORES = ("precision", "recall", "density", "coverage")


def by_loops(real: np.ndarray, fake: np.ndarray, k: int, k_coverage: int) -> Manifold:
    """The definitions, one pair at a time."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.sum((a - b) ** 2)))

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    n, m = len(real), len(fake)
    balls = [radius(real, i, k_coverage) for i in range(n)]
    inside = sum(any(distance(y, real[i]) <= radius(real, i, k) for i in range(n)) for y in fake)
    recalled = sum(any(distance(x, fake[j]) <= radius(fake, j, k) for j in range(m)) for x in real)
    within = [[distance(y, real[i]) < balls[i] for y in fake] for i in range(n)]
    return Manifold(inside / m, recalled / n, sum(map(sum, within)) / (k_coverage * m), sum(map(any, within)) / n)


def two_gaussians() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 3)), 0.8 + 0.8 * rng.normal(size=(45, 3))


def test_two_gaussians_agree_with_loops_whatever_the_chunk():
    real, fake = two_gaussians()
    expected = by_loops(real, fake, 3, 5)
    assert min(vars(expected).values()) > 0.1 and max(vars(expected).values()) < 1
    for chunk in (1, 7, 45, 1000):
        assert manifold(torch.from_numpy(real), torch.from_numpy(fake), chunk=chunk) == expected
    assert manifold(torch.from_numpy(real), torch.from_numpy(fake), 4, 2) == by_loops(real, fake, 4, 2)


def test_a_case_by_hand():
    """On a line, k = 1. Real balls: [-1, 1], [0, 2], [1, 5], [3, 11]; generated: [0, 4], [3.5, 4.5], [4, 5] and two far."""
    real, fake = torch.tensor([0.0, 1, 3, 7])[:, None], torch.tensor([2.0, 4, 4.5, 20, 20.5])[:, None]
    assert neighbours(real, 1)[:, 0].tolist() == [1, 1, 2, 4]
    assert neighbours(fake, 1)[:, 0].tolist() == [2, 0.5, 0.5, 0.5, 0.5]
    # 0 lies on the surface of [0, 4], which counts; 2 lies on that of (0, 2), which does not
    assert manifold(real, fake, 1, 1) == Manifold(precision=3 / 5, recall=3 / 4, density=(1 + 2 + 2) / 5, coverage=2 / 4)
    assert manifold(real, torch.tensor([[-1.0], [50]]), 1, 1).precision == 1 / 2  # on the surface of [-1, 1]


def test_equal_sets_are_perfect_and_disjoint_ones_nothing():
    real = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert manifold(real, real.flip(0)) == Manifold(1.0, 1.0, 1.0, 1.0)
    assert manifold(real, real + 1e3) == Manifold(0.0, 0.0, 0.0, 0.0)


def test_precision_and_recall_tell_what_is_wrong():
    real = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    mode = 0.05 * torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    collapsed = manifold(real, mode)
    assert collapsed.precision == 1 and collapsed.recall < 0.1 and collapsed.coverage < 0.1
    spread = manifold(real, 8 * torch.randn(300, 2, generator=torch.Generator().manual_seed(2)))
    assert spread.precision < 0.3 and spread.recall > 0.9
    assert manifold(real, mode[:1].expand(300, 2)).recall == 0  # one picture: balls of radius 0


def test_distances_are_exact_far_from_the_origin():
    features = 1e3 + 1e-6 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = features.numpy().astype(np.longdouble)
    between = np.sqrt(((wide[:, None] - wide) ** 2).sum(-1)).astype(float)
    np.testing.assert_allclose(neighbours(features, 3, 9).numpy(), np.sort(between, 1)[:, 1:4], rtol=0, atol=1e-9)
    product = features.square().sum(1)[:, None] + features.square().sum(1) - 2 * features @ features.T
    by_product = product.clamp(min=0).sqrt().sort(1).values[:, 1:4]
    assert (by_product - neighbours(features, 3)).abs().max() > 1e-9  # the short cut is not


@pytest.mark.parametrize(
    ("real", "fake", "words"),
    [
        (torch.zeros(9, 2), torch.zeros(3, 2), r"3 generated images .* --count 4"),
        (torch.zeros(5, 2), torch.zeros(9, 2), "5 real images have no 5 nearest"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "2 and 3 dimensions"),
        (torch.zeros(9, 2), torch.zeros(9), r"\(9,\); allowed is \(N, D\)"),
        (torch.zeros(9, 2), torch.full((9, 2), torch.nan), "generated images .* NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(real: torch.Tensor, fake: torch.Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        manifold(real, fake)


# In the protocols


OLD_PROTOCOL = ["name", "metric", "dataset", "count", "classes", "shape", "resize", "extractor", "dimensions", "assets"]
OLD_ROW = [
    "protocol", "FD_proxy", "class_accuracy", "export", "pipeline", "scheduler", "weights_sha256", "count", "seeds",
    "steps", "guidance", "passes_per_image", "extractor_sha256", "reference_sha256", "reference_count", "torch",
    "diffusers", "machine", "date", "commit",
]  # fmt: skip


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "dit"
    dit_pipeline(size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def few_real(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = onestep.data.images.load_embedded
    monkeypatch.setattr(onestep.data.images, "load_embedded", lambda name: tuple(part[:60] for part in whole(name)))


@pytest.mark.filterwarnings("ignore:a distance from 20 images")
def test_the_flag_adds_to_the_row_and_changes_nothing_else_in_it(fashion: Path, few_real: None):
    plain = evaluate(fashion, "fashion-10k", steps=1, guidance=1.0, count=20)
    row = json.loads(json.dumps(evaluate(fashion, "fashion-10k", steps=1, guidance=1.0, count=20, precision_recall=True)))
    assert list(plain) == OLD_ROW and list(plain["protocol"]) == [*OLD_PROTOCOL, "first_seed"]
    added = [f"{name}_proxy" for name in SCORES]  # of 20 images
    assert list(row) == [*OLD_ROW[:3], *added, *OLD_ROW[3:]]
    about = row["protocol"].pop("manifold")
    assert about["precision_recall_k"] == 3 and about["density_coverage_k"] == 5
    assert about["real"] == "the 60 images of onestep/assets/fashion_data" and len(about["real_sha256"]) == 64
    same = [key for key in OLD_ROW if key != "date"]
    assert {key: row[key] for key in same} == json.loads(json.dumps({key: plain[key] for key in same}))


@pytest.mark.filterwarnings("ignore:a distance from 40 images")
def test_the_script_has_a_flag(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = importlib.util.spec_from_file_location("eval_fid", ROOT / "eval" / "fid.py")
    assert spec and spec.loader
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    argv = [str(tiny_teacher), "--output", str(tmp_path / "rows.jsonl"), "--precision-recall"]
    assert script.main([*argv, "--protocol", "digits-1797", "--count", "40", "--device", "cpu"]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["protocol"]["manifold"]["real"] == "the 1797 images of onestep/assets/digits_data"
    assert all(row[f"{name}_proxy"] < 0.1 for name in SCORES)  # random weights
    capsys.readouterr()
    assert script.main([*argv, "--reference", str(tmp_path)]) == 2
    assert "leave --reference out" in capsys.readouterr().err


# The digits


def test_the_real_digits_score_as_real():
    tools = DIGITS.instruments(None, None, "cpu")
    images, labels = onestep.data.images.load_embedded("digits")
    kept: list[torch.Tensor] = []
    moments, accuracy = score((images / 2 + 0.5).split(500), labels.tolist(), tools.network, DIGITS, kept)
    features = torch.cat(kept)
    assert accuracy == 1 and moments.count == tools.real.count == len(features) == 1797
    torch.testing.assert_close(moments.mean, tools.real.mean)
    torch.testing.assert_close(features.double(), (images / 2 + 0.5).flatten(1).double() * 16)
    torch.testing.assert_close(Comparison(DIGITS, tools.network).real, features)
    half = manifold(features[::2], features[1::2])
    assert min(vars(half).values()) > 0.85 and half.precision < 1


def test_the_nearest_digit_is_a_good_classifier():
    """Leave-one-out, as docs/evaluation.md states it."""
    tools = DIGITS.instruments(None, None, "cpu")
    features, labels = tools.network.known, tools.network.labels
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    assert float((labels[distance.argmin(1)] == labels).float().mean()) == pytest.approx(0.988, abs=5e-4)
    shifted = tools.network.head(features[:200] + 0.01)
    assert (shifted.argmax(1) == labels[:200]).all() and shifted.shape == (200, 10)


def test_pixels_have_no_files_to_replace(tiny_teacher: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="digits-1797 measures pixels"):
        evaluate(tiny_teacher, "digits-1797", steps=1, guidance=1.0, classifier=tmp_path)
