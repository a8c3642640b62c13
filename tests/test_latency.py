"""Passes, times and memory of known things; the search for a batch; the script on real folders."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_script
from tiny import dit_pipeline

import onestep.metrics.speed as module
from onestep.metrics.memory import CLEAR, Memory
from onestep.metrics.render import load_pipeline
from onestep.metrics.speed import counted, measure, speed, timed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "dit"
    dit_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("steps", "guidance", "passes"), [(1, 1.0, 1), (3, 1.0, 3), (3, 2.0, 6)])
def test_passes_are_counted_in_the_pipeline(dit: Path, steps: int, guidance: float, passes: int):
    pipe = load_pipeline(dit)
    found = measure(pipe, Memory(CPU), 4, steps, guidance, warmup=1, calls=3)
    assert found["passes_per_image"] == passes and found["network_calls"] == steps
    assert found["images_per_s"] == 4 / found["pipeline"]["median_s"]
    assert not pipe.transformer._forward_pre_hooks


def test_a_pixel_pipeline_and_a_text_one_have_passes_too(tiny_teacher: Path):
    from tiny_text import sd15

    assert measure(load_pipeline(tiny_teacher), Memory(CPU), 2, 2, 1.0, warmup=1, calls=3)["passes_per_image"] == 2
    text = sd15()
    text.set_progress_bar_config(disable=True)
    # guidance doubles the batch, and PNDM makes one call more than its steps: nothing that steps alone would tell
    assert type(text.scheduler).__name__ == "PNDMScheduler"
    assert measure(text, Memory(CPU), 3, 2, 4.0, warmup=1, calls=3, prompt="cat")["passes_per_image"] == 6


def test_the_repeated_call_is_the_last_one_of_the_pipeline():
    network, seen = torch.nn.Linear(3, 3), []
    network.register_forward_hook(lambda layer, args, output: seen.append((len(args[0]), layer.weight.grad_fn)))
    with counted(network) as passes:
        network(torch.ones(5, 3))
        network(torch.ones(2, 3))
    network(torch.ones(9, 3))
    assert (passes.calls, passes.samples) == (2, 7)
    assert torch.equal(passes.args[0], torch.ones(2, 3))


def test_times_are_those_of_the_calls_after_the_warm_up():
    """Three sleeps of 300 ms, which are thrown away, then of 5, 10 and 15."""
    naps = iter([0.3, 0.3, 0.3, 0.015, 0.005, 0.01])
    found = timed(lambda: time.sleep(next(naps)), CPU, warmup=3, calls=3)
    assert found["calls"] == 3 and not list(naps)
    for name, expected in (("lower_quartile_s", 0.0075), ("median_s", 0.01), ("upper_quartile_s", 0.0125)):
        assert expected <= found[name] < expected + 0.1


def test_memory_is_that_of_the_peak():
    memory = Memory(CPU)
    memory.reset()
    before = memory.peak()
    held = np.ones(40 << 20, np.uint8)
    if not CLEAR.is_file() or memory.peak() < held.nbytes / 2:
        pytest.skip("this system does not tell the peak, or other parts of the process have freed as much meanwhile")
    del held
    assert before < 10 << 20 and 38 << 20 < memory.peak() < 60 << 20
    memory.reset()
    assert memory.peak() < 10 << 20
    assert Memory(torch.device("meta")).peak() is None


def fake(rates: dict[int, float], out_of_memory: int = 10**6) -> Callable[..., dict[str, Any]]:
    """A `measure` with known images a second."""

    def measure(pipe: Any, memory: Memory, size: int, *rest: Any, **options: Any) -> dict[str, Any]:
        if size >= out_of_memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"batch_size": size, "images_per_s": rates[size]}

    return measure


@pytest.mark.parametrize(
    ("rates", "largest", "limit", "best", "tried", "reason"),
    [
        ({1: 1, 2: 2, 4: 4, 8: 8}, 8, 10**6, 8, 4, "the largest batch allowed, 8"),
        ({1: 1, 2: 2, 4: 1.9, 8: 2.03}, 64, 10**6, 2, 4, "no more images a second"),  # 1.5 % more is no gain
        ({1: 5, 2: 4, 4: 9, 8: 9.1, 16: 8}, 64, 10**6, 4, 5, "no more images a second"),  # one slow size is no end
        ({1: 1, 2: 2, 4: 4}, 64, 8, 4, 3, "memory: a batch of 8 does not fit"),
    ],
)  # fmt: skip
def test_the_search_ends_where_it_should(rates, largest, limit, best, tried, reason, tiny_teacher, monkeypatch):
    monkeypatch.setattr(module, "measure", fake(rates, limit))
    found = speed(load_pipeline(tiny_teacher), steps=1, guidance=1.0, largest=largest)
    assert found["latency"]["batch_size"] == 1 and found["throughput"]["batch_size"] == best
    assert found["batches"] == [[size, rates[size]] for size in list(rates)[:tried]]
    assert reason in found["stopped_by"]


def test_the_search_ends_before_memory_does(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "measure", fake({1: 1, 2: 2}))
    monkeypatch.setattr(Memory, "peak", lambda self: 1 << 60)
    found = speed(load_pipeline(tiny_teacher), steps=1, guidance=1.0)
    assert found["stopped_by"] == "memory: a batch of 2 would not fit" and len(found["batches"]) == 1
    monkeypatch.setattr(module, "measure", fake({}, out_of_memory=1))
    with pytest.raises(ValueError, match=r"one image does not fit .* --dtype float16"):
        speed(load_pipeline(tiny_teacher), steps=1, guidance=1.0)


def test_the_script_appends_a_row(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script, output = load_script("latency"), tmp_path / "latency.jsonl"
    flags = ["--calls", "3", "--warmup", "1", "--largest-batch", "4", "--device", "cpu", "--output", str(output)]
    for _ in range(2):
        assert script.main([str(dit), "--steps", "2", "--guidance", "1.5", *flags]) == 0
    first, row = map(json.loads, output.read_text().splitlines())
    assert row["weights_sha256"] == first["weights_sha256"] and len(row["weights_sha256"]) == 64
    assert (row["steps"], row["guidance"], row["dtype"]) == (2, 1.5, "float32")
    assert row["parameters"] == sum(each.numel() for each in load_pipeline(dit).transformer.parameters())
    assert row["latency"]["batch_size"] == 1 and row["latency"]["passes_per_image"] == 4
    assert row["latency"]["pipeline"]["calls"] == 3 and row["latency"]["network"]["median_s"] > 0
    assert row["machine"]["device"] == "cpu" and "commit" in row and "date" in row
    shown = capsys.readouterr().out
    assert "latency, batch 1" in shown and "passes 4" in shown and "images/s" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calls", "2"], "--calls 2 is not allowed; type --calls 3 or more"),
        (["--warmup", "0"], "--warmup 0"),
        (["--largest-batch", "0"], "--largest-batch 0"),
        (["--steps", "0"], "--steps 0"),
        (["--guidance", "2"], "--guidance 2.0 is not possible for ConsistencyModelPipeline"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--output", "nowhere/rows.jsonl"], "no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(flags, words, tiny_teacher, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_script("latency").main([str(tiny_teacher), "--device", "cpu", "--output", "rows.jsonl", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_folder_that_is_no_export_is_refused(tmp_path, capsys):
    assert load_script("latency").main([str(tmp_path), "--output", str(tmp_path / "rows.jsonl")]) == 2
    assert "no model_index.json" in capsys.readouterr().err
