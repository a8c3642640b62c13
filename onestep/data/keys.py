"""What a teacher's part of a cache is known by."""

import hashlib
from typing import Any

import torch
from torch import nn

from ..denoiser import body
from ..teacher import Teacher


def weights_key(module: nn.Module) -> str:
    """A hash of a module's class and of the names, dtypes, shapes and bits of its tensors."""
    digest = hashlib.sha256(type(module).__name__.encode())
    if body(module) is not module:  # adapters, whose base is not registered with them
        digest.update(weights_key(body(module)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encoder_key(teacher: Teacher) -> dict[str, Any]:
    """What decides the x0 of a picture: the family of the teacher, its size, and its VAE if it has one."""
    vae = teacher.pipeline.components.get("vae")
    key: dict[str, Any] = {"family": type(teacher).__name__, "image": list(teacher.image_shape), "x_0": list(teacher.shape)}
    if vae is None:
        return key
    about = {name: value for name, value in sorted(vae.config.items()) if not name.startswith("_")}
    return key | {"vae": weights_key(vae), "config": hashlib.sha256(repr(about).encode()).hexdigest()}
