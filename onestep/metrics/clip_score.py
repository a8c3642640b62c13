"""CLIP score: how well pictures show what their prompts say."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip_model import ClipModel

SCALE = 100
"""Of the score as it is printed in papers on text-to-image models; Hessel et al. have 2.5."""


class ClipScore:
    """w max(0, cos(E_I(picture), E_T(prompt))), averaged over pictures (Hessel et al. 2021, arXiv 2104.08718, eq. 1).

    w is `scale`; prompts are taken as they are, without a prefix. In one pass: only one number a picture is kept.
    """

    def __init__(self, clip: ClipModel, scale: float = SCALE):
        self.clip, self.scale = clip, scale
        self._cosines: list[Tensor] = []

    @property
    def name(self) -> str:
        """All that the number depends on, such as "CLIPScore(ViT-L-14-quickgelu/openai, 224 bicubic, x100)"."""
        return f"CLIPScore({self._where}, x{self.scale:g})"

    @property
    def cosine_name(self) -> str:
        """Of the plain mean cosine, where negative ones count as they are."""
        return f"cosine({self._where})"

    @property
    def _where(self) -> str:
        return f"{self.clip.name}, {self.clip.resizing}"

    def update(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
        """Take in pictures, uint8 (H, W, 3) of any sizes, and the prompt of each. Raises ValueError for unequal numbers."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; give one prompt an image")
        if images:
            batch = torch.stack([self.clip.prepare(image) for image in images])
            self.add(self.clip.images(batch), self.clip.texts(prompts))

    def add(self, images: Tensor, texts: Tensor) -> None:
        """Take in embeddings (B, D) of pictures, and those of the prompt of each."""
        self._cosines.append(cosines(images, texts))

    @property
    def cosines(self) -> Tensor:
        """One an image, float64, shape (N,), in the order they came in."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *self._cosines])

    def compute(self) -> dict[str, float]:
        """Score and mean cosine by name. Raises ValueError where there was no image."""
        if not len(self.cosines):
            raise ValueError("a CLIP score needs at least 1 image, and there is none; name a folder with images")
        return {name: float(each.mean()) for name, each in self.each().items()}

    def each(self) -> dict[str, Tensor]:
        """Score and cosine of every image by name, float64 (N,)."""
        return {self.name: self.scale * self.cosines.clamp(min=0), self.cosine_name: self.cosines}


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Of the angles between rows, (B, D) and (B, D) to float64 (B,) on the CPU."""
    return F.cosine_similarity(images.to("cpu", torch.float64), texts.to("cpu", torch.float64))
