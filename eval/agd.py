"""Compare guidance by adapters with classifier-free guidance, and append a line of JSON for each guidance.

python eval/agd.py EXPORT                              guidance 1 to 6, both ways, 50 steps
python eval/agd.py EXPORT --guidance 1.5,3 --count 2000

Both start from the same noise, in turn within one run: FD, class accuracy, network passes and seconds for an image. A second
table has the mean distance of the two ways' pictures from each other.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from fid import Parser, append, check_output, device_of

from onestep.metrics import protocol_of
from onestep.metrics.frechet import frechet_distance
from onestep.metrics.protocol import Instruments, Protocol
from onestep.metrics.provenance import provenance, sha256_of_weights
from onestep.metrics.score import score


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder that a run of agd exported; its own code is run")
    parser.add_argument("--protocol", default="fashion-10k", help="how images are made and looked at")
    parser.add_argument("--guidance", default="1,2,3,4,5,6", help="values separated by commas")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count", type=int, help="images; default the protocol's")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--output", type=Path, default=Path("eval/results.jsonl"))
    return parser.parse_args(argv)


def load(folder: Path, device: str) -> Any:
    """The export's own pipeline. Raises ValueError for a folder without adapters."""
    if not (folder / "guidance_adapter").is_dir():
        raise ValueError(f"{folder} has no guidance_adapter: name the export of a run of --method agd")
    pipe = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline="adapter_guidance", trust_remote_code=True)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if type(pipe.stock).__name__ != "DiTPipeline":
        raise ValueError(f"a {type(pipe.stock).__name__} has no protocol here: name the export of a DiT teacher")
    return pipe


class Way:
    """One way of guidance: its images batch by batch, the passes of the network they took, and their seconds."""

    def __init__(self, name: str, pipe: Any, protocol: Protocol):
        self.name, self.pipe, self.protocol = name, pipe, protocol
        self.seconds, self.passes, self.images = 0.0, 0, 0
        self.batches: list[torch.Tensor] = []

    def make(self, first: int, size: int, steps: int, guidance: float) -> None:
        """Images first .. first + size - 1 of the protocol."""
        seeds = range(self.protocol.first_seed + first, self.protocol.first_seed + first + size)
        counted = self.pipe.transformer.register_forward_pre_hook(self._count, with_kwargs=True)
        start = time.perf_counter()
        made = self.pipe(
            class_labels=[(first + i) % self.protocol.classes for i in range(size)],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).images
        self.seconds += time.perf_counter() - start
        counted.remove()
        self.images += size
        self.batches.append(torch.from_numpy(made).permute(0, 3, 1, 2).float())

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.passes += len(args[0])

    def scores(self, tools: Instruments, proxy: str) -> dict[str, Any]:
        conditions = [i % self.protocol.classes for i in range(self.images)]
        fake, accuracy = score(self.batches, conditions, tools.network, self.protocol)
        return {
            self.protocol.metric + proxy: frechet_distance(fake, tools.real),
            "class_accuracy": accuracy,
            "passes_per_image": self.passes / self.images,
            "seconds_per_image": self.seconds / self.images,
        }


def compare(
    args: argparse.Namespace, pipe: Any, tools: Instruments, protocol: Protocol, guidance: float
) -> list[dict[str, Any]]:
    """The rows of both ways at one guidance."""
    count = args.count or protocol.count
    stock = pipe.stock
    stock.set_progress_bar_config(disable=True)
    ways = [Way("adapters, one pass a step", pipe, protocol), Way("classifier-free, two passes a step", stock, protocol)]
    for first in range(0, count, args.batch_size):
        for way in ways:  # in turn: what else the machine does is shared
            way.make(first, min(args.batch_size, count - first), args.steps, guidance)
    apart = torch.cat([(a - b).square().flatten(1).mean(1).sqrt() for a, b in zip(*(way.batches for way in ways))]).mean()
    shared = {"protocol": protocol.details(), "export": args.export.as_posix(), "count": count, "steps": args.steps}
    shared |= {"guidance": guidance, "rms_between_ways": float(apart), "extractor_sha256": tools.extractor_sha256}
    shared |= {"weights_sha256": sha256_of_weights(args.export / "transformer"), "batch_size": args.batch_size}
    shared |= {"adapter_sha256": sha256_of_weights(args.export / "guidance_adapter"), **provenance(args.device)}
    proxy = "" if count == protocol.count else "_proxy"
    return [{"guided_by": way.name, **way.scores(tools, proxy), **shared} for way in ways]


def run(args: argparse.Namespace) -> None:
    check_output(args.output)
    args.device = device_of(args.device)
    protocol = protocol_of(args.protocol)
    if args.count is not None and not 2 <= args.count <= protocol.count:
        raise ValueError(f"--count {args.count} is not allowed; {protocol.name} takes 2 to {protocol.count}: leave it out")
    if args.steps < 1 or args.batch_size < 1:
        raise ValueError("--steps and --batch-size are 1 and more: leave them out")
    try:
        values = [float(each) for each in args.guidance.split(",")]
    except ValueError:
        raise ValueError(f"--guidance {args.guidance!r} is no list of numbers; type for example --guidance 1,2,3") from None
    if min(values) < 1:
        raise ValueError("--guidance below 1 is not possible for the stock pipeline: type 1 and more")
    pipe, tools = load(args.export, args.device), protocol.instruments(None, None, args.device)
    metric = protocol.metric + ("" if args.count in (None, protocol.count) else "_proxy")
    print(f"{'guidance':>8}  {'way':<36}{metric:>9}{'accuracy':>10}{'passes':>8}{'s/image':>9}{'rms apart':>11}", flush=True)
    for guidance in values:
        for row in compare(args, pipe, tools, protocol, guidance):
            print(
                f"{guidance:8g}  {row['guided_by']:<36}{row[metric]:9.2f}{row['class_accuracy']:10.1%}"
                f"{row['passes_per_image']:8.0f}{row['seconds_per_image']:9.4f}{row['rms_between_ways']:11.4f}",
                flush=True,
            )
            append(row, args.output)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    sys.exit(main())
