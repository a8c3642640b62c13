"""Help and errors in arguments come before anything heavy is imported; options and what they choose from agree."""

import json
import os
import subprocess
import sys
from collections.abc import Collection

import pytest

import onestep.data
import onestep.teacher
from onestep import discriminator, highpass, jvp, trajectory
from onestep.lora import FORMATS
from onestep.methods import METHODS, config_class
from onestep.objectives import boot, f_distill, objective_class, sim
from onestep.options import options_of
from onestep.pipelines import adapter_guidance

HEAVY = ["torch", "torchvision", "numpy", "scipy", "PIL", "safetensors", "diffusers", "transformers", "accelerate", "peft"]
HELP = [
    *(("train", "--method", name, "--help") for name in METHODS),
    *(("train", "--teacher", name, "--help") for name in ("sdxl", "owner/name")),
    *((name, "--help") for name in ("plan", "evaluate", "report", "export", "check", "replay", "students")),
    ("data.__main__", "check", "--help"),
    ("teach.__main__", "--help"),
]
ERRORS = [
    (("train", "--method", "dmd3"), "no method 'dmd3'; allowed are dmd2, dmd,"),
    (("train", "--teacher", "fashon"), "did you mean --teacher fashion?"),
    (("train", "--bacth-size", "4"), "no flag --bacth-size; did you mean --batch-size?"),
    (("train", "--method", "cd", "--gan", "1"), "no flag --gan"),
    (("train", "--lr", "fast"), "--lr is 'fast'"),
    (("train", "--beta2", "1"), "allowed is a finite number at least 0 below 1"),
    (("train", "--optimizer", "adam"), "one of adamw, adamw8bit, paged-adamw8bit; did you mean adamw?"),
    (("train", "--method", "f-distill", "--divergence", "kl"), "one of reverse-kl, forward-kl, js"),
    (("train", "--config", "missing.yaml"), "no file missing.yaml"),
    (("train", "--config", "typo.yaml"), "no option 'bacth_size' in typo.yaml"),
    (("train", "--batch-size", "8", "--accumulation", "3"), "batch_size 8 is no multiple of accumulation 3"),
    (("train", "--offload", "--critic", "lora"), "--offload moves away the weights that adapters work on"),
    (("train", "--method", "f-distill", "--gan-critic", "0"), "gan_critic 0 does not train one"),
    (("train", "--method", "lcm", "--guidance-min", "3"), "guidance_min 3.0 is above guidance_max 0.0"),
    (("train", "--method", "snoopi", "--kappa-min", "5"), "kappa_min 5.0 is above kappa_max 4.0"),
    (("train", "--method", "scott", "--eta", "2"), "type --eta 1"),
    (("train", "--method", "meanflow", "--to-data", "0.99"), "shares of the same samples"),
    (("train", "--method", "hyper-sd", "--segments", "8,4"), "type --segments 8,4,1"),
    (("train", "--method", "hyper-sd-score", "--segment-gan", "x"), "allowed are finite numbers from 0 on"),
    (("train", "--method", "agd", "--guidance-max", "1"), "guidance_max 1.0 is not above guidance_min 1.0"),
    (("train", "--method", "agd", "--trajectory-points", "20"), "is no divisor of trajectory_steps 50; type"),
    (("train", "--method", "agd", "--calibrate", "1"), "a strength for either half of the range needs 2 samples; type"),
    (("train", "--method", "sid", "--backtrack", "3"), "backtrack_nodes 4 is more than the 3 steps of --backtrack"),
    (("plan", "--method", "dmd3"), "no method 'dmd3'"),
    (("plan", "--device-memory", "24"), "--device-memory is '24'"),
    (("plan", "--processes", "0"), "--processes is 0"),
    (("evaluate", "folder", "--step", "1"), "no flag --step; did you mean --steps?"),
    (("evaluate", "folder", "--output", "nowhere/rows.jsonl"), "no folder nowhere for --output"),
    (("report", "."), "run/config.yaml names no teacher"),
    (("report", ".", "--samples", "-1"), "--samples -1 is not allowed"),
    (("report", ".", "-o", "nowhere/page.html"), "is no file in a folder that there is"),
    (("export", "nowhere"), "no file nowhere/config.yaml"),
    (("export", "run"), "run/config.yaml names no teacher"),
    (("export", "run", "--steps", "0"), "--steps 0 is not allowed"),
    (("export", "run", "--lora", "onnx"), "choose from"),
    (("check", "fashon"), "did you mean --teacher fashion?"),
    (("check", "fashion", "--steps", "0"), "1 or more steps"),
    (("replay", "nowhere"), "no file nowhere/config.yaml"),
    (("students", "nowhere"), "no folder nowhere"),
    (("data.__main__", "check", "x", "--images", "maybe"), "invalid choice: 'maybe'"),
    (("teach.__main__", "sdxl"), "invalid choice: 'sdxl'"),
    (("teach.__main__", "digits", "--steps", "0"), "steps is '0'; allowed is an integer at least 1"),
    (("teach.__main__", "digits", "--config", "typo.yaml"), "no option bacth_size"),
]
ANSWER = """
import contextlib, io, json, sys
from importlib import import_module

heavy, calls = json.load(sys.stdin)
answers = []
for command, *arguments in calls:
    sys.argv, before = [command, *arguments], set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            code = import_module(f"onestep.{command}").main()
        except SystemExit as stop:
            code = stop.code
    answers.append([code, said.getvalue(), [name for name in heavy if name in set(sys.modules) - before]])
print(json.dumps(answers))
"""
Answers = dict[tuple[str, ...], tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Exit code, text and heavy imports of every call, all in one process: of what is imported twice the first is told."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "typo.yaml").write_text("bacth_size: 4\n")
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("method: dmd2\n")
    calls = [*HELP, *(call for call, _ in ERRORS)]
    given = json.dumps([HEAVY, calls])
    done = subprocess.run([sys.executable, "-c", ANSWER], input=given, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {call: tuple(answer) for call, answer in zip(calls, json.loads(done.stdout))}


@pytest.mark.parametrize("call", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(answers: Answers, call: tuple[str, ...]) -> None:
    code, text, heavy = answers[call]
    assert code == 0 and heavy == [] and text.startswith("usage: ")
    if "--method" in call:
        assert f"options of {call[2]}:" in text


@pytest.mark.parametrize("call, message", ERRORS, ids=[" ".join(call) for call, _ in ERRORS])
def test_errors_in_arguments_import_nothing_heavy(answers: Answers, call: tuple[str, ...], message: str) -> None:
    code, text, heavy = answers[call]
    assert code == 2 and heavy == [] and message in text and text.startswith("error: ") and text.count("\n") == 1, text


@pytest.mark.parametrize("arguments, limit", [(["-c", "import onestep"], 0.2), (["-m", "onestep.train", "--help"], 0.5)])
def test_start_takes_little_time(arguments: list[str], limit: float) -> None:
    """Seconds of CPU, which other processes do not lengthen as they do those of the clock; the best of three."""
    spent = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < limit, spent


@pytest.mark.parametrize("name", METHODS)
def test_the_options_are_those_of_the_method(name: str) -> None:
    assert config_class(name) is objective_class(name).Config


@pytest.mark.parametrize(
    "method, option, table",
    [
        ("agd", "adapter", adapter_guidance.KINDS),
        ("boot", "weight", boot.WEIGHTS),
        ("f-distill", "divergence", f_distill.WEIGHTS),
        ("hipa", "mask", highpass.MASKS),
        ("ladd", "gan_loss", discriminator.ADVERSARIES),
        ("meanflow", "jvp", jvp.JVP),
        ("scm", "jvp", jvp.JVP),
        ("scott", "gan_loss", discriminator.ADVERSARIES),
        ("scott", "solver", trajectory.KEEP),
        ("sim", "distance", sim.DISTANCES),
    ],
)
def test_choices_are_the_names_in_the_method_s_table(method: str, option: str, table: Collection[str]) -> None:
    assert options_of(config_class(method))[option].choices == tuple(table)


def test_formats_of_lora_files_are_those_of_the_command(answers: Answers) -> None:
    assert "{" + ",".join(FORMATS) + "}" in answers["export", "--help"][1]


@pytest.mark.parametrize("package", [onestep.teacher, onestep.data])
def test_lazy_names_are_there_and_others_are_not(package) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=r"module 'onestep\.\w+' has no attribute 'Techer'"):
        _ = package.Techer
