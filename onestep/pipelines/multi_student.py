"""Several one-step generators as one diffusers pipeline: every condition has its own student, and only that one runs.

The folder holds `student-0`, `student-1`, ..., each a stock diffusers folder of its own, and `partition.json`, the rule by
which a class label or a prompt finds its student (Multi-Student Distillation, Song et al. 2024). This file needs torch and
diffusers alone:

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="multi_student", trust_remote_code=True)
    images = pipe(class_labels=[0, 9, 4]).images      # or pipe(prompt=[...])
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

NETWORKS = ("unet", "transformer")
MASKED = ("prompt_embeds", "prompt_attention_mask")
POOLED = ("prompt_embeds", None, "pooled_prompt_embeds")
ENCODINGS = {
    "StableDiffusionPipeline": ("prompt_embeds",),
    "StableDiffusionXLPipeline": POOLED,
    "StableDiffusion3Pipeline": POOLED,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "PixArtAlphaPipeline": MASKED,
    "PixArtSigmaPipeline": MASKED,
    "SanaPipeline": MASKED,
}
"""What a stock pipeline's `encode_prompt` returns, by the names under which its call takes it; None is not needed."""


class MultiStudentPipeline(DiffusionPipeline):
    """Routes each item of a batch to its student, runs the students that are needed once each, and keeps the order.

    Students are loaded when they are first needed; autoencoder and text encoders are loaded once for all of them.
    """

    def __init__(
        self,
        students: int = 1,
        dtype: str = "float32",
        defaults: dict[str, Any] | None = None,
        sha256: dict[str, str] | None = None,
    ):
        """`dtype` is that of the stored students, `defaults` what their pipelines are called with, `sha256` hashes."""
        super().__init__()
        self.register_to_config(students=students, dtype=dtype, defaults=defaults or {}, sha256=sha256 or {})
        self.loaded: dict[int, Any] = {}
        self._placements: list[tuple[Any, Any]] = []
        self._parts: Any = None
        self._partition: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        prompt: Any = None,
        generator: Any = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Pictures of class labels or of prompts, whichever the students were trained on, in the order of the batch.

        A list of generators has one an item. A single one seeds one for each item, so that an item's picture depends on
        its place in the batch and on nothing that happens to the others. All else goes to the students' own pipelines.
        Raises ValueError for conditions of the wrong kind, or a list of generators of another length.
        """
        encoded: dict[str, Tensor] = {}
        if self.partition["kind"] == "class":
            labels = self._items(class_labels, prompt, "class_labels", num_images_per_prompt)
            number, route = len(labels), self.route(labels)
        else:
            texts = self._items(prompt, class_labels, "prompt", num_images_per_prompt)
            encoded = self.encode(texts)
            number, route = len(texts), self.route_vectors(vectors_of(encoded))
        generators = self._generators(generator, number)
        given = {**self.config.defaults, **kwargs, "output_type": output_type}
        pictures: list[Any] = [None] * number
        for student in sorted(set(route)):
            rows = [row for row, each in enumerate(route) if each == student]
            stock = self.student(student)
            asked: dict[str, Any] = {name: value[rows] for name, value in encoded.items()}
            if not encoded:
                asked["class_labels"] = [labels[row] for row in rows]
            if generators:
                asked["generator"] = [generators[row] for row in rows]
            if latents is not None:
                asked["latents"] = latents[rows]
            if "batch_size" in inspect.signature(type(stock).__call__).parameters:
                asked["batch_size"] = len(rows)
            for row, picture in zip(rows, stock(**given, **asked).images):
                pictures[row] = picture
        images = gathered(pictures)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- which student

    @property
    def partition(self) -> dict[str, Any]:
        """What `partition.json` says. Raises ValueError where it is not the one that the students were trained with."""
        if not self._partition:
            found = json.loads(self._path("partition.json").read_text(encoding="utf-8"))
            about = {key: value for key, value in found.items() if key != "sha256"}
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
            if digest != self.config.sha256.get("partition"):
                raise ValueError("partition.json is not that of these students: export them again")
            self._partition = found
        return self._partition

    def route(self, conditions: Any) -> list[int]:
        """The student of each class label, or of each prompt. Raises ValueError for an unknown label."""
        if self.partition["kind"] != "class":
            return self.route_vectors(vectors_of(self.encode(list(conditions))))
        student = {label: k for k, part in enumerate(self.partition["parts"]) for label in part}
        unknown = [label for label in conditions if label not in student]
        if unknown:
            raise ValueError(f"no student knows the class {unknown[0]}; allowed are 0 .. {len(student) - 1}")
        return [student[label] for label in conditions]

    def route_vectors(self, vectors: Tensor) -> list[int]:
        """The student of each embedding, shape (N, dimensions)."""
        directions = torch.tensor(self.partition["directions"], dtype=torch.float64)
        return [walk(self.partition["tree"], row) for row in (vectors.double().cpu() @ directions.T).tolist()]

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Embeddings of prompts, a row each, by the names under which the students' pipelines take them."""
        parts = self._shared()
        known, called = (inspect.signature(each).parameters for each in (parts.encode_prompt, type(parts).__call__))
        given = {"prompt": prompts, "prompt_2": None, "prompt_3": None, "device": self._place(), "num_images_per_prompt": 1}
        given["do_classifier_free_guidance"] = False
        for name in ("max_sequence_length", "complex_human_instruction"):
            if name in called:
                given[name] = called[name].default
        found = parts.encode_prompt(**{name: value for name, value in given.items() if name in known})
        return {name: value for name, value in zip(ENCODINGS[type(parts).__name__], found) if name}

    # ---- the students

    def student(self, number: int) -> Any:
        """The stock pipeline of that student, loaded where it was not yet."""
        if number not in self.loaded:
            shared = self._shared()
            own = {*NETWORKS, "scheduler"}
            parts = {name: part for name, part in shared.components.items() if name not in own}
            self.loaded[number] = self._placed(self._load(number, **parts))
        return self.loaded[number]

    def _shared(self) -> Any:
        """The first student's pipeline without its network: what all of them have in common."""
        if self._parts is None:
            index = json.loads(self._path("student-0/model_index.json").read_text(encoding="utf-8"))
            self._parts = self._placed(self._load(0, **{name: None for name in NETWORKS if name in index}))
        return self._parts

    def _load(self, number: int, **parts: Any) -> Any:
        folder = self._path(f"student-{number}/model_index.json").parent
        kind = getattr(torch, self.config.dtype)
        # trusted already, as this file is: it is the code of networks that diffusers lacks
        stock = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=kind, use_safetensors=True, trust_remote_code=True, **parts
        )
        stock.set_progress_bar_config(disable=True)
        return stock

    def _path(self, name: str) -> Path:
        """A file of the folder; one of a hub repository comes with all that lies beside it."""
        source = self.name_or_path
        if source is None:
            raise ValueError("load this pipeline with DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)")
        if Path(source).is_dir():
            return Path(source) / name
        from huggingface_hub import snapshot_download

        pattern = f"{Path(name).parts[0]}/*" if "/" in name else name
        return Path(snapshot_download(source, allow_patterns=pattern)) / name

    def _placed(self, stock: Any) -> Any:
        for args, kwargs in self._placements:
            stock.to(*args, **kwargs)
        return stock

    def to(self, *args: Any, **kwargs: Any) -> "MultiStudentPipeline":
        """Move or cast every student, those that are not loaded yet as well."""
        self._placements.append((args, kwargs))
        for stock in (*self.loaded.values(), *([self._parts] if self._parts is not None else [])):
            stock.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return self._place()

    def _place(self) -> torch.device:
        return next(iter(self.loaded.values()), self._parts).device if self._parts is not None else torch.device("cpu")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("this pipeline loads its students from its folder: copy that folder instead")

    # ---- arguments

    def _items(self, wanted: Any, other: Any, name: str, each: int) -> list[Any]:
        """The batch as a list, every item `each` times in a row."""
        if wanted is None or other is not None:
            raise ValueError(f"these students were trained on {name}: call with {name}=[...] alone")
        items = wanted.tolist() if isinstance(wanted, Tensor) else wanted
        items = list(items) if isinstance(items, (list, tuple)) else [items]
        return [item for item in items for _ in range(each)]

    def _generators(self, generator: Any, number: int) -> list[torch.Generator]:
        if generator is None:
            return []
        if isinstance(generator, torch.Generator):
            seeds = torch.randint(2**62, (number,), generator=generator, device=generator.device).tolist()
            return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
        if len(generator) != number:
            raise ValueError(f"{len(generator)} generators for {number} pictures: give one a picture, or a single one")
        return list(generator)


def walk(tree: Any, projections: list[float]) -> int:
    """The student at the end of the way: to "low" where the projection on the node's direction is at most its cut."""
    while isinstance(tree, dict):
        tree = tree["low" if projections[tree["direction"]] <= tree["cut"] else "high"]
    return tree


def vectors_of(encoded: dict[str, Tensor]) -> Tensor:
    """One vector a prompt, (N, dimensions): the pooled embedding where there is one, else the mean over unmasked tokens."""
    if "pooled_prompt_embeds" in encoded:
        return encoded["pooled_prompt_embeds"].double()
    tokens = encoded["prompt_embeds"].double()
    if "prompt_attention_mask" not in encoded:
        return tokens.mean(1)
    weight = encoded["prompt_attention_mask"].to(tokens)[..., None]
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


def gathered(pictures: list[Any]) -> Any:
    """Pictures of one batch as a stock pipeline gives them: arrays and tensors stacked, others in a list."""
    if isinstance(pictures[0], Tensor):
        return torch.stack(pictures)
    return np.stack(pictures) if isinstance(pictures[0], np.ndarray) else pictures
