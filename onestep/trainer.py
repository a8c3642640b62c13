"""The training loop: backward, step, average, checkpoint, resume, log, draw. It knows no method."""

import copy
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from .denoiser import unwrap
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
        share = config.accumulation * self.accelerator.num_processes
        if config.batch_size % share:
            raise ValueError(
                f"batch_size {config.batch_size} cannot be split over accumulation {config.accumulation} x "
                f"{self.accelerator.num_processes} processes; type a multiple of {share}"
            )
        self.rows = config.batch_size // share
        self.average = copy.deepcopy(generator.denoiser.network).requires_grad_(False)
        self.members = {name: list(modules) for name, modules in objective.players().items()}
        self.optimizers = {name: self._optimizer(name) for name in self.members}
        self._saved = {f"{name}-{i}": m for name, ms in self.members.items() for i, m in enumerate(bare(ms))}
        self._saved["average"] = self.average
        for members in self.members.values():
            for member in members:
                member.network = self.accelerator.prepare(member.network)
        self._grid: tuple[Tensor, Tensor, Tensor] | None = None

    def _optimizer(self, player: str) -> torch.optim.Optimizer:
        c = self.config
        parameters = [p for network in bare(self.members[player]) for p in network.parameters()]
        lr = c.lr if player == "generator" else c.critic_lr
        return torch.optim.AdamW(parameters, lr, (c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)

    # ---- the loop

    def run(self) -> bool:
        """Train to the end; False where a signal asked to stop (the state is saved)."""
        self.resume()
        c = self.config
        with self._logging() as log, self._signals():
            while self.step < c.iterations and not self.stopped:
                self.update()
                self.step += 1
                if self.step % c.log_every == 0 or self.step == c.iterations:
                    log(self._scalars())
                if c.grid_every and self.step % c.grid_every == 0:
                    self.draw(self.folder / "grids" / f"step-{self.step:08d}.png")
                if self.step % c.checkpoint_every == 0 or self.step == c.iterations or self.stopped:
                    self.save()
        return self.step >= c.iterations

    def update(self) -> None:
        """One optimiser step of every player whose turn it is, over all micro-batches."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._lr_factor()
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
        with self.accelerator.autocast():  # teacher and critic in one precision
            return next(turns, None)

    def _apply(self, player: str) -> None:
        optimizer = self.optimizers[player]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if player == "generator":
            student = unwrap(self.generator.denoiser.network)
            averaged, current = list(self.average.parameters()), list(student.parameters())
            torch._foreach_lerp_(averaged, [p.detach() for p in current], 1 - self.config.ema)

    def _lr_factor(self) -> float:
        c = self.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup))
        if c.lr_decay == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * self.step / c.iterations))

    # ---- state

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if there is one."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is not None:
            self.step = load_checkpoint(path, self._saved, self.optimizers)

    def save(self) -> None:
        """Write a checkpoint of all networks and optimisers."""
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, self.step, self._saved, self.optimizers, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop after the step in progress; a second one is obeyed at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            tqdm.write("stopping after this step; once more to stop at once")

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
                raise FloatingPointError(
                    f"the {name} loss is {value} at step {self.step}; the last checkpoint is still good: "
                    "resume with a smaller --lr in a new --output, or with --mixed-precision no"
                )
        return values

    @contextmanager
    def _logging(self) -> Iterator[Any]:
        """Progress bar, metrics.jsonl and TensorBoard; rows past a resumed step are dropped."""
        c, path = self.config, self.folder / "metrics.jsonl"
        if not self.accelerator.is_main_process:
            yield lambda scalars: None
            return
        rows = path.read_text().splitlines() if path.exists() else []
        kept = [row for row in rows if row and json.loads(row)["step"] <= self.step]
        path.write_text("".join(row + "\n" for row in kept))
        writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        bar = tqdm(total=c.iterations, initial=self.step, desc=c.method, unit="it", dynamic_ncols=True)
        mark = [time.monotonic(), float(self.step)]

        def log(scalars: dict[str, float]) -> None:
            now = time.monotonic()
            rate = (self.step - mark[1]) * c.batch_size / (now - mark[0])
            mark[:] = [now, float(self.step)]
            row = {"step": self.step, **scalars, "lr": c.lr * self._lr_factor(), "images_per_second": rate}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                writer.add_scalar(name, value, self.step)
            bar.update(self.step - bar.n)
            bar.set_postfix({**{k: f"{v:.3g}" for k, v in scalars.items()}, "img/s": f"{rate:.0f}"})

        try:
            yield log
        finally:
            bar.update(self.step - bar.n)
            bar.close()
            writer.close()

    def averaged(self) -> Generator:
        """The student with its averaged weights."""
        denoiser = copy.copy(self.generator.denoiser)
        denoiser._modules = {"network": self.average}
        return Generator(denoiser, self.generator.times, self.generator.input_scale)

    @torch.no_grad()
    def draw(self, path: Path, columns: int = 6) -> None:
        """A grid PNG: teacher with many steps | student, same noise and classes in both; one row a class."""
        if not self.accelerator.is_main_process:
            return
        rng = Rng(self.config.seed, -1, columns * min(10, self.teacher.classes), device=self.teacher.device)
        cond, uncond = self.teacher.encode(torch.arange(rng.total, device=self.teacher.device) // columns)
        z = rng.normal(self.teacher.shape)
        noises = [rng.normal(self.teacher.shape) for _ in self.generator.times[1:]]
        if self._grid is None:
            steps = self.config.grid_steps
            x_0 = self.teacher.sample(z, cond, uncond, self.objective.guidance, steps)
            self._teacher_images = self.teacher.to_images(x_0)
            self._grid = (z, self._teacher_images, z)
        student = self.teacher.to_images(self.averaged()(z, cond, noises))
        steps, few = self.config.grid_steps, len(self.generator.times)
        titles = (f"teacher, {steps} steps", f"student, {few} step{'s' * (few > 1)}")
        save_grid(path, self._teacher_images, student, titles, columns)


def bare(members: list[Any]) -> list[nn.Module]:
    """The networks behind the members of a player."""
    return [unwrap(member.network) for member in members]


def accelerator_of(config: TrainConfig) -> Accelerator:
    """The process's Accelerator for a configuration."""
    return Accelerator(cpu=config.device == "cpu", mixed_precision=config.mixed_precision)
