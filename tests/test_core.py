"""Schedules, prediction types, denoiser, teacher, random draws, data and the generator's chain."""

import diffusers
import pytest
import torch
from gaussian import TYPES, Calls, ClosedFormTeacher, Gaussian, Mixture, denoiser
from tiny import dit_pipeline, edm_pipeline
from torch import Tensor, nn

from onestep.data import Data
from onestep.denoiser import Denoiser, frozen
from onestep.generator import Generator, steps_from
from onestep.prediction import PREDICTIONS, EDMPreconditioned, add_noise, prediction_of
from onestep.rng import Rng
from onestep.schedule import EDM, VP, RectifiedFlow, Schedule
from onestep.teacher import DiTTeacher, EDMTeacher, Facts

LINEAR = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def vp(betas: dict = LINEAR) -> VP:
    schedule = Schedule.from_scheduler(diffusers.DDIMScheduler(**betas))
    assert isinstance(schedule, VP)
    return schedule


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rho(schedule: Schedule, t: float) -> float:
    alpha, sigma = schedule.coefficients(torch.tensor([t]))
    return float(sigma / alpha)


# --- schedules


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
@pytest.mark.parametrize("betas", [LINEAR, SCALED])
def test_vp_noises_as_diffusers_at_every_time(kind, betas):
    scheduler = kind(**betas)
    t = torch.arange(1000)
    x, eps = normal(1000, 3, dtype=torch.float32), normal(1000, 3, seed=1, dtype=torch.float32)
    ours = add_noise(Schedule.from_scheduler(scheduler), x, eps, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x, eps, t), atol=1e-6, rtol=1e-6)


def test_vp_from_betas_is_the_same_schedule():
    scheduler = diffusers.DDPMScheduler(**LINEAR)
    torch.testing.assert_close(VP.from_betas(scheduler.betas).alphas_cumprod, vp().alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_vp_grid_is_trailing(steps):
    scheduler = diffusers.DDIMScheduler(**LINEAR, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    grid = vp().grid(steps)
    assert grid == scheduler.timesteps.tolist()
    assert all(isinstance(t, int) for t in grid)


def test_vp_draws_every_index_equally_often():
    u = (torch.arange(1, 10_001, dtype=torch.float64) / 10_000).clamp_max(1)
    assert torch.bincount(vp().at(u), minlength=1000).eq(10).all()
    assert vp().at(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_flow_matches_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = Schedule.from_scheduler(scheduler)
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    t = schedule.at(u)
    torch.testing.assert_close(t.float(), scheduler.sigmas[:1000], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.timestep(t).float(), scheduler.timesteps, atol=1e-3, rtol=1e-6)
    x, eps = normal(5, 2, dtype=torch.float32), normal(5, 2, seed=1, dtype=torch.float32)
    theirs = scheduler.scale_noise(x, scheduler.timesteps[::200], eps)
    torch.testing.assert_close(add_noise(schedule, x, eps, t[::200]), theirs, atol=1e-6, rtol=1e-5)


def test_edm_matches_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    schedule, prediction = Schedule.from_scheduler(scheduler), prediction_of(scheduler)
    scheduler.set_timesteps(18)
    sigmas = schedule.at(torch.linspace(1, 0, 18, dtype=torch.float64))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas[:18], atol=1e-6, rtol=1e-5)
    theirs = torch.stack([scheduler.precondition_noise(s) for s in sigmas])
    torch.testing.assert_close(schedule.timestep(sigmas), theirs, atol=1e-12, rtol=1e-12)
    assert schedule.init_sigma == 80.0
    x_t, out = normal(18, 2), normal(18, 2, seed=1)
    coefficients = schedule(sigmas, x_t)
    for i, sigma in enumerate(sigmas):
        mine = prediction.scale_input(x_t, *coefficients)[i], prediction.to_x0(out, x_t, *coefficients)[i]
        torch.testing.assert_close(mine[0], scheduler.precondition_inputs(x_t[i], sigma))
        torch.testing.assert_close(mine[1], scheduler.precondition_outputs(x_t[i], out[i], sigma))


def test_consistency_scheduler_matches_diffusers():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    schedule, prediction = Schedule.from_scheduler(scheduler), prediction_of(scheduler)
    sigmas = torch.tensor([0.002, 0.5, 2.5, 80.0], dtype=torch.float64)
    theirs = torch.from_numpy(scheduler.sigma_to_t(sigmas.numpy()))
    torch.testing.assert_close(schedule.timestep(sigmas), theirs, atol=1e-9, rtol=1e-9)
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    c_skip, c_out = scheduler.get_scalings(sigmas)
    torch.testing.assert_close(prediction.to_x0(zero, one, one, sigmas), c_skip)
    torch.testing.assert_close(prediction.to_x0(one, zero, one, sigmas), c_out)
    torch.testing.assert_close(prediction.scale_input(one, one, sigmas), 1 / (sigmas**2 + 0.25).sqrt())


@pytest.mark.parametrize(
    "betas, t, golden, places",
    [(LINEAR, 440, 2.502, 3), (SCALED, 625, 2.502, 3), (SCALED, 399, 1.16, 2), (SCALED, 999, 14.61, 2)],
)
def test_published_starting_times(betas, t, golden, places):
    """The same starting noise in three codes: SFD's index 440, SiD-LSG's 625, DMD2's 399 and 999."""
    schedule = vp(betas)
    assert round(rho(schedule, t), places) == golden
    assert schedule.at_rho(rho(schedule, t)) == t
    if golden == 2.502:
        assert schedule.at_rho(2.5) == t


def test_at_rho_round_trips():
    schedule = vp()
    assert [schedule.at_rho(rho(schedule, t)) for t in range(0, 1000, 37)] == list(range(0, 1000, 37))  # both ends too
    for t in (0.1, 0.5, 0.99):
        assert RectifiedFlow().at_rho(rho(RectifiedFlow(), t)) == pytest.approx(t, rel=1e-6)
    assert RectifiedFlow().at_rho(float("inf")) == 1.0
    assert EDM().at_rho(2.5) == 2.5


@pytest.mark.parametrize("schedule, wrong", [(vp(), 1e-3), (vp(), 1e4), (EDM(), 1e-3), (EDM(), 81.0)])
def test_at_rho_refuses_what_the_schedule_cannot_reach(schedule, wrong):
    with pytest.raises(ValueError, match="outside this teacher's schedule"):
        schedule.at_rho(wrong)


def test_unknown_scheduler_and_prediction_are_refused():
    with pytest.raises(ValueError, match="VQDiffusionScheduler"):
        Schedule.from_scheduler(diffusers.VQDiffusionScheduler(num_vec_classes=4))
    with pytest.raises(ValueError, match="nonsense"):
        prediction_of(diffusers.DDPMScheduler(prediction_type="nonsense"))


# --- prediction types

SCHEDULES = {
    "vp": (vp(), torch.tensor([0, 10, 440, 999])),
    "flow": (RectifiedFlow(), torch.tensor([0.01, 0.35, 0.7, 0.99], dtype=torch.float64)),
    "ve": (EDM(), torch.tensor([0.01, 0.5, 2.5, 80.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_target_and_to_x0_are_inverse(name, kind):
    schedule, t = SCHEDULES[name]
    x_0, eps = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    coefficients = schedule(t, x_0)
    target = TYPES[kind].target(x_0, eps, *coefficients)
    back = TYPES[kind].to_x0(target, add_noise(schedule, x_0, eps, t), *coefficients)
    torch.testing.assert_close(back, x_0, atol=1e-10, rtol=0)


@pytest.mark.parametrize("network", [Gaussian, Mixture])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_denoiser_in_every_prediction_type(name, kind, network):
    """The posterior mean written as each network output gives the same x0, and its own formula."""
    schedule, t = SCHEDULES[name]
    x_t = 2 * normal(4, 2, 3)
    got = denoiser(network(schedule, kind))(x_t, t, {})
    alpha, sigma = schedule(t, x_t)
    torch.testing.assert_close(got, network(schedule).posterior(x_t, alpha, sigma), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "kind, weight",
    [
        ("epsilon", lambda a, s: a**2 / s**2),
        ("sample", lambda a, s: a**2 / s**2),
        ("v_prediction", lambda a, s: (a**2 + s**2) ** 2 / s**2),
        ("flow_prediction", lambda a, s: (a + s) ** 2 / s**2),
        ("edm", lambda a, s: (s**2 + 0.25) / (0.25 * s**2)),
    ],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_is_the_weighted_error_of_x0(name, kind, weight):
    """Every type's score matching loss is its known weight times |x0_hat - x0|^2; `sample` has epsilon's."""
    schedule, t = SCHEDULES[name]
    x_0 = normal(4, 2, 3)
    d = denoiser(Gaussian(schedule, kind))
    eps = Rng(7, 0, 4, dtype=torch.float64).normal(x_0.shape[1:])
    alpha, sigma = schedule(t, x_0)
    expected = (weight(alpha, sigma) * (d(add_noise(schedule, x_0, eps, t), t, {}) - x_0) ** 2).mean()
    torch.testing.assert_close(d.loss(x_0, {}, Rng(7, 0, 4, dtype=torch.float64), t), expected, atol=0, rtol=1e-9)


def test_loss_draws_its_times_over_the_whole_schedule():
    seen = []

    class Spy(Gaussian):
        def forward(self, x, timestep, return_dict=False, **cond):
            seen.append(timestep)
            return super().forward(x, timestep, return_dict, **cond)

    denoiser(Spy(vp())).loss(normal(4000, 1), {}, Rng(0, 0, 4000))
    assert seen[0].min() < 10 and seen[0].max() > 989
    assert abs(seen[0].double().mean() - 499.5) < 15  # 3 standard errors


# --- denoiser


def test_learned_variance_channels_are_ignored():
    plain, learned = (DiTTeacher(dit_pipeline(learned_variance=v), Facts("x")) for v in (False, True))
    x, t = normal(2, 4, 8, 8, dtype=torch.float32), torch.tensor([10, 900])
    cond, _ = learned.encode(torch.tensor([1, 2]))
    raw = learned.denoiser.network(x, timestep=t, return_dict=False, **cond)[0]
    assert raw.shape[1] == 8
    torch.testing.assert_close(learned.denoiser.output(x, t, cond), raw[:, :4])
    assert learned.denoiser(x, t, cond).shape == plain.denoiser(x, t, cond).shape == x.shape


class Tower(nn.Module):
    """Three blocks; the middle one is tapped."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x, timestep, return_dict=False):
        for block in self.blocks:
            x = block(x).tanh()
        return (x,)


def test_features_stop_the_network_at_the_last_tap():
    tower = Tower()
    d = Denoiser(tower, vp(), PREDICTIONS["epsilon"], taps=["blocks.0", "blocks.1"])
    calls = [0, 0, 0]
    for i, block in enumerate(tower.blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: calls.__setitem__(i, calls[i] + 1))
    hooks = [len(block._forward_hooks) for block in tower.blocks]
    x, t = normal(2, 3), torch.tensor([5, 6])
    first, second = d.features(x, t, {})
    assert calls == [1, 1, 0]
    torch.testing.assert_close(first, tower.blocks[0](x))
    torch.testing.assert_close(second, tower.blocks[1](first.tanh()))
    assert [len(block._forward_hooks) for block in tower.blocks] == hooks  # nothing stays behind
    d(x, t, {})  # and a whole pass is whole again
    assert calls[2] == 1


@pytest.mark.parametrize("kind, pipeline", [(DiTTeacher, dit_pipeline), (EDMTeacher, edm_pipeline)])
def test_features_of_real_networks_stop_early(kind, pipeline):
    teacher = kind(pipeline(), Facts("x"))
    network = teacher.denoiser.network
    calls = Calls(network)
    last = network.transformer_blocks[-1] if hasattr(network, "transformer_blocks") else network.up_blocks[0]
    after = Calls(last)
    cond, _ = teacher.encode(torch.tensor([1, 2]))
    time = 500 if isinstance(teacher.denoiser.schedule, VP) else 2.5
    (feature,) = teacher.denoiser.features(torch.zeros(2, *teacher.shape), torch.full((2,), time), cond)
    assert feature.shape[0] == 2
    assert (calls.started, calls.finished, after.started) == (2, 0, 0)


def test_hooks_are_removed_when_the_network_fails():
    d = Denoiser(Tower(), vp(), PREDICTIONS["epsilon"], taps=["blocks.1"])
    with pytest.raises(RuntimeError):
        d.features(normal(2, 5), torch.tensor([5, 6]), {})  # 5 columns do not fit
    assert not d.network.blocks[1]._forward_hooks


def test_frozen_lets_gradients_through_to_the_input_only():
    d = Denoiser(Tower(), vp(), PREDICTIONS["epsilon"], taps=["blocks.1"])
    x, t = normal(2, 3).requires_grad_(), torch.tensor([5, 6])
    with frozen(d, None):
        d.features(x, t, {})[0].sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert all(p.grad is None for p in d.parameters())
    d.features(x, t, {})[0].sum().backward()  # without it they would have had one
    assert d.network.blocks[0].weight.grad is not None


def test_frozen_restores_flags_also_after_an_exception():
    tower = Tower()
    tower.blocks[2].requires_grad_(False)
    before = [p.requires_grad for p in tower.parameters()]
    with pytest.raises(KeyError), frozen(tower):
        assert not any(p.requires_grad for p in tower.parameters())
        raise KeyError
    assert [p.requires_grad for p in tower.parameters()] == before


# --- teacher


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_sampling_is_the_stock_pipeline(guidance, prediction_type, monkeypatch):
    """The same noise through DiTPipeline's own DDIM loop ends in the same latents."""
    pipeline = dit_pipeline(prediction_type)
    teacher = DiTTeacher(pipeline, Facts("x"))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    ended, decode = [], pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, *a, **k: (ended.append(z), decode(z, *a, **k))[1])
    pipeline([3, 7], guidance, torch.Generator().manual_seed(5), num_inference_steps=4)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    counted = Calls(teacher.denoiser.network)
    x = teacher.sample(z, *teacher.encode(torch.tensor([3, 7])), guidance, 4)
    torch.testing.assert_close(x / pipeline.vae.config.scaling_factor, ended[0], atol=1e-4, rtol=1e-4)
    # one pass a step, over the doubled batch where it is guided
    assert (counted.passes, counted.started) == (4, 4 * (2 if guidance == 1 else 4))


def test_guidance_extrapolates_from_the_unconditional():
    teacher = DiTTeacher(dit_pipeline(), Facts("x"))
    x, t = normal(2, 4, 8, 8, dtype=torch.float32), torch.tensor([300, 600])
    cond, uncond = teacher.encode(torch.tensor([1, 2]))
    assert uncond["class_labels"].tolist() == [1000, 1000]
    with_class, without = teacher.denoiser(x, t, cond), teacher.denoiser(x, t, uncond)
    torch.testing.assert_close(teacher(x, t, cond, uncond, 3.0), without + 3 * (with_class - without), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="unconditional"):
        teacher(x, t, cond, None, 3.0)


def test_sampling_a_gaussian_ends_in_that_gaussian():
    """DDIM on the exact denoiser of N(.7, .9^2), started from N(0, 80^2): the affine map z -> x0 is nearly that law's."""
    teacher = ClosedFormTeacher(Gaussian(EDM(), "edm"))
    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # two points tell an affine map's mean and deviation
    x = teacher.sample(z, {}, None, 1.0, 4000)
    assert float(x.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(x[1] - x[0]) / 2 == pytest.approx(0.9, abs=0.02)


# --- random draws and data


def draws(rng: Rng) -> list[Tensor]:
    return [rng.normal((2, 3)), rng.uniform(0.2, 0.9), rng.integers(10), rng.normal((1,))]


def test_halves_draw_what_the_whole_draws():
    whole, low, high = Rng(3, 4, 6), Rng(3, 4, 6, 0, 3), Rng(3, 4, 6, 3, 6)
    shared = []
    for rng in (whole, low, high):
        shared.append([rng.shared_integer(1000) for _ in range(3)])
    assert shared[0] == shared[1] == shared[2]
    for all_rows, a, b in zip(draws(whole), draws(low), draws(high)):
        assert torch.equal(all_rows, torch.cat([a, b]))
        assert not torch.equal(a, b)


def test_draws_are_a_pure_function_of_seed_and_step():
    torch.manual_seed(1)
    first = draws(Rng(3, 4, 6))
    torch.manual_seed(2)  # nothing global matters
    for a, b, other_step, other_seed in zip(first, draws(Rng(3, 4, 6)), draws(Rng(3, 5, 6)), draws(Rng(4, 4, 6))):
        assert torch.equal(a, b)
        assert not torch.equal(a, other_step) and not torch.equal(a, other_seed)
    shared = [Rng(3, step, 1).shared_integer(4) for step in range(200)]
    assert set(shared) == {0, 1, 2, 3}


def test_draws_stay_in_range():
    rng = Rng(0, 0, 10_000)
    u, k = rng.uniform(0.2, 0.9), rng.integers(10)
    assert 0.2 <= u.min() < 0.21 and 0.89 < u.max() <= 0.9
    assert (k.min(), k.max()) == (0, 9)


def a_set(count: int) -> Data:
    return Data(torch.arange(count).float().view(-1, 1), torch.arange(count) * 10, 10, seed=5)


@pytest.mark.parametrize("make", [lambda: a_set(10), lambda: Data(None, None, 10, seed=5)])
def test_two_ranks_see_one_process_batch(make):
    for step in range(6):  # 4 of 10 at a time: batches straddle epochs
        whole, low, high = (make().batch(step, 4, *rows, "cpu") for rows in ((0, 4), (0, 2), (2, 4)))
        assert torch.equal(whole.conditions, torch.cat([low.conditions, high.conditions]))
        if whole.real is not None:
            assert torch.equal(whole.real, torch.cat([low.real, high.real]))
            assert torch.equal(whole.conditions, whole.real[:, 0].long() * 10)  # an image keeps its label
        assert torch.equal(whole.rng.normal((2,)), torch.cat([low.rng.normal((2,)), high.rng.normal((2,))]))


def test_every_epoch_is_another_permutation():
    data = a_set(10)
    seen = torch.cat([data.batch(step, 4, 0, 4, "cpu").real[:, 0] for step in range(5)]).long().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert a_set(10).batch(4, 4, 0, 4, "cpu").real[:, 0].long().tolist() == seen[16:]  # resumed in the second epoch


# --- generator


def test_steps_from_is_the_published_chain():
    assert steps_from(vp(), None, 4) == [999, 749, 499, 249]
    scheduler = diffusers.LCMScheduler(**SCALED)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps, original_inference_steps=steps)
        assert steps_from(vp(SCALED), None, steps) == scheduler.timesteps.tolist()
    assert steps_from(vp(), 2.5, 1) == [440]
    assert steps_from(vp(), 2.5, 2) == [440, 220]
    assert steps_from(EDM(), 2.5, 1) == [2.5]
    assert steps_from(EDM(), None, 2) == [80.0, 2.5]
    assert steps_from(EDM(), 32.0, 4) == pytest.approx([32.0, 32 * 0.75**5, 1.0, 32 * 0.25**5])
    assert steps_from(RectifiedFlow(), None, 4) == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="student_steps"):
        steps_from(vp(), 0.02, 50)


def test_generator_chain():
    schedule = vp()
    d = denoiser(Gaussian(schedule))
    z, noises = normal(3, 2), [normal(3, 2, seed=s) for s in (1, 2)]
    generator = Generator(d, [999, 499, 249], input_scale=0.5)

    def at(x: Tensor, t: int) -> Tensor:
        return d(x, torch.full((3,), t), {})

    def renoise(x: Tensor, eps: Tensor, t: int) -> Tensor:
        return schedule.alphas_cumprod[t].sqrt() * x + (1 - schedule.alphas_cumprod[t]).sqrt() * eps

    one = at(0.5 * z, 999)
    two = at(renoise(one, noises[0], 499), 499)
    three = at(renoise(two, noises[1], 249), 249)
    for count, expected in enumerate((one, two, three)):
        torch.testing.assert_close(generator(z, {}, noises[:count]), expected, atol=1e-12, rtol=0)
    # different times really were asked for: the last call alone would differ
    assert (three - at(renoise(two, noises[1], 499), 499)).abs().max() > 1e-3


def test_edm_preconditioning_is_karras_table_1():
    """Golden: sigma 1.2, sigma_data 0.5 give c_skip 25/169, c_out 6/13, c_in 10/13, loss weight 1/c_out^2."""
    p, one = EDMPreconditioned(0.5), torch.ones(1, dtype=torch.float64)
    sigma = 1.2 * one
    assert float(p.to_x0(0 * one, one, one, sigma)) == pytest.approx(25 / 169)
    assert float(p.to_x0(one, 0 * one, one, sigma)) == pytest.approx(6 / 13)
    assert float(p.scale_input(one, one, sigma)) == pytest.approx(10 / 13)
