"""Generated images as an evaluation needs them: from an export, one seed each, and on disk where they are to be kept."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from ..files import differences_from, replaced
from .images import Survey, pixels_of
from .measure import Picture
from .render import render

SETTINGS = "render.json"


class Rendered:
    """The images of an export: image i has conditions[i] and the seed first_seed + i.

    With a folder `save` they are kept there as PNGs by their seeds, and those that are there are not made again.
    `made_by` is what else they depend on. Raises ValueError for a folder that holds something else.
    """

    def __init__(
        self,
        pipe: Any,
        conditions: Sequence[Any],
        first_seed: int,
        steps: int,
        guidance: float,
        save: Path | None,
        made_by: dict[str, Any],
    ):
        self.pipe, self.conditions, self.first_seed = pipe, conditions, first_seed
        self.steps, self.guidance, self.save = steps, guidance, save
        if save is not None:
            if PartialState().is_main_process:
                claim(save, made_by)
            PartialState().wait_for_everyone()

    def __call__(self, part: range) -> list[Picture]:
        seeds = [self.first_seed + i for i in part]
        files = [] if self.save is None else [self.save / f"{seed:06d}.png" for seed in seeds]
        if files and all(file.is_file() for file in files):
            return [partial(Survey().read, file) for file in files]
        # a whole batch, though some are there: in another batch the rest could come out with other last digits
        batches = render(
            self.pipe, [self.conditions[i] for i in part], seeds, self.steps, self.guidance, len(part), quiet=True
        )
        images = list(pixels_of(batches))
        for file, image in zip(files, images):
            with replaced(file) as draft:
                Image.fromarray(image).save(draft, format="png")
        return [partial(np.asarray, image) for image in images]


def claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Make `folder` and write down what its images depend on, or find the same written there.

    Raises ValueError where it has images of something else.
    """
    path = folder / SETTINGS
    if path.is_file():
        if shown := differences_from(path, made_by):
            raise ValueError(f"--save {folder} holds images of another call ({shown}): name another folder")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--save {folder} is not empty and has no {SETTINGS}: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(path) as draft:
        draft.write_text(json.dumps(made_by, indent=1) + "\n", encoding="utf-8")
