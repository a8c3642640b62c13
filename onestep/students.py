"""python -m onestep.students: one folder of the exports of all students of a run."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(
        prog="python -m onestep.students", description="One folder of all students of a run.", allow_abbrev=False
    )
    reader.add_argument("run", type=Path, metavar="RUN", help="folder of a run of onestep.train with --students")
    reader.add_argument("--output", type=Path, metavar="FOLDER", help="where to (default: RUN/export)")
    given = reader.parse_args(argv)
    try:
        if not given.run.is_dir():
            raise ValueError(f"no folder {given.run}; name that of a run of onestep.train with --students")
        from .multi_student import assemble

        print(assemble(given.run, given.output))
    except (ValueError, OSError) as error:
        reader.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
