"""Teachers without weights: networks of shapes and dtypes alone, made from the configuration files of a pipeline.

Every parameter is a fake tensor on the CPU: it has no storage, and whatever meets it in an operation comes out fake too.
Everything else, such as a schedule's table, is real, so that code that looks at numbers of its own runs as ever.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .config import TrainConfig
from .denoiser import Cond
from .quiet import quiet
from .teacher import Teacher, facts_of, family_named
from .teacher.text import TextTeacher

CPU = torch.device("cpu")
LIBRARIES = ("diffusers", "transformers", "onestep")
"""Where the components of a pipeline may come from."""
PROMPTS = 10
"""Prompts that a teacher is given in place of those of the data: as many as a grid shows."""


class Blank:
    """Makes teachers of one name, and says which tensors are without weights."""

    def __init__(self, name: str):
        """Raises ValueError where there is no such teacher, or its configuration cannot be had."""
        self.facts = facts_of(name)
        self.folder = _configuration(name, self.facts.source)
        self.index: dict[str, Any] = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        self.family = family_named(str(self.index.get("_class_name")))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._kept: dict[tuple[str, torch.dtype], Any] = {}

    def teacher(self, dtype: torch.dtype, resolution: int | None) -> Teacher:
        """A teacher with all parts of its pipeline in `dtype`. Its network is a new one, which adapters may change.

        Raises ValueError where the pipeline is not supported, or not at that resolution.
        """
        import diffusers

        kind = getattr(diffusers, self.index["_class_name"])
        wanted = inspect.signature(kind.__init__).parameters
        given = {name: value for name, value in self.index.items() if name in wanted and not isinstance(value, list)}
        try:
            with quiet():
                parts = {name: self._part(name, dtype) for name in wanted if isinstance(self.index.get(name), list)}
                pipeline = kind(**given | parts)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the teacher in {self.folder} cannot be planned: {type(error).__name__}: {reason}. Allowed is a diffusers "
                "folder, or a hub id, with the configuration of every part"
            ) from error
        teacher = self.family(pipeline, self.facts, resolution or self.facts.resolution)
        if isinstance(teacher, TextTeacher):
            rows = _rows_of(teacher)
            null = {name: torch.zeros(1, *shape) for name, shape in rows.items()}
            teacher.use_prompts(_Table(rows), null, ["a prompt"] * PROMPTS)
        return teacher

    def _part(self, name: str, dtype: torch.dtype) -> Any:
        library, kind = self.index[name]
        if kind is None or name in self.family.load_arguments or "tokenizer" in name or name == "feature_extractor":
            return None
        if library.split(".")[0] not in LIBRARIES:
            raise ValueError(f"its {name} is of the library {library!r}; allowed are {', '.join(LIBRARIES)}")
        if name == self.family.network_name or (name, dtype) not in self._kept:
            self._kept[name, dtype] = self._made(getattr(import_module(library), kind), name, dtype)
        return self._kept[name, dtype]

    def _made(self, kind: Any, name: str, dtype: torch.dtype) -> Any:
        folder = self.folder / name
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(folder)
        with torch.device("meta"):
            if hasattr(kind, "load_config"):  # diffusers
                module = kind.from_config(kind.load_config(folder))
            else:
                module = kind(kind.config_class.from_pretrained(folder))
        full = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
        if dtype == torch.float16 or hasattr(kind, "load_config"):  # transformers keeps them for fp16 alone
            wide = {n for n, p in module.named_parameters() if any(part in full for part in n.split("."))}
        else:
            wide = set()
        self._blank(module, lambda n, t: torch.float32 if n in wide else dtype)
        return module

    def _blank(self, module: nn.Module, dtype: Any) -> None:
        """Put a fake tensor in place of every parameter and buffer; what is one tensor stays one."""
        made: dict[int, Tensor] = {}
        for prefix, owner in module.named_modules():
            for kept in (owner._parameters, owner._buffers):
                for name, tensor in kept.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        full = f"{prefix}.{name}" if prefix else name
                        wanted = dtype(full, tensor) if tensor.is_floating_point() else tensor.dtype
                        made[id(tensor)] = self.fake(tensor, wanted)
                    kept[name] = made[id(tensor)]

    def fake(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A fake tensor of this shape, a parameter where `tensor` is one."""
        empty = torch.empty_like(tensor, device="meta", dtype=dtype or tensor.dtype, requires_grad=False)
        made = FakeTensor(self.mode, empty, CPU)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    @contextmanager
    def weightless(self) -> Iterator[None]:
        """Parameters of the modules that are made inside are fake; nothing is drawn for them."""
        register = nn.Module.register_parameter

        def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and not isinstance(parameter, FakeTensor):
                parameter = self.fake(parameter)  # type: ignore[assignment]
            register(module, name, parameter)

        with patch.object(nn.Module, "register_parameter", registered), patch.object(nn.Module, "_apply", _applied):
            yield


@torch.no_grad()
def _applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, which cannot put another fake tensor in the place of one: here the module gets a new one."""
    for each in module.modules() if recurse else (module,):
        for kept in (each._parameters, each._buffers):
            for name, tensor in kept.items():
                made = tensor if tensor is None else fn(tensor)
                if tensor is not None and made is not tensor:
                    wanted = isinstance(tensor, nn.Parameter)
                    kept[name] = nn.Parameter(made, tensor.requires_grad) if wanted else made  # type: ignore
    return module


class _Table:
    """A table of prompts of which only the shapes are known."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __getitem__(self, index: Tensor) -> Cond:
        return {name: torch.zeros(len(index), *shape) for name, shape in self.shapes.items()}


def _configuration(name: str, source: str) -> Path:
    """The folder with a teacher's configuration files; of a hub id these alone are downloaded, a pickle is imported."""
    if (Path(source) / "model_index.json").is_file():
        return Path(source)
    if source.endswith(".pkl"):  # its configuration is in the file itself
        from .networks.fetch import imported

        return imported(source, TrainConfig().cache_folder)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json"], ignore_patterns=["*.index.json"]))
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError("it has no model_index.json")
        return folder
    except Exception as error:
        raise ValueError(
            f"the configuration of the teacher {name!r} could not be had from {source}: {' '.join(str(error).split())}. "
            "Allowed is a diffusers folder or a hub id that this machine can reach"
        ) from error


def _rows_of(teacher: TextTeacher) -> dict[str, tuple[int, ...]]:
    """Shapes of one row of embeddings by name, as the family's own `_embed` makes them.

    The encoders are not run: their code looks at the tokens. Raises ValueError for a family that is not known here.
    """
    p, family = teacher.pipeline, type(teacher).__name__
    states, pooled = "encoder_hidden_states", "pooled_projections"
    if family == "SDTeacher":
        return {states: (_length(p.text_encoder), p.text_encoder.config.hidden_size)}
    if family == "SDXLTeacher":
        width = p.text_encoder.config.hidden_size + p.text_encoder_2.config.hidden_size
        return {states: (_length(p.text_encoder), width), "text_embeds": (p.text_encoder_2.config.projection_dim,)}
    if family == "SD3Teacher":
        width = p.text_encoder.config.projection_dim + p.text_encoder_2.config.projection_dim
        return {states: (77 + 256, p.transformer.config.joint_attention_dim), pooled: (width,)}
    if family == "FluxTeacher":
        return {states: (512, p.text_encoder_2.config.d_model), pooled: (p.text_encoder.config.hidden_size,)}
    if family in ("PixArtTeacher", "SanaTeacher"):
        length = inspect.signature(type(p).__call__).parameters["max_sequence_length"].default
        return {states: (length, p.text_encoder.config.hidden_size), "encoder_attention_mask": (length,)}
    raise ValueError(f"the shapes of the text embeddings of a {type(p).__name__} are not known, so it cannot be planned")


def _length(encoder: Any) -> int:
    return encoder.config.max_position_embeddings
