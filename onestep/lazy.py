"""Packages whose names are imported when they are first asked for: a command answers --help without importing torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a package that takes each name from the submodule that `homes` has for it.

    Type checkers are told the same by imports under TYPE_CHECKING. Other names raise AttributeError, as they always do.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return __getattr__
