"""The scripts of eval/, which are no package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EVAL = Path(__file__).parent.parent / "eval"


def load_script(name: str) -> ModuleType:
    """eval/NAME.py, which may import its neighbours while it is loaded."""
    sys.path.insert(0, str(EVAL))
    try:
        spec = importlib.util.spec_from_file_location(f"script_{name}", EVAL / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EVAL))
