"""python -m onestep.teach fashion|digits: train an embedded teacher from its data."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ..config import Parser, load_recipe, options_of


def main() -> int:
    from . import digits, fashion

    teachers = {"fashion": (fashion.FashionConfig, fashion.teach), "digits": (digits.DigitsConfig, digits.teach)}
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
    namespace = parser.parse_args()
    owner, teach = teachers[namespace.teacher]
    options = options_of(owner)
    try:
        given = {**(load_recipe(namespace.config) if namespace.config else {}), **vars(namespace)}
        values = {name: options[name].parse(given[name], name) for name in options if name in given}
        unknown = set(load_recipe(namespace.config) if namespace.config else {}) - {f.name for f in fields(owner)}
        if unknown:
            raise ValueError(f"no option {', '.join(sorted(unknown))}; allowed are {', '.join(options)}")
        teach(owner(**values), namespace.data, namespace.work / namespace.teacher, namespace.output)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
