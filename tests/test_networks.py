"""The EDM networks: published sizes and outputs, their layers in the plainest form, and the import of pickles."""

import io
import json
import math
import os
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from tiny_edm import SONG, TINY, EasyDict, Reduced, edm, inner_state, labels_of, normal, persistent, state_of, tiny, write
from torch import Tensor, nn

from onestep.networks import DhariwalUNet, EDMUNet, SongUNet, load_edm
from onestep.networks.import_edm import import_edm, main, network_of
from onestep.networks.layers import Conv2d, FourierEmbedding, PositionalEmbedding, UNetBlock
from onestep.prediction import EDMPreconditioned, prediction_of
from onestep.schedule import EDM, Schedule

# --- the networks


@pytest.mark.parametrize(
    "kind, config, parameters",
    [
        (SongUNet, {"sample_size": 32, "channel_mult": (2, 2, 2), "augment_dim": 9}, 55_733_891),
        (SongUNet, {"sample_size": 32, "channel_mult": (2, 2, 2), "augment_dim": 9, "num_class_embeds": 10}, 55_735_299),
        (SongUNet, {"sample_size": 64, "augment_dim": 9}, 61_805_571),
        (DhariwalUNet, {"sample_size": 64, "num_class_embeds": 1000}, 295_899_267),
    ],
    ids=["cifar10-uncond", "cifar10-cond", "ffhq", "imagenet64"],
)
def test_sizes_of_the_published_networks(kind, config, parameters):
    """55.7, 61.8 and 295.9 million."""
    with torch.device("meta"):
        network = kind(**config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    "name, golden",
    [
        ("ddpmpp", [0.202952, 0.265349, -0.003659, 0.155575, 0.232744, 0.16378, 0.064248, 0.233837]),
        ("ncsnpp", [0.060081, -0.612155, -0.376269, 0.659174, 0.54264, -0.076946, 0.046427, 0.415948]),
        ("adm", [0.093429, 0.670918, -0.68129, 0.670319, -1.980956, -0.786462, -0.115419, 1.16986]),
    ],
)
def test_outputs_of_the_published_networks(name, golden):
    """What the published implementation gives for these weights and inputs; the second sample has no class."""
    network = tiny(name).double()
    with torch.no_grad():
        for index, (key, parameter) in enumerate(sorted(network.named_parameters())):
            wave = torch.cos(1.1 * torch.arange(parameter.numel(), dtype=torch.float64) + index).view(parameter.shape)
            fan = parameter[0].numel()
            parameter.copy_(wave * (2 / fan) ** 0.5 if parameter.ndim > 1 else 0.1 * wave + key.endswith("weight"))
        for key, buffer in network.named_buffers():
            if key.endswith("freqs"):
                buffer.copy_(torch.linspace(-20, 20, len(buffer)))
        x = torch.arange(2 * 3 * 64, dtype=torch.float64).sin().view(2, 3, 8, 8)
        out = network(x, torch.tensor([-1.5, 0.7]).double(), **labels_of(network, 2, -1)).sample
    found = [*out[0, 0, 0, :3], *out[1, 2, 5, 1:4], out.mean(), out.std()]
    torch.testing.assert_close(torch.stack(found), torch.tensor(golden).double(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_calling_convention_is_that_of_diffusers(name):
    network = tiny(name)
    x = normal(3, 3, 8, 8).float()
    cond = labels_of(network, 0, 1, 2)
    out = network(x, torch.full((3,), -0.5), **cond).sample
    assert out.shape == x.shape
    assert torch.equal(network(x, -0.5, **cond, return_dict=False)[0], out)
    assert torch.equal(network(x, torch.tensor(-0.5, dtype=torch.float64), **cond).sample, out)
    if cond:
        none = network(x, -0.5).sample
        assert torch.equal(network(x, -0.5, class_labels=torch.full((3,), -1)).sample, none)
        assert not torch.allclose(none, out)
    else:
        with pytest.raises(ValueError, match="no classes"):
            network(x, -0.5, class_labels=torch.zeros(3, dtype=torch.long))
    half = network.to(torch.bfloat16)(x.bfloat16(), -0.5, **cond).sample
    assert half.dtype == torch.bfloat16
    assert (half - out).norm() < 0.2 * out.norm()


@pytest.mark.parametrize("option", ["embedding_type", "encoder_type", "decoder_type"])
def test_unsupported_variants_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} 'skip' is not supported; allowed is"):
        SongUNet(**SONG | {option: "skip"})


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    def gradients(network: EDMUNet) -> list[Tensor]:
        network.zero_grad()
        network(normal(2, 3, 8, 8).float(), 0.3, **labels_of(network, 1, 0)).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]  # every one takes part

    network, calls = tiny(name), []
    plain = gradients(network)
    network.enable_gradient_checkpointing()
    checkpoint = network._gradient_checkpointing_func
    network._gradient_checkpointing_func = lambda *given: calls.append(1) or checkpoint(*given)
    for ours, theirs in zip(gradients(network), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert len(calls) == sum(isinstance(module, UNetBlock) for module in network.modules())


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    network = tiny(name)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert loaded.config.num_class_embeds == network.config.num_class_embeds
    x, cond = normal(2, 3, 8, 8).float(), labels_of(network, 1, -1)
    assert torch.equal(loaded(x, 0.1, **cond).sample, network(x, 0.1, **cond).sample)


# --- the layers


def filtered(x: Tensor, taps: list[float]) -> Tensor:
    """Every second sample of x under the separable filter, by slices; x is already padded."""
    n = (x.shape[-1] - len(taps)) // 2 + 1
    slices = [a * b * x[..., i : i + 2 * n : 2, j : j + 2 * n : 2] for i, a in enumerate(taps) for j, b in enumerate(taps)]
    return torch.stack(slices).sum(0)


def explicit_up(x: Tensor, taps: list[int]) -> Tensor:
    if taps == [1, 1]:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    bordered = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return bordered[..., 2:-2, 2:-2]  # [1, 3, 3, 1] is bilinear interpolation with zeros around the picture


def explicit_down(x: Tensor, taps: list[int]) -> Tensor:
    if taps == [1, 1]:
        return F.avg_pool2d(x, 2)
    return filtered(F.pad(x, (1, 1, 1, 1)), [1 / 8, 3 / 8, 3 / 8, 1 / 8])


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_resampling_convolution(taps, kernel):
    x = normal(2, 5, 6, 6)
    for way, explicit in (("up", explicit_up), ("down", explicit_down)):
        layer = Conv2d(5, 5, kernel, resample_filter=taps, **{way: True}).double()
        expected = explicit(x, taps)
        if kernel:
            expected = F.conv2d(expected, layer.weight, layer.bias, padding=kernel // 2)
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("taps, around", [([1, 1], 0), ([1, 3, 3, 1], 1)])
def test_convolution_before_the_filter(taps, around):
    x, layer = normal(2, 5, 6, 6), Conv2d(5, 7, 3, down=True, resample_filter=taps, down_last=True).double()
    wide = F.conv2d(F.pad(x, (1 + around,) * 4), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), filtered(wide, [t / sum(taps) for t in taps]), atol=1e-12, rtol=1e-12)


def test_attention_pixel_by_pixel():
    heads, c = 2, 8
    block = UNetBlock(16, 16, 4, heads=heads).double()
    x = normal(1, 16, 2, 3)
    qkv = block.qkv(block.norm2(x)).detach().flatten(2)[0]  # (3 * 16, pixels)
    mixed = torch.zeros(16, 6, dtype=torch.float64)
    for head in range(heads):
        q, k, v = (torch.stack([qkv[3 * (head * c + i) + kind] for i in range(c)]) for kind in range(3))
        for pixel in range(6):
            weights = torch.tensor([math.exp(q[:, pixel] @ k[:, other] / math.sqrt(c)) for other in range(6)]).double()
            mixed[head * c : head * c + c, pixel] = (v * weights / weights.sum()).sum(1)
    torch.testing.assert_close(block.attention(x), block.proj(mixed.view(1, 16, 2, 3)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("adaptive, scale", [(True, 1.0), (False, 0.5**0.5)])
def test_residual_block(adaptive, scale):
    block = UNetBlock(8, 12, 4, skip_scale=scale, adaptive_scale=adaptive).double()
    x, emb = normal(2, 8, 4, 4), normal(2, 4, seed=1)
    h, e = block.conv0(F.silu(block.norm0(x))), (emb @ block.affine.weight.T + block.affine.bias).view(2, -1, 1, 1)
    h = block.norm1(h) * (e[:, :12] + 1) + e[:, 12:] if adaptive else block.norm1(h + e)
    torch.testing.assert_close(block(x, emb), scale * (block.conv1(F.silu(h)) + block.skip(x)))


@pytest.mark.parametrize("endpoint, divisor", [(True, 3), (False, 4)])
def test_positional_embedding(endpoint, divisor):
    x = torch.tensor([-1.6, 0.0, 1.1], dtype=torch.float64)
    angles = [[float(t) * 10000 ** (-i / divisor) for i in range(4)] for t in x]
    expected = [[f(a) for f in (math.cos, math.sin) for a in row] for row in angles]
    torch.testing.assert_close(PositionalEmbedding(8, endpoint)(x), torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)


def test_fourier_embedding():
    layer = FourierEmbedding(6)
    angles = 2 * math.pi * 0.3 * layer.freqs
    torch.testing.assert_close(layer(torch.tensor([0.3]))[0], torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=1e-4)


def test_song_embeds_sine_first_and_scales_classes():
    network, seen = tiny("ncsnpp"), []
    network.map_layer0.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(normal(2, 3, 8, 8).float(), 0.4, class_labels=torch.tensor([2, -1]))
    cos, sin = network.map_noise(torch.tensor([0.4]))[0].chunk(2)
    plain = torch.cat([sin, cos]) + network.map_label.bias
    expected = torch.stack([plain + 3**0.5 * network.map_label.weight[:, 2], plain])
    torch.testing.assert_close(seen[0], expected)


# --- the import


@pytest.mark.parametrize("name", TINY)
def test_import_is_bit_for_bit(name, tmp_path, capsys):
    network = tiny(name)
    beside = {"loss_fn": persistent("EDMLoss", P_mean=-1.2), "dataset_kwargs": EasyDict(path="cifar10.zip")}
    path = write(tmp_path / "edm-tiny.pkl", edm(network), **beside)
    assert main([str(path), str(tmp_path / "edm")]) == 0
    assert "CC BY-NC-SA" in capsys.readouterr().out
    loaded, scheduler = load_edm(tmp_path / "edm")
    assert type(loaded) is type(network) and not loaded.training
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == json.loads(
        json.dumps({k: v for k, v in network.config.items() if k[0] != "_"})
    )
    x, cond = normal(2, 3, 8, 8).float(), labels_of(network, 0, 2)
    assert torch.equal(loaded(x, -0.2, **cond).sample, network(x, -0.2, **cond).sample)
    schedule, prediction = Schedule.from_scheduler(scheduler), prediction_of(scheduler)
    assert isinstance(schedule, EDM) and (schedule.noise_scale, schedule.sigma_min, schedule.sigma_max) == (0.25, 0.002, 80)
    assert isinstance(prediction, EDMPreconditioned) and prediction.sigma_data == 0.5
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_diffusers_loads_and_runs_the_folder(tmp_path):
    import_edm(write(tmp_path / "edm.pkl", edm(tiny("adm"))), tmp_path / "edm")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "edm")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, class_labels=[0, 1], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def lose(state: dict[str, Any]) -> None:
    del state["_modules"]["map_layer0"].call[1][0]["state"]["_parameters"]["bias"]


def add(state: dict[str, Any]) -> None:
    state["_parameters"]["surplus"] = nn.Parameter(torch.zeros(2))


def reshape(state: dict[str, Any]) -> None:
    state_of(state["_modules"]["map_layer0"])["_parameters"]["bias"] = nn.Parameter(torch.zeros(3))


def other_dtype(state: dict[str, Any]) -> None:
    state_of(state["_modules"]["map_layer0"])["_parameters"]["bias"] = nn.Parameter(torch.zeros(32).double())


def other_filter(state: dict[str, Any]) -> None:
    state["_init_kwargs"]["resample_filter"] = [1, 3]


def unknown_option(state: dict[str, Any]) -> None:
    state["_init_kwargs"]["colour"] = 1


def strange_option(state: dict[str, Any]) -> None:
    state["_init_kwargs"]["dropout"] = {"p": 0.1}


def no_state(state: dict[str, Any]) -> None:
    del state["_modules"]


def outside_its_storage(state: dict[str, Any]) -> None:
    storage = torch.zeros(4).storage()
    state_of(state["_modules"]["map_layer0"])["_parameters"]["bias"] = Reduced(
        torch._utils._rebuild_tensor_v2, storage, 0, (32,), (1,), False, OrderedDict()
    )


SPOILT = [
    (lose, r"lacks map_layer0\.bias"),
    (add, "has the unknown surplus"),
    (reshape, r"map_layer0\.bias is torch.float32 of shape \(3,\), not torch.float32 of shape \(32,\)"),
    (other_dtype, r"map_layer0\.bias is torch.float64"),
    (other_filter, r"resample_filter is \[\[\[\[0.25"),
    (unknown_option, "unknown options colour"),
    (strange_option, "option dropout is neither"),
    (no_state, r"not built as a published .*_modules"),
    (outside_its_storage, "not built as a published .*out of bounds"),
]


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("spoil, message", SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_what_does_not_fit_is_refused(spoil, message, tmp_path):
    pickled = edm(tiny("ddpmpp"))
    spoil(inner_state(pickled))
    with pytest.raises(ValueError, match=message):
        import_edm(write(tmp_path / "edm.pkl", pickled), tmp_path / "edm")
    assert [each.name for each in tmp_path.iterdir()] == ["edm.pkl"]


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_refused(precond, tmp_path, capsys):
    path = write(tmp_path / "edm.pkl", edm(tiny("adm"), precond))
    with pytest.raises(SystemExit, match="2"):
        main([str(path), str(tmp_path / "edm")])
    error = capsys.readouterr().err
    assert f"its preconditioning is {precond}, and only EDMPrecond is supported" in error and error.count("\n") == 1


def test_an_output_in_use_is_refused(tmp_path):
    path = write(tmp_path / "edm.pkl", edm(tiny("adm")))
    (tmp_path / "edm").mkdir()
    import_edm(path, tmp_path / "edm")  # an empty folder may be filled
    with pytest.raises(ValueError, match="not empty"):
        import_edm(path, tmp_path / "edm")
    with pytest.raises(ValueError, match="cannot be written"):
        import_edm(path, path / "edm")


def test_damaged_folders_are_refused(tmp_path):
    import_edm(write(tmp_path / "edm.pkl", edm(tiny("ddpmpp"))), tmp_path / "edm")
    config = tmp_path / "edm/unet/config.json"
    written = json.loads(config.read_text())
    for change in ({"augment_dim": 0}, {"num_class_embeds": 3}, {"model_channels": 16}, {"_class_name": "UNet2DModel"}):
        config.write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match=r"import it again|cannot be loaded"):
            load_edm(tmp_path / "edm")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_edm(tmp_path / "nowhere")


# --- hostile pickles


def storage_of(content: Any) -> Reduced:
    """A tensor whose nested bytes are a torch.save of something else than a storage."""
    nested = io.BytesIO()
    torch.save(content, nested, _use_new_zipfile_serialization=False)
    storage = Reduced(torch.storage._load_from_bytes, nested.getvalue())
    return Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (32,), (1,), False, OrderedDict())


@pytest.mark.parametrize("place", ["alone", "beside", "state", "bytes"])
def test_hostile_pickles_are_refused_without_being_run(place, tmp_path):
    marker = tmp_path / "was-run"
    evil = Reduced(os.system, f"mkdir {marker}")
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # it does what it says where it is let
    marker.rmdir()
    pickled, path = edm(tiny("ddpmpp")), tmp_path / "edm.pkl"
    state = inner_state(pickled)
    if place == "state":
        state_of(state["_modules"]["map_layer0"])["harmless"] = evil
    if place == "bytes":
        state_of(state["_modules"]["map_layer0"])["_parameters"]["bias"] = storage_of(evil)
    write(path, evil if place == "alone" else pickled, **({"harmless": evil} if place == "beside" else {}))
    with pytest.raises(ValueError, match=rf"{os.system.__module__}.system"):
        import_edm(path, tmp_path / "edm")
    assert [each.name for each in tmp_path.iterdir()] == ["edm.pkl"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"c__builtin__\ngetattr\n.", "__builtin__.getattr"),
        (b"ctorch\nload\n.", "torch.load"),
        (b"(S'x'\niposix\nsystem\n.", "posix.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93.", "os.system"),
        (b"Pelsewhere\n.", "outside the file"),
        (b"ccollections\nOrderedDict\n(dS'a'\nI1\nsb.", "__setstate__"),  # the state of a class, not of an object
        (b"", "Ran out of input"),
        (b"\x00", "cannot be read"),
        (pickle.dumps([1]), "no network under 'ema'"),
        (pickle.dumps({"ema": 1}), "no network under 'ema'"),
        (pickle.dumps({"ema": OrderedDict()}), "no network under 'ema'"),
        (b"}S'ema'\ncnumpy\ndtype\n(tRs.", "numpy.dtype is where a network was expected"),
    ],
)
def test_hand_made_pickles_are_refused(data, message, tmp_path):
    (tmp_path / "edm.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        import_edm(tmp_path / "edm.pkl", tmp_path / "edm")


def test_nested_bytes_must_be_a_storage(tmp_path):
    pickled = edm(tiny("ddpmpp"))
    state_of(inner_state(pickled)["_modules"]["map_layer0"])["_parameters"]["bias"] = storage_of({"a": 1})
    with pytest.raises(ValueError, match="a dict is where a tensor's storage was expected"):
        import_edm(write(tmp_path / "edm.pkl", pickled), tmp_path / "edm")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    whole = write(tmp_path / "edm.pkl", edm(tiny("ddpmpp"))).read_bytes()
    (tmp_path / "edm.pkl").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cannot be read"):
        import_edm(tmp_path / "edm.pkl", tmp_path / "edm")
    with pytest.raises(ValueError, match="cannot be read"):
        import_edm(tmp_path / "nowhere.pkl", tmp_path / "edm")


def test_whatever_byte_is_changed_nothing_but_a_value_error_comes_out(tmp_path):
    path = write(tmp_path / "edm.pkl", edm(tiny("ddpmpp")))
    whole, source, refused = path.read_bytes(), np.random.default_rng(0), 0
    for index in source.integers(len(whole), size=20):
        path.write_bytes(whole[:index] + bytes([source.integers(256)]) + whole[index + 1 :])
        try:
            network_of(path)
        except ValueError:
            refused += 1
    assert refused
