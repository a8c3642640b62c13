"""Any network of timm as extractor, with the resizing and normalisation that timm names for it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor

from ..files import sha256_of
from ..weights import find_file, load_strictly, read_state
from .extractor import Extractor, Features


class TimmExtractor(Extractor):
    """Pooled features before the classifier, and its logits where it has one.

    The weights are those of the model's tag, as timm publishes them, or a file of that network: every tensor must fit.
    """

    def __init__(self, model: str, weights: str | Path | None, device: torch.device | str):
        timm = installed()
        if not timm.is_model(model):
            near = timm.list_models(f"*{model.split('.')[0]}*")[:5]
            hint = f"did you mean {', '.join(near)}?" if near else "type for example timm:efficientnet_lite0.ra_in1k"
            raise ValueError(f"timm knows no model {model!r}; {hint}")
        path, named = file_of(model, weights)
        self.network = timm.create_model(model, pretrained=False)
        load_strictly(self.network, read_state(path), path, f"timm's {model}")
        self._finish(f"{model}, weights {path.name}" if weights else named, path, device)

    def _finish(self, named: str, path: Path, device: torch.device | str) -> None:
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(self.network)
        self.transform: Any = create_transform(**config, is_training=False)
        side = "x".join(map(str, dict.fromkeys(config["input_size"][1:])))
        self.name = f"timm {named}, {side} {config['interpolation']}, {config['crop_mode']} crop {config['crop_pct']}"
        self.sha256, self.device = sha256_of(path), device
        self.network = self.network.eval().requires_grad_(False).to(device)
        self.dimensions = self(torch.zeros(1, *config["input_size"])).pooled.shape[1]

    def prepare(self, image: np.ndarray) -> Tensor:
        return self.transform(Image.fromarray(image))

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Features:
        hidden = self.network.forward_features(batch.to(self.device))
        pooled = self.network.forward_head(hidden, pre_logits=True).float().cpu()
        classes = self.network.num_classes
        return Features(pooled, logits=self.network.forward_head(hidden).float().cpu() if classes else None)


def installed() -> Any:
    """timm. Raises ValueError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("this extractor comes with timm: type pip install timm") from error
    return timm


def file_of(model: str, weights: str | Path | None) -> tuple[Path, str]:
    """`weights`, or what timm publishes for the model, from the hub's cache, torch's cache or a download; and its full name.

    Raises ValueError for a tag that the model has not, and where there is no such file.
    """
    try:
        published = installed().get_pretrained_cfg(model)
    except RuntimeError as error:
        raise ValueError(f"timm knows no weights {model!r} ({error}); leave the part after the dot out") from error
    if published is None or not published.hf_hub_id:
        if not weights:
            raise ValueError(f"timm publishes no weights of {model}: type --weights with a file of them")
        return find_file(model, "its weights", "", weights), model
    named, repository = f"{published.architecture}.{published.tag}", published.hf_hub_id
    found = None if weights else try_to_load_from_cache(repository, "model.safetensors")
    url = f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
    path = weights or (found if isinstance(found, str) else None)
    return find_file(f"{named} of timm", url, f"{named}.safetensors", path), named
