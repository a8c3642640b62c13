"""Data as people have it, made into batches: prompts, pictures with captions or classes, and their caches on disk."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .batches import Data, load_images
    from .images import EMBEDDED
    from .pairs import PairCache
    from .shards import Shards
else:
    __getattr__ = lazy(
        __name__,
        {"EMBEDDED": "images", "Data": "batches", "PairCache": "pairs", "Shards": "shards", "load_images": "batches"},
    )

__all__ = ["EMBEDDED", "Data", "PairCache", "Shards", "load_images"]
