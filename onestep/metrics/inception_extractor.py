"""Inception-v3 as clean-fid calls it, with what sFID and the Inception Score need beside the pooled features."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import sha256_of
from .extractor import Extractor, Features
from .inception import DIMENSIONS, SHA256, find_weights, load_inception

SPATIAL = 7
"""Channels of mixed_6/conv that sFID takes, 7 x 17 x 17 = 2023 numbers (Nash et al. 2021, arXiv 2103.03841; ADM)."""
SIDE = 299


class InceptionExtractor(Extractor):
    """clean-fid's network in one of its modes; the distance in it is FID where the file is the published one.

    pooled: 2048 numbers, exactly as clean-fid computes them. spatial: the first 7 channels of `mixed_6.conv`. logits:
    W pooled of the network's last layer without its bias, as the first Inception Score and ADM's evaluator have them.
    spatial and logits are None for a file without these layers, or where its layers, one after the other, are not the
    whole network.
    """

    dimensions = DIMENSIONS

    def __init__(self, mode: str, weights: str | Path | None, device: torch.device | str):
        from cleanfid.resize import build_resizer

        path = find_weights(weights)
        self.mode, self.device, self.resize = mode, device, build_resizer(mode)
        network: Any = load_inception(path, mode, device)
        self.sha256 = sha256_of(path)
        own = self.sha256 == SHA256
        self.metric = "FID" if own else "FD"
        self.name = f"inception-v3 (clean-fid, {mode})" + ("" if own else f", weights {path.name}")
        self.network, self.parts = network, _parts(network.base, device)

    def prepare(self, image: np.ndarray) -> Tensor:
        """0 to 255: resized to 299x299 in mode clean, as it is in mode legacy_tensorflow."""
        return torch.from_numpy(np.asarray(self.resize(image), dtype=np.float32)).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Features:
        batch = batch.to(self.device)
        pooled = self.network(batch)
        if self.parts is None:
            return Features(pooled.float().cpu())
        before, conv, weight = self.parts
        x = normalised(batch if self.mode == "clean" else tensorflow_resized(batch))
        for layer in before:
            x = layer(x)
        spatial = conv(x)[:, :SPATIAL].flatten(1)
        return Features(pooled.float().cpu(), spatial.float().cpu(), F.linear(pooled.float(), weight.float()).cpu())


def normalised(pixels: Tensor) -> Tensor:
    """0 to 255 to what the network's layers take, in clean-fid's own words."""
    return (pixels - 128) / 128


def tensorflow_resized(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 3, 299, 299) as the network does inside: tf.image.resize_bilinear, corners aligned top left.

    The affine grid is shifted by 1/W - 1/299 and 1/H - 1/299 (NVlabs, stylegan2-ada-pytorch, frechet_inception_distance).
    """
    count, channels, height, width = pixels.shape
    theta = torch.eye(2, 3, device=pixels.device, dtype=pixels.dtype)
    theta[0, 2], theta[1, 2] = 1 / width - 1 / SIDE, 1 / height - 1 / SIDE
    grid = F.affine_grid(theta[None].expand(count, -1, -1), [count, channels, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _parts(base: Any, device: torch.device | str) -> tuple[list[Any], Any, Tensor] | None:
    """The layers before mixed_6, its conv, and the weight of the last layer; None where the file has them otherwise.

    That the layers in their order are the network is checked on one picture of noise.
    """
    children = dict(base.layers.named_children())
    names = list(children)
    last = dict(base.named_children()).get("output")
    if "mixed_6" not in children or last is None or "conv" not in dict(children["mixed_6"].named_children()):
        return None
    noise = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    x = noise
    for layer in children.values():
        x = layer(x)
    if not torch.allclose(x.flatten(), base.layers(noise).flatten(), rtol=1e-3, atol=1e-4):
        return None
    return [children[name] for name in names[: names.index("mixed_6")]], children["mixed_6"].conv, last.weight
