"""Tiny EDM networks with random weights, and pickles of them as they are published."""

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomise
from torch import Tensor, nn

from onestep.networks import DhariwalUNet, EDMUNet, SongUNet

NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}
SONG = {
    "sample_size": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "augment_dim": 9,
    "dropout": 0.0,
}
ADM = {
    "sample_size": 8,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "num_class_embeds": 3,
    "dropout": 0.0,
}
TINY: dict[str, tuple[type[EDMUNet], dict[str, Any]]] = {
    "ddpmpp": (SongUNet, SONG),
    "ncsnpp": (SongUNet, SONG | NCSNPP | {"num_class_embeds": 3}),
    "adm": (DhariwalUNet, ADM),
    "adm-uncond": (DhariwalUNet, ADM | {"num_class_embeds": None, "augment_dim": 9}),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(name: str) -> EDMUNet:
    """In evaluation mode, no parameter zero."""
    kind, config = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(**config).eval()
    randomise(network, seed=1)
    return network


def labels_of(network: EDMUNet, *labels: int) -> dict[str, Tensor]:
    return {} if network.config.num_class_embeds is None else {"class_labels": torch.tensor(labels)}


FAKES = {
    "torch_utils.persistence": types.ModuleType("torch_utils.persistence"),
    "dnnlib.util": types.ModuleType("dnnlib.util"),
}


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise AssertionError("pickled code was called")


class EasyDict(dict):
    pass


for each, owner in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
    each.__module__ = owner
    setattr(FAKES[owner], each.__name__, each)


class Reduced:
    """Pickles as the call of `function` with these arguments."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def persistent(name: str, **state: Any) -> Reduced:
    meta = {"type": "class", "version": 6, "module_src": "raise AssertionError('pickled code was run')"}
    return Reduced(_reconstruct_persistent_obj, meta | {"class_name": name, "state": state})


def pickled_module(module: nn.Module, name: str, **extra: Any) -> Any:
    parts = {kind: OrderedDict(getattr(module, kind)) for kind in ("_parameters", "_buffers")}
    children = OrderedDict((key, pickled_module(child, type(child).__name__)) for key, child in module._modules.items())
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = children
        return plain
    return persistent(name, training=False, **parts, _modules=children, skip_scale=np.sqrt(0.5), _hooks=set(), **extra)


def arguments(network: EDMUNet) -> dict[str, Any]:
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    size, classes = config.pop("sample_size"), config.pop("num_class_embeds")
    del config["time_scale"]  # not of theirs
    return {"img_resolution": size, "label_dim": classes or 0, "label_dropout": 0} | config


def state_of(pickled: Reduced) -> dict[str, Any]:
    return pickled.call[1][0]["state"]


def edm(network: EDMUNet, precond: str = "EDMPrecond") -> Reduced:
    """The pickle's object for a network, to be spoilt by a test through `state_of`."""
    inner = pickled_module(
        network, type(network).__name__, _init_args=(), _init_kwargs=EasyDict(arguments(network)), label_dropout=0
    )
    modules = OrderedDict(model=inner)
    return persistent(
        precond, sigma_data=0.5, use_fp16=True, _parameters=OrderedDict(), _buffers=OrderedDict(), _modules=modules
    )


def inner_state(pickled: Reduced) -> dict[str, Any]:
    return state_of(state_of(pickled)["_modules"]["model"])


def write(path: Path, ema: Any, **beside: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, module in FAKES.items():
            package = types.ModuleType(name.split(".")[0])
            package.__path__ = []  # type: ignore[attr-defined]
            patch.setitem(sys.modules, package.__name__, package)
            patch.setitem(sys.modules, name, module)
        path.write_bytes(pickle.dumps({"ema": ema} | beside))
    return path
