"""What the EDM networks share: how their encoder and decoder are put together and run."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .layers import Conv2d, UNetBlock


def encoder(
    block: Callable[..., UNetBlock],
    sizes: Sequence[int],
    in_channels: int,
    stem: int,
    widths: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    residual_filter: Sequence[int] | None = None,
) -> nn.ModuleDict:
    """Per level a convolution to `stem` channels or a block that halves the size, then `num_blocks` blocks.

    block(in, out, attention, up=, down=) makes a block. With `residual_filter` each halving is followed by a
    convolution of the downsampled input, to be added there (NCSN++'s residual input pyramid).
    """
    layers: dict[str, nn.Module] = {}
    channels, pyramid = stem, in_channels
    for level, (size, width) in enumerate(zip(sizes, widths)):
        if level == 0:
            layers[f"{size}x{size}_conv"] = Conv2d(in_channels, stem, 3)
        else:
            layers[f"{size}x{size}_down"] = block(channels, channels, False, down=True)
            if residual_filter is not None:
                down = Conv2d(pyramid, channels, 3, down=True, resample_filter=residual_filter, down_last=True)
                layers[f"{size}x{size}_aux_residual"], pyramid = down, channels
        for index in range(num_blocks):
            layers[f"{size}x{size}_block{index}"] = block(channels, width, size in attn_resolutions)
            channels = width
    return nn.ModuleDict(layers)


def decoder(
    block: Callable[..., UNetBlock],
    sizes: Sequence[int],
    encoded: nn.ModuleDict,
    widths: Sequence[int],
    num_blocks: int,
    attends: Callable[[int, int], bool],
) -> nn.ModuleDict:
    """From the smallest level up: two middle blocks or one that doubles the size, then num_blocks + 1 blocks with skips.

    attends(size, index) says whether that level's block has attention.
    """
    layers: dict[str, nn.Module] = {}
    skips = [int(layer.out_channels) for name, layer in encoded.items() if "aux" not in name]  # type: ignore[arg-type]
    channels = widths[-1]
    for size, width in zip(reversed(sizes), reversed(widths)):
        if size == sizes[-1]:
            layers[f"{size}x{size}_in0"] = block(channels, channels, True)
            layers[f"{size}x{size}_in1"] = block(channels, channels, False)
        else:
            layers[f"{size}x{size}_up"] = block(channels, channels, False, up=True)
        for index in range(num_blocks + 1):
            layers[f"{size}x{size}_block{index}"] = block(channels + skips.pop(), width, attends(size, index))
            channels = width
    return nn.ModuleDict(layers)


class EDMUNet(ModelMixin, ConfigMixin):
    """The raw network F(c_in x; c_noise, class) of Karras et al. 2022, eq. 7, called as diffusers' UNet2DModel is.

    Its timestep, times the `time_scale` of its config, is c_noise = ln(sigma) / 4. State-dict keys are those of the
    published EDM networks without the leading `model.`; their resampling filters, which follow from the config, are not
    among ours.
    """

    _supports_gradient_checkpointing = True
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    @abstractmethod
    def embed(self, noise: Tensor, classes: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The blocks' embedding (B, emb_channels) of c_noise (B,) and one-hot or zero classes (B, num_class_embeds)."""

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """The decoder's last features to the output."""

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """F of shape (B, out_channels, H, W) for the scaled sample (B, in_channels, H, W) and the timestep, one or (B,).

        class_labels (B,) are integers; None, or a label that is no class (by convention -1), stands for no class.
        Raises ValueError for labels where the network has no classes.
        """
        noise = torch.as_tensor(timestep, device=sample.device)
        noise = noise.to(torch.promote_types(sample.dtype, torch.float32)).reshape(-1).expand(len(sample))
        noise = noise * self.config.time_scale
        emb = self.embed(noise, self._one_hot(class_labels, sample), sample.dtype)
        x, pyramid = sample, sample
        skips: list[Tensor] = []
        # layers are told apart by their names: diffusers runs an exported file anew for every folder that it loads, and
        # then the names of classes in this function mean other classes than those of the networks loaded before
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = pyramid = skips[-1] = (x + layer(pyramid)) / math.sqrt(2)
            else:
                x = layer(x) if name.endswith("_conv") else self._run(layer, x, emb)
                skips.append(x)
        for name, layer in self.dec.items():
            if "_aux_" not in name:
                x = self._run(layer, torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        out = self.head(x)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _one_hot(self, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        classes = self.config.num_class_embeds
        if classes is None:
            if labels is not None:
                raise ValueError("class_labels were given, but this network has no classes; leave them out")
            return None
        if labels is None:
            return sample.new_zeros(len(sample), classes)
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(sample)

    def _run(self, layer: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, x, emb)
        return layer(x, emb)
