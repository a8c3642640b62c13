"""Samples looked at one by one: class by class, and beside the real images nearest to them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.images import load_embedded
from ..metrics import Moments, Protocol, frechet_distance
from ..metrics.images import quantise
from ..metrics.manifold import neighbours
from .pictures import Picture, encoded
from .sources import Source
from .tables import Number, score_text

NEAREST = 3
STRIPS = 10
"""Samples that are shown beside their nearest real images: the protocol's first, which are of classes in turn."""


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W) in [0, 1], the classes asked for and those that the classifier saw (N,), features (N, D)."""

    images: Tensor
    labels: Tensor
    features: Tensor
    answers: Tensor


@dataclass(frozen=True)
class OfClass:
    """The fraction of a class's samples that the classifier puts into it, and their distance from its real images."""

    name: str
    count: int
    accuracy: Number
    distance: Number | None


@dataclass(frozen=True)
class Strip:
    """A sample of the class `name`, and the real images nearest to it with their distances, ascending."""

    name: str
    sample: Picture
    nearest: list[Picture]
    distances: list[Number]


@dataclass(frozen=True)
class Looks:
    """What the page shows of one source's samples; `index` is the source's place.

    `median` is that of all samples' distances to their nearest real image, `typical` that of the real images' distances to
    the nearest other one. `metric` is the name of the classes' distances, empty where they have none.
    """

    index: int
    name: str
    about: str
    metric: str
    classes: list[OfClass]
    strips: list[Strip]
    median: Number
    typical: Number
    real: int


def looks(index: int, source: Source, protocol: Protocol, samples: Samples, real: Tensor) -> Looks:
    """`real` are the features of all embedded images of the protocol, in their order."""
    images, labels = load_embedded(protocol.real)
    names = _class_names(source, protocol.classes)
    distances, places = nearest(samples.features, real)
    shown = range(min(STRIPS, len(samples.images)))
    parts = [(samples.features[samples.labels == k], real[labels == k]) for k in range(protocol.classes)]
    # with fewer images than features a covariance is singular, and the distance tells of their number
    enough = all(min(len(fake), len(known)) > protocol.dimensions for fake, known in parts)
    return Looks(
        index=index,
        name=source.name,
        about=f"{len(samples.images):,} samples, seeds from {protocol.first_seed}, protocol {protocol.name}",
        metric=f"{protocol.metric}_proxy" if enough else "",
        classes=[
            _of_class(name, samples.answers[samples.labels == k] == k, *parts[k], protocol.metric if enough else "")
            for k, name in enumerate(names)
            if len(parts[k][0])
        ],
        strips=[
            Strip(
                name=names[int(samples.labels[i])],
                sample=_tile(samples.images[i]),
                nearest=[_tile(images[j] / 2 + 0.5) for j in places[i].tolist()],
                distances=[_distance(each) for each in distances[i].tolist()],
            )
            for i in shown
        ],
        median=_distance(float(distances[:, 0].median())),
        typical=_distance(float(neighbours(real.double(), 1).median())),
        real=len(real),
    )


def nearest(fake: Tensor, real: Tensor, k: int = NEAREST) -> tuple[Tensor, Tensor]:
    """Distances, ascending, and places of the k features real (N, D) nearest to each fake (M, D): both (M, k); float64."""
    exact = "donot_use_mm_for_euclid_dist"
    parts = [
        torch.cdist(part, real.double(), compute_mode=exact).topk(k, largest=False) for part in fake.double().split(500)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _of_class(name: str, right: Tensor, fake: Tensor, real: Tensor, metric: str) -> OfClass:
    accuracy, distance = float(right.double().mean()), None
    if metric:
        value = frechet_distance(_moments(fake), _moments(real))
        distance = Number(value, score_text(metric, value))
    return OfClass(name, len(fake), Number(accuracy, score_text("class_accuracy", accuracy)), distance)


def _moments(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def _class_names(source: Source, classes: int) -> Sequence[str]:
    """Those of the export's folder, or numbers where it has none."""
    index = json.loads((Path(str(source.export)) / "model_index.json").read_text(encoding="utf-8"))
    names = index.get("id2label") or {}
    return [str(names.get(str(k), k)) for k in range(classes)]


def _tile(image: Tensor) -> Picture:
    pixels = quantise(image).permute(1, 2, 0).numpy()
    return encoded(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB"))


def _distance(value: float) -> Number:
    return Number(value, f"{value:#.3g}".rstrip("."))
