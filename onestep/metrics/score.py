"""Scoring generated images in a protocol's extractor: features, their moments, and class accuracy."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .classifier import Classifier
from .frechet import Moments
from .images import quantise
from .nearest import NearestPicture

if TYPE_CHECKING:
    from .protocol import Protocol

Extractor = Classifier | NearestPicture


def load_classifier(path: Path, protocol: "Protocol", device: torch.device | str) -> Classifier:
    """The protocol's extractor in eval mode. Raises ValueError where the file is missing or holds another network."""
    network = Classifier(classes=protocol.classes, dimensions=protocol.dimensions)
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(
            f"{path} is not the classifier of {protocol.name} ({reason}): restore the file from the repository"
        ) from error
    return network.eval().to(device)


@torch.no_grad()
def features_of(images: Tensor, network: Extractor) -> Tensor:
    """Features (B, D) of images (B, C, H, W) in [0, 1] after rounding to 8 bits, on the extractor's device."""
    device = next(network.parameters()).device
    return network.features(quantise(images).to(device).float() / 127.5 - 1)


@torch.no_grad()
def score(
    batches: Iterable[Tensor],
    conditions: list[int],
    network: Extractor,
    protocol: "Protocol",
    kept: list[Tensor] | None = None,
) -> tuple[Moments, float]:
    """Feature moments of the images, and class accuracy: the fraction whose largest logit is the intended class.

    batches: images (B, C, H, W) in [0, 1], in the order of `conditions`. Their features are appended to `kept`.
    Raises ValueError for another image shape.
    """
    moments, right, seen = Moments(protocol.dimensions), 0, 0
    for images in batches:
        if tuple(images.shape[1:]) != protocol.shape:
            raise ValueError(
                f"the export makes images of shape {tuple(images.shape[1:])}, and {protocol.name} scores "
                f"{protocol.shape}: name an export for {protocol.dataset.split(',')[0]}"
            )
        features = features_of(images, network)
        moments.update(features)
        if kept is not None:
            kept.append(features.cpu())
        intended = torch.tensor(conditions[seen : seen + len(images)], device=features.device)
        right += int((network.head(features).argmax(1) == intended).sum())
        seen += len(images)
    return moments, right / seen
