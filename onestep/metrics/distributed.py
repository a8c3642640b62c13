"""Several processes score one set of images, and all of them see the features in the order of the images.

Image i belongs to block i // BLOCK, and block b is made by the process b % W of W. A process makes the images of `mine`
and hands their features to `in_order`, which gives every process all blocks, one round of W blocks at a time. What is
computed from them (`Moments`, or features kept for KID, precision and recall, the Inception Score) is then computed from
the same numbers in the same order as by a single process, and has the same bits if the features have.

Without torch.distributed set up, a process is alone and all of this is the identity.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .frechet import BLOCK


def mine(count: int) -> list[int]:
    """The indices, ascending, of those of `count` images that this process makes."""
    rank, world = _place()
    return [i for i in range(count) if i // BLOCK % world == rank]


def in_order(features: Iterable[Tensor], count: int, dimensions: int) -> Iterator[Tensor]:
    """The features of images 0 .. count - 1 in blocks of BLOCK (the last may be smaller), float32 on the CPU.

    features: float32 (B, dimensions) of this process's images in the order of `mine`, in batches of any size. All
    processes call this together and read it to its end: each block is waited for. Gathering runs on the CPU through
    gloo, whatever the processes have for training. Several kinds of features of an image go as the columns of one tensor.

    Raises ValueError for features of another shape, dtype or number. The other processes then wait for this one until
    something, torchrun for one, ends them.
    """
    rank, world = _place()
    group = _gloo() if world > 1 else None
    blocks = _blocks(features, len(mine(count)), dimensions)
    sizes = [min(BLOCK, count - start) for start in range(0, count, BLOCK)]
    try:
        for first in range(0, len(sizes), world):
            here = sizes[first : first + world]
            block = next(blocks) if rank < len(here) else torch.empty(0, dimensions)
            if group is None:
                yield block
                continue
            sent = torch.zeros(BLOCK, dimensions)  # gloo gathers equal shapes only
            sent[: len(block)] = block
            got = [torch.empty_like(sent) for _ in range(world)]
            dist.all_gather(got, sent, group=group)
            yield from (each[:size] for each, size in zip(got, here))
        next(blocks, None)  # refuses features that are left over
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def _gloo() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this process is in it, as all are
    return group


def _blocks(features: Iterable[Tensor], count: int, dimensions: int) -> Iterator[Tensor]:
    """Batches cut anew into blocks. Raises ValueError where they are not `count` vectors."""
    waiting, seen = torch.empty(0, dimensions), 0
    for batch in features:
        if batch.ndim != 2 or batch.shape[1] != dimensions or batch.dtype != torch.float32:
            raise ValueError(f"features {tuple(batch.shape)} of {batch.dtype}; allowed is float32 (B, {dimensions})")
        seen += len(batch)
        if seen > count:
            raise ValueError(f"features of {seen} images or more; this process is to give those of {count}, see `mine`")
        waiting = torch.cat([waiting, batch.detach().cpu()])
        while len(waiting) >= BLOCK:
            yield waiting[:BLOCK]
            waiting = waiting[BLOCK:]
    if seen < count:
        raise ValueError(f"features of {seen} images; this process is to give those of {count}, see `mine`")
    if len(waiting):
        yield waiting
