"""Preference scorers: models of how much people like a picture, trained on their choices."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Scorer(ABC):
    """One number a picture, the higher the better. Numbers of different scorers are not comparable."""

    name: str
    sha256: str
    """Of the scorer's own weights file."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float64 on the CPU, of pictures uint8 (H, W, 3) of any sizes and the prompt of each.

        Raises ValueError for unequal numbers.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; give one prompt an image")
        return self.scored(images, prompts) if images else torch.zeros(0, dtype=torch.float64)

    @abstractmethod
    def scored(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor: ...


def load_scorer(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Scorer:
    """The scorer of that name, with the file `weights` or the published one. Raises ValueError where it cannot be had."""
    from .preference_models import Aesthetic, HPSv2, ImageReward

    known: dict[str, type[HPSv2] | type[Aesthetic] | type[ImageReward]] = {
        "hpsv2": HPSv2,
        "aesthetic": Aesthetic,
        "imagereward": ImageReward,
    }
    if name not in known:
        raise ValueError(f"no preference scorer {name!r}; allowed are {', '.join(known)}: type for example hpsv2")
    return known[name](weights, device)
