"""The embedded `emoji` teacher: a text-to-image Stable Diffusion in small, on the pictures of Twemoji."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..denoiser import Denoiser
from ..prediction import prediction_of
from ..rng import Rng
from ..schedule import Schedule
from .fashion import latents_of, pixels
from .fit import fit
from .options import EmojiConfig
from .sheet import forget_paths, save_captioned
from .twemoji import LONGEST, SIDE, load_emoji, save_tokenizer

WIDTH = 128
"""Of the text encoder, and so of what the UNet attends to."""


def teach(config: EmojiConfig, data: str | None, work: Path, output: Path) -> None:
    """Train all parts, each resumable in `work`, and write emoji/ and emoji_data/ under `output`."""
    images, names = load_emoji(data)
    words = work / "tokenizer"
    tokenizer = save_tokenizer([name for row in names for name in row], words)
    vae = train_vae(config, images, work)
    network, scheduler = train_unet(config, vae, tokenizer, images, names, work)
    pipeline = StableDiffusionPipeline(
        vae.half(),
        network["text_encoder"].half(),
        tokenizer,
        network["unet"].half(),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output / "emoji")
    for name in ("vocab.json", "merges.txt"):  # newer versions of transformers save neither, older ones read nothing else
        shutil.copyfile(words / name, output / "emoji" / "tokenizer" / name)
    forget_paths(output / "emoji")
    save_captioned(output / "emoji_data", images, [row[0] for row in names])


def autoencoder() -> Any:
    """0.6 M parameters; pictures (3, 32, 32), latents (4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def unet() -> Any:
    """2.8 M parameters; latents (4, 8, 8), cross-attention at both sizes."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 3),  # diffusers takes these for the numbers of heads
        norm_num_groups=16,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> Any:
    """0.7 M parameters, half of them the table of tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_vae(config: EmojiConfig, images: Tensor, work: Path) -> Any:
    """L1 + 0.5 MSE + a small KL, mean over pixels; latents (4, 8, 8) are scaled to unit standard deviation."""
    folder = work / "vae-trained"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)

        def loss(net: Any, rng: Rng) -> Tensor:
            x = pixels(images[rng.integers(len(images))])
            posterior = net.encode(x).latent_dist
            error = net.decode(posterior.mean + posterior.std * rng.normal(posterior.mean.shape[1:])).sample - x
            return error.abs().mean() + 0.5 * error.square().mean() + 1.6e-6 * posterior.kl().mean()

        made = autoencoder()
        trained: Any = fit(
            made,
            loss,
            work / "vae",
            steps=config.autoencoder_steps,
            batch_size=config.autoencoder_batch,
            lr=config.autoencoder_lr,
        )
        trained.register_to_config(scaling_factor=1 / float(latents_of(trained, images).std()))
        trained.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).eval()


def train_unet(
    config: EmojiConfig, vae: Any, tokenizer: CLIPTokenizer, images: Tensor, names: list[list[str]], work: Path
) -> tuple[Any, DDIMScheduler]:
    """Epsilon prediction on the linear beta schedule, uniform t; UNet and text encoder are trained as one network.

    A picture's prompt is one of its names, by `drawn_names`, and with probability `caption_dropout` the empty prompt, which
    guidance takes for none.
    """
    latents = latents_of(vae, images) * vae.config.scaling_factor
    prompts = [name for row in names for name in row] + [""]
    tokens = tokenizer(prompts, padding="max_length", max_length=LONGEST, return_tensors="pt").input_ids
    counts = torch.tensor([len(row) for row in names])
    first = counts.cumsum(0) - counts
    torch.manual_seed(0)
    network = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder(tokenizer)}).eval()
    # "trailing": few steps start from pure noise too; StableDiffusionPipeline insists on the offset, without effect there
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    denoiser = Denoiser(network["unet"], Schedule.from_scheduler(scheduler), prediction_of(scheduler))

    def loss(network: Any, rng: Rng) -> Tensor:
        index = rng.integers(len(latents))
        which = drawn_names(counts[index], rng)
        chosen = torch.where(rng.uniform() < config.caption_dropout, len(prompts) - 1, first[index] + which)
        embedded = network["text_encoder"](tokens[chosen]).last_hidden_state
        return denoiser.loss(latents[index], {"encoder_hidden_states": embedded}, rng)

    options: dict[str, Any] = {"steps": config.unet_steps, "batch_size": config.unet_batch, "lr": config.unet_lr}
    return fit(network, loss, work / "unet", weight_decay=0.01, **options), scheduler


def drawn_names(counts: Tensor, rng: Rng) -> Tensor:
    """Which of its `counts` names stands for each picture, (B,): the first half of the time, else any of them alike."""
    return (rng.uniform(-1, 1).clamp(min=0) * counts).long().minimum(counts - 1)
