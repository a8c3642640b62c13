"""DINOv2 ViT-L/14 as extractor: the Fréchet distance in its features is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675)."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..files import sha256_of
from ..weights import load_strictly, read_state
from .extractor import Extractor, Features
from .timm_extractor import file_of, installed

MODEL, SIDE, PATCH = "vit_large_patch14_dinov2", 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2Extractor(Extractor):
    """The class token after the last norm, 1024 numbers, of pictures resized to 224x224.

    Resizing is PIL's bicubic to 8 bits, without crop, as in the paper's code (dgm-eval, its default). The positions of
    the 37x37 patches that DINOv2 was trained on are brought to 16x16 as its own code does, see `positions`; timm's way
    differs, and so would the distance.
    """

    name = "dinov2 vit-l/14, 224 bicubic"

    def __init__(self, weights: str | Path | None, device: torch.device | str):
        timm = installed()
        path, _ = file_of(f"{MODEL}.lvd142m", weights)
        state = read_state(path)
        network = timm.create_model(MODEL, pretrained=False, img_size=SIDE)
        state.pop("mask_token", None)  # of training, in the file of Meta
        if "pos_embed" in state:
            state["pos_embed"] = positions(state["pos_embed"], SIDE // PATCH)
        load_strictly(network, state, path, "DINOv2 ViT-L/14")
        self.network, self.device = network.eval().requires_grad_(False).to(device), device
        self.dimensions, self.sha256 = network.num_features, sha256_of(path)
        if weights:
            self.name = f"{self.name}, weights {path.name}"

    def prepare(self, image: np.ndarray) -> Tensor:
        small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Features:
        return Features(self.network(batch.to(self.device)).float().cpu())


def positions(embedded: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + N, D), class token first, with the N patches resampled to side x side.

    Bicubic without antialiasing, the scale (side + 0.1) / sqrt(N): DINOv2's interpolate_pos_encoding with the values of its
    torch.hub models (interpolate_offset 0.1, interpolate_antialias False). Of as many patches it is returned as it is.
    """
    old = round((embedded.shape[1] - 1) ** 0.5)
    if old == side:
        return embedded
    patches = embedded[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedded[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)
