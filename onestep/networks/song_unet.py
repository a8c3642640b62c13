"""The DDPM++ and NCSN++ networks of Song et al. 2021 as EDM trains them (Karras et al. 2022, table 7)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin as ModelMixin  # diffusers looks for this name beside a class that it loads
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .layers import Conv2d, FourierEmbedding, PositionalEmbedding, UNetBlock, group_norm
from .unet import EDMUNet, decoder, encoder


class SongUNet(EDMUNet):
    """DDPM++: the defaults. NCSN++: embedding_type "fourier", encoder_type "residual", channel_mult_noise 2 and
    resample_filter (1, 3, 3, 1).

    `augment_dim` is the width of EDM's augmentation labels; without augmentation they are zero, and they always are
    here: the layer is kept so that a published network keeps all its weights. `time_scale`: see `EDMUNet`.
    Raises ValueError for an embedding, encoder or decoder type other than these.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        time_scale: float = 1.0,
    ):
        super().__init__()
        _check("embedding_type", embedding_type, ("positional", "fourier"))
        _check("encoder_type", encoder_type, ("standard", "residual"))
        _check("decoder_type", decoder_type, ("standard",))
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        sizes = [sample_size >> level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        shared = partial(
            UNetBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            skip_scale=0.5**0.5,
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
        )

        def block(cin: int, cout: int, attention: bool, **resample: Any) -> UNetBlock:
            return shared(cin, cout, heads=int(attention), **resample)

        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise_channels, True) if positional else FourierEmbedding(noise_channels)
        if num_class_embeds is not None:
            self.map_label = nn.Linear(num_class_embeds, noise_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        pyramid = resample_filter if encoder_type == "residual" else None
        self.enc = encoder(block, sizes, in_channels, model_channels, widths, num_blocks, attn_resolutions, pyramid)
        self.dec = decoder(
            block, sizes, self.enc, widths, num_blocks, lambda size, index: index == num_blocks and size in attn_resolutions
        )
        self.dec[f"{sample_size}x{sample_size}_aux_norm"] = group_norm(widths[0], 1e-6)
        self.dec[f"{sample_size}x{sample_size}_aux_conv"] = Conv2d(widths[0], out_channels, 3)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier weights and zero biases; every residual branch and the output begin near zero."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, Conv2d)) or module.weight is None:
                continue
            gain = 1e-5 if name.endswith(("conv1", "proj", "aux_conv")) else 0.2**0.5 if name.endswith("qkv") else 1.0
            nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, noise: Tensor, classes: Tensor | None, dtype: torch.dtype) -> Tensor:
        cos, sin = self.map_noise(noise).to(dtype).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if classes is not None:
            emb = emb + self.map_label(classes * classes.shape[1] ** 0.5)
        if self.config.augment_dim:  # zeros, so that every layer takes part: distributed training insists on it
            emb = emb + self.map_augment(emb.new_zeros(1, self.config.augment_dim))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def head(self, x: Tensor) -> Tensor:
        last = f"{self.config.sample_size}x{self.config.sample_size}_aux"
        return self.dec[f"{last}_conv"](F.silu(self.dec[f"{last}_norm"](x)))


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not supported; allowed is {' or '.join(allowed)}")
