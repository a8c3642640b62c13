"""python -m onestep.export: the student of a run as a stock diffusers folder, or as a LoRA file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser
from .config import TrainConfig
from .options import options_of
from .saved import saved_options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(
        prog="python -m onestep.export",
        description="Export the averaged student of a run's newest checkpoint as a stock diffusers folder.",
        allow_abbrev=False,
    )
    reader.add_argument("run", type=Path, metavar="RUN", help="folder of a run of onestep.train")
    reader.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to (default: RUN/export or RUN/lora, with -best and -K for --best and --steps K)",
    )
    kinds = reader.add_mutually_exclusive_group()
    kinds.add_argument("--merge", action="store_true", help="a full model, adapters merged (the default)")
    kinds.add_argument(
        "--lora", choices=("diffusers", "kohya"), help="the adapter alone, as a LoRA file with a scheduler beside it"
    )
    reader.add_argument(
        "--dtype",
        choices=options_of(TrainConfig)["export_dtype"].choices,
        help="of the weights (default: the run's --export-dtype)",
    )
    reader.add_argument("--steps", type=int, metavar="K", help="network calls of the student (default: as it was trained)")
    reader.add_argument("--best", action="store_true", help="the best checkpoint, kept by --keep-best, not the newest")
    given = reader.parse_args(argv)
    try:
        if given.steps is not None and given.steps < 1:
            raise ValueError(f"--steps {given.steps} is not allowed; type --steps 1 or more")
        saved_options(given.run)  # what is no run is told before torch is imported
        from .run import export_run

        lines = export_run(given.run, given.output, given.dtype, given.lora, given.steps, given.best)
    except (ValueError, OSError) as error:
        reader.error(str(error))
    print(f"Use it:\n\n{lines}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
