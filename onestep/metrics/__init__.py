"""Scores of exported folders: Fréchet distances, class accuracy, precision and recall, and FID through clean-fid.

The functions `render.render` and `manifold.manifold` are not repeated here: they would hide the modules of their names.
"""

from .classifier import Classifier
from .compare import compare
from .frechet import Moments, frechet_distance
from .inception import fid
from .protocol import PROTOCOLS, Protocol, evaluate, protocol_of
from .render import load_pipeline

__all__ = [
    "PROTOCOLS",
    "Classifier",
    "Moments",
    "Protocol",
    "compare",
    "evaluate",
    "fid",
    "frechet_distance",
    "load_pipeline",
    "protocol_of",
]
