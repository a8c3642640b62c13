"""Rewards: the hinge, the CLIP score on a tiny CLIP, classes of users' own, and their place in Hyper-SD's one-step stage."""

from typing import Any

import playing
import pytest
import torch
from playing import batch, dit, has_gradient, play
from test_clip_loss import PROMPTS, clip, cosines, pictures, prompted, text_teacher
from torch import Tensor

from onestep.objectives.hyper_sd_score import HyperSDScore
from onestep.reward import REWARDS, CLIPScore, Reward, Rewards, reward_class
from onestep.teacher import Teacher


class Bright(Reward):
    """The mean of the pixels."""

    margin = 0.5

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0))
        self.seen: list[list[Any]] = []

    def forward(self, images: Tensor, conditions: list[Any]) -> Tensor:
        self.seen.append(conditions)
        return self.gain * images.mean(dim=(1, 2, 3))


class Dark(Bright):
    """Its opposite."""

    margin = 0.1

    def forward(self, images: Tensor, conditions: list[Any]) -> Tensor:
        return -super().forward(images, conditions)


class NoReward:
    margin = 0.0


BRIGHT, DARK = f"{__name__}:Bright", f"{__name__}:Dark"


def test_the_hinge_is_summed_over_rewards():
    """sum_d mean max(0, m_d - r_d), whose gradient is that of the samples below the margin alone."""
    rewards = Rewards.named(f"{BRIGHT}, {DARK}", dit())
    images = torch.tensor([-0.3, 0.2, 0.9]).view(3, 1, 1, 1).expand(3, 1, 2, 2).clone().requires_grad_()
    loss = rewards(images, [1, 2, 3])
    assert float(loss.detach()) == pytest.approx((0.8 + 0.3 + 0.0) / 3 + (0.0 + 0.3 + 1.0) / 3)
    loss.backward()
    per_sample = images.grad.sum(dim=(1, 2, 3)) * 3
    torch.testing.assert_close(per_sample, torch.tensor([-1.0, -1.0 + 1.0, 1.0]))
    assert not any(has_gradient(rewards)) and not any(p.requires_grad for p in rewards.parameters())


def tiny_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLIPScore, "loaded", lambda self: (clip(0.0).model, clip(0.0).tokenizer))


def test_the_clip_score_is_the_cosine_of_picture_and_prompt(monkeypatch):
    tiny_clip(monkeypatch)
    score = CLIPScore(text_teacher())
    images = pictures()
    got = score(images, PROMPTS)
    torch.testing.assert_close(got, cosines(clip(0.0), images), atol=1e-6, rtol=1e-5)
    assert got.shape == (2,) and REWARDS["clip"] is CLIPScore and score.margin == 0.35
    before = Rewards([score])(images, PROMPTS)
    before.backward()
    after = Rewards([score])(images.detach() - 5 * images.grad, PROMPTS)
    assert float(after) < float(before.detach()) - 1e-3


@pytest.mark.parametrize(
    "name, message",
    [
        ("clap", r"no reward 'clap'; allowed are clip, or package.module:Class .*type for example --reward clip"),
        ("nowhere:Class", r"'nowhere:Class' cannot be imported: No module named 'nowhere'; allowed are clip"),
        (f"{__name__}:Missing", r"cannot be imported: .*has no attribute 'Missing'"),
        (":Class", r"cannot be imported: .*allowed are clip"),
        (f"{__name__}:NoReward", r"is no subclass of onestep.reward.Reward"),
        (f"{__name__}:BRIGHT", r"is no subclass of onestep.reward.Reward"),
    ],
)
def test_what_is_no_reward_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        reward_class(name)


def test_what_has_no_prompts_or_no_weights_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"prompts, and this teacher has none; leave --reward out, or type --reward pack"):
        playing.objective(HyperSDScore, dit(), times=[999], reward="clip")
    monkeypatch.setattr(CLIPScore, "weights", "nonsense")
    with pytest.raises(ValueError, match=r"weights nonsense cannot be had: .*leave --reward out"):
        Rewards.named("clip", text_teacher())


def test_the_student_learns_from_a_reward_through_the_decoder():
    """Alone, in a stage without matching and anchor; the conditions are what the pipeline is asked for."""
    teacher = text_teacher()
    given = {"matching": 0.0, "anchor": 0.0, "reward": BRIGHT, "reward_weight": 0.2}
    method = playing.objective(HyperSDScore, teacher, times=[999], **given)
    assert method.rewards in method.kept()
    turns = list(method.step(prompted(method, 0), 0))
    assert [player for player, _ in turns] == ["generator"]
    assert float(turns[0][1].detach()) == pytest.approx(0.2 * float(method.log["reward"]))
    turns[0][1].backward()
    assert any(bool(p.grad.any()) for p in method.generator.parameters() if p.grad is not None)
    assert not any(has_gradient(method.rewards)) and not any(has_gradient(teacher.pipeline.vae))
    assert method.rewards.rewards[0].seen == [[PROMPTS[1], PROMPTS[0]]]

    plain = playing.objective(HyperSDScore, teacher, times=[999], reward=BRIGHT, reward_weight=0.0)
    assert plain.rewards is None


def test_a_reward_joins_the_other_losses_of_a_class_teacher(monkeypatch):
    teacher = dit()
    method = playing.objective(HyperSDScore, teacher, times=[999], reward=f"{BRIGHT},{DARK}", ratio=2)
    assert [play(method, step, batch(teacher, step)) for step in range(2)] == [["generator", "critic"], ["critic"]]
    assert {"matching", "reward", "anchor", "denoising"} <= set(method.log)
    assert method.rewards.rewards[0].seen == [[0, 1]]
    monkeypatch.setattr(teacher, "decode", lambda x: pytest.fail("decoded"))
    play(playing.objective(HyperSDScore, teacher, times=[999]), 0, batch(teacher))
