"""Mutated options and manifests end in a ValueError or are read; python tests/faults/fuzz.py does it ten thousand times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from fuzz import fuzz


def test_no_mutation_ends_in_a_traceback_or_writes_elsewhere(tmp_path: Path) -> None:
    assert fuzz(350, tmp_path) > 100
