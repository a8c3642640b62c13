"""Score an exported folder, or a folder of images, and append the result as one line of JSON.

python eval/fid.py EXPORT                              the embedded protocol (FD and class accuracy)
python eval/fid.py EXPORT --precision-recall           the same with precision, recall, density and coverage
python eval/fid.py EXPORT --reference FOLDER_OR_NPZ    FID through clean-fid
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from onestep.metrics import evaluate, fid, load_pipeline, protocol_of
from onestep.metrics.provenance import generation, provenance
from onestep.metrics.render import family_of, render


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; type {self.prog} --help\n")


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
    parser.add_argument("--weights", help="a copy of inception-2015-12-05.pt")
    parser.add_argument("--mode", default="clean", help="clean-fid's mode: clean or legacy_tensorflow")
    parser.add_argument("--classes", type=int, help="with --reference: labels 0 .. CLASSES-1 are generated in turn")
    parser.add_argument("--trust-remote-code", action="store_true", help="with --reference: run the code in the export")
    return parser.parse_args(argv)


def check_output(path: Path) -> None:
    """Raises ValueError where a line could not be appended to `path`; called before anything slow."""
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} for --output {path}: make it first, or name another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output {path} cannot be written; name a file in a folder of yours")


def append(row: dict[str, Any], path: Path) -> None:
    """One write of one whole line: lines of runs side by side do not mix."""
    line = json.dumps(row, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def device_of(name: str) -> str:
    """The device to run on. Raises ValueError for one that this machine does not have."""
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return there[-1]
    kind, _, index = name.partition(":")
    if kind not in there or (index and not (index.isdigit() and int(index) < max(1, torch.cuda.device_count()))):
        raise ValueError(f"no device {name!r} here; allowed are auto, {', '.join(there)}")
    return name


def inception_row(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """FID of images generated from the export, or of the images in the folder. Raises ValueError as `fid` does."""
    settings = {"weights": args.weights, "mode": args.mode, "device": device}
    if not (Path(args.export) / "model_index.json").is_file():
        if not Path(args.export).is_dir():
            raise ValueError(f"no folder {args.export}; name an exported folder or a folder of images")
        return {"export": args.export, **fid(args.export, args.reference, **settings), **provenance(device)}
    pipe = load_pipeline(args.export, device, trust_remote_code=args.trust_remote_code)
    classes = args.classes or family_of(pipe).classes(pipe)
    if classes is None:
        raise ValueError(f"{args.export} does not say how many classes it knows; type --classes with their number")
    count = 50_000 if args.count is None else args.count
    if count < 2 or classes < 1:
        raise ValueError(f"--count {count} --classes {classes} is not allowed; type 2 images and 1 class or more")
    labels = [i % classes for i in range(count)]
    images = render(pipe, labels, range(count), args.steps, args.guidance, args.batch_size)
    made = generation(pipe, args.export, count, 0, args.steps, args.guidance)
    return {**made, "classes": classes, **fid(images, args.reference, **settings), **provenance(device)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_output(args.output)
    device = device_of(args.device)
    if args.reference is not None:
        if args.protocol is not None:
            raise ValueError("--protocol and --reference exclude each other: leave one out")
        if args.precision_recall:
            raise ValueError("--precision-recall compares with the images of a protocol: leave --reference out")
        return inception_row(args, device)
    if args.trust_remote_code:
        raise ValueError("--trust-remote-code needs --reference: the embedded protocol scores stock exports alone")
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


def table(row: dict[str, Any]) -> str:
    flat = {**row, "protocol": row["protocol"]["name"]} if "protocol" in row else row
    width = max(map(len, flat))
    shown = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in flat.items()}
    return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def main(argv: list[str] | None = None) -> int:
    return score(parse(argv), run)


def score(args: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Print the row that `run` makes and append it to args.output; bad input is one line on stderr and exit code 2."""
    try:
        row = run(args)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(table(row))
    append(row, args.output)
    return 0


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    sys.exit(main())
