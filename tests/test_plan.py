"""The memory that is planned is the memory that is taken."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tiny_text import PIPELINES, sdxl
from torch import nn

from onestep.config import resolve
from onestep.objectives import objective_class
from onestep.plan import command, main, size_of
from onestep.plan_ledger import Ledger, bytes_of, tensors_of, turns_of
from onestep.plan_memory import Run
from onestep.plan_search import Planner
from onestep.plan_teacher import Blank
from onestep.run import make_trainer
from onestep.trainer import Trainer

SMALL = {"batch_size": "4", "rank": "2", "device": "cpu", "grid_steps": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    sdxl().save_pretrained(root / "teacher")
    (root / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(10)))
    return root


def options_of(folder: Path, **flags: Any) -> tuple[Any, Any]:
    """Without a GAN, whose real pictures the prompts do not have."""
    given = {"teacher": str(folder / "teacher"), "data": str(folder / "prompts.txt"), "output": str(folder / "run")}
    return resolve(objective_class("dmd2").Config, {}, {}, given | {"gan": "0", "gan_critic": "0"} | SMALL | flags)


def made(folder: Path, **flags: Any) -> tuple[Run, Trainer]:
    config, options = options_of(folder, **flags)
    return Run(config, options, Blank(config.teacher)), make_trainer(config, options)


def members(trainer: Trainer) -> dict[str, list[nn.Module]]:
    return {name: [each.network for each in modules] for name, modules in trainer.members.items()}


def modules(trainer: Trainer) -> list[nn.Module]:
    parts = [part for part in trainer.teacher.pipeline.components.values() if isinstance(part, nn.Module)]
    return [*parts, *(network for networks in members(trainer).values() for network in networks)]


MIXTURES = [("full", "full", "fp32"), ("full", "lora", "bf16"), ("lora", "full", "fp32"), ("lora", "lora", "bf16")]


@pytest.mark.parametrize(("student", "critic", "weights"), MIXTURES)
def test_weights_states_and_averages_are_those_of_a_trainer(student: str, critic: str, weights: str, folder: Path) -> None:
    run, trainer = made(folder, student=student, critic=critic, weights=weights)
    memory = run.memory()
    average = tensors_of(trainer.average)  # an adapter's hangs on the base too
    weights = [each for each in tensors_of(*modules(trainer)) if all(each is not mine for mine in average)]
    assert sum(memory.weights.values()) == bytes_of(weights)
    assert memory.average == bytes_of(average)
    trainer.update()
    states = [
        each for optimizer in trainer.optimizers.values() for state in optimizer.state.values() for each in state.values()
    ]
    assert memory.optimizer == bytes_of(states)


@pytest.mark.parametrize("size", [{"student_blocks": "3"}, {"student_width": "0.5"}], ids=str)
def test_a_smaller_student_is_planned_at_its_size(size: dict[str, str]) -> None:
    config, options = resolve(objective_class("dmd2").Config, {}, {}, {"teacher": "fashion", "data": "fashion"} | size)
    small = Run(config, options, Blank("fashion")).memory()
    real = make_trainer(config, options)
    assert small.average == bytes_of(tensors_of(real.average)) < bytes_of(tensors_of(real.teacher.denoiser.network))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"student": "lora", "critic": "lora", "weights": "bf16"},
    {"gradient_checkpointing": True},
    {"mixed_precision": "bf16"},
    {"accumulation": "2", "mixed_precision": "bf16", "gradient_checkpointing": True, "student": "lora"},
    {"student_steps": "2", "guidance": "3"},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: "-".join(flags) or "default")
def test_activations_are_those_of_a_trainer(flags: dict[str, Any], folder: Path) -> None:
    run, trainer = made(folder, **flags)
    planned = run.turns()
    # twice: the first time fills caches, such as a schedule's table
    for _ in range(2):
        real = turns_of(trainer.objective, members(trainer), run.config, run.batch, modules(trainer))
    for player, turn in real.items():
        for key in ("kept", "peak", "gradients"):
            assert getattr(planned[player], key) == pytest.approx(getattr(turn, key), rel=0.01), (player, key)
    assert all(p.grad is None for networks in members(trainer).values() for each in networks for p in each.parameters())


@pytest.mark.parametrize("accumulation", ("1", "2"))
def test_the_most_at_once_is_that_of_an_update(accumulation: str, folder: Path) -> None:
    run, trainer = made(folder, accumulation=accumulation, mixed_precision="bf16")
    trainer.update()
    states = [each for o in trainer.optimizers.values() for state in o.state.values() for each in state.values()]
    with Ledger([*tensors_of(*modules(trainer), trainer.average), *states]) as ledger:
        trainer.step = 5  # the ratio, and so another turn of the generator
        trainer.update()
    assert max(turn.peak for turn in run.turns().values()) == pytest.approx(ledger.peak, rel=0.01)


def test_what_is_kept_is_what_autograd_saves(folder: Path) -> None:
    run, trainer = made(folder)
    known = {t.untyped_storage()._cdata for t in tensors_of(*modules(trainer))}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        turns = trainer.objective.step(run.batch(0), 0)
        player, _ = next(turns)
    assert player == "generator"
    bytes_saved = sum(each.untyped_storage().nbytes() for each in saved.values())
    assert run.turns()[player].kept == pytest.approx(bytes_saved, rel=0.05)


def test_recomputing_and_half_precision_take_less(folder: Path) -> None:
    def kept(**flags: Any) -> int:
        config, options = options_of(folder, **flags)
        return Run(config, options, Blank(config.teacher)).turns()["critic"].kept

    plain = kept()
    assert kept(gradient_checkpointing=True) < 0.6 * plain
    assert kept(batch_size="2") < 0.6 * plain
    # norms run in bfloat16 on the CPU and in float32 on accelerators, also where they are recomputed
    assert kept(mixed_precision="bf16") < kept(mixed_precision="bf16", device="auto")
    assert kept(mixed_precision="bf16", device="auto", gradient_checkpointing=True) < 0.6 * plain


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_planned(name: str, tmp_path: Path) -> None:
    PIPELINES[name]().save_pretrained(tmp_path)
    config, options = resolve(objective_class("dmd2").Config, {}, {}, {"teacher": str(tmp_path), "batch_size": "2"})
    run = Run(config, options, Blank(config.teacher))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    teacher = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    ours = [part for part in run.teacher.pipeline.components.values() if isinstance(part, nn.Module)]
    assert bytes_of(tensors_of(*ours)) == bytes_of(tensors_of(*teacher))
    turns = run.turns() | {"grid": run.grid()}
    assert turns.keys() == {"generator", "critic", "grid"} and all(
        turn.peak > turn.gradients >= 0 for turn in turns.values()
    )
    if run.teacher.conditioned_by == "text":
        shapes = {k: v.shape[1:] for k, v in run.teacher.encode(torch.zeros(1, dtype=torch.long))[0].items()}
        real: Any = type(run.teacher)(pipeline, run.teacher.facts)
        if name.startswith("pixart") or name == "sana":
            real.use_texts(["a cat"])
            assert shapes == {k: v.shape[1:] for k, v in real.encode(torch.zeros(1, dtype=torch.long))[0].items()}


def argv(teacher: Path, *more: str) -> list[str]:
    words = ["--teacher", str(teacher), "--gan", "0", "--gan-critic", "0", "--batch-size", "4", "--rank", "2"]
    return [*words, "--device", "cpu", "--grid-columns", "1", *more]


@pytest.fixture(scope="module")
def planner(tiny_teacher: Path) -> Planner:
    """Of the run that `argv` describes."""
    given = {"teacher": str(tiny_teacher), "gan": "0", "gan_critic": "0", "grid_columns": "1"}
    return Planner(*resolve(objective_class("dmd2").Config, {}, {}, given | SMALL))


def test_the_smallest_change_that_fits_is_suggested(
    planner: Planner, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert next(planner.changes()) == {"gradient_checkpointing": True}
    plain, checkpointed = planner.memory({}).total, planner.memory({"gradient_checkpointing": True}).total
    assert checkpointed < plain
    assert main(argv(tiny_teacher, "--device-memory", f"{plain / 1e6 + 1}MB")) == 0
    assert "It fits" in capsys.readouterr().out
    limit = f"{(checkpointed + plain) / 2e6}MB"
    assert main(argv(tiny_teacher, "--device-memory", limit)) == 1
    suggested = re.search(r"python -m onestep.train (.*)", capsys.readouterr().out)
    assert suggested is not None
    words = shlex.split(suggested[1])
    assert words[-1] == "--gradient-checkpointing" and "--device-memory" not in words
    assert main([*words, "--device-memory", limit]) == 0


def test_changes_are_combined_and_none_of_them_is_idle(planner: Planner) -> None:
    limit = min(planner.memory(change).total for change in planner.changes()) - 1
    changes, memory = planner.fit(limit)
    assert len(changes) > 1 and memory.total <= limit
    for name in changes:
        assert planner.memory({key: value for key, value in changes.items() if key != name}).total > limit
    least, memory = planner.fit(10**6)
    assert memory.total > 10**6 and least.keys() >= {"critic", "student", "accumulation", "gradient_checkpointing"}


def test_bad_input_is_one_line(folder: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [size_of(each) for each in ("24GB", "80 gib", "0.5TB", "16 MiB")] == [24 * 10**9, 80 * 2**30, 5 * 10**11, 2**24]
    for words in (["--device-memory", "24"], ["--device-memory", "-1GB"], ["--device-memory", "0GB"], ["--processes", "0"]):
        with pytest.raises(SystemExit) as error:
            main(argv(tiny_teacher, *words))
        found = capsys.readouterr().err
        assert error.value.code == 2 and found.count("\n") == 1 and words[0] in found
    with pytest.raises(SystemExit):
        main(["--teacher", str(folder)])
    assert command(["--teacher", "x", "--device-memory=1GB", "--processes", "2"], ["--a", "b"]) == [
        "--teacher",
        "x",
        "--a",
        "b",
    ]


def test_an_incomplete_folder_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "vae": ["os", "path"]}))
    with pytest.raises(SystemExit):
        main(["--teacher", str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1


SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_sdxl_is_as_large_as_published(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sdxl", Path(__file__).parent.parent / "eval/make_sdxl.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet2DConditionModel(**SDXL_UNET).parameters()) == 2_567_463_684
    sizes = {name: sum(p.numel() for p in script.blank(name, config).parameters()) for name, config in script.SDXL.items()}
    assert sizes == {"unet": 2567463684, "vae": 83653863, "text_encoder": 123060480, "text_encoder_2": 694659840}
    tiny = {name: dict(config) for name, config in script.SDXL.items()}
    tiny["unet"] |= {"block_out_channels": [32, 32, 64], "attention_head_dim": [1, 2, 4], "sample_size": 8}
    tiny["unet"] |= {"cross_attention_dim": 32, "transformer_layers_per_block": [1, 1, 1], "addition_time_embed_dim": 8}
    tiny["unet"] |= {"projection_class_embeddings_input_dim": 6 * 8 + 16}
    tiny["vae"] |= {"block_out_channels": [32] * 4, "layers_per_block": 1}
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("text_encoder", "text_encoder_2"):
        tiny[name] |= narrow | {"projection_dim": 16, "vocab_size": 128}
    script.make(tmp_path / "sdxl", dtype=torch.bfloat16, parts=tiny, most=200_000)
    assert len(list((tmp_path / "sdxl/unet").glob("*-of-*.safetensors"))) > 2
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "sdxl", torch_dtype=torch.float32)
    image = pipeline("a cat", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and bool((image == image).all())
    config, options = resolve(objective_class("dmd2").Config, {}, {}, {"teacher": str(tmp_path / "sdxl"), "batch_size": "1"})
    assert Run(config, options, Blank(config.teacher)).turns()["generator"].peak > 0


def test_text_encoders_are_counted_where_they_stay(folder: Path) -> None:
    def parts(device: str) -> set[str]:
        config, options = options_of(folder, device=device)
        return set(Run(config, options, Blank(config.teacher)).memory().weights)

    assert parts("cpu") - parts("auto") == {"teacher's text_encoder", "teacher's text_encoder_2"}
