"""What runs leave on disk, and how it is found again, without importing torch."""

from pathlib import Path
from typing import Any

from .config import CONFIG_NAME, TrainConfig, load_config, resolve
from .methods import config_class
from .teacher import facts_of

RESULTS_NAME = "results.jsonl"
STRENGTH_NAME = "strength.json"
SCORE = ("<!-- score -->\n", "<!-- /score -->\n")
"""What is before and after the score in a model card."""


def saved_options(run: Path) -> tuple[TrainConfig, Any]:
    """(TrainConfig, the method's own) from a run's config.yaml. Raises ValueError where the folder holds no run."""
    recipe, source = load_config(run), str(run / CONFIG_NAME)
    for key in ("method", "teacher"):
        if not isinstance(recipe.get(key), str):
            raise ValueError(f"{source} names no {key}, so {run} is no run of onestep.train; name the folder of one")
    method = recipe["method"]
    return resolve(config_class(method), facts_of(recipe["teacher"]).options(method), recipe, {}, source)
