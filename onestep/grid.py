"""Pictures of a run: blocks of samples side by side, each from the same noise and classes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from .files import replaced


def save_grid(path: Path, blocks: Sequence[tuple[str, Tensor]], columns: int) -> None:
    """Titled blocks of images (N, C, H, W) in [0, 1] side by side, of one size, small ones enlarged, as PNG."""
    scale = max(1, 64 // blocks[0][1].shape[-1])
    titled = [(title, _block(images, columns, scale)) for title, images in blocks]
    font = ImageFont.load_default(size=18)
    gap, top = 24, 34
    width = sum(block.width for _, block in titled) + gap * (len(titled) - 1)
    sheet = Image.new("RGB", (width, titled[0][1].height + top), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for title, block in titled:
        sheet.paste(block, (x, top))
        draw.text((x + block.width // 2, top // 2), title, fill="black", font=font, anchor="mm")
        x += block.width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        sheet.save(partial, format="png")


def _block(images: Tensor, columns: int, scale: int) -> Image.Image:
    images = images.detach().float().cpu().clamp(0, 1)
    tiled = make_grid(images, nrow=columns, padding=1, pad_value=1.0)
    array = (tiled * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
