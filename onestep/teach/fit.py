"""The plain supervised loop that the embedded networks are trained with."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    ema: float = 0.999,
    warmup: int = 200,
    seed: int = 0,
) -> nn.Module:
    """Minimise `loss(network, rng)` for `steps` steps of AdamW; returns the exponential moving average of the weights.

    The learning rate warms up linearly and then follows a half cosine to zero; gradients are clipped to norm 1.
    Step k draws its batch from a generator seeded with (seed, k) alone.
    """
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * k / steps))
    )
    bar = tqdm(range(steps), desc=name, mininterval=5, dynamic_ncols=True)
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)
        value = loss(network, torch.default_generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
    return average.module.eval()
