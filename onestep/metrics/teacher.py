"""A teacher scored by the protocol that scores its students, sampled as distillation sees it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..teacher import Teacher
from .frechet import frechet_distance
from .protocol import Comparison, Protocol, checked_count
from .provenance import provenance
from .score import score


def evaluate_teacher(
    teacher: Teacher,
    protocol: Protocol,
    *,
    steps: int,
    guidance: float,
    sampler: str = "ddim",
    init_rho: float | None = None,
    count: int | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """The JSON-able row of `teacher.sample`: the deterministic sampler that pairs and grids are made by.

    With `init_rho` it starts there, from noise alone: what a student that starts there can learn at best.

    An embedded folder's stock pipeline need not sample its teacher well: a scheduler made for students adds noise at each of
    many steps, which is no solver of the teacher's equation. Image i has class i mod classes and the noise of seed
    first_seed + i. Raises ValueError for a number of images that the protocol does not allow.
    """
    count = checked_count(count, protocol)
    tools = protocol.instruments(None, None, teacher.device)
    compared = Comparison(protocol, tools.network)
    conditions = [i % protocol.classes for i in range(count)]

    @torch.no_grad()
    def images() -> Iterator[Tensor]:
        for start in range(0, count, batch_size):
            part = range(start, min(count, start + batch_size))
            draws = [torch.Generator().manual_seed(protocol.first_seed + i) for i in part]
            z = torch.cat([torch.randn(1, *teacher.shape, generator=draw) for draw in draws]).to(teacher.device)
            given = teacher.encode(torch.tensor([conditions[i] for i in part], device=teacher.device))
            yield teacher.to_images(teacher.sample(z, *given, guidance, steps, sampler, init_rho)).float().cpu()

    fake, accuracy = score(images(), conditions, tools.network, protocol, compared.fake)
    proxy = "" if count == protocol.count else "_proxy"
    return {
        "protocol": protocol.details() | {"manifold": compared.details},
        "teacher": teacher.facts.source.rsplit("/", 1)[-1],
        protocol.metric + proxy: frechet_distance(fake, tools.real),
        "class_accuracy": accuracy,
        **{name + proxy: value for name, value in compared.scores().items()},
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        **({} if init_rho is None else {"init_rho": init_rho}),
        "count": count,
        **provenance(teacher.device),
    }
