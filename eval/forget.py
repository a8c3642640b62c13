"""Score an export that should have forgotten a class, and append the result as one line of JSON.

python eval/forget.py EXPORT --forget Bag                      UA, what comes instead, FD and accuracy of the rest
python eval/forget.py EXPORT --forget Bag --override Trouser   and the fraction that is made as the override
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from onestep.cli import Parser
from onestep.evaluate import check_output, device_of, score
from onestep.metrics import protocol_of
from onestep.metrics.forgetting import evaluate_forgetting


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="a diffusers folder")
    parser.add_argument("--forget", required=True, help="the class that was to be forgotten, a number or a name")
    parser.add_argument("--override", help="the class that was to take its place, a number or a name")
    parser.add_argument("--protocol", default="fashion-10k", help="how images are made and looked at")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=1.0, help="uncond + guidance * (cond - uncond); 1 is none")
    parser.add_argument("--count", type=int, help="images of all classes together; default the protocol's")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--output", type=Path, default=Path("eval/results.jsonl"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_output(args.output)
    return evaluate_forgetting(
        args.export,
        protocol_of(args.protocol),
        args.forget,
        args.override,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        count=args.count,
        device=device_of(args.device),
    )


def main(argv: list[str] | None = None) -> int:
    return score(parse(argv), run)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    sys.exit(main())
