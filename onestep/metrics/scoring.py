"""An export or a folder of images scored in any extractor, by a protocol or against any reference; the row of results."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..files import sha256_of
from .extractor import Extractor, load_extractor
from .images import files_of
from .measure import MEANS, METRICS, SINGLE, Measured, Pictures, by_prompt, means, measure, scores
from .pictures import Rendered
from .preference import Judged, Scorer, scorers_of
from .prompts import captioned
from .protocol import ASSETS, Comparison, Protocol
from .provenance import generation, provenance
from .published import Published
from .reference import Reference, load, measured_folder
from .request import Export, Request, prompts_of, resolved

ENOUGH = 2048
"""Images below which a distance is called a proxy where no protocol says how many there are to be."""


def evaluate_any(request: Request) -> dict[str, Any]:
    """Score `request.what`, a diffusers folder or a folder of images; the row holds all that the numbers depend on.

    Without a protocol: fd in the extractor inception, of 50,000 images, or as many as there are prompts, or files.
    Distances and their like of fewer images than the protocol has, or than `ENOUGH` without one, have names that end in
    _proxy. Raises ValueError for what is missing, damaged or does not fit, before the first image is made.
    """
    r = resolved(request)
    extractor = load_extractor(str(r.extractor), r.weights, r.device)
    metrics = r.metrics or ("fd",)
    exported = (r.what / "model_index.json").is_file()
    source = Export(r) if exported else None
    if r.by_prompt and not (set(metrics) & set(SINGLE) and (r.prompts or (source and source.prompts))):
        raise ValueError(f"--by-prompt needs images of prompts, and --metrics with {' or '.join(SINGLE)}: leave it out")
    scorers = scorers_of(r.preference, r.device) if r.preference else []
    real = reference_of(r, extractor, metrics)
    runs = [_run(r, source, extractor, metrics, scorers, real, repeat) for repeat in range(r.repeats or 1)]
    fd = [name for name in runs[0][0] if name in (extractor.metric, f"{extractor.metric}_proxy")]
    found, made = min(runs, key=lambda run: run[0][fd[0]] if fd else 0.0)
    repeated = (
        {} if len(runs) == 1 else {"repeats": len(runs), "runs": [{**scored, "seeds": m["seeds"]} for scored, m in runs]}
    )
    return {
        **({"protocol": r.protocol.details()} if r.protocol else {}),
        **found,
        **repeated,
        **made,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        **({"preference_sha256": {each.name: each.sha256 for each in scorers}} if scorers else {}),
        **({"size": r.size} if r.size else {}),
        **({} if real is None else real.details),
        **provenance(r.device),
    }


def reference_of(r: Request, extractor: Extractor, metrics: Sequence[str]) -> Reference | None:
    if isinstance(r.protocol, Protocol):
        return _own(r.protocol, r.device)
    if isinstance(r.protocol, Published) and r.protocol.embedded:
        return _embedded(r.protocol.embedded, extractor, r)
    if r.reference is not None:
        given = load(r.reference, extractor, metrics, size=r.size, batch_size=r.batch_size, workers=r.workers)
        d = given.details
        stated = {"reference": r.reference.as_posix(), "reference_sha256": d.get("files_sha256") or d.get("sha256")}
        return replace(given, details=stated | {"reference_count": d.get("count")})
    if not any(METRICS[name].reference for name in metrics):
        return None
    if isinstance(r.protocol, Published):
        p = r.protocol
        raise ValueError(f"{p.name} needs its reference {p.reference} ({p.reference_from}): type --reference with its path")
    raise ValueError("nothing to compare with: type --protocol with a name, or --reference with a folder or statistics")


def _own(protocol: Protocol, device: str) -> Reference:
    """What a protocol in the package compares with; its real images' features too, for the metrics that need them."""
    tools = protocol.instruments(None, None, device)
    compared = Comparison(protocol, tools.network)
    details = {"reference_sha256": tools.reference_sha256, "reference_count": tools.real.count}
    return Reference(Measured(tools.real, pooled=compared.real), details, ("PNG",))


def _embedded(name: str, extractor: Extractor, r: Request) -> Reference:
    pictures, captions = captioned(name)
    shown = [partial(np.asarray, image) for image in pictures]
    # "kid" for their features: few images, for which all metrics may ask
    real = measure(len(shown), lambda part: [shown[i] for i in part], extractor, ("kid",), r.batch_size, r.size, r.workers)
    file = ASSETS / f"{name}_data" / "images.webp"
    details = {
        "reference": f"onestep/assets/{name}_data",
        "reference_sha256": sha256_of(file),
        "reference_count": len(shown),
    }
    return Reference(replace(real, prompts=captions), details, ("PNG",))


def _run(
    r: Request,
    source: Export | None,
    extractor: Extractor,
    metrics: Sequence[str],
    scorers: Sequence[Scorer],
    real: Reference | None,
    repeat: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by their names, and what made the images."""
    judges: list[Judged] = []

    def judged(pictures: Pictures, prompts: Sequence[str] | None) -> Pictures:
        judges.extend([Judged(pictures, scorers, prompts)] if scorers else [])
        return judges[0] if judges else pictures

    if source is None:
        formats = None if real is None else real.formats
        prompts, details = prompts_of(r, r.count or len(files_of(r.what))) if r.prompts else (None, {})
        fake = measured_folder(
            r.what, extractor, metrics, size=r.size, batch_size=r.batch_size, workers=r.workers,
            reference_formats=formats, count=r.count, seen_by=partial(judged, prompts=prompts),
        )  # fmt: skip
        measured, made = replace(fake.measured, prompts=prompts), {"export": r.what.as_posix(), **fake.details, **details}
    else:
        seed, count = source.seed(repeat), len(source.conditions)
        made = generation(source.pipe, r.what, count, seed, r.steps, r.guidance) | source.details
        kept = {name: made[name] for name in made if name not in ("export", "count", "seeds")}
        images = Rendered(source.pipe, source.conditions, seed, r.steps, r.guidance, r.save, kept)
        prompts = source.conditions if source.prompts else None
        measured = measure(count, judged(images, prompts), extractor, metrics, r.batch_size, r.size, r.workers)
        asked = {"prompts": prompts} if source.prompts else {"labels": torch.tensor(source.conditions)}
        measured = replace(measured, **asked)
    single = scores(None if real is None else real.measured, measured, metrics, extractor, str(r.reference))
    if r.by_prompt and measured.prompts:
        made = made | {"by_prompt": by_prompt(single, measured.prompts)}
    found = means(single)
    for judge in judges:
        found |= judge.means()
    return named(found, made["count"], r.protocol), made


def named(found: dict[str, float], count: int, protocol: Protocol | Published | None) -> dict[str, float]:
    """Proxies called so, with a warning. Raises ValueError for more images than the protocol has."""
    whole = ENOUGH if protocol is None else protocol.count
    if protocol is not None and count > whole:
        raise ValueError(f"{count} images, and {protocol.name} takes {whole}: type --count {whole} for the first {whole}")
    if count >= whole:
        return found
    if count < ENOUGH:
        warnings.warn(
            f"a distance from {count} images is biased upwards and noisy: compare it only with the same count, and use "
            f"{min(ENOUGH, whole)} images or more",
            stacklevel=4,
        )
    return {name if name.startswith(MEANS) else f"{name}_proxy": value for name, value in found.items()}
