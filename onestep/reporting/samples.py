"""Samples made for the page by an export's protocol: its scores with intervals, and what `looks` shows of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..metrics import PROTOCOLS, Protocol, load_pipeline
from ..metrics.bootstrap import Interval, frechet_interval, manifold_intervals, mean_interval
from ..metrics.protocol import Comparison, Instruments, checked_count
from ..metrics.provenance import generation, provenance
from ..metrics.render import render
from ..metrics.score import features_of
from ..quiet import quiet
from ..teacher import facts_of
from .looks import Looks, Samples, looks
from .sources import Row, Source
from .tables import INTERVALS

SAME = ("weights_sha256", "count", "seeds", "steps", "guidance", "extractor_sha256", "reference_sha256")
"""Entries that are equal in two rows of the very same images, scored alike."""


def make_all(sources: Sequence[Source], count: int) -> list[Looks]:
    """What `make` shows of each source, in their order."""
    return [made for index, source in enumerate(sources) if (made := make(index, source, count))]


def make(index: int, source: Source, count: int) -> Looks | None:
    """Samples `count` images of a source's export from the first seeds of its protocol, or as many as that has, if fewer.

    Their row is added to the source's, or their intervals to the row of the very same images. Where no samples can be made
    the reason becomes a note of the source. Raises ValueError for a count below 2.
    """
    protocol = protocol_for(source)
    if source.export is None or protocol is None:
        missing = "export" if source.export is None else "protocol with real images in the package"
        source.notes.append(f"no samples were made: it has no {missing}")
        return None
    count = checked_count(min(count, protocol.count), protocol)
    try:
        samples, tools, facts = sampled(source, protocol, count)
    except ValueError as error:
        source.notes.append(f"no samples were made: {' '.join(str(error).split())}")
        return None
    compared = Comparison(protocol, tools.network)
    _keep(source, row_of(protocol, tools, compared, samples, facts))
    return looks(index, source, protocol, samples, compared.real)


def protocol_for(source: Source) -> Protocol | None:
    """That of its results, or of its teacher, where all of it is in the package."""
    names = [row["protocol"].get("name") for row in source.rows if "protocol" in row]
    if teacher := source.config.get("teacher"):
        names.append(facts_of(str(teacher)).protocol)
    return next((PROTOCOLS[name] for name in names if name in PROTOCOLS), None)


@torch.no_grad()
def sampled(source: Source, protocol: Protocol, count: int) -> tuple[Samples, Instruments, Row]:
    """Images, their features, what they were scored with, and what made them; steps and guidance as they were scored.

    Raises ValueError for an export that does not fit the protocol.
    """
    assert source.export is not None
    with quiet():
        pipe = load_pipeline(source.export)
    usual: Row = {"steps": source.config.get("student_steps", 1), "guidance": 1.0}
    asked: Row = next((usual | row for row in source.rows if "steps" in row), usual)
    steps, guidance = int(asked["steps"]), float(asked["guidance"])
    labels = [i % protocol.classes for i in range(count)]
    seeds = list(range(protocol.first_seed, protocol.first_seed + count))
    images = torch.cat(list(render(pipe, labels, seeds, steps, guidance, 256)))
    if tuple(images.shape[1:]) != protocol.shape:
        raise ValueError(f"its images are {tuple(images.shape[1:])}, and {protocol.name} scores {protocol.shape}")
    tools = protocol.instruments(None, None, "cpu")
    features = torch.cat([features_of(part, tools.network).cpu() for part in images.split(500)])
    answers = torch.cat([tools.network.head(part).argmax(1) for part in features.split(500)])
    facts = generation(pipe, source.export, count, protocol.first_seed, steps, guidance)
    return Samples(images, torch.tensor(labels), features, answers), tools, facts


def row_of(protocol: Protocol, tools: Instruments, compared: Comparison, samples: Samples, facts: Row) -> Row:
    """A row as `onestep.metrics.evaluate` makes it with precision and recall, with an interval for each score."""
    proxy = "" if len(samples.features) == protocol.count else "_proxy"
    right: Tensor = (samples.answers == samples.labels).double()
    scores: dict[str, Interval] = {
        protocol.metric + proxy: frechet_interval(samples.features, tools.real),
        "class_accuracy": mean_interval(right),
    }
    found = manifold_intervals(compared.real, samples.features)
    scores |= {name + proxy: interval for name, interval in found.items()}
    return {
        "protocol": protocol.details() | {"manifold": compared.details},
        **{name: score.estimate for name, score in scores.items()},
        **facts,
        "extractor_sha256": tools.extractor_sha256,
        "reference_sha256": tools.reference_sha256,
        "reference_count": tools.real.count,
        **provenance("cpu"),
        INTERVALS: {name: [score.low, score.high] for name, score in scores.items()},
    }


def _keep(source: Source, row: Row) -> None:
    """A stored row of the same images keeps its own numbers, and gets the intervals and the scores that it has not."""
    for old in source.rows:
        if all(old.get(key) == row[key] for key in SAME):
            old.update({key: value for key, value in row.items() if key not in old})
            return
    source.rows.append(row)
