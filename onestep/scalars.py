"""The numbers that an objective logs, as means over the micro-batches of a step and over all processes."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class Scalars:
    """Means of what an objective puts into its `log`; a name keeps its value until it is logged again.

    All that is logged is itself a mean over a batch, so that these are the means over the global batch however it is split.
    """

    def __init__(self, log: Mapping[str, Tensor]):
        self.log, self._values = log, dict[str, list[Tensor]]()
        self._parts: defaultdict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around one turn of one micro-batch."""
        before = dict(self.log)
        yield
        for name, value in self.log.items():
            if value is not before.get(name):
                self._parts[name].append(value)

    def close(self) -> None:
        """After the last micro-batch of a step. Names that are no longer in the log are dropped."""
        self._values = {name: self._parts.get(name) or self._values.get(name, [value]) for name, value in self.log.items()}
        self._parts.clear()

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means of all processes, by name; every process has to call it, with the same names in its log."""
        values = {name: torch.stack(parts).mean() for name, parts in self._values.items()}
        if accelerator.num_processes == 1 or not values:
            return {name: float(value) for name, value in values.items()}
        each = torch.stack([value.to(accelerator.device, torch.float32) for value in values.values()])
        return dict(zip(values, accelerator.reduce(each, "mean").tolist()))
