"""A CLIP of a few thousand weights as open_clip saves its models: a folder, and a model that open_clip knows by name."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import pretrained
from safetensors.torch import save_file

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408, "context_length": 77},
}
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}


def save_clip(folder: Path, **more: Any) -> Any:
    """Write the folder; the model with the weights that were written."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)  # cosines of both signs
        model = open_clip.CLIP(**MODEL, **more).eval()
        torch.nn.init.normal_(model.token_embedding.weight)  # else all texts, and with them all cosines, are alike
        torch.nn.init.normal_(model.text_projection)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL | more, "preprocess_cfg": PIXELS}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def register(monkeypatch: Any, folder: Path, **tags: dict[str, Any]) -> None:
    """Make tiny and tiny-quickgelu models that open_clip knows, with these tags of weights."""
    known = open_clip.factory._MODEL_CONFIGS
    for name, quick in {"tiny": False, "tiny-quickgelu": True}.items():
        monkeypatch.setitem(known, name, MODEL | {"quick_gelu": quick})
        monkeypatch.setitem(pretrained._PRETRAINED, name, tags)
