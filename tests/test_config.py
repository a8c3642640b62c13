"""Options: precedence, errors that name what to type, and a saved config that replays its run."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from onestep.cli import first_pass, flags_of, parser
from onestep.config import (
    MethodConfig,
    TrainConfig,
    differences,
    flat,
    load_config,
    load_recipe,
    option,
    options_of,
    resolve,
    save_config,
)


@dataclass
class Method(MethodConfig):
    DEFAULTS: ClassVar[dict[str, Any]] = {"lr": 5e-5, "warmup": 7}

    ratio: int = option(5, "critic updates", minimum=1)
    gan: float = option(3e-3, "weight of the GAN loss, 10% of it", minimum=0)
    weighting: str = option("kl", "divergence", choices=("kl", "js"))
    sketch: bool = option(False, "a free option of a method", free=True)
    matching: float | None = option(None, "a number or none")


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def resolved(facts: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    return flat(*resolve(Method, facts or {}, recipe or {}, flags, "recipe.yaml"))


def test_each_layer_ranks_above_the_one_before():
    assert options_of(TrainConfig)["lr"].default == 1e-4
    assert resolved()["lr"] == 5e-5
    assert resolved({"lr": 1e-3})["lr"] == 1e-3
    assert resolved({"lr": 1e-3}, {"lr": 1e-2})["lr"] == 1e-2
    assert resolved({"lr": 1e-3}, {"lr": 1e-2}, lr="0.5")["lr"] == 0.5
    assert resolved()["warmup"] == 7 and resolved()["critic_lr"] == 1e-4


def test_options_of_the_method_share_the_namespace_and_facts_of_other_methods_are_passed_over():
    config, options = resolve(Method, {"ratio": 2, "alpha_of_another": 1}, {"gan": 1}, {"seed": "3"})
    assert (options.ratio, options.gan, config.seed) == (2, 1.0, 3)
    assert isinstance(options.gan, float)


def test_a_clash_of_names_is_our_own_mistake():
    @dataclass
    class Clash:
        lr: float = option(1.0, "taken")

    with pytest.raises(AssertionError, match="two options named lr"):
        options_of(TrainConfig, Clash)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bacth_size", 4, r"no option 'bacth_size' in recipe.yaml; did you mean batch_size\? Type --help"),
        ("batch-size", 4, r"did you mean batch_size\?"),
        ("zzzz", 4, r"no option 'zzzz' in recipe.yaml. Type --help"),
        ("batch_size", 0, r"batch_size in recipe.yaml is 0; allowed is an integer at least 1; for example 64"),
        ("iterations", 0, r"iterations .* at least 1"),
        ("iterations", 1.5, r"iterations .* is 1.5; allowed is an integer"),
        ("iterations", True, r"iterations .* is True"),
        ("iterations", None, r"iterations .* is None"),
        ("lr", 0, r"lr .* above 0"),
        ("lr", float("nan"), r"lr .* is nan; allowed is a finite number"),
        ("lr", "inf", r"lr .* finite"),
        ("lr", 10**400, r"lr .* finite"),
        ("lr", "fast", r"lr .* is 'fast'"),
        ("lr", [1e-4], r"lr .* is \[0.0001\]"),
        ("lr", False, r"lr .* is False"),
        ("beta2", 1, r"beta2 .* below 1"),
        ("lr_decay", "cosin", r"one of constant, cosine; did you mean cosine\?"),
        ("weighting", "kll", r"one of kl, js; did you mean kl\?"),
        ("evaluate", "yes", r"evaluate .* is 'yes'; allowed is true or false; for example true"),
        ("evaluate", 1, r"evaluate .* true or false"),
        ("teacher", 3, r"teacher .* a text"),
        ("output", "", r"output .* a text that is not empty, or none"),
        ("guidance", "much", r"guidance .* or none"),
        ("accumulation", 3, r"batch_size 64 is no multiple of accumulation 3; type for example --batch-size 63"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_mistake(key: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        resolved({}, {key: value})
    assert "\n" not in str(caught.value)


def test_errors_of_flags_name_the_flag():
    with pytest.raises(ValueError, match=r"^--batch-size is '0'; allowed is an integer at least 1"):
        resolved(batch_size="0")
    with pytest.raises(ValueError, match=r"^no option --bacth_size; did you mean batch_size\?"):
        resolved(bacth_size="0")


def test_yaml_traps(tmp_path: Path):
    read = load_recipe(recipe(tmp_path, "lr: 1e-4\ncritic_lr: 1\nmixed_precision: no\nguidance: none\ndata: ~\n"))
    assert read["lr"] == "1e-4" and read["mixed_precision"] is False  # what PyYAML makes of them
    got = resolved({"guidance": 2.0, "data": "digits"}, read)
    assert (got["lr"], got["critic_lr"], got["mixed_precision"]) == (1e-4, 1.0, "no")
    assert got["guidance"] is None and got["data"] is None
    assert isinstance(got["critic_lr"], float)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: 1\nseed: 2\nlr: 3\n", r"line 3: 'lr' is already on line 1"),
        ("lr: [1\nseed: 2\n", r"recipe.yaml, line \d: not valid YAML"),
        ("- lr\n", "no mapping"),
        ("just text", "no mapping"),
        ("1: 2\n", "line 1: a key is no text"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a: !!bool maybe\n", "not valid YAML"),
        ("a: !!timestamp maybe\n", "not valid YAML"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(recipe(tmp_path, text))
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file .*missing.yaml; type --config FILE"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"data: \xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    assert load_recipe(recipe(tmp_path, "# nothing\n")) == {}


def test_any_bytes_are_a_recipe_or_a_value_error(tmp_path: Path):
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    words = some.sampled_from(
        ["lr", ": ", "\n", "- ", "[", "{", "&a ", "*a", "!!int ", "!!float ", "<<", "? ", "|", "1e", "~", "'", "seed"]
    )
    texts = some.lists(words, max_size=12).map(lambda each: "".join(each).encode())
    path = tmp_path / "any.yaml"

    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    @hypothesis.given(some.one_of(some.binary(max_size=40), texts))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            resolve(Method, {}, load_recipe(path), {}, str(path))
        except ValueError as error:
            assert "\n" not in str(error)

    check()


def test_a_saved_config_replays_its_run(tmp_path: Path):
    folder = tmp_path / "a run"
    first = resolve(Method, {"init_rho": 2.5}, {"lr": "1e-7", "mixed_precision": False}, {"ratio": "3", "output": "no"})
    path = save_config(folder, *first)
    assert [each.name for each in folder.iterdir()] == ["config.yaml"]
    assert f"--config '{path}'" in path.read_text().splitlines()[0]
    again = resolve(Method, {"init_rho": 80.0, "warmup": 1}, load_config(folder), {})
    assert again == first
    assert load_config(folder) == flat(*first)
    assert differences(load_config(folder), flat(*again)) == []


def test_differences_are_those_that_forbid_resuming():
    old = resolved()
    assert differences(old, resolved(lr="1e-3", output="x", log_every="3", evaluate=False)) == ["lr: 5e-05 -> 0.001"]
    assert differences(old, resolved(guidance="2", ratio="1")) == ["guidance: none -> 2.0", "ratio: 5 -> 1"]
    assert differences({}, {"ratio": 1}) == ["ratio: absent -> 1"]
    older = {name: value for name, value in old.items() if name != "offload"}  # of a version without this option
    assert differences(older, old) == [] and differences(older, old | {"offload": True}) == ["offload: false -> true"]
    assert differences(old, resolved(sketch=True), Method) == []


def test_only_the_flags_that_were_given_are_read():
    made = parser(Method)
    assert flags_of(made.parse_args([])) == {}
    given = made.parse_args(["--batch-size", "8", "--no-evaluate", "--gan=0", "--config", "x.yaml", "--dry-run"])
    assert flags_of(given) == {"batch_size": "8", "evaluate": False, "gan": "0"}
    assert (given.config, given.dry_run, given.restart) == ("x.yaml", True, False)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch-sise", "4"], "no flag --batch-sise; did you mean --batch-size? Type --help"),
        (["--bacth-size=4"], "did you mean --batch-size?"),
        (["--no-evalute"], "did you mean --no-evaluate?"),
        (["--batch", "4"], "no flag --batch"),
        (["stray"], "no flag stray"),
        (["--lr"], "--lr: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], argv: list[str], message: str):
    with pytest.raises(SystemExit) as caught:
        parser(Method).parse_args(argv)
    stderr = capsys.readouterr().err
    assert caught.value.code == 2 and message in stderr and stderr.count("\n") == 1


def test_help_lists_the_options_of_the_method_with_defaults_after_facts():
    text = " ".join(parser(Method, {"ratio": 9, "init_rho": 2.5}, "dmd2").format_help().split())
    assert "options of dmd2:" in text
    assert "--ratio INT critic updates (default: 9)" in text
    assert "sigma/alpha of the student's first step; none means the most noise (default: 2.5)" in text
    assert "--lr FLOAT learning rate of the generator (default: 5e-05)" in text
    assert "10% of it (default: 0.003)" in text
    assert "--evaluate, --no-evaluate score the exported generator at the end (default: true)" in text
    assert "--mixed-precision {no,bf16}" in text
    for name in options_of(TrainConfig, Method):
        assert "--" + name.replace("_", "-") in text


def test_first_pass_reads_three_flags_and_no_other(tmp_path: Path):
    path = recipe(tmp_path, "method: other\nteacher: digits\nnonsense: 1\n")
    assert first_pass([])[:3] == ("dmd2", "fashion", None)
    found = first_pass(["--unknown", "4", "--config", str(path), "--help", "--teacher=sdxl"])
    assert found == ("other", "sdxl", str(path), {"method": "other", "teacher": "digits", "nonsense": 1})
    with pytest.raises(ValueError, match=r"method in .*recipe.yaml is 5; allowed is a text"):
        first_pass(["--config", str(recipe(tmp_path, "method: 5\n"))])


def test_the_folder_of_a_run_is_named_after_method_and_teacher(tmp_path: Path):
    assert TrainConfig().folder == Path("runs/dmd2-fashion")
    assert TrainConfig(teacher="owner/name").folder == Path("runs/dmd2-name")
    assert TrainConfig(teacher=f"{tmp_path}/dit/").folder == Path("runs/dmd2-dit")
    assert TrainConfig(output="here").folder == Path("here")


def test_importing_the_options_does_not_import_torch():
    check = "import sys, onestep.cli; sys.exit(bool({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


RECIPES = sorted(
    path for path in (Path(__file__).parent.parent / "train").glob("*.yaml") if not path.name.startswith("teach_")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_names_what_is_in_it(path: Path):
    from onestep.objectives import objective_class
    from onestep.teacher import facts_of

    given = load_recipe(path)
    name, teacher = given.get("method", "dmd2"), given.get("teacher", "fashion")
    assert path.stem.startswith(f"{name.replace('-', '_')}_{teacher}")
    options = resolve(objective_class(name).Config, facts_of(teacher).options(name), given, {}, path.name)
    resolved = flat(*options)
    assert {key: type(resolved[key])(value) for key, value in given.items()} == {key: resolved[key] for key in given}
