"""Weights in half precision with arithmetic in full, and runs that use it with adapters on one base."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_text import clip_encoder, sdxl, unet
from torch import Tensor

from onestep import checkpointing
from onestep.denoiser import frozen
from onestep.export import main as export_main
from onestep.precision import full_precision
from onestep.rng import Rng
from onestep.teacher import Copies, load_teacher
from onestep.teacher.text import TextTeacher
from onestep.train import main


def pair(module: Any, kind: torch.dtype) -> tuple[Any, Any]:
    """The module in half precision, and in float32 with the same rounded weights."""
    half = copy.deepcopy(module).requires_grad_(False).to(kind)
    return half, copy.deepcopy(half).float()


@pytest.mark.parametrize("kind", (torch.bfloat16, torch.float16))
def test_values_and_gradients_are_those_of_full_precision(kind: torch.dtype) -> None:
    half, full = pair(unet(16, attention_head_dim=2), kind)
    x = Rng(0, 0, 2).normal((4, 8, 8)).requires_grad_(True)
    states, t = Rng(0, 1, 2).normal((5, 16)), torch.tensor([3, 400])
    want = full(x, t, encoder_hidden_states=states)[0]
    (slope,) = torch.autograd.grad(want.square().sum(), x)
    with full_precision(half):
        found = half(x, t, encoder_hidden_states=states)[0]
    (found_slope,) = torch.autograd.grad(found.square().sum(), x)
    assert found.dtype == torch.float32 and torch.equal(found, want) and torch.equal(found_slope, slope)
    with pytest.raises(RuntimeError, match="dtype"):
        half(x, t, encoder_hidden_states=states)  # without it the dtypes do not fit: nothing hides a missing context


def test_text_encoders_too() -> None:
    half, full = pair(clip_encoder(3), torch.bfloat16)
    tokens = torch.arange(14).view(2, 7)
    with torch.no_grad(), full_precision(half):
        found = half(tokens).last_hidden_state
    with torch.no_grad():
        assert torch.equal(found, full(tokens).last_hidden_state)


def test_what_is_saved_for_the_backward_pass_is_the_stored_weight() -> None:
    half, _ = pair(torch.nn.Linear(64, 64), torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each), full_precision(half):
        half(torch.randn(2, 64, requires_grad=True))
    assert [each.dtype for each in saved] == [torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdxl")
    sdxl().save_pretrained(root / "teacher")
    (root / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return root


def gradients(folder: Path, weights: torch.dtype, checkpoint: bool) -> list[Tensor]:
    """Of a loss that goes through the student's adapter and then, as a GAN's does, through the critic's features."""
    teacher = load_teacher(str(folder / "teacher"), dtype=weights)
    assert isinstance(teacher, TextTeacher)
    teacher.use_texts(["a cat", "two dogs"])
    teacher.copies = Copies(frozenset({"student", "critic"}), 2, None, checkpoint)
    student, critic = teacher.copy("student"), teacher.copy("critic")
    assert student.network.base is critic.network.base is teacher.denoiser.network  # type: ignore[union-attr]
    for seed, denoiser in enumerate((student, critic)):
        source = torch.Generator().manual_seed(seed)
        for parameter in denoiser.network.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    cond, _ = teacher.encode(torch.tensor([0, 1]))
    t = torch.tensor([500, 900])
    with frozen(critic):
        x_0 = student(Rng(0, 0, 2).normal(teacher.shape), t, cond)
        loss = critic.features(x_0, t, cond)[0].square().sum() + critic(x_0, t, cond).square().sum()
        loss = loss + teacher(x_0, t, cond).square().sum()
        loss.backward()
    assert all(p.grad is None for p in critic.network.parameters())
    return [p.grad for p in student.network.parameters() if p.grad is not None]


def test_checkpointing_and_storage_change_no_gradient(folder: Path) -> None:
    plain = gradients(folder, torch.bfloat16, False)
    again = gradients(folder, torch.bfloat16, True)
    assert plain and len(plain) == len(again) and max(float(g.abs().max()) for g in plain) > 0
    for one, other in zip(plain, again):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


RUN = ["--gan", "0", "--gan-critic", "0", "--iterations", "2", "--batch-size", "2", "--grid-steps", "1", "--ratio", "2"]


@pytest.mark.parametrize("student", ("full", "lora"))
@pytest.mark.parametrize("critic", ("full", "lora"))
def test_every_mixture_of_adapters_runs_and_is_exported(student: str, critic: str, folder: Path, tmp_path: Path) -> None:
    argv = ["--teacher", str(folder / "teacher"), "--data", str(folder / "prompts.txt"), "--guidance", "3", *RUN]
    argv += ["--student", student, "--critic", critic, "--rank", "2", "--lr", "1e-2", "--gradient-checkpointing"]
    assert main([*argv, "--weights", "bf16", "--output", str(tmp_path / "run")]) == 0
    network = load_file(tmp_path / "run/export/unet/diffusion_pytorch_model.safetensors")
    teacher = load_file(folder / "teacher/unet/diffusion_pytorch_model.safetensors")
    assert network.keys() == teacher.keys()  # merged: no key of an adapter
    changed = [key for key in network if not torch.equal(network[key], teacher[key].bfloat16().float())]
    assert changed and all(key.endswith("weight") for key in changed) == (student == "lora")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run/export")
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 2


def test_a_run_with_adapters_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    argv = ["--teacher", str(folder / "teacher"), "--data", str(folder / "prompts.txt"), "--guidance", "3", *RUN]
    argv += ["--student", "lora", "--critic", "lora", "--rank", "2", "--lr-decay", "constant", "--checkpoint-every", "1"]
    argv[argv.index("--iterations") + 1] = "3"
    assert main([*argv, "--keep-checkpoints", "9", "--output", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    assert main([*argv, "--keep-checkpoints", "9", "--output", str(tmp_path / "cut")]) == 0
    for name in ("generator-0", "critic-0", "average", "optimizer-generator"):
        one, other = (
            load_file(tmp_path / f"{run}/checkpoints/step-00000003/{name}.safetensors") for run in ("whole", "cut")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    keys = load_file(tmp_path / "whole/checkpoints/step-00000003/generator-0.safetensors")
    assert all(key.rpartition(".")[2] in ("lora_A", "lora_B") for key in keys)


def test_a_network_without_blocks_to_recompute_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        checkpointing.enable(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layout", ("diffusers", "kohya"))
def test_the_adapter_alone_makes_the_pictures_of_the_merged_export(
    layout: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--teacher", str(folder / "teacher"), "--data", str(folder / "prompts.txt"), "--guidance", "3", *RUN]
    argv += ["--student", "lora", "--critic", "lora", "--rank", "2", "--lr", "1e-2", "--ema", "0"]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert export_main([str(tmp_path / "run"), "--lora", layout]) == 0
    lines = capsys.readouterr().out.split("Use it:")[1]
    call = "prompt=['a cat'], guidance_scale=0, num_inference_steps=1, generator=torch.Generator().manual_seed(0)"
    lines = lines.replace(lines[lines.index("pipe(") : lines.index(").images")], f"pipe({call}, output_type='pt'")
    lines = lines.replace('images[0].save("picture.png")', "")
    made: dict[str, Any] = {}
    exec(lines, made)
    whole = DiffusionPipeline.from_pretrained(tmp_path / "run/export")
    generator = torch.Generator().manual_seed(0)
    given: Any = {"guidance_scale": 0, "num_inference_steps": 1, "generator": generator, "output_type": "pt"}
    want = whole(["a cat"], **given).images
    assert (made["images"] - want).abs().max() < 1e-5
    teacher = DiffusionPipeline.from_pretrained(folder / "teacher", scheduler=whole.scheduler)
    plain = teacher(["a cat"], **given | {"generator": torch.Generator().manual_seed(0)}).images
    assert (plain - want).abs().max() > 1e-4


def test_a_full_student_has_no_lora_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--teacher", str(folder / "teacher"), "--data", str(folder / "prompts.txt"), "--guidance", "3", *RUN]
    assert main([*argv, "--output", str(tmp_path / "run")]) == 0
    with pytest.raises(SystemExit) as caught:
        export_main([str(tmp_path / "run"), "--lora", "diffusers"])
    assert caught.value.code == 2 and "leave --lora out" in capsys.readouterr().err
