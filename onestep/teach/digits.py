"""The embedded `digits` teacher: a class-conditional EDM UNet on the 8x8 digits of scikit-learn, in pixel space."""

from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..prediction import prediction_of
from ..rng import Rng
from ..schedule import Schedule
from .fit import fit
from .options import DigitsConfig
from .sheet import forget_paths, save_sheet


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits, (N, 1, 8, 8) uint8 with their 0 .. 16 spread over 0 .. 255, and labels (N,)."""
    from sklearn.datasets import load_digits as load

    found = load()
    images = torch.from_numpy(found.images).float() * 255 / 16
    return images.round().to(torch.uint8)[:, None], torch.from_numpy(found.target)


def network() -> UNet2DModel:
    """0.1 M parameters; pictures of 8x8, attention at 4x4."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=10,
    )


def teach(config: DigitsConfig, data: str | None, work: Path, output: Path) -> None:
    """Train the UNet with EDM's loss (Karras et al. 2022, table 1) and write digits/ and digits_data/ under `output`."""
    if data is not None:
        raise ValueError("the digits come with scikit-learn; leave --data out")
    images, labels = load_digits()
    x_0 = images.float() / 127.5 - 1
    torch.manual_seed(0)
    unet = network().eval()
    scheduler = CMStochasticIterativeScheduler(sigma_data=0.5, clip_denoised=False)
    denoiser = Denoiser(unet, Schedule.from_scheduler(scheduler), prediction_of(scheduler))

    def loss(net: nn.Module, rng: Rng) -> Tensor:
        index = rng.integers(len(x_0))
        sigma = (rng.normal(()) * 1.2 - 1.2).exp()
        return denoiser.loss(x_0[index], {"class_labels": labels[index]}, rng, t=sigma)

    trained: Any = fit(unet, loss, work / "unet", steps=config.steps, batch_size=config.batch_size, lr=config.lr)
    ConsistencyModelPipeline(trained.half(), scheduler).save_pretrained(output / "digits")
    forget_paths(output / "digits")
    save_sheet(output / "digits_data", images, labels, tile=8)
