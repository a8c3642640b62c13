"""python -m onestep.teach fashion|digits|emoji: train an embedded teacher from its data."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli import Parser
from ..config import load_recipe
from ..options import options_of


def main() -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    from . import digits, emoji, fashion

    teachers: dict[str, tuple[type, Callable[..., None]]] = {
        "fashion": (fashion.FashionConfig, fashion.teach),
        "digits": (digits.DigitsConfig, digits.teach),
        "emoji": (emoji.EmojiConfig, emoji.teach),
    }
    parser = Parser(prog="python -m onestep.teach", description=__doc__, allow_abbrev=False)
    parser.add_argument("teacher", choices=list(teachers))
    parser.add_argument("--data", help="folder of the data set's own files; left out, the usual places are searched")
    parser.add_argument("--config", help="YAML file of options")
    parser.add_argument("--work", type=Path, default=Path("runs/teach"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("onestep/assets"), help="folder the teacher is written to")
    for owner, _ in teachers.values():
        group = parser.add_argument_group(owner.__name__)
        for each in options_of(owner).values():
            group.add_argument(each.flag, default=argparse.SUPPRESS, help=f"{each.help} (default: {each.default})")
    namespace = vars(parser.parse_args())
    owner, teach = teachers[namespace["teacher"]]
    try:
        recipe = load_recipe(namespace["config"]) if namespace["config"] else {}
        teach(
            _options(owner, recipe, namespace),
            namespace["data"],
            namespace["work"] / namespace["teacher"],
            namespace["output"],
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


def _options(owner: type, recipe: dict[str, Any], flags: dict[str, Any]) -> Any:
    options = options_of(owner)
    unknown = sorted(set(recipe) - set(options))
    if unknown:
        raise ValueError(f"no option {', '.join(unknown)}; allowed are {', '.join(options)}")
    given = {**recipe, **flags}
    return owner(**{name: each.parse(given[name], name) for name, each in options.items() if name in given})


if __name__ == "__main__":
    sys.exit(main())
