"""HiPA against closed forms: spectra and edges of waves, what a low-rank adapter reaches, its start, its weights."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import Calls
from playing import batch, dit, objective, play
from tiny import edm_pipeline, randomise
from torch import Tensor, nn

from onestep.config import resolve
from onestep.denoiser import unwrap
from onestep.highpass import edge_distance, edges, high_pass, spectral_distance, spectrum
from onestep.lora import Adapter, merge
from onestep.objectives.hipa import HiPA
from onestep.objectives.regression import Regression, dists_on
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher

N, A, CUTOFF = 32, 0.3, 6


def wave(k: int, along: int = 3) -> Tensor:
    """A cos(2 pi k n / N) along one axis, shape (1, 2, N, N)."""
    n = torch.arange(N, dtype=torch.float64)
    line = A * (2 * math.pi * k * n / N).cos()
    return (line[:, None] if along == 2 else line).expand(1, 2, N, N).clone()


def noise(seed: int) -> Tensor:
    return torch.randn(2, 3, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Fourier


@pytest.mark.parametrize("along", [2, 3])
@pytest.mark.parametrize("k, golden", [(3, 0.0), (CUTOFF, 0.045), (9, 0.045)])
def test_a_wave_passes_whole_or_not_at_all(k, golden, along):
    """A^2 / 2 from the cutoff on, in space and, by Parseval, in the spectrum; golden: A = .3."""
    x, y = noise(1)[:1, :2], None
    y = x + wave(k, along)
    assert float(high_pass(y - x, CUTOFF, "hard").square().mean()) == pytest.approx(golden, abs=1e-12)
    assert float(spectral_distance(y, x, CUTOFF, "hard")) == pytest.approx(golden, abs=1e-12)
    assert A**2 / 2 == 0.045


@pytest.mark.parametrize("mask", ["hard", "gaussian"])
def test_the_high_pass_is_self_adjoint(mask):
    a, b = noise(1), noise(2)
    once = high_pass(a, CUTOFF, mask)
    assert float((once * b).sum()) == pytest.approx(float((a * high_pass(b, CUTOFF, mask)).sum()), rel=1e-10)
    assert float(spectrum(a, CUTOFF, mask).abs().square().mean()) == pytest.approx(float(once.square().mean()), rel=1e-12)
    twice = high_pass(once, CUTOFF, mask)
    assert torch.allclose(twice, once, atol=1e-12) == (mask == "hard")  # only that one is a projection


def test_the_smooth_mask_rises_from_nothing():
    """1 - exp(-k^2 / (2 cutoff^2)): nothing of the mean, 1 - e^(-1/2) of the amplitude at the cutoff."""
    assert float(spectral_distance(torch.ones(1, 1, N, N).double(), torch.zeros(1, 1, N, N).double(), CUTOFF)) < 1e-28
    kept = 1 - math.exp(-0.5)
    assert torch.allclose(high_pass(wave(CUTOFF), CUTOFF), kept * wave(CUTOFF), atol=1e-12)


def test_low_frequencies_get_no_gradient():
    """d L / dx has no part below the cutoff: a change of low frequency alone is not seen; the loss of edges sees it."""
    x, y = noise(1).requires_grad_(), noise(2)
    (gradient,) = torch.autograd.grad(spectral_distance(x, y, CUTOFF, "hard"), x)
    low = noise(3) - high_pass(noise(3), CUTOFF, "hard")
    assert abs(float((gradient * low).sum())) < 1e-14 < 1e-3 < float(gradient.norm())
    (gradient,) = torch.autograd.grad(edge_distance(x, y), x)
    assert abs(float((gradient * low).sum())) > 1e-3


def test_not_square():
    x = torch.randn(1, 1, 8, 16, dtype=torch.float64)
    n = torch.arange(16, dtype=torch.float64)
    x = A * (2 * math.pi * 3 * n / 16).cos().expand(1, 1, 8, 16)
    assert float(spectrum(x, 3, "hard").abs().square().mean()) == pytest.approx(0.045)
    assert float(spectrum(x, 3.5, "hard").abs().square().mean()) == pytest.approx(0, abs=1e-12)
    assert edges(x).shape == (2, 1, 1, 8, 16)


# --- edges


@pytest.mark.parametrize("along", [2, 3])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_edges_of_a_wave(k, along):
    """32 A^2 sin^2(2 pi k / N) on a circle, all of it in the derivative along the wave."""
    want = 32 * A**2 * math.sin(2 * math.pi * k / N) ** 2
    assert float(edge_distance(wave(k, along), torch.zeros_like(wave(k)), "circular")) == pytest.approx(want, abs=1e-12)
    along_w, along_h = edges(wave(k, along), "circular")
    assert float((along_h if along == 3 else along_w).abs().max()) < 1e-12
    if k == 5:
        assert want == pytest.approx(1.991064, abs=1e-6)


def test_a_picture_has_no_edge_at_its_border():
    flat = torch.ones(1, 1, 8, 8).double()
    assert float(edges(flat).abs().max()) == 0 and float(edges(flat, "constant").abs().max()) > 0
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert edges(ramp)[0, 0, 0, 3].tolist() == [4.0, *[8.0] * 6, 4.0] and float(edges(ramp)[1].abs().max()) == 0


def test_half_precision_is_computed_in_float32():
    x = noise(1).bfloat16()
    assert spectrum(x, 2).dtype == torch.complex64 and edges(x).dtype == torch.float32


# --- what an adapter reaches


class Line(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.proj_in = nn.Linear(*weight.T.shape, bias=False).double()
        self.proj_in.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_in(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_adapter_is_the_best_of_its_rank(weighted):
    """Least error: the sum of s_i^2 beyond the rank, s_i the singular values of H (W_1 - W_0) (Eckart & Young 1936).

    Outputs are pictures of 4 x 4; the inputs are white: all unit vectors.
    """
    source, rank = torch.Generator().manual_seed(0), 2
    start, goal = (torch.randn(16, 6, generator=source, dtype=torch.float64) for _ in range(2))
    cutoff = 1.5 if weighted else 0.0
    adapter = Adapter(Line(start), "student", rank, "proj_in")
    optimizer = torch.optim.LBFGS(
        adapter.parameters(), max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=20
    )
    inputs, wanted = torch.eye(6, dtype=torch.float64), goal.T.reshape(6, 1, 4, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = spectral_distance(adapter(inputs).reshape(6, 1, 4, 4), wanted, cutoff, "hard") * wanted.numel()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    gap = high_pass((goal - start).T.reshape(6, 1, 4, 4), cutoff, "hard").reshape(6, 16)
    beyond = torch.linalg.svdvals(gap)[rank:].square().sum()
    assert float(closure()) == pytest.approx(float(beyond), rel=1e-6)


def lora(teacher: Teacher, rank: int = 4) -> Teacher:
    targets = HiPA.Config.DEFAULTS["targets"]
    teacher.copies = Copies(frozenset({"student"}), rank, targets)
    return teacher


@pytest.mark.parametrize("make", [dit, lambda: EDMTeacher(edm_pipeline(), Facts("x"))])
def test_it_starts_as_the_teachers_one_step_and_merges(make, tmp_path: Path):
    teacher = lora(make())
    top = teacher.denoiser.schedule.grid(1)[0]
    method = objective(HiPA, teacher, tmp_path, times=[top], pairs=3, pair_steps=2)
    adapter = unwrap(method.generator.denoiser.network)
    assert isinstance(adapter, Adapter)
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    assert adapter.targets and all(layer.endswith(ends) for layer in adapter.targets)
    z, _, conditions = method.pairs.draw(batch(teacher, size=3, real=False).rng)
    cond, _ = teacher.encode(conditions)
    t = method.generator.time(0, z)
    with torch.no_grad():
        assert torch.equal(method.generator(z, cond), teacher.denoiser(z, t, cond))
        randomise(adapter, seed=3)
        changed = method.generator(z, cond)
        assert not torch.allclose(changed, teacher.denoiser(z, t, cond), atol=1e-3)
        merged = teacher._denoiser(merge(adapter, torch.float32))
        assert torch.allclose(merged(z, t, cond), changed, rtol=1e-5, atol=1e-6 * float(changed.abs().max()))


# --- the method


def test_the_loss_of_a_step(tmp_path: Path):
    """Pseudo-Huber of the pictures + .1 of the high-passed ones + .001 of the edges, from the decoder's pictures."""
    teacher = dit()
    method = objective(HiPA, teacher, tmp_path, times=[999], pairs=3, pair_steps=2, mask="hard")
    item = batch(teacher, size=3, real=False)
    ((player, loss),) = method.step(item, 0)
    z, y, conditions = method.pairs.draw(batch(teacher, size=3, real=False).rng)
    with torch.no_grad():
        x, y = (teacher.decode(each) for each in (method.generator(z, teacher.encode(conditions)[0]), y))
    d = (x - y).double()
    c = 0.00054 * math.sqrt(d[0].numel())
    spatial = ((d.square().sum((1, 2, 3)) + c**2).sqrt() - c).mean() / math.sqrt(d[0].numel())
    assert x.shape[-1] == 16 and method.config.cutoff * 16 == 2
    want = spatial + 0.1 * high_pass(d, 2, "hard").square().mean() + 0.001 * edges(d).square().sum(0).mean()
    assert player == "generator" and float(loss.detach()) == pytest.approx(float(want), rel=1e-4)


def test_terms_can_be_left_out(tmp_path: Path):
    teacher = dit()
    given: dict[str, Any] = {"times": [999], "pairs": 3, "pair_steps": 2}
    method = objective(HiPA, teacher, tmp_path, fourier=0.0, edge=0.0, **given)
    play(method, 0, batch(teacher, size=3, real=False))
    assert set(method.log) == {"spatial", "regression"} and torch.equal(method.log["spatial"], method.log["regression"])


@pytest.mark.parametrize("checkpointing, decodings", [(False, 2), (True, 3)])
def test_passes_and_gradients(checkpointing, decodings, tmp_path: Path):
    """Student 1, teacher 0 and 2 decodings a step, 3 where activations are recomputed; the decoder gets no gradient."""
    teacher = dit()
    gradients = []
    for checkpoint in {False, checkpointing}:
        teacher.copies = Copies(checkpointing=checkpoint)
        method = objective(HiPA, teacher, tmp_path, times=[999], pairs=3, pair_steps=2)
        student, real = Calls(method.generator.denoiser.network), Calls(teacher.denoiser.network)
        decoder = Calls(teacher.pipeline.vae.decoder)
        play(method, 0, batch(teacher, size=3, real=False))
        gradients.append([p.grad for p in method.generator.parameters()])
    assert (student.finished >= 3, real.passes, decoder.passes) == (True, 0, decodings)
    assert all(p.grad is None for p in teacher.pipeline.vae.parameters())
    assert all(p.grad is None for p in teacher.denoiser.network.parameters())
    assert any(float(g.abs().max()) > 0 for g in gradients[0] if g is not None)
    for one, other in zip(gradients[0], gradients[-1]):
        torch.testing.assert_close(one, other)


def test_options():
    train, options = resolve(HiPA.Config, {"init_rho": 2.5}, {}, {})
    assert (train.student, train.rank, train.init_rho, train.lr) == ("lora", 16, None, 1e-4)
    assert (options.fourier, options.edge, options.cutoff, options.distance) == (0.1, 0.001, 0.125, "pseudo-huber")
    assert not HiPA.uses_real(options)
    with pytest.raises(ValueError, match="cutoff"):
        resolve(HiPA.Config, {}, {}, {"cutoff": "0.5"})


def test_a_chain_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="--student-steps 1"):
        objective(HiPA, dit(), tmp_path, times=[999, 499])


# --- DISTS


class Metric(nn.Module):
    """The interface of DISTS_pytorch's: pictures in [0, 1] of three channels, no gradient unless it is asked for."""

    def forward(self, x: Tensor, y: Tensor, require_grad: bool = False, batch_average: bool = False) -> Tensor:
        assert x.shape[1] == y.shape[1] == 3 and float(x.min()) >= 0 and float(x.max()) <= 1
        with torch.set_grad_enabled(require_grad):
            return (x - y).square().mean((1, 2, 3))


def test_dists_is_given_what_it_takes(monkeypatch, tmp_path: Path):
    package: Any = types.ModuleType("DISTS_pytorch")
    package.DISTS = Metric
    monkeypatch.setitem(sys.modules, "DISTS_pytorch", package)
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4).clone().requires_grad_()
    loss = dists_on(torch.device("cpu"))(x, torch.ones(2, 1, 4, 4)).mean()
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(loss) == 0.5 and float(gradient.abs().max()) > 0
    method = objective(Regression, dit(), tmp_path, times=[999], pairs=3, pair_steps=2, distance="dists")
    monkeypatch.setattr(method.teacher, "decode", lambda x: x[:, :1].tanh())
    assert play(method, 0, batch(method.teacher, real=False)) == ["generator"]


def test_without_the_package_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "DISTS_pytorch", None)
    with pytest.raises(ValueError, match="pip install dists-pytorch"):
        dists_on(torch.device("cpu"))
