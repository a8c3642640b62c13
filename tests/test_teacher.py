"""Every family of teachers: fed as the stock pipeline feeds it, checked, distilled, exported, loaded by plain diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_text import PIPELINES
from torch import Tensor

from onestep import check
from onestep.rng import Rng
from onestep.schedule import RectifiedFlow
from onestep.teacher import TEACHERS, Facts, Teacher, facts_of, family_named, load_teacher
from onestep.teacher.text import TextTeacher
from onestep.train import main

PROMPTS = ["a cat", "two dogs in the rain"]
GUIDANCE = 3.0


class Stop(Exception):
    """Ends a stock pipeline after its first step."""


SIDE = {"sana": 32}
"""Pixels a side, where 16 are not allowed."""


def made(name: str, resolution: int | None = None) -> Teacher:
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    family = family_named(type(pipeline).__name__)
    side = resolution or SIDE.get(name, 16)
    teacher = family(pipeline, Facts(source="", embedded_guidance=2.0), side if family.any_resolution else None)
    if isinstance(teacher, TextTeacher):
        teacher.use_texts(PROMPTS)
    return teacher


def stock_step(teacher: Teacher, steps: int) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(model output, timestep, sample) that the stock pipeline hands its scheduler at its first step, and the scheduler."""
    pipeline, seen = teacher.pipeline, []

    def step(output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append((output, timestep, sample))
        raise Stop

    given = teacher.arguments([0, 1] if teacher.classes > 1 else [0])
    if isinstance(teacher, TextTeacher):
        flux = type(pipeline).__name__ == "FluxPipeline"
        given |= {"true_cfg_scale": GUIDANCE, "negative_prompt": ["", ""]} if flux else {"guidance_scale": GUIDANCE}
    scheduler = pipeline.scheduler
    scheduler.step = step
    with pytest.raises(Stop):
        pipeline(**given, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    del scheduler.step
    return (*seen[0], scheduler)


def stock_x0(output: Tensor, timestep: Tensor, sample: Tensor, scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, our x_t, our t) by diffusers' own schedulers from the same network output."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas[0]
        return sample - sigma * output, sample, sigma
    if scheduler.config.get("use_flow_sigmas"):
        scheduler._step_index = 0
        scheduler.sigmas[0] = timestep / 1000  # it feeds the network whole timesteps, beside sigmas that are not
        return scheduler.convert_model_output(output, sample=sample), sample, scheduler.sigmas[0]
    if type(scheduler).__name__ == "EulerDiscreteScheduler":
        sample = sample / (scheduler.sigmas[0] ** 2 + 1).sqrt()
    ddim: Any = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(10)
    return ddim.step(output, int(timestep), sample).pred_original_sample, sample, timestep.long()


@pytest.mark.parametrize("name", PIPELINES)
def test_the_guided_x0_is_what_the_stock_pipeline_makes_of_its_first_step(name: str) -> None:
    teacher = made(name)
    output, timestep, sample, scheduler = stock_step(teacher, 3)
    if sample.ndim == 3:  # Flux packs its latents
        (output, sample), side = ((o for o in (output, sample)), teacher.resolution)
        output, sample = (teacher.pipeline._unpack_latents(each, side, side, 2) for each in (output, sample))
    want, x_t, t = stock_x0(output, timestep, sample, scheduler)
    cond, uncond = teacher.encode(torch.arange(len(x_t)))
    with torch.no_grad():
        found = teacher(x_t, t.expand(len(x_t)), cond, uncond, GUIDANCE if uncond else 1.0)
    scale = want.abs().max()  # at the most noise x0 = (x_t - sigma eps) / alpha is large
    assert found.shape == x_t.shape and (found - want).abs().max() <= 1e-5 * scale
    if uncond:  # the test can tell guidance, conditions and their order apart
        with torch.no_grad():
            assert (teacher(x_t, t.expand(len(x_t)), cond) - want).abs().max() > 1e-4 * scale
            assert (teacher(x_t, t.expand(len(x_t)), uncond, cond, GUIDANCE) - want).abs().max() > 1e-4 * scale


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_and_pictures_have_the_pipelines_units(name: str) -> None:
    """The stock pipeline decodes x0 = latents as `to_images` does; `to_x0` maps pictures to the same units."""
    teacher = made(name)
    x_0 = Rng(0, 0, 2).normal(teacher.shape)
    images = teacher.to_images(x_0)
    channels, side = teacher.image_shape
    assert images.shape == (2, channels, side, side) and images.min() >= 0 and images.max() <= 1
    back = teacher.to_x0(images * 2 - 1)
    assert back.shape == x_0.shape
    units = teacher.latent_units()
    if units["latent_scale"] is not None:
        vae = teacher.pipeline.vae
        encoded = vae.encode(images * 2 - 1)
        z = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        assert torch.allclose(back, (z - (units["latent_shift"] or 0.0)) * units["latent_scale"], atol=1e-5)
        stock = vae.decode(x_0 / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).sample
        assert torch.allclose(images, (stock / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of every family, prompts, and pictures with captions."""
    root = tmp_path_factory.mktemp("families")
    for name, make in PIPELINES.items():
        make().save_pretrained(root / name)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "pictures").mkdir()
    source, rows = torch.Generator().manual_seed(0), []
    for index in range(8):
        pixels = torch.randint(256, (20, 20, 3), generator=source, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(root / f"pictures/{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (root / "pictures/metadata.jsonl").write_text("\n".join(rows))
    return root


def options(root: Path, name: str, data: str, output: Path) -> list[str]:
    size = [] if name in ("ddpm",) else ["--resolution", str(SIDE.get(name, 16))]
    real = [] if data == "pictures" else ["--gan", "0", "--gan-critic", "0"]
    data_flags = [] if name == "ddpm" else ["--data", str(root / data)]
    few = ["--iterations", "2", "--batch-size", "2", "--grid-steps", "1", "--ratio", "2", "--guidance"]
    guidance = ["1"] if name == "ddpm" else ["3"]
    return ["--teacher", str(root / name), *data_flags, *size, *real, *few, *guidance, "--output", str(output)]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_family_is_checked_distilled_and_exported(
    name: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One generator and two critic steps; the export is compared with the generator's pictures by the run itself."""
    size = [] if name == "ddpm" else ["--resolution", str(SIDE.get(name, 16))]
    assert check.main([str(folders / name), "--steps", "2", *size, "--output", str(tmp_path / "check.png")]) == 0
    assert "round-trip" in capsys.readouterr().out and Image.open(tmp_path / "check.png").size[0] > 8
    assert main(options(folders, name, "prompts.txt", tmp_path / "run")) == 0
    assert "Use it" in capsys.readouterr().out
    export = tmp_path / "run/export"
    before = json.loads((folders / name / "model_index.json").read_text())
    after = json.loads((export / "model_index.json").read_text())
    assert {k: v for k, v in before.items() if k not in ("scheduler",)} == {
        k: v for k, v in after.items() if k != "scheduler"
    }
    pipeline = DiffusionPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    given = made(name).arguments([0])
    images = pipeline(**given, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape[0] == 1 and images.std() > 0


@pytest.mark.parametrize("name", ("sdxl", "sd3"))
def test_real_pictures_reach_the_gan(name: str, folders: Path, tmp_path: Path) -> None:
    assert main(options(folders, name, "pictures", tmp_path / "run")) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["gan_critic"] > 0 and last["gan"] > 0


def test_the_dynamic_shift_of_flux() -> None:
    """mu is 0.5 at 256 tokens and 1.15 at 4096, and 1024 pixels are 4096 tokens in the real model."""
    teacher = made("flux-dev", resolution=64)  # 16 x 16 tokens of 4 pixels
    assert isinstance(teacher.denoiser.schedule, RectifiedFlow)
    assert teacher.denoiser.schedule.shift == pytest.approx(2.718281828**0.5)


def test_sd3_runs_at_the_shift_of_its_scheduler_and_sana_at_its_own() -> None:
    shifts = [made(name).denoiser.schedule.shift for name in ("sd3", "sana")]  # type: ignore[attr-defined]
    assert shifts == [3.0, 3.0]
    assert isinstance(made("sana").pipeline.scheduler, DPMSolverMultistepScheduler)


def test_the_table_is_consistent() -> None:
    for name, facts in TEACHERS.items():
        assert facts_of(name) is facts and facts.licence != "unknown", name
        pickled = facts.source.startswith("https://") and facts.source.endswith(".pkl")
        assert pickled or facts.source.count("/") == 1 or Path(facts.source).is_dir(), name
    for name in ("sdxl", "sd15", "sd21", "pixart-alpha", "pixart-sigma", "sd3", "sd35-medium", "flux-dev", "sana"):
        assert TEACHERS[name].prediction and TEACHERS[name].latent_scale and TEACHERS[name].resolution


def test_a_teacher_that_is_not_what_the_table_knows(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Facts(source=str(folders / "sd15"), prediction="v_prediction")
    monkeypatch.setitem(TEACHERS, "mine", facts)
    with pytest.raises(ValueError, match=r"prediction epsilon .* where v_prediction"):
        load_teacher("mine")
    monkeypatch.setitem(TEACHERS, "mine", Facts(source=str(folders / "sd15"), latent_scale=0.5))
    with pytest.raises(ValueError, match="latent_scale"):
        load_teacher("mine")


def test_resolutions(folders: Path) -> None:
    assert load_teacher(str(folders / "sdxl"), resolution=32).shape == (4, 16, 16)
    with pytest.raises(ValueError, match="multiple of 4; type for example --resolution 32"):
        load_teacher(str(folders / "sdxl"), resolution=31)
    with pytest.raises(ValueError, match="8 pixels only"):
        load_teacher(str(folders / "ddpm"), resolution=16)


@pytest.mark.parametrize("damage", ("no unet", "no scheduler", "unknown class", "odd scheduler", "no json"))
def test_damaged_folders_are_one_clear_line(damage: str, folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders / "sd15", folder)
    index = json.loads((folder / "model_index.json").read_text())
    if damage == "no unet":
        shutil.rmtree(folder / "unet")
    elif damage == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif damage == "unknown class":
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))
    elif damage == "odd scheduler":
        odd = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
        (folder / "model_index.json").write_text(json.dumps(index | odd))
    else:
        (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value) and "damaged" in str(caught.value), str(caught.value)


def test_the_hub_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as caught:
        load_teacher("nobody/has-this-teacher")
    assert "\n" not in str(caught.value) and "nobody/has-this-teacher" in str(caught.value)


# ---- the check


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fashion teacher with a scheduler that says v_prediction."""
    folder = tmp_path_factory.mktemp("wrong") / "fashion"
    shutil.copytree(TEACHERS["fashion"].source, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def test_a_wrong_prediction_type_is_detected_and_named(
    wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ["--output", str(tmp_path / "check.png"), "--steps", "2"]
    assert check.main([str(wrong), "--data", "fashion", *picture]) == 1
    assert "the network predicts epsilon, and its scheduler says v_prediction" in capsys.readouterr().out
    assert check.main(["fashion", *picture]) == 0
    assert capsys.readouterr().out.endswith("OK\n")


def test_no_training_starts_on_a_wrong_prediction_type(
    wrong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--teacher", str(wrong), "--data", "fashion", "--iterations", "1", "--output", str(tmp_path / "run")])
    assert caught.value.code == 2 and "predicts epsilon" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_encoders_and_vae_rest_beside_the_device_and_come_back_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie is told by what they were last moved to, as there is one device here."""
    teacher = made("sdxl")
    assert isinstance(teacher, TextTeacher)
    pipeline, places = teacher.pipeline, {}

    def follow(name: str, module: Any) -> None:
        moved = module.to

        def to(device: Any) -> Any:
            places[name] = str(device)
            return moved("cpu")

        monkeypatch.setattr(module, "to", to)

    for name in ("text_encoder", "text_encoder_2", "vae"):
        follow(name, getattr(pipeline, name))
    monkeypatch.setattr(Teacher, "device", torch.device("cpu", 0))  # called "cpu:0": the device that it trains on
    teacher.rest()
    assert places == {"text_encoder": "cpu", "text_encoder_2": "cpu", "vae": "cpu"}
    teacher.use_texts(["a cat"])
    assert places == {"text_encoder": "cpu:0", "text_encoder_2": "cpu:0", "vae": "cpu"}
    teacher.rest()
    x_0 = teacher.to_x0(torch.zeros(1, 3, teacher.resolution, teacher.resolution))
    assert places["vae"] == str(x_0.device) and places["text_encoder"] == "cpu"
