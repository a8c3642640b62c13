"""What is known of a teacher before it is loaded, without importing torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What is known of a teacher beside its weights; the middle of the precedence: method < facts < recipe < flags."""

    source: str
    """A diffusers folder or a hub id; or a published EDM network, the address or the path of its pickle."""
    guidance: float = 1.0
    """Classifier-free guidance it is sampled with, in out = uncond + guidance * (cond - uncond)."""
    steps: int = 50
    """Steps it is sampled with."""
    licence: str = "unknown"
    resolution: int | None = None
    """Side of its pictures in pixels; None: what its own configuration says."""
    prediction: str | None = None
    """What its network predicts, by the names in `onestep.prediction`; this and the next two are checked on loading."""
    latent_scale: float | None = None
    latent_shift: float | None = None
    """x0 = (z - latent_shift) * latent_scale for VAE latents z."""
    embedded_guidance: float | None = None
    """Guidance that the network takes as an input, for networks distilled to do so."""
    protocol: str | None = None
    """The protocol in `onestep.metrics` that scores it without further files."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of any method's training that differ from the method's own defaults."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same for one method alone, by its name."""

    def options(self, method: str) -> dict[str, Any]:
        """What a run of `method` is given before recipe and flags."""
        return self.train | self.methods.get(method, {})
