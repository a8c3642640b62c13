"""Optimisers by the name that `--optimizer` takes."""

from typing import Any

import torch
from torch import nn

from .config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimiser of one player. Raises ValueError where it cannot be had."""
    given: Any = {"lr": lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **given, fused=True)
    return optimizer_class(config.optimizer)(parameters, **given)


def optimizer_class(name: str) -> Any:
    """AdamW with 8-bit states, paged to the host if asked for (Dettmers et al. 2022).

    Raises ValueError without bitsandbytes.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"--optimizer {name} needs bitsandbytes: type pip install bitsandbytes, or leave it out") from error
    return {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged-adamw8bit": bitsandbytes.optim.PagedAdamW8bit}[name]
