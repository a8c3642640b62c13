"""LCM: random guidance and what the student is told of it, diffusers' own input for it, exports, and LCM's boundary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from gaussian import Calls
from playing import batch, dit, objective, play
from tables import MEANS, SIGNS, item, made, trained
from tiny import edm_pipeline, randomise
from tiny_text import PIPELINES

from onestep.card import Card
from onestep.denoiser import Denoiser
from onestep.exporting import export
from onestep.generator import Generator
from onestep.objectives.cd import CD
from onestep.objectives.lcm import FEATURES, LCM, LCMConfig, add_guidance, always_told
from onestep.teacher import Copies, EDMTeacher, Facts, Teacher, family_named
from onestep.teacher.stable_diffusion import GUIDANCE_KEY, guidance_features

RANGE = {"guidance_min": 3.0, "guidance_max": 15.0}


def text_teacher(name: str, guidance: float = 7.3) -> Any:
    pipeline = PIPELINES[name]()
    teacher = family_named(type(pipeline).__name__)(pipeline, Facts("", guidance=guidance), 16)
    teacher.use_texts(["a cat", "two dogs in the rain", "a red boat"])
    return teacher


# --- guidance


def test_with_one_guidance_it_is_consistency_distillation():
    assert trained(made(LCM, 10, guidance=3.0)) == trained(made(CD, 10, guidance=3.0))


def test_every_sample_has_a_guidance_of_its_own():
    """w is uniform in the range, in uncond + w (cond - uncond), and the teacher's step is that of its sample's w."""
    method = made(LCM, 6, guidance=1.0, **RANGE)
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    source = item(4, uniform=u)
    x_t = SIGNS[0] + 0.3
    w = method.guide(x_t, source.rng)
    assert w.flatten().tolist() == [3, 6, 9, 15] and w.shape == (4, 1)
    cond, uncond = method.teacher.encode(source.conditions)
    here = torch.full((4,), 5)
    together = method.lead(x_t, here, here - 1, cond, uncond, w, source.rng)
    for row, value in enumerate(w.flatten().tolist()):
        alone = method.lead(x_t, here, here - 1, cond, uncond, value, source.rng)
        torch.testing.assert_close(together[row], alone[row], atol=1e-14, rtol=0)


def test_a_student_that_is_not_told_the_guidance_ends_at_its_mean():
    """Two draws at the ends of the range weigh as much as all of it: f is affine in w."""
    method = made(LCM, 10, **RANGE)
    ends = [torch.full((4,), u, dtype=torch.float64) for u in (0.0, 1.0)]
    slope, bias = trained(method, uniforms=ends)
    mean = MEANS[3] + 9 * (MEANS[2] - MEANS[3])
    assert bias == pytest.approx((1 - slope) * mean, abs=1e-8)
    assert LCM.ends_at(method.config, 1.0) == 9 and LCM.ends_at(LCMConfig(), 1.75) == 1.75


def test_guidance_needs_an_unconditional_branch():
    with pytest.raises(ValueError, match="no unconditional branch; leave --guidance-min and --guidance-max out"):
        objective(LCM, EDMTeacher(edm_pipeline(), Facts("x")), **RANGE)


def test_number_of_network_passes():
    """In batches: the student 1 with gradient and 1 without, the teacher a doubled 1."""
    method = objective(LCM, dit(), **RANGE)
    student, teacher = Calls(method.generator.denoiser.network), Calls(method.teacher.denoiser.network)
    assert play(method, 0, batch(method.teacher)) == ["generator"]
    assert (student.finished, teacher.finished, student.stopped, teacher.stopped) == (4, 4, 0, 0)


# --- the student's input of guidance


@pytest.mark.parametrize("w", [1.0, 7.5, 7.3, 14.9])
@pytest.mark.parametrize("size", [256, 10])
def test_features_are_diffusers_own_to_the_last_bit(w, size):
    """Its pipelines embed guidance_scale - 1: w - 1 in this library's convention."""
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor(w - 1).repeat(3), size)  # type: ignore[arg-type]
    assert torch.equal(guidance_features(torch.full((3,), w, dtype=torch.float64), size), stock)
    assert not torch.allclose(guidance_features(torch.full((3,), w - 1, dtype=torch.float64), size), stock)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_input_of_guidance_starts_at_zero(name):
    teacher = text_teacher(name)
    student, (cond, _) = teacher.copy("student"), teacher.encode(torch.arange(2))
    x_t, t = torch.randn(2, *teacher.shape), torch.tensor([300, 800])
    before = student(x_t, t, cond)
    add_guidance(student.network)
    told = cond | {GUIDANCE_KEY: guidance_features(torch.tensor([3.0, 9.0]), FEATURES)}
    assert torch.equal(student(x_t, t, told), before) and student.network.config["time_cond_proj_dim"] == FEATURES
    randomise(student.network.time_embedding.cond_proj, 3)
    after = student(x_t, t, told)
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
    student.call = always_told(student.call, 3.0)
    torch.testing.assert_close(student(x_t, t, cond)[0], after[0])  # told 3 where nothing is said
    torch.testing.assert_close(student(x_t, t, told), after)
    assert teacher.denoiser.network.config["time_cond_proj_dim"] is None


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_students_passes_are_told_the_teachers_guidance(name):
    """Both of them, the same w for each sample, and the new layer is trained."""
    teacher = text_teacher(name)
    method = objective(LCM, teacher, embed_guidance=True, times=[999], target_ema=0.9, **RANGE)
    told: list[Any] = []
    for network in (method.generator.denoiser.network, method.target.network):
        network.time_embedding.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    source = batch(teacher)
    play(method, 0, source)
    w = batch(teacher).rng
    w.integers(50), w.normal(teacher.shape)
    want = guidance_features(w.uniform(3.0, 15.0), FEATURES)
    assert len(told) == 2 and all(torch.equal(each, want) for each in told)
    layer = method.generator.denoiser.network.time_embedding.cond_proj
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_stock_pipelines_feed_an_export_its_guidance(name, tmp_path: Path):
    """The export compares itself with the generator; the pipeline's guidance_scale is w, in one undoubled pass."""
    teacher = text_teacher(name)
    config = LCMConfig(embed_guidance=True, **RANGE)
    # not from the most noise, where x0 has float32's rounding times sigma / alpha, which differs with the memory's layout
    generator = Generator(teacher.copy("student"), [499, 249])
    LCM.prepare(config, generator)
    randomise(generator.denoiser.network, 4)
    card = Card("lcm", name, LCM.ends_at(config, 1.0), "unknown", {})
    folder = export(generator, teacher, tmp_path / name, torch.float32, card)
    stored = type(teacher)(type(teacher.pipeline).from_pretrained(folder), Facts("", guidance=9.0), 16)
    assert stored.arguments([])["guidance_scale"] == 9.0
    stored.use_texts(["a cat"])
    cond, _ = stored.encode(torch.zeros(2, dtype=torch.long))
    own, _ = teacher.encode(torch.zeros(2, dtype=torch.long))
    z = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    student = Denoiser(stored.denoiser.network, teacher.denoiser.schedule, teacher.denoiser.prediction, stored.call)
    noises = [torch.zeros_like(z)]
    torch.testing.assert_close(Generator(student, generator.times)(z, cond, noises), generator(z, own, noises))


def test_networks_without_such_an_input():
    for teacher in (dit(), text_teacher("sd15")):
        if isinstance(teacher.denoiser.network, type(text_teacher("sd15").denoiser.network)):
            teacher.copies = Copies(frozenset({"student"}), rank=2)  # an adapter
        generator = Generator(teacher.copy("student"), [999])
        with pytest.raises(ValueError, match=r"has no input for guidance; .*: leave --embed-guidance out"):
            LCM.prepare(LCMConfig(embed_guidance=True, **RANGE), generator)
    generator = Generator(text_teacher("sd15").copy("student"), [999])
    add_guidance(generator.denoiser.network)
    with pytest.raises(ValueError, match="already takes guidance"):
        add_guidance(generator.denoiser.network)


def test_an_adapter_learns_under_random_guidance_without_being_told():
    teacher = text_teacher("sd15")
    teacher.copies = Copies(frozenset({"student"}), rank=2)
    method = objective(LCM, teacher, times=[999], **RANGE)
    assert play(method, 0, batch(teacher)) == ["generator"] and method.told(torch.ones(2, 1)) == {}
    assert sum(float(p.grad.abs().sum()) for p in method.generator.parameters() if p.grad is not None) > 0


def test_a_teacher_that_takes_guidance_is_given_its_own():
    """Such as a published LCM: at the guidance of its facts."""
    pipeline: Any = PIPELINES["sd15"]()
    add_guidance(pipeline.unet)
    teacher: Teacher = family_named("StableDiffusionPipeline")(pipeline, Facts("", guidance=7.3, embedded_guidance=8.2), 16)
    teacher.use_texts(["a cat"])  # type: ignore[attr-defined]
    cond, uncond = teacher.encode(torch.zeros(2, dtype=torch.long))
    want = guidance_features(torch.full((2,), 8.2, dtype=torch.float64), FEATURES)
    assert uncond is not None and torch.equal(cond[GUIDANCE_KEY], want) and torch.equal(uncond[GUIDANCE_KEY], want)
    assert teacher.arguments([])["guidance_scale"] == 8.2


# --- options


def test_options():
    assert LCMConfig().levels == 50 and LCMConfig().skip == 1
    with pytest.raises(ValueError, match=r"guidance_min 5.0 is above guidance_max 3.0; type for example --guidance-min 3.0"):
        LCMConfig(guidance_min=5.0, guidance_max=3.0)
    with pytest.raises(ValueError, match="never changes; type for example --guidance-min 3 --guidance-max 15"):
        LCMConfig(embed_guidance=True)


def test_the_grid_is_lcms():
    """Fifty of a thousand indices, 19, 39, ..., 999, twenty apart; the times of a chain of four are moved onto it."""
    method = objective(LCM, dit(), times=[999])
    assert method.grid.times[1:].tolist() == list(range(19, 1000, 20))
    chain = objective(LCM, dit(), times=[999, 749, 499, 249])
    assert {999, 749, 499, 249} <= set(chain.grid.times.tolist()) and chain.grid.size == 50


def test_lcms_own_boundary_is_the_same_but_at_level_0():
    """c_skip = 0.25 / (u^2 + 0.25), c_out = u / sqrt(u^2 + 0.25) with u = 10 t: from index 19 on, 7e-6 and 1 - 3.5e-6."""
    u = 10.0 * torch.arange(19, 1000, 20, dtype=torch.float64)
    skip, out = 0.25 / (u**2 + 0.25), u / (u**2 + 0.25).sqrt()
    assert float(skip.max()) == pytest.approx(6.93e-6, rel=1e-3) and float((1 - out).max()) == pytest.approx(
        3.46e-6, rel=1e-3
    )
    schedule = dit().denoiser.schedule
    alpha, sigma = schedule.coefficients(torch.tensor([0]))
    assert float(1 - alpha) < 6e-5 and float(sigma) == pytest.approx(0.01, rel=1e-2)  # where their targets end
