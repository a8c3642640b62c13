"""A student of AGD as a folder: the base as it was, the adapters beside it, and the pipeline that samples with them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from .card import LICENCES, Card
from .denoiser import body, unwrap
from .exporting import replacing, save_stock, stored_network
from .guided import Guided, count
from .guided_sampler import GuidedSampler
from .guided_strength import Strength
from .pipelines import adapter_guidance
from .pipelines.adapter_guidance import SUBFOLDER, attached
from .quiet import quiet
from .teacher import Teacher
from .teacher.text import TextTeacher
from .verify import SEEDS, TOLERANCE, check_weights, stock_pictures

PIPELINE = "adapter_guidance"
"""Name of the module in an export, as custom_pipeline is told. diffusers runs all files of one name in one module of its
own, so that two kinds of pipelines in files of one name would get in each other's way."""
CHECKED_STEPS = 2


def export_guided(generator: GuidedSampler, teacher: Teacher, folder: Path, dtype: torch.dtype, card: Card) -> str:
    """Write base, adapters and adapter_guidance.py to `folder`, check them, and return the lines of Python that use them.

    Stock classes load the folder as the base that it is. An earlier export there is replaced once the new one is complete.
    Raises RuntimeError where the reloaded folder is not the student, ValueError where it cannot be written.
    """
    student = unwrap(generator.denoiser.network)
    assert isinstance(student, Guided)
    base, adapter = stored_network(body(student), dtype), student.adapter
    try:
        with replacing(folder) as scratch:
            adapter.save_pretrained(scratch / SUBFOLDER)
            save_stock(base, teacher, teacher.pipeline.scheduler, dtype, scratch)
            shutil.copyfile(adapter_guidance.__file__, scratch / f"{PIPELINE}.py")
            code = snippet(teacher, folder.resolve().name, len(generator.times), card.guidance)
            (scratch / "README.md").write_text(card_text(card, student, teacher, folder, code), encoding="utf-8")
            verify(scratch, student, base, teacher, card.guidance)
    except OSError as error:
        raise ValueError(
            f"the export cannot be written to {folder}: {error.strerror or error}; name a folder that is writable"
        ) from error
    return snippet(teacher, str(folder), len(generator.times), card.guidance)


def snippet(teacher: Teacher, folder: str, steps: int, guidance: float) -> str:
    """Python that loads the folder with its pipeline, makes pictures and saves one of them."""
    given = teacher.example_arguments(4) | {"guidance_scale": guidance, "num_inference_steps": steps}
    asked = ", ".join(f"{key}={value!r}" for key, value in given.items())
    name = json.dumps(folder)
    return "\n".join(
        (
            "import torch",
            "from diffusers import DiffusionPipeline",
            f"pipe = DiffusionPipeline.from_pretrained({name}, custom_pipeline={PIPELINE!r}, trust_remote_code=True)",
            f"images = pipe({asked}, generator=torch.Generator().manual_seed(0)).images",
            'images[0].save("picture.png")',
        )
    )


def card_text(card: Card, student: Guided, teacher: Teacher, folder: Path, code: str) -> str:
    """README.md of the folder."""
    identifier = card.licence.split(";")[0].strip().lower()
    licence = {"license": identifier} if identifier in LICENCES else {"license": "other", "license_name": card.licence}
    front = {**licence, "library_name": "diffusers", "tags": ["diffusion", "distillation", "guidance", card.method]}
    about: Any = student.adapter.config
    low, high = Strength(about.strength, about.tilt).ends
    config = yaml.safe_dump(dict(card.config), sort_keys=False)
    own = f"{count(student.adapter):,} parameters, {count(student.adapter) / count(student.base):.2%} of the network's"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {folder.resolve().name}

{card.teacher} with guidance adapters: `guidance_scale` costs one pass of the network a step, where classifier-free guidance
takes two. It is no few-step generator: sample it with as many steps as the teacher.

```python
{code}
```

| | |
|---|---|
| Teacher | {card.teacher}, its weights unchanged; stock {about.pipeline} loads this folder as that |
| Licence of the teacher | {card.licence} |
| Adapters | {about.kind}, width {about.hidden}, {own}; in `{SUBFOLDER}/` |
| Guidance | {about.low:g} to {about.high:g}, in `uncond + guidance * (cond - uncond)`; beyond, they extrapolate |
| Strength | {low:.4g} to {high:.4g} over it, a factor of the adapters |
| Another checkpoint of this base | `pipe.load_adapter(FOLDER)` with this folder |

Trained with

```bash
{card.command}
```

<details><summary>Every training option</summary>

```yaml
{config}```

</details>
"""


def verify(folder: Path, student: Guided, base: nn.Module, teacher: Teacher, guidance: float) -> None:
    """Compare the folder, reloaded by plain diffusers, with the student: all weights, and pictures of two steps.

    The pictures are those of the stock pipeline around the stored base, with the student's own adapters attached.
    Raises RuntimeError where they are not the same.
    """
    from diffusers import DiffusionPipeline

    asked = guidance if guidance != 1 else 2.0  # 1 runs no adapters
    with quiet():
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(folder),
            custom_pipeline=PIPELINE,
            trust_remote_code=True,
            torch_dtype=torch.float32,
            local_files_only=True,
        )
        pipe.set_progress_bar_config(disable=True)
        check_weights(base, pipe.network)
        check_weights(student.adapter, pipe.adapter)
        stock = pipe.stock
        stock.set_progress_bar_config(disable=True)
        stored = type(teacher)(stock, teacher.facts, teacher.resolution)
        if isinstance(stored, TextTeacher):
            stored.use_texts(stored.prompts)
        found = stock_pictures(lambda **given: pipe(**given | {"guidance_scale": asked}), stored, CHECKED_STEPS, SEEDS)
        with attached(pipe.network, copy.deepcopy(student.adapter).to("cpu"), torch.tensor([asked])):
            wanted = stock_pictures(stock, stored, CHECKED_STEPS, SEEDS)  # which asks for no guidance of its own
    error = float((found - wanted).abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"the exported folder deviates from the student by {error:.3g}, so it is dropped")
