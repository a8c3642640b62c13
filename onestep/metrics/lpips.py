"""LPIPS as a distance for `diversity`, through the package `lpips`, with the trunk's weights from a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import sha256_of
from ..weights import find_file, read_state

FILE = "alexnet-owt-7be5be79.pth"
URL = f"https://download.pytorch.org/models/{FILE}"
SHA256_PREFIX = "7be5be79"
"""Of torchvision's file, as its name says."""


class LPIPS:
    """Learned perceptual distance v0.1 on AlexNet (Zhang et al. 2018, arXiv 1801.03924), all pairs of two batches.

    Takes pictures of one size in [-1, 1], (n, 3, H, W) and (m, 3, H, W), to distances (n, m). The weights of the distance
    come with the package; AlexNet's are torchvision's file.
    """

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        """Raises ValueError where package or weights cannot be had."""
        try:
            import lpips
        except ImportError as error:
            raise ValueError("LPIPS comes with a package: type pip install lpips") from error
        path = find_file("AlexNet for LPIPS", URL, FILE, weights, None if weights else SHA256_PREFIX)
        network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        own = network.net.state_dict()  # slice2.3.weight is AlexNet's features.3.weight
        known = read_state(path)
        needed = {name: "features." + name.partition(".")[2] for name in own}
        missing = [each for name, each in needed.items() if each not in known or known[each].shape != own[name].shape]
        if missing:
            raise ValueError(
                f"{path} is not torchvision's AlexNet: {missing[0]} is missing or has another shape; fetch {URL}"
            )
        network.net.load_state_dict({name: known[each] for name, each in needed.items()})
        self.network = network.eval().requires_grad_(False).to(device)
        self.name, self.sha256, self.device = "LPIPS v0.1 AlexNet", sha256_of(path), device

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([self.network(row[None].expand_as(b).to(self.device), b.to(self.device)).flatten() for row in a])
