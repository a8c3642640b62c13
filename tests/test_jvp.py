"""Derivatives of real networks along a direction, the continuous times they are taken at, and gradients beside them."""

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from background import CONTEXT, finished
from playing import batch, dit, linear_vp, objective, play
from tiny import edm_pipeline, randomise
from tiny_edm import labels_of, tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onestep import jvp
from onestep.denoiser import Denoiser, body, unwrap
from onestep.jvp import JVP, bare, difference, forward
from onestep.objectives import objective_class
from onestep.objectives.base import Batch
from onestep.prediction import PREDICTIONS, EDMPreconditioned
from onestep.rng import Rng
from onestep.schedule import EDM, VP, LogNoise, RectifiedFlow
from onestep.second_time import KEY, add_second_time, timed
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher

LOG_Q = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
METHODS = ("scm", "meanflow")


# --- continuous times


def test_vp_at_whole_numbers_is_the_table():
    schedule, t = linear_vp(), torch.arange(1000)
    torch.testing.assert_close(schedule.coefficients(t.double()), schedule.coefficients(t), atol=1e-12, rtol=1e-10)
    table = schedule.alphas_cumprod[t]
    assert torch.equal(schedule.coefficients(t)[0], table.sqrt()) and torch.equal(
        schedule.coefficients(t)[1], (1 - table).sqrt()
    )


def test_vp_between_whole_numbers():
    """ln(sigma / alpha) is linear there, and alpha^2 + sigma^2 = 1."""
    schedule = linear_vp()

    def log_q(t: Tensor) -> Tensor:
        alpha, sigma = schedule.coefficients(t)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
        return (sigma / alpha).log()

    t = torch.tensor([0, 3, 500, 998])
    torch.testing.assert_close(log_q(t + 0.25), 0.75 * log_q(t) + 0.25 * log_q(t + 1))


@pytest.mark.parametrize("schedule", [linear_vp(), RectifiedFlow(), EDM()], ids=["vp", "flow", "edm"])
def test_time_at_a_level(schedule):
    """It is the inverse of the schedule, with its derivative both ways, cut to the range."""
    low, high = schedule.log_range()
    # the middle of an index in VP, whose schedule has kinks at them
    inner = [3.37, 402.4, 871.6] if isinstance(schedule, VP) else [0.01, 0.3, 0.9]
    alpha, sigma = schedule.coefficients(torch.tensor(inner, dtype=torch.float64))
    q = (sigma / alpha).requires_grad_()
    t = schedule.time_at(q)
    assert t.is_floating_point()
    torch.testing.assert_close(t, torch.tensor(inner, dtype=torch.float64), atol=1e-9, rtol=1e-12)
    (slope,) = torch.autograd.grad(t.sum(), q)
    h = 1e-6 * q.detach()
    torch.testing.assert_close(
        slope, ((schedule.time_at(q + h) - schedule.time_at(q - h)) / (2 * h)).detach(), rtol=1e-6, atol=0
    )
    along = forward(schedule.time_at, (q.detach(),), (torch.ones(3, dtype=torch.float64),))
    torch.testing.assert_close(along, slope)
    back = forward(lambda t: schedule.coefficients(t)[1] / schedule.coefficients(t)[0], (t.detach(),), (along,))
    torch.testing.assert_close(back, torch.ones_like(back))
    outside = schedule.time_at(torch.tensor([0.0, 1e-30, 1e30, float("inf")], dtype=torch.float64))
    ends = (
        torch.tensor([0.0, 1.0])
        if isinstance(schedule, RectifiedFlow)
        else schedule.time_at(torch.tensor([low, high]).exp())
    )
    torch.testing.assert_close(outside, ends.double().repeat_interleave(2), atol=1e-4, rtol=1e-5)
    drawn = LogNoise(schedule, 0.0, 50.0)(Rng(0, 0, 200))
    slopes = forward(lambda log_q: schedule.time_at(log_q.exp()), (drawn,), (torch.ones_like(drawn),))
    assert low < float(drawn.min()) < float(drawn.max()) < high and bool((slopes > 0).all())


def test_a_schedule_that_ends_at_no_signal():
    """Between the last two indices it is that of diffusers, whose last alphas_cumprod is 2^-24 then."""
    schedule = VP(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    alpha, sigma = schedule.coefficients(torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64))
    assert bool(alpha.isfinite().all()) and float(alpha[2]) == pytest.approx(2.0**-12) and float(alpha[0] / sigma[0]) == 1.0
    assert float(schedule.time_at(torch.tensor([float("inf")], dtype=torch.float64))) == pytest.approx(2.0)
    assert float(schedule.coefficients(torch.tensor([2]))[0]) == 0.0


# --- derivatives


class Double(TorchFunctionMode):
    """Time embeddings are computed in float32 on purpose; finite differences need them in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].double() if func is torch.Tensor.float else func(*args, **(kwargs or {}))


def in_double(denoiser: Denoiser, cond: Any) -> tuple[Denoiser, Any]:
    randomise(denoiser.network, seed=7)
    body(denoiser.network).double()
    denoiser.network.double()
    denoiser.dtype = torch.float64
    return denoiser, {key: value.double() if value.is_floating_point() else value for key, value in cond.items()}


def compare(denoiser: Denoiser, shape: tuple[int, ...], cond: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward-mode derivatives along x and time are those of central differences, and have no graph."""
    monkeypatch.setattr(jvp, "STEP", 1e-6)
    x, dx = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = bare(denoiser)

    def function(x: Tensor, log_q: Tensor) -> Tensor:
        return student(x, student.schedule.time_at(log_q.exp()), cond)

    for time in (0.0, 1.0):  # with the time held still, and along both
        with Double():
            at, along = (x, LOG_Q), (dx, time * torch.ones_like(LOG_Q))
            found, expected = forward(function, at, along), difference(function, at, along)
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=1e-6 * size, rtol=0)
        assert size > 1e-3 and not found.requires_grad


@pytest.mark.parametrize(
    "family, student", [("dit", "full"), ("edm", "full"), ("sana", "full"), ("dit", "lora"), ("sd15", "lora")]
)
def test_forward_is_the_finite_difference(family, student, monkeypatch):
    from test_methods import teacher_of  # here, for processes that are started import this module

    teacher = teacher_of(family)
    teacher.copies = Copies(frozenset({"student"} if student == "lora" else ()), rank=2)
    denoiser, cond = in_double(teacher.copy("student"), teacher.encode(torch.arange(3))[0])
    compare(denoiser, teacher.shape, cond, monkeypatch)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_forward_on_the_networks_of_edm(name, monkeypatch):
    network = tiny(name)
    denoiser, cond = in_double(Denoiser(network, EDM(), EDMPreconditioned()), labels_of(network, 0, 1, 2))
    compare(denoiser, (3, 8, 8), cond, monkeypatch)


def test_forward_with_a_second_time(monkeypatch):
    teacher = dit()
    denoiser = teacher.copy("student")
    add_second_time(denoiser.network)
    denoiser.call = timed(denoiser.call)
    cond = teacher.encode(torch.arange(3))[0] | {KEY: torch.tensor([0.0, 0.2, 0.5])}
    denoiser, cond = in_double(denoiser, cond)
    compare(denoiser, teacher.shape, cond, monkeypatch)
    with_none = bare(denoiser)(
        *(each := (torch.ones(3, 4, 8, 8).double(), torch.full((3,), 5.5))), {**cond, KEY: cond[KEY] * 0}
    )
    assert not torch.allclose(with_none, bare(denoiser)(*each, cond))


def test_nothing_along_is_nothing():
    x = torch.ones(2, 3)
    assert torch.equal(forward(lambda x: torch.zeros(2, 3), (x,), (x,)), torch.zeros(2, 3))


def test_half_precision_weights():
    """Stored in bf16 they give what the same rounded weights do in float32, an adapter's too."""
    teacher, full = dit(), dit()
    half: Any = teacher.denoiser.network.bfloat16()
    full.denoiser.network = copy.deepcopy(half).float()
    for each in (teacher, full):
        each.copies = Copies(frozenset({"student"}), rank=2)
    slopes = []
    for each in (teacher, full):
        student = bare(each.copy("student"))
        randomise(student.network, seed=3)
        cond, _ = each.encode(torch.arange(3))
        x, dx = torch.randn(2, 3, *each.shape, generator=torch.Generator().manual_seed(0))
        slopes.append(forward(lambda x, t, s=student, c=cond: s(x, t, c), (x, LOG_Q + 300), (dx, torch.ones_like(LOG_Q))))
    assert half.dtype == torch.bfloat16 and full.denoiser.network.dtype == torch.float32
    torch.testing.assert_close(*slopes, atol=1e-5 * float(slopes[1].abs().max()), rtol=1e-4)
    assert slopes[0].dtype == torch.float32 and float(slopes[0].abs().max()) > 0.1


def test_under_autocast():
    """Within the precision of bfloat16 of the derivative in full; a finite difference runs without autocast."""
    teacher = dit()
    student, (cond, _) = bare(teacher.copy("student")), teacher.encode(torch.arange(3))
    x, dx = torch.randn(2, 3, *teacher.shape, generator=torch.Generator().manual_seed(0))
    given: Any = (lambda x, t: student(x, t, cond), (x, LOG_Q + 300), (dx, torch.ones_like(LOG_Q)))
    plain = {name: way(*given) for name, way in JVP.items()}
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: way(*given) for name, way in JVP.items()}
    assert torch.equal(half["difference"], plain["difference"])
    error = (half["forward"] - plain["forward"]).norm() / plain["forward"].norm()
    assert 0 < float(error) < 0.05
    torch.testing.assert_close(
        plain["difference"], plain["forward"], atol=0.01 * float(plain["forward"].abs().max()), rtol=0
    )


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def test_an_operation_without_a_forward_derivative_is_named(monkeypatch):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"custom autograd.Function.*--jvp difference"):
        forward(NoForward.apply, (x,), (x,))
    torch.testing.assert_close(difference(NoForward.apply, (x,), (x,)), 2 * x, atol=1e-3, rtol=0)
    with pytest.raises(RuntimeError, match="shape"):  # an error of another kind stays what it is
        forward(lambda x: x.view(5), (x,), (x,))
    # fused attention is such an operation: without the plain one, none of these networks could be differentiated
    monkeypatch.setattr(jvp, "sdpa_kernel", lambda *args: contextlib.nullcontext())
    teacher = dit()
    student, (cond, _) = bare(teacher.copy("student")), teacher.encode(torch.arange(2))
    x = torch.ones(2, *teacher.shape)
    with pytest.raises(ValueError, match="--jvp difference"):
        forward(lambda x: student(x, torch.tensor([3.5, 400.5]), cond), (x,), (x,))


# --- gradients beside them


def gradients(method: Any) -> list[Tensor]:
    found = [p.grad for p in unwrap(method.generator.denoiser.network).parameters()]
    return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(name, lora):
    """Nor does it recompute with the second time of another pass."""
    results = []
    for checkpointing in (False, True):
        teacher = dit()
        teacher.copies = Copies(frozenset({"student"} if lora else ()), rank=2, checkpointing=checkpointing)
        method = objective(objective_class(name), teacher, guidance=1.5)
        randomise(method.generator.denoiser.network, seed=3)
        passes = []
        block: Any = teacher.denoiser.network if lora else method.generator.denoiser.network
        block.transformer_blocks[0].register_forward_pre_hook(lambda *args, p=passes: p.append(None))
        play(method, 5, batch(teacher, size=3))
        results.append((gradients(method), len(passes)))
    (plain, few), (again, more) = results
    assert more == few + 1 and plain
    largest = max(float(each.abs().max()) for each in plain)
    for ours, theirs in zip(plain, again, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-6 * largest, rtol=1e-4)


def part(name: str, start: int, stop: int, wrapped: bool) -> list[Tensor]:
    """Gradients of one step on some rows of a batch of four."""
    teacher: Teacher = EDMTeacher(edm_pipeline(), Facts("x"))
    method = objective(objective_class(name), teacher)
    randomise(method.generator.denoiser.network, seed=3)
    if wrapped:
        method.generator.denoiser.network = nn.parallel.DistributedDataParallel(method.generator.denoiser.network)
    whole = batch(teacher, 5, 4)
    assert whole.real is not None
    item = Batch(whole.conditions[start:stop], whole.real[start:stop], Rng(11, 5, 4, start, stop))
    play(method, 5, item)
    return gradients(method)


def rank(index: int, store: str, folder: str) -> None:
    """One of two processes: its gradients, which both share."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=index, world_size=2)
    torch.save([part(name, 2 * index, 2 * index + 2, True) for name in METHODS], f"{folder}/{index}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path):
    """The derivative goes past the distributed wrapper, the gradient through it: both have that of the whole batch."""
    runs = [CONTEXT.Process(target=rank, args=(i, str(tmp_path / "store"), str(tmp_path))) for i in range(2)]
    for run in runs:
        run.start()
    expected = [part(name, 0, 4, False) for name in METHODS]
    assert [finished(run) for run in runs] == [0, 0]
    halves = [part(METHODS[0], 2 * i, 2 * i + 2, False) for i in range(2)]
    for index in range(2):
        found = torch.load(tmp_path / f"{index}.pt")
        for ours, theirs in zip(expected, found):
            largest = max(float(each.abs().max()) for each in ours)
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5 * largest, rtol=1e-4)
        # what each process would have had alone is something else
        assert any(
            not torch.allclose(a, b, rtol=0.05, atol=0.05 * float(b.abs().max())) for a, b in zip(halves[index], found[0])
        )


def test_bare_is_the_same_denoiser():
    teacher = dit()
    student = teacher.copy("student")
    (cond, _), x = teacher.encode(torch.arange(2)), torch.ones(2, *teacher.shape)
    twin = copy.copy(bare(student))
    assert torch.equal(twin(x, torch.tensor([3, 400]), cond), student(x, torch.tensor([3, 400]), cond))
    assert twin.prediction is PREDICTIONS["epsilon"] and twin.network is student.network


@pytest.mark.parametrize("schedule", [EDM(), linear_vp(), RectifiedFlow()], ids=["edm", "vp", "flow"])
def test_the_level_of_a_time(schedule):
    law = LogNoise(schedule)
    assert law.level(schedule.at_rho(5.0)) == pytest.approx(math.log(5), abs=0.01)  # of the nearest index
    assert law.level(schedule.grid(1)[0]) == pytest.approx(law.high, abs=1e-6)


@pytest.mark.parametrize("k", [1.0, 40.0, math.pi / 0.05])
def test_a_larger_step_averages_finer_structure_out(k: float) -> None:
    """(sin k(x + h) - sin k(x - h)) / 2h = cos(kx) sin(kh) / h: the derivative times sinc(kh), which is 0 for kh = pi."""
    x = torch.linspace(0, 3, 7, dtype=torch.float64)
    found = difference(lambda x: (k * x).sin(), (x,), (torch.ones_like(x),), 0.05)
    torch.testing.assert_close(found, (k * x).cos() * math.sin(0.05 * k) / 0.05, atol=1e-12, rtol=0)
    assert bool((found.abs() < 1e-10).all()) == (k > 50)


@pytest.mark.parametrize("method", METHODS)
def test_methods_pass_their_step_on(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    monkeypatch.setitem(JVP, "difference", lambda f, at, along, step: steps.append(step) or difference(f, at, along, step))
    teacher = dit()
    for options in ({}, {"jvp_step": 0.05}):
        made = objective(objective_class(method), teacher, jvp="difference", **options)
        play(made, 0, batch(teacher))
    assert steps == [jvp.STEP, 0.05]
