"""A diffusers folder with the true configuration of Stable Diffusion XL and random weights: for measuring speed and memory.

    python eval/make_sdxl.py FOLDER [--seed 0] [--dtype bf16] [--small]

About 7 GB of disk in bf16; with --small narrower and shallower networks of the same build, for pictures of 256 pixels.
Networks are never in memory as a whole: tensors are drawn one by one and written shard by shard.
The tokenizers know letters alone and spell every word.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published; pooling then takes the largest token, which is the tokenizer's end of text
    "pad_token_id": 1,
}
CLIP_G: dict[str, Any] = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SDXL: dict[str, Any] = {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
_NARROW: dict[str, Any] = dict.fromkeys(("hidden_size", "projection_dim"), 64) | {
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
}
SMALL: dict[str, Any] = {
    "unet": UNET
    | {
        "sample_size": 32,
        "block_out_channels": [64, 128, 256],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
    "vae": VAE | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 256},
    "text_encoder": CLIP_L | _NARROW,
    "text_encoder_2": CLIP_G | _NARROW,
}
"""The same blocks at a fifth of the width, to be trained on a CPU."""
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARD = 1_000_000_000
"""Most bytes of one file, and so of what is in memory at once."""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-"


def blank(name: str, config: Mapping[str, Any]) -> Any:
    """One network of the pipeline on the meta device."""
    kind = CLASSES[name]
    with torch.device("meta"):
        return kind(CLIPTextConfig(**config)) if name.startswith("text") else kind(**config)


def shards(tensors: Mapping[str, Tensor], dtype: torch.dtype, most: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `most` bytes, or of one tensor that is larger."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        mine = tensor.numel() * dtype.itemsize
        if group and size + mine > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += mine
    yield group


def values(name: str, like: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """N(0, 1 / fan in) for matrices, kernels and tables; 1 for the scales of norms and 0 for biases."""
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype)
    source = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
    fan_in = like.numel() / like.shape[0]
    return torch.empty(like.shape).normal_(0, fan_in**-0.5, generator=source).to(dtype)


def write(module: nn.Module, folder: Path, stem: str, seed: int, dtype: torch.dtype, most: int) -> int:
    """The weights of a network in safetensors files, with an index where there are several; returns their bytes."""
    tensors = module.state_dict()
    groups = list(shards(tensors, dtype, most))
    total, places = 0, {}
    for number, names in enumerate(groups, start=1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        made = {name: values(f"{folder.name}.{name}", tensors[name], seed, dtype) for name in names}
        total += sum(each.numel() * each.element_size() for each in made.values())
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def tokenizer() -> CLIPTokenizer:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ends]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def make(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    parts: Mapping[str, Any] = SDXL,
    most: int = SHARD,
) -> None:
    """Write the folder. Raises ValueError where there is something already."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    about: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    for name, config in parts.items():
        module = blank(name, config)
        target = folder / name
        target.mkdir(parents=True)
        transformer = name.startswith("text")
        if transformer:
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(target)
        else:
            module.save_config(target)
        size = write(module, target, "model" if transformer else "diffusion_pytorch_model", seed, dtype, most)
        about[name] = ["transformers" if transformer else "diffusers", type(module).__name__]
        print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters, {size / 1e9:.2f} GB", flush=True)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer().save_pretrained(folder / name)
        about[name] = ["transformers", "CLIPTokenizer"]
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    about["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(about, indent=2) + "\n")  # last: without it there is no pipeline


def main(argv: Sequence[str] | None = None) -> int:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    reader.add_argument("folder", type=Path)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--dtype", choices=DTYPES, default="bf16")
    reader.add_argument("--small", action="store_true")
    given = reader.parse_args(argv)
    try:
        make(given.folder, given.seed, DTYPES[given.dtype], SMALL if given.small else SDXL)
    except (ValueError, OSError) as error:
        reader.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
