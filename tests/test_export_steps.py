"""Exports of text-to-image students: chains of several steps, guidance as an input, large networks in half precision."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY
from safetensors.torch import load_file
from tiny import randomise
from tiny_text import PIPELINES
from torch import Tensor

import onestep.export
from onestep import verify as verifying
from onestep.card import Card
from onestep.exporting import export, scheduler_for, step_counts
from onestep.generator import Generator, part_of, steps_from
from onestep.metrics.provenance import sha256_of_weights
from onestep.teacher import Facts, Teacher, family_named, stable_diffusion
from onestep.teacher.text import TextTeacher
from onestep.train import main

CARD = Card("dmd2", "text", 1.5, "MIT", {"lr": 1e-4})


def text_student(name: str, steps: int, pipeline: Any = None) -> tuple[Generator, Teacher]:
    pipeline = pipeline or PIPELINES[name]()
    kind = family_named(type(pipeline).__name__)
    teacher = kind(pipeline, Facts("", embedded_guidance=2.0), 32 if name == "sana" else 16)
    assert isinstance(teacher, TextTeacher)
    teacher.use_texts(teacher.prompts)
    denoiser = teacher.copy()
    randomise(denoiser.network, seed=2, scale=0.02)
    return Generator(denoiser, steps_from(denoiser.schedule, None, steps)), teacher


def stock_text_pictures(folder: Path, steps: int, generator: Generator, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Pictures of the first two prompts by a pipeline that is loaded anew, and by the generator itself."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(6)
    sources = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    given = teacher.arguments([0, 1])
    stock = pipe(**given, num_inference_steps=steps, generator=sources, output_type="pt").images
    torch.manual_seed(6)
    sources = [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    def drawn() -> Tensor:
        return torch.cat([torch.randn(1, *teacher.shape, generator=each) for each in sources])

    z = drawn()
    noises = [drawn() if teacher.seeded_chain else teacher.later_noise(z.shape, z.dtype) for _ in range(1, steps)]
    chain = Generator(generator.denoiser, part_of(generator.times, steps))
    with torch.no_grad():
        return stock, teacher.to_images(chain(z, teacher.encode(torch.tensor([0, 1]))[0], noises))


def test_flow_is_one_exact_euler_step() -> None:
    generator, teacher = text_student("sd3", 1)
    scheduler = scheduler_for(generator, teacher)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000.0]
    z, v = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double()
    (x_0,) = scheduler.step(v, scheduler.timesteps[0], z, return_dict=False)
    alpha_t, sigma_t = generator.denoiser.schedule(torch.ones(2), z)
    assert torch.equal(x_0, generator.denoiser.prediction.to_x0(v, z, alpha_t, sigma_t))
    for times in ([0.7], [1.0, 0.6]):
        with pytest.raises(ValueError, match="--init-rho"):
            scheduler_for(Generator(generator.denoiser, times), teacher)


@pytest.mark.parametrize(
    ("name", "steps", "counts"),
    [("sd3", 2, [2]), ("sd3", 4, [4]), ("flux-dev", 4, [1, 2, 4]), ("sana", 2, [2]), ("pixart-alpha", 4, [1, 2, 4])],
)
def test_a_text_chain_is_exported_with_the_numbers_of_steps_it_answers(
    name: str, steps: int, counts: list[int], tmp_path: Path
) -> None:
    generator, teacher = text_student(name, steps)
    assert step_counts(scheduler_for(generator, teacher), generator, teacher) == counts
    export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert (
        f"pictures at num_inference_steps {', '.join(map(str, counts[::-1]))}, " in (tmp_path / "out/README.md").read_text()
    )
    for count in counts:
        stock, own = stock_text_pictures(tmp_path / "out", count, generator, teacher)
        assert own.std() > 0.01 and (stock - own).abs().max() <= 2e-4, count


@pytest.mark.parametrize("name", ("sd3", "flux-dev", "flux without guidance", "sana"))
@pytest.mark.parametrize("steps", (1, 2, 3, 4))
def test_every_flow_pipeline_visits_even_times_without_flags(name: str, steps: int) -> None:
    generator, teacher = shared_student(name)
    chain = Generator(generator.denoiser, steps_from(generator.denoiser.schedule, None, steps))
    scheduler = scheduler_for(chain, teacher)
    pipeline, seen = copy.copy(teacher.pipeline), []
    pipeline.scheduler = scheduler

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(float(kwargs["timestep"][0]) * (1000 if name.startswith("flux") else 1))
        if len(seen) == steps:
            raise InterruptedError

    hook = teacher.denoiser.network.register_forward_pre_hook(note, with_kwargs=True)
    with hook, pytest.raises(InterruptedError):
        pipeline(**teacher.arguments([0]), num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    assert seen == pytest.approx([1000 * (steps - k) / steps for k in range(steps)], rel=1e-6)


shared_student = cache(lambda name: text_student(name, 1))


def test_a_chains_later_noises_are_those_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux draws them as tokens and SD3 from torch's own generator: what is not so is refused."""
    generator, teacher = text_student("flux-dev", 2)
    monkeypatch.setattr(type(teacher), "later_noise", Teacher.later_noise)
    with pytest.raises(RuntimeError, match="at num_inference_steps=2"):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    generator, teacher = text_student("sd3", 2)
    monkeypatch.setattr(type(teacher), "seeded_chain", True)
    with pytest.raises(RuntimeError, match="at num_inference_steps=2"):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)


# Guidance as an input


def guided_student(name: str) -> tuple[Generator, Teacher]:
    """Its UNet takes guidance as an input, and the teacher's does not."""
    generator, teacher = text_student(name, 2)
    network: Any = generator.denoiser.network
    width = network.time_embedding.linear_1.in_features
    network.time_embedding.cond_proj = torch.nn.Linear(16, width, bias=False)
    network.register_to_config(time_cond_proj_dim=16)
    randomise(network.time_embedding.cond_proj, seed=3, scale=1.0)
    return generator, teacher


@pytest.mark.parametrize("name", ("sd15", "sdxl"))
def test_a_student_that_takes_guidance_is_compared_at_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, teacher = guided_student(name)
    asked: list[tuple[int, float]] = []
    pictures = []
    honest = verifying.stock_pictures

    def noted(pipeline: Any, stored: Any, steps: int, seeds: Any) -> Tensor:
        asked.append((steps, stored.arguments([0])["guidance_scale"]))
        pictures.append(honest(pipeline, stored, steps, seeds))
        return pictures[-1]

    monkeypatch.setattr(verifying, "stock_pictures", noted)
    export(generator, teacher, tmp_path / "out", torch.float32, replace(CARD, guidance=4.0))
    assert asked == [(1, 4.0), (1, 5.5), (2, 4.0), (2, 5.5)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3 < (pictures[2] - pictures[3]).abs().max()  # it is an input
    text = (tmp_path / "out/README.md").read_text()
    assert "guidance_scale=4.0, " in text and "an input: `guidance_scale`" in text and "built in" not in text
    # an embedding of another guidance is refused
    monkeypatch.setattr(verifying, "stock_pictures", honest)
    features = stable_diffusion.guidance_features
    monkeypatch.setattr(stable_diffusion, "guidance_features", lambda guidance, size: features(guidance + 1, size))
    with pytest.raises(RuntimeError, match="deviates"):
        export(generator, teacher, tmp_path / "other", torch.float32, CARD)


# Large networks


@pytest.mark.parametrize("steps", (1, 2))
def test_a_large_student_is_given_what_it_is_given_in_float32(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers rounds a timestep's sines and cosines to bfloat16; a network that feels it is no other network for it."""
    monkeypatch.setattr(verifying, "LARGE", 0)
    generator, teacher = text_student("sdxl", steps)
    with torch.no_grad():
        network: Any = generator.denoiser.network
        network.time_embedding.linear_1.weight.mul_(40)
        network.time_embedding.linear_2.weight.mul_(4)
    compared = []
    honest = verifying.stock_pictures
    monkeypatch.setattr(verifying, "stock_pictures", lambda *args: (compared.append(args[2:]), honest(*args))[1])
    export(generator, teacher, tmp_path / "out", torch.bfloat16, CARD)
    assert compared == [(count, (0,)) for count in ([1] if steps == 1 else [1, 2])]
    assert "1 picture at" in (tmp_path / "out/README.md").read_text()
    monkeypatch.setattr(verifying, "_given_float32", lambda network: nullcontext())
    with pytest.raises(RuntimeError, match="deviates"):
        export(generator, teacher, tmp_path / "other", torch.bfloat16, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_large_sana_is_not_rounded_by_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "LARGE", 0)
    generator, teacher = text_student("sana", 1)
    export(generator, teacher, tmp_path / "out", torch.bfloat16, CARD)
    monkeypatch.setattr(verifying, "_said_float32", lambda *modules: nullcontext())
    with pytest.raises(RuntimeError, match="deviates"):
        export(generator, teacher, tmp_path / "other", torch.bfloat16, CARD)


# A finished run


def test_a_finished_run_is_exported_at_other_numbers_of_steps(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "2"]
    assert main([*small, "--output", str(run), "--no-evaluate"]) == 0
    capsys.readouterr()
    row = {"FD": 1.5, "steps": 1, "weights_sha256": sha256_of_weights(run / "export/unet")}
    (run / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert onestep.export.main([str(run)]) == 0 and "| FD | 1.5 |" in (run / "export/README.md").read_text()
    assert onestep.export.main([str(run), "--steps", "4"]) == 0
    assert "num_inference_steps=4" in capsys.readouterr().out
    text = (run / "export-4/README.md").read_text()
    assert "4, at 80, 18.9844, 2.5, 0.078125; or 2, at 80, 2.5; or 1, at 80; trained with student_steps 1; " in text
    assert "not scored" in text  # the same weights, but another number of steps
    weights = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(run / "export" / weights), load_file(run / "export-4" / weights)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert not list(run.glob("*-1"))
    with pytest.raises(SystemExit):
        onestep.export.main([str(run), "--steps", "0"])
    assert "--steps 0 is not allowed; type --steps 1 or more" in capsys.readouterr().err
