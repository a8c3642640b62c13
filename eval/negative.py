"""How much of a colour a negative prompt takes out of the pictures of an export, by steered attention.

python eval/negative.py runs/dmd2-emoji/export --colour yellow --negative "yellow heart" --picture negative.png

Of the captions in --prompts (by default those of the embedded emoji) the first --count are taken whose picture without a
negative prompt has the colour on a tenth of its pixels. For each scale: the share of such pixels, and by how many degrees
the mean hue of the coloured pixels moves from the picture without one, both averaged over the prompts.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from onestep.cli import Parser
from onestep.evaluate import append, check_output
from onestep.metrics.prompts import captioned, read_prompts
from onestep.metrics.provenance import provenance
from onestep.quiet import quiet

PIPELINE = Path(__file__).parent.parent / "pipelines" / "negative_prompt.py"
HUES = {
    "red": (345, 15),
    "orange": (15, 40),
    "yellow": (40, 70),
    "green": (70, 165),
    "blue": (180, 255),
    "purple": (255, 300),
}
"""Degrees, from and to, clockwise."""
COLOURED = 0.25
"""Saturation and value from which a pixel has a hue to speak of."""


def hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """(degrees in [0, 360), whether the pixel is coloured) of images (B, 3, H, W) in [0, 1], each (B, H, W).

    The hue of HSV (Smith 1978): 60 (0 + (g - b) / c), 60 (2 + (b - r) / c) or 60 (4 + (r - g) / c), after the largest of
    r, g and b; c is the largest less the least, saturation c / largest.
    """
    r, g, b = images.unbind(1)
    most, which = images.max(1)
    chroma = most - images.min(1).values
    safe = chroma.clamp_min(1e-6)
    sector = torch.stack([(g - b) / safe, 2 + (b - r) / safe, 4 + (r - g) / safe])
    degrees = 60 * sector.gather(0, which[None])[0] % 360
    return degrees, (most >= COLOURED) & (chroma >= COLOURED * most)


def share(images: Tensor, colour: str) -> Tensor:
    """Fraction of each image's pixels that have the colour, (B,)."""
    (low, high), (degrees, coloured) = HUES[colour], hue(images)
    within = (degrees >= low) & (degrees < high) if low < high else (degrees >= low) | (degrees < high)
    return (within & coloured).double().mean((1, 2))


def mean_hue(images: Tensor) -> Tensor:
    """Circular mean of the coloured pixels' hues, degrees, (B,); NaN where an image has none."""
    degrees, coloured = hue(images)
    angle = degrees.double() * math.pi / 180
    x, y = ((part * coloured).sum((1, 2)) for part in (angle.cos(), angle.sin()))
    found = torch.atan2(y, x) * 180 / math.pi % 360
    return torch.where(coloured.any(2).any(1), found, torch.nan)


def shift(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between hues, 0 to 180."""
    return ((b - a + 180) % 360 - 180).abs()


def images_of(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, negative: str | None, a: float) -> Tensor:
    """(B, 3, H, W) in [0, 1]; each prompt has a seed of its own."""
    network = pipe.components.get("unet") or pipe.components["transformer"]
    factor = 2 ** (len(pipe.components["vae"].config.block_out_channels) - 1)
    side, made = network.config.sample_size * factor, []
    for start in range(0, len(prompts), 50):
        part = slice(start, start + 50)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        extra = {} if negative is None else {"negative_prompt": negative, "negative_scale": a}
        made.append(
            pipe(
                list(prompts[part]), num_inference_steps=steps, guidance_scale=1.0, generator=generators,
                height=side, width=side, output_type="pt", **extra,
            ).images.float()
        )  # fmt: skip
    return torch.cat(made)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a diffusers folder that takes prompts")
    parser.add_argument("--colour", default="yellow", help="one of " + ", ".join(HUES))
    parser.add_argument("--negative", help="the negative prompt; default the colour's name")
    parser.add_argument("--scales", default="0.1,0.2,0.5,1", help="separated by commas (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, help="default: the captions of the embedded emoji")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="a PNG of the first pictures, a row each scale")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The row of results. Raises ValueError for what is not allowed, and where too few pictures have the colour."""
    check_output(args.output)
    if args.colour not in HUES:
        raise ValueError(f"--colour {args.colour} is not known; allowed are {', '.join(HUES)}")
    try:
        scales = [float(each) for each in args.scales.split(",")]
    except ValueError as error:
        raise ValueError(f"--scales {args.scales} is no list of numbers; type for example --scales 0.1,0.5") from error
    known = read_prompts(args.prompts) if args.prompts else captioned("emoji")[1]
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(
            str(args.export), custom_pipeline=str(PIPELINE), trust_remote_code=True, local_files_only=True
        ).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = images_of(pipe, known, range(len(known)), args.steps, None, 0.0)
    chosen = (share(plain, args.colour) >= 0.1).nonzero().flatten().tolist()[: args.count]
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} pictures have {args.colour} on a tenth of their pixels: type another --colour")
    prompts, plain, negative = [known[i] for i in chosen], plain[chosen], args.negative or args.colour
    rows, found = [plain], [{"scale": 0.0, "share": float(share(plain, args.colour).mean()), "hue_shift": 0.0}]
    for a in scales:
        steered = images_of(pipe, prompts, chosen, args.steps, negative, a)
        moved = shift(mean_hue(plain), mean_hue(steered))
        rows.append(steered)
        found.append({"scale": a, "share": float(share(steered, args.colour).mean()), "hue_shift": float(moved.nanmean())})
    if args.picture:
        save_image(make_grid(torch.cat([row[:16] for row in rows]), nrow=min(16, len(chosen)), pad_value=1), args.picture)
    return {
        **{"colour": args.colour, "negative_prompt": negative, "prompts": len(chosen), "scales": found},
        "steps": args.steps,
        "export": args.export.as_posix(),
        **provenance("cpu"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Bad input is one line on stderr and exit code 2."""
    args = parse(argv)
    try:
        row = run(args)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{row['prompts']} prompts, negative prompt {row['negative_prompt']!r}")
    print(f"scale  share of {row['colour']}  hue shift (degrees)")
    for each in row["scales"]:
        print(f"{each['scale']:<6g} {each['share']:<{9 + len(row['colour'])}.3f} {each['hue_shift']:.1f}")
    append(row, args.output)
    return 0


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *rest, **more: f"warning: {message}\n"
    sys.exit(main())
