"""Scores of exported folders: Fréchet distances, class accuracy, and FID through clean-fid.

The function `onestep.metrics.render.render` is not repeated here: it would hide the module of its name.
"""

from .classifier import Classifier
from .frechet import Moments, frechet_distance
from .inception import fid
from .protocol import PROTOCOLS, Protocol, evaluate, protocol_of
from .render import load_pipeline

__all__ = [
    "PROTOCOLS",
    "Classifier",
    "Moments",
    "Protocol",
    "evaluate",
    "fid",
    "frechet_distance",
    "load_pipeline",
    "protocol_of",
]
