"""Adapters: exact arithmetic, one shared base that stays the teacher, gradient checkpointing, and files for others."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_text
import torch
from peft.tuners.lora import LoraLayer
from tiny import dit_pipeline, edm_pipeline, randomise
from torch import Tensor, nn
from torch.func import functional_call

from onestep import checkpointing
from onestep.checkpoint import load_checkpoint, save_checkpoint
from onestep.denoiser import Denoiser, Stop, frozen
from onestep.lora import Adapter, active, active_name, default_targets, merge, names, plain, save_lora, unused
from onestep.prediction import PREDICTIONS
from onestep.schedule import VP

DOUBLE = torch.float64


def sd_unet(linear: bool, cross: int = 16, **options: Any) -> Any:
    """A UNet of Stable Diffusion's kind, all of its kinds of layers in it; `linear` as in XL, else 1x1 convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=cross,
            use_linear_projection=linear,
            **options,
        )
    randomise(unet, seed=1)
    return unet.eval().requires_grad_(False)


def xl_unet() -> Any:
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 4 * 6 + 8}
    return sd_unet(True, addition_embed_type="text_time", **sizes)


def dit(dtype: torch.dtype = DOUBLE) -> Any:
    return dit_pipeline().transformer.to(dtype).requires_grad_(False)


def arguments(network: Any, dtype: torch.dtype = DOUBLE, size: int = 2) -> dict[str, Any]:
    """Arguments of a call of one of these networks, by its own names."""
    source = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=DOUBLE).to(dtype)

    sample = {"timestep": torch.tensor([10, 700, 300])[:size], "return_dict": False}
    if isinstance(network, diffusers.DiTTransformer2DModel):
        return sample | {"hidden_states": normal(size, 4, 8, 8), "class_labels": torch.arange(size)}
    sample |= {"sample": normal(size, 4, 8, 8), "encoder_hidden_states": normal(size, 3, 16)}
    if network.config.addition_embed_type is not None:
        sample["added_cond_kwargs"] = {"text_embeds": normal(size, 8), "time_ids": normal(size, 6)}
    return sample


def trained(base: nn.Module, name: str, seed: int = 0, **options: Any) -> Adapter:
    """An adapter with no zeros left."""
    adapter = Adapter(base, name, **{"rank": 3, "alpha": 1.5, "seed": seed} | options)
    randomise(adapter, seed=10 + seed, scale=0.2)
    return adapter


def output(network: nn.Module, given: dict[str, Any]) -> Tensor:
    return network(**given)[0]


def explicit(adapter: Adapter, original: nn.Module, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters W + alpha / rank B A of a network that never met peft, by its own names."""
    weights = dict(original.named_parameters())
    for layer in adapter.targets:
        a, b = factors[f"{layer}.lora_A"], factors[f"{layer}.lora_B"]
        product = (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + adapter.alpha / adapter.rank * product
    return weights


NETWORKS: list[Callable[[], Any]] = [dit, lambda: xl_unet().to(DOUBLE), lambda: sd_unet(False).to(DOUBLE)]


@pytest.fixture(params=NETWORKS, ids=["dit", "xl", "sd"])
def base(request: pytest.FixtureRequest) -> Any:
    return request.param()


# --- arithmetic


def test_without_b_it_is_the_base_bit_by_bit(base):
    given = arguments(base)
    before = output(base, given)
    assert torch.equal(output(Adapter(base, "student", 3), given), before)
    assert not torch.equal(output(trained(base, "critic"), given), before)


def test_output_and_gradients_are_those_of_the_explicit_product(base):
    original, given = copy.deepcopy(base), arguments(base)
    adapter = trained(base, "student")
    factors = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    expected = functional_call(original, explicit(adapter, original, factors), kwargs=given)[0]
    found = output(adapter, given)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert (found - output(base, given)).abs().max() > 1e-2
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    (expected * probe).sum().backward()
    (found * probe).sum().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, factors[name].grad, atol=1e-10, rtol=1e-10)
        assert parameter.grad.abs().max() > 1e-8, name
    assert all(p.grad is None for p in original.parameters())


def test_only_a_and_b_are_registered_under_readable_names():
    base = xl_unet().bfloat16()
    adapter, other = (Adapter(base, name, 3, "to_q,conv1", seed=s) for s, name in enumerate(("student", "critic")))
    assert list(adapter.state_dict()) == list(other.state_dict()) == [name for name, _ in adapter.named_parameters()]
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A" in adapter.state_dict()
    assert "mid_block.resnets.1.conv1.lora_B" in adapter.state_dict()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}  # not the base's
    assert {p.dtype for p in base.parameters() if not any(p is q for q in (*adapter.parameters(), *other.parameters()))} == {
        torch.bfloat16
    }
    first = adapter.state_dict()["mid_block.resnets.1.conv1.lora_A"]
    assert first.shape == (3, 16, 3, 3) and first.abs().max() <= 1 / 12 and first.abs().max() > 0.9 / 12
    assert not torch.equal(first, other.state_dict()["mid_block.resnets.1.conv1.lora_A"])
    assert "student: rank 3 in" in repr(adapter)


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = Adapter(dit(torch.bfloat16), "a", 2, seed=7).state_dict()
    state = torch.get_rng_state()
    second = Adapter(dit(torch.float32), "b", 2, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base(dtype, autocast):
    """A denoiser computes in float32 on a base stored in half; under autocast both run in half. Gradients are float32."""
    base = dit(dtype)
    adapter = trained(base, "student")
    denoiser = Denoiser(adapter, VP.from_betas(torch.linspace(1e-4, 2e-2, 1000)), PREDICTIONS["epsilon"])
    assert denoiser.dtype == torch.float32
    given = arguments(base, torch.float32)
    x, t = given["hidden_states"], given["timestep"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_0 = denoiser(x, t, {"class_labels": given["class_labels"]})
    assert x_0.dtype == torch.float32
    x_0.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    exact = Denoiser(merge(adapter, DOUBLE), denoiser.schedule, denoiser.prediction)
    error = (exact(x.double(), t, {"class_labels": given["class_labels"]}) - x_0).abs().max()
    assert error < (0.2 if autocast else 1e-4)


# --- one base, many networks


def test_the_base_is_the_plain_teacher_bit_by_bit(base):
    given = arguments(base)
    before = output(base, given)
    adapters = [trained(base, name, seed) for seed, name in enumerate(("student", "critic"))]
    alone = [output(adapter, given) for adapter in adapters]
    for adapter, expected in zip(adapters, alone):
        assert torch.equal(output(base, given), before)
        assert torch.equal(output(adapter, given), expected)
    assert torch.equal(output(base, given), before)
    assert not torch.equal(*alone)
    with torch.no_grad():
        for parameter in adapters[0].parameters():
            parameter.mul_(2)
    assert torch.equal(output(adapters[1], given), alone[1]) and not torch.equal(output(adapters[0], given), alone[0])


def test_active_nests_and_survives_exceptions():
    base = dit()
    given = arguments(base)
    before, student, critic = output(base, given), trained(base, "student"), trained(base, "critic", 1)
    outputs = {None: before, "student": output(student, given), "critic": output(critic, given)}

    def check(name: str | None) -> None:
        assert active_name(base) == name and torch.equal(output(base, given), outputs[name])

    switch = active(base, "student")
    with switch:
        with active(base, None), switch, active(base, "critic"):
            check("critic")
            trained(base, "latecomer", 2)
            check("critic")
        check("student")
        assert torch.equal(output(critic, given), outputs["critic"])
        check("student")
    check(None)
    with pytest.raises(RuntimeError), active(base, "student"):
        student(hidden_states=torch.zeros(1, 5, 8, 8, dtype=DOUBLE), timestep=1, class_labels=torch.zeros(1).long())
    check(None)


def test_a_further_adapter_changes_nothing_of_the_others():
    base = dit()
    student = trained(base, "student")
    wanted = [bool(index % 2) for index, _ in enumerate(student.parameters())]
    for parameter, value in zip(student.parameters(), wanted):
        parameter.requires_grad_(value)
    kept = [p.detach().clone() for p in student.parameters()]
    Adapter(base, "critic", 2, "to_q")
    assert [p.requires_grad for p in student.parameters()] == wanted
    assert all(torch.equal(p, k) for p, k in zip(student.parameters(), kept))
    assert not any(module.training for module in base.modules())
    student.train()
    assert not any(module.training for module in base.modules())


def test_frozen_freezes_one_adapter():
    base = dit()
    student, critic = trained(base, "student"), trained(base, "critic", 1)
    given = arguments(base)
    with frozen(critic):
        x = output(student, given)
        output(critic, given | {"hidden_states": x}).square().sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())


def test_two_steps_of_adamw_change_the_adapter_alone():
    base = dit()
    student, critic = trained(base, "student"), trained(base, "critic", 1)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    for _ in range(2):
        output(student, arguments(base)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in base.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".student." in name}
    assert len(changed) == len(list(student.parameters())) == len(list(critic.parameters()))
    assert all(p.grad is None for p in base.parameters())


def test_deepcopy_is_another_adapter_of_the_same_base():
    base = dit()
    student = trained(base, "student")
    given, expected = arguments(base), output(student, arguments(base))
    average = copy.deepcopy(student).requires_grad_(False)
    assert average.base is base and names(base) == ["student", "student_2"]
    assert torch.equal(output(average, given), expected) and not output(average, given).requires_grad
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in copy.deepcopy(average).parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    live = [p.detach().clone() for p in student.parameters()]
    assert torch.equal(output(average, given), expected)
    torch._foreach_lerp_([p.detach() for p in average.parameters()], live, 1.0)  # the trainer's average
    assert torch.equal(output(average, given), output(student, given)) and not torch.equal(output(student, given), expected)
    assert unused(base, "student") == "student_3" and unused(base, "critic") == "critic"
    nested = copy.deepcopy(nn.ModuleDict({"a": student, "b": student}))
    assert nested["a"] is nested["b"] and nested["a"].base is base


def test_a_deepcopy_of_the_base_has_its_own_switch():
    base = dit()
    student = trained(base, "student")
    given, expected = arguments(base), output(student, arguments(base))
    with active(base, "student"):
        twin = copy.deepcopy(base)
    assert active_name(twin) is None and torch.equal(output(twin, given), output(base, given))
    with active(twin, "student"):
        assert torch.equal(output(twin, given), expected) and active_name(base) is None


def test_checkpoint_round_trip(tmp_path):
    base = dit()
    student = trained(base, "student")
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    output(student, arguments(base)).square().sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 3, {"generator-0": student}, {"generator": optimizer}, keep=1)
    other = Adapter(dit(), "another_name", 3, alpha=1.5, seed=5)
    fresh = torch.optim.AdamW(other.parameters(), 1e-2)
    assert load_checkpoint(tmp_path / "step-00000003", {"generator-0": other}, {"generator": fresh}) == 3
    assert torch.equal(output(other, arguments(base)), output(student, arguments(base)))
    smaller = Adapter(dit(), "student", 2)
    with pytest.raises(ValueError, match="size mismatch"):
        load_checkpoint(tmp_path / "step-00000003", {"generator-0": smaller}, {})


def test_distributed_wrapper(tmp_path):
    base = dit()
    given = arguments(base)
    student = trained(base, "student")
    output(student, given).square().sum().backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        denoiser = Denoiser(wrapped, VP.from_betas(torch.linspace(1e-4, 2e-2, 1000, dtype=DOUBLE)), PREDICTIONS["epsilon"])
        assert denoiser.dtype == DOUBLE
        output(wrapped, given).square().sum().backward()
        for parameter, gradient in zip(student.parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


# --- gradient checkpointing


@contextlib.contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Number of calls of these modules so far."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_pre_hook(count))
        yield calls


def twice(cond: dict[str, Any]) -> dict[str, Any]:
    return {key: twice(value) if isinstance(value, dict) else torch.cat([value, value]) for key, value in cond.items()}


def distil(base: Any, tap: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a generator's loss through teacher, critic and critic's features, and of the critic's own loss."""
    schedule = VP.from_betas(torch.linspace(1e-4, 2e-2, 1000, dtype=DOUBLE))
    networks = (base, trained(base, "student"), trained(base, "critic", 1))
    teacher, student, critic = (Denoiser(n, schedule, PREDICTIONS["epsilon"], taps=[tap]) for n in networks)
    given = arguments(base)
    z, t = given.pop("sample", given.get("hidden_states")), given.pop("timestep")
    cond = {key: value for key, value in given.items() if key not in ("hidden_states", "return_dict")}
    with frozen(critic):
        x = student(z, t, cond)
        features = critic.features(x, t, cond)[0]
        loss = critic(x, t, cond).square().mean() + (teacher(x, t, cond) * x).mean() + features.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()  # a block may be recomputed more than once
    by_generator = [p.grad for p in student.parameters()]
    both = torch.cat([x.detach(), z])
    doubled, times = twice(cond), torch.cat([t, t])
    (critic(both, times, doubled).square().mean() + critic.features(both, times, doubled)[0].square().mean()).backward()
    assert active_name(base) is None
    return by_generator, [p.grad for p in critic.parameters()]


TAPS = {diffusers.DiTTransformer2DModel: "transformer_blocks.1", diffusers.UNet2DConditionModel: "mid_block"}


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass(base):
    tap, twin = TAPS[type(base)], copy.deepcopy(base)
    expected = distil(base, tap)
    checkpointing.enable(twin)
    found = distil(twin, tap)
    for gradients, exact in zip(found, expected):
        assert any(gradient is not None for gradient in gradients)
        for gradient, right in zip(gradients, exact):
            torch.testing.assert_close(gradient, right, atol=1e-12, rtol=1e-10)


def test_checkpointing_recomputes_only_what_has_gradients():
    base = dit()
    student = trained(base, "student")
    given = arguments(base)
    checkpointing.enable(student)  # it means the base, which is shared
    with counted(list(base.transformer_blocks)) as calls:
        with torch.no_grad():
            output(student, given)
        assert calls == [2]
        loss = output(student, given).square().sum()
        assert calls == [4]
        loss.backward()
        assert calls == [6]


def test_checkpointing_survives_the_early_end_of_features():
    """The tapped block lies in a checkpoint: after it nothing of the checkpoint is left, not even its packing of tensors."""
    base = dit()
    checkpointing.enable(base)
    student = trained(base, "student")
    schedule = VP.from_betas(torch.linspace(1e-4, 2e-2, 1000, dtype=DOUBLE))
    denoiser = Denoiser(student, schedule, PREDICTIONS["epsilon"], taps=["transformer_blocks.0"])
    given = arguments(base)
    with counted(list(base.transformer_blocks)) as calls:
        (feature,) = denoiser.features(given["hidden_states"], given["timestep"], {"class_labels": given["class_labels"]})
        assert calls == [1]
        x = torch.ones(2, requires_grad=True)
        y = x.exp()
        assert torch.equal(y.grad_fn._saved_result, y)
        feature.sum().backward()
        assert calls == [2]
    gradients = {name: p.grad is not None for name, p in student.named_parameters()}
    assert gradients == {name: ".0." in name[: len("transformer_blocks.0.")] for name in gradients}


def test_checkpointing_is_tidy_while_the_early_end_is_still_handled():
    """Whoever keeps the exception keeps its frames, but not the packing of tensors that a checkpoint does in them."""
    base = dit()
    checkpointing.enable(base)
    student = trained(base, "student")

    def stop(*_: Any) -> None:
        raise Stop

    hook = base.transformer_blocks[0].register_forward_hook(stop)
    with pytest.raises(Stop) as kept:
        output(student, arguments(base))
    hook.remove()
    y = torch.ones(2, requires_grad=True).exp()
    assert torch.equal(y.grad_fn._saved_result, y) and kept.value is not None


def test_checkpointing_of_a_copied_base_means_the_copy():
    base = dit()
    checkpointing.enable(base)
    student = trained(base, "student")
    twin = copy.deepcopy(base)
    given = arguments(base)
    with active(twin, "student"):
        loss = output(twin, given).square().sum()
    loss.backward()
    output(student, given).square().sum().backward()
    for name, parameter in twin.named_parameters():
        if ".student." in name:
            torch.testing.assert_close(parameter.grad, base.get_parameter(name).grad, atol=1e-12, rtol=1e-10)


def test_checkpointing_needs_a_network_that_can():
    with pytest.raises(ValueError, match="Linear has no gradient checkpointing"):
        checkpointing.enable(nn.Linear(1, 1))


# --- choosing layers


def test_default_targets_are_those_of_lcm_lora():
    assert set(default_targets(xl_unet())) == {
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    }
    assert set(default_targets(dit())) == {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"}
    unet = edm_pipeline().unet
    assert "conv1" in default_targets(unet) and "to_q" in default_targets(unet)
    with pytest.raises(ValueError, match="no layer of a Sequential is adapted by default; name some, for example 0"):
        default_targets(nn.Sequential(nn.Linear(2, 2)))


def test_sdxl_has_the_parameters_of_the_published_lcm_lora():
    """Its file of half-precision numbers at rank 64 has 394 MB: 197 million of them."""
    xl = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        adapter = Adapter(diffusers.UNet2DConditionModel(**xl), "student", 64)
    count = sum(p.numel() for p in adapter.parameters())
    assert (len(adapter.targets), round(count / 1e6)) == (788, 197)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": "to_q,to_kk"}, "is called 'to_kk'; near are to_k"),
        ({"targets": "transformer_blocks"}, "is called 'transformer_blocks'; near are"),
        ({"targets": ""}, "is called ''; near are"),
        ({"rank": 0}, "rank 0 is no rank"),
        ({"name": "student"}, "cannot be called 'student'"),
        ({"name": "a.b"}, "cannot be called 'a.b'"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    base = dit()
    Adapter(base, "student", 2)
    with pytest.raises(ValueError, match=message):
        Adapter(base, **{"name": "critic", "rank": 2} | options)
    assert names(base) == ["student"]


def test_targets_are_ends_of_names():
    base = dit()
    adapter = Adapter(base, "student", 2, " attn1.to_q, transformer_blocks.1.ff.net.2")
    assert adapter.targets == (
        *("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"),
        "transformer_blocks.1.ff.net.2",
    )


# --- for others


def test_merged_network_is_a_plain_one(base, tmp_path):
    keys, original, given = list(base.state_dict()), copy.deepcopy(base), arguments(base)
    student, other = trained(base, "student"), trained(base, "critic", 1, targets="to_q,to_out.0")
    for adapter in (student, other):
        merged: Any = merge(adapter, DOUBLE)
        assert type(merged) is type(base) and list(merged.state_dict()) == keys
        assert not any(isinstance(module, LoraLayer) for module in merged.modules())
        torch.testing.assert_close(output(merged, given), output(adapter, given), atol=1e-10, rtol=0)
        assert not {t.data_ptr() for t in merged.state_dict().values()} & {t.data_ptr() for t in base.state_dict().values()}
        assert not merged.training and vars(merged).keys() == vars(original).keys()
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path, torch_dtype=DOUBLE)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in merged.state_dict().items())
    assert torch.equal(output(base, given), output(original, given))
    without = plain(base, DOUBLE)
    assert list(without.state_dict()) == keys and torch.equal(output(without, given), output(base, given))
    randomise(without.requires_grad_(True), seed=2)
    assert torch.equal(output(base, given), output(original, given))


def test_merging_rounds_once():
    base = xl_unet().bfloat16()
    original = copy.deepcopy(base)
    adapter = trained(base, "student")
    weights = explicit(adapter, copy.deepcopy(original).float(), dict(adapter.named_parameters()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        merged = merge(adapter, dtype)
        assert {t.dtype for t in merged.state_dict().values()} == {dtype}
        apart = [not torch.equal(p, weights[name].to(dtype)) for name, p in merged.named_parameters()]
        if dtype == torch.float32:  # convolutions may add up in another order
            for name, parameter in merged.named_parameters():
                torch.testing.assert_close(parameter, weights[name], atol=1e-6, rtol=0)
        else:
            assert sum(apart) == 0


def stable_diffusion(unet: Any) -> Any:
    """A stock pipeline of this UNet, without the parts that a LoRA does not touch."""
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if unet.config.addition_embed_type is not None:
        absent |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        return diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **absent)
    absent |= dict.fromkeys(("safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **absent)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("make", [xl_unet, lambda: sd_unet(False)], ids=["xl", "sd"])
def test_stock_pipelines_load_the_file(make, format, tmp_path):
    """alpha / rank is 1/2; every adapted layer is found again, and no key is left over."""
    base, stock = make(), stable_diffusion(make())
    given = arguments(base, torch.float32)
    adapter = trained(base, "student")
    before = output(stock.unet, given)
    file = save_lora(adapter, tmp_path / "new", format)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pytorch_lora_weights.safetensors"]
    stock.load_lora_weights(tmp_path / "new")
    found = output(stock.unet, given)
    torch.testing.assert_close(found, output(adapter, given), atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-2
    adapted = {name for name, module in stock.unet.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(adapter.targets)
    assert file == tmp_path / "new" / "pytorch_lora_weights.safetensors"
    half = save_lora(adapter, tmp_path / "student.safetensors", format, torch.float16)
    assert half.is_file() and half.stat().st_size < 0.75 * file.stat().st_size


def transformer_arguments(pipeline: Any) -> dict[str, Any]:
    flux = isinstance(pipeline, diffusers.FluxPipeline)
    source = torch.Generator().manual_seed(5)
    shapes = {
        "hidden_states": (2, 16, 64) if flux else (2, 16, 8, 8),
        "encoder_hidden_states": (2, 5, 16 if flux else 32),
        "pooled_projections": (2, 16 if flux else 32),
    }
    given: dict[str, Any] = {key: torch.randn(*shape, generator=source) for key, shape in shapes.items()}
    if flux:
        given |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.ones(2)}
    return given | {"timestep": torch.tensor([0.2, 0.7]), "return_dict": False}


@pytest.mark.parametrize("make", [tiny_text.sd3, tiny_text.flux], ids=["sd3", "flux"])
def test_stock_transformers_load_the_file(make, tmp_path):
    stock = make()
    stock.transformer.requires_grad_(False)
    base, given = copy.deepcopy(stock.transformer), transformer_arguments(stock)
    adapter = trained(base, "student")
    before = output(stock.transformer, given)
    save_lora(adapter, tmp_path / "student.safetensors")
    stock.load_lora_weights(tmp_path / "student.safetensors")
    found = output(stock.transformer, given)
    torch.testing.assert_close(found, output(adapter, given), atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-2
    adapted = {name for name, module in stock.transformer.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(adapter.targets)
    assert "proj_out" in " ".join(adapted) and "add_k_proj" in " ".join(adapted)


def test_kohya_is_for_unets(tmp_path):
    adapter = trained(dit(), "student")
    with pytest.raises(ValueError, match="no LoRA of a DiTTransformer2DModel can be written as 'kohya'; allowed: diffusers"):
        save_lora(adapter, tmp_path, "kohya")
    with pytest.raises(ValueError, match="allowed: diffusers, kohya"):
        save_lora(trained(xl_unet(), "student"), tmp_path, "comfy")
    assert not list(Path(tmp_path).iterdir())
