"""Guidance adapters: classifier-free guidance in one pass of the network (AGD, arXiv 2503.07274).

A pipeline in one file, which imports torch and diffusers alone. For a folder that holds it, beside its
adapters in guidance_adapter/, or for any checkpoint of the same base:

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="adapter_guidance", trust_remote_code=True)
    pipe(..., guidance_scale=4.0)

    pipe = DiffusionPipeline.from_pretrained(OTHER, custom_pipeline="adapter_guidance.py", trust_remote_code=True)
    pipe.load_adapter(FOLDER)
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SUBFOLDER = "guidance_adapter"
"""Where an exported folder keeps its adapters."""
WAVES = 16


class ScalarEncoder(nn.Module):
    """LayerNorm(W2 relu(W1 f(w))), f the sines and cosines of pi w 2^(-k / 2), k = 0 .. 15; (B,) -> (B, hidden)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(2 * WAVES, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, w: Tensor) -> Tensor:
        angles = torch.pi * w[:, None] * 2 ** (-torch.arange(WAVES, dtype=w.dtype, device=w.device) / 2)
        return self.norm(self.second(F.relu(self.first(torch.cat([angles.sin(), angles.cos()], dim=1)))))


class Offset(nn.Module):
    """One vector for all tokens of a block, W2 silu(W1 c) with c = w + t + the mean of the prompt; zero at first."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.first, self.last = nn.Linear(hidden, hidden), zeroed(nn.Linear(hidden, width))

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.last(F.silu(self.first(summed(tokens, mask))))[:, None]


class Attention(nn.Module):
    """Attention of one head from a block's input to the tokens [w, t, prompt ...]; zero at first."""

    def __init__(self, inputs: int, width: int, hidden: int):
        super().__init__()
        self.query, self.last = nn.Linear(inputs, hidden), zeroed(nn.Linear(hidden, width))
        self.key, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        seen = None if mask is None else mask[:, None]
        return self.last(
            F.scaled_dot_product_attention(self.query(hidden), self.key(tokens), self.value(tokens), attn_mask=seen)
        )


class MLP(nn.Module):
    """W2 silu((1 + a) W1 h + b) of a block's input h, (a, b) = V silu(w + t + the mean of the prompt); zero at first."""

    def __init__(self, inputs: int, width: int, hidden: int):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), zeroed(nn.Linear(hidden, width))
        self.modulation = nn.Linear(hidden, 2 * hidden)

    def forward(self, hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        scale, shift = self.modulation(F.silu(summed(tokens, mask)))[:, None].chunk(2, dim=-1)
        return self.last(F.silu((1 + scale) * self.first(hidden) + shift))


class LowRank(nn.Module):
    """B ((1 + a) A x + b) of a linear layer's input x, rank hidden / 8, (a, b) = V silu(w + t + the mean of the prompt).

    Zero at first.
    """

    def __init__(self, inputs: int, width: int, hidden: int):
        super().__init__()
        rank = max(hidden // 8, 1)
        self.first, self.last = nn.Linear(inputs, rank, bias=False), zeroed(nn.Linear(rank, width, bias=False))
        self.modulation = zeroed(nn.Linear(hidden, 2 * rank))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        scale, shift = expanded(self.modulation(F.silu(summed(tokens, mask))), x).chunk(2, dim=-1)
        return self.last((1 + scale) * self.first(x) + shift)


KINDS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "offset": lambda inputs, width, hidden: Offset(width, hidden),
    "attention": Attention,
    "mlp": MLP,
    "low-rank": LowRank,
}
"""Adapters of one layer: (width of its input, of its output, hidden width) -> module of (its input, tokens, mask)."""


def expanded(vectors: Tensor, like: Tensor) -> Tensor:
    """(B, C) -> (B, 1, ..., C), to broadcast against `like` (B, ..., anything)."""
    return vectors.view(len(vectors), *(1,) * (like.ndim - 2), -1)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """A linear layer that maps everything to zero until it is trained: adapters start as no change."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def summed(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[w, t, prompt ...], (B, 2 + L, hidden) -> w + t + the mean of the prompt, (B, hidden)."""
    total = tokens[:, 0] + tokens[:, 1]
    return total if tokens.shape[1] == 2 else total + mean(tokens[:, 2:], None if mask is None else mask[:, 2:])


def mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, hidden) -> (B, hidden), the mean over those tokens that the mask, (B, L), keeps."""
    if mask is None:
        return tokens.mean(dim=1)
    kept = mask.to(tokens.dtype)[..., None]
    return (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)


class GuidanceAdapter(ModelMixin, ConfigMixin):
    """The adapters of all blocks: block l of a frozen network becomes h <- Attn_l(h) + A_l(h; w, t, c) (AGD, section 4).

    `layers` are the paths of the network's attentions, of the kind "low-rank" of its linear layers, and `widths` those of
    their input and output. `embedders` are the paths of what embeds the time (and class) as (B, time_width): the first is
    read, and adapters of the kind "mlp" add an offset to them all. text_width is that of prompt tokens, None where there are
    none. `low` and `high` are the guidance that it is trained on, `pipeline` the stock class that its network is sampled
    with, and `strength` a factor of all that is added in the middle of that range, `strength` - and + `tilt` at its ends.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        hidden: int,
        layers: list[str],
        widths: list[tuple[int, int]],
        embedders: list[str],
        time_width: int,
        text_width: int | None = None,
        pipeline: str = "",
        low: float = 1.0,
        high: float = 6.0,
        strength: float = 1.0,
        tilt: float = 0.0,
    ):
        super().__init__()
        self.scale, self.time = ScalarEncoder(hidden), nn.Linear(time_width, hidden)
        self.text = None if text_width is None else nn.Linear(text_width, hidden)
        self.blocks = nn.ModuleList(KINDS[kind](*width, hidden) for width in widths)
        self.offsets = nn.ModuleList(Offset(time_width, hidden) for _ in embedders if kind == "mlp")

    def gain(self, guidance: Tensor) -> Tensor:
        """What all adapters are multiplied by, (B,): w - 1, as guidance adds w - 1 of a difference, over half the range.

        And by their strength at w, which is linear in w within the range, and beyond it that of its end.
        """
        about = self.config
        half, middle = (about.high - about.low) / 2, (about.high + about.low) / 2
        strength = about.strength + about.tilt * ((guidance - middle) / half).clamp(-1, 1)
        return strength * (guidance - 1) / half

    def tokens(self, guidance: Tensor, time: Tensor, text: Tensor | None) -> Tensor:
        """[w, t, prompt ...] of a batch, (B, 2 + L, hidden), from guidance (B,) or (1,), time (B, width) and text."""
        weight = self.time.weight
        scale = self.scale(guidance.to(weight).expand(len(time)))
        found = torch.stack([scale, self.time(time.to(weight))], dim=1)
        if self.text is None:
            return found
        assert text is not None, "this network is called with prompt tokens"
        return torch.cat([found, self.text(text.to(weight))], dim=1)

    def check(self, network: nn.Module) -> None:
        """Raises ValueError where these are the adapters of another network."""
        modules = dict(network.named_modules())
        wrong = [
            path
            for path, width in zip(self.config.layers, self.config.widths)
            if path not in modules or widths_of(modules[path]) != tuple(width)
        ]
        wrong += [path for path in self.config.embedders if path not in modules]
        if wrong:
            raise ValueError(
                f"these adapters do not fit a {type(network).__name__} without {wrong[0]} of their width: load a checkpoint "
                "of the base that they were trained on"
            )


def widths_of(layer: Any) -> tuple[int, int]:
    """Widths of what a linear layer, or an attention layer of diffusers, takes and puts out."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.to_q.in_features, layer.to_out[0].out_features


@contextmanager
def attached(network: nn.Module, adapter: GuidanceAdapter, guidance: Tensor) -> Iterator[None]:
    """Within it the network runs with the adapters, at this guidance, (B,) or (1,): by hooks, which are gone afterwards."""
    here: dict[str, Any] = {}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        here.clear()
        here["given"] = kwargs

    def embedding(offset: nn.Module | None) -> Callable[..., Any]:
        def embed(module: nn.Module, args: Any, time: Tensor) -> Tensor | None:
            if "tokens" not in here:  # a DiT embeds its time once more for its last layer
                text, mask = (here["given"].get(name) for name in ("encoder_hidden_states", "encoder_attention_mask"))
                here["tokens"], here["mask"] = adapter.tokens(guidance, time, text), None
                here["gain"] = adapter.gain(guidance).to(here["tokens"])[:, None]
                if text is not None and mask is not None:
                    here["mask"] = F.pad(mask.bool(), (2, 0), value=True)
            if offset is None:
                return None
            return time + (here["gain"] * offset(time, here["tokens"], here["mask"])[:, 0]).to(time.dtype)

        return embed

    def adding(block: nn.Module) -> Callable[..., Any]:
        def add(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens = here["tokens"]
            more = expanded(here["gain"], hidden) * block(hidden.to(tokens.dtype), tokens, here["mask"])
            if isinstance(result, tuple):  # the picture's tokens, then those of the prompt
                return (result[0] + more.to(result[0].dtype), *result[1:])
            return result + more.to(result.dtype)

        return add

    hooks = [network.register_forward_pre_hook(begin, with_kwargs=True)]
    embedders = adapter.config.embedders
    for path, offset in zip(embedders, adapter.offsets or [None] * len(embedders)):
        hooks.append(network.get_submodule(path).register_forward_hook(embedding(offset)))
    for path, block in zip(adapter.config.layers, adapter.blocks):
        hooks.append(network.get_submodule(path).register_forward_hook(adding(block), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


PARTS = (
    *("scheduler", "vae", "transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer"),
    *("tokenizer_2", "tokenizer_3", "safety_checker", "feature_extractor", "image_encoder"),
)
SETTINGS = ("id2label", "requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker")


class AdapterGuidancePipeline(DiffusionPipeline):
    """A stock pipeline whose guidance is one pass a step: `guidance_scale` goes to the adapters.

    Whatever else it is called with is the stock pipeline's. 1 is the plain conditional, without adapters.
    """

    _optional_components = list(PARTS[2:])

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        transformer: Any = None,
        unet: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        id2label: Any = None,
        requires_safety_checker: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: Any = None,
    ):
        super().__init__()
        given = locals()
        self.register_modules(**{name: given[name] for name in PARTS})
        self.register_to_config(**{name: given[name] for name in SETTINGS})
        self._adapter: GuidanceAdapter | None = None

    @property
    def network(self) -> nn.Module:
        return self.unet if self.transformer is None else self.transformer

    @property
    def adapter(self) -> GuidanceAdapter:
        """The adapters in use: those of `load_adapter`, else those of the folder itself. Raises ValueError without any."""
        if self._adapter is None:
            self.load_adapter(self.config._name_or_path)
        assert self._adapter is not None
        return self._adapter

    def load_adapter(self, source: str | os.PathLike[str]) -> None:
        """Use the adapters of an exported folder or hub id. Raises ValueError where it has none that fit this network."""
        try:
            found = GuidanceAdapter.from_pretrained(source, subfolder=SUBFOLDER)
        except OSError as error:
            raise ValueError(
                f"{source} has no guidance adapters in {SUBFOLDER}: call load_adapter with the folder of an AGD export"
            ) from error
        found.check(self.network)
        self._adapter = found.eval()

    @property
    def stock(self) -> Any:
        """The stock pipeline around the same parts."""
        kind = getattr(diffusers, self.adapter.config.pipeline)
        taken = inspect.signature(kind.__init__).parameters
        parts = {name: getattr(self, name) for name in PARTS} | {name: self.config[name] for name in SETTINGS}
        pipeline = kind(**{name: part for name, part in parts.items() if name in taken})
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    def __call__(self, *args: Any, guidance_scale: float = 4.0, **kwargs: Any) -> Any:
        """What the stock pipeline returns. Raises ValueError for a negative prompt, which has no pass of its own here."""
        if any(kwargs.get(name) is not None for name in kwargs if name.startswith("negative_prompt")):
            raise ValueError("a negative prompt needs a second pass: leave it out, or use the stock pipeline")
        network: Any = self.network
        adapter: Any = nn.Module.to(self.adapter, network.device, network.dtype)
        guidance = torch.tensor([guidance_scale], device=network.device)
        with nullcontext() if guidance_scale == 1 else attached(network, adapter, guidance):
            return self.stock(*args, guidance_scale=1.0, **kwargs)
