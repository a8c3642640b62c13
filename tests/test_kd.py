"""Knowledge distillation against closed forms, and the cache of pairs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Affine, Calls, ClosedFormTeacher, Gaussian, denoiser
from playing import batch, dit, linear_vp, objective, play, zeros
from torch import Tensor

from onestep.config import resolve
from onestep.data import PairCache
from onestep.generator import Generator
from onestep.objectives import regression
from onestep.objectives.base import Batch
from onestep.objectives.kd import KD
from onestep.rng import Rng
from onestep.schedule import EDM, RectifiedFlow

MEAN, STD = 1.3, 0.7


class Given:
    """PairCache's interface with the given pairs, all of them in each batch."""

    def __init__(self, z: Tensor, y: Tensor):
        self.z, self.y = z, y

    def draw(self, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        return self.z, self.y, zeros(len(self.z))


@pytest.mark.parametrize("schedule", [EDM(0.02, 20.0), RectifiedFlow(), linear_vp()], ids=lambda s: type(s).__name__)
def test_the_minimiser_is_the_samplers_map(schedule, monkeypatch):
    """Of a Gaussian, mu + s / sqrt(v_T) (x_T - alpha_T mu); the teacher's own estimate there hardly has a slope."""
    teacher = ClosedFormTeacher(Gaussian(schedule, "sample", MEAN, STD))
    z = torch.tensor([[-1.5], [0.2], [1.3]], dtype=torch.float64)
    steps = 1000 if schedule.grid(1) == [999] else 2000
    y = teacher.sample(z, {}, None, 1.0, steps)
    monkeypatch.setattr(regression, "PairCache", lambda *args, **kwargs: Given(z, y))
    top = schedule.grid(1)[0]
    method = objective(KD, teacher, times=[top])
    student = Affine(schedule, "sample")
    method.generator = Generator(denoiser(student), [top], schedule.init_sigma)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ((_, loss),) = method.step(Batch(zeros(3), None, None), 0)  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimizer.step(closure)
    alpha, sigma = (float(c) for c in schedule.coefficients(torch.tensor([top])))
    slope = STD / math.sqrt(alpha**2 * STD**2 + sigma**2)
    assert float(student.gain) == pytest.approx(slope, rel=5e-3)
    assert float(student.bias) == pytest.approx((1 - alpha * slope) * MEAN, rel=5e-3)
    own = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    assert own < slope / 10


def test_a_step(tmp_path: Path):
    """One pass of the student with a gradient, none of the teacher; the loss is the squared error of the very pairs."""
    teacher = dit()
    method = objective(KD, teacher, tmp_path, times=[999], pairs=6, pair_steps=3)
    student, real = Calls(method.generator.denoiser.network), Calls(teacher.denoiser.network)
    assert play(method, 0, batch(teacher, real=False)) == ["generator"]
    assert (student.passes, real.passes) == (1, 0) and all(p.grad is None for p in teacher.denoiser.network.parameters())
    z, y, conditions = method.pairs.draw(batch(teacher, real=False).rng)
    x = method.generator(z, teacher.encode(conditions)[0])
    assert float((x - y).square().mean()) == pytest.approx(float(method.log["regression"]), rel=1e-6)
    cond, uncond = teacher.encode(conditions)
    assert torch.allclose(y, teacher.sample(z, cond, uncond, 1.0, 3), rtol=1e-3, atol=1e-3)


def test_options():
    train, options = resolve(KD.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho is None and options.distance == "l2" and not KD.uses_real(options)
    train, options = resolve(regression.Regression.Config, {"init_rho": 2.5}, {}, {})
    assert train.init_rho == 2.5 and options.distance == "pseudo-huber"


def test_a_chain_is_refused_before_pairs_are_made(tmp_path: Path):
    with pytest.raises(ValueError, match="KD would train the first of 2 student steps alone; type --student-steps 1"):
        objective(KD, dit(), tmp_path, times=[999, 499])
    assert not list(tmp_path.iterdir())


# --- the cache


class Killed(Exception):
    pass


def test_making_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch, capsys):
    """The complete shards stay; the size is printed before the first sample; another seed has other pairs."""
    teacher, made, kill = dit(), [], [256]
    make = PairCache._make

    def killed(self: Any, start: int, stop: int) -> Any:
        made.append(start)
        if start in kill:
            kill.remove(start)
            raise Killed
        return make(self, start, stop)

    monkeypatch.setattr(PairCache, "_make", killed)
    with pytest.raises(Killed):
        PairCache(tmp_path, teacher, 600, 1, 1.0, half=True)
    size = 600 * (256 * 6 + 8)
    said = capsys.readouterr().out
    assert said == f"600 pairs, {size / 1e6:,.1f} MB in {next(tmp_path.iterdir())}\n"
    again = PairCache(tmp_path, teacher, 600, 1, 1.0, half=True)
    assert made == [0, 256, 256, 512]
    once = PairCache(tmp_path / "other", teacher, 600, 1, 1.0, half=True)
    everything = torch.arange(600)
    assert all(torch.equal(again.rows[everything][k], v) for k, v in once.rows[everything].items())
    made.clear()
    PairCache(tmp_path, teacher, 600, 1, 1.0, half=True)
    assert made == []
    PairCache(tmp_path, teacher, 600, 1, 1.0, half=True, seed=1)
    assert made == [0, 256, 512]


def test_samples_of_a_network_in_training_are_known_by_a_note(tmp_path: Path):
    """With `now` its weights of this moment are the key and noted; later the note is, whatever has become of them."""
    teacher, note = dit(), tmp_path / "note.json"
    given: dict[str, Any] = {"folder": tmp_path, "teacher": teacher, "count": 4, "steps": 1, "guidance": 1.0, "note": note}
    with pytest.raises(ValueError, match=r"note\.json, which this run has written, cannot be read.*--restart"):
        PairCache(**given, now=False)
    first = PairCache(**given)
    for parameter in teacher.denoiser.network.parameters():
        parameter.data += 0.01
    later = PairCache(**given, now=False)
    assert later.rows.folder == first.rows.folder
    assert PairCache(**given).rows.folder != first.rows.folder
    (later.rows.folder / "index.json").unlink()
    note.write_text('{"weights": "0"}')
    with pytest.raises(ValueError, match="are not there: type --restart"):
        PairCache(**given, now=False)
    note.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        PairCache(**given, now=False)
