"""Negative prompts without guidance: the attention by its formula, the pipeline beside the stock one, and by itself."""

import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny_text import PIPELINES
from torch import Tensor

FILE = Path(__file__).parent.parent / "pipelines" / "negative_prompt.py"
FAMILIES = ("sd15", "sdxl", "pixart-alpha", "pixart-sigma")
HEADS, WIDTH, TOKENS = 2, 4, 5

spec = util.spec_from_file_location("negative_prompt", FILE)
assert spec and spec.loader
nasa = util.module_from_spec(spec)
spec.loader.exec_module(nasa)


def attention() -> Attention:
    """Two heads of four channels, with every bias that it can have; the text's halves feed keys and values, one each."""
    torch.manual_seed(0)
    attn = Attention(query_dim=6, cross_attention_dim=8, heads=HEADS, dim_head=WIDTH, bias=True).double().eval()
    with torch.no_grad():
        attn.to_k.weight[:, 4:] = 0
        attn.to_v.weight[:, :4] = 0
        attn.to_v.bias.zero_()
    return attn


def inputs(seed: int = 1, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 7, 6), prompts and negative prompts (B, 5, 8)."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((batch, 7, 6), (batch, TOKENS, 8), (batch, TOKENS, 8))
    x, positive, negative = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return x, positive, negative


def steered(
    attn: Attention, x: Tensor, positive: Tensor, negative: Tensor, scale: Any, mask: Tensor | None = None
) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64).expand(len(x)).view(-1, 1, 1, 1)
    return nasa.SteeredAttention(scale)(attn, x, torch.cat([positive, negative], 1), mask)


@torch.no_grad()
def test_formula() -> None:
    """Written out head by head, with a mask: softmax over each prompt alone, heads joined, to_out once."""
    attn, (x, positive, negative) = attention(), inputs()
    kept = torch.ones(2, 1, 2 * TOKENS, dtype=torch.float64)
    kept[0, 0, 3:5] = kept[1, 0, 9] = 0
    rows = []
    for b in range(2):
        heads = []
        for h in range(HEADS):
            part = slice(h * WIDTH, (h + 1) * WIDTH)
            q = (x[b] @ attn.to_q.weight.T + attn.to_q.bias)[:, part]
            z = []
            for text, there in ((positive[b], kept[b, 0, :TOKENS]), (negative[b], kept[b, 0, TOKENS:])):
                k = (text @ attn.to_k.weight.T + attn.to_k.bias)[there > 0][:, part]
                v = (text @ attn.to_v.weight.T + attn.to_v.bias)[there > 0][:, part]
                z.append(torch.softmax(q @ k.T / WIDTH**0.5, 1) @ v)
            heads.append(z[0] - 0.3 * z[1])
        rows.append(torch.cat(heads, 1) @ attn.to_out[0].weight.T + attn.to_out[0].bias)
    found = steered(attn, x, positive, negative, 0.3, (1 - kept) * -1e9)
    assert (found - torch.stack(rows)).abs().max() < 1e-14


@torch.no_grad()
def test_golden() -> None:
    """K- = K+ and V- = beta V+ give (1 - a beta) Z+ = 0.86 Z+; the bias of to_out is there once."""
    attn, (x, positive, _) = attention(), inputs()
    negative = torch.cat([positive[:, :, :4], 0.7 * positive[:, :, 4:]], 2)
    bias = attn.to_out[0].bias
    assert bias.abs().min() > 1e-3
    plain = AttnProcessor2_0()(attn, x, positive) - bias
    found = steered(attn, x, positive, negative, 0.2) - bias
    assert (found - (1 - 0.2 * 0.7) * plain).abs().max() < 1e-14
    # two whole attentions, a way to get this wrong, take the bias of to_out away again
    apart = AttnProcessor2_0()(attn, x, positive) - 0.2 * AttnProcessor2_0()(attn, x, negative) - bias
    assert (found - apart - 0.2 * bias).abs().max() < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("masked", (False, True))
def test_scale_0_is_the_stock_attention_to_the_last_bit(masked: bool) -> None:
    attn = attention().float()
    x, positive, negative = (each.float() for each in inputs())
    mask = torch.zeros(2, 1, 2 * TOKENS)
    mask[:, :, 3] = mask[:, :, 8] = -10000
    stock = AttnProcessor2_0()(attn, x, positive, mask[:, :, :TOKENS] if masked else None)
    text = torch.cat([positive, negative], 1)
    assert torch.equal(nasa.SteeredAttention(torch.zeros(2, 1, 1, 1))(attn, x, text, mask if masked else None), stock)
    assert not torch.equal(nasa.SteeredAttention(torch.full((2, 1, 1, 1), 0.1))(attn, x, text), stock)


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    """Each row of a batch, with its own scale, is what it is alone."""
    attn, (x, positive, negative) = attention(), inputs()
    both = steered(attn, x, positive, negative, [0.2, 0.9])
    for row, scale in enumerate((0.2, 0.9)):
        one = slice(row, row + 1)
        assert (both[one] - steered(attn, x[one], positive[one], negative[one], scale)).abs().max() < 1e-14
    assert (both[:1] - steered(attn, x[:1], positive[:1], negative[1:], 0.2)).abs().max() > 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(stock pipeline, the same folder with negative prompts)."""
    folder = tmp_path_factory.mktemp(request.param)
    made = PIPELINES[request.param]()
    made.scheduler = LCMScheduler()  # as an export has; one step of PixArt-alpha takes no other kind
    made.save_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    return stock, pipe


def picture(pipe: Any, prompt: Any = "a red cat", **arguments: Any) -> Tensor:
    own = {"guidance_scale": 0.0, "num_inference_steps": 1, "generator": torch.Generator().manual_seed(5)}
    if "PixArt" in type(pipe).__name__ + pipe.config.get("stock", ""):
        own |= {"use_resolution_binning": False, "height": 16, "width": 16, "clean_caption": False}
    return torch.from_numpy(pipe(prompt, output_type="np", **own, **arguments).images)


def network_of(pipe: Any) -> Any:
    return pipe.transformer if pipe.components.get("transformer") is not None else pipe.unet


def test_off_is_the_stock_picture_to_the_last_bit(pair: tuple[Any, Any]) -> None:
    stock, pipe = pair
    plain = picture(stock)
    for arguments in ({}, {"negative_prompt": ""}, {"negative_prompt": "dogs", "negative_scale": 0.0}):
        assert torch.equal(picture(pipe, **arguments), plain)
    dogs, itself = (picture(pipe, negative_prompt=text, negative_scale=0.5) for text in ("dogs", "a red cat"))
    assert min((dogs - plain).abs().max(), (dogs - itself).abs().max()) > 1e-4


def test_the_prompt_as_its_own_negative_weakens_the_text(pair: tuple[Any, Any]) -> None:
    """Then Z+ - a Z- = (1 - a) Z+: as if every cross-attention had the values (1 - a) V."""
    stock, pipe = pair
    found = picture(pipe, negative_prompt="a red cat", negative_scale=0.3)
    values = [module.to_v for name, module in network_of(stock).named_modules() if name.endswith("attn2")]
    before = [parameter.clone() for each in values for parameter in each.parameters()]
    with torch.no_grad():
        for each in values:
            for parameter in each.parameters():
                parameter.mul_(1 - 0.3)
        weaker = picture(stock)
        for parameter, was in zip((p for each in values for p in each.parameters()), before):
            parameter.copy_(was)
    assert (found - weaker).abs().max() < 2e-5
    assert (found - picture(stock)).abs().max() > 1e-4


def test_one_pass_of_one_batch(pair: tuple[Any, Any]) -> None:
    """A list of prompts, each with its own negative prompt; an empty one is off; two pictures of each are in order."""
    _, pipe = pair
    sizes: list[int] = []
    hook = network_of(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    prompts, negatives = ["a red cat", "a tree"], ["", "leaves"]
    found = picture(pipe, prompts, negative_prompt=negatives, negative_scale=0.5)
    hook.remove()
    assert sizes == [2]
    plain = picture(pipe, prompts)
    assert (found[0] - plain[0]).abs().max() < 2e-5 and (found[1] - plain[1]).abs().max() > 1e-4


def test_the_network_is_left_as_it_was(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe = pair
    before = dict(network_of(pipe).attn_processors)
    picture(pipe, negative_prompt="dogs")
    assert network_of(pipe).attn_processors == before
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        picture(pipe, negative_prompt="dogs")
    assert network_of(pipe).attn_processors == before


def test_bad_input(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, pipe = pair
    with pytest.raises(ValueError, match="negative_scale is -1; type 0"):
        pipe("a", negative_prompt="b", negative_scale=-1)
    with pytest.raises(ValueError, match="3 negative prompts for 1 prompts; give one"):
        pipe("a", negative_prompt=["b", "c", "d"])
    with pytest.raises(ValueError, match=r"guidance_scale is 7\.5; with a negative prompt leave it out"):
        pipe("a", negative_prompt="b", guidance_scale=7.5)


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a FluxPipeline cannot be steered.*StableDiffusionXLPipeline"):
        nasa.NegativePromptPipeline(None, None, None, None, stock="FluxPipeline")


ALONE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onestep":
            raise ImportError("onestep was imported")

sys.meta_path.insert(0, Refuse())
import torch
from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline={str(FILE)!r}, trust_remote_code=True)
seed = torch.Generator().manual_seed(5)
print(pipe("a red cat", negative_prompt="dogs", num_inference_steps=1, generator=seed, output_type="np").images.mean())
"""


def test_it_runs_where_onestep_cannot_be_imported(tmp_path: Path) -> None:
    stock = PIPELINES["sd15"]()
    stock.save_pretrained(tmp_path / "first")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "first", custom_pipeline=str(FILE), trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")  # what it saves is loaded in the same way
    wanted = picture(pipe, negative_prompt="dogs").mean()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "again")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(float(wanted), abs=1e-6)
