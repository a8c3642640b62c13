"""python -m onestep.train: distil a teacher, export the student, score it."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import yaml

from .config import (
    Parser,
    TrainConfig,
    differences,
    first_pass,
    flags_of,
    flat,
    load_config,
    parser,
    resolve,
    save_config,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except (ValueError, FloatingPointError) as error:
        Parser(prog="python -m onestep.train").error(str(error))


def _main(argv: Sequence[str]) -> int:
    first = first_pass(argv)
    from .objectives import objective_class
    from .teacher import facts_of

    cls, facts = objective_class(first.method), facts_of(first.teacher)
    namespace = parser(cls.Config, facts.train, first.method).parse_args(argv)
    config, options = resolve(cls.Config, facts.train, first.recipe, flags_of(namespace), first.config or "the recipe")
    if not namespace.dry_run:
        prepare_folder(config, options, cls.Config, namespace.restart)
    from .run import finish, make_trainer

    trainer = make_trainer(config, options)
    if namespace.dry_run:
        print(describe(config, options, trainer))
        return 0
    save_config(config.folder, config, options)
    if trainer.run():
        finish(trainer, options)
    else:
        print(f"stopped and saved at step {trainer.step}; the same command goes on from there")
    return 0


def prepare_folder(config: TrainConfig, options: Any, method_options: type, restart: bool) -> None:
    """Make sure the folder can be written and holds no other run. `restart` moves what is there out of the way.

    Raises ValueError for a folder that cannot be made and for a run with other options.
    """
    folder = config.folder
    if restart and folder.exists():
        aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"moved {folder} to {aside}")
    if (folder / "config.yaml").exists():
        changed = differences(load_config(folder), flat(config, options), method_options)
        if changed:
            raise ValueError(
                f"{folder} holds a run with other options ({'; '.join(changed)}); type --output with another folder, "
                "or --restart to start over there"
            )
        return
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {nearest} is no writable folder; type --output with another one")


def describe(config: TrainConfig, options: Any, trainer: Any) -> str:
    """The resolved options as YAML and the networks with their parameter counts."""
    from .trainer import bare

    def count(network: Any) -> str:
        return f"{sum(p.numel() for p in network.parameters()):,} parameters"

    lines = [yaml.safe_dump(flat(config, options), sort_keys=False), "networks:"]
    lines.append(f"  teacher: {type(trainer.teacher.denoiser.network).__name__}, {count(trainer.teacher.denoiser.network)}")
    for player, members in trainer.members.items():
        for network in bare(members):
            lines.append(f"  {player}: {type(network).__name__}, {count(network)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
