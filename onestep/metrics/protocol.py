"""Protocols: everything that a score depends on beside the export, under one name; and the scoring itself."""

import warnings
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ..files import sha256_of
from .frechet import Moments, frechet_distance
from .provenance import generation, provenance
from .render import family_of, load_pipeline, render
from .score import load_classifier, score

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Protocol:
    """How an export is scored. Image i has class i % classes and seed first_seed + i."""

    name: str
    metric: str
    """FID is the distance in Inception-v3 features alone; in any other extractor's it is FD."""
    dataset: str
    """The real images behind the reference statistics."""
    count: int
    classes: int
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    resize: str
    extractor: str
    dimensions: int
    assets: str
    """Folder under onestep/assets with classifier.safetensors and reference.safetensors."""
    first_seed: int = 0


PROTOCOLS: dict[str, Protocol] = {
    "fashion-10k": Protocol(
        name="fashion-10k",
        metric="FD",
        dataset="Fashion-MNIST, the 60,000 training images, padded to 32x32",
        count=10_000,
        classes=10,
        shape=(1, 32, 32),
        resize="none; quantised to 8 bits, then scaled to [-1, 1]",
        extractor="onestep.metrics.classifier.Classifier, 128 penultimate features",
        dimensions=128,
        assets="fashion_eval",
    ),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError, with the nearest name, where there is none."""
    if name not in PROTOCOLS:
        near = get_close_matches(name, PROTOCOLS, 1, cutoff=0.4)
        hint = f"; did you mean --protocol {near[0]}?" if near else ""
        raise ValueError(f"no protocol {name!r}; allowed are {', '.join(PROTOCOLS)}{hint}")
    return PROTOCOLS[name]


def _checked_count(count: int | None, protocol: Protocol) -> int:
    count = protocol.count if count is None else count
    if not 2 <= count <= protocol.count:
        raise ValueError(f"--count {count} is not allowed; {protocol.name} takes 2 to {protocol.count}: leave it out")
    if count < 2048:
        warnings.warn(
            f"a distance from {count} images is biased upwards and noisy: compare it only with the same count, and use "
            "2048 images or more",
            stacklevel=3,
        )
    return count


def evaluate(
    folder: str | Path,
    protocol: str | Protocol,
    *,
    steps: int,
    guidance: float,
    batch_size: int = 256,
    count: int | None = None,
    device: torch.device | str = "cpu",
    classifier: str | Path | None = None,
    reference: str | Path | None = None,
) -> dict[str, Any]:
    """Score an exported folder; the JSON-able row holds the metrics and all that they depend on.

    With fewer images than the protocol's the distance is called FD_proxy: it is another number, its bias being larger.
    `classifier` and `reference` replace the protocol's own files, which the row's hashes tell.
    Raises ValueError for an unknown protocol, an export that does not fit it and files missing or damaged.
    """
    protocol = protocol if isinstance(protocol, Protocol) else protocol_of(protocol)
    count = _checked_count(count, protocol)
    classifier = Path(classifier or ASSETS / protocol.assets / "classifier.safetensors")
    reference = Path(reference or ASSETS / protocol.assets / "reference.safetensors")
    network, real = load_classifier(classifier, protocol, device), Moments.load(reference)
    if real.dimensions != protocol.dimensions:
        raise ValueError(f"{reference} has {real.dimensions} dimensions, and {protocol.name} {protocol.dimensions}")
    pipe = load_pipeline(folder, device)
    classes = family_of(pipe).classes(pipe)
    if classes is not None and classes < protocol.classes:
        raise ValueError(f"{folder} knows {classes} classes, and {protocol.name} asks for {protocol.classes}")
    conditions = [i % protocol.classes for i in range(count)]
    seeds = list(range(protocol.first_seed, protocol.first_seed + count))
    made = generation(pipe, folder, count, protocol.first_seed, steps, guidance)
    fake, accuracy = score(render(pipe, conditions, seeds, steps, guidance, batch_size), conditions, network, protocol)
    return {
        "protocol": asdict(protocol),
        protocol.metric + ("" if count == protocol.count else "_proxy"): frechet_distance(fake, real),
        "class_accuracy": accuracy,
        **made,
        "extractor_sha256": sha256_of(classifier),
        "reference_sha256": sha256_of(reference),
        "reference_count": real.count,
        **provenance(device),
    }
