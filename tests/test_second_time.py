"""A second time as a network's input: nothing at first, each sample's own, a bias once it is fixed, and kept in files."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from background import TINY
from safetensors.torch import load_file
from test_methods import FAMILIES, teacher_of
from tiny_edm import TINY as EDM_NETWORKS
from tiny_edm import labels_of, normal, tiny
from torch import Tensor, nn

from onestep import checkpointing
from onestep.checkpoint import load_checkpoint, save_checkpoint
from onestep.denoiser import Denoiser, body, follow
from onestep.exporting import stored_network
from onestep.run import start_from
from onestep.second_time import FEATURES, KEY, WEIGHT, TimedLinear, add_second_time, folded, layers, timed
from onestep.teacher import Copies, Teacher
from onestep.train import main

SECONDS = (0.0, 0.4, 1.0)


def student(teacher: Teacher, scale: float = 0.0) -> Denoiser:
    """A copy of the teacher with a second time, whose new weights are N(0, scale^2)."""
    denoiser = teacher.copy("student")
    add_second_time(denoiser.network)
    denoiser.call = timed(denoiser.call)
    source = torch.Generator().manual_seed(3)
    for layer in layers(denoiser.network):
        noise = torch.randn(layer.second_weight.shape, generator=source)
        layer.second_weight.data += scale * noise.to(layer.second_weight)
    return denoiser


def inputs(teacher: Teacher, size: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    source = torch.Generator().manual_seed(4)
    x_t = torch.randn(size, *teacher.shape, generator=source)
    t = teacher.denoiser.schedule.at(torch.linspace(0.3, 0.9, size))
    return x_t, t, teacher.encode(torch.arange(size) % 3)[0]


def told(cond: dict[str, Tensor], *seconds: float) -> dict[str, Tensor]:
    return cond | {KEY: torch.tensor(seconds)}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_starts_as_it_was_and_folds_to_what_it_is_at_one_second_time(family):
    teacher = teacher_of(family)
    x_t, t, cond = inputs(teacher)
    before = teacher.denoiser(x_t, t, cond)
    fresh = student(teacher)
    for second in (cond, told(cond, *SECONDS)):
        torch.testing.assert_close(fresh(x_t, t, second), before, atol=1e-6, rtol=1e-5)
    network = body(fresh.network)
    assert layers(network) and all(not layer.second_weight.any() for layer in layers(network))

    denoiser = student(teacher, scale=0.1)
    assert float((denoiser(x_t, t, told(cond, *SECONDS)) - before).abs().amax(dim=(1, 2, 3)).min()) > 1e-4
    apart = {second: denoiser(x_t, t, told(cond, *[second] * 3)) for second in SECONDS}
    for row, second in enumerate(SECONDS):  # each sample has its own
        mixed = denoiser(x_t, t, told(cond, *SECONDS))
        torch.testing.assert_close(mixed[row], apart[second][row], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(denoiser(x_t, t, cond), apart[0.0])
    for second in SECONDS:
        plain = folded(denoiser.network, second)
        assert type(plain) is type(teacher.denoiser.network) and not layers(plain)
        assert plain.state_dict().keys() == teacher.denoiser.network.state_dict().keys()
        of_plain = Denoiser(plain, denoiser.schedule, denoiser.prediction, teacher.call)
        scale = float(apart[second].abs().max())
        torch.testing.assert_close(of_plain(x_t, t, cond) / scale, apart[second] / scale, atol=1e-6, rtol=0)
    assert layers(denoiser.network)  # and is not changed by it
    assert float((apart[0.0] - apart[1.0]).abs().max()) > 1e-4  # so that the wrong fold would be seen


@pytest.mark.parametrize("name", EDM_NETWORKS)
def test_the_networks_of_edm(name):
    network = tiny(name).double()
    side = network.config.sample_size
    x, timestep = normal(2, network.config.in_channels, side, side), torch.tensor([-0.3, 0.2])
    before = network(x, timestep, **labels_of(network, 0, 1))[0]
    twin = copy.deepcopy(network)
    add_second_time(twin)
    assert len(layers(twin)) == 1
    call = timed(lambda module, x, timestep, cond: module(x, timestep, **cond)[0])
    seconds = {KEY: torch.tensor([0.2, 0.9])}
    assert torch.equal(call(twin, x, timestep, labels_of(network, 0, 1) | seconds), before)
    with torch.no_grad():
        layers(twin)[0].second_weight.normal_(generator=torch.Generator().manual_seed(0))
    after = call(twin, x, timestep, labels_of(network, 0, 1))
    assert float((after - before).detach().abs().max()) > 1e-3
    torch.testing.assert_close(folded(twin)(x, timestep, **labels_of(network, 0, 1))[0], after, atol=1e-6, rtol=1e-5)


def test_the_new_term_is_a_linear_map_of_64_sines_and_cosines():
    linear = nn.Linear(3, 2, bias=False).double()
    network = nn.ModuleDict({"map_layer0": linear})
    add_second_time(network)
    (layer,) = layers(network)
    assert isinstance(layer, TimedLinear) and layer.second_weight.shape == (2, FEATURES)
    with torch.no_grad():
        layer.second_weight.normal_(generator=torch.Generator().manual_seed(0))
    x, s = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.25, 0.5])
    layer.holder.value = s
    rates = 10000 ** (-torch.arange(32) / 31)
    angles = (1000 * s[:, None] * rates).double()
    features = torch.cat([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(layer(x), x @ linear.weight.T + features @ layer.second_weight.T, atol=1e-3, rtol=1e-4)


def test_another_batch_than_the_inputs_and_a_network_without_time_are_noticed():
    teacher = teacher_of("dit")
    x_t, t, cond = inputs(teacher)
    with pytest.raises(AssertionError, match="another batch"):
        student(teacher)(x_t, t, told(cond, 0.1, 0.2))
    with pytest.raises(ValueError, match="a Linear has no time embedding that can take a second time"):
        add_second_time(nn.Linear(2, 2))
    assert folded(teacher.denoiser.network) is teacher.denoiser.network


def test_a_copy_has_a_second_time_of_its_own(tmp_path):
    """A moving average and a checkpoint hold the new weights, and a pass of one copy leaves the other's as it is."""
    teacher = teacher_of("dit")
    x_t, t, cond = inputs(teacher)
    denoiser = student(teacher, scale=0.1)
    twin = copy.deepcopy(denoiser.network)
    of_twin = Denoiser(twin, denoiser.schedule, denoiser.prediction, denoiser.call)
    denoiser(x_t, t, told(cond, *SECONDS))
    assert len({id(layer.holder) for layer in layers(twin)}) == 1
    assert layers(twin)[0].holder is not layers(denoiser.network)[0].holder and layers(twin)[0].holder.value is None
    assert torch.equal(of_twin(x_t, t, told(cond, *SECONDS)), denoiser(x_t, t, told(cond, *SECONDS)))

    loss = denoiser(x_t, t, told(cond, *SECONDS)).square().mean()
    loss.backward()
    assert all(bool(layer.second_weight.grad.any()) for layer in layers(denoiser.network))
    with torch.no_grad():
        for layer in layers(denoiser.network):
            layer.second_weight += 1
    follow(twin, denoiser.network, 0.75)
    for ours, theirs in zip(layers(twin), layers(denoiser.network)):
        torch.testing.assert_close(ours.second_weight, theirs.second_weight - 0.75)

    save_checkpoint(tmp_path, 1, {"average": twin}, {}, keep=1)
    fresh = student(teacher).network
    load_checkpoint(tmp_path / "step-00000001", {"average": fresh}, {})
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), twin.parameters()))
    assert not layers(stored_network(twin, torch.float32))


def gradients(between: bool, recomputed: bool) -> list[Tensor]:
    """Of a student's pass at SECONDS; `between`: another pass of its network comes before the backward."""
    teacher = teacher_of("dit")
    denoiser = student(teacher, scale=0.1)
    if recomputed:
        checkpointing.enable(denoiser.network)
    x_t, t, cond = inputs(teacher)
    loss = denoiser(x_t, t, told(cond, *SECONDS)).square().mean()
    if between:
        with torch.no_grad():
            denoiser(x_t, t, told(cond, 0.9, 0.1, 0.6))
    loss.backward()
    return [p.grad for p in denoiser.network.parameters() if p.grad is not None]


def test_recomputed_activations_see_the_last_second_time():
    """What `timed` says of gradient checkpointing: right where no pass comes between, and wrong where one does."""
    known = gradients(between=False, recomputed=False)
    for got, expected in zip(gradients(between=False, recomputed=True), known):
        torch.testing.assert_close(got, expected)
    assert any(not torch.allclose(got, each) for got, each in zip(gradients(between=True, recomputed=True), known))


# --- runs


@pytest.fixture(scope="module")
def run(tiny_teacher: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What every run here is given, and the folder of one of four steps with a second time."""
    folder = tmp_path_factory.mktemp("second") / "run"
    argv = ["--teacher", str(tiny_teacher), "--data", str(tiny_images), *TINY[:-2], "--no-evaluate"]  # but for --ratio
    method = ["--method", "hyper-sd", "--levels", "8", "--segments", "2,1", "--segment-steps", "2", "--segment-gan", "0"]
    given = [*argv, *method, "--iterations", "4", "--checkpoint-every", "2", "--warmup", "0", "--lr", "1e-2", "--ema", "0"]
    assert main([*given, "--output", str(folder)]) == 0
    return argv, folder


def test_a_runs_export_has_no_second_time_and_its_pictures(run: tuple[list[str], Path], tiny_teacher: Path) -> None:
    """The export compares its pictures with the student's, whose new weights have learnt."""
    _, folder = run
    average = load_file(folder / "checkpoints/step-00000004/average.safetensors")
    (new,) = (key for key in average if key.endswith(WEIGHT))
    assert bool(average[new].any())
    target = load_file(folder / "checkpoints/step-00000004/target.safetensors")  # of the loss, for a resumed run
    assert target.keys() == average.keys() and not torch.equal(target[new], average[new])
    exported = load_file(folder / "export/unet/diffusion_pytorch_model.safetensors")
    assert exported.keys() == load_file(tiny_teacher / "unet/diffusion_pytorch_model.safetensors").keys()
    bias = new.replace(WEIGHT, "bias")
    zero = torch.cat([torch.zeros(32), torch.ones(32)])
    torch.testing.assert_close(exported[bias], average[bias] + average[new] @ zero)
    assert not torch.equal(exported[bias], average[bias])


def test_weights_with_and_without_it_are_a_start(run: tuple[list[str], Path], tiny_teacher: Path, tmp_path: Path) -> None:
    """--init with a teacher's folder or an export, whose new weights are zero, and with a run, whose are its own."""
    argv, folder = run
    average = load_file(folder / "checkpoints/step-00000004/average.safetensors")
    network: Any = student(teacher_of("edm")).network
    for source in (tiny_teacher, folder / "export"):
        start_from(source, network, "unet")
        assert not any(layer.second_weight.any() for layer in layers(network))
        stored = load_file(source / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(network.state_dict()[key], value) for key, value in stored.items())
    start_from(folder, network, "unet")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in average.items())
    second = ["--method", "hyper-sd-score", "--levels", "8", "--anchor-steps", "2", "--iterations", "1", "--warmup", "0"]
    assert main([*argv, *second, "--init", str(folder), "--output", str(tmp_path / "score")]) == 0


def test_a_network_without_it_is_sent_to_the_export(run: tuple[list[str], Path]) -> None:
    _, folder = run
    plain = teacher_of("edm").copy("student").network
    with pytest.raises(
        ValueError, match=rf"do not fit the teacher's unet: .* Type --init {folder / 'export'}, which has not"
    ):
        start_from(folder, plain, "unet")
    start_from(folder / "export", plain, "unet")


def test_other_networks_are_sent_elsewhere(run: tuple[list[str], Path], tmp_path: Path) -> None:
    """A run whose export would not do either, one of guidance adapters, and a whole network for an adapter."""
    _, folder = run
    teacher = teacher_of("edm")
    other = copy.deepcopy(teacher.copy("student").network)
    other.class_embedding = None
    with pytest.raises(ValueError, match=r"Type another --init$"):
        start_from(folder, other, "unet")
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "export/guidance_adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"Type --teacher {tmp_path / 'export'}, which is guided"):
        start_from(tmp_path, other, "unet")
    teacher.copies = Copies(frozenset({"student"}), 4)
    with pytest.raises(ValueError, match="this student is adapters on the teacher's own: type --init"):
        start_from(folder / "export", teacher.copy("student").network, "unet")
