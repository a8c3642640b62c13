"""The most memory that something took."""

from pathlib import Path

import torch

STATUS, CLEAR, SYSTEM = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
KINDS = {"cuda": "allocated by torch, weights included", "cpu": "growth of the process, weights excluded"}


class Memory:
    """The peak of memory in bytes since the last `reset`.

    On CUDA it is all that torch has allocated there, weights included; on the CPU, under Linux, how far the process's
    resident memory is above what it was when this object was made; elsewhere it is not known and None.
    """

    def __init__(self, device: torch.device):
        self.device, self.kind = device, KINDS.get(device.type, "not known")
        self._before = _kibibytes(STATUS, "VmRSS")

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.is_file():
            CLEAR.write_text("5")  # proc(5): the peak of resident memory is then what is resident now

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        highest = _kibibytes(STATUS, "VmHWM") if self.device.type == "cpu" else None
        return None if highest is None or self._before is None else max(0, highest - self._before)

    def fits_twice(self) -> bool:
        """Whether twice the peak can be had. CUDA refuses what cannot; Linux would end the process."""
        peak, free = self.peak(), _kibibytes(SYSTEM, "MemAvailable")
        return self.device.type != "cpu" or peak is None or free is None or peak < free


def _kibibytes(path: Path, name: str) -> int | None:
    """The bytes behind a name in a file of Linux's; None where there is no such file."""
    if not path.is_file():
        return None
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
