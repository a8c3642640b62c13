"""Scores of exports and of folders of images through the command, on small real files."""

import json
import os
import shutil
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from background import CONTEXT, finished
from PIL import Image
from scripts import load_script

from onestep.evaluate import main
from onestep.metrics import Moments, evaluate
from onestep.metrics.extractor import Extractor, Features, load_extractor
from onestep.metrics.images import Survey, fitted
from onestep.metrics.measure import METRICS, measure
from onestep.metrics.prompts import read_prompts
from onestep.metrics.published import PUBLISHED
from onestep.metrics.render import load_pipeline

BIASED = pytest.mark.filterwarnings("ignore:a distance from")
pytestmark = BIASED


def digits_like(folder: Path, count: int, seed: int = 0, add: int = 0) -> Path:
    """Grey PNGs of 8x8 pixels between 40 and 200, `add` brighter."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(source.integers(40, 200, size=(8, 8)).astype(np.uint8) + np.uint8(add)).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return digits_like(tmp_path_factory.mktemp("real") / "images", 150)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """An export that takes prompts, and pictures of 16x16."""
    from tiny_text import sd15

    folder = tmp_path_factory.mktemp("exports") / "sd15"
    sd15().save_pretrained(folder)
    return folder


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def scored(argv, output: Path) -> dict:
    assert main([*map(str, argv), "--device", "cpu", "--output", str(output)]) == 0
    return rows(output)[-1]


def refused(argv, tmp_path: Path, capsys) -> str:
    assert main([*map(str, argv), "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "rows.jsonl").exists()
    return captured.err


# Known distances


def test_pictures_that_are_all_brighter_are_as_far_as_their_means(real, tmp_path):
    brighter = digits_like(tmp_path / "brighter", 150, add=51)
    argv = [brighter, "--reference", real, "--extractor", "digits", "--metrics", "fd,kid,precision-recall"]
    row = scored(argv, tmp_path / "rows.jsonl")
    # 64 pixels from 0 to 16, each 51 / 255 * 16 larger, and the same covariance
    assert row["FD_proxy"] == pytest.approx(64 * (51 / 255 * 16) ** 2, rel=1e-6)
    assert row["KD_proxy"] > 0 and row["KD_std_proxy"] > 0
    assert row["count"] == row["reference_count"] == 150 and row["formats"] == {"PNG": 150}
    assert len(row["reference_sha256"]) == len(row["files_sha256"]) == 64 and "protocol" not in row


def test_a_folder_against_itself_is_at_no_distance(real, tmp_path):
    argv = [real, "--reference", real, "--extractor", "digits", "--metrics", "fid,precision-recall"]
    row = scored(argv, tmp_path / "rows.jsonl")
    assert row["FD_proxy"] == pytest.approx(0, abs=1e-9)
    assert row["precision_proxy"] == row["recall_proxy"] == row["coverage_proxy"] == 1
    assert row["reference_sha256"] == row["files_sha256"]


def test_statistics_of_others_are_read_with_their_images(real, tmp_path):
    pixels = np.stack([np.array(Image.open(file).convert("RGB")) for file in sorted(real.iterdir())])
    features = pixels[..., 0].reshape(150, 64).astype(np.float64) / 255 * 16
    sigma = np.cov(features, rowvar=False)
    np.savez(tmp_path / "r.npz", mu=features.mean(0) + np.eye(64)[0] * 3, sigma=sigma, arr_0=pixels)
    argv = [real, "--reference", tmp_path / "r.npz", "--extractor", "digits", "--metrics", "fd,precision-recall"]
    row = scored(argv, tmp_path / "rows.jsonl")
    assert row["FD_proxy"] == pytest.approx(9, rel=1e-5) and row["precision_proxy"] == 1
    assert row["reference_count"] is None and len(row["reference_sha256"]) == 64


def test_the_inception_score_of_a_known_classifier():
    from onestep.metrics.measure import Measured, scores

    # 20 images of each of 5 classes, one class after the other, each seen as itself: 5 but for the luck of the splits
    logits = torch.full((100, 5), -50.0).scatter(1, torch.arange(5).repeat_interleave(20)[:, None], 50.0)
    found = scores(None, Measured(Moments(5), logits=logits), ["is"], load_extractor("digits"), "none")
    assert 3 < found["IS"] <= 5  # in the order of the files a split of ten would see one class: 1


def test_accuracy_of_classes_is_the_fraction_that_was_asked_for():
    from onestep.metrics.measure import Measured, means, scores

    measured = Measured(Moments(3), logits=torch.eye(3)[[0, 1, 2, 2]], labels=torch.tensor([0, 1, 2, 0]))
    assert means(scores(None, measured, ["class-accuracy"], load_extractor("digits"), "none")) == {"class_accuracy": 0.75}


# The same row


@pytest.mark.parametrize("name", ["digits-1797", "digits-5k"])
def test_a_protocol_of_the_package_gives_what_evaluate_gives(name, tiny_teacher, tmp_path):
    argv = [tiny_teacher, "--protocol", name, "--count", 60, "--batch-size", 7]
    row = scored([*argv, "--metrics", "fd,class-accuracy,precision-recall"], tmp_path / "rows.jsonl")
    known = evaluate(tiny_teacher, name, steps=1, guidance=1.0, count=60, batch_size=7, precision_recall=True)
    for metric in ("FD_proxy", "class_accuracy", "precision_proxy", "recall_proxy", "density_proxy", "coverage_proxy"):
        assert row[metric] == pytest.approx(known[metric], rel=1e-6), metric
    for entry in ("extractor_sha256", "reference_sha256", "reference_count", "weights_sha256", "seeds", "passes_per_image"):
        assert row[entry] == known[entry], entry
    assert row["protocol"] == {k: v for k, v in json.loads(json.dumps(known["protocol"])).items() if k != "manifold"}


def test_saved_pictures_of_a_protocol_score_as_the_export_did(tiny_teacher, tmp_path):
    argv = ["--protocol", "digits-1797", "--count", 40]
    first = scored([tiny_teacher, *argv, "--save", tmp_path / "kept"], tmp_path / "rows.jsonl")
    again = scored([tmp_path / "kept", *argv], tmp_path / "rows.jsonl")
    assert first["FD_proxy"] == again["FD_proxy"] and "class_accuracy" not in again
    assert [file.name for file in sorted((tmp_path / "kept").glob("*.png"))][:2] == ["000000.png", "000001.png"]


def test_statistics_do_not_depend_on_batches_or_workers(real):
    extractor, files = load_extractor("digits"), sorted(real.iterdir())

    def moments(batch_size: int, workers: int) -> Moments:
        survey = Survey()
        pictures = lambda part: [lambda i=i: survey.read(files[i]) for i in part]  # noqa: E731
        return measure(len(files), pictures, extractor, ["fd"], batch_size, None, workers).moments

    one = moments(64, 1)
    for other in (moments(7, 1), moments(150, 3)):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)


def test_two_processes_give_the_row_of_one(tiny_teacher, real, tmp_path):
    argv = ["--metrics", "fd,kid,precision-recall", "--count", "70", "--batch-size", "16", "--device", "cpu"]
    argv = [str(tiny_teacher), "--protocol", "digits-1797", *argv]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    command = [*argv, "--output", str(tmp_path / "two.jsonl")]
    started = [CONTEXT.Process(target=_evaluate, args=(command, each, tmp_path / f"log{i}")) for i, each in enumerate(ranks)]
    for process in started:
        process.start()
    assert [finished(process) for process in started] == [0, 0], (tmp_path / "log0").read_text()
    (two,) = rows(tmp_path / "two.jsonl")
    one = scored(argv, tmp_path / "one.jsonl")
    assert {k: v for k, v in two.items() if k not in ("date", "machine")} == {
        k: v for k, v in one.items() if k not in ("date", "machine")
    }


def _evaluate(argv: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.exit(main(argv))


# Prompts


def test_image_i_is_the_pipe_called_alone_with_its_prompt_and_seed(texts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red bus\na dog\nthree cats\n")
    prompts = ["--prompts", tmp_path / "prompts.txt", "--save", tmp_path / "kept"]
    digits = digits_like(tmp_path / "real", 20)
    argv = [texts, *prompts, "--reference", digits, "--size", 8, "--steps", 2, "--guidance", 3]
    with pytest.raises(SystemExit):  # a typing error stays one
        main([*map(str, argv), "--guidence", "2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestep.metrics.scoring.load_extractor", lambda *a: Colours())
        row = scored(argv, tmp_path / "rows.jsonl")
    assert row["count"] == 3 and row["prompts_sha256"] and row["passes_per_image"] == 4 and row["size"] == 8
    pipe = load_pipeline(texts)
    alone = pipe("a dog", guidance_scale=3.0, generator=torch.manual_seed(1), num_inference_steps=2).images[0]
    kept = np.array(Image.open(tmp_path / "kept" / "000001.png"))
    np.testing.assert_allclose(kept.astype(int), np.array(alone).astype(int), atol=1)


def test_kept_pictures_are_not_made_again_and_not_mixed(tiny_teacher, tmp_path, capsys, monkeypatch):
    argv = [tiny_teacher, "--protocol", "digits-1797", "--count", 20, "--batch-size", 8, "--save", tmp_path / "kept"]
    first = scored(argv, tmp_path / "first.jsonl")
    (tmp_path / "kept" / "000009.png").unlink()
    made = []
    from onestep.metrics import pictures

    monkeypatch.setattr(pictures, "render", lambda *a, render=pictures.render, **k: made.append(a[2]) or render(*a, **k))
    again = scored(argv, tmp_path / "again.jsonl")
    assert made == [list(range(8, 16))] and again["FD_proxy"] == first["FD_proxy"]
    capsys.readouterr()
    assert "steps: 1 and 2" in refused([*argv, "--steps", 2], tmp_path, capsys)
    shutil.rmtree(tmp_path / "kept")
    digits_like(tmp_path / "kept", 2)
    assert "is not empty" in refused(argv, tmp_path, capsys)


def test_prompts_are_read_from_what_people_have(tmp_path):
    coco = {"annotations": [
        {"image_id": 7, "id": 5, "caption": "second "}, {"image_id": 3, "id": 9, "caption": "b"},
        {"image_id": 7, "id": 2, "caption": " first"},
    ]}  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    (tmp_path / "list.json").write_text('["x", "y"]')
    assert read_prompts(tmp_path / "captions.json") == ["b", "first"]
    assert read_prompts(tmp_path / "list.json") == ["x", "y"]
    for name, content, words in (
        ("empty.txt", "", "no prompts"),
        ("gap.txt", "a\n\nb\n", "empty prompt, number 2"),
        ("other.json", '{"a": 1}', "cannot be read"),
        ("numbers.json", "[1]", "cannot be read"),
        ("none.txt", None, "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            read_prompts(tmp_path / name)


def test_other_prompts_than_a_protocols_are_refused(texts, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n" * 30_000)
    argv = [texts, "--protocol", "coco2014-30k-256", "--reference", tmp_path, "--extractor-missing"]
    assert "no flag --extractor-missing" in _exit(argv, capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestep.metrics.scoring.load_extractor", lambda *a: load_extractor("digits"))
        error = refused([*argv[:-1], "--prompts", tmp_path / "prompts.txt"], tmp_path, capsys)
        assert PUBLISHED["coco2014-30k-256"].prompts_sha256 in error
        assert "type --prompts" in refused(argv[:-1], tmp_path, capsys)


def _exit(argv, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, argv)])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_the_least_of_the_repeats_is_reported(tiny_teacher, tmp_path, monkeypatch):
    from dataclasses import replace

    protocol = replace(PUBLISHED["edm-cifar10-50k"], extractor="digits", count=30)
    monkeypatch.setattr("onestep.metrics.published.PUBLISHED", {"three": protocol})
    real = digits_like(tmp_path / "real", 50)
    row = scored([tiny_teacher, "--protocol", "three", "--reference", real], tmp_path / "rows.jsonl")
    found = [run["FD"] for run in row["runs"]]
    assert [run["seeds"] for run in row["runs"]] == [[0, 29], [30, 59], [60, 89]] and len(set(found)) == 3
    assert row["FD"] == min(found) and row["repeats"] == 3
    assert row["seeds"] == row["runs"][found.index(min(found))]["seeds"] and row["protocol"]["paper"]


# Folders as people have them


def pixels(file: Path) -> np.ndarray:
    return Survey().read(file)


def test_every_kind_of_picture_has_one_meaning(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    repeated = np.repeat(grey[..., None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(repeated).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    for name in ("grey", "sixteen", "palette"):
        np.testing.assert_array_equal(pixels(tmp_path / f"{name}.png"), repeated)
    Image.fromarray(grey > 150).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png")[..., 0], (grey > 150) * 255)
    layered = np.concatenate([repeated, np.array([[255, 255], [0, 51]], np.uint8)[..., None]], axis=2)
    Image.fromarray(layered).save(tmp_path / "rgba.png")
    on_white = np.array([[0, 100], [255, 255 * 0.8 + 255 * 0.2]])
    np.testing.assert_allclose(pixels(tmp_path / "rgba.png")[..., 0], on_white, atol=1)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif is not a readable image .*known range"):
        pixels(tmp_path / "float.tif")


def test_size_crops_the_middle_and_resizes_as_pillow(tmp_path):
    image = np.random.default_rng(0).integers(256, size=(10, 16, 3)).astype(np.uint8)
    square = Image.fromarray(image[:, 3:13])
    np.testing.assert_array_equal(fitted(image, 5), np.array(square.resize((5, 5), Image.Resampling.LANCZOS)))
    np.testing.assert_array_equal(fitted(image, 10), image[:, 3:13])
    assert fitted(image, None) is image


class Colours(Extractor):
    """The means of the three colours, of pictures of any size."""

    name, sha256, dimensions = "colours", "0" * 64, 3

    def prepare(self, image):
        return torch.from_numpy(image.mean((0, 1), keepdims=True)).permute(2, 0, 1).float()

    def __call__(self, batch):
        return Features(batch.mean((2, 3)))


def coloured(folder: Path, name: str, size=(16, 20), kind: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    source = np.random.default_rng(len(list(folder.iterdir())))
    Image.fromarray(source.integers(256, size=(*size, 3)).astype(np.uint8)).save(folder / name, format=kind)
    return folder


def test_dirty_folders_are_one_line_or_a_warning(tmp_path, capsys, monkeypatch):
    script = load_script("fid")
    monkeypatch.setattr("onestep.metrics.scoring.load_extractor", lambda *a: Colours())
    clean = tmp_path / "clean"
    for i in range(4):
        coloured(clean, f"{i}.png")

    def call(folder: Path) -> tuple[int, str, list[str]]:
        argv = [str(folder), "--reference", str(clean), "--device", "cpu"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code = script.main([*argv, "--output", str(tmp_path / "rows.jsonl")])
        said = [str(each.message) for each in caught if each.category is UserWarning]
        return code, capsys.readouterr().err, [each for each in said if "a distance from" not in each]

    assert call(clean) == (0, "", [])
    (tmp_path / "empty").mkdir()
    code, error, _ = call(tmp_path / "empty")
    assert code == 2 and "holds no images" in error and error.count("\n") == 1
    truncated = shutil.copytree(clean, tmp_path / "truncated")
    (truncated / "2.png").write_bytes((clean / "2.png").read_bytes()[:400])
    code, error, _ = call(truncated)
    assert code == 2 and "2.png is not a readable image" in error and error.count("\n") == 1
    (truncated / "2.png").write_bytes((clean / "2.png").read_bytes()[:20])
    assert call(truncated)[0] == 2
    mixed = coloured(shutil.copytree(clean, tmp_path / "mixed"), "5.png", size=(40, 30))
    code, _, said = call(mixed)
    assert code == 0 and len(said) == 1 and "images of 2 sizes, as 20x16 (4), 30x40 (1)" in said[0]
    for i in range(4):
        coloured(tmp_path / "jpeg", f"{i}.jpg", kind="jpeg")
    code, _, said = call(tmp_path / "jpeg")
    assert code == 0 and len(said) == 1 and "4 images" in said[0] and "JPEG" in said[0]
    layered = shutil.copytree(clean, tmp_path / "rgba")
    Image.new("RGBA", (20, 16), (10, 20, 30, 128)).save(layered / "4.png")
    Image.fromarray(np.arange(320, dtype=np.uint8).reshape(16, 20)).save(layered / "5.png")
    code, _, said = call(layered)
    assert code == 0 and len(said) == 1 and "1 images" in said[0] and "on white" in said[0]
    assert rows(tmp_path / "rows.jsonl")[-1]["transparent"] == 1 and len(rows(tmp_path / "rows.jsonl")) == 4


def test_bad_calls_are_one_line(tiny_teacher, real, tmp_path, capsys):
    against = ["--reference", real, "--extractor", "digits"]
    for argv, words in (
        ([tmp_path / "none", *against], "no folder"),
        ([real, "--protocol", "digits"], "did you mean --protocol digits-"),
        ([real, "--protocol", "digits-1797", "--extractor", "inception"], "--extractor is part of the protocol"),
        ([real, "--protocol", "digits-1797", "--reference", real], "leave --reference and --prompts out"),
        ([real, *against, "--metrics", "fd,beauty"], "allowed are fd, kid"),
        ([real, *against, "--metrics", "sfid"], "spatial"),
        ([real, *against, "--metrics", "class-accuracy"], "class-accuracy needs an export"),
        ([real, *against, "--count", 151], "type 2 to 150"),
        ([real, *against, "--batch-size", 0], "--batch-size 0"),
        ([tiny_teacher, *against, "--count", 1], "--count 1"),
        ([tiny_teacher, *against, "--classes", 11], "knows 10 classes"),
        ([tiny_teacher, *against, "--prompts", real], "takes no prompts"),
    ):
        assert words in refused(argv, tmp_path, capsys), argv


def test_a_published_protocol_says_what_to_bring(tiny_teacher, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("onestep.metrics.scoring.load_extractor", lambda *a: load_extractor("digits"))
    monkeypatch.chdir(tmp_path)
    error = refused([tiny_teacher, "--protocol", "edm-cifar10-50k"], tmp_path, capsys)
    assert "cifar10-32x32.npz (https://nvlabs" in error and "type --reference" in error
    assert "takes no prompts" in refused([tiny_teacher, "--protocol", "mjhq-5k"], tmp_path, capsys)
    assert "takes prompts: type --prompts" in refused([texts, "--protocol", "mjhq-5k"], tmp_path, capsys)
    assert "type --protocol with a name, or --reference" in refused([tiny_teacher], tmp_path, capsys)


def test_metrics_have_all_the_names_that_the_help_tells():
    told = "fd, kid, sfid, is, precision-recall, cmmd, class-accuracy, clip-score, retrieval, diversity"
    assert set(told.split(", ")) == set(METRICS)


# --- prompts


def test_the_clip_score_of_a_folder_is_that_of_its_pictures_and_prompts(tmp_path):
    from tiny_clip import save_clip

    from onestep.clip_model import load_clip
    from onestep.metrics.clip_score import ClipScore

    save_clip(tmp_path / "clip")
    folder, prompts = digits_like(tmp_path / "images", 6), tmp_path / "prompts.txt"
    told = [f"a picture of {word}" for word in ("one", "two", "one", "three", "two", "one")]
    prompts.write_text("\n".join(told))
    row = scored(
        [
            *(folder, "--extractor", f"clip:{tmp_path / 'clip'}"),
            *("--metrics", "clip-score,diversity", "--prompts", prompts, "--by-prompt"),
        ],
        tmp_path / "rows.jsonl",
    )
    clip = load_clip(str(tmp_path / "clip"))
    alone = ClipScore(clip)
    images = [np.repeat(np.asarray(Image.open(file))[..., None], 3, axis=2) for file in sorted(folder.iterdir())]
    alone.update(images, told)
    for name, value in alone.compute().items():
        assert row[name] == pytest.approx(value, rel=1e-6)
    unit = torch.nn.functional.normalize(clip.images(torch.stack([clip.prepare(each) for each in images])).double(), dim=1)
    apart = 1 - unit @ unit.T
    ones, twos = (apart[0, 2] + apart[0, 5] + apart[2, 5]) / 3, apart[1, 4]
    assert row["diversity(cosine)"] == pytest.approx(float(ones + twos) / 2, rel=1e-5)
    assert "FD" not in row and row["prompts_sha256"]
    ones = [float(value) for value, prompt in zip(alone.cosines, told) if prompt == told[0]]
    assert set(row["by_prompt"]) == {alone.name, alone.cosine_name}
    assert row["by_prompt"][alone.cosine_name][told[0]] == pytest.approx(sum(ones) / 3, rel=1e-5)


def test_prompts_are_needed_for_scores_by_prompt(tmp_path, capsys):
    folder = digits_like(tmp_path / "images", 4)
    assert "--by-prompt needs" in refused(
        [folder, "--extractor", "digits", "--reference", folder, "--by-prompt"], tmp_path, capsys
    )


def test_scores_of_clip_are_refused_elsewhere(tmp_path, capsys):
    folder = digits_like(tmp_path / "images", 4)
    for metric in ("clip-score", "cmmd"):
        argv = [
            folder,
            "--extractor",
            "digits",
            "--reference",
            folder,
            "--metrics",
            metric,
            "--output",
            tmp_path / "rows.jsonl",
        ]
        assert main([*map(str, argv), "--device", "cpu"]) == 2
        assert "--extractor clip:" in capsys.readouterr().err
