"""Preference scorers: models of how much people like a picture, trained on their choices."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from .measure import Picture, Pictures


class Scorer(ABC):
    """One number a picture, the higher the better. Numbers of different scorers are not comparable."""

    name: str
    sha256: str
    """Of the scorer's own weights file."""
    prompted = True
    """Whether the prompt counts."""

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


def scorers_of(names: str, device: torch.device | str = "cpu") -> list[Scorer]:
    """Those of NAME or NAME=WEIGHTS, separated by commas. Raises ValueError where one cannot be had."""
    pairs = [each.strip().partition("=") for each in names.split(",")]
    return [load_scorer(name, weights or None, device) for name, _, weights in pairs]


class Judged:
    """The pictures of `pictures`, which are scored on their way, each with its own of `prompts`.

    Raises ValueError without prompts where a scorer needs them.
    """

    def __init__(self, pictures: Pictures, scorers: Sequence[Scorer], prompts: Sequence[str] | None):
        if prompts is None and (needy := [scorer.name for scorer in scorers if scorer.prompted]):
            raise ValueError(
                f"{needy[0]} needs the prompt of each image: type --prompts FILE, or leave it out of --preference"
            )
        self.pictures, self.scorers, self.prompts = pictures, scorers, prompts
        self._scores: dict[int, list[float]] = {}

    def __call__(self, part: range) -> list[Picture]:
        images = [picture() for picture in self.pictures(part)]
        prompts = [self.prompts[i] if self.prompts is not None else "" for i in part]
        columns = [scorer(images, prompts).tolist() for scorer in self.scorers]
        self._scores |= {i: list(row) for i, row in zip(part, zip(*columns))}
        return [partial(np.asarray, image) for image in images]

    def means(self) -> dict[str, float]:
        """The mean of each scorer over all images of all processes, in the order of the images."""
        shared = gather_object([self._scores]) if PartialState().num_processes > 1 else [self._scores]
        rows = {i: row for scores in shared for i, row in scores.items()}
        table = torch.tensor([rows[i] for i in sorted(rows)], dtype=torch.float64)
        return {scorer.name: value for scorer, value in zip(self.scorers, table.mean(0).tolist())}
