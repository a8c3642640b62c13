"""Tiny text-to-image pipelines with random weights, of the very classes that the real teachers have."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny import randomise
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-"


def clip_tokenizer() -> CLIPTokenizer:
    """Letters alone: every word is spelled."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ends]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_encoder(seed: int, projected: bool = False, width: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=len(clip_tokenizer()) - 2,
        eos_token_id=len(clip_tokenizer()) - 1,
        pad_token_id=len(clip_tokenizer()) - 1,
    )
    return made(CLIPTextModelWithProjection if projected else CLIPTextModel, seed, config)


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def t5_encoder(seed: int) -> Any:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return made(T5EncoderModel, seed, config)


def made(kind: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
    """An instance with seeded weights, none of them left at an initial zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(*args, **kwargs)
    randomise(module, seed)
    return module.eval()


def vae(latents: int = 4, **kwargs: Any) -> Any:
    """Two pixels a side for each latent."""
    return made(
        AutoencoderKL,
        1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latents,
        sample_size=16,
        **kwargs,
    )


def unet(width: int, **kwargs: Any) -> Any:
    return made(
        UNet2DConditionModel,
        2,
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        norm_num_groups=4,
        **kwargs,
    )


def sd15(prediction_type: str = "epsilon") -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind: Any = PNDMScheduler if prediction_type == "epsilon" else DDIMScheduler
    clip: Any = {"skip_prk_steps": True} if kind is PNDMScheduler else {"clip_sample": False}
    return StableDiffusionPipeline(
        vae(),
        clip_encoder(3),
        clip_tokenizer(),
        unet(16, attention_head_dim=2),
        kind(prediction_type=prediction_type, steps_offset=1, **clip, **betas),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    network = unet(
        32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    second = clip_encoder(4, projected=True)
    return StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025), clip_encoder(3), second, clip_tokenizer(), clip_tokenizer(), network, scheduler
    )


def pixart(kind: Any, sample_size: int) -> Any:
    network = made(
        PixArtTransformer2DModel,
        2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=sample_size == 128,
    )
    return kind(t5_tokenizer(), t5_encoder(3), vae(scaling_factor=0.13025), network, DPMSolverMultistepScheduler())


def sd3() -> Any:
    network = made(
        SD3Transformer2DModel,
        2,
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    first, second = clip_encoder(3, projected=True), clip_encoder(4, projected=True)
    encoder = made(T5EncoderModel, 5, T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first,
        tokenizer=clip_tokenizer(),
        text_encoder_2=second,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance_embeds: bool = True) -> Any:
    network = made(
        FluxTransformer2DModel,
        2,
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(
        scheduler,
        vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        clip_encoder(3),
        clip_tokenizer(),
        t5_encoder(4),
        t5_tokenizer(),
        network,
    )


def sana() -> Any:
    network = made(
        SanaTransformer2DModel,
        2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        patch_size=1,
    )
    autoencoder = made(
        AutoencoderDC,
        1,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    ends = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = GemmaTokenizerFast(vocab={token: i for i, token in enumerate([*ends, "▁", *LETTERS])}, merges=[])
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return SanaPipeline(tokenizer, made(Gemma2Model, 3, config), autoencoder, network, scheduler)


def ddpm() -> Any:
    network = made(
        UNet2DModel,
        2,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return DDPMPipeline(network, DDPMScheduler(clip_sample=True))


PIPELINES = {
    "sd15": sd15,
    "sd21": lambda: sd15("v_prediction"),
    "sdxl": sdxl,
    "pixart-alpha": lambda: pixart(PixArtAlphaPipeline, 32),
    "pixart-sigma": lambda: pixart(PixArtSigmaPipeline, 32),
    "sd3": sd3,
    "flux-dev": flux,
    "flux without guidance": lambda: flux(guidance_embeds=False),
    "sana": sana,
    "ddpm": ddpm,
}
"""A pipeline by the name of the teacher whose classes it has."""
