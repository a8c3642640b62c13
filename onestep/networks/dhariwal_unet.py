"""The ADM network of Dhariwal & Nichol 2021 as EDM trains it (Karras et al. 2022, table 7)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin as ModelMixin  # diffusers looks for this name beside a class that it loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .layers import Conv2d, PositionalEmbedding, UNetBlock, group_norm
from .unet import EDMUNet, decoder, encoder


class DhariwalUNet(EDMUNet):
    """ADM; the defaults are EDM's for ImageNet 64x64. Attention has heads of 64 channels: narrower blocks have none.

    `augment_dim` is the width of EDM's augmentation labels; without augmentation they are zero, and they always are
    here: the layer is kept so that a published network keeps all its weights. `time_scale`: see `EDMUNet`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        time_scale: float = 1.0,
    ):
        super().__init__()
        emb_channels = model_channels * channel_mult_emb
        sizes = [sample_size >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        shared = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout)

        def block(cin: int, cout: int, attention: bool, **resample: Any) -> UNetBlock:
            return shared(cin, cout, heads=cout // 64 if attention else 0, **resample)

        self.map_noise = PositionalEmbedding(model_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        if num_class_embeds is not None:
            self.map_label = nn.Linear(num_class_embeds, emb_channels, bias=False)
        self.enc = encoder(block, sizes, in_channels, widths[0], widths, num_blocks, attn_resolutions)
        self.dec = decoder(block, sizes, self.enc, widths, num_blocks, lambda size, index: size in attn_resolutions)
        self.out_norm = group_norm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, 3)
        self._initialise()

    def _initialise(self) -> None:
        """Every residual branch, the output and the augmentation begin at zero; the class embedding is N(0, 1)."""
        for name, parameter in self.named_parameters():
            layer = name.split(".")[-2]
            if layer == "map_label":
                nn.init.normal_(parameter)
            elif layer in ("conv1", "proj", "out_conv", "map_augment"):
                nn.init.zeros_(parameter)

    def embed(self, noise: Tensor, classes: Tensor | None, dtype: torch.dtype) -> Tensor:
        emb = self.map_noise(noise).to(dtype)
        if self.config.augment_dim:  # zeros, so that every layer takes part: distributed training insists on it
            emb = emb + self.map_augment(emb.new_zeros(1, self.config.augment_dim))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if classes is None else emb + self.map_label(classes))

    def head(self, x: Tensor) -> Tensor:
        return self.out_conv(F.silu(self.out_norm(x)))
