"""Metrics against known answers, on stand-ins of a few thousand weights."""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn

from onestep.metrics import PROTOCOLS, Classifier, Moments, evaluate, fid, frechet_distance, load_pipeline, protocol_of
from onestep.metrics.images import quantise
from onestep.metrics.inception import FILE, inception_moments, load_inception
from onestep.metrics.render import FAMILIES, render
from onestep.metrics.score import score

FASHION = PROTOCOLS["fashion-10k"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A random class-conditional DiTPipeline of grey 32x32 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    for parameter in transformer.parameters():  # its last layer starts at zero, which would hide the class
        nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("export") / "dit"
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())  # save_pretrained leaves id2label out
    index["id2label"] = {str(k): f"class {k}" for k in range(10)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def consistency(tmp_path_factory) -> Path:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=10,
        add_attention=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("export") / "consistency"
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> dict[str, Path]:
    """A random classifier and random reference statistics, in place of the embedded ones."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("assets")
    save_file(Classifier().state_dict(), folder / "classifier.safetensors")
    moments_of(torch.rand(300, 128)).save(folder / "reference.safetensors")
    return {"classifier": folder / "classifier.safetensors", "reference": folder / "reference.safetensors"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("eval_fid", Path(__file__).parent.parent / "eval" / "fid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moments_of(features: Tensor, *cuts: int) -> Moments:
    moments = Moments(features.shape[1])
    for part in torch.tensor_split(features, cuts):
        moments.update(part)
    return moments


def gaussian(mean, covariance) -> Moments:
    return Moments.of(100, torch.as_tensor(mean), torch.as_tensor(covariance), "test")


# Fréchet distance


def test_commuting_covariances_have_the_closed_form():
    a, b = gaussian([0.0, 1.0], torch.diag(torch.tensor([4.0, 9.0]))), gaussian([3.0, 1.0], torch.eye(2))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)


def test_non_commuting_covariances_agree_with_sqrtm():
    rng = np.random.default_rng(0)
    c_a, c_b = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
    m_a, m_b = rng.normal(size=(2, 6))
    assert np.abs(c_a @ c_b - c_b @ c_a).max() > 1
    expected = ((m_a - m_b) ** 2).sum() + np.trace(c_a + c_b - 2 * sqrtm(c_a @ c_b).real)
    assert frechet_distance(gaussian(m_a, c_a), gaussian(m_b, c_b)) == pytest.approx(expected, rel=1e-10)


def test_non_commuting_two_by_two_has_the_closed_form():
    # tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2x2 matrices
    c_a, c_b = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    expected = 4 + 4 - 2 * math.sqrt(8 + 2 * math.sqrt(9))
    assert frechet_distance(gaussian([0.0, 0.0], c_a), gaussian([0.0, 0.0], c_b)) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_are_no_trouble():
    features = torch.randn(5, 32, dtype=torch.float64)
    a = moments_of(features)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, moments_of(features + 2)) == pytest.approx(4 * 32, rel=1e-6)


def test_streaming_and_merging_equal_one_shot():
    features = torch.randn(1000, 7, dtype=torch.float64) * 3 + 1e3
    expected = np.cov(features.numpy(), rowvar=False)
    whole, streamed, left = moments_of(features), moments_of(features, 1, 130, 131, 700), moments_of(features[:400])
    left.merge(moments_of(features[400:]))
    left.merge(Moments(7))
    for moments in (whole, streamed, left):
        assert moments.count == 1000
        torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-12, atol=0)
        np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_saved_moments_come_back_and_go_on(tmp_path):
    features = torch.randn(60, 5)
    moments_of(features[:40]).save(tmp_path / "m.safetensors")
    back = Moments.load(tmp_path / "m.safetensors")
    back.update(features[40:])
    torch.testing.assert_close(back.covariance, moments_of(features).covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"mean": torch.zeros(3), "cov": torch.ones(6)},
        {"n": torch.tensor([9]), "mean": torch.zeros(3), "cov": torch.ones(10)},
        {"n": torch.tensor([9]), "mean": torch.zeros(3), "cov": torch.full((6,), math.nan)},
        {"n": torch.tensor([9]), "mean": torch.zeros(2), "cov": torch.tensor([1.0, 0.5, -1.0])},
        {"n": torch.tensor([1]), "mean": torch.zeros(2), "cov": torch.tensor([1.0, 0.0, 1.0])},
    ],
)
def test_wrong_statistics_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        Moments.load(tmp_path / "m.safetensors")


def test_corrupt_or_missing_statistics_are_refused(tmp_path, assets):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(assets["reference"].read_bytes()[:-100])
    for path in (broken, tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match="not a readable statistics file"):
            Moments.load(path)


# Rendering


@pytest.mark.parametrize(("family", "guidance"), [("export", 1.0), ("export", 2.0), ("consistency", 1.0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_render_does_not_depend_on_the_batch_size(family, guidance, steps, request):
    pipe = load_pipeline(request.getfixturevalue(family))
    labels, seeds = [3, 1, 4, 1, 5], [10, 11, 12, 13, 14]
    one, two, all_ = (torch.cat(list(render(pipe, labels, seeds, steps, guidance, size))) for size in (1, 2, 8))
    assert one.shape[:2] == (5, 1) and one.min() >= 0 and one.max() <= 1 and one.std() > 0.01
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-5)
    assert (one[1] - one[3]).abs().max() > 0.01  # the same class, another seed


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_later_noises_of_a_chain_are_seeded_too(guidance, export):
    from diffusers import LCMScheduler

    pipe = load_pipeline(export)
    pipe.scheduler = LCMScheduler(original_inference_steps=4, clip_sample=False)
    labels, seeds = [3, 1, 4, 1, 5], [10, 11, 12, 13, 14]
    one, all_ = (torch.cat(list(render(pipe, labels, seeds, 4, guidance, size))) for size in (1, 8))
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-5)


def test_image_i_is_the_pipe_called_alone_with_its_seed(export):
    pipe = load_pipeline(export)
    images = torch.cat(list(render(pipe, [2, 7, 9], [5, 6, 7], 2, 1.5, 3)))
    alone = pipe([7], guidance_scale=1.5, generator=torch.manual_seed(6), num_inference_steps=2).images[0]
    np.testing.assert_allclose(quantise(images)[1, 0].numpy(), np.array(alone.convert("L")), atol=1)


def test_consistency_images_are_halved_and_shifted_once(consistency):
    pipe = load_pipeline(consistency)
    (image,) = render(pipe, [7], [6], 1, 1.0, 1)
    alone = pipe(class_labels=[7], generator=torch.manual_seed(6)).images[0]
    np.testing.assert_allclose(quantise(image)[0, 0].numpy(), np.array(alone.convert("L")), atol=1)


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("export", (1, 0.0, 1), "--guidance 0.0"),
        ("consistency", (1, 2.0, 1), "--guidance 2.0"),
        ("export", (0, 1.0, 1), "--steps 0"),
        ("export", (1, 1.0, 0), "--batch-size 0"),
    ],
)
def test_render_refuses_at_the_call(family, arguments, words, request):
    with pytest.raises(ValueError, match=words):
        render(load_pipeline(request.getfixturevalue(family)), [0], [0], *arguments)


def test_unknown_pipelines_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    with pytest.raises(ValueError, match=r"AudioPipeline .* allowed are DiTPipeline, ConsistencyModelPipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(tmp_path)


def test_guidance_costs_a_second_pass():
    assert FAMILIES["DiTPipeline"].passes(50, 1.5) == 100
    assert FAMILIES["DiTPipeline"].passes(1, 1.0) == 1
    assert FAMILIES["ConsistencyModelPipeline"].passes(2, 1.0) == 2


# Protocols


class Brightness(Classifier):
    """Says class k for an image of brightness k / 10."""

    def features(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) / 2 + 0.5)[:, None].expand(-1, 128)

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(128, 10)
        k = torch.arange(10.0)
        self.head.weight.data = (2 * k / 10)[:, None].expand(-1, 128) / 128
        self.head.bias.data = -((k / 10) ** 2)


def test_class_accuracy_and_moments_have_known_answers():
    shown, intended = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 9, 9, 6, 7]
    images = (torch.tensor(shown) / 10 + 0.011).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    moments, accuracy = score(images.split(3), intended, Brightness(), FASHION)
    assert accuracy == 6 / 8
    assert moments.count == 8
    # 0.361 but for 8 bits
    assert moments.mean[0].item() == pytest.approx((images[:, 0, 0, 0] * 255).round().mean().item() / 255, abs=1e-6)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        score([torch.rand(2, 3, 32, 32)], [0, 1], Brightness(), FASHION)


def test_evaluate_gives_the_same_row_for_every_batch_size(export, assets):
    with pytest.warns(UserWarning, match="20 images is biased"):
        rows = [
            evaluate(export, "fashion-10k", steps=2, guidance=1.5, batch_size=size, count=20, **assets) for size in (20, 7)
        ]
    row = json.loads(json.dumps(rows[0], allow_nan=False))
    assert "FD" not in row and "FID" not in row
    assert row["FD_proxy"] == pytest.approx(rows[1]["FD_proxy"], rel=1e-4) and row["FD_proxy"] > 0
    assert row["seeds"] == [0, 19] and row["passes_per_image"] == 4 and row["protocol"]["name"] == "fashion-10k"
    assert len(row["weights_sha256"]) == len(row["extractor_sha256"]) == len(row["reference_sha256"]) == 64


def test_evaluate_refuses_before_sampling(export, assets, tmp_path):
    with pytest.raises(ValueError, match="did you mean --protocol fashion-10k"):
        evaluate(export, "fashion-1k", steps=1, guidance=1.0)
    with pytest.raises(ValueError, match="--count 10001"):
        evaluate(export, "fashion-10k", steps=1, guidance=1.0, count=10_001)
    with pytest.raises(ValueError, match="not the classifier of fashion-10k"):
        evaluate(export, "fashion-10k", steps=1, guidance=1.0, **{**assets, "classifier": assets["reference"]})
    gaussian(torch.zeros(3), torch.eye(3)).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="3 dimensions"):
        evaluate(export, "fashion-10k", steps=1, guidance=1.0, **{**assets, "reference": tmp_path / "m.safetensors"})


def test_protocol_names():
    assert protocol_of("fashion-10k").metric == "FD"
    with pytest.raises(ValueError, match=r"allowed are digits-1797, digits-5k, fashion-10k$"):
        protocol_of("zzz")


# FID through clean-fid


class StandIn(nn.Module):
    """As clean-fid calls it: `layers` takes (B, 3, 299, 299) in [-1, 1]; 2048 features, three of them not constant.

    `forward`, which clean-fid calls in legacy_tensorflow mode, is one off to tell the modes apart.
    """

    class Layers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.mean(dim=[2, 3]), torch.zeros(x.shape[0], 2045)], 1)

    def __init__(self):
        super().__init__()
        self.layers = StandIn.Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers((x - 128) / 128) + 1.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "stand-in.pt"
    torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(np.full((16, 20, 3), rng.integers(256, size=3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_fid_from_folders_tensors_and_statistics(weights, real, tmp_path):
    pixels = [np.array(Image.open(file))[0, 0] for file in sorted(real.iterdir())]
    features = np.zeros((6, 2048))
    features[:, :3] = (np.array(pixels) - 128.0) / 128
    np.savez(tmp_path / "r.npz", mu=features.mean(0) + np.eye(2048)[0] * 2, sigma=np.cov(features, rowvar=False))
    with pytest.warns(UserWarning, match="6 images is biased"):
        row = fid(real, tmp_path / "r.npz", weights=weights)
        assert "FID" not in row  # not the real network
        assert row["FD"] == pytest.approx(4, abs=1e-4) and row["count"] == 6 and row["reference_count"] is None
    # one call of the network for all images, or batches of another size, from tensors or from files
    network = load_inception(weights, "clean", "cpu")
    batches = (torch.from_numpy(np.array(pixels)).view(6, 3, 1, 1).expand(-1, -1, 8, 8) / 255).split(4)
    moments = inception_moments(iter(batches), network, "clean", batch_size=5)
    assert moments.count == 6
    np.testing.assert_allclose(moments.mean.numpy(), features.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features, rowvar=False), atol=1e-6)
    legacy = inception_moments(real, load_inception(weights, "legacy_tensorflow", "cpu"), "legacy_tensorflow")
    np.testing.assert_allclose(legacy.mean.numpy(), features.mean(0) + 1, atol=1e-6)


def test_clean_fid_without_weights_says_what_to_put_where(real, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=f"no network.*put it at {tmp_path}/checkpoints/{FILE}"):
        fid(real, real)
    (tmp_path / "checkpoints" / FILE).write_bytes(b"half a download")
    with pytest.raises(ValueError, match="no network"):
        fid(real, real)


def test_bad_inputs_of_fid_are_refused(weights, real, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"no TorchScript")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2048))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(1))
    (tmp_path / "empty").mkdir()
    for reference, options, words in (
        (real, {"weights": tmp_path / "bad.pt"}, "not the Inception-v3"),
        (real, {"weights": tmp_path / "none.pt"}, "no file"),
        (real, {"weights": weights, "mode": "dirty"}, "--mode clean"),
        (tmp_path / "none", {"weights": weights}, "no reference"),
        (tmp_path / "bad.npz", {"weights": weights}, "not a statistics file"),
        (tmp_path / "pickled.npz", {"weights": weights}, "not a statistics file"),
        (tmp_path / "empty", {"weights": weights}, "no images"),
    ):
        with pytest.raises(ValueError, match=words):
            fid(real, reference, **options)


# The script


def test_script_appends_one_line_a_run(script, export, weights, real, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    output.write_text('{"old": 1}\n')
    argv = [str(export), "--reference", str(real), "--weights", str(weights), "--count", "4", "--device", "cpu"]
    with pytest.warns(UserWarning):
        assert script.main([*argv, "--output", str(output)]) == 0
    old, row = map(json.loads, output.read_text().splitlines())
    assert old == {"old": 1} and row["classes"] == 10 and row["count"] == 4 and row["FD_proxy"] > 0
    assert "FD" in capsys.readouterr().out


def test_script_finds_a_bad_output_before_the_work(script, export, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *args, **kwargs: pytest.fail("the work began"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "read-only")  # root may write anywhere
    (tmp_path / "read-only").mkdir()
    for output in (tmp_path / "none" / "rows.jsonl", tmp_path, tmp_path / "read-only" / "rows.jsonl"):
        assert script.main([str(export), "--output", str(output)]) == 2
        assert f"--output {output}" in capsys.readouterr().err


def test_script_ends_with_2_and_one_line(script, export, tmp_path, capsys):
    for argv in (
        [str(export), "--protocol", "fashion-10"],
        [str(export), "--device", "abacus"],
        [str(export), "--reference", str(tmp_path), "--protocol", "fashion-10k"],
        [str(tmp_path / "none"), "--reference", str(tmp_path)],
    ):
        assert script.main(["--output", str(tmp_path / "rows.jsonl"), *argv]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    with pytest.raises(SystemExit) as exit_:
        script.main([str(export), "--steps", "many"])
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
