"""Scores of unlearning: how far a class is gone from an export, what comes in its place, and what the others are worth."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import load_embedded
from ..files import sha256_of
from .frechet import Moments, frechet_distance
from .protocol import ASSETS, Protocol, protocol_of
from .provenance import generation, provenance
from .render import family_of, load_pipeline, render
from .score import Extractor, features_of, score


def names_of(pipe: Any) -> dict[str, int]:
    """Class labels by name; empty where the pipeline's folder names none."""
    return dict(pipe.labels) if type(pipe).__name__ == "DiTPipeline" else {}


def label_of(text: str, names: Mapping[str, int], classes: int, flag: str) -> int:
    """The class label that a number or a name stands for. Raises ValueError, with the nearest name, for no class."""
    known = {name.lower(): label for name, label in names.items()}
    label = int(text) if text.isdecimal() else known.get(text.strip().lower(), -1)
    if 0 <= label < classes:
        return label
    named = f", or a name such as {next(iter(names))!r}" if names else "; the classes have no names"
    near = get_close_matches(text.lower(), known, 1)
    hint = next(f"; did you mean {name!r}?" for name in names if name.lower() == near[0]) if near else ""
    raise ValueError(f"{flag} {text!r} is no class; allowed is 0 .. {classes - 1}{named}{hint}")


def classifier_of(name: str | None, device: torch.device | str) -> Extractor:
    """The frozen classifier of a protocol. Raises ValueError where there is no protocol of that name."""
    if name is None:
        raise ValueError("there is no classifier for this teacher; type --override random, or a class")
    return protocol_of(name).instruments(None, None, device).network.requires_grad_(False)


def evaluate_forgetting(
    folder: str | Path,
    protocol: Protocol,
    forget: str,
    override: str | None,
    *,
    steps: int,
    guidance: float,
    batch_size: int = 256,
    count: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Score an export that should have forgotten a class; the JSON-able row has the metrics and what they depend on.

    The images are those of `protocol`: image i of `count` has class i % classes and seed first_seed + i. Of the
    forgotten class: `UA` = 1 - accuracy, the unlearning accuracy, and `override_fraction`, how many are seen as the
    override; both are divided by the number of images of that class alone. Of the remaining classes: the Fréchet
    distance to the embedded real images of these classes, and class accuracy. With fewer images than the protocol's the
    distance is a proxy. Raises ValueError as `onestep.metrics.evaluate` does, and for classes that do not exist.
    """
    count = protocol.count if count is None else count
    if not 2 * protocol.classes <= count <= protocol.count:
        raise ValueError(f"--count {count} is not allowed; type {2 * protocol.classes} to {protocol.count}, or leave it out")
    tools = protocol.instruments(None, None, device)
    pipe = load_pipeline(folder, device)
    known = family_of(pipe).classes(pipe)
    if known is not None and known < protocol.classes:
        raise ValueError(f"{folder} knows {known} classes, and {protocol.name} asks for {protocol.classes}")
    gone = label_of(forget, names_of(pipe), protocol.classes, "--forget")
    instead = None if override is None else label_of(override, names_of(pipe), protocol.classes, "--override")
    if instead == gone:
        raise ValueError(f"--override {override} is the forgotten class itself; type another class, or leave it out")
    scored = without(protocol, gone)
    made = generation(pipe, folder, count, protocol.first_seed, steps, guidance)

    def images(indices: list[int]) -> Iterable[Tensor]:
        seeds = [protocol.first_seed + i for i in indices]
        return render(pipe, [i % protocol.classes for i in indices], seeds, steps, guidance, batch_size)

    remaining = [i for i in range(count) if i % protocol.classes != gone]
    fake, accuracy = score(images(remaining), [i % protocol.classes for i in remaining], tools.network, protocol)
    seen = predicted(images([i for i in range(count) if i % protocol.classes == gone]), tools.network)
    real = moments_without(gone, protocol, tools.network, batch_size)
    return {
        "protocol": scored.details(),
        "forget": gone,
        "override": instead,
        **forgetting(seen, gone, instead),
        scored.metric + ("" if count == protocol.count else "_proxy"): frechet_distance(fake, real),
        "class_accuracy": accuracy,
        "remaining_count": fake.count,
        **made,
        "extractor_sha256": tools.extractor_sha256,
        "reference_sha256": sha256_of(ASSETS / f"{protocol.real}_data" / "images.webp"),
        "reference_count": real.count,
        **provenance(device),
    }


def without(protocol: Protocol, gone: int) -> Protocol:
    """The protocol of the remaining classes. Raises ValueError where their real images are not in the package."""
    if not protocol.real:
        raise ValueError(f"no real images of {protocol.name} are in the package; type --protocol with another")
    dataset = f"the images of onestep/assets/{protocol.real}_data without class {gone}"
    return replace(protocol, name=f"{protocol.name}-without-{gone}", dataset=dataset)


def moments_without(gone: int, protocol: Protocol, network: Extractor, batch_size: int) -> Moments:
    """Feature moments of the embedded real images of all classes but one."""
    pictures, labels = load_embedded(protocol.real)
    kept = labels != gone
    moments, _ = score((pictures[kept] / 2 + 0.5).split(batch_size), labels[kept].tolist(), network, protocol)
    return moments


@torch.no_grad()
def predicted(batches: Iterable[Tensor], network: Extractor) -> Tensor:
    """The class of the largest logit of every image, shape (N,); batches are images (B, C, H, W) in [0, 1]."""
    return torch.cat([network.head(features_of(images, network)).argmax(1).cpu() for images in batches])


def forgetting(seen: Tensor, gone: int, instead: int | None) -> dict[str, Any]:
    """UA and the fraction of the override, from the classes that images of the forgotten class are seen as, shape (N,)."""
    count = len(seen)
    return {
        "UA": 1 - int((seen == gone).sum()) / count,
        "override_fraction": None if instead is None else int((seen == instead).sum()) / count,
        "forgotten_as": {int(label): int(number) for label, number in zip(*seen.unique(return_counts=True))},
        "forgotten_count": count,
    }
