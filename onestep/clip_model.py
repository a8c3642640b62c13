"""open_clip's models, loaded in one place: the file, its hash, its preprocessing, and the check of its activation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor

from .files import sha256_of
from .weights import find_file, load_strictly, read_state

FILE = "open_clip_model.safetensors"
INSTALL = "CLIP comes with open_clip: type pip install 'onestep-diffusion[clip]'"


@dataclass
class ClipModel:
    """A frozen CLIP (Radford et al. 2021, arXiv 2103.00020) in eval mode, with what belongs to it."""

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable[[Image.Image], Tensor]
    """One RGB picture, resized, cropped and normalised: (3, h, w)."""
    pixels: dict[str, Any]
    """mean, std, size, interpolation and resize_mode of `transform`."""
    name: str
    """MODEL/PRETRAINED; the file's name in place of the tag where the weights are others."""
    sha256: str
    device: torch.device | str

    @property
    def resizing(self) -> str:
        """Side and interpolation, "224 bicubic"."""
        size = self.pixels["size"]
        return f"{size if isinstance(size, int) else size[-1]} {self.pixels['interpolation']}"

    @property
    def dimensions(self) -> int:
        """D of the embeddings, of pictures and of texts."""
        return self.images(self.prepare(np.zeros((8, 8, 3), np.uint8))[None]).shape[1]

    def prepare(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) to float32 (3, h, w)."""
        return self.transform(Image.fromarray(image)).float()

    @torch.no_grad()
    def images(self, batch: Tensor) -> Tensor:
        """Embeddings (B, D) of prepared images, not normalised, on the model's device."""
        return self.model.encode_image(batch.to(self.device)).float()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, D), not normalised. What does not fit the model's context, 77 tokens as a rule, is cut off."""
        return self.model.encode_text(self.tokenizer(list(prompts)).to(self.device)).float()


def load_clip(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> ClipModel:
    """A model by MODEL/PRETRAINED as open_clip lists them, or a folder that open_clip saved.

    weights: a file to be read in place of the tag's; MODEL alone is enough then. Raises ValueError without open_clip, for
    names it does not know, weights of another network, weights that cannot be had, and where MODEL and PRETRAINED
    differ in QuickGELU: open_clip itself only warns, and scores come out wrong.
    """
    try:
        import open_clip
        from open_clip.model import get_model_preprocess_cfg
        from open_clip.transform import PreprocessCfg, image_transform_v2
    except ImportError as error:
        raise ValueError(INSTALL) from error
    folder = Path(name)
    if folder.is_dir():
        config, path = _saved(folder, weights)
        model_name, shown, source = f"local-dir:{folder}", folder.name, config.get("preprocess_cfg", {})
    else:
        model_name, tag = _split(name, weights)
        source = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
        path = _file_of(model_name, tag, source, weights)
        shown = f"{model_name}/{path.name if weights else tag}"
    pixels = {key: source[key] for key in ("mean", "std", "interpolation", "resize_mode", "fill_color") if key in source}
    model = open_clip.create_model(
        model_name, load_weights=False, pretrained_image=False, pretrained_text=False, force_preprocess_cfg=pixels
    )
    state = read_state(path)
    load_strictly(model, _current(state, model), path, f"CLIP {shown}")
    used = get_model_preprocess_cfg(model)
    transform = image_transform_v2(PreprocessCfg(**used), is_train=False)
    model = model.eval().requires_grad_(False).to(device)
    return ClipModel(model, open_clip.get_tokenizer(model_name), transform, used, shown, sha256_of(path), device)


def _saved(folder: Path, weights: str | Path | None) -> tuple[dict[str, Any], Path]:
    config, path = folder / "open_clip_config.json", Path(weights) if weights else folder / FILE
    try:
        known = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{config} cannot be read ({error}); name a folder that open_clip has saved") from error
    if "model_cfg" not in known:
        raise ValueError(f"{config} has no model_cfg; name a folder with a model that open_clip has saved")
    if not path.is_file():
        raise ValueError(f"no file {path}; put the model's weights there, or type --weights with their path")
    return known, path


def _split(name: str, weights: str | Path | None) -> tuple[str, str]:
    """MODEL and PRETRAINED, which may be empty where `weights` is given."""
    import open_clip

    model, _, tag = name.partition("/")
    if model not in open_clip.list_models():
        near = get_close_matches(model, open_clip.list_models(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "type for example ViT-L-14-quickgelu/openai"
        raise ValueError(f"open_clip knows no model {model!r}, and there is no such folder; {hint}")
    fitting = [each for each in open_clip.list_pretrained_tags_by_model(model) if _quick(model, each) == _quick(model)]
    allowed = f"allowed are {', '.join(fitting)}" if fitting else "open_clip lists none: type --weights with a file of them"
    if not tag and not weights:
        raise ValueError(f"{model} needs the tag of its weights, as in {model}/TAG; {allowed}")
    if tag and not open_clip.pretrained.is_pretrained_cfg(model, tag):
        raise ValueError(f"{model} has no weights {tag!r}; {allowed}")
    if tag and _quick(model, tag) != _quick(model):
        other = model.removesuffix("-quickgelu") if _quick(model) else f"{model}-quickgelu"
        known = other in open_clip.list_models() and open_clip.pretrained.is_pretrained_cfg(other, tag)
        hint = f"type {other}/{tag}" if known else allowed
        computed, trained = (("GELU", "QuickGELU")[quick] for quick in (_quick(model), _quick(model, tag)))
        raise ValueError(f"{model} computes {computed}, and its weights {tag} were trained with {trained}; {hint}")
    return model, tag


def _quick(model: str, tag: str = "") -> bool:
    """Whether a model computes QuickGELU, x sigmoid(1.702 x); with a tag, whether its weights were trained with it."""
    import open_clip

    about = open_clip.get_pretrained_cfg(model, tag) if tag else open_clip.get_model_config(model)
    return bool(about.get("quick_gelu", False))


def _file_of(model: str, tag: str, config: dict[str, Any], weights: str | Path | None) -> Path:
    """The tag's file: in the cache of the Hugging Face hub, in torch's, or downloaded."""
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    file = file or FILE
    found = try_to_load_from_cache(repository, file) if repository and not weights else None
    url = f"https://huggingface.co/{repository}/resolve/main/{file}" if repository else config.get("url", "")
    name = f"open_clip-{model}-{tag}{Path(file).suffix}"
    return find_file(f"CLIP {model}/{tag}", url, name, weights or (found if isinstance(found, str) else None))


def _current(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The state in open_clip's own layout, which it has changed over the years."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    own = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # saved by transformers before 4.31
    return {name: value.reshape(own[name].shape) if name == "logit_scale" else value for name, value in state.items()}
