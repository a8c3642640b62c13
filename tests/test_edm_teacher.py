"""EDM networks as teachers: loaded, distilled, and exported with their own code, which diffusers runs without onestep."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler
from tiny_edm import TINY, edm, labels_of, normal, tiny, write

from onestep.checkpoint import latest_checkpoint, read_weights
from onestep.config import load_config, resolve
from onestep.lora.targets import default_targets
from onestep.metrics import load_pipeline
from onestep.networks import NETWORKS
from onestep.networks.import_edm import import_edm
from onestep.networks.standalone import TIME_SCALE, source_of
from onestep.objectives import objective_class
from onestep.plan import gigabytes
from onestep.plan import main as plan
from onestep.run import export_run, make_student
from onestep.schedule import EDM
from onestep.teacher import TEACHERS, EDMTeacher, facts_of, load_teacher
from onestep.train import main
from onestep.verify import own_x0, pictures_of, plain_pipeline, stock_pictures

PLAIN = """
import sys
sys.modules["onestep"] = None
import numpy, torch
from diffusers import DiffusionPipeline
folder, output, classes = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
given = {"class_labels": [seed % int(classes) for seed in range(3)]} if int(classes) else {}
sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
images = pipe(batch_size=3, **given, num_inference_steps=1, generator=sources, output_type="np").images
assert not any(name.startswith("onestep.") for name in sys.modules)
numpy.save(output, images)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies the code of folders before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported folder for each of TINY."""
    root = tmp_path_factory.mktemp("edm")
    for name in TINY:
        import_edm(write(root / f"{name}.pkl", edm(tiny(name))), root / name)
    return root


def options(teacher: str, data: Path, output: Path, *more: str) -> list[str]:
    few = ["--iterations", "2", "--batch-size", "2", "--grid-steps", "1", "--ratio", "2", "--device", "cpu"]
    return ["--teacher", teacher, "--data", str(data), "--init-rho", "2.5", *few, "--output", str(output), *more]


@pytest.fixture(scope="module")
def runs(folders: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in TINY:
        assert main(options(str(folders / name), tiny_images, root / name)) == 0
    return root


def student_of(run: Path) -> tuple[Any, EDMTeacher]:
    """(generator, teacher) of a run's last checkpoint."""
    recipe = load_config(run)
    config, options = resolve(objective_class(recipe["method"]).Config, {}, recipe, {})
    teacher = load_teacher(config.teacher)
    assert isinstance(teacher, EDMTeacher)
    generator, checkpoint = make_student(config, options, teacher), latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    generator.denoiser.network.load_state_dict(read_weights(checkpoint, "average"))
    return generator, teacher


def pictures(folder: Path, classes: int, tmp_path: Path) -> torch.Tensor:
    """What a process without onestep makes of an exported folder for the seeds 0, 1, 2."""
    away, output = tmp_path / "elsewhere", tmp_path / "images.npy"
    away.mkdir()
    command = [sys.executable, "-I", "-c", PLAIN, str(folder), str(output), str(classes)]
    done = subprocess.run(command, cwd=away, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(output)).permute(0, 3, 1, 2)


# --- the teacher


@pytest.mark.parametrize("name", TINY)
def test_x0_is_that_of_edm(name: str, folders: Path) -> None:
    """x0 = c_skip x + c_out F(c_in x; ln(sigma) / 4)."""
    teacher, network = load_teacher(str(folders / name)), tiny(name)
    schedule = teacher.denoiser.schedule
    assert isinstance(teacher, EDMTeacher) and teacher.remote_code and isinstance(schedule, EDM)
    assert schedule.noise_scale == 0.25 and teacher.denoiser.prediction.name == "edm"
    assert teacher.shape == (3, 8, 8) and teacher.classes == (network.config.num_class_embeds or 1)
    labels = torch.tensor([0, 2, 1, 1])
    cond, uncond = teacher.encode(labels)
    assert cond.keys() == labels_of(network).keys() and uncond is None
    sigma, x = torch.tensor([0.01, 0.5, 2.5, 80.0], dtype=torch.float64), normal(4, 3, 8, 8)
    s, variance = sigma[:, None, None, None], 0.25
    x = x * (s**2 + variance).sqrt()
    with torch.no_grad():
        scaled = (x / (s**2 + variance).sqrt()).float()
        out = network(scaled, sigma.log() / 4, **labels_of(network, *labels.tolist())).sample.double()
        want = variance / (s**2 + variance) * x + s * 0.5 / (s**2 + variance).sqrt() * out
        found = teacher(x.float(), sigma, cond)
    assert (found - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("name", TINY)
def test_the_last_middle_block_is_tapped(name: str, folders: Path) -> None:
    denoiser, seen = load_teacher(str(folders / name)).denoiser, []
    network: Any = denoiser.network
    blocks = [key for key in network.dec if "_in" in key]
    network.dec[blocks[-1]].register_forward_hook(lambda *given: seen.append(given[2]))
    (found,) = denoiser.features(normal(2, 3, 8, 8).float(), torch.tensor([1.0, 2.0]), labels_of(network, 0, 1))
    assert blocks[-1] == "4x4_in1" and torch.equal(found, seen[0])


def test_half_precision_is_computed_in_float32(folders: Path) -> None:
    half = load_teacher(str(folders / "ncsnpp"), dtype=torch.bfloat16)
    full = load_teacher(str(folders / "ncsnpp"))
    full.denoiser.network.load_state_dict(half.denoiser.network.state_dict())
    x, sigma, cond = normal(2, 3, 8, 8).float(), torch.tensor([0.5, 2.0]), half.encode(torch.tensor([0, 1]))[0]
    with torch.no_grad():
        assert torch.allclose(half(x, sigma, cond), full(x, sigma, cond), atol=1e-5)


def test_onestep_networks_are_imported_only_for_folders_that_name_them(tiny_teacher: Path) -> None:
    code = "import sys; from onestep.teacher import load_teacher; load_teacher(sys.argv[1])"
    code += "; assert 'onestep.networks' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tiny_teacher)], check=True)


# --- distilled and exported


@pytest.mark.parametrize("name", TINY)
def test_an_export_needs_diffusers_alone(name: str, runs: Path, tmp_path: Path) -> None:
    export = runs / name / "export"
    generator, teacher = student_of(runs / name)
    kind = type(teacher.pipeline.unet)
    last = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["gan"] > 0 and last["gan_critic"] > 0
    index = json.loads((export / "model_index.json").read_text())
    module = kind.__module__.rpartition(".")[2]
    assert index["_class_name"] == "ConsistencyModelPipeline" and index["unet"] == [module, kind.__name__]
    assert index["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
    assert (export / f"unet/{module}.py").read_text() == source_of(kind)
    assert "trust_remote_code=True" in (export / "README.md").read_text()
    classes = teacher.pipeline.unet.config.num_class_embeds or 0
    want = pictures_of(own_x0(generator, teacher, torch.float32, (0, 1, 2)), teacher)
    found = pictures(export, classes, tmp_path)
    assert want.std() > 0.05 and (found - want).abs().max() <= 1e-5


def test_nothing_trusts_code_by_itself(runs: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain_pipeline(runs / "adm/export", torch.float32)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pipeline(runs / "adm/export")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(str(runs / "adm/export"))
    assert type(load_pipeline(runs / "adm/export", trust_remote_code=True).unet).__name__ == "DhariwalUNet"


def test_a_wrong_time_is_noticed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.networks.standalone.TIME_SCALE", TIME_SCALE * 1.5)
    with pytest.raises(RuntimeError, match="deviates"):
        export_run(runs / "adm", tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
def test_half_precision_exports(dtype: str, runs: Path, tmp_path: Path) -> None:
    assert "trust_remote_code=True" in export_run(runs / "ncsnpp", tmp_path / "export", dtype)


def test_two_exports_in_one_process(runs: Path, tmp_path: Path) -> None:
    """diffusers runs the file of the second in the module of the first."""
    shutil.copytree(runs / "ddpmpp/export", tmp_path / "copy")
    teacher = load_teacher(str(load_config(runs / "ddpmpp")["teacher"]))
    first = plain_pipeline(runs / "ddpmpp/export", torch.float32, remote_code=True)
    before = stock_pictures(first, teacher, 1, (0, 1))
    second = plain_pipeline(tmp_path / "copy", torch.float32, remote_code=True)
    assert type(first.unet) is not type(second.unet)
    assert torch.equal(stock_pictures(first, teacher, 1, (0, 1)), before)
    assert torch.equal(stock_pictures(second, teacher, 1, (0, 1)), before)


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
def test_the_joined_file_stands_alone(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(kind)  # type: ignore[arg-type]
    roots = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert roots <= {"abc", "collections", "diffusers", "functools", "math", "torch", "typing"}
    monkeypatch.setitem(sys.modules, "onestep", None)
    found: dict[str, Any] = {"__name__": "standalone"}
    exec(compile(source, "standalone.py", "exec"), found)
    for name, (ours, config) in TINY.items():
        if ours is kind:
            network, theirs = tiny(name), found[kind.__name__](**config).eval()
            theirs.load_state_dict(network.state_dict())
            x, cond = normal(2, 3, 8, 8).float(), labels_of(network, 0, 1)
            assert torch.equal(theirs(x, 0.3, **cond).sample, network(x, 0.3, **cond).sample)
            scaled = found[kind.__name__](**config, time_scale=TIME_SCALE).eval()
            scaled.load_state_dict(network.state_dict())
            assert torch.allclose(scaled(x, 300.0, **cond).sample, network(x, 0.3, **cond).sample, atol=1e-5)


# --- pickles


def test_a_pickle_is_imported_once(folders: Path, tiny_images: Path, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "edm-mine.pkl"
    shutil.copy(folders / "adm.pkl", path)
    assert main(options(str(path), tiny_images, tmp_path / "run", "--gan", "0", "--gan-critic", "0")) == 0
    (made,) = (cache / "teachers").glob("edm-mine-*/model_index.json")
    before = made.stat().st_mtime_ns
    teacher = load_teacher(str(path))
    assert made.stat().st_mtime_ns == before and teacher.facts.licence == "unknown"
    weights = tiny("adm").state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in teacher.denoiser.network.state_dict().items())


def test_a_published_file_is_known_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    path.touch()
    facts = facts_of(str(path))
    assert facts.source == str(path) and facts.licence == "cc-by-nc-sa-4.0" and facts.train["init_rho"] == 2.5
    with pytest.raises(ValueError, match="neither a known name"):
        facts_of("nowhere/edm.pkl")


def test_a_published_network_is_downloaded_once(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, target: str) -> None:
        asked.append(url)
        shutil.copy(folders / "adm.pkl", target)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    facts = TEACHERS["edm-imagenet64"]
    monkeypatch.setitem(TEACHERS, "tiny", type(facts)(source=facts.source, prediction="edm"))
    for _ in range(2):
        assert load_teacher("tiny", cache=tmp_path / "cache").classes == 3
    assert asked == ["https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"]
    assert [path.name for path in (tmp_path / "cache/teachers").iterdir() if path.is_dir()] == [
        "edm-imagenet-64x64-cond-adm"
    ]
    assert not list((tmp_path / "cache").rglob("*.pkl"))


@pytest.mark.parametrize("name", ("edm-cifar10", "edm-imagenet64"))
def test_no_network_is_one_clear_line(
    name: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(url: str, target: str) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(SystemExit, match="2"):
        main(options(name, tiny_images, tmp_path / "run"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and TEACHERS[name].source in error and "no route to host" in error
    assert "python -m onestep.networks.import_edm" in error and "--teacher FOLDER" in error


def test_a_damaged_pickle_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"edm\.pkl cannot be read as an EDM network") as caught:
        load_teacher(str(tmp_path / "edm.pkl"), cache=tmp_path / "cache")
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache/teachers").glob("*/*"))


def test_the_imported_folder_is_a_stock_pipeline_but_for_its_network(folders: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders / "adm")
    assert type(pipeline) is ConsistencyModelPipeline and type(pipeline.scheduler) is EDMEulerScheduler


def test_a_pickle_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    network = tiny(next(iter(TINY)))
    path = write(tmp_path / "edm-tiny.pkl", edm(network))
    argv = ["--teacher", str(path), "--gan", "0", "--gan-critic", "0", "--batch-size", "2", "--device", "cpu"]
    assert plan([*argv, "--init-rho", "2.5"]) == 0
    shown = capsys.readouterr().out
    size = 4 * sum(each.numel() for each in network.state_dict().values())
    found = next(line for line in shown.splitlines() if line.startswith("  teacher "))
    assert gigabytes(size) in found


@pytest.mark.parametrize("name", TINY)
def test_an_adapter_has_layers_by_default(name: str) -> None:
    assert "affine" in default_targets(tiny(name))
