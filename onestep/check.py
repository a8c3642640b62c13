"""Whether a teacher is what it says, by numbers: python -m onestep.check TEACHER [--data DATA]."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser
from .config import TrainConfig
from .teacher import facts_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a teacher that is not right is exit code 1, bad input one line on stderr and exit code 2."""
    reader = Parser(prog="python -m onestep.check", description=__doc__, allow_abbrev=False)
    reader.add_argument("teacher", help="known teacher, diffusers folder or hub id")
    reader.add_argument("--data", help="as in onestep.train; without it nothing is measured on real samples")
    reader.add_argument("--resolution", type=int, help="side of the pictures in pixels (default: the teacher's own)")
    reader.add_argument("--steps", type=int, default=10, help="steps of the sample (default: %(default)s)")
    reader.add_argument("--output", type=Path, default=Path("check.png"), help="the sample (default: %(default)s)")
    reader.add_argument("--cache", help="folder of caches (default: as in onestep.train)")
    given = reader.parse_args(argv)
    try:
        if given.output.suffix not in (".png", ".jpg") or given.steps < 1:
            raise ValueError(
                f"--output {given.output} --steps {given.steps}: allowed are a .png or .jpg and 1 or more steps"
            )
        source = given.data or facts_of(given.teacher).train.get("data")
        cache = TrainConfig(cache=given.cache).cache_folder
        from .checking import check

        right = check(given.teacher, source, cache, given.resolution, given.steps, given.output)
    except (ValueError, OSError) as error:
        reader.error(str(error))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
