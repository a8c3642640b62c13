"""Grids of noise levels, and steps on them against the closed forms of a Gaussian: the ODE's map and the SDE's kernel."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from gaussian import TYPES, Gaussian, denoiser
from playing import linear_vp
from tables import Cosine, fits
from torch import Tensor

from onestep import trajectory
from onestep.generator import steps_from
from onestep.schedule import EDM, VP, RectifiedFlow, Schedule
from onestep.trajectory import KEEP, Grid, Levels, heun, jump, ratio

M, S = 0.7, 0.9
SCHEDULES: dict[str, Schedule] = {
    "vp": linear_vp(),
    "flow": RectifiedFlow(),
    "shifted": RectifiedFlow(shift=3.0),
    "edm": EDM(0.002, 80.0),
    "cosine": Cosine(),
}


def at(alpha: float, sigma: float) -> Levels:
    return torch.tensor([[alpha]], dtype=torch.float64), torch.tensor([[sigma]], dtype=torch.float64)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


# --- the grid


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", [40, 50])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_times_of_a_chain_are_on_the_grid(name, size, steps):
    schedule = SCHEDULES[name]
    times = steps_from(schedule, None, steps)
    grid = Grid(schedule, size, times[0], through=times)
    assert set(times) <= set(grid.times.tolist()) and len(grid.times) == size + 1 and grid.size == size
    assert grid.times[-1] == times[0]
    rho = grid.sigma[1:] / grid.alpha[1:]
    assert bool((rho[1:] > rho[:-1]).all()) and grid.sigma[0] == 0 and grid.alpha[0] == 1


def test_forty_levels_of_a_thousand_hold_the_chains_of_1_2_and_4_steps_unmoved():
    grid = Grid(linear_vp(), 40)
    assert grid.times[1:].tolist() == list(range(24, 1000, 25))
    assert torch.equal(Grid(linear_vp(), 40, 999, through=[999, 749, 499, 249]).times, grid.times)
    assert 749 not in Grid(linear_vp(), 50).times and 749 in Grid(linear_vp(), 50, through=[749]).times


@pytest.mark.parametrize("name", SCHEDULES)
def test_level_0_is_the_sample_and_networks_can_be_called_there(name):
    """The stand-in for its time is that of level 1: sigma of EDM and of a flow is the time itself, and must not undo it."""
    schedule = SCHEDULES[name]
    grid = Grid(schedule, 10)
    assert grid.times[0] == grid.times[1] > 0 and bool(schedule.timestep(grid.times).isfinite().all())
    x = torch.randn(3, 2, dtype=torch.float64)
    level = torch.tensor([0, 4, 0])
    assert torch.equal(grid.noised(x, 9 * x, level)[::2], x[::2])
    network = denoiser(Gaussian(schedule, "flow_prediction"))
    f = grid.consistency(network, x, level, {})
    assert torch.equal(f[::2], x[::2])  # the boundary condition, to the last bit
    assert torch.equal(f[1:2], network(x[1:2], grid.times[4:5], {}))


def test_what_a_grid_refuses():
    with pytest.raises(ValueError, match="1001 noise levels are more than this schedule has up to 999; type fewer"):
        Grid(linear_vp(), 1001)
    with pytest.raises(ValueError, match=r"2 noise levels are fewer .* the times \[249, 499, 749, 999\]; type more"):
        Grid(linear_vp(), 2, through=[999, 749, 499, 249])
    with pytest.raises(ValueError, match="more than this schedule has"):
        Grid(linear_vp(), 500).finer(3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finer_grid_keeps_the_levels(name):
    times = steps_from(SCHEDULES[name], None, 4)
    grid = Grid(SCHEDULES[name], 20, through=times)
    fine = grid.finer(3)
    assert fine.size == 60 and torch.equal(fine.times[3::3], grid.times[1:]) and torch.equal(fine.alpha[::3], grid.alpha)
    assert all(a < b for a, b in pairwise(fine.times[1:].tolist()))
    assert torch.equal(grid.finer(1).times, grid.times)


def test_times_have_the_precision_of_what_they_go_with():
    flow, vp = Grid(RectifiedFlow(), 4), Grid(linear_vp(), 4)
    level = torch.tensor([1, 3])
    assert flow.time(level).dtype == torch.float64 and flow.time(level, torch.zeros(1)).dtype == torch.float32
    assert flow.time(level, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert vp.time(level, torch.zeros(1)).tolist() == [249, 749]


# --- steps along the ODE


def error(name: str, kind: str, size: int, second: bool) -> float:
    """Largest |x0 - exact| of `size` steps from the top, exact is M + S / sqrt(v) (x - alpha M)."""
    grid = Grid(SCHEDULES[name], size)
    network = denoiser(Gaussian(SCHEDULES[name], kind, M, S))
    x = rows(-1.5, 0.2, 1.3) * grid.sigma[-1]
    alpha, sigma = grid.alpha[-1], grid.sigma[-1]
    exact = M + S / (alpha**2 * S**2 + sigma**2).sqrt() * (x - alpha * M)
    for n in range(size, 0, -1):
        level = torch.full((3,), n)
        start, end = grid.levels(level, x), grid.levels(level - 1, x)
        x_0 = network(x, grid.time(level), {})
        there = partial(network, t=grid.time(level - 1), cond={})
        x = heun(x, x_0, start, end, there) if second else jump(x, x_0, start, end)
    return float((x - exact).detach().abs().max())


@pytest.mark.parametrize("name, kind", [(n, k) for n in ("cosine", "shifted", "edm") for k in TYPES if fits(n, k)])
def test_ddim_is_of_first_order_and_heun_of_second(name, kind):
    first, second = ([error(name, kind, size, order) for size in (80, 160)] for order in (False, True))
    assert first[0] / first[1] == pytest.approx(2, abs=0.25)
    assert second[0] / second[1] == pytest.approx(4, abs=0.8) and second[1] < first[1] / 10


def test_a_step_is_the_exponential_one_and_finite_without_signal():
    """y_s = r y_t + (1 - r) x0; from alpha = 0 all of the noise is kept and x0 is put under it."""
    x_t, x_0 = rows(0.3), rows(-1.1)
    here, there = at(0.6, 0.8), at(0.8, 0.6)
    r = float(ratio(here, there))
    assert r == pytest.approx((0.6 / 0.8) / (0.8 / 0.6))
    assert float(jump(x_t, x_0, here, there)) / 0.8 == pytest.approx(r * 0.3 / 0.6 + (1 - r) * -1.1)
    assert float(jump(x_t, x_0, at(0.0, 1.0), there)) == pytest.approx(0.8 * -1.1 + 0.6 * 0.3)
    assert float(jump(x_t, x_0, here, at(1.0, 0.0))) == -1.1


# --- steps along the SDE


@pytest.mark.parametrize("kind", KEEP)
def test_the_family_of_stochastic_steps(kind):
    """y_s = rho y_t + (1 - rho) x0 + q_s sqrt(1 - rho^2 q_t^2 / q_s^2) z, with each solver's own rho."""
    here, there, eta = at(0.5, 0.8), at(0.9, 0.7), 0.6
    q_t, q_s = 0.8 / 0.5, 0.7 / 0.9
    phi = {
        "ddim": lambda q: q,
        "er-sde": lambda q: q ** (1 + eta**2),
        "er-sde-5": lambda q: q * (math.exp(q**0.3) + 10) ** (eta**2),
    }[kind]
    rho = phi(q_s) / phi(q_t) * (math.sqrt(1 - eta**2 * (1 - q_s**2 / q_t**2)) if kind == "ddim" else 1)
    keep = KEEP[kind](here, there, eta)
    got = float(jump(rows(0.3), rows(-1.1), here, there, keep, rows(0.7))) / 0.9
    want = rho * 0.3 / 0.5 + (1 - rho) * -1.1 + q_s * math.sqrt(1 - rho**2 * q_t**2 / q_s**2) * 0.7
    assert got == pytest.approx(want, rel=1e-12)
    assert float(KEEP[kind](here, there, 0.0)) == 1.0
    assert 0 < float(KEEP[kind](at(0.0, 1.0), there, eta)) <= 1 or kind == "er-sde"
    plain, silent = (jump(rows(0.3), rows(-1.1), here, there, 1.0, z) for z in (None, rows(0.7)))
    assert torch.equal(plain, silent)  # eta = 0 is DDIM to the last bit, whatever z


def test_ancestral_steps_have_several_names():
    here, there = at(0.5, 0.8), at(0.9, 0.7)
    r = float(ratio(here, there))
    assert (
        float(KEEP["ddim"](here, there, 1.0)) == pytest.approx(r) == pytest.approx(float(KEEP["er-sde"](here, there, 1.0)))
    )


def kernel(kind: str, eta: float, parts: int, q_t: float = 2.0, q_s: float = 0.4) -> tuple[float, float]:
    """(slope, variance) of y_s given y_t by `parts` steps with the exact denoiser, x0 - M = S^2 / (S^2 + q^2) (y - M)."""
    slope, variance = 1.0, 0.0
    qs = torch.linspace(q_t, q_s, parts + 1, dtype=torch.float64).tolist()
    for high, low in pairwise(qs):
        here, there = at(1.0, high), at(1.0, low)
        keep = KEEP[kind](here, there, eta)
        one, none = rows(1.0), rows(0.0)
        by_y = float(jump(one, S**2 / (S**2 + high**2) * one, here, there, keep, none))
        by_z = float(jump(none, none, here, there, keep, one))
        slope, variance = slope * by_y, variance * by_y**2 + by_z**2
    return slope, variance


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["ddim", "er-sde"])
def test_small_steps_have_the_kernel_of_the_sde(kind, eta):
    """N(M + (V_s / V_t)^((1 + eta^2) / 2) (y_t - M), V_s (1 - (V_s / V_t)^(eta^2))), V = S^2 + q^2, in the first order."""
    v_t, v_s = S**2 + 4.0, S**2 + 0.16
    exact = ((v_s / v_t) ** ((1 + eta**2) / 2), v_s * (1 - (v_s / v_t) ** (eta**2)))
    errors = [[abs(a - b) for a, b in zip(kernel(kind, eta, parts), exact)] for parts in (100, 200)]
    for coarse, fine in zip(*errors):
        assert fine < 0.01 and (coarse < 1e-12 or coarse / fine == pytest.approx(2, abs=0.2))
    slope, variance = kernel(kind, eta, 400)
    assert slope**2 * v_t + variance == pytest.approx(v_s, abs=6e-3)  # the marginal is kept, whatever eta


def test_the_kernel_tells_a_wrong_noise(monkeypatch):
    """With the noise of eta in place of its share of what is kept, the marginal is lost."""
    wrong = lambda here, there, eta: 1 - (1 - KEEP["er-sde"](here, there, eta)) / 2  # noqa: E731
    monkeypatch.setitem(trajectory.KEEP, "ddim", wrong)
    slope, _ = kernel("ddim", 0.6, 400)
    exact = ((S**2 + 0.16) / (S**2 + 4.0)) ** 0.68
    assert abs(slope - exact) > 0.02


def test_vp_of_one_level_has_one():
    assert Grid(VP(torch.tensor([0.5], dtype=torch.float64)), 1).times.tolist() == [0, 0]
