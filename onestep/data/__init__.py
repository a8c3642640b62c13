"""Data as people have it, made into batches: prompts, pictures with captions or classes, and their caches on disk."""

from .batches import Data, load_images
from .images import EMBEDDED
from .pairs import PairCache
from .shards import Shards

__all__ = ["EMBEDDED", "Data", "PairCache", "Shards", "load_images"]
