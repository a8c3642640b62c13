"""Reading the pickles of EDM networks without running them.

A pickle is a program: it names functions and has them called. Here every name it may use stands for a class that only
notes what it was called with, and every other name ends the reading.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
"""Takes {"class_name", "state", "module_src", ...}: an object of a class whose source text lies beside it."""
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
RECORDS = (
    PERSISTENT,
    PARAMETER,
    TENSOR,
    STORAGE,
    "torch.nn.modules.container.ModuleDict",
    "numpy.core.multiarray.scalar",  # numpy 1
    "numpy._core.multiarray.scalar",  # numpy 2
    "numpy.dtype",
    "builtins.set",
)


class Record:
    """What a pickle would have called or made: the name, the arguments, and the state that was to be set."""

    name: str
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "Record":
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def meta(self) -> dict[str, Any]:
        """What a PERSISTENT call was given. Raises ValueError for another record."""
        if self.name != PERSISTENT or not isinstance(self.args[0], dict):
            raise ValueError(f"a {self.name} is where a network was expected")
        return self.args[0]


class _Mapping(dict):
    """A plain dict in place of its subclasses; attributes that were to be set on it are dropped."""

    def __setstate__(self, state: Any) -> None:
        return None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in MAPPINGS:
            return type(name, (_Mapping,), {})
        if full in RECORDS:
            return type(name, (Record,), {"name": full})  # its own class each time: nothing one pickle does to it stays
        raise ValueError(f"it names {full}, which no EDM network needs and which is therefore refused")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to data outside the file")


def read(path: Path) -> Any:
    """The contents of a pickle, calls and objects as Records. Raises ValueError where it is damaged or not allowed."""
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path} cannot be read as an EDM network: {error or type(error).__name__}; name a published edm-*.pkl"
        ) from error


def parts(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, record) of every parameter and buffer of a pickled module's state, named as in its state dict."""
    for kind in ("_parameters", "_buffers"):
        yield from ((prefix + name, value) for name, value in state[kind].items() if value is not None)
    for name, module in state["_modules"].items():
        inner = module.meta()["state"] if module.name == PERSISTENT else module.state
        yield from parts(inner, f"{prefix}{name}.")


def tensor(record: Record) -> Tensor:
    """The tensor of a PARAMETER or TENSOR record. Raises ValueError where it is anything else."""
    if record.name == PARAMETER:
        record = record.args[0]
    if record.name != TENSOR or record.args[0].name != STORAGE:
        raise ValueError(f"a {record.name} is where a tensor was expected")
    storage, offset, size, stride = record.args[:4]
    # the bytes are a torch.save of their own, with a pickle in it
    loaded = torch.load(io.BytesIO(*storage.args), map_location="cpu", weights_only=True)
    if not isinstance(loaded, torch.TypedStorage):
        raise ValueError(f"a {type(loaded).__name__} is where a tensor's storage was expected")
    return torch.empty(0, dtype=loaded.dtype).set_(loaded).as_strided(size, stride, offset)
