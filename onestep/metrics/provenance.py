"""What a result row says of where its numbers come from: hashes, versions, machine, date, commit."""

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..files import sha256_of
from .render import family_of


def sha256_of_weights(folder: str | Path, network: str = "") -> str:
    """Hex digest over the names and contents of the *.safetensors in a network's folder, in the order of their names.

    `network` is the path of that folder in `folder`, or a pattern for several. Raises ValueError where there are none.
    """
    files = sorted(Path(folder).glob(f"{network}/*.safetensors" if network else "*.safetensors"))
    if not files:
        raise ValueError(f"{folder}/{network} holds no *.safetensors: export the folder again")
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the working directory, with "-dirty" where tracked files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def generation(pipe: Any, folder: str | Path, count: int, first_seed: int, steps: int, guidance: float) -> dict[str, Any]:
    """What made the images: the export, its weights' hash, seeds, steps, guidance and network passes an image."""
    family = family_of(pipe)
    return {
        "export": Path(folder).as_posix(),
        "pipeline": type(pipe).__name__,
        "scheduler": type(getattr(pipe, "scheduler", None) or pipe.student(0).scheduler).__name__,
        "weights_sha256": sha256_of_weights(folder, family.network),
        "count": count,
        "seeds": [first_seed, first_seed + count - 1],
        "steps": steps,
        "guidance": guidance,
        "passes_per_image": family.passes(steps, guidance),
    }


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Versions, machine, UTC date and commit, as one JSON-able dictionary."""
    import diffusers

    device = torch.device(device)
    machine: dict[str, Any] = {"cpu": _processor(), "threads": torch.get_num_threads(), "device": device.type}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }
