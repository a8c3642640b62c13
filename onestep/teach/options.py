"""Options of `python -m onestep.teach`, without importing torch."""

from dataclasses import dataclass

from ..config import option


@dataclass
class FashionConfig:
    """Options of `python -m onestep.teach fashion`."""

    classifier_steps: int = option(3000, "steps of 128 images for the classifier", minimum=1)
    vae_steps: int = option(4000, "steps of 64 images for the autoencoder", minimum=1)
    dit_steps: int = option(7000, "steps of `dit_batch` latents for the diffusion transformer", minimum=1)
    dit_batch: int = option(128, "batch size of the diffusion transformer", minimum=1)
    dit_lr: float = option(1e-3, "learning rate of the diffusion transformer", above=0)
    layers: int = option(5, "transformer layers", minimum=1)
    heads: int = option(6, "attention heads of 32 channels", minimum=1)
    label_dropout: float = option(0.1, "fraction of labels replaced by the null class", minimum=0, below=1)
    real_images: int = option(10_000, "training images kept beside the teacher for the GAN critic", minimum=1)


@dataclass
class DigitsConfig:
    """Options of `python -m onestep.teach digits`."""

    steps: int = option(2000, "training steps", minimum=1)
    batch_size: int = option(128, "images a step", minimum=1)
    lr: float = option(2e-3, "learning rate", above=0)


@dataclass
class EmojiConfig:
    """Options of `python -m onestep.teach emoji`."""

    autoencoder_steps: int = option(4000, "steps of `autoencoder_batch` pictures for the autoencoder", minimum=1)
    autoencoder_batch: int = option(32, "batch size of the autoencoder", minimum=1)
    autoencoder_lr: float = option(2e-3, "learning rate of the autoencoder", above=0)
    unet_steps: int = option(4500, "steps of `unet_batch` latents for the UNet and the text encoder", minimum=1)
    unet_batch: int = option(64, "batch size of the UNet and the text encoder", minimum=1)
    unet_lr: float = option(1e-3, "learning rate of the UNet and the text encoder", above=0)
    caption_dropout: float = option(0.1, "fraction of prompts replaced by the empty one", minimum=0, below=1)
