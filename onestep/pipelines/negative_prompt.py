"""Negative prompts for one-step generators, which have no classifier-free guidance to put them into.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=THIS_FILE, trust_remote_code=True)
    image = pipe("a bowl of fruit", negative_prompt="apples", negative_scale=0.2, num_inference_steps=1).images[0]

FOLDER is a Stable Diffusion, Stable Diffusion XL or PixArt pipeline. Needs torch and diffusers alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TRANSFORMERS = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")


class SteeredAttention:
    """A diffusers attention processor: Z = softmax(Q K+^T / sqrt(d)) V+ - a softmax(Q K-^T / sqrt(d)) V-, then `to_out`.

    Per head, with the layer's own W_q, W_k and W_v for both prompts; `to_out` and its bias are applied once, to the
    concatenated heads. SNOOPI (Nguyen et al. 2024, arXiv 2412.02687), "negative-away steer attention".

    The text is (B, 2 L, C): the prompt's L tokens, then the negative prompt's; a mask, added to the scores, is (B, 1, 2 L).
    `scale` is a, shape (B, 1, 1, 1).
    """

    def __init__(self, scale: Tensor):
        self.scale = scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Pictures (B, N, C) to (B, N, C)."""
        batch, text = encoder_hidden_states.shape[:2]
        query, key, value = (
            flat.view(batch, -1, attn.heads, flat.shape[-1] // attn.heads).transpose(1, 2)
            for flat in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        masks: tuple[Tensor | None, ...] = (None, None)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, text, batch)
            masks = mask.view(batch, attn.heads, -1, text).chunk(2, dim=3)
        towards, away = (
            F.scaled_dot_product_attention(query, k, v, attn_mask=mask)
            for k, v, mask in zip(key.chunk(2, dim=2), value.chunk(2, dim=2), masks)
        )
        z = towards - self.scale.to(towards) * away
        out = attn.to_out[0](z.transpose(1, 2).reshape(batch, -1, attn.heads * z.shape[-1]))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class NegativePromptPipeline(DiffusionPipeline):
    """The stock pipeline of the folder, with a negative prompt that needs no second pass of the network."""

    _optional_components = ["unet", "transformer", "text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        stock: str = "StableDiffusionPipeline",
    ):
        """`stock` is the name of the diffusers class of the folder. Raises ValueError for one that cannot be steered."""
        super().__init__()
        if stock not in UNETS + TRANSFORMERS:
            raise ValueError(
                f"a {stock} cannot be steered by a negative prompt; allowed are {', '.join(UNETS + TRANSFORMERS)}"
            )
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        parts |= {"transformer": transformer} if stock in TRANSFORMERS else {"unet": unet}
        own: dict[str, Any] = {}
        if stock == "StableDiffusionXLPipeline":
            parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
            own = {"force_zeros_for_empty_prompt": force_zeros_for_empty_prompt}
        elif stock == "StableDiffusionPipeline":
            own = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.register_modules(**(dict.fromkeys(self._optional_components) | parts))
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, stock=stock)
        self._stock = getattr(diffusers, stock)(**parts, **own)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """diffusers' own, which drops the name of the folder's class; it is kept as `stock`."""
        stock = config_dict["_class_name"]
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {"stock": stock} | init, unused, hidden

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        negative_scale: float = 0.2,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """What the stock pipeline returns, called with all these but the negative prompt; `kwargs` are its own arguments.

        `negative_scale` is a of `SteeredAttention`. At 0, or without a negative prompt, this is the stock pipeline to the
        last bit, and so is each picture of a batch whose own negative prompt is empty, but for the batch's rounding.
        Raises ValueError for a scale below 0, guidance above 1, or as many negative prompts as there are no prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negatives = [negative_prompt or ""] * len(prompts) if not isinstance(negative_prompt, list) else negative_prompt
        if negative_scale < 0:
            raise ValueError(f"negative_scale is {negative_scale}; type 0, which is off, or more, such as 0.2")
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one text for all, or one for each"
            )
        self._stock.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **kwargs}
        if negative_scale == 0 or not any(negatives):
            return self._stock(prompt, **settings)
        if guidance_scale > 1:
            raise ValueError(
                f"guidance_scale is {guidance_scale}; with a negative prompt leave it out: steering replaces it"
            )
        told, away = self._embedded(prompts, kwargs), self._embedded(negatives, kwargs)
        for name in ("prompt_embeds", "prompt_attention_mask"):
            if name in told:
                told[name] = torch.cat([told[name], away[name]], dim=1)
        scales = torch.tensor([negative_scale if text else 0.0 for text in negatives], device=self._stock._execution_device)
        images = kwargs.get("num_images_per_prompt") or 1
        with self._steered(SteeredAttention(scales.repeat_interleave(images).view(-1, 1, 1, 1))):
            return self._stock(**told, **settings)

    def _embedded(self, prompts: list[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """What the stock pipeline takes in the place of these prompts."""
        stock = self._stock
        arguments = {"device": stock._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if self.config.stock in TRANSFORMERS:
            text = {"clean_caption": True}  # as the stock call has it; encode_prompt has not
            text |= {key: kwargs[key] for key in ("max_sequence_length", "clean_caption") if key in kwargs}
            embeds, mask, *_ = stock.encode_prompt(prompts, **arguments, **text)
            return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if self.config.stock == "StableDiffusionPipeline":
            return {"prompt_embeds": stock.encode_prompt(prompts, **arguments)[0]}
        embeds, _, pooled, _ = stock.encode_prompt(prompts, **arguments)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @contextmanager
    def _steered(self, processor: SteeredAttention) -> Iterator[None]:
        """Every cross-attention of the network runs by `processor` inside."""
        network = self.transformer if self.config.stock in TRANSFORMERS else self.unet
        before = network.attn_processors
        steered = {name: processor if name.endswith("attn2.processor") else own for name, own in before.items()}
        network.set_attn_processor(steered)
        try:
            yield
        finally:
            network.set_attn_processor(dict(before))
