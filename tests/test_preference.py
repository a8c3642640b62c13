"""Preference scorers on tiny checkpoints in the layout of the published ones, and through a stand-in of a package."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import register, save_clip
from torch import nn

from onestep.clip_model import load_clip
from onestep.evaluate import main
from onestep.files import sha256_of
from onestep.metrics import preference
from onestep.metrics.preference import Scorer, load_scorer
from onestep.metrics.preference_models import Aesthetic, HPSv2, padded

PROMPTS = ["a red bicycle", "a bowl of lemons"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "mine"
    save_clip(path)
    return path


def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(256, size=shape, dtype=np.uint8) for shape in ((32, 32, 3), (20, 40, 3))]


def test_padding_is_black_and_in_the_middle():
    found = padded(np.full((20, 40, 3), 255, np.uint8), 32)  # to 16 x 32
    assert found.shape == (3, 32, 32)
    assert not found[:, :8].any() and not found[:, 24:].any()
    torch.testing.assert_close(found[:, 8:24], torch.ones(3, 16, 32))
    image = pictures()[0]
    torch.testing.assert_close(padded(image, 32), torch.tensor(image).permute(2, 0, 1) / 255)


def test_hpsv2_is_the_cosine_of_its_checkpoint(monkeypatch, tmp_path, folder):
    register(monkeypatch, tmp_path)
    model = load_clip(str(folder)).model
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    scorer = HPSv2(tmp_path / "HPS.pt", "cpu", model="tiny")
    own = scorer.clip.pixels
    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ("mean", "std"))
    batch = torch.stack([(padded(image, 32) - mean) / std for image in pictures()])
    with torch.no_grad():
        image = model.encode_image(batch, normalize=True)
        text = model.encode_text(scorer.clip.tokenizer(PROMPTS), normalize=True)
    found = scorer(pictures(), PROMPTS)
    torch.testing.assert_close(found, (image * text).sum(1).double(), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found, scorer(pictures(), PROMPTS[::-1]))
    assert (scorer.name, scorer.sha256) == ("HPSv2 (HPS.pt)", sha256_of(tmp_path / "HPS.pt"))
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        scorer(pictures(), PROMPTS[:1])


def head(deep: bool) -> nn.Module:
    """LAION's linear head, or the stack of christophschuhmann's, both for 16 numbers in place of 768."""
    torch.manual_seed(1)
    if not deep:
        return nn.Linear(16, 1)
    layers = [nn.Linear(16, 24), nn.Dropout(0.2), nn.Linear(24, 8), nn.Dropout(0.2), nn.Linear(8, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})


@pytest.mark.parametrize("deep", [False, True])
def test_aesthetic_is_its_head_on_the_unit_embedding(deep, tmp_path, folder):
    known = head(deep).eval()
    torch.save(known.state_dict(), tmp_path / "head.pth")
    scorer = Aesthetic(tmp_path / "head.pth", "cpu", str(folder))
    batch = torch.stack([scorer.clip.prepare(image) for image in pictures()])
    with torch.no_grad():
        unit = F.normalize(scorer.clip.model.encode_image(batch), dim=1)
        expected = (known["layers"] if deep else known)(unit).squeeze(1)
    found = scorer(pictures(), PROMPTS)
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(found, scorer(pictures(), PROMPTS[::-1]))
    assert scorer.name == "aesthetic (head.pth on mine)"


@pytest.mark.parametrize(
    "state",
    [
        {"layers.0.weight": torch.ones(4, 16), "layers.0.bias": torch.ones(4)},
        {"layers.0.weight": torch.ones(4, 16)},
        {"0.weight": torch.ones(4, 16), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 3), "1.bias": torch.ones(1)},
        {"weight": torch.ones(1, 16, 1), "bias": torch.ones(1)},
        {"scale": torch.ones(1)},
    ],
)
def test_what_is_no_head_is_refused(state, tmp_path, folder):
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="not a head of linear layers"):
        Aesthetic(tmp_path / "head.safetensors", "cpu", str(folder))


def test_a_head_for_another_clip_is_refused(tmp_path, folder):
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"takes 768 numbers, and mine gives 16"):
        Aesthetic(tmp_path / "head.pth", "cpu", str(folder))


PACKAGE = """
class Model:
    def score(self, prompt, image):
        assert image.mode == "RGB"
        return len(prompt) + image.size[0] / 100

def load(name, device, med_config):
    assert open(name).read() == "weights" and open(med_config).read() == "{}" and device == "cpu"
    return Model()
"""


def test_imagereward_goes_through_its_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pip install image-reward"):
        load_scorer("imagereward", tmp_path / "ImageReward.pt")
    (tmp_path / "ImageReward.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*ImageReward\.pt; download https://huggingface.co/THUDM/ImageReward/"):
        load_scorer("imagereward", tmp_path / "ImageReward.pt")
    (tmp_path / "ImageReward.pt").write_text("weights")
    with pytest.raises(ValueError, match=r"no file .*med_config\.json; fetch https://.*main/med_config\.json"):
        load_scorer("imagereward", tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    scorer = load_scorer("imagereward", tmp_path / "ImageReward.pt")
    monkeypatch.delitem(sys.modules, "ImageReward")
    torch.testing.assert_close(scorer(pictures(), PROMPTS), torch.tensor([13.32, 16.40], dtype=torch.float64))


def test_unknown_scorers_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no preference scorer 'hps'; allowed are hpsv2, aesthetic, imagereward"):
        load_scorer("hps")
    with pytest.raises(ValueError, match=r"no file .*nowhere; download https://huggingface.co/xswu/HPSv2/"):
        load_scorer("hpsv2", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no file .*nowhere; download https://github.com/christophschuhmann/"):
        load_scorer("aesthetic", tmp_path / "nowhere")


class Brightness(Scorer):
    """The mean of a picture, and as many more as its prompt is long."""

    name, sha256 = "HPSv2 (stand-in)", "0" * 64

    def scored(self, images, prompts):
        return torch.tensor([image.mean() + len(prompt) for image, prompt in zip(images, prompts)], dtype=torch.float64)


class Plain(Brightness):
    name, prompted = "aesthetic (stand-in)", False

    def scored(self, images, prompts):
        return super().scored(images, [""] * len(images))


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(preference, "load_scorer", lambda name, *rest: {"hpsv2": Brightness, "aesthetic": Plain}[name]())


@pytest.fixture
def greys(tmp_path) -> Path:
    """Five pictures of 8x8, of brightness 10, 20 .. 50, and prompts of 1, 2 .. 5 letters."""
    (tmp_path / "greys").mkdir()
    for i in range(1, 6):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(tmp_path / "greys" / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join("x" * i for i in range(1, 6)))
    return tmp_path


@pytest.mark.filterwarnings("ignore:a distance from")
def test_evaluate_has_the_mean_of_each_scorer(stand_ins, greys):
    base = [str(greys / "greys"), "--reference", str(greys / "greys"), "--extractor", "digits", "--device", "cpu"]
    argv = [*base, "--prompts", str(greys / "prompts.txt"), "--preference", "hpsv2,aesthetic"]
    for batch in ("2", "64"):
        assert main([*argv, "--batch-size", batch, "--output", str(greys / "rows.jsonl")]) == 0
        row = json.loads((greys / "rows.jsonl").read_text().splitlines()[-1])
        assert row["HPSv2 (stand-in)"] == 30 + 3 and row["aesthetic (stand-in)"] == 30
        assert row["preference_sha256"] == {"HPSv2 (stand-in)": "0" * 64, "aesthetic (stand-in)": "0" * 64}
        assert row["FD_proxy"] == pytest.approx(0, abs=1e-9)
    assert main([*argv, "--count", "2", "--output", str(greys / "rows.jsonl")]) == 0
    row = json.loads((greys / "rows.jsonl").read_text().splitlines()[-1])
    assert row["HPSv2 (stand-in)"] == 15 + 1.5


@pytest.mark.filterwarnings("ignore:a distance from")
def test_a_scorer_without_prompts_takes_classes_too(stand_ins, tiny_teacher, greys, capsys):
    argv = [str(tiny_teacher), "--protocol", "digits-1797", "--count", "4", "--device", "cpu"]
    assert main([*argv, "--preference", "aesthetic", "--output", str(greys / "rows.jsonl")]) == 0
    row = json.loads((greys / "rows.jsonl").read_text())
    assert 0 < row["aesthetic (stand-in)"] < 255
    assert main([*argv, "--preference", "hpsv2", "--output", str(greys / "other.jsonl")]) == 2
    assert "--prompts FILE" in capsys.readouterr().err and not (greys / "other.jsonl").exists()


def test_unknown_scorers_are_one_line(greys, capsys):
    argv = [str(greys / "greys"), "--reference", str(greys / "greys"), "--extractor", "digits", "--device", "cpu"]
    assert main([*argv, "--preference", "hpsv3", "--output", str(greys / "rows.jsonl")]) == 2
    assert "allowed are hpsv2, aesthetic, imagereward" in capsys.readouterr().err
