"""python -m onestep.plan: the memory of a run, before anything is loaded, and what would make it fit."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .cli import Parser, first_pass, flags_of, parser
from .config import PROG as TRAIN
from .config import TrainConfig, resolve
from .methods import config_class
from .options import shown
from .teacher import facts_of

if TYPE_CHECKING:
    from .plan_memory import Memory
    from .plan_search import Planner

PROG = "python -m onestep.plan"
UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}


def size_of(text: str) -> int:
    """Bytes of a size such as 24GB (10^9) or 24 GiB (2^30). Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(
            f"--device-memory is {text!r}; allowed is a size above zero in MB, MiB, GB, GiB, TB or TiB, for example 24GB"
        )
    return int(float(match[1]) * unit)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 where the run fits, 1 where it does not, 2 and one line on stderr for bad input."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        Parser(prog=PROG).error(str(error))


def _main(argv: Sequence[str]) -> int:
    first = first_pass(argv)
    own, facts = config_class(first.method), facts_of(first.teacher).options(first.method)
    given = _parser(own, facts, first.method).parse_args(argv)
    limit = None if given.device_memory is None else size_of(given.device_memory)
    processes = given.processes
    if processes < 1:
        raise ValueError(f"--processes is {processes}; allowed is 1 and more, for example --processes 8")
    flags = {k: v for k, v in flags_of(given).items() if k not in ("device_memory", "processes")}
    config, options = resolve(own, facts, first.recipe, flags, first.config or "the recipe")
    from .plan_search import Planner

    planner = Planner(config, options, processes)
    memory = planner.memory({})
    print(table(memory, config, processes))
    if limit is None:
        return 0
    print("\n" + verdict(memory.total, limit), flush=True)
    if memory.total <= limit:
        return 0
    print("looking for what fits; for a large teacher this takes minutes", file=sys.stderr)
    print(advice(planner, limit, argv))
    return 1


def _parser(method_options: type, facts_train: Mapping[str, Any], method: str) -> Parser:
    made = parser(method_options, facts_train, method)
    made.prog = PROG
    made.usage = f"{PROG} [--device-memory 24GB] [--FLAG VALUE ...]"
    made.description = "Say what memory a run of onestep.train takes, without loading anything. It has the same flags."
    made.add_argument("--device-memory", metavar="SIZE", help="memory of one device, for example 24GB or 80GiB")
    made.add_argument("--processes", type=int, default=1, metavar="INT", help="devices, one process each (default: 1)")
    return made


def gigabytes(size: int) -> str:
    """A size in GB (10^9 bytes), in MB below one."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def table(memory: "Memory", config: TrainConfig, processes: int) -> str:
    """What is in a device's memory, and how the turns of an update compare."""
    worst, turns = memory.worst, memory.turns
    grid = worst is turns.get("grid")
    where = "a CPU process" if config.device == "cpu" else "an accelerator"
    lines = [("weights", None), *((f"  {name}", size) for name, size in memory.weights.items())]
    lines += [("gradients", worst.gradients), ("optimiser states", memory.optimizer), ("moving average", memory.average)]
    if memory.buckets:
        lines.append((f"gradients in exchange, {processes} processes", memory.buckets))
    if memory.pictures:
        lines.append(("pictures of the teacher for grids", memory.pictures))
    lines.append(("activations" + " of a grid" * grid, worst.peak - worst.gradients))
    runtime = "Python, its libraries, free heap" if config.device == "cpu" else "CUDA context and workspaces"
    lines.append((runtime, memory.runtime))
    lines.append(("most at once", memory.total))
    rows = config.batch_size // config.accumulation // processes
    about = [f"{config.method} on {config.teacher}, {rows} rows at once on {where}", ""]
    about += [f"{name:<44}" + ("" if size is None else f"{gigabytes(size):>14}") for name, size in lines]
    about += ["", "of these, for the time of" + " " * 19 + f"{'kept':>14}{'most':>14}"]
    names = {"grid": "  a grid"}
    about += [
        f"{names.get(name, f'  the turn of {name}'):<44}{gigabytes(turn.kept):>14}{gigabytes(turn.peak):>14}"
        for name, turn in turns.items()
    ]
    return "\n".join(line.rstrip() for line in about)


def verdict(total: int, limit: int) -> str:
    """One line: whether it fits."""
    if total <= limit:
        return f"It fits: {gigabytes(total)} of {gigabytes(limit)}."
    return f"It does not fit: {gigabytes(total)}, and there are {gigabytes(limit)}."


def advice(planner: "Planner", limit: int, argv: Sequence[str]) -> str:
    """The command of the smallest change that fits, or how near the largest comes."""
    changes, memory = planner.fit(limit)
    flags = flags_for(changes)
    if memory.total > limit:
        return (
            f"Nothing that can be tried makes it fit. The least is {gigabytes(memory.total)}, with {shlex.join(flags)}; "
            "take a device with more memory, or a smaller teacher."
        )
    return f"It fits with {shlex.join(flags)}: {gigabytes(memory.total)}. Type\n  {TRAIN} {shlex.join(command(argv, flags))}"


def flags_for(changes: Mapping[str, Any]) -> list[str]:
    """Changed options as they are typed."""
    flags: list[str] = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", shown(value)]
    return flags


def command(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments of onestep.train: those given here, the changed ones in place of theirs."""
    dropped = {"--device-memory", "--processes", *(flag for flag in flags if flag.startswith("--"))}
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("--no-", "--", 1) not in dropped:
            kept.append(word)
        elif not equals and name in dropped and name != "--gradient-checkpointing":  # a switch, without a value
            next(words, None)
    return [*kept, *flags]


if __name__ == "__main__":
    sys.exit(main())
