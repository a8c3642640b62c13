"""CLIP's picture embeddings as features: for CMMD, and for Fréchet distances without ImageNet's classes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..clip_model import load_clip
from .extractor import Extractor, Features


class ClipExtractor(Extractor):
    """Embeddings of an open_clip model after its projection, not normalised; CMMD (arXiv 2401.09603) takes unit vectors."""

    def __init__(self, model: str, weights: str | Path | None, device: torch.device | str):
        self.clip = load_clip(model, weights, device)
        self.name = f"clip {self.clip.name.replace('/', ' ')}, {self.clip.resizing}"
        self.sha256 = self.clip.sha256
        self.dimensions = self.clip.dimensions

    def prepare(self, image: np.ndarray) -> Tensor:
        return self.clip.prepare(image)

    def __call__(self, batch: Tensor) -> Features:
        return Features(self.clip.images(batch).cpu())
