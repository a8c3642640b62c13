"""Compare guidance by adapters with classifier-free guidance, and append a line of JSON for each guidance.

python eval/agd.py EXPORT                              guidance 1 to 6, both ways, 50 steps
python eval/agd.py EXPORT --guidance 1.5,3 --count 2000

Both start from the same noise, in turn within one run: FD, class accuracy (of prompts retrieval), network passes and seconds
for an image, and the mean distance of the two ways' pictures from each other.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from onestep.cli import Parser
from onestep.evaluate import append, check_output, device_of
from onestep.metrics.extractor import Extractor, load_extractor
from onestep.metrics.images import pixels_of
from onestep.metrics.measure import Measured, means, measure, scores
from onestep.metrics.protocol import Protocol
from onestep.metrics.provenance import provenance, sha256_of_weights
from onestep.metrics.published import Published, any_protocol
from onestep.metrics.render import Family, family_of
from onestep.metrics.request import Request, resolved
from onestep.metrics.scoring import named, reference_of
from onestep.metrics.speed import counted

SEEN = {"DiTPipeline": "fashion-10k", "StableDiffusionPipeline": "emoji-2k"}
"""The protocols of exports with real images, and captions, in the package."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder that a run of agd exported; its own code is run")
    parser.add_argument("--protocol", help="how images are made and looked at; default fashion-10k, for prompts emoji-2k")
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
    return pipe


@dataclass(frozen=True)
class Judge:
    """A protocol's extractor, real images and conditions."""

    protocol: Protocol | Published
    extractor: Extractor
    real: Measured
    conditions: Sequence[Any]
    metrics: tuple[str, str]
    """FD, and what says whether an image shows what was asked for."""

    @classmethod
    def of(cls, protocol: Protocol | Published, what: Path, count: int, device: str) -> "Judge":
        r, told = resolved(Request(what, protocol=protocol, device=device)), isinstance(protocol, Published)
        metrics = ("fd", "retrieval") if told else ("fd", "class-accuracy")
        extractor = load_extractor(str(r.extractor), None, device)
        real = reference_of(r, extractor, metrics)
        assert real is not None
        captions = real.measured.prompts or []
        conditions = captions[:count] if told else [i % protocol.classes for i in range(count)]
        return cls(protocol, extractor, real.measured, conditions, metrics)

    def scores(self, pictures: Sequence[np.ndarray], batch_size: int) -> dict[str, float]:
        """By their names, of one image for each condition."""
        fake = measure(
            len(pictures),
            lambda part: [partial(np.asarray, pictures[i]) for i in part],
            self.extractor,
            self.metrics,
            batch_size,
        )
        if self.metrics[1] == "retrieval":
            fake = replace(fake, prompts=self.conditions)
        else:
            fake = replace(fake, labels=torch.tensor(self.conditions))
        found = means(scores(self.real, fake, self.metrics, self.extractor, self.protocol.name))
        return named(found, len(pictures), self.protocol)


class Way:
    """One way of guidance: its images, the passes of the network they took, and their seconds."""

    def __init__(self, name: str, pipe: Any, family: Family):
        self.name, self.pipe, self.family = name, pipe, family
        self.seconds, self.passes = 0.0, 0
        self.batches: list[torch.Tensor] = []

    def make(self, conditions: Sequence[Any], seeds: range, steps: int, guidance: float) -> None:
        """One image for each condition, from the noise of its seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with counted(getattr(self.pipe, self.family.network)) as passes:
            start = time.perf_counter()
            self.batches.append(self.family.sample(self.pipe, list(conditions), generators, steps, guidance).float())
            self.seconds += time.perf_counter() - start
        self.passes += passes.samples

    def row(self, judge: Judge, batch_size: int) -> dict[str, Any]:
        pictures = list(pixels_of(self.batches))
        return {
            "guided_by": self.name,
            **judge.scores(pictures, batch_size),
            "passes_per_image": self.passes / len(pictures),
            "seconds_per_image": self.seconds / len(pictures),
        }


def compare(args: argparse.Namespace, pipe: Any, judge: Judge, guidance: float) -> list[dict[str, Any]]:
    """The rows of both ways at one guidance."""
    stock, count = pipe.stock, len(judge.conditions)
    stock.set_progress_bar_config(disable=True)
    family = family_of(stock)
    ways = [Way("adapters, one pass a step", pipe, family), Way("classifier-free, two passes a step", stock, family)]
    for first in range(0, count, args.batch_size):
        part = range(first, min(first + args.batch_size, count))
        seeds = range(judge.protocol.first_seed + part.start, judge.protocol.first_seed + part.stop)
        for way in ways:  # in turn: what else the machine does is shared
            way.make(judge.conditions[part.start : part.stop], seeds, args.steps, guidance)
    apart = torch.cat([(a - b).square().flatten(1).mean(1).sqrt() for a, b in zip(*(way.batches for way in ways))]).mean()
    shared = {"protocol": judge.protocol.details(), "export": args.export.as_posix(), "count": count, "steps": args.steps}
    shared |= {"guidance": guidance, "rms_between_ways": float(apart), "extractor_sha256": judge.extractor.sha256}
    shared |= {"weights_sha256": sha256_of_weights(args.export, family.network), "batch_size": args.batch_size}
    shared |= {"adapter_sha256": sha256_of_weights(args.export / "guidance_adapter"), **provenance(args.device)}
    return [way.row(judge, args.batch_size) | shared for way in ways]


def run(args: argparse.Namespace) -> None:
    check_output(args.output)
    args.device = device_of(args.device)
    if args.steps < 1 or args.batch_size < 1:
        raise ValueError("--steps and --batch-size are 1 and more: leave them out")
    try:
        values = [float(each) for each in args.guidance.split(",")]
    except ValueError:
        raise ValueError(f"--guidance {args.guidance!r} is no list of numbers; type for example --guidance 1,2,3") from None
    if min(values) < 1:
        raise ValueError("--guidance below 1 is not possible for the stock pipeline: type 1 and more")
    pipe = load(args.export, args.device)
    protocol = protocol_for(pipe.stock, args.protocol)
    if args.count is not None and not 2 <= args.count <= protocol.count:
        raise ValueError(f"--count {args.count} is not allowed; {protocol.name} takes 2 to {protocol.count}: leave it out")
    judge = Judge.of(protocol, args.export, args.count or protocol.count, args.device)
    for guidance in values:
        rows = compare(args, pipe, judge, guidance)
        numbers = [name for name in list(rows[0]) if isinstance(rows[0][name], float) and name != "guidance"]
        if guidance == values[0]:
            print(f"{'guidance':>8}  {'way':<36}" + "".join(f"{name:>{len(name) + 2}}" for name in numbers), flush=True)
        for row in rows:
            shown = "".join(f"{row[name]:{len(name) + 2}.4f}" for name in numbers)
            print(f"{guidance:8g}  {row['guided_by']:<36}{shown}", flush=True)
            append(row, args.output)


def protocol_for(stock: Any, name: str | None) -> Protocol | Published:
    """The protocol of that name, or the usual one of the pipeline. Raises ValueError for one that does not fit it."""
    kind = type(stock).__name__
    if kind not in SEEN:
        raise ValueError(f"a {kind} has no protocol with real images here; allowed are exports of {', '.join(SEEN)}")
    protocol = any_protocol(name or SEEN[kind])
    prompts = isinstance(protocol, Published) and bool(protocol.embedded)
    if family_of(stock).prompts != prompts or not (prompts or isinstance(protocol, Protocol)):
        raise ValueError(f"{protocol.name} is not for a {kind}: leave --protocol out, or type --protocol {SEEN[kind]}")
    return protocol


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
