"""python -m onestep.evaluate: score an exported folder, or a folder of images, and append the result as one line of JSON."""

import argparse
import json
import os
import stat
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cli import Parser

EXAMPLES = """
python -m onestep.evaluate EXPORT --protocol fashion-10k
python -m onestep.evaluate EXPORT --protocol coco2014-30k-256 --prompts captions_coco14_test.txt --reference coco2014-val-256
python -m onestep.evaluate FOLDER_OF_IMAGES --reference FOLDER_OR_STATISTICS --metrics fd,kid,precision-recall
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m onestep.evaluate",
        description=f"Score an exported folder, or a folder of images.\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="WHAT", type=Path, help="a diffusers folder, or a folder of images")
    parser.add_argument("--protocol", help="a name out of docs/evaluation.md; it fixes all but steps and guidance")
    parser.add_argument("--reference", type=Path, help="statistics of eval/reference.py, a folder of images, or an npz")
    parser.add_argument("--metrics", help="with commas; default the protocol's, else fd")
    parser.add_argument(
        "--preference", metavar="NAMES", help="scorers with commas, NAME or NAME=WEIGHTS: hpsv2, aesthetic, imagereward"
    )
    parser.add_argument("--extractor", help="default the protocol's, else inception; see docs/extractors.md")
    parser.add_argument("--weights", type=Path, help="the extractor's weights, where they are not in their usual place")
    parser.add_argument("--size", type=int, help="crop to a square and resize all images to this first")
    parser.add_argument("--count", type=int, help="images; default the protocol's, else 50000, or as many as there are")
    parser.add_argument(
        "--repeats", type=int, help="times that all images are made with other seeds; default the protocol's"
    )
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=1.0, help="uncond + guidance * (cond - uncond); 1 is none")
    parser.add_argument("--classes", type=int, help="labels 0 .. CLASSES-1 are generated in turn; default all")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt a line, a JSON list, or COCO's captions")
    parser.add_argument("--by-prompt", action="store_true", help="keep clip-score and retrieval of every prompt in the row")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the images as PNGs; the same call goes on there")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="threads that read and resize images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"), help="default: %(default)s")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the export")
    return parser.parse_args(argv)


def check_output(path: Path) -> None:
    """Raises ValueError where a line could not be appended to `path`; called before anything slow."""
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} for --output {path}: make it first, or name another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output {path} cannot be written; name a file in a folder of yours")


def append(row: dict[str, Any], path: Path) -> None:
    """One write of one whole line, after a line that a kill has torn: lines of runs side by side do not mix."""
    line = json.dumps(row, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        whole = stat.S_ISREG(os.fstat(descriptor).st_mode)  # and no pipe or terminal
        os.write(descriptor, ("\n" * (whole and _torn(path)) + line).encode())
        if whole:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _torn(path: Path) -> bool:
    """Whether a file's last line has no end. One that cannot be read counts as whole."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read() not in (b"", b"\n")
    except OSError:
        return False


def device_of(name: str) -> str:
    """The device to run on; of several processes, this one's. Raises ValueError for one that this machine does not have."""
    import torch
    from accelerate import PartialState

    # accelerate joins processes on CPUs only where it is told of them
    state = PartialState(cpu=name == "cpu" or not torch.cuda.is_available())
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return str(state.device) if state.num_processes > 1 else there[-1]
    kind, _, index = name.partition(":")
    if kind not in there or (index and not (index.isdigit() and int(index) < max(1, torch.cuda.device_count()))):
        raise ValueError(f"no device {name!r} here; allowed are auto, {', '.join(there)}")
    return name


def table(row: dict[str, Any]) -> str:
    """A row for a terminal, an entry a line; of a protocol its name alone."""
    flat = {**row, **({"protocol": row["protocol"]["name"]} if "protocol" in row else {})}
    flat.pop("by_prompt", None)  # a line a prompt, which python -m onestep.report shows
    width = max(map(len, flat))
    shown = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in flat.items()}
    return "\n".join(f"{key:<{width}}  {value}" for key, value in shown.items())


def score(args: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Print the row that `run` makes and append it to args.output; bad input is one line on stderr and exit code 2."""
    try:
        row = run(args)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(table(row))
        append(row, args.output)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The row of a command line. Raises ValueError as `onestep.metrics.scoring.evaluate_any` does."""
    check_output(args.output)
    from .metrics.measure import metrics_of
    from .metrics.published import any_protocol
    from .metrics.scoring import Request, evaluate_any

    asked = vars(args) | {
        "protocol": any_protocol(args.protocol) if args.protocol else None,
        "metrics": metrics_of(args.metrics) if args.metrics else None,
        "device": device_of(args.device),
    }
    del asked["output"]
    return evaluate_any(Request(**asked))


def main(argv: Sequence[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    return score(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
