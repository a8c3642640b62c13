"""Every method on every family of teachers, on tiny random networks of the very classes, and with adapters."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import batch, objective
from tiny import dit_pipeline, edm_pipeline, randomise
from tiny_text import PIPELINES

from onestep.denoiser import unwrap
from onestep.methods import METHODS as ALL
from onestep.objectives import Objective, objective_class
from onestep.teacher import Copies, DiTTeacher, EDMTeacher, Facts, Teacher, family_named
from onestep.teacher.text import TextTeacher

METHODS = [name for name in ALL if name != "regression"]  # which asks the teacher for pairs, and no more
FAMILIES = ["dit", "edm", *PIPELINES]
FROM_PAIRS = {name: {"pairs": 3, "pair_steps": 2} for name in ("kd", "hipa", "instaflow")}
OPTIONS: dict[str, dict[str, Any]] = {"dmd": {"regression": 0.0}, "disback": {"backtrack": 0}, **FROM_PAIRS}
NEED_NULL = ("swiftbrush", "snoopi", "agd")


def teacher_of(family: str) -> Teacher:
    if family == "dit":
        return DiTTeacher(dit_pipeline(), Facts("x"))
    if family == "edm":
        return EDMTeacher(edm_pipeline(), Facts("x"))
    pipeline = PIPELINES[family]()
    kind = family_named(type(pipeline).__name__)
    side = 32 if family == "sana" else 16
    teacher = kind(pipeline, Facts("", embedded_guidance=2.0), side if kind.any_resolution else None)
    if isinstance(teacher, TextTeacher):
        teacher.use_texts(["a cat", "two dogs in the rain", "a red boat"])
    return teacher


shared = cache(teacher_of)


def made(method: str, teacher: Teacher) -> Objective:
    given = dict(OPTIONS.get(method, {}))
    if method == "sfd":
        given |= {"forget": "cat" if teacher.conditioned_by == "text" else "0", "override": "random"}
    schedule = teacher.denoiser.schedule
    times = [schedule.grid(1)[0]]
    if method == "agd":
        given |= {"trajectories": 2, "trajectory_steps": 2, "trajectory_points": 2, "hidden": 8}
    folder = Path(os.environ["ONESTEP_CACHE"])  # of these tests
    return objective(objective_class(method), teacher, folder, 1.0, times, **given)


def check(method: str, teacher: Teacher) -> None:
    """One step: finite losses, a gradient for every player, none for the teacher."""
    play = made(method, teacher)
    for member in play.players().get("critic", ()):  # a critic that is the teacher moves nobody
        randomise(unwrap(member.network), seed=5)
    if method == "score-matching":  # nor has a student that is the teacher anything to learn
        randomise(unwrap(play.generator.denoiser.network), seed=5)
    moved = set()
    for player, loss in play.step(batch(teacher, size=3), 0):
        assert bool(loss.isfinite()), player
        loss.backward()
        networks = [unwrap(member.network) for member in play.players()[player]]
        gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
        assert gradients and all(bool(g.isfinite().all()) for g in gradients), player
        assert any(bool(g.any()) for g in gradients), player
        moved.add(player)
    assert moved == set(play.players())
    trained = {id(p) for members in play.players().values() for m in members for p in unwrap(m.network).parameters()}
    assert all(p.grad is None for p in teacher.denoiser.network.parameters() if id(p) not in trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_on_every_family(method: str, family: str) -> None:
    teacher = shared(family)
    if method in NEED_NULL and teacher.encode(torch.zeros(1, dtype=torch.long))[1] is None:
        with pytest.raises(ValueError, match="uncond"):
            check(method, teacher)
        return
    if method == "agd" and family.startswith("flux"):
        with pytest.raises(ValueError, match="no guidance adapters are known"):
            check(method, teacher)
        return
    if method == "sfd" and teacher.classes < 2:
        with pytest.raises(ValueError, match="forgets one of several"):
            check(method, teacher)
        return
    check(method, teacher)


@pytest.mark.parametrize("family", ["dit", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_with_adapters(method: str, family: str) -> None:
    teacher = teacher_of(family)
    teacher.copies = Copies(frozenset({"student", "critic"}), rank=2)
    check(method, teacher)
