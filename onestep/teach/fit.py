"""The plain supervised loop that the embedded networks are trained with."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ..rng import Rng

GAMMA = 6.94  # a relative width of 0.10


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, Rng], Tensor],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    warmup: int = 200,
    seed: int = 0,
    save_every: int = 500,
) -> nn.Module:
    """Minimise `loss(network, rng)` with AdamW; returns the moving average of the weights, in eval mode.

    The learning rate warms up linearly and then follows a half cosine to zero; gradients are clipped to norm 1. Step k
    draws its batch from (seed, k) alone, and a run that was interrupted goes on from its last checkpoint in `folder`.

    The average is the power-function one, decay (1 - 1/k)^(GAMMA + 1) after step k (Karras et al. 2024, "Analyzing and
    Improving the Training Dynamics of Diffusion Models", eq. 2 and appendix C): its width is a fixed fraction of the
    training however long that is, and nothing of the initial weights is left in it.
    """
    average = copy.deepcopy(network).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    modules, optimizers = {"network": network, "average": average}, {"all": optimizer}
    path = latest_checkpoint(folder)
    start = load_checkpoint(path, modules, optimizers) if path else 0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, mininterval=5, dynamic_ncols=True)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(network, Rng(seed, step, batch_size))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        weight = 1 - (1 - 1 / (step + 1)) ** (GAMMA + 1)
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], weight)
        for kept, current in zip(average.buffers(), network.buffers()):
            kept.copy_(current)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(folder, step + 1, modules, optimizers, keep=1)
    return average
