"""Protocols of papers: what to generate, how to look at it, and which file of reference statistics to bring."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from .protocol import PROTOCOLS, Protocol, read_protocols


@dataclass(frozen=True)
class Published:
    """How an export or a folder of images is scored; image i of repeat r has seed first_seed + r count + i.

    Conditions are captions where there are `prompts`, else the classes in turn, image i having class i mod classes, else
    nothing. A model that knows no classes is scored without them.
    """

    name: str
    dataset: str
    metrics: tuple[str, ...]
    """Names out of `onestep.metrics.measure.METRICS`."""
    extractor: str
    """As `onestep.metrics.extractor.load_extractor` takes it; resizing and normalisation are its own."""
    count: int
    paper: str
    source: str
    """"read" for facts from the paper's own code, "remembered" where they are not."""
    facts: str
    differs: str
    """What is done in another way than there."""
    first_seed: int = 0
    repeats: int = 1
    """Times that all images are made, with other seeds; the least distance is reported, as the paper does."""
    size: int | None = None
    """Pixels that images are brought to before anything else: centre crop to a square, then Lanczos; None: as they are."""
    classes: int = 0
    prompts: str = ""
    prompts_from: str = ""
    prompts_sha256: str = ""
    """Of the file of captions, where it is known."""
    reference: str = ""
    """The usual name of the file or folder of reference statistics; none where the package has the images."""
    reference_from: str = ""
    embedded: str = ""
    """The data in the package that is the reference, and whose captions are the prompts."""

    def details(self) -> dict[str, Any]:
        """What a row says of it: all fields that are not empty."""
        return {key: value for key, value in asdict(self).items() if value not in ("", None, 0)} | {
            "first_seed": self.first_seed
        }


def _published(fields: Mapping[str, Any]) -> Published:
    return Published(**{**fields, "metrics": tuple(fields["metrics"])})


PUBLISHED: dict[str, Published] = {
    name: _published(fields) for name, fields in read_protocols().items() if name not in PROTOCOLS
}


def any_protocol(name: str) -> Protocol | Published:
    """A protocol of either kind. Raises ValueError, with the nearest name, where there is none."""
    known: dict[str, Protocol | Published] = {**PROTOCOLS, **PUBLISHED}
    if name not in known:
        near = get_close_matches(name, known, 1, cutoff=0.4)
        hint = f"; did you mean --protocol {near[0]}?" if near else ""
        raise ValueError(f"no protocol {name!r}; allowed are {', '.join(sorted(known))}{hint}")
    return known[name]
