"""The clamped CLIP loss on a tiny CLIP with random weights: its clamp, its gradient, its place in SwiftBrush."""

from typing import Any

import open_clip
import playing
import pytest
import torch
from playing import batch, dit, has_gradient, play
from tiny_text import sd15
from torch import Tensor

from onestep.objectives import swiftbrush
from onestep.objectives.base import Batch
from onestep.objectives.clip_loss import MEAN, STD, ClampedCLIP, clip_on
from onestep.objectives.swiftbrush import SwiftBrush
from onestep.teacher import Facts
from onestep.teacher.stable_diffusion import SDTeacher

PROMPTS = ["a red bicycle", "a bowl of lemons"]


def clip(tau: float) -> ClampedCLIP:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32)
        model = CLIP(16, vision, CLIPTextCfg(width=32, heads=2, layers=1))
    return ClampedCLIP(model, open_clip.get_tokenizer("ViT-B-32"), tau)


def pictures() -> Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)).mul(2).sub(1).requires_grad_()


def cosines(loss: ClampedCLIP, images: Tensor) -> Tensor:
    """By the model's own features, from pixels that are resized and normalised here once more."""
    pixels = torch.nn.functional.interpolate(images.detach() / 2 + 0.5, (32, 32), mode="bicubic", antialias=True)
    pixels = torch.stack([(pixels[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1)
    with torch.no_grad():
        image, text = loss.model.encode_image(pixels), loss.model.encode_text(loss.tokenizer(PROMPTS))
    return torch.nn.functional.cosine_similarity(image, text)


def test_below_the_threshold_there_is_a_gradient_and_above_it_none():
    images, known = pictures(), cosines(clip(0.0), pictures())
    loss = clip(1.0)
    value = loss(images, PROMPTS)
    assert float(value.detach()) == pytest.approx(float((1 - known).mean()), abs=1e-6)
    value.backward()
    assert all(bool(each.any()) for each in images.grad)
    assert not any(has_gradient(loss)) and not any(p.requires_grad for p in loss.parameters())

    images = pictures()
    value = clip(float(known.min()) - 0.01)(images, PROMPTS)
    value.backward()
    assert float(value.detach()) == 0 and not images.grad.any()

    images = pictures()  # between the two: one of them is done, the other is not
    clip(float(known.mean()))(images, PROMPTS).backward()
    assert [bool(each.any()) for each in images.grad] == (known < known.mean()).tolist()


def test_a_step_along_it_brings_pictures_and_prompts_together():
    images, loss = pictures(), clip(1.0)
    before = loss(images, PROMPTS)
    before.backward()
    after = loss(images.detach() - 5 * images.grad, PROMPTS)
    assert float(after) < float(before.detach()) - 1e-3


def text_teacher() -> SDTeacher:
    teacher = SDTeacher(sd15(), Facts("x"))
    teacher.use_texts(PROMPTS)
    return teacher


def objective(monkeypatch: pytest.MonkeyPatch, tau: float, **options: Any) -> Any:
    monkeypatch.setattr(swiftbrush, "clip_on", lambda teacher, name, weights, tau: clip(tau))
    return playing.objective(SwiftBrush, text_teacher(), guidance=4.5, clip_tau=tau, **options)


def prompted(method: Any, step: int) -> Batch:
    """A batch with the two prompts in the other order."""
    item = batch(method.teacher, step, real=False)
    item.conditions = torch.tensor([1, 0])
    return item


def gradients(method: Any, step: int) -> list[Tensor]:
    """The generator's, from the CLIP loss alone: the critic is still the teacher."""
    turns = method.step(prompted(method, step), step)
    next(turns)[1].backward()
    return [p.grad for p in method.generator.parameters() if p.grad is not None and p.grad.any()]


def test_the_student_learns_from_it_through_the_decoder(monkeypatch):
    method = objective(monkeypatch, 1.0, clip=0.1)
    seen: list[list[str]] = []
    forward = method.clip.forward
    monkeypatch.setattr(method.clip, "forward", lambda images, prompts: (seen.append(prompts), forward(images, prompts))[1])
    assert gradients(method, 0) and seen == [["a bowl of lemons", "a red bicycle"]]
    assert not any(has_gradient(method.fake)) and not any(has_gradient(method.teacher.pipeline.vae))
    assert method.clip in method.kept()
    assert not gradients(objective(monkeypatch, -1.0, clip=0.1), 0)
    assert not gradients(objective(monkeypatch, 1.0), 0)


def test_its_weight_falls_to_zero(monkeypatch):
    """Linearly over clip_steps; then the pictures are not even decoded."""
    method = objective(monkeypatch, 1.0, clip=0.1, clip_steps=2)
    weights = []
    for step in range(3):
        play(method, step, prompted(method, step))
        weights.append(method.clip_weight)
    assert weights == pytest.approx([0.1, 0.05, 0])
    monkeypatch.setattr(method.teacher, "decode", lambda x: pytest.fail("decoded"))
    play(method, 3, prompted(method, 3))


def test_what_has_no_prompts_or_no_weights_is_refused():
    with pytest.raises(ValueError, match=r"prompts, and this teacher has none; leave --clip out"):
        playing.objective(SwiftBrush, dit(), guidance=4.5, clip=0.1)
    with pytest.raises(ValueError, match=r"weights nonsense cannot be had: .*leave --clip out"):
        clip_on(text_teacher(), "ViT-B-32", "nonsense", 0.35)
