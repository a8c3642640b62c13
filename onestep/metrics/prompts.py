"""Captions from the files that people have: a text file, a JSON list, or COCO's annotations."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXPECTED = (
    'expected is a text file with a prompt a line, a JSON list of texts, or COCO\'s captions_*.json with "annotations"'
)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in its order; of COCO's captions the first of each image, by image id.

    Raises ValueError for a file that is missing, empty or of another format.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        found = _from_json(json.loads(text)) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--prompts {path} cannot be read ({error!r}): {EXPECTED}") from error
    if empty := [i for i, prompt in enumerate(found, 1) if not prompt]:
        raise ValueError(
            f"--prompts {path} has an empty prompt, number {empty[0]}: take it out, so that seeds stay where they are"
        )
    if not found:
        raise ValueError(f"--prompts {path} holds no prompts; {EXPECTED}")
    return found


def _from_json(content: Any) -> list[str]:
    if isinstance(content, list):
        if not all(isinstance(each, str) for each in content):
            raise TypeError("a list of something else than texts")
        return [each.strip() for each in content]
    first: dict[int, tuple[int, str]] = {}
    for each in content["annotations"]:
        mine = (each["id"], each["caption"].strip())
        first[each["image_id"]] = min(mine, first.get(each["image_id"], mine))
    return [caption for _, (_, caption) in sorted(first.items())]


def captioned(name: str) -> tuple[list[np.ndarray], list[str]]:
    """Pictures, uint8 (H, W, 3), and captions of the data in the package of that name."""
    from ..data.images import Embedded  # which knows teachers and with them most of diffusers: only where it is needed

    rows = Embedded(name).rows
    files = [row.image.read() or b"" for row in rows if row.image is not None]
    pictures = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return pictures, [row.caption for row in rows if row.caption is not None]
