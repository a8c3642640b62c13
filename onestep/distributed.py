"""Several processes: what accelerate's environment may ask for, and what becomes of one that is left alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .config import TrainConfig
from .fsdp import fully_shard

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: one of them alone writes checkpoints and scores students."""
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading",
}
"""Settings of accelerate that have to be false, by the variables that it sets for them."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out", "timed out")
"""What errors of torch.distributed say where another process is gone."""


def accelerator_of(config: TrainConfig) -> Accelerator:
    """The process's Accelerator. It starts the process group and places; precision is the trainer's, see `Trainer._next`.

    Raises ValueError where the environment asks for what does not fit the loop.
    """
    check_environment(config)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[patience])


def asked(variable: str) -> bool:
    """Whether a variable of accelerate's says yes."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")


def check_environment(config: TrainConfig) -> None:
    """Raises ValueError for what accelerate may be configured for and what does not fit several networks in one loop."""
    if asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed has one engine for each trained network, and only one engine a process works with accelerate: type "
            "accelerate launch --config_file with DDP or FSDP2, such as train/accelerate/fsdp2-8gpu.yaml"
        )
    if asked("ACCELERATE_USE_MEGATRON_LM") or asked("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError("only DDP and FSDP2 are possible: leave everything else out of accelerate's configuration")
    if not asked("ACCELERATE_USE_FSDP"):
        return
    if fully_shard is None:
        raise ValueError("FSDP2 needs torch 2.6 or later: type pip install -U torch, or launch with DDP")
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"fsdp_version is {version}; allowed is 2: write fsdp_version: 2 in accelerate's fsdp_config")
    for variable, name in REFUSED.items():
        if asked(variable):
            more = "; --gradient-checkpointing does it" if "activation" in name else ""
            raise ValueError(f"{name} is not possible here{more}: write {name}: false in accelerate's fsdp_config")
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        # kept whole they would be those from before the last update
        raise ValueError("weights are always sharded again after use: write fsdp_reshard_after_forward: true")
    wanted = {
        "--student lora": config.student == "lora",
        "--critic lora": config.critic == "lora",
        "--offload": config.offload,
        "--compile": config.compile,
        f"--optimizer {config.optimizer}": config.optimizer != "adamw",
    }
    for option in (each for each, given in wanted.items() if given):
        raise ValueError(f"{option} is not possible with FSDP2: leave it out, or launch with DDP")


def rows_of(config: TrainConfig, processes: int) -> int:
    """Rows of one micro-batch of one process. Raises ValueError where the batch cannot be split evenly."""
    share = config.accumulation * processes
    if config.batch_size % share:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be split over accumulation {config.accumulation} x {processes} "
            f"processes; type a multiple of {share}, for example --batch-size {-(-config.batch_size // share) * share}"
        )
    return config.batch_size // share


def shards(accelerator: Accelerator) -> bool:
    """Whether networks are sharded."""
    return asked("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1


@contextmanager
def others_alive(processes: int) -> Iterator[None]:
    """Raises ConnectionError, which is one line to a person, where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if processes > 1 and any(word in str(error) for word in LOST):
            reason = " ".join(str(error).split())[:200]
            raise ConnectionError(
                f"another process of this run has ended or hangs, see what it said ({reason}); the same command goes on "
                "from the last checkpoint"
            ) from error
        raise
