"""NaN and infinity stop a run with a name, and can be repeated; or they are skipped and counted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from onestep import replay
from onestep.checkpoint import latest_checkpoint
from onestep.data import Data
from onestep.nonfinite import NonFinite, SkippingWatch, Watch
from onestep.objectives.score import ScoreDistillation
from onestep.train import main
from onestep.trainer import Trainer

BAD = 5
"""Updates that are done before the one with a bad number: it makes step 6."""
LAYER = "mid_block.resnets.0"


@pytest.fixture
def argv(tiny_teacher: Path, tiny_images: Path, tmp_path: Path) -> list[str]:
    """Eight steps, with a checkpoint after each four and a log line after each eight."""
    run = ["--teacher", str(tiny_teacher), "--data", str(tiny_images), "--output", str(tmp_path / "run")]
    run += ["--iterations", "8", "--checkpoint-every", "4", "--log-every", "8", "--ratio", "1", "--warmup", "0"]
    return [*TINY, *run, "--batch-size", "4", "--no-evaluate"]


def in_layer(network: Callable[[Trainer], Any]) -> Callable[[Trainer], Any]:
    """A layer of that network gives NaN."""

    def spoil(trainer: Trainer) -> Any:
        layer = network(trainer).get_submodule(LAYER)
        return layer.register_forward_hook(lambda module, args, output: torch.full_like(output, torch.nan), prepend=True)

    return spoil


def of_teacher(trainer: Trainer) -> Any:
    return trainer.teacher.denoiser.network


def of_critic(trainer: Trainer) -> Any:
    return trainer.members["critic"][0].network


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Trainer], Any]], None]:
    """spoiled(make) spoils step 6 of every trainer by make(trainer), a handle that is removed after it."""

    def patch(make: Callable[[Trainer], Any]) -> None:
        update = Trainer.update

        def spoil(trainer: Trainer) -> None:
            handle = make(trainer) if trainer.step == BAD else None
            try:
                update(trainer)
            finally:
                if handle is not None:
                    handle.remove()

        monkeypatch.setattr(Trainer, "update", spoil)

    return patch


def stopped(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", ("dmd2", "sim"))
def test_a_bad_teacher_is_named_and_repeated(method, argv, spoiled, tmp_path, capsys) -> None:
    spoiled(in_layer(of_teacher))
    extra = ["--gan", "0", "--gan-critic", "0"] if method == "dmd2" else []
    line = stopped(["--method", method, *argv, *extra], capsys)
    assert f"the output of the layer {LAYER} of the teacher (float32, shape [4, 16, 4, 4]) is NaN at 1,024 places" in line
    assert "in the turn of the generator in step 6;" in line and "train again with a smaller --lr" in line
    path = tmp_path / "run/nonfinite/step-00000006.safetensors"
    assert str(path) in line and f"python -m onestep.replay {tmp_path / 'run'}" in line
    reached = latest_checkpoint(tmp_path / "run/checkpoints")
    assert reached is not None and reached.name == "step-00000004"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(reached / "generator-0.safetensors").values())
    assert replay.main([str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"step 6: the output of the layer {LAYER} of the teacher")


def test_a_bad_critic_is_named(argv, spoiled, capsys) -> None:
    """Also where it is noticed later, at a checkpoint, and where there is none before it."""
    spoiled(in_layer(of_critic))
    line = stopped([*argv, "--checkpoint-every", "7"], capsys)
    assert f"the output of the layer {LAYER} of the critic (float32" in line and "in step 6; its batch" in line


def test_a_bad_weight_is_named(argv, monkeypatch, capsys) -> None:
    update = Trainer.update

    def spoil(trainer: Trainer) -> None:
        update(trainer)
        if trainer.step == BAD - 1:
            with torch.no_grad():
                of_critic(trainer).conv_in.weight[0, 0, 0, 0] = torch.inf

    monkeypatch.setattr(Trainer, "update", spoil)
    line = stopped(argv, capsys)
    assert "the weight conv_in.weight of the critic (float32, shape [8, 1, 3, 3]) is infinite at 1 places in step 6" in line


def spoil_loss(patch: pytest.MonkeyPatch, player: str, spoil: Callable[[Tensor], Tensor], steps: tuple[int, ...]) -> None:
    """`spoil` is applied to the losses of a player in steps that follow so many updates."""
    original = ScoreDistillation.step

    def spoiled(self: Any, batch: Any, step: int) -> Iterator[tuple[str, Tensor]]:
        for whose, loss in original(self, batch, step):
            yield whose, spoil(loss) if (whose, step in steps) == (player, True) else loss

    patch.setattr(ScoreDistillation, "step", spoiled)


@pytest.mark.parametrize("player", ("generator", "critic"))
def test_a_bad_loss_is_named(player, argv, monkeypatch, capsys, tmp_path) -> None:
    spoil_loss(monkeypatch, player, lambda loss: loss * torch.nan, (BAD,))
    line = stopped(argv, capsys)
    assert f"the loss (float32, shape []) is NaN at 1 places, in the turn of the {player} in step 6;" in line
    with safe_open(tmp_path / "run/nonfinite/step-00000006.safetensors", "pt") as file:
        assert file.metadata() == {"step": "6", "seed": "0"} and file.get_tensor("conditions").shape == (4,)
        assert file.get_tensor("real").shape == (4, 1, 8, 8)


def test_a_bad_gradient_of_a_finite_loss_is_named(argv, monkeypatch, capsys) -> None:
    spoil_loss(monkeypatch, "critic", lambda loss: loss + (0 * loss).sqrt(), (BAD,))
    line = stopped(argv, capsys)
    assert "the gradient of the weight " in line and "in the turn of the critic in step 6;" in line


def test_bad_data_are_named(argv, monkeypatch, capsys, tmp_path) -> None:
    batch = Data.batch

    def spoiled(self: Data, step: int, *args: Any) -> Any:
        found = batch(self, step, *args)
        if step == BAD:
            found.real[1, 0, 2, 3] = -torch.inf
        return found

    monkeypatch.setattr(Data, "batch", spoiled)
    assert "the real data of the batch (float32, shape [4, 1, 8, 8]) is infinite at 1 places" in stopped(argv, capsys)
    monkeypatch.undo()  # the batch alone is enough to see it again
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    assert replay.main([str(tmp_path / "run")]) == 1
    assert "step 6: the real data of the batch" in capsys.readouterr().out


def test_what_is_finite_when_it_is_repeated(argv, monkeypatch, capsys, tmp_path) -> None:
    with monkeypatch.context() as patch:
        spoil_loss(patch, "critic", lambda loss: loss * torch.nan, (BAD,))
        stopped(argv, capsys)
    assert replay.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "step 6 is finite"
    assert main(argv) == 0
    for arguments, message in (([], "to step 8: step 6 cannot be repeated"), (["--batch", "x"], "no batch of a step")):
        with pytest.raises(SystemExit):
            replay.main([str(tmp_path / "run"), *arguments])
        assert message in capsys.readouterr().err


def test_updates_are_skipped_told_and_counted(argv, monkeypatch, capsys, tmp_path) -> None:
    spoil_loss(monkeypatch, "critic", lambda loss: loss * torch.nan, (BAD, BAD + 2))
    argv += ["--skip-nonfinite", "2"]
    assert main(argv) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert "step 6: the loss or the gradient of the critic is not finite; its update is skipped (1 of at most 2)" in told[0]
    assert len(told) == 2 and "step 8" in told[1] and "(2 of at most 2)" in told[1]
    (row,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert row["skipped"] == 2 and "matching" in row
    state = load_file(tmp_path / "run/checkpoints/step-00000008/optimizer-critic.safetensors")
    assert float(state["0.step"]) == 6  # of eight
    assert bool(torch.stack([tensor.isfinite().all() for tensor in state.values()]).all())


def test_one_more_than_may_be_skipped_stops(argv, monkeypatch, capsys) -> None:
    spoil_loss(monkeypatch, "critic", lambda loss: loss * torch.nan, (BAD, BAD + 1))
    line = stopped([*argv, "--skip-nonfinite", "1"], capsys)
    assert "the loss (float32, shape []) is NaN at 1 places, in the turn of the critic in step 7;" in line


def test_the_first_bad_number_is_kept_without_waiting_for_it() -> None:
    watch = Watch(["generator", "critic"], "cpu")
    watch.loss(2, "generator", torch.tensor([1.0, 2.0]))
    assert watch.allows(2, "critic", torch.tensor(3.0))
    watch.require()
    for step, player in ((7, "critic"), (8, "generator"), (9, "critic")):
        assert watch.allows(step, player, torch.tensor(torch.inf))
    with pytest.raises(NonFinite, match=r"the loss or the gradient of the critic is not finite in step 8; .*--lr") as caught:
        watch.require()
    assert (caught.value.step, caught.value.player) == (7, "critic")


def test_the_count_of_skipped_updates_goes_on(tmp_path: Path) -> None:
    bad = torch.tensor(torch.nan)
    first = SkippingWatch(["generator"], "cpu", True, tmp_path, 2)
    assert not first.allows(3, "generator", bad) and not first.allows(8, "generator", bad)
    reader = SkippingWatch(["generator"], "cpu", False, tmp_path, 2)
    reader.resumed(6)
    assert reader.steps == [3] and len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2  # it does not write
    second = SkippingWatch(["generator"], "cpu", True, tmp_path, 2)
    second.resumed(6)  # the checkpoint is older than the later one
    second.loss(8, "generator", torch.tensor(1.0))
    assert second.allows(8, "generator", torch.tensor(1.0))
    assert second.logged(8, {"a": 1.0, "b": torch.nan}) == {"a": 1.0, "skipped": 1.0}
    with pytest.raises(NonFinite, match="the b loss is nan in step 9"):
        SkippingWatch(["generator"], "cpu", True, tmp_path, 2).logged(8, {"b": torch.nan})
    second.loss(9, "generator", bad)
    assert not second.allows(9, "generator", torch.tensor(1.0))
    with pytest.raises(NonFinite, match="after 2 skipped updates"):
        second.allows(10, "generator", bad)
