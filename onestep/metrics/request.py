"""What is to be scored and how: a request, completed by its protocol, and the conditions of an export's images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import sha256_of
from .prompts import captioned, read_prompts
from .protocol import Protocol
from .published import Published
from .render import family_of, load_pipeline


@dataclass(frozen=True)
class Request:
    """What to score and how; what is None is the protocol's, or has the default that `evaluate_any` names."""

    what: Path
    protocol: Protocol | Published | None = None
    reference: Path | None = None
    metrics: tuple[str, ...] | None = None
    preference: str | None = None
    """As `onestep.metrics.preference.scorers_of` takes it."""
    extractor: str | None = None
    weights: Path | None = None
    size: int | None = None
    count: int | None = None
    repeats: int | None = None
    steps: int = 1
    guidance: float = 1.0
    classes: int | None = None
    prompts: Path | None = None
    by_prompt: bool = False
    """Whether the row keeps scores that are one an image as their means over each prompt's images."""
    save: Path | None = None
    batch_size: int = 64
    workers: int = 1
    device: str = "cpu"
    trust_remote_code: bool = False


def resolved(r: Request) -> Request:
    """The request with its protocol's entries. Raises ValueError for entries that a protocol does not leave open."""
    if not r.what.is_dir():
        raise ValueError(f"no folder {r.what}; name an exported folder or a folder of images")
    if r.protocol is None:
        return replace(r, extractor=r.extractor or "inception", metrics=r.metrics or ("fd",), repeats=r.repeats or 1)
    for flag, value in (("--extractor", r.extractor), ("--size", r.size), ("--classes", r.classes)):
        if value is not None:
            raise ValueError(f"{flag} is part of the protocol {r.protocol.name}: leave it out, or type --reference alone")
    if isinstance(r.protocol, Protocol):
        if r.reference or r.prompts:
            raise ValueError(f"{r.protocol.name} has its own reference and classes: leave --reference and --prompts out")
        exported = (r.what / "model_index.json").is_file()
        usual = ("fd", "class-accuracy") if exported else ("fd",)
        return replace(r, extractor=r.protocol.real, metrics=r.metrics or usual, classes=r.protocol.classes, repeats=1)
    p = r.protocol
    exported = (r.what / "model_index.json").is_file()
    return replace(
        r,
        extractor=p.extractor,
        metrics=r.metrics or tuple(name for name in p.metrics if exported or r.prompts or name != "retrieval"),
        size=p.size,
        classes=p.classes or None,
        repeats=(r.repeats or p.repeats) if exported else 1,
        reference=r.reference or (Path(p.reference) if p.reference and Path(p.reference).exists() else None),
    )


class Export:
    """The export's pipeline and the conditions of its images."""

    def __init__(self, r: Request):
        self.request, self.pipe = r, load_pipeline(r.what, r.device, trust_remote_code=r.trust_remote_code)
        family = family_of(self.pipe)
        self.prompts = family.prompts
        if family.prompts:
            self.conditions, self.details = _prompts(r)
        else:
            self.conditions, self.details = _labels(r, family.classes(self.pipe))

    def seed(self, repeat: int) -> int:
        first = 0 if self.request.protocol is None else self.request.protocol.first_seed
        return first + repeat * len(self.conditions)


def _prompts(r: Request) -> tuple[Sequence[Any], dict[str, Any]]:
    if isinstance(r.protocol, Published) and r.protocol.embedded:
        known = captioned(r.protocol.embedded)[1]
        details: dict[str, Any] = {"prompts": r.protocol.prompts}
    elif r.prompts is None:
        of = f"{r.protocol.prompts} ({r.protocol.prompts_from})" if isinstance(r.protocol, Published) else "a prompt a line"
        raise ValueError(f"{r.what} takes prompts: type --prompts with a file of them; expected is {of}")
    else:
        known = read_prompts(r.prompts)
        details = {"prompts": r.prompts.as_posix(), "prompts_sha256": sha256_of(r.prompts)}
        expected = r.protocol.prompts_sha256 if isinstance(r.protocol, Published) else ""
        if expected and details["prompts_sha256"] != expected:
            raise ValueError(
                f"--prompts {r.prompts} has the SHA-256 {details['prompts_sha256']}, and {expected} is that of the prompts "
                "of this protocol: download them anew, or leave --protocol out"
            )
    count = checked(r, min(len(known), r.protocol.count) if r.protocol else len(known))
    if r.protocol and len(known) < r.protocol.count and r.count is None:
        raise ValueError(f"{len(known)} prompts, and {r.protocol.name} has {r.protocol.count}: type --count {len(known)}")
    if count > len(known):
        raise ValueError(f"--count {count} is more than the {len(known)} prompts: type --count {len(known)} or less")
    return known[:count], details


def prompts_of(r: Request, count: int) -> tuple[Sequence[str], dict[str, Any]]:
    """The prompts of a folder's images, in the order of their paths. Raises ValueError unless there is one for each."""
    assert r.prompts is not None
    known = read_prompts(r.prompts)
    if len(known) < count:
        raise ValueError(f"--prompts {r.prompts} has {len(known)} prompts for {count} images: give each image one")
    return known[:count], {"prompts": r.prompts.as_posix(), "prompts_sha256": sha256_of(r.prompts)}


def _labels(r: Request, known: int | None) -> tuple[Sequence[Any], dict[str, Any]]:
    if r.prompts or (isinstance(r.protocol, Published) and r.protocol.prompts):
        raise ValueError(f"{r.what} takes no prompts: type --protocol with one of classes, and no --prompts")
    if known is None and r.classes is None:
        raise ValueError(f"{r.what} does not say how many classes it knows; type --classes with their number")
    if known is not None and known > 1 and (r.classes or 1) > known:
        raise ValueError(f"{r.what} knows {known} classes, and {r.classes} are asked for")
    classes = 1 if known == 1 else r.classes or known or 1
    if classes < 1:
        raise ValueError(f"--classes {classes} is not allowed; type 1 class or more")
    count = checked(r, r.protocol.count if r.protocol else 50_000)
    return [i % classes for i in range(count)], {"classes": classes}


def checked(r: Request, usual: int) -> int:
    """The number of images. Raises ValueError for one that is not allowed."""
    count = usual if r.count is None else r.count
    if count < 2 or (r.protocol is not None and count > r.protocol.count):
        allowed = f"2 to {r.protocol.count}" if r.protocol else "2 or more"
        raise ValueError(f"--count {count} is not allowed; type {allowed}")
    return count
