"""The embedded `fashion` teacher: a classifier to score with, a VAE, and a latent class-conditional DiT."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..denoiser import Denoiser
from ..metrics.classifier import Classifier
from ..metrics.frechet import Moments
from ..prediction import prediction_of
from ..rng import Rng
from ..schedule import Schedule
from .fashion_mnist import CLASSES, load
from .fit import fit
from .options import FashionConfig
from .sheet import forget_paths, save_sheet

NULL = 1000  # DiTPipeline's null class, whatever the number of classes


def pixels(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def teach(config: FashionConfig, data: str | None, work: Path, output: Path) -> None:
    """Train all parts, each resumable in `work`, and write fashion/, fashion_eval/ and fashion_data/ under `output`."""
    images, labels = load(data, "train")
    scores = output / "fashion_eval"
    classifier = train_classifier(config, images, labels, work, scores)
    print(f"classifier: {test_accuracy(classifier, data):.2%} of the 10,000 test images")
    reference(classifier, images).save(scores / "reference.safetensors")
    vae = train_vae(config, images, work)
    transformer = train_dit(config, vae, images, labels, work)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")  # few steps start from pure noise too
    names = dict(enumerate(CLASSES))
    pipeline = DiTPipeline(transformer.half(), vae.half(), scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)  # save_pretrained forgets it otherwise
    pipeline.save_pretrained(output / "fashion")
    forget_paths(output / "fashion")
    save_sheet(output / "fashion_data", images[: config.real_images], labels[: config.real_images], tile=28)


def train_classifier(config: FashionConfig, images: Tensor, labels: Tensor, work: Path, output: Path) -> nn.Module:
    """Cross-entropy with label smoothing on mirrored and shifted images; kept in half precision."""
    torch.manual_seed(0)
    network = Classifier()
    path = output / "classifier.safetensors"
    if not path.exists():

        def loss(net: nn.Module, rng: Rng) -> Tensor:
            index = rng.integers(len(images))
            x = pixels(images[index])
            x = torch.where(rng.uniform().view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
            x = x.roll((rng.shared_integer(5) - 2, rng.shared_integer(5) - 2), (2, 3))
            return F.cross_entropy(net(x), labels[index], label_smoothing=0.05)

        steps, folder = config.classifier_steps, work / "classifier"
        trained = fit(network.train(), loss, folder, steps=steps, batch_size=128, lr=2e-3, weight_decay=0.05)
        output.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()}, path)
    network.load_state_dict(load_file(path))
    return network.eval()


@torch.no_grad()
def test_accuracy(classifier: nn.Module, data: str | None) -> float:
    images, labels = load(data, "test")
    found = torch.cat([classifier(pixels(chunk)).argmax(1) for chunk in images.split(500)])
    return float((found == labels).float().mean())


@torch.no_grad()
def reference(classifier: Any, images: Tensor) -> Moments:
    """Moments of the classifier's features over all training images."""
    moments = Moments(128)
    for chunk in tqdm(images.split(500), desc="reference"):
        moments.update(classifier.features(pixels(chunk)))
    return moments


def train_vae(config: FashionConfig, images: Tensor, work: Path) -> AutoencoderKL:
    """L1 + 0.5 MSE + a small KL, mean over pixels; latents (4, 8, 8) are scaled to unit standard deviation."""
    folder = work / "vae-trained"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        vae: Any = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=32,
        )

        def loss(net: Any, rng: Rng) -> Tensor:
            x = pixels(images[rng.integers(len(images))])
            posterior = net.encode(x).latent_dist
            error = net.decode(posterior.mean + posterior.std * rng.normal(posterior.mean.shape[1:])).sample - x
            return error.abs().mean() + 0.5 * error.square().mean() + 1.6e-6 * posterior.kl().mean()

        trained: Any = fit(vae, loss, work / "vae", steps=config.vae_steps, batch_size=64, lr=2e-3)
        trained.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).eval()


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Unscaled posterior means of all images."""
    chunks = tqdm(images.split(500), desc="latents")
    return torch.cat([vae.encode(pixels(chunk)).latent_dist.mode() for chunk in chunks])


def train_dit(config: FashionConfig, vae: AutoencoderKL, images: Tensor, labels: Tensor, work: Path) -> Any:
    """Epsilon prediction on the linear beta schedule, uniform t, labels dropped for classifier-free guidance."""
    latents = latents_of(vae, images)
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    latents = latents * vae.config.scaling_factor
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=config.layers,
        sample_size=latents.shape[-1],
        patch_size=2,
        num_embeds_ada_norm=NULL,
    ).eval()  # its own label dropout draws anew in every layer
    scheduler = DDIMScheduler()
    denoiser = Denoiser(transformer, Schedule.from_scheduler(scheduler), prediction_of(scheduler))

    def loss(network: nn.Module, rng: Rng) -> Tensor:
        index = rng.integers(len(latents))
        dropped = torch.where(rng.uniform() < config.label_dropout, NULL, labels[index])
        return denoiser.loss(latents[index], {"class_labels": dropped}, rng)

    trained = fit(
        transformer,
        loss,
        work / "dit",
        steps=config.dit_steps,
        batch_size=config.dit_batch,
        lr=config.dit_lr,
        weight_decay=0.01,
    )
    return trained
