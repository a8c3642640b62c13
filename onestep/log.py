"""What a run says of its numbers: progress bar, metrics.jsonl and TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .config import TrainConfig
from .files import replaced

HEALTH = "health/"
"""What the names of scalars that are not the objective's own begin with."""


class Log:
    """Rows of scalars after `step`, each on the progress bar, in `folder`/metrics.jsonl and in TensorBoard."""

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        self.path, self.batch_size, self.step = folder / "metrics.jsonl", config.batch_size, step
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        # shown from the first row on: an error of the first step is then a line by itself
        self.bar = tqdm(total=config.iterations, initial=step, desc=config.method, unit="it", dynamic_ncols=True, delay=1e-3)
        self.since = time.monotonic()

    def row(self, step: int, scalars: Mapping[str, float], lr: float) -> None:
        """The scalars of a step. The bar shows the objective's alone: the others are many and seldom."""
        now = time.monotonic()
        rate = (step - self.step) * self.batch_size / (now - self.since)
        self.since, self.step = now, step
        row = {"step": step, **scalars, "lr": lr, "images_per_second": rate}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        shown = {name: f"{value:.3g}" for name, value in scalars.items() if not name.startswith(HEALTH)}
        self.writer.flush()  # a kill then loses no row of a step that a checkpoint is of
        self.bar.set_postfix({**shown, "img/s": f"{rate:.0f}"}, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows of a JSON-lines file past `step`, and a last line that was cut off by a kill."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    with replaced(path) as partial:
        partial.write_text("".join(kept))
