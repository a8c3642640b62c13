"""Real images for the GAN critic, conditions for the student, and cached pairs of noise and teacher sample."""

import json
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from .objectives.base import Batch
from .rng import Rng
from .teacher import ASSETS, Teacher

EMBEDDED = ("fashion", "digits")
"""Data sets in the package: 10,000 Fashion-MNIST training images (32x32), scikit-learn's 1,797 digits (8x8)."""


def load_images(source: str, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, channels, size, size) float32 in [-1, 1] and labels (N,) of an embedded data set or a folder.

    A folder holds one sub-folder of images for each class, in sorted order; images are resized (antialiased bicubic)
    and centre-cropped. Raises ValueError for an unknown source.
    """
    if source in EMBEDDED:
        return _embedded(source)
    if not Path(source).is_dir():
        near = get_close_matches(source, EMBEDDED, 1)
        hint = f"; did you mean --data {near[0]}?" if near else ""
        raise ValueError(
            f"no data {source!r}: allowed are {', '.join(EMBEDDED)}, or a folder with one sub-folder of images a class{hint}"
        )
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    mode = "L" if channels == 1 else "RGB"
    try:
        folder = ImageFolder(source, transform, loader=lambda path: Image.open(path).convert(mode))
    except (FileNotFoundError, OSError) as error:
        raise ValueError(f"{source} holds no class folders with images: {error}") from error
    pairs = [folder[i] for i in tqdm(range(len(folder)), desc="reading images", leave=False, disable=None)]
    return torch.stack([image for image, _ in pairs]), torch.tensor(folder.targets)


def _embedded(name: str) -> tuple[Tensor, Tensor]:
    """A data set kept as one picture of side-by-side tiles, row by row, and a JSON file of its labels and tile size."""
    folder = ASSETS / f"{name}_data"
    about = json.loads((folder / "labels.json").read_text())
    labels, tile, size = torch.tensor([int(c) for c in about["labels"]]), about["tile"], about["size"]
    sheet = v2.functional.pil_to_tensor(Image.open(folder / "images.webp").convert("L"))[0]
    rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
    tiles = sheet.view(rows, tile, columns, tile).transpose(1, 2).reshape(-1, 1, tile, tile)[: len(labels)]
    margin = (size - tile) // 2
    padded = torch.nn.functional.pad(tiles, (margin,) * 4)
    return padded.float() / 127.5 - 1, labels


class Data:
    """Batches as a pure function of the step: each epoch is a permutation seeded by (seed, epoch).

    Without real samples the conditions are uniform over the classes.
    """

    def __init__(self, real: Tensor | None, labels: Tensor | None, classes: int, seed: int):
        self.real, self.labels, self.classes, self.seed = real, labels, classes, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @classmethod
    @torch.no_grad()
    def of(cls, source: str | None, teacher: Teacher, seed: int) -> "Data":
        """Reads and encodes `source` into the teacher's x0 units, once, held on the teacher's device."""
        if source is None:
            return cls(None, None, teacher.classes, seed)
        channels, size = teacher.image_shape
        images, labels = load_images(source, channels, size)
        chunks = tqdm(images.split(256), desc="encoding real images", leave=False, disable=None)
        real = torch.cat([teacher.to_x0(chunk.to(teacher.device)) for chunk in chunks])
        return cls(real, labels.to(teacher.device), teacher.classes, seed)

    def batch(self, step: int, total: int, start: int, stop: int, device: torch.device | str) -> Batch:
        """Rows start .. stop-1 of the global batch of `total` at `step`."""
        rng = Rng(self.seed, step, total, start, stop, device)
        if self.real is None or self.labels is None:
            return Batch(rng.integers(self.classes), None, rng)
        index = torch.tensor([self._index(step * total + row) for row in range(start, stop)], device=self.real.device)
        return Batch(self.labels[index], self.real[index], rng)

    def _index(self, position: int) -> int:
        assert self.real is not None
        epoch, offset = divmod(position, len(self.real))
        if epoch != self._epoch:
            order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.real), generator=order)
        return int(self._order[offset])


class PairCache:
    """(z, teacher sample, condition) triples on disk, made once for a (count, steps, guidance) and found again later."""

    def __init__(self, folder: Path, teacher: Teacher, count: int, steps: int, guidance: float, seed: int = 0):
        path = folder / f"pairs-{count}-{steps}-{guidance:g}-{seed}.safetensors"
        if not path.is_file():
            self._make(path, teacher, count, steps, guidance, seed)
        with safe_open(path, "pt", device=str(teacher.device)) as file:
            self.z, self.y, self.conditions = (file.get_tensor(key) for key in ("z", "y", "conditions"))

    @staticmethod
    def _make(path: Path, teacher: Teacher, count: int, steps: int, guidance: float, seed: int) -> None:
        parts = []
        for first in tqdm(range(0, count, 128), desc="teacher pairs"):
            rng = Rng(seed, first, min(128, count - first), device=teacher.device)
            z, conditions = rng.normal(teacher.shape), rng.integers(teacher.classes)
            parts.append((z, teacher.sample(z, *teacher.encode(conditions), guidance, steps), conditions))
        z, y, conditions = (torch.cat(part).cpu() for part in zip(*parts))
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        save_file({"z": z, "y": y, "conditions": conditions}, scratch)
        scratch.replace(path)

    def draw(self, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """A batch drawn with replacement."""
        index = rng.integers(len(self.z))
        return self.z[index], self.y[index], self.conditions[index]
