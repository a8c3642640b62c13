"""Reference statistics: what is written, stopped builds, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import load_script

from onestep.evaluate import main as evaluate
from onestep.metrics import Moments, build_reference
from onestep.metrics.extractor import Extractor, Features, load_extractor
from onestep.metrics.reference import load

script = load_script("reference")


class Stopped(Exception):
    pass


class Corners(Extractor):
    """The first 3 pixels of 8x8 pictures, and as spatial features the last 2; fails at its call number `last`."""

    name, sha256, dimensions = "corners", "c" * 64, 3

    def __init__(self, last: int = 1000):
        self.last = last

    def prepare(self, image):
        return torch.from_numpy(image[..., 0]).float()[None]

    def __call__(self, batch):
        self.last -= 1
        if self.last < 0:
            raise Stopped
        flat = batch.flatten(1)
        return Features(flat[:, :3].clone(), flat[:, -2:].clone())


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "images"
    (made / "more").mkdir(parents=True)
    source = np.random.default_rng(0)
    for i in range(23):
        pixels = source.integers(256, size=(8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(made / ("more" if i % 2 else "") / f"{i:02d}.png")
    return made


def features(folder: Path) -> np.ndarray:
    files = sorted(folder.rglob("*.png"))
    return np.stack([np.array(Image.open(file)).flatten() for file in files]).astype(np.float64)


def test_statistics_are_those_of_the_features(folder, tmp_path):
    details = build_reference.build(folder, tmp_path / "r", Corners(), keep_features=True, spatial=True, batch_size=4)
    pixels = features(folder)
    for name, columns in (("pooled", pixels[:, :3]), ("spatial", pixels[:, -2:])):
        moments = Moments.load(tmp_path / "r" / f"{name}.safetensors")
        np.testing.assert_allclose(moments.mean.numpy(), columns.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(columns, rowvar=False), rtol=1e-12)
    found = load(tmp_path / "r", Corners(), ["kid"])
    assert found.measured.pooled is not None and np.array_equal(found.measured.pooled.numpy(), pixels[:, :3])
    assert details["count"] == 23 and details["formats"] == ["PNG"] and found.formats == ("PNG",)
    lines = [
        f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in sorted(folder.rglob("*.png"))
    ]
    assert details["files_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert json.loads((tmp_path / "r" / "reference.json").read_text()) == details
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "r"]  # nothing half-written is left


def test_a_stopped_build_goes_on_and_gives_the_same_bits(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build_reference, "PART", 5)
    build_reference.build(folder, tmp_path / "whole", Corners(), batch_size=2)
    with pytest.raises(Stopped):
        build_reference.build(folder, tmp_path / "r", Corners(last=8), batch_size=2)
    assert not (tmp_path / "r").exists()
    kept = sorted(path.name for path in (tmp_path / "r.part").glob("*.safetensors"))
    assert kept == ["000000000.safetensors", "000000005.safetensors"]
    again = Corners(last=7)  # 13 images in batches of 2, in parts of 5: 3 + 3 + 2 calls would be one too many
    with pytest.raises(Stopped):
        build_reference.build(folder, tmp_path / "r", again, batch_size=2)
    build_reference.build(folder, tmp_path / "r", Corners(last=2), batch_size=2)
    for name in ("pooled.safetensors", "reference.json"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_build_of_other_images_does_not_go_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build_reference, "PART", 5)
    with pytest.raises(Stopped):
        build_reference.build(folder, tmp_path / "r", Corners(last=8), batch_size=2)
    with pytest.raises(ValueError, match=r"of another build .*size: None and 4"):
        build_reference.build(folder, tmp_path / "r", Corners(), size=4)
    Image.new("L", (8, 8), 7).save(folder / "00.png")
    with pytest.raises(ValueError, match=r"of another build .*files_sha256"):
        build_reference.build(folder, tmp_path / "r", Corners())


def test_a_picture_that_cannot_be_read_stops_the_build_by_its_name(folder, tmp_path):
    good = (folder / "04.png").read_bytes()
    (folder / "04.png").write_bytes(good[:60])
    with pytest.raises(ValueError, match=r"04\.png is not a readable image"):
        build_reference.build(folder, tmp_path / "r", Corners())
    assert not (tmp_path / "r").exists()


def test_statistics_of_something_else_are_refused(folder, tmp_path):
    build_reference.build(folder, tmp_path / "r", Corners())
    other = Corners()
    other.sha256 = "d" * 64
    with pytest.raises(ValueError, match=r"another extractor's weights: c+, and not d+"):
        load(tmp_path / "r", other, ["fd"])
    other = Corners()
    other.name = "edges"
    with pytest.raises(ValueError, match="another extractor: corners, and not edges"):
        load(tmp_path / "r", other, ["fd"])
    with pytest.raises(ValueError, match="another size: None, and not 4"):
        load(tmp_path / "r", Corners(), ["fd"], size=4)
    (tmp_path / "r" / "pooled.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="not a readable statistics file"):
        load(tmp_path / "r", Corners(), ["fd"])
    (tmp_path / "r" / "reference.json").write_text("{")
    with pytest.raises(ValueError, match="build the reference again"):
        load(tmp_path / "r", Corners(), ["fd"])
    np.savez(tmp_path / "four.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="has 4 dimensions, and corners 3"):
        load(tmp_path / "four.npz", Corners(), ["fd"])
    with pytest.raises(ValueError, match="no reference"):
        load(tmp_path / "none", Corners(), ["fd"])


def test_spatial_statistics_of_adm_are_read(tmp_path):
    cov = np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=cov, mu_s=np.ones(2), sigma_s=np.eye(2))
    found = load(tmp_path / "adm.npz", Corners(), ["fd", "sfid"]).measured
    assert found.spatial is not None and found.spatial.mean.tolist() == [1, 1]
    np.testing.assert_allclose(found.moments.covariance.numpy(), cov)


@pytest.mark.filterwarnings("ignore:a distance from")
def test_the_script_and_the_evaluation_go_together(folder, tmp_path, capsys):
    target = tmp_path / "statistics"
    assert script.main([str(folder), "-o", str(target), "--extractor", "digits", "--keep-features", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["extractor"] == load_extractor("digits").name
    shared = ["--extractor", "digits", "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")]
    wanted = ["--metrics", "fd,precision-recall"]
    assert evaluate([str(folder), "--reference", str(target), *wanted, *shared]) == 0
    assert evaluate([str(folder), "--reference", str(folder), *wanted, *shared]) == 0
    built, now = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    entries = ("FD_proxy", "precision_proxy", "coverage_proxy", "reference_sha256", "reference_count", "extractor_sha256")
    assert all(built[name] == now[name] for name in entries) and built["recall_proxy"] == 1
    capsys.readouterr()
    # once more to the same place
    assert script.main([str(folder), "-o", str(target), "--extractor", "digits", "--device", "cpu"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert script.main([str(folder), "-o", str(tmp_path / "a" / "b"), "--extractor", "digits", "--device", "cpu"]) == 2
    assert "make it first" in capsys.readouterr().err
    assert script.main([str(folder), "-o", str(tmp_path / "lean"), "--extractor", "digits", "--device", "cpu"]) == 0
    assert evaluate([str(folder), "--reference", str(tmp_path / "lean"), *wanted, *shared]) == 2
    assert "--keep-features" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:a distance from")
def test_jpegs_against_statistics_of_pngs_warn(folder, tmp_path):
    build_reference.build(folder, tmp_path / "png", load_extractor("digits"))
    lossy = tmp_path / "lossy"
    lossy.mkdir()
    for file in folder.rglob("*.png"):
        Image.open(file).save(lossy / f"{file.stem}.jpg")
    build_reference.build(lossy, tmp_path / "jpeg", load_extractor("digits"))
    shared = ["--extractor", "digits", "--device", "cpu", "--output", str(tmp_path / "rows.jsonl")]
    with pytest.warns(UserWarning, match="23 images of .*lossy are JPEG, and the reference is not"):
        assert evaluate([str(lossy), "--reference", str(tmp_path / "png"), *shared]) == 0
    with pytest.warns(UserWarning) as said:
        assert evaluate([str(lossy), "--reference", str(tmp_path / "jpeg"), *shared]) == 0
    assert not [each for each in said if "JPEG" in str(each.message)]
