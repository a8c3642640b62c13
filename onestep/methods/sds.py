"""The options of `onestep.objectives.sds`."""

from dataclasses import dataclass

from ..config import MethodConfig, option


@dataclass
class SDSConfig(MethodConfig):
    """Options of SDS."""

    t_min: float = option(0.02, "least noise, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.98, "most noise, as a fraction of the schedule", minimum=0.0)


@dataclass
class ASDConfig(SDSConfig):
    """Options of ASD."""

    shift: float = option(0.1, "largest step up to the second noise level, relative to t - t_min", minimum=0.0)
