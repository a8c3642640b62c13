"""Teachers that are conditioned on text: prompts are embedded once, and conditions are rows of the table they lie in."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..denoiser import Cond
from ..precision import full_precision
from .latent import LatentTeacher

EXAMPLES = [
    "a photograph of a lighthouse on a cliff at sunset",
    "a red bicycle leaning against a brick wall",
    "an oil painting of a bowl of lemons",
    "a small dog running through snow",
]
"""Prompts to show an export with, and to look at a teacher by."""


class Table(Protocol):
    """Rows of named tensors, such as `onestep.data.shards.Shards`."""

    def __getitem__(self, index: Tensor) -> Cond: ...


class TextTeacher(LatentTeacher):
    """Conditions, shape (B,), are row numbers of the table that `use_prompts` was given; the null prompt is empty."""

    conditioned_by = "text"
    seeded_chain = True
    any_resolution = True
    encoders: Sequence[str] = ("text_encoder",)
    """Attributes of the pipeline that hold text encoders."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prompts = EXAMPLES
        self._table: Table | None = None
        self._null: Cond = {}

    @abstractmethod
    def _embed(self, prompts: list[str]) -> tuple[Cond, Cond]:
        """Rows of these prompts and of the null prompt, by the pipeline's own `encode_prompt`."""

    def rest(self) -> None:
        super().rest()
        self._move_encoders("cpu")

    def _move_encoders(self, device: torch.device | str) -> None:
        for encoder in (getattr(self.pipeline, name) for name in self.encoders):
            if encoder is not None:
                encoder.to(device)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Cond:
        """Embeddings of prompts, one row each, on the CPU."""
        self._move_encoders(self.device)
        with full_precision(getattr(self.pipeline, self.encoders[0])):
            return {key: value.cpu() for key, value in self._embed(prompts)[0].items()}

    @torch.no_grad()
    def embed_null(self) -> Cond:
        """The one row that stands for no prompt in guidance, on the CPU."""
        self._move_encoders(self.device)
        with full_precision(getattr(self.pipeline, self.encoders[0])):
            return {key: value[:1].cpu() for key, value in self._embed([""])[1].items()}

    def embedder_key(self) -> dict[str, Any]:
        """What tells the embeddings of two teachers apart: the encoders' configurations, dtypes and a hash of weights."""
        key: dict[str, Any] = {"pipeline": type(self.pipeline).__name__}
        for name in self.encoders:
            encoder = getattr(self.pipeline, name)
            if encoder is None:
                continue
            digest = hashlib.sha256()
            for tensor in encoder.state_dict().values():  # a few numbers of every tensor: whole ones would take minutes
                flat = tensor.detach().flatten()
                digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
            key[name] = {"class": type(encoder).__name__, "dtype": str(encoder.dtype), "weights": digest.hexdigest()}
        return key

    def use_prompts(self, table: Table, null: Cond, prompts: list[str]) -> None:
        """Conditions are rows of `table` from now on; `prompts` are the texts behind them."""
        self._table, self.prompts = table, prompts
        self._null = self._placed(null)

    def use_texts(self, prompts: list[str]) -> None:
        """`use_prompts` with embeddings made now and kept in memory; for a handful of prompts."""
        self.use_prompts(_Rows(self.embed(prompts)), self.embed_null(), prompts)

    @property
    def classes(self) -> int:
        return len(self.prompts)

    def named(self, conditions: list[int]) -> list[str]:
        return [self.prompts[index] for index in conditions]

    def encode(self, conditions: Tensor) -> tuple[Cond, Cond | None]:
        if self._table is None:
            raise ValueError("this teacher needs prompts: type --data prompts.txt, with one prompt a line")
        cond = self._placed(self._table[conditions.cpu()])
        return cond, {key: value.expand(len(conditions), *value.shape[1:]) for key, value in self._null.items()}

    def _placed(self, cond: Cond) -> Cond:
        kind = self.denoiser.dtype
        return {k: v.to(self.device, kind if v.is_floating_point() else None) for k, v in cond.items()}

    def example_arguments(self, count: int) -> dict[str, Any]:
        return self.arguments([]) | {"prompt": EXAMPLES[:count]}

    def arguments(self, conditions: list[int]) -> dict[str, Any]:
        size = {} if self.resolution == self.native_resolution else {"height": self.resolution, "width": self.resolution}
        return {"prompt": self.named(conditions), "guidance_scale": 0} | size


class _Rows:
    """A table that lies in memory."""

    def __init__(self, rows: Cond):
        self.rows = rows

    def __getitem__(self, index: Tensor) -> Cond:
        return {key: value[index] for key, value in self.rows.items()}
