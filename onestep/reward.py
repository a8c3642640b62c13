"""Rewards: how well people, or a model of them, like a picture of a condition; they are raised up to a margin."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip_model import load_clip
from .objectives.clip_loss import ClampedCLIP
from .teacher import Teacher


class Reward(nn.Module, ABC):
    """A frozen judge, made as Class(teacher); gradients pass through it to the pictures."""

    margin: float
    """Score that is good enough: above it there is no gradient."""

    @abstractmethod
    def forward(self, images: Tensor, conditions: list[Any]) -> Tensor:
        """Scores, shape (B,), the higher the better.

        `images` (B, C, H, W) are in [-1, 1] but for overshoots; `conditions` are what the stock pipeline is asked for:
        prompts, or class labels.
        """


class CLIPScore(ClampedCLIP, Reward):
    """cos(E_I(picture), E_T(prompt)) of open_clip's ViT-B-32, LAION-2B (Radford et al. 2021)."""

    margin = 0.35
    name, weights = "ViT-B-32", "laion2b_s34b_b79k"

    def __init__(self, teacher: Teacher):
        """Raises ValueError for a teacher without prompts, or where the model cannot be had."""
        if teacher.conditioned_by != "text":
            raise ValueError(
                "the clip reward compares pictures with prompts, and this teacher has none; leave --reward out, or type "
                "--reward package.module:Class with one of your own"
            )
        try:
            super().__init__(*self.loaded(), tau=self.margin)
        except ValueError as error:
            raise ValueError(
                f"the CLIP model {self.name} with weights {self.weights} cannot be had: {error}. Or leave --reward out"
            ) from error
        self.to(teacher.device)

    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        clip = load_clip(f"{self.name}/{self.weights}")
        return clip.model, clip.tokenizer

    def forward(self, images: Tensor, conditions: list[Any]) -> Tensor:
        with torch.no_grad():
            text = self.model.encode_text(self.tokenizer(conditions).to(images.device), normalize=True)
        return (self.model.encode_image(self._prepared(images), normalize=True) * text).sum(1)


REWARDS: dict[str, type[Reward]] = {"clip": CLIPScore}
"""Rewards by name."""


class Rewards(nn.Module):
    """sum over rewards d of mean max(0, m_d - r_d(picture, condition)), m_d their margins.

    Hyper-SD (Ren et al. 2024, arXiv 2404.13686, section 3.2).
    """

    def __init__(self, rewards: Sequence[Reward]):
        super().__init__()
        self.rewards = nn.ModuleList(rewards).eval().requires_grad_(False)

    @classmethod
    def named(cls, names: str, teacher: Teacher) -> "Rewards":
        """Those of "clip,package.module:Class". Raises ValueError where one cannot be had."""
        return cls([reward_class(name.strip())(teacher) for name in names.split(",")])

    def forward(self, images: Tensor, conditions: list[Any]) -> Tensor:
        return torch.stack([F.relu(each.margin - each(images, conditions)).mean() for each in self.rewards]).sum()


def reward_class(name: str) -> Any:
    """A reward by its name here, or by the place of its class, "package.module:Class".

    Raises ValueError where there is none, or where that is no Reward.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    allowed = f"allowed are {', '.join(REWARDS)}, or package.module:Class with a subclass of onestep.reward.Reward"
    if not colon:
        raise ValueError(f"no reward {name!r}; {allowed}: type for example --reward clip")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the reward {name!r} cannot be imported: {error}; {allowed}") from error
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise ValueError(f"the reward {name!r} is no subclass of onestep.reward.Reward; {allowed}")
    return found
