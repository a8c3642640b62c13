"""Protocols: everything that a score depends on beside the export, under one name; and the scoring itself."""

import warnings
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..files import sha256_of
from .frechet import Moments, frechet_distance
from .manifold import COVERAGE_K, PRECISION_K, manifold
from .nearest import NearestPicture
from .provenance import generation, provenance
from .render import family_of, load_pipeline, render
from .score import Extractor, features_of, load_classifier, score

ASSETS = Path(__file__).parent.parent / "assets"
FOLDER = Path(__file__).parent / "protocols"


@dataclass(frozen=True)
class Instruments:
    """What a protocol measures with, and the hashes of the files it came from."""

    network: Extractor
    real: Moments
    extractor_sha256: str
    reference_sha256: str


@dataclass(frozen=True)
class Protocol:
    """How an export is scored. Image i has class i % classes and seed first_seed + i."""

    name: str
    metric: str
    """FID is the distance in Inception-v3 features alone; in any other extractor's it is FD."""
    dataset: str
    """The real images behind the reference statistics."""
    count: int
    classes: int
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    resize: str
    extractor: str
    dimensions: int
    assets: str
    """Folder under onestep/assets with classifier.safetensors and reference.safetensors."""
    first_seed: int = 0
    real: str = ""
    """The embedded data whose images precision, recall, density and coverage compare with."""

    def details(self) -> dict[str, Any]:
        """What a row says of it; `real` is said where it was used, see `comparison`."""
        return {key: value for key, value in asdict(self).items() if key != "real"}

    def instruments(self, classifier: Path | None, reference: Path | None, device: torch.device | str) -> Instruments:
        """Its own files, or these in their place. Raises ValueError for files that are missing or do not fit."""
        classifier = classifier or ASSETS / self.assets / "classifier.safetensors"
        reference = reference or ASSETS / self.assets / "reference.safetensors"
        network, real = load_classifier(classifier, self, device), Moments.load(reference)
        if real.dimensions != self.dimensions:
            raise ValueError(f"{reference} has {real.dimensions} dimensions, and {self.name} {self.dimensions}")
        return Instruments(network, real, sha256_of(classifier), sha256_of(reference))


@dataclass(frozen=True)
class PixelProtocol(Protocol):
    """One whose features are pixel intensities, 0 to `levels`, and whose classifier is the nearest real image.

    `assets` is the folder of the real images and their labels.
    """

    levels: int = 255

    def instruments(self, classifier: Path | None, reference: Path | None, device: torch.device | str) -> Instruments:
        """Made from the embedded images. Raises ValueError for files to be used in their place: there can be none."""
        if classifier or reference:
            raise ValueError(f"{self.name} measures pixels: leave classifier and reference out")
        images, labels = _embedded(self.real)
        network = NearestPicture(images, labels, self.classes, self.levels).to(device)
        real = Moments(self.dimensions)
        real.update(network.known)
        folder = ASSETS / self.assets
        return Instruments(network, real, sha256_of(folder / "labels.json"), sha256_of(folder / "images.webp"))


def read_protocols() -> dict[str, dict[str, Any]]:
    """The fields of all protocols by name, from the files of onestep/metrics/protocols, in the order of their names."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}


def _protocol(fields: dict[str, Any]) -> Protocol:
    made = PixelProtocol if "levels" in fields else Protocol
    return made(**{**fields, "shape": tuple(fields["shape"])})


PROTOCOLS: dict[str, Protocol] = {name: _protocol(each) for name, each in read_protocols().items() if "assets" in each}
"""The protocols of which everything is in the package; `onestep.metrics.published` has those that need files of yours."""


def protocol_of(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError, with the nearest name, where there is none."""
    if name not in PROTOCOLS:
        near = get_close_matches(name, PROTOCOLS, 1, cutoff=0.4)
        hint = f"; did you mean --protocol {near[0]}?" if near else ""
        raise ValueError(f"no protocol {name!r}; allowed are {', '.join(PROTOCOLS)}{hint}")
    return PROTOCOLS[name]


def _embedded(name: str) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and labels of the embedded data of that name."""
    from ..data import images  # which knows teachers and with them most of diffusers: only where it is needed

    return images.load_embedded(name)


def checked_count(count: int | None, protocol: Protocol) -> int:
    """`count`, by default the protocol's; warns where a distance from so few is biased. Raises ValueError out of range."""
    count = protocol.count if count is None else count
    if not 2 <= count <= protocol.count:
        raise ValueError(f"--count {count} is not allowed; {protocol.name} takes 2 to {protocol.count}: leave it out")
    if count < (enough := min(2048, protocol.count)):
        warnings.warn(
            f"a distance from {count} images is biased upwards and noisy: compare it only with the same count, and use "
            f"{enough} images or more",
            stacklevel=3,
        )
    return count


class Comparison:
    """The real images that a protocol compares generated ones with, and the features of the latter as they come."""

    def __init__(self, protocol: Protocol, network: Extractor):
        images, _ = _embedded(protocol.real)
        self.real = torch.cat([features_of(part / 2 + 0.5, network).cpu() for part in images.split(500)])
        self.fake: list[Tensor] = []
        self.details = {
            "precision_recall_k": PRECISION_K,
            "density_coverage_k": COVERAGE_K,
            "real": f"the {len(images)} images of onestep/assets/{protocol.real}_data",
            "real_sha256": sha256_of(ASSETS / f"{protocol.real}_data" / "images.webp"),
        }

    def scores(self) -> dict[str, float]:
        return asdict(manifold(self.real, torch.cat(self.fake)))


def evaluate(
    folder: str | Path,
    protocol: str | Protocol,
    *,
    steps: int,
    guidance: float,
    batch_size: int = 256,
    count: int | None = None,
    device: torch.device | str = "cpu",
    classifier: str | Path | None = None,
    reference: str | Path | None = None,
    precision_recall: bool = False,
) -> dict[str, Any]:
    """Score an exported folder; the JSON-able row holds the metrics and all that they depend on.

    With fewer images than the protocol's the distance is called FD_proxy: it is another number, its bias being larger;
    and so are the names of precision, recall, density and coverage, which the row has where `precision_recall` asks for
    them. `classifier` and `reference` replace the protocol's own files, which the row's hashes tell.
    Raises ValueError for an unknown protocol, an export that does not fit it and files missing or damaged.
    """
    protocol = protocol if isinstance(protocol, Protocol) else protocol_of(protocol)
    count = checked_count(count, protocol)
    tools = protocol.instruments(Path(classifier) if classifier else None, Path(reference) if reference else None, device)
    pipe = load_pipeline(folder, device)
    classes = family_of(pipe).classes(pipe)
    if family_of(pipe).prompts:
        raise ValueError(f"{folder} takes prompts, and {protocol.name} asks for classes: type --protocol with another")
    if classes is not None and classes < protocol.classes:
        raise ValueError(f"{folder} knows {classes} classes, and {protocol.name} asks for {protocol.classes}")
    conditions = [i % protocol.classes for i in range(count)]
    seeds = list(range(protocol.first_seed, protocol.first_seed + count))
    made = generation(pipe, folder, count, protocol.first_seed, steps, guidance)
    images = render(pipe, conditions, seeds, steps, guidance, batch_size)
    compared = Comparison(protocol, tools.network) if precision_recall else None
    kept = compared.fake if compared else None
    fake, accuracy = score(images, conditions, tools.network, protocol, kept)
    proxy = "" if count == protocol.count else "_proxy"
    return {
        "protocol": protocol.details() | ({"manifold": compared.details} if compared else {}),
        protocol.metric + proxy: frechet_distance(fake, tools.real),
        "class_accuracy": accuracy,
        **({name + proxy: value for name, value in compared.scores().items()} if compared else {}),
        **made,
        "extractor_sha256": tools.extractor_sha256,
        "reference_sha256": tools.reference_sha256,
        "reference_count": tools.real.count,
        **provenance(device),
    }
