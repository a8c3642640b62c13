"""Compiled networks: the same numbers and files, hooks that are not passed over, and a fall back that is told once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from playing import dit
from torch import nn

from onestep.compiling import compile_networks, eagerly
from onestep.config import TrainConfig


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that a compiler which changes nothing was given."""
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    return seen


def test_a_compiled_denoiser_gives_the_same_and_its_features_too(graphs: list[Any]) -> None:
    teacher = dit()
    denoiser = teacher.copy()
    x, t = torch.ones(2, *teacher.shape), torch.tensor([10, 500])
    cond, _ = teacher.encode(torch.tensor([0, 1]))
    names = list(denoiser.network.state_dict())
    expected = denoiser(x, t, cond), denoiser.features(x, t, cond)
    compile_networks([denoiser.network])
    torch.testing.assert_close(denoiser(x, t, cond), expected[0])
    assert graphs, "nothing was compiled"
    found = denoiser.features(x, t, cond)  # after it was compiled without the hooks that stop it
    assert len(found) == 1 and torch.equal(found[0], expected[1][0])
    assert list(denoiser.network.state_dict()) == names


def test_eagerly_is_nothing_for_a_network_that_is_not_compiled(graphs: list[Any]) -> None:
    network = nn.Linear(2, 2)
    compile_networks([network])
    with eagerly(network):
        network(torch.ones(1, 2))
    assert not graphs
    network(torch.ones(1, 2))
    assert len(graphs) == 1


def test_a_compiler_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    networks = [nn.Linear(2, 2), nn.Linear(2, 3)]
    compile_networks(networks)
    for network in networks:
        x = torch.ones(4, 2)
        torch.testing.assert_close(network(x), x @ network.weight.T + network.bias)
    assert capsys.readouterr().err == "warning: --compile failed, training goes on without it: no compiler\n"


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="compile is not possible with --critic lora"):
        TrainConfig(compile=True, critic="lora")
    assert TrainConfig(compile=True).compile


def test_a_compiled_run_is_the_same_run(tiny_teacher: Path, tmp_path: Path, graphs: list[Any]) -> None:
    from scripts import load_script

    weights = []
    for compiled in (False, True):
        options = {"device": "cpu", "batch_size": 2, "compile": compiled}
        trainer = load_script("speed").trainer_of("sim", str(tiny_teacher), options, tmp_path / str(compiled))
        trainer.update()
        weights.append(trainer._saved["generator-0"].state_dict())
    assert graphs and weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name])
