"""python -m onestep.train: distil a teacher, export the student, score it."""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import yaml

from .cli import Parser, first_pass, flags_of, parser
from .config import CONFIG_NAME, PARTIAL, PROG, TrainConfig, differences, flat, load_config, resolve, save_config
from .methods import config_class
from .teacher import facts_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    try:
        with _terminable():
            return _main(sys.argv[1:] if argv is None else argv)
    except _told() as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        then = "; make room on the disk, and the same command goes on from the last checkpoint" if full else ""
        Parser(prog=PROG).error(f"{error}{then}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _told() -> tuple[type[Exception], ...]:
    """Errors that are told in one line. That of safetensors is a full disk; none is its before it was imported."""
    module = sys.modules.get("safetensors")
    return (ValueError, FloatingPointError, OSError, *([module.SafetensorError] if module else []))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM before and after the training, where there is nothing to save, ends as Ctrl-C does: with a line."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: Sequence[str]) -> int:
    first = first_pass(argv)
    own, facts = config_class(first.method), facts_of(first.teacher).options(first.method)
    namespace = parser(own, facts, first.method).parse_args(argv)
    config, options = resolve(own, facts, first.recipe, flags_of(namespace), first.config or "the recipe")
    several = config.students > 1 and config.only is None
    students = range(config.students) if several else [config.only]
    if namespace.dry_run:
        return _dry_run(replace(config, only=students[0]), options)
    from .multi_student import assemble, devices, train_side_by_side
    from .trainer import accelerator_of

    if several and config.device == "auto" and (places := devices()):
        if train_side_by_side(config, argv, places):
            print(assemble(config.group))
        return 0
    accelerator = accelerator_of(config)
    # the first that is asked to stop ends it
    finished = all(_train(replace(config, only=each), options, own, namespace.restart) for each in students)
    if several and finished and accelerator.is_main_process:
        print(assemble(config.group))
    accelerator.end_training()
    return 0


def _train(config: TrainConfig, options: Any, method_options: type, restart: bool) -> bool:
    """One run to its end, exported and scored; False where it was asked to stop."""
    from .multi_student import Part
    from .nonfinite import NonFinite
    from .replaying import located
    from .run import finish, make_trainer
    from .trainer import accelerator_of

    accelerator = accelerator_of(config)
    if accelerator.is_main_process:
        check_folder(config, options, method_options, restart)
    with claimed(config, options, restart, accelerator.is_main_process):
        accelerator.wait_for_everyone()
        trainer = make_trainer(config, options)
        if isinstance(trainer.data, Part) and accelerator.is_main_process:
            trainer.data.partition.keep(config.group)
        bad: NonFinite | None = None
        try:
            finished = trainer.run()
        except NonFinite as error:
            bad = error.with_traceback(None)  # which holds the trainer: two of them may not fit into memory
        if bad is not None:
            del trainer
            raise located(make_trainer(config, options), bad)
    if accelerator.is_main_process and finished:
        finish(trainer, options)
    elif accelerator.is_main_process:
        print(f"stopped and saved at step {trainer.step}; the same command goes on from there")
    return finished


def _dry_run(config: TrainConfig, options: Any) -> int:
    from .data.placeholders import placeholders
    from .run import make_trainer

    with placeholders():
        print(describe(config, options, make_trainer(config, options)))
    return 0


def check_folder(config: TrainConfig, options: Any, method_options: type, restart: bool) -> None:
    """Changes nothing. Raises ValueError for a folder that cannot be made or written, that holds something else than a
    run, or that holds a run with other options, unless that is to `restart`."""
    folder = config.folder
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {nearest} is no writable folder; type --output with another one")
    if (folder / CONFIG_NAME).exists():
        changed = [] if restart else differences(load_config(folder), flat(config, options), method_options)
        if changed:
            raise ValueError(
                f"{folder} holds a run with other options ({'; '.join(changed)}); type --output with another folder, "
                "or --restart to start over there"
            )
    elif config.only is not None and (config.group / CONFIG_NAME).exists():
        raise ValueError(f"{config.group} is the run of a single student; type --output with another folder for several")
    elif folder.exists() and any(each.name != PARTIAL for each in folder.iterdir()):  # left by a kill in the first moment
        raise ValueError(f"{folder} holds other things than a run; type --output with a new folder")


@contextmanager
def claimed(config: TrainConfig, options: Any, restart: bool, main_process: bool) -> Iterator[None]:
    """Take the folder for this run: what is there is moved aside by `restart`, and config.yaml is in it from the start.

    Where the options turn out not to fit (ValueError, OSError) before anything was trained, all of that is taken back.
    """
    if not main_process:
        yield
        return
    folder, aside = config.folder, None
    if restart and folder.exists():
        aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
    fresh = not (folder / CONFIG_NAME).exists()
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        if fresh:
            save_config(folder, config, options)
        yield
    except (ValueError, OSError):
        if fresh and not (folder / "checkpoints").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if aside:
                aside.rename(folder)
            elif folder not in made:
                folder.mkdir()
            for parent in made[1:]:
                if any(parent.iterdir()):
                    break  # another run has moved in
                parent.rmdir()
        raise
    save_config(folder, config, options)  # options that may change when a run is resumed
    if aside:
        print(f"the run that was in {folder} is in {aside}")


def describe(config: TrainConfig, options: Any, trainer: Any) -> str:
    """The resolved options as YAML and the networks with their parameter counts."""
    from .trainer import bare

    def line(role: str, network: Any) -> str:
        return f"  {role}: {type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters"

    lines = [yaml.safe_dump(flat(config, options), sort_keys=False), "networks:"]
    lines.append(line("teacher", trainer.teacher.denoiser.network))
    lines += [line(player, network) for player, members in trainer.members.items() for network in bare(members)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
