"""Time an exported folder, and append the result as one line of JSON: python eval/latency.py EXPORT [--steps 50]

Latency is the time of one image, throughput that of the best batch. Both are medians with quartiles; passes of the network
are counted and not assumed. Let nothing else run meanwhile.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onestep.cli import Parser
from onestep.evaluate import append, check_output, device_of
from onestep.metrics.provenance import provenance, sha256_of_weights
from onestep.metrics.render import family_of, load_pipeline
from onestep.metrics.speed import speed

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("export", type=Path, help="a diffusers folder")
    parser.add_argument("--steps", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=1.0, help="uncond + guidance * (cond - uncond); 1 is none")
    parser.add_argument("--prompt", default="a photo of a cat", help="where the export takes a text (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each batch size (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="calls before them (default: %(default)s)")
    parser.add_argument("--largest-batch", type=int, default=256, help="where the search ends (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("eval/latency.jsonl"), help="default: %(default)s")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the export")
    return parser.parse_args(argv)


def run(args: Namespace) -> dict[str, Any]:
    """The row of an export. Raises ValueError for what `load_pipeline` and `speed` refuse, before anything is timed."""
    check_output(args.output)
    device = device_of(args.device)
    pipe = load_pipeline(args.export, device, DTYPES[args.dtype], trust_remote_code=args.trust_remote_code)
    weights = args.export / family_of(pipe).network
    if not weights.is_dir():
        raise ValueError(f"{args.export} holds several networks: name one of its students, such as {args.export}/student-0")
    parameters = sum(each.numel() for each in getattr(pipe, weights.name).parameters())
    options = {"warmup": args.warmup, "calls": args.calls, "largest": args.largest_batch, "prompt": args.prompt}
    return {
        "export": args.export.as_posix(),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "weights_sha256": sha256_of_weights(weights),
        "parameters": parameters,
        "dtype": args.dtype,
        "steps": args.steps,
        "guidance": args.guidance,
        **speed(pipe, steps=args.steps, guidance=args.guidance, **options),
        **provenance(device),
    }


def table(row: dict[str, Any]) -> str:
    lines = [f"{row['export']}: {row['pipeline']}, {row['parameters']:,} parameters, {row['dtype']}, {row['steps']} steps"]
    for name in ("latency", "throughput"):
        part = row[name]
        lines.append(f"{name}, batch {part['batch_size']}")
        for what, passes in (("pipeline", part["passes_per_image"]), ("network", 1)):
            low, median, high = (1000 * part[what][f"{each}_s"] for each in ("lower_quartile", "median", "upper_quartile"))
            lines.append(f"  {what:<10}{median:>10.2f} ms  ({low:.2f} to {high:.2f}), passes {passes:g}")
        memory = part["peak_memory_bytes"]
        lines.append(
            f"  {part['images_per_s']:.2f} images/s, memory " + (f"{memory / 2**20:.1f} MiB" if memory else "not known")
        )
    return "\n".join([*lines, f"batches up to {row['batches'][-1][0]}; ended by {row['stopped_by']}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2."""
    args = parse(argv)
    try:
        row = run(args)
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(table(row))
    append(row, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
