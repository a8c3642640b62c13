"""The options of `onestep.objectives.hyper_sd`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class HyperSDConfig(MethodConfig):
    """Options of trajectory segmented consistency distillation."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.9, "beta2": 0.999, "clip_norm": 1.0}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # trajectories begin at the schedule's most noise

    levels: int = option(40, "noise levels of the trajectory, a multiple of every number of segments", minimum=1)
    segments: str = option("8,4,2,1", "numbers of segments, one stage after the other; the last is 1")
    segment_steps: int = option(300, "steps of each stage but the last, which takes the rest", minimum=1)
    segment_end: str = option(
        "auto",
        "where jumps end: at a random level that the network is told, or is not (hidden), or at the segment's edge; auto: "
        "network, and edge for adapters",
        choices=("auto", "network", "edge", "hidden"),
    )
    target_ema: float = option(0.95, "decay of the average that makes the target; 0: the student does", minimum=0, below=1)
    segment_gan: str = option("0.001,0.001,0.1,0.1", "weight of the GAN in each stage, or one for all; 0 is off")
    blocks: int = option(4, "transformer blocks of the teacher with a head each; of a UNet it is the mid block", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages_of(self)


def stages_of(config: HyperSDConfig) -> list[tuple[int, float]]:
    """(number of segments, weight of the GAN) of each stage.

    Raises ValueError where they do not fit each other or the levels, and where the last stage has more than one segment.
    """
    counts = numbers(config.segments, int, "segments")
    weights = numbers(config.segment_gan, float, "segment_gan")
    if counts[-1] != 1:
        raise ValueError(
            f"segments {config.segments} end with {counts[-1]}; the exported student jumps to clean data, so the last is 1: "
            f"type --segments {config.segments},1"
        )
    for count in counts:
        if config.levels % count:
            near = max(1, round(config.levels / count)) * count
            raise ValueError(f"levels {config.levels} are no multiple of {count} segments; type for example --levels {near}")
    if len(weights) not in (1, len(counts)):
        raise ValueError(
            f"segment_gan has {len(weights)} weights for {len(counts)} stages; allowed is one for all, or one for each: "
            f"type for example --segment-gan {weights[0]:g}"
        )
    return list(zip(counts, weights if len(weights) > 1 else weights * len(counts)))


def numbers(text: str, kind: Callable[[str], Any], name: str) -> list[Any]:
    """The numbers in "8,4,2,1". Raises ValueError for anything else, and for integers below 1 and numbers below 0."""
    try:
        found = [kind(each) for each in text.split(",")]
        valid = all((each >= 1 if kind is int else 0 <= each < float("inf")) for each in found)
    except ValueError:
        valid = False
    if not valid:
        what, example = ("integers from 1 on", "8,4,2,1") if kind is int else ("finite numbers from 0 on", "0.001,0.01")
        raise ValueError(
            f"{name} is {text!r}; allowed are {what}, separated by commas: type for example "
            f"--{name.replace('_', '-')} {example}"
        )
    return found
