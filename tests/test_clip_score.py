"""The CLIP score on a tiny CLIP that is saved to and loaded from disk; which weights fit which model."""

import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_clip import PIXELS, register, save_clip
from torch import Tensor

from onestep.clip_model import load_clip
from onestep.files import sha256_of
from onestep.metrics.clip_score import ClipScore
from onestep.metrics.extractor import load_extractor

PROMPTS = ["a red bicycle", "a bowl of lemons", "snow"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[object, Path]:
    folder = tmp_path_factory.mktemp("clip") / "mine"
    return save_clip(folder), folder


def pictures() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(256, size=shape, dtype=np.uint8) for shape in ((40, 50, 3), (32, 32, 3), (64, 33, 3))]


def prepared(image: np.ndarray) -> Tensor:
    """The shorter side to 32, the middle, mean and std of the folder."""
    height, width = image.shape[:2]
    scale = 32 / min(height, width)
    resized = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (round((each - 32) / 2) for each in resized.size)
    pixels = np.asarray(resized)[top : top + 32, left : left + 32] / 255
    return torch.tensor((pixels - PIXELS["mean"]) / PIXELS["std"]).permute(2, 0, 1).float()


def known_cosines(model) -> Tensor:
    """From the model itself and its tokenizer, in float64."""
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepared(image) for image in pictures()])).double()
        texts = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(PROMPTS)).double()
    return (images * texts).sum(1) / images.norm(dim=1) / texts.norm(dim=1)


def test_score_and_cosine_are_those_of_the_saved_model(saved):
    model, folder = saved
    score, known = ClipScore(load_clip(str(folder))), known_cosines(model)
    assert known.min() < -0.01 and known.max() > 0.01  # or the two could not be told apart
    score.update(pictures()[:2], PROMPTS[:2])
    score.update([], [])
    score.update(pictures()[2:], PROMPTS[2:])
    torch.testing.assert_close(score.cosines, known, rtol=1e-5, atol=1e-6)
    name = "mine, 32 bicubic"
    assert score.compute() == pytest.approx(
        {f"CLIPScore({name}, x100)": 100 * float(known.clamp(min=0).mean()), f"cosine({name})": float(known.mean())},
        abs=1e-4,
    )
    hessel = ClipScore(score.clip, scale=2.5)
    hessel.update(pictures(), PROMPTS)
    assert hessel.compute()[f"CLIPScore({name}, x2.5)"] == pytest.approx(2.5 * float(known.clamp(min=0).mean()), abs=1e-5)


def test_what_cannot_be_scored_is_refused(saved):
    score = ClipScore(load_clip(str(saved[1])))
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        score.update(pictures(), PROMPTS[:2])
    with pytest.raises(ValueError, match="at least 1 image"):
        score.compute()


def test_clip_is_an_extractor_too(saved):
    model, folder = saved
    extractor = load_extractor(f"clip:{folder}")
    batch = torch.stack([extractor.prepare(image) for image in pictures()])
    torch.testing.assert_close(batch, torch.stack([prepared(image) for image in pictures()]), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(extractor(batch).pooled, model.encode_image(batch))
    assert (extractor.name, extractor.metric, extractor.dimensions) == ("clip mine, 32 bicubic", "FD", 16)
    assert extractor.sha256 == sha256_of(folder / "open_clip_model.safetensors")


def test_activation_is_the_one_that_the_folder_names(tmp_path, saved):
    quick = save_clip(tmp_path / "quick", quick_gelu=True)
    found, batch = load_clip(str(tmp_path / "quick")), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.images(batch), quick.encode_image(batch))
        assert not torch.allclose(found.images(batch), saved[0].encode_image(batch), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-L-14/openai", "ViT-L-14 computes GELU, .* trained with QuickGELU; type ViT-L-14-quickgelu/openai"),
        ("ViT-B-32/metaclip_400m", "type ViT-B-32-quickgelu/metaclip_400m"),
        ("ViT-B-32-quickgelu/laion2b_s34b_b79k", "has no weights 'laion2b_s34b_b79k'; allowed are openai"),
        ("ViT-B-32/nonsense", "has no weights 'nonsense'; allowed are .*laion2b_s34b_b79k"),
        ("ViT-L-15/openai", "knows no model 'ViT-L-15', .*did you mean .*ViT-L-14"),
        ("ViT-B-32", "needs the tag of its weights, as in ViT-B-32/TAG; allowed are .*laion2b_s34b_b79k"),
    ],
)
def test_names_that_would_give_other_numbers_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_clip(name)
    if name == "ViT-B-32":
        with pytest.raises(ValueError, match=r"^(?!.*openai)"):  # its own tags alone, not those of QuickGELU
            load_clip(name)


def test_mismatch_is_refused_both_ways_and_with_weights(monkeypatch, tmp_path, saved):
    register(monkeypatch, tmp_path, plain={"hf_hub": "a/plain/"}, quick={"hf_hub": "a/quick/", "quick_gelu": True})
    path = saved[1] / "open_clip_model.safetensors"
    for name, other in (("tiny/quick", "tiny-quickgelu/quick"), ("tiny-quickgelu/plain", "tiny/plain")):
        with pytest.raises(ValueError, match=f"type {other}$"):
            load_clip(name, path)
    found = load_clip("tiny/plain", path)
    assert found.name == "tiny/open_clip_model.safetensors"
    with torch.no_grad():
        torch.testing.assert_close(found.images(torch.ones(1, 3, 32, 32)), saved[0].encode_image(torch.ones(1, 3, 32, 32)))


def test_weights_are_found_in_the_cache_or_missed_by_name(monkeypatch, tmp_path, saved):
    def fail(url, path, **given):
        raise URLError("no network")

    register(monkeypatch, tmp_path, plain={"hf_hub": "a/plain/", "mean": (0.1, 0.2, 0.3)})
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "open_clip-tiny-plain.safetensors"
    url = "https://huggingface.co/a/plain/resolve/main/open_clip_model.safetensors"
    with pytest.raises(ValueError, match=f"fetch {url} elsewhere, put it at {place}"):
        load_clip("tiny/plain")
    place.write_bytes((saved[1] / "open_clip_model.safetensors").read_bytes())
    found = load_clip("tiny/plain")
    assert found.name == "tiny/plain" and tuple(found.pixels["mean"]) == (0.1, 0.2, 0.3)
    black = found.prepare(np.zeros((32, 32, 3), np.uint8))[:, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.1, 0.2, 0.3]) / torch.tensor(found.pixels["std"]))


def test_folders_and_weights_that_do_not_fit_are_refused(tmp_path, saved):
    with pytest.raises(ValueError, match=r"no file .*nowhere"):
        load_clip(str(saved[1]), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"open_clip_config\.json cannot be read"):
        load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(ValueError, match="has no model_cfg"):
        load_clip(str(tmp_path))
    config = json.loads((saved[1] / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 16
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not hold the weights of CLIP .*size mismatch"):
        load_clip(str(tmp_path), saved[1] / "open_clip_model.safetensors")


def test_cosine_is_that_of_unit_vectors():
    from onestep.metrics.clip_score import cosines

    images, texts = torch.randn(4, 7), torch.randn(4, 7)
    expected = (F.normalize(images.double(), dim=1) * F.normalize(texts.double(), dim=1)).sum(1)
    torch.testing.assert_close(cosines(images, texts), expected, rtol=1e-12, atol=1e-12)
