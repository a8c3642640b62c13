"""The training loop: backward, step, average, checkpoint, resume, log, draw. It knows no method."""

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import Data
from .denoiser import Cond, Denoiser, follow, unwrap
from .generator import Generator
from .grid import save_grid
from .objectives import Objective
from .rng import Rng
from .teacher import Teacher


class Trainer:
    """Runs an objective for `config.iterations` steps in `folder`, from the newest checkpoint there if any.

    Every random draw is a function of (seed, step), so a run that was killed and resumed ends with the weights of one
    that was not. `average` is the exponential moving average of the student, the network that is drawn and exported.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teacher,
        generator: Generator,
        objective: Objective,
        data: Data,
        folder: Path,
    ):
        self.config, self.teacher, self.generator, self.objective = config, teacher, generator, objective
        self.data, self.folder, self.step, self.stopped = data, folder, 0, False
        self.accelerator = accelerator_of(config)
        self.rows = rows_of(config, self.accelerator.num_processes)
        self.average = copy.deepcopy(generator.denoiser.network).requires_grad_(False)
        self.members = {name: list(modules) for name, modules in objective.players().items()}
        self.optimizers = {name: self._optimizer(name) for name in self.members}
        self._saved = {f"{name}-{i}": m for name, ms in self.members.items() for i, m in enumerate(bare(ms))}
        self._saved |= {"average": self.average, **objective.state()}
        for members in self.members.values():
            for member in members:
                member.network = self.accelerator.prepare(member.network)

    def _optimizer(self, player: str) -> torch.optim.Optimizer:
        c = self.config
        parameters = [p for network in bare(self.members[player]) for p in network.parameters()]
        given: Any = {"lr": self._lr(player), "betas": (c.beta1, c.beta2), "weight_decay": c.weight_decay}
        if c.optimizer == "adamw":
            return torch.optim.AdamW(parameters, **given, fused=True)
        return optimizer_class(c.optimizer)(parameters, **given)

    def _lr(self, player: str) -> float:
        """The learning rate of the step to come: linear warm-up, then constant or a half cosine to zero."""
        c = self.config
        peak = c.lr if player == "generator" else c.critic_lr
        warm = min(1.0, (self.step + 1) / max(1, c.warmup))
        return peak * warm * (1.0 if c.lr_decay == "constant" else 0.5 * (1 + math.cos(math.pi * self.step / c.iterations)))

    # ---- the loop

    def run(self) -> bool:
        """Train to the end; False where a signal asked to stop (the state is saved)."""
        self.resume()
        c, stop = self.config, False
        with self._logging() as log, self._signals():
            while self.step < c.iterations and not stop:
                self.update()
                self.step += 1
                last = self.step == c.iterations
                due = self.step % c.log_every == 0 or last
                if due:
                    log(self._scalars())
                if self.step % c.grid_every == 0:
                    self.draw(self.folder / "grids" / f"step-{self.step:08d}.png")
                stop = self._asked_to_stop(due)
                if self.step % c.checkpoint_every == 0 or last or stop:
                    self.save()
        return self.step >= c.iterations

    def update(self) -> None:
        """One optimiser step of every player whose turn it is, over all micro-batches."""
        for player, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._lr(player)
        c, accelerator = self.config, self.accelerator
        for micro in range(c.accumulation):
            last = micro == c.accumulation - 1
            start = (micro * accelerator.num_processes + accelerator.process_index) * self.rows
            batch = self.data.batch(self.step, c.batch_size, start, start + self.rows, self.teacher.device)
            turns = self.objective.step(batch, self.step)
            with ExitStack() as stack:
                if not last:
                    for members in self.members.values():
                        for member in members:
                            stack.enter_context(accelerator.no_sync(member.network))
                while turn := self._next(turns):
                    player, loss = turn
                    accelerator.backward(loss / c.accumulation)
                    if last:
                        self._apply(player)

    def _next(self, turns: Iterator[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
        # around the whole step, so that teacher and critic run in one precision; the networks are not patched for it.
        # No cache: older torch finds weights cast under no_grad again, without their gradient, in a chain's last call
        device, bf16 = self.accelerator.device.type, self.config.mixed_precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return next(turns, None)

    def _apply(self, player: str) -> None:
        optimizer = self.optimizers[player]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if player == "generator":
            follow(self.average, self.generator.denoiser.network, self.config.ema)
        self.objective.updated(player)

    # ---- state

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if there is one. Raises ValueError where it is damaged."""
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is not None:
            self.step = load_checkpoint(path, self._saved, self.optimizers)

    def save(self) -> None:
        """Write a checkpoint of all networks and optimisers, once they are known to be finite."""
        for name, network in self._saved.items():
            if not all(bool(p.isfinite().all()) for p in network.parameters()):
                raise self._diverged(f"{name} has weights that are not finite")
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, self.step, self._saved, self.optimizers, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _asked_to_stop(self, due: bool) -> bool:
        """Whether a signal came; several processes agree on it where they wait for each other anyway, at a log line."""
        if self.accelerator.num_processes == 1:
            return self.stopped
        if not due:
            return False
        flag = torch.tensor(float(self.stopped), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop after the step in progress; a second one is obeyed at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            # not print: a handler may not re-enter a stream that is being written
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- what a person sees

    def _scalars(self) -> dict[str, float]:
        values = {name: float(value) for name, value in self.objective.log.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(f"the {name} loss is {value}")
        return values

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.step}; the last checkpoint is still good: train again with a smaller --lr in a new "
            "--output, or with --mixed-precision no"
        )

    @contextmanager
    def _logging(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """Progress bar, metrics.jsonl and TensorBoard; rows past a resumed step are dropped."""
        c, path = self.config, self.folder / "metrics.jsonl"
        if not self.accelerator.is_main_process:
            yield lambda scalars: None
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_rows(path, self.step)
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        # shown from the first row on: an error of the first step is then a line by itself
        bar = tqdm(total=c.iterations, initial=self.step, desc=c.method, unit="it", dynamic_ncols=True, delay=1e-3)
        since, before = time.monotonic(), self.step

        def log(scalars: dict[str, float]) -> None:
            nonlocal since, before
            now = time.monotonic()
            rate = (self.step - before) * c.batch_size / (now - since)
            since, before = now, self.step
            lr = self.optimizers["generator"].param_groups[0]["lr"]
            row = {"step": self.step, **scalars, "lr": lr, "images_per_second": rate}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                writer.add_scalar(name, value, self.step)
            bar.set_postfix({**{k: f"{v:.3g}" for k, v in scalars.items()}, "img/s": f"{rate:.0f}"}, refresh=False)
            bar.update(self.step - bar.n)

        try:
            yield log
        finally:
            bar.close()
            writer.close()

    def averaged(self) -> Generator:
        """The student with its averaged weights."""
        live = self.generator.denoiser
        denoiser = Denoiser(self.average, live.schedule, live.prediction, live.call)
        return self.generator.around(denoiser)

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """A grid PNG: teacher with many steps | student, same noise and classes in both; one row a class."""
        if not self.accelerator.is_main_process:
            return
        z, noises, cond, by_teacher = self._panel
        student = self.averaged()
        by_student = self._pictures(lambda of: student(z[of], rows_in(cond, of), [each[of] for each in noises]), len(z))
        few = len(self.generator.times)
        many = self.config.grid_steps
        titles = (f"teacher, {many} step{'s' * (many > 1)}", f"student, {few} step{'s' * (few > 1)}")
        save_grid(path, by_teacher, by_student, titles, self.config.grid_columns)
        self.teacher.rest()

    @cached_property
    @torch.no_grad()
    def _panel(self) -> tuple[Tensor, list[Tensor], Cond, Tensor]:
        """Noise, the chain's later noises, conditions, and the teacher's pictures of them: the same in every grid."""
        teacher = self.teacher
        columns = self.config.grid_columns
        rng = Rng(self.config.seed, -1, columns * min(10, teacher.classes), device=teacher.device)
        cond, uncond = teacher.encode(torch.arange(rng.total, device=teacher.device) // columns)
        z, *noises = [rng.normal(teacher.shape) for _ in range(self.generator.draws)]
        guidance, steps = self.objective.guidance, self.config.grid_steps

        def sample(of: slice) -> Tensor:
            return teacher.sample(z[of], rows_in(cond, of), uncond and rows_in(uncond, of), guidance, steps)

        return z, noises, cond, self._pictures(sample, len(z))

    def _pictures(self, make: Callable[[slice], Tensor], count: int) -> Tensor:
        """Pictures, on the CPU, of `count` x0; only as many are made at once as training has in memory anyway."""
        parts = [slice(start, start + self.rows) for start in range(0, count, self.rows)]
        return torch.cat([self.teacher.to_images(make(part)).cpu() for part in parts])


def rows_in(cond: Cond, rows: slice) -> Cond:
    """Some rows of a batch of conditions."""
    return {name: value[rows] for name, value in cond.items()}


def optimizer_class(name: str) -> Any:
    """AdamW with 8-bit states, paged to the host if asked for (Dettmers et al. 2022).

    Raises ValueError without bitsandbytes.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"--optimizer {name} needs bitsandbytes: type pip install bitsandbytes, or leave it out") from error
    return {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged-adamw8bit": bitsandbytes.optim.PagedAdamW8bit}[name]


def bare(members: list[Any]) -> list[nn.Module]:
    """The networks behind the members of a player."""
    return [unwrap(member.network) for member in members]


def keep_rows(path: Path, step: int) -> None:
    """Drop the rows of a JSON-lines file past `step`, and a last line that was cut off by a kill."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(kept))
    scratch.replace(path)


def rows_of(config: TrainConfig, processes: int) -> int:
    """Rows of one micro-batch of one process. Raises ValueError where the batch cannot be split evenly."""
    share = config.accumulation * processes
    if config.batch_size % share:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be split over accumulation {config.accumulation} x {processes} "
            f"processes; type a multiple of {share}, for example --batch-size {-(-config.batch_size // share) * share}"
        )
    return config.batch_size // share


def accelerator_of(config: TrainConfig) -> Accelerator:
    """The process's Accelerator. It distributes and places; precision is the trainer's, see `Trainer._next`."""
    return Accelerator(cpu=config.device == "cpu", mixed_precision="no")
