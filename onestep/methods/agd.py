"""The options of `onestep.objectives.agd`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MethodConfig, option


@dataclass
class AGDConfig(MethodConfig):
    """Options of AGD. Trajectories are made once, kept in the cache folder, and found again by every run."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "beta1": 0.9,
        "beta2": 0.999,
        "iterations": 5000,
        "warmup": 500,
        "student_steps": 50,
        "evaluate": False,
    }
    INSISTS: ClassVar[Mapping[str, Any]] = {"init_rho": None, "batch_size": 64, "student": "lora"}

    adapter: str = option(
        "mlp",
        "a vector a block, attention to guidance and prompt, MLPs with offsets of the time embedding, or LoRA told guidance",
        choices=("offset", "attention", "mlp", "low-rank"),
    )
    hidden: int = option(0, "width of the adapters; 0 means what --share asks for", minimum=0)
    share: float = option(0.02, "parameters of the adapters as a fraction of the network's", above=0)
    weight: str = option(
        "output", "errors count as they are, or by how far they move the next step of DDIM", choices=("output", "step")
    )
    guidance_min: float = option(1.0, "least guidance to learn", minimum=0)
    guidance_max: float = option(6.0, "largest guidance to learn", minimum=0)
    trajectories: int = option(512, "guided trajectories in the cache; 0 makes new ones in every step", minimum=0)
    trajectory_steps: int = option(50, "steps of a trajectory, two passes of the teacher each", minimum=1)
    trajectory_points: int = option(50, "steps of each that are kept in the cache, a divisor of its steps", minimum=1)
    trajectory_batch: int = option(64, "trajectories that the teacher makes at once", minimum=1)
    calibrate: int = option(
        32, "samples by which the strength of the adapters is set at the end, see --calibrate-to; 0: as learnt", minimum=0
    )
    calibrate_to: str = option(
        "distance",
        "distance: samples as far from unguided ones as those of two passes; samples: as near to those of two passes as can "
        "be, which guides less",
        choices=("distance", "samples"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_max <= self.guidance_min:
            raise ValueError(
                f"guidance_max {self.guidance_max} is not above guidance_min {self.guidance_min}; type for example "
                f"--guidance-max {self.guidance_min + 5:g}"
            )
        if self.calibrate == 1:
            raise ValueError(
                "calibrate 1: a strength for either half of the range needs 2 samples; type --calibrate 32, or 0"
            )
        steps, points = self.trajectory_steps, self.trajectory_points
        if self.trajectories and steps % points:
            allowed = ", ".join(str(n) for n in range(1, steps + 1) if steps % n == 0)
            raise ValueError(
                f"trajectory_points {points} is no divisor of trajectory_steps {steps}; type --trajectory-points with "
                f"one of {allowed}"
            )
