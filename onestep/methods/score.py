"""The options of `onestep.objectives.score`."""

from dataclasses import dataclass

from ..config import MethodConfig, option


@dataclass
class ScoreConfig(MethodConfig):
    """Options of every score-distillation method."""

    ratio: int = option(1, "critic updates for each generator update", minimum=1)
    t_min: float = option(0.02, "least noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
    t_max: float = option(0.98, "most noise of the generator's loss, as a fraction of the schedule", minimum=0.0)
    backtrack: int = option(0, "steps that first record the teacher's way to the student (DisBack); 0 is off", minimum=0)
    backtrack_nodes: int = option(4, "teachers recorded on that way", minimum=1)
    backtrack_steps: int = option(100, "steps on each of them on the way back", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backtrack and self.backtrack_nodes > self.backtrack:
            raise ValueError(
                f"backtrack_nodes {self.backtrack_nodes} is more than the {self.backtrack} steps of --backtrack; type a "
                "smaller --backtrack-nodes"
            )
