"""Score a teacher itself, as its students are scored: python eval/teacher.py digits [--steps 50] [--sampler dpm++]

Prints the row and appends it to --output as one line of JSON. With few steps this says what a student has to beat, with many
what it is compared with. Takes steps times as long as scoring a one-step student, twice that with guidance.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from zoo import protocol_for

from onestep.cli import Parser
from onestep.metrics.teacher import evaluate_teacher
from onestep.teacher import load_teacher


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    reader = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    reader.add_argument("teacher", help="known teacher or diffusers folder")
    reader.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    reader.add_argument("--guidance", type=float, help="default: the teacher's")
    reader.add_argument("--sampler", choices=("ddim", "dpm++"), default="ddim", help="default: %(default)s")
    reader.add_argument("--init-rho", type=float, help="sigma/alpha of the first step (default: the most noise)")
    reader.add_argument("--count", type=int, help="images (default: the protocol's)")
    reader.add_argument("--protocol", help="default: the teacher's")
    reader.add_argument("--output", type=Path, default=Path("teachers.jsonl"), help="default: %(default)s")
    given = reader.parse_args(argv)
    try:
        if given.steps < 1:
            raise ValueError(f"--steps {given.steps} is not allowed; type 1 or more")
        protocol, teacher = protocol_for(given.teacher, None, given.protocol), load_teacher(given.teacher)
        guidance = teacher.facts.guidance if given.guidance is None else given.guidance
        row = evaluate_teacher(
            teacher,
            protocol,
            steps=given.steps,
            guidance=guidance,
            sampler=given.sampler,
            init_rho=given.init_rho,
            count=given.count,
        )
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in row.items():
        print(f"{name:<18}{value:.4f}" if isinstance(value, float) else f"{name:<18}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
