"""The clamped CLIP loss of SwiftBrush v2 (Dao et al. 2024, arXiv 2408.14176) and SNOOPI, through open_clip."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip_model import load_clip
from ..teacher import Teacher

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels in [0, 1] that OpenAI's CLIP was trained on; a model may name others."""


class ClampedCLIP(nn.Module):
    """mean over the batch of max(0, tau - cos(E_I(picture), E_T(prompt))); its gradient is 0 where cos is above tau.

    `model` is one of open_clip's, frozen; gradients pass through it to the pictures.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        tau: float,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        super().__init__()
        self.model, self.tokenizer, self.tau = model.eval().requires_grad_(False), tokenizer, tau
        self.mean, self.std = mean, std

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """`images` (B, 3, H, W) in [-1, 1] but for overshoots, which are kept: clamping them would stop their gradient."""
        with torch.no_grad():
            text = self.model.encode_text(self.tokenizer(prompts).to(images.device), normalize=True)
        cosine = (self.model.encode_image(self._prepared(images), normalize=True) * text).sum(1)
        return F.relu(self.tau - cosine).mean()

    def _prepared(self, images: Tensor) -> Tensor:
        """Resized to the model's side and normalised."""
        pixels = F.interpolate(images.float() / 2 + 0.5, self.model.visual.image_size, mode="bicubic", antialias=True)
        mean, std = (pixels.new_tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (pixels - mean) / std


def clip_on(teacher: Teacher, name: str, weights: str, tau: float) -> ClampedCLIP:
    """The loss with an open_clip model by name. Raises ValueError without prompts, or where it cannot be had."""
    if teacher.conditioned_by != "text":
        raise ValueError("the CLIP loss compares pictures with prompts, and this teacher has none; leave --clip out")
    try:
        given = Path(weights)
        clip = (
            load_clip(name, given, teacher.device)
            if given.is_file()
            else load_clip(f"{name}/{weights}", None, teacher.device)
        )
    except ValueError as error:
        raise ValueError(
            f"the CLIP model {name} with weights {weights} cannot be had: {error}. Or leave --clip out"
        ) from error
    return ClampedCLIP(clip.model, clip.tokenizer, tau, clip.pixels["mean"], clip.pixels["std"]).to(teacher.device)
