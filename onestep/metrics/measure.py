"""What an extractor sees in a set of images, and the scores that two such sets give."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..clip_model import ClipModel
from .clip_extractor import ClipExtractor
from .clip_score import ClipScore
from .diversity import cosine, diversity, members
from .extractor import Extractor, Features
from .frechet import Moments, frechet_distance
from .images import fitted
from .inception_score import inception_score
from .kernel import cmmd, kid
from .manifold import manifold
from .retrieval import ranks, retrieval

Picture = Callable[[], np.ndarray]
"""An image when it is needed: uint8 (H, W, 3)."""
Pictures = Callable[[range], Sequence[Picture]]
"""Those of some indices in a row."""


@dataclass(frozen=True)
class Measured:
    """Moments of the pooled features (D,), and of the rest what metrics asked for."""

    moments: Moments
    pooled: Tensor | None = None
    """float32 (N, D), in the order of the images."""
    spatial: Moments | None = None
    logits: Tensor | None = None
    """float32 (N, classes), in the order of the images."""
    labels: Tensor | None = None
    """The classes that were asked for, (N,)."""
    prompts: Sequence[str] | None = None
    """The prompts that were asked for, N of them."""


Scores = dict[str, float | Tensor]
"""Scores by their names: a number, or what is to be averaged, one an image, float64 (N,)."""


@dataclass(frozen=True)
class Metric:
    """`compute` takes what was measured of the real and of the generated images, and the extractor that saw them."""

    compute: Callable[[Any, Any, Extractor], Scores]
    pooled: bool = False
    spatial: bool = False
    logits: bool = False
    reference: bool = True
    """Whether the real images are needed."""


def _fd(real: Measured, fake: Measured, extractor: Extractor) -> Scores:
    return {extractor.metric: frechet_distance(fake.moments, real.moments)}


def _sfid(real: Any, fake: Any, extractor: Extractor) -> Scores:
    return {"sFID" if extractor.metric == "FID" else "sFD": frechet_distance(fake.spatial, real.spatial)}


def _kid(real: Any, fake: Any, extractor: Extractor) -> Scores:
    # as many as there are where a subset of 1,000 cannot be had
    size = min(1000, len(real.pooled), len(fake.pooled))
    mean, std = kid(real.pooled, fake.pooled, subset_size=size)
    short = "KID" if extractor.metric == "FID" else "KD"
    return {short: mean, f"{short}_std": std, **({f"{short}_subset": size} if size < 1000 else {})}


def _cmmd(real: Any, fake: Any, extractor: Extractor) -> Scores:
    _clip_of(extractor, "cmmd")
    unit = torch.nn.functional.normalize  # as the paper's code has CLIP's embeddings
    return {"CMMD": cmmd(unit(real.pooled.double()), unit(fake.pooled.double()))}


def _is(real: Any, fake: Any, extractor: Extractor) -> Scores:
    # files of a folder may come class by class, and a split is to be a sample of all
    order = torch.randperm(len(fake.logits), generator=torch.Generator().manual_seed(0))
    mean, std = inception_score(fake.logits[order])
    return {"IS": mean, "IS_std": std}


def _accuracy(real: Any, fake: Measured, extractor: Extractor) -> Scores:
    if fake.labels is None or fake.logits is None:
        raise ValueError("class-accuracy needs an export that makes classes: leave it out of --metrics")
    return {"class_accuracy": (fake.logits.argmax(1) == fake.labels).double()}


def _manifold(real: Any, fake: Any, extractor: Extractor) -> Scores:
    return asdict(manifold(real.pooled, fake.pooled))


def _clip_of(extractor: Extractor, metric: str) -> ClipModel:
    if not isinstance(extractor, ClipExtractor):
        raise ValueError(
            f"{metric} is of CLIP's embeddings, and the extractor is {extractor.name}: leave it out of --metrics, or type "
            "for example --extractor clip:ViT-L-14-quickgelu/openai"
        )
    return extractor.clip


def _clip_score(real: Any, fake: Measured, extractor: Extractor) -> Scores:
    clip = _clip_of(extractor, "clip-score")
    if fake.prompts is None or fake.pooled is None:
        raise ValueError("clip-score needs the prompt of each image: type --prompts FILE, or leave it out of --metrics")
    score = ClipScore(clip)
    for start in range(0, len(fake.prompts), 256):
        score.add(fake.pooled[start : start + 256], clip.texts(fake.prompts[start : start + 256]))
    return {**score.each()}


def _retrieval(real: Measured, fake: Measured, extractor: Extractor) -> Scores:
    if fake.prompts is None or fake.pooled is None or real.prompts is None or real.pooled is None:
        raise ValueError(
            "retrieval needs the prompts of images and real pictures, which emoji-2k has: leave it out of --metrics"
        )
    return {**retrieval(ranks(fake.pooled, real.pooled, fake.prompts, real.prompts))}


def _diversity(real: Any, fake: Measured, extractor: Extractor) -> Scores:
    groups = fake.prompts if fake.labels is None else fake.labels.tolist()
    if groups is None or fake.pooled is None:
        raise ValueError("diversity needs the class or the prompt of each image: leave it out of --metrics")
    return {"diversity(cosine)": diversity(fake.pooled, groups, cosine).mean}


METRICS: dict[str, Metric] = {
    "fd": Metric(_fd),
    "kid": Metric(_kid, pooled=True),
    "precision-recall": Metric(_manifold, pooled=True),
    "sfid": Metric(_sfid, spatial=True),
    "is": Metric(_is, logits=True, reference=False),
    "cmmd": Metric(_cmmd, pooled=True),
    "class-accuracy": Metric(_accuracy, logits=True, reference=False),
    "clip-score": Metric(_clip_score, pooled=True, reference=False),
    "retrieval": Metric(_retrieval, pooled=True),
    "diversity": Metric(_diversity, pooled=True, reference=False),
}
"""FD is called FID in clean-fid's Inception-v3 alone, and so sFID and KID, which are sFD and KD elsewhere."""
SINGLE = ("clip-score", "retrieval")
"""Those that are one an image and say something of its prompt."""
MEANS = ("class_accuracy", "CLIPScore(", "cosine(", "retrieval@", "diversity(", "HPSv2 (", "aesthetic (", "ImageReward (")
"""How the names of means begin, which few images make noisy but do not bias."""


def metrics_of(names: str) -> tuple[str, ...]:
    """Metrics named with commas; fid is another name of fd. Raises ValueError for names that there are not."""
    found = tuple(dict.fromkeys("fd" if name == "fid" else name for name in (each.strip() for each in names.split(","))))
    if unknown := [name for name in found if name not in METRICS]:
        raise ValueError(
            f"--metrics {unknown[0]!r} is not known; allowed are {', '.join(METRICS)}, with commas between them"
        )
    return found


class Collector:
    """Takes in features batch by batch and keeps what some metrics need."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str]):
        self._extractor, self._wanted = extractor, [METRICS[name] for name in metrics]
        self.moments = Moments(extractor.dimensions)
        self.spatial: Moments | None = None
        self.pooled: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, features: Features) -> None:
        """Raises ValueError where a metric needs what the extractor has not, or for features that are not finite."""
        self.moments.update(features.pooled)
        if any(metric.pooled for metric in self._wanted):
            self.pooled.append(features.pooled)
        if any(metric.spatial for metric in self._wanted):
            spatial = self._given(features.spatial, "spatial features, which sfid needs")
            self.spatial = Moments(spatial.shape[1]) if self.spatial is None else self.spatial
            self.spatial.update(spatial)
        if any(metric.logits for metric in self._wanted):
            self.logits.append(self._given(features.logits, "class logits, which is and class-accuracy need"))

    def _given(self, features: Tensor | None, what: str) -> Tensor:
        if features is None:
            raise ValueError(
                f"{self._extractor.name} has no {what}: leave it out of --metrics, or type --extractor inception"
            )
        return features

    def measured(self) -> Measured:
        pooled, logits = (torch.cat(each) if each else None for each in (self.pooled, self.logits))
        return Measured(self.moments, pooled, self.spatial, logits)


def measure(
    count: int,
    pictures: Pictures,
    extractor: Extractor,
    metrics: Sequence[str],
    batch_size: int = 64,
    size: int | None = None,
    workers: int = 1,
) -> Measured:
    """What `extractor` sees in the images 0 .. count-1, each made `size` pixels square first where that is given.

    `workers` threads read and prepare images. Processes of one group share the batches: each takes every n-th, and all get
    all features, in the order of the images, so that the result does not depend on their number. Raises ValueError for
    images that cannot be read or be scored together.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"--batch-size {batch_size} and --workers {workers} are not allowed; type 1 or more")
    collector = Collector(extractor, metrics)
    for _, features in seen(range(count), pictures, extractor, batch_size, size, workers):
        collector.add(features)
    return collector.measured()


def seen(
    indices: range,
    pictures: Pictures,
    extractor: Extractor,
    batch_size: int,
    size: int | None,
    workers: int,
) -> Iterator[tuple[range, Features]]:
    """(indices, features) of all batches, in their order, in every process; see `measure`."""
    state = PartialState()
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]

    def ready(picture: Picture) -> Tensor:
        return extractor.prepare(fitted(picture(), size))

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(indices), desc="scoring", unit="img", dynamic_ncols=True, disable=None) as bar,
    ):
        for turn in range(0, len(batches), state.num_processes):
            found: list[tuple[range, Features | ValueError]] = []
            for part in batches[turn + state.process_index : turn + state.process_index + 1]:
                try:
                    found.append((part, extractor(_stacked(list(pool.map(ready, pictures(part)))))))
                except ValueError as error:  # for all processes: those that go on alone would wait for ever
                    found.append((part, error))
            for part, features in gather_object(found) if state.num_processes > 1 else found:
                if isinstance(features, ValueError):
                    raise features
                bar.update(len(part))
                yield part, features


def _stacked(images: list[Tensor]) -> Tensor:
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"images of {len(shapes)} sizes cannot be scored together here: type --size with one number")
    return torch.stack(images)


def scores(real: Measured | None, fake: Measured, metrics: Sequence[str], extractor: Extractor, reference: str) -> Scores:
    """All metrics by their names. Raises ValueError for what `reference` does not hold, and what a metric lacks."""
    found: Scores = {}
    for name in metrics:
        metric = METRICS[name]
        if metric.reference and (real is None or (metric.pooled and real.pooled is None)):
            raise ValueError(
                f"{name} needs features of real images, and {reference} has none: build it with --keep-features"
            )
        if metric.spatial and (real is None or real.spatial is None):
            raise ValueError(f"{name} needs spatial statistics, and {reference} has none: build it with --spatial")
        found |= metric.compute(real, fake, extractor)
    return found


def means(found: Scores) -> dict[str, float]:
    """Scores that are one an image as their means, the others as they are."""
    return {name: float(each.mean()) if isinstance(each, Tensor) else each for name, each in found.items()}


def by_prompt(found: Scores, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{score: {prompt: its mean over the prompt's images}} for those of `scores` that are one an image."""
    rows_of = members(prompts)
    return {
        name: {prompt: float(each[rows].mean()) for prompt, rows in rows_of.items()}
        for name, each in found.items()
        if isinstance(each, Tensor)
    }
