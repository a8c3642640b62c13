"""An exported folder makes the generator's pictures by itself, or it does not appear at all."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import dit_pipeline, edm_pipeline, randomise
from torch import Tensor

from onestep import exporting
from onestep import verify as verifying
from onestep.card import Card, snippet, update_score
from onestep.exporting import export, scheduler_for
from onestep.generator import Generator
from onestep.schedule import EDM
from onestep.teacher import DiTTeacher, EDMTeacher, Facts, Teacher

CARD = Card("dmd2", "fashion", 1.5, "Apache-2.0; trained on Fashion-MNIST (MIT)", {"lr": 1e-4}, command="train it")
LABELS = [3, 0, 7]

STOCK = """
import os, sys, traceback

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onestep":
            raise ImportError("onestep was imported")

sys.meta_path.insert(0, Refuse())
import json
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

def pictures(folder, steps, dtype, labels, output):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    own = {"guidance_scale": 1.0} if type(pipe).__name__ == "DiTPipeline" else {"batch_size": len(labels)}
    torch.manual_seed(6)
    images = pipe(class_labels=labels, num_inference_steps=steps, generator=torch.Generator().manual_seed(5),
                  output_type="np", **own).images
    save_file({"images": torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous()}, output)

def run(code, cwd):
    os.chdir(cwd)
    exec(code, {})

for line in sys.stdin:
    try:
        name, arguments = json.loads(line)
        {"pictures": pictures, "run": run}[name](**arguments)
        print("done", flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


class Stock:
    """A Python that cannot import onestep. One for all tests: importing diffusers takes it seconds."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def __call__(self, name: str, **arguments: Any) -> None:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([name, arguments], default=str), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer == "done\n", json.loads(answer) if answer else "the other Python has ended"

    def pictures(self, folder: Path, steps: int, dtype: str = "float32") -> Tensor:
        output = folder.parent / "pictures.safetensors"
        self("pictures", folder=folder, steps=steps, dtype=dtype, labels=LABELS, output=output)
        return load_file(output)["images"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with subprocess.Popen(
        [sys.executable, "-c", STOCK],
        cwd=tmp_path_factory.mktemp("stock"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Stock(process)


def student(kind: type[Teacher], pipeline: Any, times: list[Any]) -> tuple[Generator, Teacher]:
    teacher = kind(pipeline, Facts(source="tiny"))
    denoiser = teacher.copy()
    randomise(denoiser.network, seed=2, scale=0.02)
    return Generator(denoiser, times, 1.0 if teacher.export_scale == "unit" else times[0]), teacher


@torch.no_grad()
def own_pictures(generator: Generator, teacher: Teacher) -> Tensor:
    """The generator on the noise that a stock pipeline draws with seed 5, and DiT's later noises with seed 6."""
    shape = (len(LABELS), *teacher.shape)
    source = torch.Generator().manual_seed(5)
    z = torch.randn(shape, generator=source)
    later = torch.Generator().manual_seed(6) if isinstance(teacher, DiTTeacher) else source
    noises = [torch.randn(shape, generator=later) for _ in generator.times[1:]]
    return teacher.to_images(generator(z, teacher.encode(torch.tensor(LABELS))[0], noises))


def loud(generator: Generator, teacher: Teacher) -> tuple[Generator, Teacher]:
    """With x0 far outside [-1, 1] on the way, which no scheduler may clip."""
    generator.denoiser.network.conv_out.weight.data *= 6
    return generator, teacher


CASES = {
    "epsilon": lambda: student(DiTTeacher, dit_pipeline(), [439]),
    "v": lambda: student(DiTTeacher, dit_pipeline("v_prediction"), [439]),
    "learned variance": lambda: student(DiTTeacher, dit_pipeline(learned_variance=True), [639]),
    "v, learned variance, no names": lambda: student(DiTTeacher, dit_pipeline("v_prediction", True, classes=0), [439]),
    "chain": lambda: student(DiTTeacher, dit_pipeline(), [439, 329, 219, 109]),
    "chain from the end": lambda: student(DiTTeacher, dit_pipeline("v_prediction"), [999, 749, 499, 249]),
    "uneven chain": lambda: student(DiTTeacher, dit_pipeline(learned_variance=True), [439, 293, 147]),
    "edm 2.5": lambda: student(EDMTeacher, edm_pipeline(1), [2.5]),
    "edm 80": lambda: student(EDMTeacher, edm_pipeline(3), [80.0]),
    "edm chain": lambda: student(EDMTeacher, edm_pipeline(1), EDM().chain(10.0, 4)),
    "edm chain, loud": lambda: loud(*student(EDMTeacher, edm_pipeline(1), EDM().chain(10.0, 2))),
    "edm, no classes": lambda: student(EDMTeacher, edm_pipeline(1, classes=None), [2.5]),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_diffusers_makes_the_generators_pictures(case: str, tmp_path: Path, stock: Stock) -> None:
    generator, teacher = CASES[case]()
    before = own_pictures(generator, teacher)
    assert export(generator, teacher, tmp_path / "out", torch.float32, CARD) == tmp_path / "out"
    assert torch.equal(own_pictures(generator, teacher), before)
    assert before.std() > 0.03 and (before > 0.99).float().mean() < 0.5
    assert (stock.pictures(tmp_path / "out", len(generator.times)) - before).abs().max() <= 1e-5
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert {each[0] for each in index.values() if isinstance(each, list)} == {"diffusers"}
    assert index["_class_name"] == type(teacher.pipeline).__name__
    if isinstance(teacher, DiTTeacher):
        assert {name: int(i) for i, name in index.get("id2label", {}).items()} == teacher.pipeline.labels
    assert not list((tmp_path / "out").rglob("*.bin")) and not list((tmp_path / "out").rglob("*.py"))


def test_a_reexport_of_an_export_keeps_names_and_tells_no_paths(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    generator, teacher = CASES["epsilon"]()
    export(generator, teacher, tmp_path / "first", torch.float32, CARD)
    generator, teacher = student(DiTTeacher, DiffusionPipeline.from_pretrained(tmp_path / "first"), [439])
    export(generator, teacher, tmp_path / "second", torch.float32, CARD)
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert DiffusionPipeline.from_pretrained(tmp_path / "second").labels["class 7"] == 7


def test_live_networks_are_left_alone(tmp_path: Path) -> None:
    generator, teacher = CASES["epsilon"]()
    generator.denoiser.network.train()
    parts = dict(teacher.pipeline.components)
    state = torch.get_rng_state()
    export(generator, teacher, tmp_path / "out", torch.float16, CARD)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.pipeline.components == parts
    assert generator.denoiser.network.training
    assert {p.dtype for p in generator.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in generator.parameters())


@pytest.mark.parametrize("times", ([999, 749, 499, 249], [439, 329, 219, 109], [439, 293, 147], [999, 666, 333]))
def test_lcm_visits_the_chains_times(times: list[int]) -> None:
    generator, teacher = student(DiTTeacher, dit_pipeline(), times)
    scheduler = scheduler_for(generator, teacher)
    scheduler.set_timesteps(len(times))
    assert scheduler.timesteps.tolist() == times


def test_a_chain_that_lcm_cannot_visit_is_refused() -> None:
    generator, teacher = student(DiTTeacher, dit_pipeline(), [440, 400, 7])
    with pytest.raises(ValueError, match="--student-steps"):
        scheduler_for(generator, teacher)
    generator, teacher = student(EDMTeacher, edm_pipeline(), [80.0, 24.4, 5.8])
    with pytest.raises(ValueError, match="--student-steps"):
        scheduler_for(generator, teacher)


@pytest.mark.parametrize(
    ("case", "counts"),
    [("chain from the end", [1, 2, 4]), ("chain", [1, 2, 4]), ("uneven chain", [1, 3]), ("edm chain", [1, 2, 4])],
)
def test_one_export_answers_several_numbers_of_steps(
    case: str, counts: list[int], tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, teacher = CASES[case]()
    compared = []
    honest = verifying.stock_pictures
    monkeypatch.setattr(
        verifying, "stock_pictures", lambda *args: (compared.append((args[2], args[0].dtype)), honest(*args))[1]
    )
    export(generator, teacher, tmp_path / "out", torch.bfloat16, CARD)
    assert compared == [(count, kind) for kind in (torch.float32, torch.bfloat16) for count in counts]
    text = (tmp_path / "out/README.md").read_text()
    export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    for count in counts:
        part = Generator(generator.denoiser, generator.times[:: len(generator.times) // count], generator.input_scale)
        assert (stock.pictures(tmp_path / "out", count) - own_pictures(part, teacher)).abs().max() <= 1e-5
        assert f"{count}, at {', '.join(f'{t:g}' for t in part.times)};" in text
    assert "other numbers of steps visit other times" in text


def test_every_number_of_steps_on_the_card_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, teacher = CASES["chain"]()
    honest = verifying.stock_pictures
    monkeypatch.setattr(verifying, "stock_pictures", lambda *args: honest(*args) + 2e-5 * (args[2] == 2))
    with pytest.raises(RuntimeError, match=r"deviates .* at num_inference_steps=2"):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert not list(tmp_path.iterdir())


def test_a_student_of_other_steps_says_so(tmp_path: Path) -> None:
    generator, teacher = CASES["epsilon"]()
    card = replace(CARD, config={"student_steps": 4})
    export(generator, teacher, tmp_path / "out", torch.float32, card)
    assert "1, at 439; trained with student_steps 4; other" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(("case", "scale", "answer"), (("epsilon", 2.5, "unit"), ("edm 80", 1.0, "sigma")))
def test_a_wrong_input_scale_is_refused(case: str, scale: float, answer: str, tmp_path: Path) -> None:
    generator, teacher = CASES[case]()
    generator.input_scale = scale
    with pytest.raises(ValueError, match=f"--input-scale {answer}"):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failure_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, teacher = CASES["epsilon"]()
    export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    before = contents(tmp_path / "out")
    randomise(generator.denoiser.network, seed=3)
    with monkeypatch.context() as patch:
        honest = verifying.stock_pictures
        patch.setattr(verifying, "stock_pictures", lambda *args: honest(*args) + 2e-5)
        with pytest.raises(RuntimeError, match="deviates"):
            export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    broken = generator.denoiser.network.transformer_blocks[0].ff.net[2].weight
    broken.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == before
    broken.data[0, 0] = 0.0
    export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") != before


def test_a_decoder_that_magnifies_rounding_is_no_fault_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, teacher = CASES["epsilon"]()
    with torch.no_grad():
        teacher.pipeline.vae.decoder.conv_out.weight.mul_(300)
    honest = verifying.stock_pictures
    # float32's own rounding of x0, in the place of a large network's
    monkeypatch.setattr(verifying, "stock_pictures", lambda *args: honest(*args) + 2e-5)
    export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    monkeypatch.setattr(verifying, "stock_pictures", lambda *args: honest(*args) + 2e-3)
    with pytest.raises(RuntimeError, match="deviates"):
        export(generator, teacher, tmp_path / "other", torch.float32, CARD)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    generator, teacher = CASES["edm 80"]()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="writable"):
        export(generator, teacher, tmp_path / "file/out", torch.float32, CARD)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    for name in ("file", "mine"):
        with pytest.raises(ValueError, match="another folder"):
            export(generator, teacher, tmp_path / name, torch.float32, CARD)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.tex"]


def test_an_export_cut_off_between_its_renames_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, teacher = CASES["edm 80"]()
    export(generator, teacher, tmp_path / ".out.old", torch.float32, CARD)
    monkeypatch.setattr(exporting, "verify", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ("epsilon", "chain", "edm 2.5"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(case: str, dtype: torch.dtype, tmp_path: Path, stock: Stock) -> None:
    generator, teacher = CASES[case]()
    export(generator, teacher, tmp_path / "out", dtype, CARD)
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    deviation = (stock.pictures(tmp_path / "out", len(generator.times)) - own_pictures(generator, teacher)).abs()
    assert 0 < deviation.mean() < 0.01


def test_the_half_precision_run_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, teacher = CASES["edm 2.5"]()
    monkeypatch.setattr(verifying, "HALF_TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match="--export-dtype fp32"):
        export(generator, teacher, tmp_path / "out", torch.bfloat16, CARD)
    assert not list(tmp_path.iterdir())


def test_card_and_score(tmp_path: Path) -> None:
    generator, teacher = CASES["edm 2.5"]()
    folder = export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "diffusers" and "one-step" in front["tags"]
    assert "not scored" in text and "lr: 0.0001" in text and "train it" in text and str(tmp_path) not in text
    for value in (2.125, 1.5):
        update_score(folder, {"FD": value, "protocol": {"name": "fashion-10k"}, "export": str(folder)})
    new = (folder / "README.md").read_text()
    assert "| FD | 1.5 |" in new and "2.125" not in new and "fashion-10k" in new and str(tmp_path) not in new
    assert "not scored" not in new and new.startswith(text.split("## Score")[0]) and new.count("<!-- score") == 1
    assert not list(folder.glob("*.partial"))
    with pytest.raises(ValueError, match="README"):
        update_score(tmp_path, {"FD": 1.0})


@pytest.mark.parametrize("case", ("epsilon", "chain", "edm 2.5", "edm, no classes"))
def test_the_snippet_runs(case: str, tmp_path: Path, stock: Stock) -> None:
    generator, teacher = CASES[case]()
    folder = export(generator, teacher, tmp_path / "out", torch.float32, CARD)
    code = snippet(teacher, folder, len(generator.times))
    assert len(code.splitlines()) == 5
    stock("run", code=code, cwd=tmp_path)
    assert (tmp_path / "picture.png").is_file()
