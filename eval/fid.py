"""Score an exported folder, or a folder of images, and append the result as one line of JSON.

python eval/fid.py EXPORT                              the embedded protocol (FD and class accuracy)
python eval/fid.py EXPORT --precision-recall           the same with precision, recall, density and coverage
python eval/fid.py EXPORT --reference FOLDER_OR_NPZ    FID through clean-fid
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from onestep.cli import Parser
from onestep.evaluate import check_output, device_of, score
from onestep.metrics import evaluate, protocol_of
from onestep.metrics.scoring import Request, evaluate_any

EXTRACTORS = {"clean": "inception", "legacy_tensorflow": "inception-legacy"}
"""clean-fid's modes, as extractors."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="a diffusers folder; with --reference also a folder of images")
    parser.add_argument("--protocol", help="default fashion-10k")
    parser.add_argument("--precision-recall", action="store_true", help="precision, recall, density and coverage as well")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=1.0, help="uncond + guidance * (cond - uncond); 1 is none")
    parser.add_argument("--count", type=int, help="images; default the protocol's, 50000 with --reference")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--output", type=Path, default=Path("eval/results.jsonl"))
    parser.add_argument("--reference", help="a folder of images, or an npz with mu and sigma")
    parser.add_argument("--weights", type=Path, help="a copy of inception-2015-12-05.pt")
    parser.add_argument("--mode", default="clean", help="clean-fid's mode: clean or legacy_tensorflow")
    parser.add_argument("--classes", type=int, help="with --reference: labels 0 .. CLASSES-1 are generated in turn")
    parser.add_argument("--trust-remote-code", action="store_true", help="with --reference: run the code in the export")
    return parser.parse_args(argv)


def against(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The distance of images generated from the export, or of those in the folder, from a reference."""
    if args.mode not in EXTRACTORS:
        raise ValueError(f"no mode {args.mode!r}; allowed are {', '.join(EXTRACTORS)}: type --mode clean")
    request = Request(
        Path(args.export),
        reference=Path(args.reference),
        extractor=EXTRACTORS[args.mode],
        weights=args.weights,
        count=args.count,
        classes=args.classes,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    return evaluate_any(request) | {"mode": args.mode}


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_output(args.output)
    device = device_of(args.device)
    if args.reference is not None:
        if args.protocol is not None:
            raise ValueError("--protocol and --reference exclude each other: leave one out")
        if args.precision_recall:
            raise ValueError("--precision-recall compares with the images of a protocol: leave --reference out")
        return against(args, device)
    if args.trust_remote_code:
        raise ValueError(
            "--trust-remote-code needs --reference, for this scores stock exports alone: use python -m onestep.evaluate"
        )
    return evaluate(
        args.export,
        protocol_of(args.protocol or "fashion-10k"),
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        count=args.count,
        device=device,
        precision_recall=args.precision_recall,
    )


def main(argv: list[str] | None = None) -> int:
    return score(parse(argv), run)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    sys.exit(main())
