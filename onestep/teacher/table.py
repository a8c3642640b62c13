"""The teachers that are known by a short name, without importing torch."""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .facts import Facts

ASSETS = Path(__file__).parent.parent / "assets"
EDM_NETWORKS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
SWIFTBRUSH: dict[str, dict[str, Any]] = {
    "swiftbrush": {"lr": 1e-6, "critic_lr": 1e-3, "guidance": 4.5},
    "snoopi": {"lr": 1e-6, "critic_lr": 1e-3, "guidance": 1.0},
}
"""The published settings, which are for these teachers."""

SMALL: dict[str, Any] = {
    "init_rho": 2.5,
    "iterations": 2200,
    "batch_size": 16,
    "lr": 1e-4,
    "critic_lr": 3e-4,
    "warmup": 30,
    "ema": 0.995,
}
SMALL_DMD2: dict[str, Any] = {"ratio": 1, "gan": 0.2, "gan_critic": 0.2, "t_max": 0.35}
"""What fits the embedded teachers of latents, in minutes on a CPU."""

TEACHERS: dict[str, Facts] = {
    "fashion": Facts(
        source=str(ASSETS / "fashion"),
        guidance=1.5,
        licence="Apache-2.0; trained on Fashion-MNIST (MIT)",
        protocol="fashion-10k",
        train={"data": "fashion", **SMALL},
        methods={"dmd2": SMALL_DMD2},
    ),
    "digits": Facts(
        source=str(ASSETS / "digits"),
        steps=18,
        licence="Apache-2.0; trained on the UCI digits of scikit-learn (CC-BY-4.0)",
        protocol="digits-1797",
        train={"data": "digits", "init_rho": 2.5, "guidance": 1.0},
    ),
    "emoji": Facts(
        source=str(ASSETS / "emoji"),
        guidance=3.0,
        licence="Apache-2.0; trained on Twemoji (CC-BY-4.0)",
        train={"data": "emoji", **SMALL},
        methods={"dmd2": SMALL_DMD2, "snoopi": {"critic_lr": 1e-3}},
    ),
    "sd15": Facts(
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        guidance=7.5,
        licence="creativeml-openrail-m",
        resolution=512,
        prediction="epsilon",
        latent_scale=0.18215,
        latent_shift=0.0,
        train={"guidance": 1.75, "lr": 1e-5, "critic_lr": 1e-5},
        methods=SWIFTBRUSH,
    ),
    "sd21": Facts(
        source="stabilityai/stable-diffusion-2-1",
        guidance=7.5,
        licence="openrail++",
        resolution=768,
        prediction="v_prediction",
        latent_scale=0.18215,
        latent_shift=0.0,
        train={"guidance": 1.75, "lr": 1e-5, "critic_lr": 1e-5},
        methods=SWIFTBRUSH,
    ),
    "sdxl": Facts(
        source="stabilityai/stable-diffusion-xl-base-1.0",
        guidance=5.0,
        licence="openrail++",
        resolution=1024,
        prediction="epsilon",
        latent_scale=0.13025,
        latent_shift=0.0,
        # the published one-step student starts at index 399 from N(0, 1), where sigma / alpha = 1.1606
        train={"guidance": 8.0, "lr": 5e-7, "critic_lr": 5e-7, "init_rho": 1.1606},
    ),
    "pixart-alpha": Facts(
        source="PixArt-alpha/PixArt-XL-2-1024-MS",
        guidance=4.5,
        steps=20,
        licence="openrail++",
        resolution=1024,
        prediction="epsilon",
        latent_scale=0.13025,
        latent_shift=0.0,
        train={"lr": 1e-5, "critic_lr": 1e-5},
    ),
    "pixart-sigma": Facts(
        source="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        guidance=4.5,
        steps=20,
        licence="openrail++",
        resolution=1024,
        prediction="epsilon",
        latent_scale=0.13025,
        latent_shift=0.0,
        train={"lr": 1e-5, "critic_lr": 1e-5},
    ),
    "dit-xl-2-256": Facts(
        source="facebook/DiT-XL-2-256",
        guidance=4.0,
        licence="cc-by-nc-4.0",
        resolution=256,
        prediction="epsilon",
        latent_scale=0.18215,
        latent_shift=0.0,
        train={"guidance": 1.5, "lr": 1e-5, "critic_lr": 1e-5},
    ),
    "dit-xl-2-512": Facts(
        source="facebook/DiT-XL-2-512",
        guidance=4.0,
        licence="cc-by-nc-4.0",
        resolution=512,
        prediction="epsilon",
        latent_scale=0.18215,
        latent_shift=0.0,
        train={"guidance": 1.5, "lr": 1e-5, "critic_lr": 1e-5},
    ),
    "sd3": Facts(
        source="stabilityai/stable-diffusion-3-medium-diffusers",
        guidance=7.0,
        steps=28,
        licence="other; stabilityai-nc-research-community",
        resolution=1024,
        prediction="flow_prediction",
        latent_scale=1.5305,
        latent_shift=0.0609,
        train={"guidance": 4.5, "lr": 1e-5, "critic_lr": 1e-5},
    ),
    "sd35-medium": Facts(
        source="stabilityai/stable-diffusion-3.5-medium",
        guidance=4.5,
        steps=40,
        licence="other; stabilityai-ai-community",
        resolution=1024,
        prediction="flow_prediction",
        latent_scale=1.5305,
        latent_shift=0.0609,
        train={"lr": 1e-5, "critic_lr": 1e-5},
    ),
    "flux-dev": Facts(
        source="black-forest-labs/FLUX.1-dev",
        guidance=1.0,
        embedded_guidance=3.5,
        licence="other; flux-1-dev-non-commercial-license",
        resolution=1024,
        prediction="flow_prediction",
        latent_scale=0.3611,
        latent_shift=0.1159,
        train={"lr": 1e-5, "critic_lr": 1e-5},
    ),
    "sana": Facts(
        source="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        guidance=4.5,
        steps=20,
        licence="other; see the model card",
        resolution=1024,
        prediction="flow_prediction",
        latent_scale=0.41407,
        latent_shift=0.0,
        train={"lr": 1e-5, "critic_lr": 1e-5},
    ),
    "ddpm-cifar10": Facts(
        source="google/ddpm-cifar10-32",
        steps=100,
        licence="Apache-2.0",
        resolution=32,
        prediction="epsilon",
        train={"init_rho": 2.5, "guidance": 1.0},
    ),
    "edm-cifar10": Facts(
        source=f"{EDM_NETWORKS}/edm-cifar10-32x32-cond-vp.pkl",
        steps=18,
        licence="cc-by-nc-sa-4.0",
        resolution=32,
        prediction="edm",
        train={"init_rho": 2.5, "guidance": 1.0},
    ),
    "edm-imagenet64": Facts(
        source=f"{EDM_NETWORKS}/edm-imagenet-64x64-cond-adm.pkl",
        steps=18,
        licence="cc-by-nc-sa-4.0",
        resolution=64,
        prediction="edm",
        train={"init_rho": 2.5, "guidance": 1.0},
    ),
}


def facts_of(name: str) -> Facts:
    """The table's entry for a short name or for a file of its name, or bare facts for a diffusers folder or hub id.

    Raises ValueError for anything else.
    """
    if name in TEACHERS:
        return TEACHERS[name]
    if (Path(name) / "model_index.json").is_file():
        return Facts(source=name)
    if name.endswith(".pkl") and Path(name).is_file():
        known = (facts for facts in TEACHERS.values() if Path(facts.source).name == Path(name).name)
        return replace(next(known, Facts(source="")), source=name)
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".pkl") or Path(name).exists() or name.count("/") != 1
    if looks_local:
        near = get_close_matches(name, TEACHERS, 1)
        hint = f"; did you mean --teacher {near[0]}?" if near else ""
        raise ValueError(
            f"no teacher {name!r}: it is neither a known name ({', '.join(TEACHERS)}), nor a folder with a "
            f"model_index.json, nor the edm-*.pkl of an EDM network, nor a hub id like owner/name{hint}"
        )
    return Facts(source=name)
