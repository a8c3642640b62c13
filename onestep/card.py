"""The model card of an exported folder, and the lines of Python that use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from .denoiser import body
from .files import replaced
from .generator import Generator, part_of
from .saved import SCORE
from .teacher import Teacher
from .verify import HALF_TOLERANCE, SEEDS, is_large, takes_guidance, tolerance_of

LORA_NAME = "pytorch_lora_weights.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "openrail++", "unknown"}
"""Values that the front matter of a model card may name; anything else is "other"."""


@dataclass(frozen=True)
class Card:
    """What the model card says beside what the export itself knows."""

    method: str
    teacher: str
    guidance: float
    """The teacher's, in out = uncond + guidance * (cond - uncond)."""
    licence: str
    """The teacher's."""
    config: Mapping[str, Any]
    """Every resolved training option."""
    score: Mapping[str, Any] | None = None
    """A row of `onestep.metrics.evaluate`."""
    command: str = ""
    """What was typed to train it."""


def snippet(
    teacher: Teacher,
    folder: str | Path,
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
    guidance: float | None = None,
) -> str:
    """Five lines of Python that load an export of a student of `teacher`, make pictures and save one of them.

    `guidance` is that of a student which takes it as an input.
    """
    pipeline = type(teacher.pipeline).__name__
    kind = "" if dtype == torch.float32 else f", torch_dtype={dtype}"
    trust = ", trust_remote_code=True" if teacher.remote_code else ""  # its network is a file in the folder
    return "\n".join(
        (
            "import torch",
            f"from diffusers import {pipeline}",
            f"pipe = {pipeline}.from_pretrained({json.dumps(str(folder))}{kind}{trust})",
            *_pictures(teacher, steps, guidance),
        )
    )


def lora_snippet(teacher: Teacher, folder: str | Path, generator: Generator) -> str:
    """The same for an adapter and its scheduler beside the teacher's own folder."""
    pipeline, scheduler = type(teacher.pipeline).__name__, json.loads((Path(folder) / SCHEDULER).read_text())["_class_name"]
    return "\n".join(
        (
            "import torch",
            f"from diffusers import {pipeline}, {scheduler}",
            f"pipe = {pipeline}.from_pretrained({json.dumps(teacher.facts.source)})",
            f"pipe.load_lora_weights({json.dumps(str(folder))}, weight_name={json.dumps(LORA_NAME)})",
            f'pipe.scheduler = {scheduler}.from_pretrained({json.dumps(str(folder))}, subfolder="scheduler")',
            *_pictures(teacher, len(generator.times)),
        )
    )


def _pictures(teacher: Teacher, steps: int, guidance: float | None = None) -> tuple[str, str]:
    asked = {} if guidance is None else {"guidance_scale": guidance}
    given = [f"{key}={value!r}" for key, value in (teacher.example_arguments(4) | asked).items()]
    given += [f"num_inference_steps={steps}", "generator=torch.Generator().manual_seed(0)"]
    return f"images = pipe({', '.join(given)}).images", 'images[0].save("picture.png")'


def asked_guidance(generator: Generator, guidance: float) -> float | None:
    """`guidance` where the student takes it as an input, else None."""
    return guidance if takes_guidance(generator.denoiser.network) else None


def card_text(
    card: Card, generator: Generator, teacher: Teacher, name: str, dtype: torch.dtype, counts: Sequence[int]
) -> str:
    """README.md of the folder; `counts` are the numbers of steps that are compared before it is kept."""
    identifier = card.licence.split(";")[0].strip().lower()
    known = identifier in LICENCES
    licence = {"license": identifier} if known else {"license": "other", "license_name": card.licence}
    front = {**licence, "library_name": "diffusers", "tags": ["diffusion", "distillation", "one-step", card.method]}
    steps, asked = len(generator.times), asked_guidance(generator, card.guidance)
    config = yaml.safe_dump(dict(card.config), sort_keys=False)
    trained = f"\nTrained with\n\n```bash\n{card.command}\n```\n" if card.command else ""
    built_in = "an input: `guidance_scale`, in a single pass" if asked else "built in; do not add any"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

{card.teacher}, distilled with {card.method} into a generator of {steps} network call{"s" * (steps > 1)} an image.

```python
{snippet(teacher, name, steps, dtype, asked)}
```

| | |
|---|---|
| Teacher | {card.teacher}, guidance {card.guidance:g} (`uncond + guidance * (cond - uncond)`) |
| Licence of the teacher | {card.licence} |
| Method | {card.method} |
| Steps | {_steps_text(card, generator, counts)} |
| Compared with the generator | {_compared_text(generator, counts, dtype)} |
| Guidance | {built_in} |
| Weights | {str(dtype).removeprefix("torch.")} |

## Score

{_score_text(card.score)}{trained}
<details><summary>Every training option</summary>

```yaml
{config}```

</details>
"""


def _steps_text(card: Card, generator: Generator, counts: Sequence[int]) -> str:
    """Which values `num_inference_steps` may have, and the times that each visits."""
    steps = len(generator.times)
    lines = [f"{count}, at {', '.join(f'{t:g}' for t in part_of(generator.times, count))}" for count in reversed(counts)]
    trained = card.config.get("student_steps", steps)
    note = f"; trained with student_steps {trained}" if trained != steps else ""
    return "; or ".join(lines) + f"{note}; other numbers of steps visit other times"


def _compared_text(generator: Generator, counts: Sequence[int], dtype: torch.dtype) -> str:
    """How `onestep.verify` compares an export of that dtype."""
    half, large = dtype != torch.float32, is_large(body(generator.denoiser.network))
    pictures = f"{1 if large else len(SEEDS)} picture{'s' * (not large)}"
    arithmetic = "in float32 arithmetic " * half
    run = f"; as it is run, by {HALF_TOLERANCE:g} on average at most" if half and not large else ""
    return (
        f"{pictures} at num_inference_steps {', '.join(map(str, reversed(counts)))}, reloaded by diffusers: {arithmetic}no "
        f"pixel in [0, 1] deviates by more than {tolerance_of(generator):.2g} or than rounding x0 alone makes it{run}"
    )


def _score_text(row: Mapping[str, Any] | None) -> str:
    """The card's score between its marks: one line an entry of the row, nested entries as JSON."""
    if row is None:
        return "not scored\n".join(SCORE)
    # the path that the export had while it was scored says nothing to its users
    shown = {key: value for key, value in row.items() if key != "export"}
    lines = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |\n" for key, value in shown.items()]
    return ("| | |\n|---|---|\n" + "".join(lines)).join(SCORE)


def update_score(folder: Path, row: Mapping[str, Any]) -> None:
    """Put a row of `onestep.metrics.evaluate` into the card of an exported folder; the file is replaced in one move.

    Raises ValueError where the folder has no such card.
    """
    path, (opening, closing) = folder / "README.md", SCORE
    try:
        before, _, rest = path.read_text(encoding="utf-8").partition(opening)
        _, mark, after = rest.partition(closing)
        if not mark:
            raise ValueError(f"{path} has no score to replace; export the folder again")
        with replaced(path) as partial:
            partial.write_text(before + _score_text(row) + after, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be rewritten: {error.strerror}; name a complete, writable export") from error
