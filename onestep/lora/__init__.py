"""Several networks in the memory of one: low-rank adapters on a frozen base (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

from .adapter import Adapter
from .export import FORMATS, merge, save_lora
from .merging import plain
from .switch import active, active_name, names, unused
from .targets import TARGETS, default_targets

__all__ = [
    "FORMATS",
    "TARGETS",
    "Adapter",
    "active",
    "active_name",
    "default_targets",
    "merge",
    "names",
    "plain",
    "save_lora",
    "unused",
]
