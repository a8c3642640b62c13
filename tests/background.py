"""Training runs in processes of their own, forked from one that has imported everything, so that each starts at once."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["onestep.train", "onestep.run", "diffusers", "torchvision", "torch.distributed.nn"])

TINY = ["--device", "cpu", "--grid-every", "1000", "--grid-steps", "1", "--batch-size", "8", "--ratio", "2"]
"""Flags that make a run small."""


def start(argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """python -m onestep.train argv on one thread, its output in `log`."""
    process = CONTEXT.Process(target=_train, args=(list(argv), log, dict(environment or {})))
    process.start()
    return process


def finished(process: BaseProcess) -> int:
    """The exit code; a process that hangs is killed."""
    process.join(240)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode


def train(argv: Sequence[str], log: Path) -> str:
    """A run to its end; returns its output."""
    code = finished(start(argv, log))
    assert code == 0, log.read_text()
    return log.read_text()


def train_on(processes: int, argv: Sequence[str], log: Path) -> None:
    """The same run by several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    logs = [log.with_name(f"{log.name}-{r}") for r in range(processes)]
    started = [start(argv, each, rank) for each, rank in zip(logs, ranks)]
    codes = [finished(each) for each in started]
    assert codes == [0] * processes, "\n".join(each.read_text() for each in logs)


def wait_for(folder: Path, pattern: str, process: BaseProcess) -> None:
    """Until `folder` holds something of that name."""
    while not list(folder.glob(pattern)):
        assert process.is_alive(), f"the run ended before there was a {pattern}"
        time.sleep(0.002)


def _train(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    from onestep.train import main

    os.environ.update(environment)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    try:
        code = main(argv)
    finally:
        sys.stdout.flush()
    sys.exit(code)
