"""Data as people have it: every kind of source read alike, checked, cached, and brought to the trainer."""

import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import dit_pipeline, edm_pipeline
from torch import Tensor

import onestep.data.__main__ as command
from onestep.config import TrainConfig
from onestep.data import Data, PairCache, load_images
from onestep.data.clean import Needs, scan, scanned
from onestep.data.rows import Source, decode
from onestep.data.shards import IN_MEMORY, Shards
from onestep.data.sources import open_source
from onestep.rng import Rng
from onestep.run import make_trainer
from onestep.teacher import DiTTeacher, EDMTeacher, Facts, Teacher

FACTS = Facts(source="")
TEXTS = ["a cat", "a dog on a mat", "a bird — flying", "a fish"]
LABELS = [0, 1, 0, 2]


def picture(seed: int, side: int = 12) -> bytes:
    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


PICTURES = [picture(i) for i in range(4)]


# --- every kind of source


def beside(folder: Path) -> str:
    for i, (data, text) in enumerate(zip(PICTURES, TEXTS)):
        (folder / f"{i}.png").write_bytes(data)
        (folder / f"{i}.txt").write_text(text + "\n", encoding="utf-8")
    return str(folder)


def jsonl(folder: Path) -> str:
    lines = [{"file_name": f"sub/{i}.png", "text": text, "label": LABELS[i]} for i, text in enumerate(TEXTS)]
    (folder / "sub").mkdir()
    for i, data in enumerate(PICTURES):
        (folder / f"sub/{i}.png").write_bytes(data)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return str(folder)


def table(folder: Path) -> str:
    rows = "".join(f'{i}.png,"{text}",{LABELS[i]}\r\n' for i, text in enumerate(TEXTS))
    (folder / "metadata.csv").write_text(f"file_name,caption,label\r\n{rows}", encoding="utf-8-sig")
    for i, data in enumerate(PICTURES):
        (folder / f"{i}.png").write_bytes(data)
    return str(folder)


def columns() -> dict[str, Any]:
    return {"image": [{"bytes": data, "path": None} for data in PICTURES], "prompt": TEXTS, "label": LABELS}


def parquet(folder: Path) -> str:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    write_table(pa.table(columns()), folder / "train.parquet", row_group_size=3)
    return str(folder / "train.parquet")


def parquets(folder: Path) -> str:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    (folder / "data").mkdir()
    whole = pa.table({"label": LABELS, "jpg": PICTURES, "caption": TEXTS})
    for i in range(2):
        write_table(whole.slice(2 * i, 2), folder / f"data/train-{i}.parquet")
    return str(folder)


def saved(folder: Path) -> str:
    import datasets

    features = {"image": datasets.Image(), "prompt": datasets.Value("string"), "label": datasets.ClassLabel(3)}
    datasets.Dataset.from_dict(columns(), datasets.Features(features)).save_to_disk(folder / "set")
    return str(folder / "set")


def saved_splits(folder: Path) -> str:
    import datasets

    train = datasets.Dataset.from_dict(columns()).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": train.select([0]), "train": train}).save_to_disk(folder / "set")
    return str(folder / "set")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def tars(folder: Path) -> str:
    for shard in range(2):
        members = []
        for i in (2 * shard, 2 * shard + 1):
            text = [(f"{i}.txt", TEXTS[i].encode()), (f"{i}.cls", f"{LABELS[i]}\n".encode())]
            both = [(f"{i}.json", json.dumps({"caption": TEXTS[i], "label": LABELS[i]}).encode())]
            members += [(f"{i}.png", PICTURES[i]), *(both if shard else text)]
        write_tar(folder / f"{shard:03d}.tar", members)
    return str(folder / "{000..001}.tar")


def tar_folder(folder: Path) -> str:
    return str(Path(tars(folder)).parent)


@pytest.mark.parametrize("make", [beside, jsonl, table, parquet, parquets, saved, saved_splits, tars, tar_folder])
def test_every_kind_is_read_to_the_same_rows(make: Callable[[Path], str], tmp_path: Path) -> None:
    source = open_source(make(tmp_path))
    assert [row.caption for row in source.rows] == TEXTS
    assert [row.label for row in source.rows] == (LABELS if make is not beside else [None] * 4)
    assert [row.image and row.image.read() for row in source.rows] == PICTURES
    report = scan(source, Needs(captions=True))
    assert report.kept == 4 and not report.dropped and not report.ignored
    assert open_source(source.name).fingerprint == source.fingerprint


def test_classes_are_numbered_by_their_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("b/0.png", "a/deep/1.png", "d/2.jpg", "a/3.PNG")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PICTURES[i])
    (tmp_path / "c").mkdir()  # a class without pictures keeps its number
    (tmp_path / ".hidden").mkdir()
    rows = open_source(str(tmp_path)).rows
    assert [(row.name, row.label) for row in rows] == [("a/3.PNG", 0), ("a/deep/1.png", 0), ("b/0.png", 1), ("d/2.jpg", 3)]
    images, labels = load_images(str(tmp_path), 1, 8)
    assert images.shape == (4, 1, 8, 8) and labels.tolist() == [0, 0, 1, 3] and -1 <= images.min() < images.max() <= 1


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n\n# a comment\n  a  dog \nbad \xff\na cat\n" + "élan".encode())
    source = open_source(str(path))
    assert [row.caption for row in source.rows] == ["a cat", "a dog", "a cat", "élan"]
    assert source.ignored.counts == {"blank line": 1, "comment": 1, "not UTF-8": 1}
    report = scan(source, Needs(captions=True))
    assert [row.caption for row in report.rows] == ["a cat", "a dog", "élan"] and not report.images
    assert report.dropped.counts == {"duplicate": 1} and report.dropped.names["duplicate"] == ["line 6 (of line 1)"]
    with pytest.raises(ValueError, match=r"no row of .*prompts.txt \(a file of prompts\) can be used: 4 no image"):
        scan(source, Needs(images=True))


def test_embedded_data_is_a_source_too() -> None:
    source, (images, labels) = open_source("digits"), load_images("digits", 1, 8)
    row = source.rows[5]
    assert row.image is not None and row.label == labels[5]
    decoded = decode(row.image.read() or b"")
    assert decoded is not None and [*decoded.tobytes()] == ((images[5] + 1) * 127.5).round().flatten().tolist()


# --- what is wrong with them


def faulty(folder: Path) -> None:
    """Seven good pictures, three corrupt ones, two without a caption, one duplicate, one other file."""
    for i in range(13):
        data = picture(3 if i == 12 else i)
        if i in (7, 8, 9):
            data = (data[: len(data) // 2], b"", b"no picture")[i - 7]
        (folder / f"{i:02d}.png").write_bytes(data)
        if i not in (10, 11):
            (folder / f"{i:02d}.txt").write_text("caption 3" if i == 12 else f"caption {i}")
    (folder / "notes.pdf").write_text("")


def test_check_says_what_is_kept_and_dropped_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty(tmp_path)
    assert command.main(["check", str(tmp_path), "--captions", "required"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: a folder of pictures",
        "kept                                 7",
        "  with an image                      7",
        "  with a caption                     7  7 different",
        "  with a label                       0",
        "dropped                              6",
        "  corrupt image                      3  07.png, 08.png, 09.png",
        "  no caption                         2  10.png, 11.png",
        "  duplicate                          1  12.png (of 03.png)",
        "ignored, no rows                     1",
        "  other file                         1  notes.pdf",
    ]
    assert command.main(["check", str(tmp_path)]) == 0
    assert "kept                                 9" in capsys.readouterr().out
    assert command.main(["check", str(tmp_path), "--images", "ignored"]) == 0  # its captions as prompts
    assert "kept                                10" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["check", "nowhere"], "no data 'nowhere'"),
        (["check", "digit"], "did you mean --data digits?"),
        (["check", "few", "--min-side", "50"], "no row of few (a folder of pictures) can be used: 4 too small"),
        (["check", "few", "--labels", "required"], "4 no label"),
        (["check", "notes.doc"], "notes.doc is a .doc file; allowed are fashion, digits, emoji, or a folder"),
        (["check", "empty.txt"], "no row of empty.txt (a file of prompts) can be used: 1 blank line"),
        (["check", "broken.parquet"], "broken.parquet cannot be read as parquet"),
        (["check", "broken.tar"], "broken.tar is no whole tar file"),
        (["check", "{0..2}.tar"], "no file 0.tar"),
        (["check"], "the following arguments are required: PATH"),
        (["check", "few", "--caption", "required"], "no flag --caption"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    beside(tmp_path / "few")
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("notes.doc", "broken.parquet", "broken.tar"):
        (tmp_path / name).write_text("text" * 500)
    with pytest.raises(SystemExit) as caught:
        command.main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"no data 'owner/name': .* \(couldn't reach the hub\)\. Allowed is"):
        open_source("owner/name")


@pytest.mark.parametrize("package, make", [("pyarrow", parquet), ("datasets", saved)])
def test_a_missing_package_is_named(
    package: str, make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(make(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}, which is missing; type pip install 'onestep-diffusion\[data\]'"):
        _ = source.rows


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "..\\out.png", "C:/out.png"])
def test_a_tar_that_leaves_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", PICTURES[0]), (name, PICTURES[1])])
    with pytest.raises(ValueError, match=r"holds a member .* that leaves its folder"):
        _ = open_source(str(tmp_path / "0.tar")).rows


def test_links_in_a_tar_are_no_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", PICTURES[0])])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(str(tmp_path / "0.tar"))
    assert [row.name for row in source.rows] == ["0.tar/0"] and source.ignored.counts == {"no plain file": 1}


def test_metadata_that_leaves_its_folder_or_names_nothing(tmp_path: Path) -> None:
    beside(tmp_path)
    lines = [
        {"file_name": "../x.png", "text": "x"},
        {"file_name": "0.png", "text": "zero"},
        {"file_name": "9.png", "text": "nine"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n[]\n{}")
    report = scan(open_source(str(tmp_path)), Needs(captions=True))
    assert [row.caption for row in report.rows] == ["zero"]
    assert report.dropped.counts == {"no caption": 3, "no image": 1} and report.dropped.names["no image"] == ["9.png"]
    assert report.ignored.counts == {"file_name outside the folder": 1, "no JSON object": 1, "no file_name": 2}


# --- shards


def numbers(start: int, stop: int) -> dict[str, Tensor]:
    rows = torch.arange(start, stop)
    return {"square": (rows * rows).float().view(-1, 1, 1).expand(-1, 2, 3), "row": rows}


def test_shards_are_made_once_and_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Shards.build(tmp_path, "numbers", {"a": (1, 2)}, 10, numbers, rows_per_shard=4)
    index = torch.tensor([9, 0, 3, 4, 3])
    again = Shards.build(tmp_path, "numbers", {"a": [1, 2]}, 10, lambda *rows: pytest.fail("made again"), rows_per_shard=4)
    monkeypatch.setattr("onestep.data.shards.IN_MEMORY", 0)
    for shards in (made, again):
        rows = shards[index]
        assert len(shards) == 10 and rows["square"].shape == (5, 2, 3) and rows["row"].tolist() == index.tolist()
        assert rows["square"][:, 1, 2].tolist() == [81, 0, 9, 16, 9]
    monkeypatch.setattr("onestep.data.shards.IN_MEMORY", IN_MEMORY)
    assert made[index]["row"].tolist() == index.tolist() and made[index[:0]]["square"].shape == (0, 2, 3)
    assert made.bytes == sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    other = Shards.build(tmp_path, "numbers", {"a": [1, 2]}, 10, numbers, rows_per_shard=4, dtype=torch.float16)
    assert other.folder != made.folder and other[index]["square"].dtype == torch.float16
    assert other[index]["row"].dtype == torch.long


def test_a_killed_build_goes_on_after_its_last_complete_shard(tmp_path: Path) -> None:
    calls: list[int] = []

    def killed(start: int, stop: int) -> dict[str, Tensor]:
        calls.append(start)
        if start == 8:
            raise KeyboardInterrupt
        return numbers(start, stop)

    with pytest.raises(KeyboardInterrupt):
        Shards.build(tmp_path, "numbers", {}, 14, killed, rows_per_shard=4)
    (folder,) = tmp_path.iterdir()
    (folder / ".shard-00002.safetensors.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        Shards(folder)
    done = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    torn = folder / "shard-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    calls.clear()
    shards = Shards.build(tmp_path, "numbers", {}, 14, lambda a, b: calls.append(a) or numbers(a, b), rows_per_shard=4)
    assert calls == [4, 8, 12] and (folder / "shard-00000.safetensors").stat().st_mtime_ns == done
    assert shards[torch.arange(14)]["row"].tolist() == list(range(14))
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".partial")) == ["index.json"]


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    def make(start: int, stop: int) -> dict[str, Tensor]:
        with (tmp_path / "calls").open("a") as file:
            file.write(f"{start}\n")
        return numbers(start, stop)

    def build() -> None:
        assert len(Shards.build(tmp_path, "numbers", {}, 40, make, rows_per_shard=4)) == 40

    processes = [multiprocessing.get_context("fork").Process(target=build) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text().split() == [str(start) for start in range(0, 40, 4)]


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.json"])
def test_a_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    folder = Shards.build(tmp_path, "numbers", {"key": "value"}, 6, numbers, rows_per_shard=4).folder
    content = (folder / name).read_bytes()
    for place in range(0, len(content), 5):
        changed = bytearray(content)
        changed[place] ^= 4
        (folder / name).write_bytes(changed)
        named = name if name != "index.json" else "(index|shard)"  # a changed hash is taken for a changed shard
        with pytest.raises(ValueError, match=rf"{folder} cannot be used: {named}.* Delete that folder"):
            Shards.build(tmp_path, "numbers", {"key": "value"}, 6, numbers, rows_per_shard=4)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}"):
        Shards(folder)


def test_a_full_disk_is_said_at_the_first_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="GB free; type --cache"):
        Shards.build(tmp_path, "numbers", {}, 9, numbers, rows_per_shard=4)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); type --cache"):
        Shards.build(tmp_path / "file", "numbers", {}, 9, numbers)


# --- pairs


def test_pairs_are_announced_resumed_and_kept_in_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = EDMTeacher(edm_pipeline(), FACTS)
    whole = PairCache(tmp_path, teacher, 5, 2, 1.0)
    assert capsys.readouterr().out == f"5 pairs, 0.0 MB in {whole.rows.folder}\n"
    half = PairCache(tmp_path, teacher, 5, 2, 1.0, half=True, batch=2)
    stored = load_file(half.rows.folder / "shard-00000.safetensors")
    assert stored["y"].dtype == torch.float16 and stored["z"].dtype == torch.float32
    (z, y, conditions), (z2, y2, conditions2) = (cache.draw(Rng(0, 0, 3)) for cache in (whole, half))
    assert torch.equal(z, z2) and torch.equal(conditions, conditions2) and y2.dtype == torch.float32
    torch.testing.assert_close(y, y2, atol=1e-3, rtol=1e-3)
    capsys.readouterr()
    PairCache(tmp_path, teacher, 5, 2, 1.0)
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        next(teacher.denoiser.network.parameters()).add_(1)
    assert PairCache(tmp_path, teacher, 5, 2, 1.0).rows.folder != whole.rows.folder


# --- to the trainer


class FakeTextTeacher(EDMTeacher):
    """Conditioned on text: the embedding of a prompt is its length."""

    conditioned_by = "text"
    embedded: list[str]

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        self.embedded = [*getattr(self, "embedded", []), *prompts]
        return {"prompt": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def embed_null(self) -> dict[str, Tensor]:
        return {"prompt": torch.zeros(1, 1)}

    def embedder_key(self) -> dict[str, Any]:
        return {"encoder": "length"}

    def use_prompts(self, table: Shards, null: dict[str, Tensor], prompts: list[str]) -> None:
        self.table, self.null, self.prompts = table, null, prompts

    @property
    def classes(self) -> int:
        return len(self.prompts)

    def encode(self, conditions: Tensor) -> Any:
        lengths = self.table[conditions.cpu()]["prompt"][:, 0].long()
        return {"class_labels": lengths % 10}, None


@pytest.mark.parametrize("make", [beside, jsonl, parquet, saved, tars])
def test_a_text_teacher_gets_rows_of_its_prompts(make: Callable[[Path], str], tmp_path: Path) -> None:
    teacher = FakeTextTeacher(edm_pipeline(3), FACTS)
    (tmp_path / "data").mkdir()
    data = Data.of(make(tmp_path / "data"), teacher, 0, tmp_path / "cache")
    batch = data.batch(0, 4, 0, 4, "cpu")
    assert teacher.prompts == TEXTS == teacher.embedded and len(teacher.table) == 4
    assert teacher.null["prompt"].tolist() == [[0.0]]
    assert batch.real is not None and batch.real.shape == (4, 3, 8, 8)
    assert sorted(batch.conditions.tolist()) == [0, 1, 2, 3]
    lengths = teacher.table[batch.conditions]["prompt"][:, 0].tolist()
    assert lengths == [len(TEXTS[i]) for i in batch.conditions]
    expected = torch.cat([single(PICTURES[i], tmp_path / f"single{i}") for i in batch.conditions])
    assert torch.equal(batch.real, expected)


def single(data: bytes, folder: Path) -> Tensor:
    (folder / "a").mkdir(parents=True)
    (folder / "a/0.png").write_bytes(data)
    return load_images(str(folder), 3, 8)[0]


def test_prompts_alone_are_drawn_uniformly_and_embedded_once(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*TEXTS, TEXTS[0]]))
    teacher = FakeTextTeacher(edm_pipeline(), FACTS)
    data = Data.of(str(tmp_path / "prompts.txt"), teacher, 0, tmp_path / "cache")
    batch = data.batch(0, 64, 0, 64, "cpu")
    assert batch.real is None and set(batch.conditions.tolist()) == {0, 1, 2, 3} and teacher.embedded == TEXTS
    assert data.note.endswith("prompts.txt, 4 of 5 rows; dropped 1 duplicate")
    again = FakeTextTeacher(edm_pipeline(), FACTS)
    Data.of(str(tmp_path / "prompts.txt"), again, 0, tmp_path / "cache")
    assert again.prompts == TEXTS and not hasattr(again, "embedded")
    with pytest.raises(ValueError, match=r"conditioned on text: type --data with a \.txt file"):
        Data.of(None, again, 0, tmp_path)


class Counting(DiTTeacher):
    encoded = 0

    def to_x0(self, images: Tensor) -> Tensor:
        Counting.encoded += len(images)
        return super().to_x0(images)


def test_encoded_images_are_found_again_until_the_data_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(expected: int) -> Tensor:
        Counting.encoded = 0
        data = Data.of(str(folder), Counting(dit_pipeline(), FACTS), 0, tmp_path / "cache")
        assert Counting.encoded == expected
        real = data.batch(0, 3, 0, 3, "cpu").real
        assert real is not None
        return real

    folder = tmp_path / "data"
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        (folder / f"{i}/0.png").write_bytes(PICTURES[i])
    first = read(3)
    scans: list[Source] = []
    monkeypatch.setattr("onestep.data.clean.scan", lambda source, needs: scans.append(source) or scan(source, needs))
    assert torch.equal(first, read(0)) and not scans
    os.utime(folder / "1/0.png", (1, 1))  # looked at again, but the same pixels
    assert torch.equal(first, read(0)) and len(scans) == 1
    (folder / "1/0.png").write_bytes(PICTURES[3])
    assert not torch.equal(first, read(3)) and len(scans) == 2
    monkeypatch.setattr("onestep.data.shards.IN_MEMORY", 0)
    assert read(0).shape == first.shape


def test_a_scan_that_was_changed_on_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = open_source(beside(tmp_path / "data"))
    scanned(source, Needs(), tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("scan-*.json")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="has changed since it was written; delete it"):
        scanned(source, Needs(), tmp_path / "cache")


def test_what_does_not_fit_a_teacher(tmp_path: Path) -> None:
    few = EDMTeacher(edm_pipeline(classes=2), FACTS)
    with pytest.raises(ValueError, match=r"has the class label 2, and this teacher knows the classes 0 \.\. 1"):
        Data.of(parquet(tmp_path), few, 0, tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match="4 no label"):
        Data.of(beside(tmp_path / "plain"), few, 0, tmp_path / "cache")
    none = EDMTeacher(edm_pipeline(classes=None), FACTS)
    data = Data.of(str(tmp_path / "plain"), none, 0, tmp_path / "cache")
    assert data.conditions is not None and data.conditions.tolist() == [0] * 4


def test_embedded_data_fit_any_teacher(tmp_path: Path) -> None:
    same = Data.of("digits", EDMTeacher(edm_pipeline(), FACTS), 0, tmp_path)
    assert isinstance(same.real, Tensor) and torch.equal(same.real, load_images("digits", 1, 8)[0]) and not same.note
    assert not list(tmp_path.iterdir())
    large = Data.of("digits", EDMTeacher(edm_pipeline(3, size=16), FACTS), 0, tmp_path)
    real = large.batch(0, 2, 0, 2, "cpu").real
    assert real is not None and real.shape == (2, 3, 16, 16)


def folders(folder: Path) -> str:
    for i, data in enumerate(PICTURES):
        (folder / f"{LABELS[i]}").mkdir(exist_ok=True)
        (folder / f"{LABELS[i]}/{i}.png").write_bytes(data)
    (folder / "0/broken.png").write_bytes(b"broken")
    return str(folder)


def prompts(folder: Path) -> str:
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return str(folder / "prompts.txt")


@pytest.mark.parametrize("kind, make", [("class", folders), ("class", tars), ("text", prompts)])
def test_a_run_reaches_the_trainer(
    kind: str,
    make: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from onestep.objectives.dmd2 import DMD2Config

    def load(*args: Any, **kwargs: Any) -> Teacher:
        return (FakeTextTeacher if kind == "text" else EDMTeacher)(edm_pipeline(3), FACTS)

    monkeypatch.setattr("onestep.run.load_teacher", load)
    (tmp_path / "data").mkdir()
    gan = 0.0 if make is prompts else 1e-2
    options = {"batch_size": 4, "iterations": 1, "device": "cpu", "grid_steps": 1, "output": str(tmp_path / "run")}
    config = TrainConfig(data=make(tmp_path / "data"), cache=str(tmp_path / "cache"), **options)  # type: ignore[arg-type]
    trainer = make_trainer(config, DMD2Config(gan=gan, gan_critic=gan))
    assert trainer.run() and trainer.step == 1
    dropped = "4 of 5 rows; dropped 1 corrupt image" if make is folders else "4 of 4 rows"
    assert capsys.readouterr().out.splitlines()[0] == f"data: {config.data}, {dropped}"


def test_the_cache_is_an_option_and_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESTEP_CACHE", "/somewhere")
    assert TrainConfig(cache="/here").cache_folder == Path("/here") and TrainConfig().cache_folder == Path("/somewhere")
    monkeypatch.delenv("ONESTEP_CACHE")
    assert TrainConfig().cache_folder == Path.home() / ".cache/onestep"
