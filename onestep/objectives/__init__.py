"""Distillation objectives, one paper a file; `onestep.methods` has their names and their options."""

from importlib import import_module

from ..methods import located
from .base import Batch, Objective

__all__ = ["Batch", "Objective", "objective_class"]


def objective_class(name: str) -> type[Objective]:
    """The class behind the name that `--method` takes. Raises ValueError with the nearest name for an unknown one."""
    module, attribute = located(name)
    return getattr(import_module(f".{module}", __name__), attribute)
