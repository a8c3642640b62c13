"""Preference scorers on tiny checkpoints in the layout of the published ones, and through a stand-in of a package."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_clip import register, save_clip
from torch import nn

from onestep.clip_model import load_clip
from onestep.files import sha256_of
from onestep.metrics.preference import load_scorer
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
