"""Shared set-up: few threads, and `from tiny import ...` in every test."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, in processes that a test starts too
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of data, for processes that are started as well."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESTEP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny EDM teacher: pixels (1, 8, 8), ten classes."""
    from tiny import edm_pipeline

    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    edm_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders with a few grey pictures each."""
    from PIL import Image

    folder, source = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for label in range(3):
        (folder / str(label)).mkdir()
        for index in range(7):
            pixels = torch.randint(256, (10, 10), generator=source, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / str(label) / f"{index}.png")
    return folder
