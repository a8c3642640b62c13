"""python -m onestep.report RUN_OR_EXPORT... -o report.html: one page of what runs and exports hold (docs/report.md)."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .cli import Parser
from .files import replaced


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(
        prog="python -m onestep.report",
        description="One HTML page, without scripts and without other files, of runs, exports and comparisons.",
        allow_abbrev=False,
    )
    reader.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="RUN_OR_EXPORT",
        help="run of onestep.train, folder of runs, exported diffusers folder, folder of eval/zoo.py, or results.jsonl",
    )
    reader.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    reader.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="make N images with each export: intervals, classes and nearest real images (default: load no network)",
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = reader.parse_args(arguments)
    try:
        write(given.sources, given.output, given.samples, arguments)
    except (ValueError, OSError) as error:
        reader.error(str(error))
    print(f"page: {given.output}")
    return 0


def write(paths: Sequence[Path], output: Path, samples: int = 0, arguments: Sequence[str] = ()) -> None:
    """The page of `paths`, at `output`; an older page stays until the new one is complete.

    `samples` images are made with each export whose protocol is in the package, 0 for none; `arguments` are what the page
    names as its own command line.

    Raises ValueError for folders that hold nothing to report, and for an `output` that cannot be written.
    """
    if samples < 0:
        raise ValueError(f"--samples {samples} is not allowed; type 2 or more, or leave it out")
    if output.is_dir() or not output.resolve().parent.is_dir():
        raise ValueError(f"{output} is no file in a folder that there is; type -o with another one, such as report.html")
    from .reporting.sources import read

    sources = read(paths)
    from .reporting.page import page  # imports torch, which --help and bad input do without
    from .reporting.samples import make_all

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few samples: the page calls those numbers proxies
        made = make_all(sources, samples) if samples else []
    with replaced(output) as partial:
        partial.write_text(page(sources, made, arguments), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
