"""Preference scorers on CLIP and BLIP: HPSv2, LAION's aesthetic predictor, ImageReward."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from ..clip_model import load_clip
from ..files import sha256_of
from ..weights import find_file, read_state
from .clip_score import cosines
from .preference import Scorer


class HPSv2(Scorer):
    """cos(E_I, E_T) of an open_clip ViT-H-14 fine-tuned on choices (Wu et al. 2023, arXiv 2306.09341).

    Papers print it times 100. Pictures are resized by their longer side and padded with black, as the package hpsv2 does.
    """

    file, url = "HPS_v2.1_compressed.pt", "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"

    def __init__(self, weights: str | Path | None, device: torch.device | str, model: str = "ViT-H-14"):
        path = find_file("HPSv2", self.url, self.file, weights)
        self.clip = load_clip(model, path, device)
        self.name, self.sha256 = f"HPSv2 ({path.name})", self.clip.sha256

    def scored(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        size = self.clip.pixels["size"]
        side = size if isinstance(size, int) else size[0]
        mean, std = self.clip.pixels["mean"], self.clip.pixels["std"]
        batch = torch.stack([T.normalize(padded(image, side), mean, std) for image in images])
        return cosines(self.clip.images(batch), self.clip.texts(prompts))


def padded(image: np.ndarray, side: int) -> Tensor:
    """uint8 (H, W, 3) to (3, side, side) in [0, 1]: bicubic, the longer side fills it, black on both sides of the other."""
    pixels = T.to_tensor(image)
    height, width = image.shape[:2]
    scale = side / max(height, width)
    high, wide = round(height * scale), round(width * scale)
    if scale != 1:
        pixels = T.resize(pixels, [high, wide], InterpolationMode.BICUBIC, antialias=True)
    top, left = (side - high) // 2, (side - wide) // 2
    return F.pad(pixels, (left, side - wide - left, top, side - high - top))


class Aesthetic(Scorer):
    """LAION's aesthetic predictor: linear layers on the unit embedding of CLIP ViT-L/14, without activations and prompts.

    The head's file decides the layers: one of 768 to 1 (github.com/LAION-AI/aesthetic-predictor), or the five of
    github.com/christophschuhmann/improved-aesthetic-predictor. About 1 to 10.
    """

    file = "sac+logos+ava1-l14-linearMSE.pth"
    url = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{file}"
    prompted = False

    def __init__(
        self,
        weights: str | Path | None,
        device: torch.device | str,
        model: str = "ViT-L-14-quickgelu/openai",
        clip_weights: str | Path | None = None,
    ):
        path = find_file("the aesthetic predictor", self.url, self.file, weights)
        self.layers = linear_layers(read_state(path), path)
        self.clip = load_clip(model, clip_weights, device)
        given, taken = self.clip.dimensions, self.layers[0][0].shape[1]
        if given != taken:
            raise ValueError(f"{path} takes {taken} numbers, and {self.clip.name} gives {given}: name another CLIP model")
        self.name, self.sha256 = f"aesthetic ({path.name} on {self.clip.name})", sha256_of(path)

    def scored(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        batch = torch.stack([self.clip.prepare(image) for image in images])
        x = F.normalize(self.clip.images(batch).cpu().double(), dim=1)
        if x.shape[1] != (expected := self.layers[0][0].shape[1]):
            raise ValueError(
                f"the head takes {expected} numbers, and {self.clip.name} gives {x.shape[1]}: type another CLIP model"
            )
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(1)


def linear_layers(state: dict[str, Tensor], path: Path) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of a stack of linear layers, in the order of the file, float64.

    Raises ValueError where a layer does not take what the one before it gives, or the last gives more than one number.
    """
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    fits = bool(names) and set(state) == {name + part for name in names for part in ("weight", "bias")}
    fits = fits and all(state[f"{name}weight"].ndim == 2 for name in names)
    layers = [(state[f"{name}weight"].double(), state[f"{name}bias"].double()) for name in names] if fits else []
    chained = all(low[0].shape[0] == high[0].shape[1] for low, high in pairwise(layers))
    if not layers or not chained or layers[-1][0].shape[0] != 1:
        raise ValueError(f"{path} is not a head of linear layers that end in one number; fetch {Aesthetic.url}")
    return layers


class ImageReward(Scorer):
    """A BLIP with a head, trained on ranked pictures (Xu et al. 2023, arXiv 2304.05977), through the package image-reward.

    It needs its `med_config.json` beside the weights, and BLIP's tokenizer, which the package downloads.
    """

    file, url = "ImageReward.pt", "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt"

    def __init__(self, weights: str | Path | None, device: torch.device | str):
        if find_spec("ImageReward") is None:
            raise ValueError(
                "ImageReward comes with a package that insists on an old timm: make an environment for it and type "
                "pip install image-reward; or type --preference hpsv2"
            )
        path = find_file("ImageReward", self.url, self.file, weights)
        config = path.with_name("med_config.json")
        if not config.is_file():
            raise ValueError(f"no file {config}; fetch {self.url.replace(self.file, config.name)} and put it there")
        try:
            package: Any = import_module("ImageReward")
            self.model = package.load(str(path), device=str(device), med_config=str(config))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"ImageReward cannot be loaded: {error}; see what its package needs") from error
        self.name, self.sha256 = f"ImageReward ({path.name})", sha256_of(path)

    @torch.no_grad()
    def scored(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        pairs = zip(images, prompts)
        return torch.tensor(
            [self.model.score(prompt, Image.fromarray(image)) for image, prompt in pairs], dtype=torch.float64
        )
