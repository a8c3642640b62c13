"""The training loop: backward, step, average, checkpoint, resume, log, draw, check. It knows no method."""

import copy
import math
import os
import signal
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from .best import Best
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, tell_changed_caches
from .compiling import compile_networks
from .config import TrainConfig
from .data import Data
from .data.shards import IN_USE
from .denoiser import Denoiser, follow, unwrap
from .distributed import accelerator_of, others_alive, rows_of, shards
from .generator import Generator
from .grid import save_grid
from .health import Health, balance, due, told
from .log import HEALTH, Log, keep_rows
from .nonfinite import NonFinite, watch_of
from .objectives import Objective
from .objectives.base import Batch
from .optimizer import make_optimizer
from .panel import Panel
from .scalars import Scalars
from .sharding import Whole, clip, filled, finite, outline, shard, whole
from .teacher import Teacher

NORMS = 100
"""Latest gradient norms of each player that a check of health averages."""


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
        self._saved = {f"{name}-{i}": m for name, ms in self.members.items() for i, m in enumerate(bare(ms))}
        self._saved |= {"average": self.average, **objective.state()}
        self.best = Best(config, teacher, self.rows) if config.keep_best else None
        self.watch = watch_of(config, list(self.members), self.accelerator.device, self.accelerator.is_main_process)
        self._norms: defaultdict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=NORMS))
        self._losses = Scalars(objective.log)
        self.sharded, self._outlines = shards(self.accelerator), dict[str, nn.Module]()
        if config.compile:
            compile_networks([teacher.denoiser.network, *(net for each in self.members.values() for net in bare(each))])
        self._distribute()
        self.optimizers = {name: self._optimizer(name) for name in self.members}  # of the weights as they are now

    def _distribute(self) -> None:
        """Wrap the trained networks for DDP; or shard them, what follows them, and the teacher."""
        if not self.sharded:
            for member in (member for members in self.members.values() for member in members):
                member.network = self.accelerator.prepare(member.network)
            return
        self._outlines = {"teacher": outline(self.teacher.denoiser.network), "average": outline(self.average)}
        for network in (self.teacher.denoiser.network, *self._saved.values()):
            shard(network)

    def _optimizer(self, player: str) -> torch.optim.Optimizer:
        parameters = [p for network in bare(self.members[player]) for p in network.parameters()]
        return make_optimizer(self.config, parameters, self._lr(player))

    def _lr(self, player: str) -> float:
        """The learning rate of the step to come: linear warm-up, then constant or a half cosine to zero."""
        c = self.config
        peak = c.lr if player == "generator" else c.critic_lr
        warm = min(1.0, (self.step + 1) / max(1, c.warmup))
        return peak * warm * (1.0 if c.lr_decay == "constant" else 0.5 * (1 + math.cos(math.pi * self.step / c.iterations)))

    # ---- the loop

    def run(self) -> bool:
        """Train to the end; False where a signal asked to stop (the state is saved)."""
        with others_alive(self.accelerator.num_processes):
            self.resume()
            self._loop()
            if self.step >= self.config.iterations and self.sharded:
                self._put_together()
        return self.step >= self.config.iterations

    def _loop(self) -> None:
        c, stop = self.config, False
        with self._logging() as log, self._signals():
            while self.step < c.iterations and not stop:
                self.update()
                self.step += 1
                last = self.step == c.iterations
                checkpoint = self.step % c.checkpoint_every == 0 or last
                row = self.step % c.log_every == 0 or last or (checkpoint and self.best is not None)
                if row:
                    scalars = self._scalars()
                    scalars |= self._checked() if due(self.step, c, last) else {}
                    log(scalars | (self._scored() if checkpoint else {}))
                if self.step % c.grid_every == 0:
                    self.draw(self.folder / "grids" / f"step-{self.step:08d}.png")
                stop = self._asked_to_stop(row)
                if checkpoint or stop:
                    self.save()

    def update(self) -> None:
        """One optimiser step of every player whose turn it is, over all micro-batches."""
        for player, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._lr(player)
        turns = [self.objective.step(self._batch(micro), self.step) for micro in range(self.config.accumulation)]
        while self._turn(turns):
            pass
        self._losses.close()

    def _batch(self, micro: int) -> Batch:
        """This process's rows of a micro-batch."""
        start = (micro * self.accelerator.num_processes + self.accelerator.process_index) * self.rows
        return self.data.batch(self.step, self.config.batch_size, start, start + self.rows, self.teacher.device)

    def _turn(self, turns: Sequence[Iterator[tuple[str, Tensor]]]) -> bool:
        """The next player's turn in every micro-batch, and its update, which their turns after it see; False at the end."""
        player = None
        for micro, each in enumerate(turns):
            with self._unshared(micro < len(turns) - 1), self._losses.part():
                if turn := self._next(each):
                    player, loss = turn
                    self.watch.loss(self.step, player, loss)
                    self.accelerator.backward(loss / len(turns))
        if player is not None:
            self._apply(player)
        return player is not None

    @contextmanager
    def _unshared(self, local: bool) -> Iterator[None]:
        """Where `local`, gradients stay in this process, to be shared with those of the last micro-batch."""
        with ExitStack() as stack:
            if local and not self.sharded:  # sharded ones are shared at once: kept whole they take more memory
                for member in (member for members in self.members.values() for member in members):
                    stack.enter_context(self.accelerator.no_sync(member.network))
            yield

    def _next(self, turns: Iterator[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
        # around the whole step, so that teacher and critic run in one precision; the networks are not patched for it.
        # No cache: older torch finds weights cast under no_grad again, without their gradient, in a chain's last call
        device, bf16 = self.accelerator.device.type, self.config.mixed_precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return next(turns, None)

    def _apply(self, player: str) -> None:
        optimizer = self.optimizers[player]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip(parameters, self.config.clip_norm)
        if not self.watch.allows(self.step, player, norm):
            optimizer.zero_grad()
            return
        self._norms[player].append(norm)
        optimizer.step()
        optimizer.zero_grad()
        if player == "generator":
            follow(self.average, self.generator.denoiser.network, self.config.ema)
        self.objective.updated(player)

    # ---- state

    def resume(self) -> None:
        """Continue from the newest checkpoint in the folder, if there is one. Raises ValueError where it is damaged."""
        main = self.accelerator.is_main_process
        path = latest_checkpoint(self.folder / "checkpoints", aloud=main)
        if path is not None:
            self.step = load_checkpoint(path, *self._states())
            if main:
                tell_changed_caches(path, IN_USE)
        self.watch.resumed(self.step)
        if len(set(gather_object([self.step]))) > 1:  # such as on machines that do not share a folder
            raise ValueError(
                f"the processes of this run do not find the same checkpoints in {self.folder}: type --output with a folder "
                "that all machines share"
            )

    def save(self) -> None:
        """Write a checkpoint of all networks and optimisers, once they are known to be finite."""
        self.watch.require()
        self._require_finite()
        main, (networks, optimizers) = self.accelerator.is_main_process, self._states()
        if self.sharded:
            for each in (*networks.values(), *optimizers.values()):
                each.gather(main)
        if main:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, self.step, networks, optimizers, self.config.keep_checkpoints, IN_USE)
        self.accelerator.wait_for_everyone()

    def _states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Networks and optimisers as checkpoints hold them, the same for any number of processes."""
        if not self.sharded:
            return self._saved, self.optimizers
        networks = {name: Whole(network) for name, network in self._saved.items()}
        return networks, {name: Whole(optimizer) for name, optimizer in self.optimizers.items()}

    def _require_finite(self) -> None:
        bad = [name for name, network in self._saved.items() if not finite(network)]
        if bad := gather_object(bad) if self.sharded else bad:  # each process sees its part alone
            raise NonFinite(f"{bad[0]} has weights that are not finite", self.step - 1)

    def _asked_to_stop(self, row: bool) -> bool:
        """Whether a signal came; several processes agree on it where they wait for each other anyway, at a log line."""
        if self.accelerator.num_processes == 1:
            return self.stopped
        if not row:
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
        self.watch.require()
        return self.watch.logged(self.step - 1, self._losses.means(self.accelerator))

    @contextmanager
    def _logging(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """Progress bar, metrics.jsonl and TensorBoard, of one process alone; rows past a resumed step are dropped."""
        if not self.accelerator.is_main_process:
            yield lambda scalars: None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_rows(self.folder / "metrics.jsonl", self.step)
        log, group = Log(self.folder, self.config, self.step), self.optimizers["generator"].param_groups[0]
        try:
            yield lambda scalars: log.row(self.step, scalars, group["lr"])
        finally:
            log.close()

    def averaged(self) -> Generator:
        """The student with its averaged weights."""
        return self.generator.around(_around(self.generator.denoiser, self.average))

    def draw(self, path: Path) -> None:
        """A grid PNG: teacher with many steps | student, same noise and classes in both; one row a class."""
        if not (self.accelerator.is_main_process or self.sharded):
            return
        panel, columns = self._panel, self.config.grid_columns
        by_student = panel.pictures(panel.of(self.averaged()), columns)
        few, many = len(self.generator.times), self.config.grid_steps
        blocks = [
            (f"teacher, {many} step{'s' * (many > 1)}", panel.first(panel.by_teacher, columns)),
            (f"student, {few} step{'s' * (few > 1)}", by_student),
        ]
        if self.accelerator.is_main_process:
            save_grid(path, blocks, columns)
        self.teacher.rest()

    @cached_property
    def _panel(self) -> Panel:
        return Panel(self.config, self.teacher, self.generator, self.objective.guidance, self.rows)

    # ---- how it fares

    @cached_property
    def _health(self) -> Health:
        return Health(self.config, self._panel)

    def _checked(self) -> dict[str, float]:
        """A check of the student being trained, by the process that draws; a collapse is told, and may end the run."""
        main = self.accelerator.is_main_process
        if not (main or self.sharded):
            return {}
        live = self.generator.denoiser
        critics = [each for each in self.members.get("critic", []) if isinstance(each, Denoiser)]
        values = self._health.measure(
            self.generator.around(_around(live, unwrap(live.network))),
            # the bare network: a distributed wrapper would wait for the other processes
            _around(critics[0], unwrap(critics[0].network)) if critics else None,
            self.folder / "health" / f"step-{self.step:08d}.png" if main else None,
        )
        self.teacher.rest()
        choice = self.config.on_collapse
        reason = self._health.collapse(values) if self.step > self.objective.settled else ""
        if reason and choice != "ignore":
            if main:
                tqdm.write(told(reason, self.step, choice), file=sys.stderr)
            self.stopped = self.stopped or choice == "stop"
        return {HEALTH + name: value for name, value in (values | balance(self._norms)).items()}

    def _scored(self) -> dict[str, float]:
        """The score of the averaged student, which is kept where it is the best one so far."""
        if self.best is None:
            return {}
        self._require_finite()
        network = self._whole("average", self.average) if self.sharded else self.average
        if not self.accelerator.is_main_process:
            return {}
        student = self.generator.around(_around(self.generator.denoiser, network))
        return {HEALTH + name: value for name, value in self.best.offer(self.step, student).items()}

    # ---- whole again

    def _whole(self, name: str, network: nn.Module) -> nn.Module:
        """A sharded network put together in the main process, by all; in the others an outline without weights."""
        main = self.accelerator.is_main_process
        state = whole(network.state_dict(), main)
        return filled(self._outlines[name], state, self.teacher.device) if main else self._outlines[name]

    def _put_together(self) -> None:
        """After training: what the main process draws, exports and scores alone, without the others' parts of it."""
        teacher = self.teacher
        teacher.denoiser.network = self._whole("teacher", teacher.denoiser.network)
        setattr(teacher.pipeline, teacher.network_name, teacher.denoiser.network)
        self.average = self._whole("average", self.average)
        self.optimizers.clear()  # their memory is needed
        self.sharded = False


def _around(denoiser: Denoiser, network: nn.Module) -> Denoiser:
    """The same denoiser of another network, to sample with."""
    return Denoiser(network, denoiser.schedule, denoiser.prediction, denoiser.call)


def bare(members: list[Any]) -> list[nn.Module]:
    """The networks behind the members of a player."""
    return [unwrap(member.network) for member in members]
