"""SCott against closed forms: fixed points under stochastic targets, the loss's floor, its limit in CD, the GAN, passes."""

import contextlib
from typing import Any

import pytest
import torch
from gaussian import Calls, ClosedFormTeacher
from guided import Classes
from playing import batch, clear, dit, has_gradient, linear_vp, objective, play
from tables import MEANS, SIGNS, S, item, made, settle, trained
from torch import Tensor

from onestep.discriminator import GAN
from onestep.objectives import scott
from onestep.objectives.cd import CD
from onestep.objectives.scott import SCott, SCottConfig
from onestep.rng import Rng
from onestep.trajectory import KEEP

SLOPES = {0.0: 0.05501, 0.5: 0.02664, 1.0: 0.003026}
"""(S^2 / V)^((1 + eta^2) / 2) at the top of the cosine schedule, by eta."""


def variances(method: SCott) -> Tensor:
    """V = S^2 + q^2 by level."""
    return S**2 + (method.grid.sigma / method.grid.alpha) ** 2


def exact_lead(method: SCott, eta: float, z: Tensor | None = None) -> Any:
    """A teacher that leads by the SDE's own kernel, y_s ~ N(m + (V_s / V_t)^((1 + eta^2) / 2) (y_t - m), ...), with z."""

    def lead(x_t: Tensor, here: Tensor, there: Tensor, cond: Any, *rest: Any) -> Tensor:
        mean = torch.tensor(MEANS, dtype=torch.float64)[cond["class_labels"]].view(-1, 1)
        v = variances(method).view(-1, 1)
        (alpha_t, _), (alpha_s, _) = (method.grid.levels(level, x_t) for level in (here, there))
        r = v[there] / v[here]
        y = mean + r ** ((1 + eta**2) / 2) * (x_t / alpha_t - mean)
        noise = 0.0 if z is None else (v[there] * (1 - r ** (eta**2))).sqrt() * z
        return alpha_s * (y + noise)

    return lead


# --- the fixed point


@pytest.mark.parametrize("eta", SLOPES)
def test_the_students_slope_under_the_exact_kernel(eta, monkeypatch):
    """A stochastic target is regressed to its mean: eta = 1 ends at the denoiser, whose samples have next to no variance."""
    method = made(SCott, 20, eta=eta, gan=0.0)
    monkeypatch.setattr(method, "lead", exact_lead(method, eta))
    slope, bias = trained(method)
    v = float(variances(method)[-1])
    assert slope == pytest.approx((S**2 / v) ** ((1 + eta**2) / 2), abs=1e-9) == pytest.approx(SLOPES[eta], rel=1e-3)
    assert bias == pytest.approx((1 - slope) * MEANS[2], abs=1e-9)
    assert slope**2 * v == pytest.approx(S**2 * (S**2 / v) ** (eta**2), rel=1e-6)


@pytest.mark.parametrize("solver", KEEP)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_students_slope_under_the_real_steps(solver, eta):
    """The product of rho + (1 - rho) S^2 / V over all steps, three to a level; the steps' noise has mean zero."""
    method = made(SCott, 10, eta=eta, solver=solver, gan=0.0)
    grid, slope = method.grid, 1.0
    assert grid.size == 30 and method.parts == 3
    for n in range(1, grid.size + 1):
        start, end = ((grid.alpha[i], grid.sigma[i]) for i in (n, n - 1))
        q_t, q_s = start[1] / start[0], end[1] / end[0]
        rho = float(KEEP[solver](start, end, eta) * q_s / q_t)
        slope *= rho + (1 - rho) * S**2 / float(S**2 + q_t**2)
    assert trained(method)[0] == pytest.approx(slope, abs=1e-9)


def test_smaller_steps_come_nearer_to_the_kernels_slope():
    errors = []
    for steps in (10, 20):
        method = made(SCott, 10, eta=0.3, gan=0.0, steps=steps)
        exact = float(S**2 / variances(method)[-1]) ** ((1 + 0.3**2) / 2)
        errors.append(abs(trained(method)[0] - exact))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4) and errors[1] < 0.01 * exact


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_loss_has_a_floor(eta, monkeypatch):
    """a^2 V_s (1 - (V_s / V_t)^(eta^2)) with a = (S^2 / V_s)^((1 + eta^2) / 2): no measure of how well a student does."""
    method = made(SCott, 12, eta=eta, gan=0.0)
    monkeypatch.setattr(method, "lead", exact_lead(method, eta))
    trained(method)
    v = variances(method)[:: method.parts]
    for n in (2, 7, 12):
        losses = []
        for z in (1.0, -1.0):
            monkeypatch.setattr(method, "lead", exact_lead(method, eta, torch.full((4, 1), z, dtype=torch.float64)))
            losses.append(next(method.step(item(n - 1), 0))[1].detach())
        a = (S**2 / v[n - 1]) ** ((1 + eta**2) / 2)
        floor = a**2 * v[n - 1] * (1 - (v[n - 1] / v[n]) ** (eta**2))
        assert float(sum(losses) / 2) == pytest.approx(float(floor), rel=1e-9) and float(floor) > 1e-4


def test_without_noise_and_in_one_step_it_is_consistency_distillation_to_the_last_bit():
    plain, ours = made(CD, 10), made(SCott, 10, eta=0.0, steps=1, gan=0.0)
    assert torch.equal(plain.grid.times, ours.grid.times)
    assert trained(plain) == trained(ours)
    tables = [method.generator.denoiser.network for method in (plain, ours)]
    assert torch.equal(tables[0].slope, tables[1].slope) and torch.equal(tables[0].bias, tables[1].bias)
    noisy = made(SCott, 10, eta=1e-3, steps=1, gan=0.0)
    assert trained(noisy) != trained(plain)


def test_the_same_on_a_real_network():
    """With draws of a real Rng: none is taken for a noise that is not there."""
    losses = []
    for method in (
        objective(CD, dit(), guidance=1.5, distance="l2"),
        objective(SCott, dit(), guidance=1.5, eta=0.0, steps=1, gan=0.0),
    ):
        ((_, loss),) = method.step(batch(method.teacher), 0)
        losses.append(loss.detach())
    assert torch.equal(*losses)


def test_guidance():
    slope, bias = trained(made(SCott, 10, guidance=3.0, gan=0.0))
    assert bias == pytest.approx((1 - slope) * (MEANS[3] + 3 * (MEANS[2] - MEANS[3])), abs=1e-9)


def test_every_step_of_a_gap_has_noise_of_its_own(monkeypatch):
    """Three steps from the level to the next one, at levels of the finer grid."""
    method = made(SCott, 10, eta=0.3, gan=0.0)
    seen: list[Any] = []
    step = scott.jump
    monkeypatch.setattr(scott, "jump", lambda x, x_0, a, b, keep, z: seen.append((a, b, z)) or step(x, x_0, a, b, keep, z))
    zs = [torch.full((4, 1), value, dtype=torch.float64) for value in (0.1, 0.2, 0.3)]
    settle(method, 5, item(4, normals=zs))
    sigmas = [float(a[1][0]) for a, _, _ in seen] + [float(seen[-1][1][1][0])]
    assert sigmas == pytest.approx(method.grid.sigma[[15, 14, 13, 12]].tolist())
    assert [float(z[0]) for *_, z in seen] == [0.1, 0.2, 0.3]


# --- the GAN


def test_the_heads_see_the_students_samples_and_real_ones(monkeypatch):
    """The generator first, with its distance and 0.4 of the GAN's; then the heads, on the same samples without gradient."""
    method = objective(SCott, dit())
    fooled, told = [], []
    fool, tell = method.gan.fool, method.gan.tell
    monkeypatch.setattr(method.gan, "fool", lambda x, *args: fooled.append(x) or fool(x, *args))
    monkeypatch.setattr(method.gan, "tell", lambda x, y, *args: told.append((x, y)) or tell(x, y, *args))
    source = batch(method.teacher)
    turns = method.step(source, 0)
    player, loss = next(turns)
    assert player == "generator" and not told
    assert float(loss.detach()) == pytest.approx(float(method.log["consistency"] + 0.4 * method.log["gan"]), rel=1e-6)
    assert next(turns)[0] == "critic" and list(turns) == []
    (x,), ((y, real),) = fooled, told
    assert x.data_ptr() == y.data_ptr() and x.requires_grad and not y.requires_grad and torch.equal(real, source.real)


@pytest.mark.parametrize("disc_noise", ["renoise", "none"])
def test_noise_on_what_the_heads_see(disc_noise):
    method = objective(SCott, dit(), disc_noise=disc_noise)
    seen: list[Tensor] = []
    features = method.gan.denoiser.features

    def spy(x_t: Tensor, t: Tensor, cond: Any) -> list[Tensor]:
        seen.append(t)
        return features(x_t, t, cond)

    method.gan.denoiser.features = spy
    play(method, 0, batch(method.teacher, size=3))
    assert [len(t) for t in seen] == [3, 6]
    levels = torch.cat(seen)
    assert bool((levels == 0).all()) if disc_noise == "none" else len(set(levels.tolist())) > 5


def test_least_noise_takes_the_same_draws():
    """What follows it in a step does not depend on it."""
    first, second = Rng(0, 0, 3), Rng(0, 0, 3)
    teacher = dit()
    head = objective(SCott, teacher).gan.head
    u = scott.CleanGAN(teacher.denoiser, head).levels(first)
    GAN(teacher.denoiser, head).levels(second)
    assert u.tolist() == [0, 0, 0] and torch.equal(first.uniform(), second.uniform())


def test_no_gan_no_critic():
    method = objective(SCott, dit(), gan=0.0)
    assert method.gan is None and set(method.players()) == {"generator"}
    assert play(method, 0, batch(method.teacher)) == ["generator"]
    assert list(objective(SCott, dit()).players()) == ["generator", "critic"]


def turns_apart(method: SCott) -> dict[str, tuple[bool, bool]]:
    """Whose parameters (student's, heads') have a gradient after each player's backward; the teacher's never."""
    found = {}
    for player, loss in method.step(batch(method.teacher), 0):
        loss.backward()
        found[player] = (any(has_gradient(method.generator)), any(has_gradient(method.gan.head)))
        clear(method.generator, method.gan.head)
    assert not any(has_gradient(method.teacher.denoiser))
    return found


def test_no_players_loss_reaches_another():
    method = objective(SCott, dit(), guidance=1.5)
    assert turns_apart(method) == {"generator": (True, False), "critic": (False, True)}
    assert all(p.requires_grad for p in method.gan.head.parameters())


def test_the_leak_test_can_fail(monkeypatch):
    monkeypatch.setattr(scott, "frozen", lambda *modules: contextlib.nullcontext())
    assert turns_apart(objective(SCott, dit()))["generator"] == (True, True)


# --- passes and options


@pytest.mark.parametrize("guidance, doubled", [(1.0, 1), (1.5, 2)])
@pytest.mark.parametrize("steps, gan", [(3, 0.0), (3, 0.4), (1, 0.4)])
def test_number_of_network_passes(guidance, doubled, steps, gan):
    """In batches: student 1 with gradient and 1 without, teacher `steps` (doubled); GAN 1 cut short, and 2 for the heads."""
    method = objective(SCott, dit(), guidance=guidance, steps=steps, gan=gan)
    student, teacher = Calls(method.generator.denoiser.network), Calls(method.teacher.denoiser.network)
    play(method, 0, batch(method.teacher))
    assert (student.finished, student.stopped) == (4, 0)
    assert teacher.finished == 2 * steps * doubled and teacher.stopped == (6 if gan else 0)


def test_options():
    options = SCottConfig()
    assert (options.levels, options.steps, options.eta, options.gan) == (40, 3, 0.3, 0.4)
    assert (options.distance, options.disc_noise, options.solver) == ("l2", "renoise", "ddim")
    with pytest.raises(ValueError, match=r"eta 1.2 is more noise than a ddim step can add; allowed is 0 to 1: type --eta 1"):
        SCottConfig(eta=1.2)
    assert SCottConfig(eta=1.2, solver="er-sde").eta == 1.2
    with pytest.raises(ValueError, match="more than this schedule has"):
        objective(SCott, ClosedFormTeacher(Classes(linear_vp())), levels=40, steps=30, gan=0.0, times=[999])


def test_signs_stand_for_normal_draws():
    data, noise = SIGNS
    assert float(data.mean()) == float(noise.mean()) == float((data * noise).mean()) == 0 and bool((data**2 == 1).all())
