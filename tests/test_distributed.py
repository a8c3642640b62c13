"""Two real processes, replicated and sharded, against one: numbers, weights, checkpoints, faults; all on CPUs."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from background import CONTEXT, TINY, finished, start, wait_for
from safetensors.torch import load_file
from tiny import dit_pipeline, edm_pipeline
from torch import Tensor, nn

from onestep.config import TrainConfig, resolve
from onestep.data import Data
from onestep.discriminator import Heads
from onestep.distributed import accelerator_of, check_environment, others_alive, rows_of
from onestep.rng import Rng
from onestep.scalars import Scalars
from onestep.sharding import outline, units

STEPS = 20
LAST = f"checkpoints/step-{STEPS:08d}"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RECIPES = Path(__file__).parents[1] / "train" / "accelerate"

# ---- whole runs


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_images: Path) -> dict[str, dict[str, Any]]:
    """Options of a run of each method; a GAN, both ways of guidance, averages, pictures and checks are among them."""
    dit = tmp_path_factory.mktemp("dit") / "teacher"
    dit_pipeline().save_pretrained(dit)
    shared = {"device": "cpu", "data": str(tiny_images), "iterations": STEPS, "batch_size": 8, "warmup": 2, "lr": 1e-5}
    shared |= {"critic_lr": 1e-5, "clip_norm": 0.05, "log_every": 1, "checkpoint_every": 10}  # clips most gradients
    shared |= {"grid_every": 1000, "grid_steps": 1, "grid_columns": 1}
    guided = {"teacher": str(dit)}
    return {
        "dmd2": {
            **shared,
            "teacher": str(tiny_teacher),
            "init_rho": 2.5,
            "ratio": 2,
            "grid_every": 10,
            "lr": 1e-4,
            "critic_lr": 1e-4,
        },
        # guided, or the two denoisers that it compares would begin as one and their difference as rounding
        "sim": {
            **shared,
            **guided,
            "guidance": 2.0,
            "init_rho": 2.5,
            "t_min": 0.1,
            "weights": "bf16",
            "gradient_checkpointing": True,
        },
        "lcm": {**shared, **guided, "guidance_min": 1.5, "guidance_max": 2.5, "target_ema": 0.9},
    }


def run(method: str, flags: Mapping[str, Any], output: Path) -> Any:
    """One run in this process, or its part of one in several; returns the trainer."""
    from onestep.objectives import objective_class
    from onestep.run import make_trainer
    from onestep.teacher import facts_of

    options = objective_class(method).Config
    given = {**flags, "method": method, "output": str(output)}
    trainer = make_trainer(*resolve(options, facts_of(flags["teacher"]).options(method), {}, given))
    assert trainer.run()
    return trainer


def launch(function: Any, arguments: Sequence[Any], folder: Path, environment: Mapping[str, str]) -> None:
    """function(rank, *arguments) in two processes, as torchrun starts them."""
    logs = [folder / f"log-{r}" for r in range(2)]
    ranks = [each | environment for each in environments()]
    started = [CONTEXT.Process(target=_rank, args=(function, arguments, log, each)) for log, each in zip(logs, ranks)]
    for process in started:
        process.start()
    codes = [finished(process) for process in started]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)


def environments() -> list[dict[str, str]]:
    """What torchrun tells each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]


def _rank(function: Any, arguments: Sequence[Any], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    function(int(environment["RANK"]), *arguments)
    torch.distributed.destroy_process_group()


def train_all(rank: int, flags: Mapping[str, Mapping[str, Any]], folder: Path, accumulation: int) -> None:
    """Every method, and then the first again from its checkpoint in the middle."""
    for method in flags:
        trainer = run(method, {**flags[method], "accumulation": accumulation}, folder / method)
        if rank == 0:  # alone: nothing of it may wait for the other
            trainer.draw(folder / method / "last.png")
            same(trainer.averaged().denoiser.network.state_dict(), folder / method, "average")
    go_on(rank, flags, folder / "dmd2", folder / "again")


def go_on(rank: int, flags: Mapping[str, Mapping[str, Any]], source: Path, target: Path) -> None:
    """dmd2 in `target` from the checkpoint in the middle of the run in `source`."""
    if rank == 0:
        shutil.copytree(source / "checkpoints/step-00000010", target / "checkpoints/step-00000010")
        shutil.copy(source / "metrics.jsonl", target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    run("dmd2", flags["dmd2"], target)


def same(state: Mapping[str, Tensor], folder: Path, name: str) -> None:
    saved = load_file(folder / LAST / f"{name}.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(state[key], saved[key]) for key in saved)


@pytest.fixture(scope="module")
def alone(flags: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for method in flags:
        run(method, flags[method], folder / method)
    return folder


@pytest.fixture(scope="module")
def replicated(flags: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of two, of two micro-batches each."""
    folder = tmp_path_factory.mktemp("replicated")
    launch(train_all, (flags, folder, 2), folder, {})
    return folder


@pytest.fixture(scope="module")
def sharded(flags: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(train_all, (flags, folder, 2), folder, FSDP)
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_traces(a: Path, b: Path, but: frozenset[str] = frozenset({"images_per_second", "health/seconds"})) -> None:
    """Every number of every step is the same, to 1e-5 of it."""
    ours, theirs = rows(a), rows(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for name in one.keys() - but:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), (name, one["step"])


def check_weights(a: Path, b: Path) -> None:
    """Weights, averages and moments of the optimisers: |a - b| <= 1e-5 |a| in every file, in the same names and shapes."""
    files = sorted(path.name for path in (a / LAST).glob("*.safetensors"))
    assert files == sorted(path.name for path in (b / LAST).glob("*.safetensors")) and len(files) >= 3
    for name in files:
        x, y = load_file(a / LAST / name), load_file(b / LAST / name)
        assert {key: value.shape for key, value in x.items()} == {key: value.shape for key, value in y.items()}
        one, other = (torch.cat([each[key].double().flatten() for key in x]) for each in (x, y))
        assert float((one - other).norm() / one.norm()) < 1e-5, name
    state, again = (json.loads((each / LAST / "state.json").read_text())["groups"] for each in (a, b))
    assert state == again


@pytest.mark.parametrize("method", ("dmd2", "sim", "lcm"))
@pytest.mark.parametrize("several", ("replicated", "sharded"))
def test_two_processes_are_one(several: str, method: str, alone: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(several)
    check_traces(alone / method, folder / method)
    check_weights(alone / method, folder / method)
    assert (folder / method / "last.png").is_file()


@pytest.mark.parametrize("method", ("sim", "lcm"))
def test_eight_micro_batches_are_one_batch(method: str, flags: Any, alone: Path, tmp_path: Path) -> None:
    run(method, {**flags[method], "accumulation": 8}, tmp_path)
    check_traces(alone / method, tmp_path)
    check_weights(alone / method, tmp_path)


@pytest.mark.parametrize("several", ("replicated", "sharded"))
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_two(
    several: str, flags: Any, alone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(several)
    go_on(0, flags, folder / "dmd2", tmp_path / "one")
    for resumed in (tmp_path / "one", folder / "again"):
        check_weights(alone / "dmd2", resumed)


def test_a_checkpoint_of_one_process_resumes_sharded(flags: Any, alone: Path, tmp_path: Path) -> None:
    launch(go_on, (flags, alone / "dmd2", tmp_path / "two"), tmp_path, FSDP)
    check_weights(alone / "dmd2", tmp_path / "two")


# ---- signals and deaths


def test_one_that_is_asked_to_stop_stops_all_and_one_that_dies_ends_all(tiny_teacher: Path, tmp_path: Path) -> None:
    argv = [*TINY, "--teacher", str(tiny_teacher), "--gan", "0", "--gan-critic", "0", "--iterations", "100000"]
    argv += ["--log-every", "1", "--checkpoint-every", "100000", "--health-every", "0", "--output", str(tmp_path / "run")]
    first, second = pair(argv, tmp_path)
    wait_for(tmp_path / "run", "metrics.jsonl", first)
    reach(tmp_path / "run", 1, first)  # in mid-training
    os.kill(second.pid or 0, signal.SIGTERM)
    assert [finished(first), finished(second)] == [0, 0]
    (reached,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(reached.name.removeprefix("step-"))
    assert f"stopped and saved at step {step}" in (tmp_path / "log-0").read_text()

    first, second = pair(argv, tmp_path)
    reach(tmp_path / "run", step + 2, first)
    os.kill(second.pid or 0, signal.SIGKILL)
    assert finished(first) == 2
    said = (tmp_path / "log-0").read_text()
    assert "another process of this run has ended" in said and "Traceback" not in said
    assert [*(tmp_path / "run/checkpoints").iterdir()] == [reached]  # to go on from


def reach(folder: Path, step: int, process: Any) -> None:
    while len((folder / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.is_alive()
        time.sleep(0.01)


def pair(argv: Sequence[str], folder: Path) -> list[Any]:
    return [start(argv, folder / f"log-{r}", each) for r, each in enumerate(environments())]


def test_a_lost_process_is_told_from_other_errors() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")
    with pytest.raises(ConnectionError, match="another process of this run has ended"), others_alive(2):
        raise lost
    for processes, error in ((1, lost), (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))):
        with pytest.raises(RuntimeError) as found, others_alive(processes):
            raise error
        assert found.value is error


# ---- data and draws


def test_processes_and_micro_batches_share_the_rows_of_a_batch() -> None:
    """Real samples are their own row numbers: together the parts are the batch of one process, in order."""
    real = torch.arange(20.0)
    data = Data(real, torch.arange(20), 20, seed=3)
    for step in range(8):  # past the end of an epoch
        whole = data.batch(step, 8, 0, 8, "cpu")
        config = TrainConfig(batch_size=8, accumulation=2)
        size = rows_of(config, 2)
        starts = [(micro * 2 + rank) * size for micro in range(2) for rank in range(2)]
        parts = [data.batch(step, 8, start, start + size, "cpu") for start in starts]
        assert torch.equal(torch.cat([part.conditions for part in parts]), whole.conditions)
        assert whole.real is not None and torch.equal(torch.cat([part.real for part in parts]), whole.real)  # type: ignore[misc]
        assert torch.equal(torch.cat([part.rng.normal((2,)) for part in parts]), whole.rng.normal((2,)))
        assert torch.equal(torch.cat([part.rng.uniform() for part in parts]), whole.rng.uniform())
    seen = torch.cat([data.batch(step, 4, 0, 4, "cpu").conditions for step in range(5)])
    assert sorted(seen.tolist()) == list(range(20))  # an epoch has every row once


def test_what_all_processes_must_draw_alike_they_do() -> None:
    """Also after draws of rows, of which each process keeps others."""
    parts = [Rng(5, 7, 8, start, start + 2) for start in (0, 2, 4, 6)]
    drawn = []
    for _ in range(50):
        rows_drawn = [part.normal((3,)) for part in parts]
        assert not torch.equal(rows_drawn[0], rows_drawn[1])
        (value,) = {part.shared_integer(1000) for part in parts}
        drawn.append(value)
    assert len(set(drawn)) > 40


def test_logged_numbers_are_means_over_micro_batches() -> None:
    log: dict[str, Tensor] = {}
    scalars, alone = Scalars(log), accelerator_of(TrainConfig(device="cpu"))
    for values in ((1.0, 4.0), (3.0, None), (5.0, None)):
        with scalars.part():
            log["a"] = torch.tensor(values[0])
            if values[1] is not None:
                log["b"] = torch.tensor(values[1])
    scalars.close()
    assert scalars.means(alone) == {"a": 3.0, "b": 4.0}
    with scalars.part():
        log["b"] = torch.tensor(6.0)
    scalars.close()
    assert scalars.means(alone) == {"a": 3.0, "b": 6.0}  # a as it was last
    with scalars.part():
        del log["a"]
    scalars.close()
    assert scalars.means(alone) == {"b": 6.0}


# ---- sharding


def networks() -> dict[str, nn.Module]:
    return {
        "unet": edm_pipeline().unet,
        "dit": dit_pipeline().transformer,
        "heads": Heads([torch.zeros(1, 8, 8, 8), torch.zeros(1, 4, 4, 4)]),
    }


@pytest.mark.parametrize("name", networks())
def test_all_weights_are_those_of_called_parts(name: str) -> None:
    """Of the network itself none are left, so that a backward pass from its middle finds them all gathered."""
    network = networks()[name]
    found = units(network)
    assert len(set(map(id, found))) == len(found) and network not in found
    owned: set[int] = set()
    for unit in found:
        assert not isinstance(unit, nn.ModuleList | nn.ModuleDict)
        inner = {id(p) for p in unit.parameters()}
        assert not inner <= owned or unit is not found[0]
        owned |= inner
    assert owned == {id(p) for p in network.parameters()}
    place = {id(unit): i for i, unit in enumerate(found)}
    for unit in found:
        assert all(place[id(each)] < place[id(unit)] for each in [*unit.modules()][1:] if id(each) in place)


def test_blocks_are_units() -> None:
    kinds = [type(unit).__name__ for unit in units(dit_pipeline().transformer)]
    assert kinds.count("BasicTransformerBlock") == 2 and kinds.count("CombinedTimestepLabelEmbeddings") == 2


def test_an_outline_has_shapes_and_no_weights() -> None:
    network = edm_pipeline().unet
    drawn = outline(network)
    for (name, one), (again, other) in zip(network.named_parameters(), drawn.named_parameters(), strict=True):
        assert name == again and one.shape == other.shape and other.device.type == "meta" and one.device.type == "cpu"


# ---- what is asked for


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate itself does, which refuses unknown keys; its settings for FSDP2 pass our own check."""
    read = load_config_from_file(str(path))
    assert isinstance(read, ClusterConfig)
    assert read.num_processes % max(1, read.num_machines) == 0 and read.mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(str(read.distributed_type).endswith("FSDP")))
    for name, value in (read.fsdp_config or {}).items():
        monkeypatch.setenv(name.upper(), str(value))
    check_environment(TrainConfig())


@pytest.mark.parametrize(
    "environment, flags, message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed has one engine .*fsdp2-8gpu.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "only DDP and FSDP2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp_version: 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: false"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "--gradient-checkpointing does it"),
        ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, {}, "fsdp_cpu_ram_efficient_loading: false"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward: true"),
        (FSDP, {"student": "lora"}, "--student lora is not possible with FSDP2"),
        (FSDP, {"critic": "lora"}, "--critic lora is not possible with FSDP2"),
        (FSDP, {"offload": True}, "--offload is not possible with FSDP2"),
        (FSDP, {"optimizer": "adamw8bit"}, "--optimizer adamw8bit is not possible with FSDP2"),
    ],
)
def test_what_does_not_fit_the_loop_is_refused(
    environment: dict[str, str], flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as found:
        accelerator_of(TrainConfig(**flags))
    assert "\n" not in str(found.value)
