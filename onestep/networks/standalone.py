"""The code of an EDM network as one file beside its weights: an exported folder needs torch and diffusers alone."""

import ast
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from . import NETWORKS, layers, unet
from .unet import EDMUNet

HEADER = "# The network of this folder, for from_pretrained(..., trust_remote_code=True). From onestep, Apache-2.0.\n"
TIME_SCALE = 1 / 1000
"""CMStochasticIterativeScheduler's timestep is 250 ln(sigma), c_noise ln(sigma) / 4."""


def make_standalone(folder: Path, component: str) -> None:
    """Give a saved ConsistencyModelPipeline the code of its EDM network, the subfolder `component`.

    diffusers then loads it with trust_remote_code=True, and runs it with a CMStochasticIterativeScheduler.
    """
    index, config = folder / "model_index.json", folder / component / "config.json"
    name = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    kind = NETWORKS[name]
    module = kind.__module__.rpartition(".")[2]
    (folder / component / f"{module}.py").write_text(source_of(kind), encoding="utf-8")
    changes: dict[Path, dict[str, Any]] = {index: {component: [module, name]}, config: {"time_scale": TIME_SCALE}}
    for path, change in changes.items():
        written = json.loads(path.read_text(encoding="utf-8")) | change
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_of(kind: type[EDMUNet]) -> str:
    """The module of `kind` and those that it needs, joined without their relative imports."""
    split = [_split(module) for module in (layers, unet, sys.modules[kind.__module__])]
    imports = dict.fromkeys(line for lines, _ in split for line in lines)  # each once, in their first order
    return "\n".join([HEADER, *imports, "", "", "\n\n\n".join(body for _, body in split), ""])


def _split(module: ModuleType) -> tuple[list[str], str]:
    """(absolute imports, all the rest without docstring and relative imports) of a module's source."""
    text = inspect.getsource(module)
    docstring, *statements = ast.parse(text).body
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = text.splitlines()
    for node in (docstring, *imports):
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    absolute = [ast.unparse(node) for node in imports if isinstance(node, ast.Import) or node.level == 0]
    return absolute, "\n".join(lines).strip()
