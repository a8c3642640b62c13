"""python -m onestep.data check PATH: what of some data can be used, and why the rest cannot."""

import sys
from collections.abc import Sequence

from ..cli import Parser

PROG = "python -m onestep.data"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    made = Parser(prog=PROG, description="Look at data before a run.", allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True, metavar="check")
    check = commands.add_parser("check", help="say what is kept and what is dropped, with the reasons", allow_abbrev=False)
    check.add_argument("data", metavar="PATH", help="what is given to --data: a file, a folder, or a dataset's owner/name")
    check.add_argument("--images", choices=("required", "ignored"), help="default: required where any row has one")
    for name in ("captions", "labels"):
        check.add_argument(f"--{name}", choices=("required", "optional"), default="optional", help="default: %(default)s")
    check.add_argument("--min-side", type=int, default=0, metavar="PIXELS", help="drop pictures with a smaller side")
    given = made.parse_args(argv)
    from .clean import Needs, scan
    from .sources import open_source

    images = {"required": True, "ignored": False, None: None}[given.images]
    try:
        needs = Needs(images, given.captions == "required", given.labels == "required", given.min_side)
        print(scan(open_source(given.data), needs).table)
    except (ValueError, OSError) as error:
        made.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
