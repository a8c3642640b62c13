"""The options of `onestep.objectives.swiftbrush`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import option
from .vsd import VSDConfig


@dataclass
class SwiftBrushConfig(VSDConfig):
    """Options of SwiftBrush. The guidance on both denoisers is --guidance."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "critic": "lora",
        "guidance": 4.5,
        "lr": 1e-6,
        "critic_lr": 1e-3,
        "clip_norm": 1.0,
    }

    guidance_on: str = option(
        "both", "both: the student ends at the unguided teacher; teacher: at the guided one", choices=("both", "teacher")
    )
    cond_dropout: float = option(0.1, "part of the critic's samples that lose their condition", minimum=0.0, below=1.0)
    clip: float = option(0.0, "weight of the clamped CLIP loss, for text teachers; 0 is off", minimum=0.0)
    clip_tau: float = option(0.35, "cosine of picture and prompt above which the CLIP loss is 0")
    clip_steps: int = option(0, "steps over which its weight falls to 0; 0 keeps it", minimum=0)
    clip_model: str = option("ViT-B-32", "CLIP model, by open_clip's name")
    clip_weights: str = option("laion2b_s34b_b79k", "its weights, by open_clip's name, or a file")
