"""An adapter for others: as a LoRA file, or merged into a network of its own."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import replaced
from .adapter import Adapter
from .merging import plain

FORMATS = ("diffusers", "kohya")
"""What diffusers' own trainers write, and what ComfyUI and its kin expect of a UNet's LoRA; diffusers reads both."""


def save_lora(adapter: Adapter, path: Path, format: str = "diffusers", dtype: torch.dtype = torch.float32) -> Path:
    """Write a file for diffusers' `load_lora_weights` and return it; a folder gets diffusers' own file name.

    B is stored times alpha / rank, and alpha as rank where the format has it: the adapter is right at strength 1 for
    readers that know alpha and for those that do not. Raises ValueError where `format` cannot be or is not known.
    """
    unet = isinstance(adapter.base, UNet2DConditionModel)
    if format not in FORMATS or (format == "kohya" and not unet):
        allowed = FORMATS if unet else FORMATS[:1]
        kind = type(adapter.base).__name__
        raise ValueError(f"no LoRA of a {kind} can be written as {format!r}; allowed: {', '.join(allowed)}")
    scales = {"lora_A": 1.0, "lora_B": adapter.alpha / adapter.rank}
    tensors: dict[str, Tensor] = {}
    for key, value in adapter.state_dict().items():
        scaled = value * scales[key.rpartition(".")[2]]
        tensors[f"{'unet' if unet else 'transformer'}.{key}.weight"] = scaled.to("cpu", dtype).contiguous()
    if format == "kohya":
        tensors = convert_state_dict_to_kohya(tensors)
    file = path if path.suffix == ".safetensors" else path / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    return file


def merge(adapter: Adapter, dtype: torch.dtype, device: torch.device | str | None = None) -> nn.Module:
    """A new plain network with W + (alpha / rank) B A in place of W; see `plain`."""
    return plain(adapter.base, dtype, device, adapter.name)
