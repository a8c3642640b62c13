"""The options of `onestep.objectives.meanflow`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class MeanFlowConfig(MethodConfig):
    """Options of MeanFlow."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"beta1": 0.0, "beta2": 0.95, "clip_norm": 1.0}
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None}  # trajectories begin at the schedule's most noise

    velocity: str = option("teacher", "what v is: the teacher's, or eps - x0 of the data", choices=("teacher", "data"))
    time_law: str = option("logit-normal", "law that r and t are drawn from", choices=("logit-normal", "uniform"))
    time_mean: float = option(-0.4, "mean of ln(t / (1 - t)), if logit-normal")
    time_std: float = option(1.0, "standard deviation of ln(t / (1 - t)), if logit-normal", above=0.0)
    max_noise: float = option(0.0, "share of samples with t at the most noise, whatever that law", minimum=0.0, below=1.0)
    instantaneous: float = option(0.1, "share of samples with r = t", minimum=0.0, below=1.0)
    to_data: float = option(0.75, "share of samples with r = 0, as the exported student is called", minimum=0.0, below=1.0)
    unit: str = option(
        "output", "unit of the error: the network's output, whatever it predicts, or u", choices=("output", "u")
    )
    power: float = option(0.5, "p of the weight 1 / (error^2 + c)^p of a sample; the paper's is 1", minimum=0.0)
    power_floor: float = option(1e-3, "c of that weight", above=0.0)
    jvp: str = option(
        "forward", "derivative of the student; difference: two passes for one", choices=("forward", "difference")
    )
    jvp_step: float = option(5e-4, "h of the difference, in ln(sigma / alpha); 0.05 smooths time embeddings", above=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instantaneous + self.to_data > 1:
            raise ValueError(
                f"instantaneous {self.instantaneous} and to_data {self.to_data} are shares of the same samples and are more "
                "than 1; type for example --instantaneous 0.25 --to-data 0.25"
            )
