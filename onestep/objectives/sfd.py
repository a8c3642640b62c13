"""SFD: Score Forgetting Distillation (Chen et al. 2024, arXiv 2409.11219)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Cond
from ..methods.sfd import SFDConfig
from ..metrics.forgetting import classifier_of, label_of, names_of
from ..teacher import Teacher
from .base import Batch
from .score import per_sample_weight
from .sid import MOST, SiD, sid_loss

CLASSIFIED = ("classifier", "classifier-sampled")
"""Overrides that a classifier chooses: the likeliest of the remaining classes, or one of them by its probability."""


class SFD(SiD):
    """SiD on the remaining conditions, and on samples of a forgotten one, c_f, with the teacher asked for another, c_o.

    Conditions of the batch that are to be forgotten are replaced by others, uniform over those that remain.
    """

    Config = SFDConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        c, teacher = self.config, self.teacher
        gone, instead = conditions_of(c.forget, c.override, teacher)
        rows = torch.arange(teacher.classes, device=teacher.device)
        self.gone = torch.tensor(gone, device=teacher.device)
        self.is_gone = torch.isin(rows, self.gone)
        self.remaining = rows[~self.is_gone]
        self.instead = rows  # the fixed override of each condition; what remains is itself
        self.instead[self.gone] = torch.tensor(instead or gone, device=teacher.device)
        self.classifier = classifier_of(teacher.facts.protocol, teacher.device) if c.override in CLASSIFIED else None

    def kept(self) -> Sequence[nn.Module]:
        return [*super().kept(), *([] if self.classifier is None else [self.classifier])]

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        if len(batch.conditions) % self.config.forget_every:
            raise ValueError(
                f"forget_every {self.config.forget_every} does not divide the {len(batch.conditions)} samples of a "
                "micro-batch; type --forget-every 1, or another --batch-size"
            )
        conditions = torch.where(self.is_gone[batch.conditions], self._other(batch), batch.conditions)
        yield from super().step(replace(batch, conditions=conditions), step)

    def generator_loss(self, x: Tensor, batch: Batch, cond: Cond, uncond: Cond | None) -> Tensor:
        """L_sid(G(z, c); c, c) + forgetting * L_sid(G(z, c_f); c_o, c_f), the conditions those of teacher and critic."""
        loss = super().generator_loss(x, batch, cond, uncond)
        if not self.config.forgetting:
            return loss
        batch, cond = self._forgotten(batch)
        x = self.sample(batch, cond, grad=True)
        x_t, t = self.noised(x, batch)
        fake, real = self.fake(x_t, t, cond), self.real(x_t, t, *self.teacher.encode(self._override(x.detach(), batch)))
        weight = per_sample_weight(x.detach(), real.detach()).clamp_max(MOST)
        forgetting = sid_loss(x, fake, real, self.config.alpha, weight)
        self.log["forgetting"] = forgetting.detach()
        return loss + self.config.forgetting * forgetting

    def critic_loss(self, x: Tensor, batch: Batch, cond: Cond) -> Tensor | None:
        """Denoising of G(z, c) + forgetting_critic * denoising of G(z, c_f), each under its own condition."""
        loss = self.denoising(x, batch, cond)
        if not self.config.forgetting_critic:
            return loss
        batch, cond = self._forgotten(batch)
        forgetting = self.fake.loss(self.sample(batch, cond), cond, batch.rng)
        self.log["forgetting_critic"] = forgetting.detach()
        return loss + self.config.forgetting_critic * forgetting

    def _forgotten(self, batch: Batch) -> tuple[Batch, Cond]:
        """A batch of c_f for every `forget_every`-th sample of the global batch, drawn by the same generator."""
        rng, every = copy.copy(batch.rng), self.config.forget_every
        if every > 1:
            rng.rows = slice(rng.rows.start, rng.rows.stop, every)
        conditions = self.gone[rng.integers(len(self.gone))]
        return Batch(conditions, None, rng), self.teacher.encode(conditions)[0]

    def _other(self, batch: Batch) -> Tensor:
        return self.remaining[batch.rng.integers(len(self.remaining))]

    @torch.no_grad()
    def _override(self, x: Tensor, batch: Batch) -> Tensor:
        """c_o of each sample of a forgotten condition."""
        if self.classifier is None:
            return self._other(batch) if self.config.override == "random" else self.instead[batch.conditions]
        logits = self.classifier(2 * self.teacher.to_images(x) - 1).index_fill(1, self.gone, -torch.inf)
        if self.config.override == "classifier-sampled":
            # |n|^2 / 2 of two normal draws n is an exponential one E, and the largest p / E falls on a class with chance p
            logits = logits - batch.rng.normal((2, logits.shape[1])).square().sum(1).log()
        return logits.argmax(1)


def conditions_of(forget: str | None, override: str, teacher: Teacher) -> tuple[list[int], list[int]]:
    """Conditions to forget, and the fixed override of each, none where the override is not fixed.

    Of prompts, all that have the words are forgotten; the override of one is itself with these words replaced.
    Raises ValueError where they do not exist.
    """
    if forget is None:
        raise ValueError("SFD needs to know what to forget: type --forget CLASS, or --forget WORDS of prompts")
    fixed = override not in ("random", *CLASSIFIED)
    if teacher.conditioned_by == "text":
        return _prompts_of(forget, override if fixed else None, teacher.named(list(range(teacher.classes))))
    if teacher.classes < 2:
        raise ValueError("SFD forgets one of several classes, and this teacher has one: type --teacher with another")
    names = {} if forget.isdecimal() and (override.isdecimal() or not fixed) else names_of(teacher.pipeline)
    gone = label_of(forget, names, teacher.classes, "--forget")
    instead = [label_of(override, names, teacher.classes, "--override")] if fixed else []
    if gone in instead:
        raise ValueError(f"--override {override} is the forgotten class itself; type another class, or random")
    return [gone], instead


def _prompts_of(words: str, instead: str | None, prompts: list[str]) -> tuple[list[int], list[int]]:
    """The prompts with these words, and those with others in their place, by their rows."""
    gone = [row for row, prompt in enumerate(prompts) if words in prompt]
    if not gone or len(gone) == len(prompts):
        found = "all" if gone else "none"
        raise ValueError(f"{found} of the {len(prompts)} prompts have --forget {words!r}; some should, and others not")
    if instead is None:
        return gone, []
    row_of = {prompt: row for row, prompt in enumerate(prompts) if words not in prompt}
    wanted = [prompts[row].replace(words, instead) for row in gone]
    if missing := [prompt for prompt in wanted if prompt not in row_of]:
        raise ValueError(f"--override: {len(missing)} prompts are not in the data; add the line {missing[0]!r}, and so on")
    return gone, [row_of[prompt] for prompt in wanted]
