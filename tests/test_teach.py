"""`onestep.teach`: the digits teacher trained from nothing, resumable; data looked for where it may be."""

import gzip
import struct

import numpy as np
import pytest
import torch

from onestep.rng import Rng
from onestep.teach import digits, fashion_mnist
from onestep.teach.fit import fit
from onestep.teach.sheet import save_sheet
from onestep.teacher import EDMTeacher, Facts


def test_digits_is_trained_in_a_test(tmp_path):
    """300 steps bring the samples' mean picture of each class near the real one: nothing learned would be far off."""
    from diffusers import DiffusionPipeline

    digits.teach(digits.DigitsConfig(steps=300, batch_size=64), None, tmp_path / "work", tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "digits")
    teacher = EDMTeacher(pipeline, Facts(source=""))
    images, labels = digits.load_digits()
    real = images.float() / 127.5 - 1
    wanted = torch.arange(200) % 10
    z = Rng(0, 0, 200).normal(teacher.shape)
    samples = teacher.sample(z, *teacher.encode(wanted), 1.0, 12)
    means = torch.stack([real[labels == k].mean(0) for k in range(10)])
    made = torch.stack([samples[wanted == k].mean(0) for k in range(10)])
    nearest = torch.cdist(made.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).sum() >= 8


def test_fit_goes_on_where_it_stopped(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 3)

    def loss(network, rng):
        return network(rng.normal((3,))).square().mean()

    options = {"batch_size": 4, "lr": 1e-2, "save_every": 3}
    whole = fit(make(), loss, tmp_path / "a", steps=6, **options)

    def stops(network, rng):
        stops.calls += 1
        if stops.calls == 5:
            raise KeyboardInterrupt
        return loss(network, rng)

    stops.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(make(), stops, tmp_path / "b", steps=6, **options)
    again = fit(make(), loss, tmp_path / "b", steps=6, **options)
    assert torch.equal(whole.weight, again.weight)


def test_fashion_mnist_is_read_from_its_own_files(tmp_path):
    pictures = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    header = struct.pack(">4i", 2051, 2, 28, 28)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2i", 2049, 2) + bytes([3, 9])))
    images, labels = fashion_mnist.load(str(tmp_path), "test")
    assert labels.tolist() == [3, 9]
    assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), pictures) and images[:, :, :2].sum() == 0
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        fashion_mnist.load(str(tmp_path), "train")


def test_sheet_round_trip(tmp_path, monkeypatch):
    from onestep import data
    from onestep.data import images as embedded

    images = torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_sheet(tmp_path / "digits_data", images, torch.arange(7), tile=8)
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    read, labels = data.load_images("digits", 1, 8)
    assert torch.equal(((read + 1) * 127.5).round().to(torch.uint8), images) and labels.tolist() == list(range(7))
