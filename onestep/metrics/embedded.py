"""The extractors that need no download: the classifier of small clothes, and the pixels of small digits."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import sha256_of
from ..weights import load_strictly, read_state
from .classifier import Classifier
from .extractor import Extractor, Features
from .nearest import NearestPicture

ASSETS = Path(__file__).parent.parent / "assets"


def grey(image: np.ndarray, side: int, what: str) -> Tensor:
    """A grey image, uint8 (side, side, 3), as (1, side, side) in [-1, 1]. Raises ValueError for another one."""
    if image.shape != (side, side, 3):
        raise ValueError(
            f"an image of {image.shape[1]}x{image.shape[0]} pixels; {what} takes {side}x{side}: resize it first"
        )
    if (image != image[..., :1]).any():
        raise ValueError(f"an image has colours, and {what} takes grey ones: convert it first, or type another --extractor")
    return torch.from_numpy(image[..., 0].copy())[None].float() / 127.5 - 1


class FashionExtractor(Extractor):
    """The classifier behind the protocol fashion-10k: 128 penultimate features, ten logits."""

    name = "onestep.metrics.classifier.Classifier, 128 penultimate features, 32x32 grey without resizing"
    dimensions = 128

    def __init__(self, weights: str | Path | None, device: torch.device | str):
        path = Path(weights) if weights else ASSETS / "fashion_eval" / "classifier.safetensors"
        network = Classifier()
        load_strictly(network, read_state(path), path, "the embedded classifier")
        self.network, self.device, self.sha256 = network.eval().to(device), device, sha256_of(path)

    def prepare(self, image: np.ndarray) -> Tensor:
        return grey(image, 32, "the extractor fashion")

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Features:
        features = self.network.features(batch.to(self.device))
        return Features(features.cpu(), logits=self.network.head(features).cpu())


class DigitsExtractor(Extractor):
    """The pixels behind the protocol digits-1797, from 0 to 16; logits are minus the distance to a class's nearest digit."""

    name = "the 64 pixels of an 8x8 grey digit, 0 to 16, without resizing"
    dimensions = 64

    def __init__(self, weights: str | Path | None, device: torch.device | str):
        if weights:
            raise ValueError("the extractor digits is pixels and has no weights: leave --weights out")
        from ..data.images import load_embedded  # which imports most of diffusers: only where it is needed

        images, labels = load_embedded("digits")
        self.network, self.device = NearestPicture(images, labels, classes=10, levels=16).to(device), device
        self.sha256 = sha256_of(ASSETS / "digits_data" / "labels.json")

    def prepare(self, image: np.ndarray) -> Tensor:
        return grey(image, 8, "the extractor digits")

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Features:
        features = self.network.features(batch.to(self.device))
        return Features(features.cpu(), logits=self.network.head(features).cpu())
