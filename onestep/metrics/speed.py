"""How fast an exported folder makes images, and what memory that takes: measured on the folder's own pipeline.

Times are those of whole calls as a user waits for them: the clock is read when the device has finished (synchronised
before and after), the first calls are thrown away, and of the rest the median and the quartiles are kept. The network is
timed apart, by repeating its last call inside the pipeline with the very arguments that it had there; what the pipeline
takes beyond its passes is text encoders, the decoding of latents, the scheduler and the drawing of noise.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .memory import Memory
from .render import family_of, render

GAIN = 1.02
"""A batch has to make so many times more images a second than the best before it to count as faster."""


@dataclass
class Passes:
    """Calls of a network, the samples in them, and the arguments of the last."""

    calls: int = 0
    samples: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


@contextmanager
def counted(network: nn.Module) -> Iterator[Passes]:
    """Counts what enters `network` by a hook, while the context lasts."""
    passes = Passes()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.calls += 1
        # its first tensor that is no bare number is the batch: a time may be one
        passes.samples += next(len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim > 1)
        passes.args, passes.kwargs = args, kwargs

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def timed(call: Callable[[], object], device: torch.device, warmup: int, calls: int) -> dict[str, float]:
    """Median and quartiles, in seconds, of `calls` calls after `warmup` that are not counted."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds = []
    for _ in range(warmup + calls):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds[warmup:], [0.25, 0.5, 0.75])
    return {"median_s": float(median), "lower_quartile_s": float(low), "upper_quartile_s": float(high), "calls": calls}


@torch.no_grad()
def measure(
    pipe: Any, memory: Memory, batch_size: int, steps: int, guidance: float, *, warmup: int, calls: int, prompt: str = ""
) -> dict[str, Any]:
    """Times, passes and memory of one batch size, JSON-able. Images have the classes 0, 1, ... in turn, or all `prompt`.

    Raises torch.cuda.OutOfMemoryError where the device has too little.
    """
    family, device = family_of(pipe), torch.device(pipe.device)
    network = getattr(pipe, family.network)
    classes = family.classes(pipe) or 1
    conditions = [prompt if family.prompts else i % classes for i in range(batch_size)]

    def call() -> Tensor:
        draws = [torch.Generator("cpu").manual_seed(i) for i in range(batch_size)]
        return family.sample(pipe, conditions, draws, steps, guidance)

    memory.reset()
    with counted(network) as passes:
        call()
    whole = timed(call, device, max(0, warmup - 1), calls)
    peak = memory.peak()
    alone = timed(lambda: network(*passes.args, **(passes.kwargs or {})), device, warmup, calls)
    return {
        "batch_size": batch_size,
        "images_per_s": batch_size / whole["median_s"],
        "pipeline": whole,
        "network": alone,
        "network_calls": passes.calls,
        "passes_per_image": passes.samples / batch_size,
        "peak_memory_bytes": peak,
    }


def speed(
    pipe: Any, *, steps: int, guidance: float, warmup: int = 3, calls: int = 20, largest: int = 256, prompt: str = ""
) -> dict[str, Any]:
    """Latency of one image, and the throughput of the best batch among the powers of two up to `largest`.

    The search ends where two sizes after each other make no more than GAIN times the images a second of the best, or
    where memory ends. Raises ValueError for numbers that are not possible and as `render` does.
    """
    for flag, value, least in (("--warmup", warmup, 1), ("--calls", calls, 3), ("--largest-batch", largest, 1)):
        if value < least:
            raise ValueError(f"{flag} {value} is not allowed; type {flag} {least} or more")
    render(pipe, [], [], steps, guidance, 1)  # refuses what the pipeline cannot honour
    memory = Memory(torch.device(pipe.device))
    tried: list[dict[str, Any]] = []
    best, stopped = None, f"the largest batch allowed, {largest}"
    size, without = 1, 0
    while size <= largest and without < 2:
        if tried and not memory.fits_twice():
            stopped = f"memory: a batch of {size} would not fit"
            break
        try:
            tried.append(measure(pipe, memory, size, steps, guidance, warmup=warmup, calls=calls, prompt=prompt))
        except torch.cuda.OutOfMemoryError:
            if not tried:
                raise ValueError(
                    "one image does not fit the device's memory; try --dtype float16 or another device"
                ) from None
            stopped = f"memory: a batch of {size} does not fit"
            break
        faster = best is None or tried[-1]["images_per_s"] > GAIN * best["images_per_s"]
        best, without = (tried[-1], 0) if faster else (best, without + 1)
        size *= 2
    if without == 2:
        stopped = "larger batches make no more images a second"
    return {
        "latency": tried[0],
        "throughput": best,
        "batches": [[each["batch_size"], each["images_per_s"]] for each in tried],
        "stopped_by": stopped,
        "memory_kind": memory.kind,
        "warmup": warmup,
    }
