"""python -m onestep.teach fashion|digits|emoji: train an embedded teacher from its data."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ..cli import Parser
from ..config import load_recipe
from ..options import options_of
from .options import DigitsConfig, EmojiConfig, FashionConfig

TEACHERS: dict[str, type] = {"fashion": FashionConfig, "digits": DigitsConfig, "emoji": EmojiConfig}
"""The options of each; its module here has the same name, and the function `teach`."""


def main() -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    parser = Parser(prog="python -m onestep.teach", description=__doc__, allow_abbrev=False)
    parser.add_argument("teacher", choices=list(TEACHERS))
    parser.add_argument("--data", help="folder of the data set's own files; left out, the usual places are searched")
    parser.add_argument("--config", help="YAML file of options")
    parser.add_argument("--work", type=Path, default=Path("runs/teach"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("onestep/assets"), help="folder the teacher is written to")
    for owner in TEACHERS.values():
        group = parser.add_argument_group(owner.__name__)
        for each in options_of(owner).values():
            group.add_argument(each.flag, default=argparse.SUPPRESS, help=f"{each.help} (default: {each.default})")
    namespace = vars(parser.parse_args())
    name = namespace["teacher"]
    try:
        recipe = load_recipe(namespace["config"]) if namespace["config"] else {}
        options = _options(TEACHERS[name], recipe, namespace)
        teach = import_module(f".{name}", __package__).teach
        teach(options, namespace["data"], namespace["work"] / name, namespace["output"])
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
