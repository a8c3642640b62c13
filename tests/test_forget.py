"""Scores of unlearning: what is counted and by what it is divided, which images, the rest's distance, the command line."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import dit_pipeline
from torch import Tensor

from onestep.data.images import load_embedded
from onestep.metrics import PROTOCOLS, Moments, forgetting, frechet_distance, load_pipeline
from onestep.metrics.forgetting import evaluate_forgetting, label_of, names_of
from onestep.metrics.forgetting import forgetting as counted
from onestep.metrics.images import quantise
from onestep.metrics.render import render

ROOT = Path(__file__).parents[1]
PROTOCOL = PROTOCOLS["fashion-10k"]
NAMES = {"Ankle boot": 9, "Bag": 8, "T-shirt": 0}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of ten named classes that makes pictures of (1, 32, 32)."""
    folder = tmp_path_factory.mktemp("export") / "dit"
    dit_pipeline(size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_forget", ROOT / "eval/forget.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "eval"))
        spec.loader.exec_module(module)
    return module


# --- counting


@pytest.mark.parametrize("mean, golden", [(-1.0, 0.02275), (1.0, 0.97725)])
def test_unlearning_accuracy_of_two_gaussian_classes(mean: float, golden: float) -> None:
    """Classes N(-1, s^2) and N(1, s^2), s = 0.5, told apart at their midpoint: 1 - Phi(2) before and Phi(2) after."""
    z = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    seen = (mean + 0.5 * z > 0).long()
    row = counted(seen, gone=0, instead=1)
    assert row["UA"] == pytest.approx(golden, abs=5e-5) and row["override_fraction"] == pytest.approx(row["UA"])
    phi = 0.5 * (1 + math.erf(2 / 2**0.5))
    assert row["UA"] == pytest.approx(phi if mean > 0 else 1 - phi, abs=5e-5)


def test_fractions_are_of_the_forgotten_classs_images() -> None:
    row = counted(torch.tensor([4, 4, 7, 7, 7, 1, 0, 7]), gone=4, instead=7)
    assert row == {
        "UA": 0.75,
        "override_fraction": 0.5,
        "forgotten_as": {0: 1, 1: 1, 4: 2, 7: 4},
        "forgotten_count": 8,
    }
    assert counted(torch.tensor([4, 4]), 4, None)["override_fraction"] is None
    assert counted(torch.tensor([4, 4]), 4, None)["UA"] == 0


# --- scoring


def test_a_row_is_what_its_parts_are(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forgotten class's 4 images give UA, the others' 36 the distance and the accuracy: counted here by hand."""
    source = torch.Generator().manual_seed(1)
    pictures, labels = torch.rand(60, 1, 32, 32, generator=source) * 2 - 1, torch.arange(60) % 10
    monkeypatch.setattr(forgetting, "load_embedded", lambda name: (pictures, labels))
    made: list[tuple[Sequence[int], Sequence[int]]] = []

    def spy(pipe: Any, conditions: Sequence[int], seeds: Sequence[int], *rest: Any) -> Any:
        made.append((conditions, seeds))
        return render(pipe, conditions, seeds, *rest)

    monkeypatch.setattr(forgetting, "render", spy)
    protocol = replace(PROTOCOL, first_seed=100)
    row = evaluate_forgetting(export, protocol, "class 3", "5", steps=1, guidance=1.0, batch_size=7, count=40)

    network = protocol.instruments(None, None, "cpu").network
    images = torch.cat([*render(load_pipeline(export), [i % 10 for i in range(40)], range(100, 140), 1, 1.0, 40)])
    of_class = torch.arange(40) % 10

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network.features(quantise(images).float() / 127.5 - 1)

    def moments(values: Tensor) -> Moments:
        found = Moments(128)
        found.update(values)
        return found

    with torch.no_grad():
        seen = network.head(features(images)).argmax(1)
    gone, rest = seen[of_class == 3], of_class != 3
    assert row["UA"] == 1 - float((gone == 3).double().mean()) and row["forgotten_count"] == 4
    assert row["override_fraction"] == float((gone == 5).double().mean())
    assert row["class_accuracy"] == pytest.approx(float((seen == of_class)[rest].double().mean()), abs=1e-12)
    real = moments(features(pictures[labels != 3] / 2 + 0.5))
    exact = frechet_distance(moments(features(images[rest])), real)
    assert row["FD_proxy"] == pytest.approx(exact, rel=1e-4) and "FD" not in row
    assert (row["reference_count"], row["remaining_count"], row["count"]) == (54, 36, 40)
    assert (row["forget"], row["override"], row["seeds"]) == (3, 5, [100, 139])
    assert row["protocol"]["name"] == "fashion-10k-without-3" and "without class 3" in row["protocol"]["dataset"]
    # together they are the very images that the protocol itself scores
    pairs = sorted((seed, label) for labels, seeds in made for label, seed in zip(labels, seeds))
    assert pairs == [(100 + i, i % 10) for i in range(40)]


@pytest.mark.parametrize(
    "forget, override, count, message",
    [
        ("class 33", None, 40, r"--forget 'class 33' is no class; allowed is 0 .. 9, or a name such as 'class 0'; did you"),
        ("3", "10", 40, r"--override '10' is no class"),
        ("3", "class 3", 40, "the forgotten class itself; type another class, or leave it out"),
        ("3", None, 19, "--count 19 is not allowed; type 20 to 10000, or leave it out"),
        ("3", None, 10_001, "--count 10001 is not allowed"),
    ],
)
def test_what_cannot_be_scored(forget: str, override: str | None, count: int, message: str, export: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_forgetting(export, PROTOCOL, forget, override, steps=1, guidance=1.0, count=count)
    assert "\n" not in str(caught.value)


def test_a_protocol_without_real_images_is_refused(export: Path) -> None:
    with pytest.raises(ValueError, match="no real images of fashion-10k are in the package; type --protocol"):
        evaluate_forgetting(export, replace(PROTOCOL, real=""), "3", None, steps=1, guidance=1.0, count=20)


def test_labels_by_number_and_name(export: Path) -> None:
    assert [label_of(text, NAMES, 10, "--forget") for text in ("8", "Bag", " ankle BOOT")] == [8, 8, 9]
    with pytest.raises(ValueError, match=r"--forget 'Bags' is no class; .* did you mean 'Bag'\?"):
        label_of("Bags", NAMES, 10, "--forget")
    with pytest.raises(ValueError, match=r"-1' is no class; allowed is 0 .. 9; the classes have no names"):
        label_of("-1", {}, 10, "--forget")
    assert names_of(load_pipeline(export)) == {f"class {i}": i for i in range(10)}


def test_the_reference_has_the_remaining_real_images_alone() -> None:
    protocol = PROTOCOLS["digits-1797"]
    network = protocol.instruments(None, None, "cpu").network
    pictures, labels = load_embedded("digits")
    found = forgetting.moments_without(3, protocol, network, 500)
    values = network.features(pictures[labels != 3]).double()
    assert found.count == int((labels != 3).sum()) < 1797
    torch.testing.assert_close(found.mean, values.mean(0), atol=0.02, rtol=0)  # of pixels rounded to 8 bits
    torch.testing.assert_close(found.covariance, values.T.cov(), atol=0.05, rtol=0)


# --- the command line


def test_a_line_is_appended(tiny_teacher: Path, script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "results.jsonl"
    argv = [str(tiny_teacher), "--protocol", "digits-1797", "--count", "20", "--device", "cpu", "--output", str(output)]
    assert script.main([*argv, "--forget", "3"]) == 0
    assert script.main([*argv, "--forget", "3", "--override", "8"]) == 0
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert first["override"] is None and first["override_fraction"] is None
    assert second["override"] == 8 and second["UA"] == first["UA"] and second["FD_proxy"] == first["FD_proxy"]
    assert sum(second["forgotten_as"].values()) == second["forgotten_count"] == 2
    shown = capsys.readouterr().out
    assert "digits-1797-without-3" in shown and "UA" in shown
    assert script.main([*argv, "--forget", "12"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: --forget '12' is no class")
    assert script.main([*argv[:-1], str(tmp_path / "no/file"), "--forget", "3"]) == 2
    with pytest.raises(SystemExit):
        script.main(argv)
    assert "--forget" in capsys.readouterr().err and len(output.read_text().splitlines()) == 2
