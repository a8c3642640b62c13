"""A teacher whose weights lie elsewhere trains the same student, and says where it cannot."""

from pathlib import Path

import pytest
import torch
from playing import batch, objective
from safetensors.torch import load_file
from tiny_text import sdxl

from onestep.objectives import objective_class
from onestep.teacher import Facts, Teacher
from onestep.teacher.stable_diffusion import SDXLTeacher
from onestep.train import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdxl")
    sdxl().save_pretrained(root / "teacher")
    (root / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return root


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    argv = ["--teacher", str(folder / "teacher"), "--data", str(folder / "prompts.txt"), "--guidance", "3"]
    return [*argv, "--iterations", "2", "--batch-size", "2", "--grid-steps", "1", "--output", str(output), *more]


def test_the_student_is_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    offload = Teacher.offload
    monkeypatch.setattr(Teacher, "offload", lambda self: (calls.append(self), offload(self)))
    method = ["--method", "dmd2", "--gan", "0", "--gan-critic", "0", "--lr", "1e-2"]
    assert main(flags(folder, tmp_path / "here", *method)) == 0 and not calls
    assert main(flags(folder, tmp_path / "away", *method, "--offload")) == 0 and len(calls) == 1
    name = "export/unet/diffusion_pytorch_model.safetensors"
    here, away = load_file(tmp_path / "here" / name), load_file(tmp_path / "away" / name)
    assert all(torch.equal(here[key], away[key]) for key in here)


def test_a_method_that_needs_its_gradient_is_told() -> None:
    teacher = SDXLTeacher(sdxl(), Facts("x"), 16)
    teacher.use_texts(["a cat", "two dogs", "a red boat"])
    play = objective(objective_class("sid"), teacher, guidance=1.0, times=[999])
    teacher.offload()
    with pytest.raises(ValueError, match="leave it out"):
        for _, loss in play.step(batch(teacher, size=2), 0):
            loss.backward()


def test_adapters_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags(folder, tmp_path / "run", "--student", "lora", "--offload"))
    assert "--student full" in capsys.readouterr().err
