"""The preference step as users write it: two models or adapters off, eager or compiled.

After the DiffusionDPO script: winners and losers in one batch, one noise for both, mean squared
errors in float32, logsigmoid. B0 has two models; the others switch the adapters off in one. B0 and
B1 run eagerly and recompute every block, B4 compiles the blocks, B5 compiles and recomputes
nothing.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bench.meters import Clock
from bench.pair_loss import mean_squares
from fastpref.process import Times
from fastpref.step import compiling


@dataclass(frozen=True)
class Baseline:
    """What a baseline does otherwise than B1."""

    what: str
    two_models: bool = False
    compiled: bool = False
    recomputes: bool = True


BASELINES = {
    "B0": Baseline("two models, eager, full checkpointing", two_models=True),
    "B1": Baseline("adapters off, eager, full checkpointing"),
    "B4": Baseline("B1 with compiled blocks", compiled=True),
    "B5": Baseline("compiled blocks, no checkpointing", compiled=True, recomputes=False),
}


class UsualStep:
    """Reference, forward and backward of one baseline, gradients in .grad.

    policy: the adapted model; base: a model without adapters, for B0; family: theirs.
    """

    def __init__(self, name: str, policy: nn.Module, base: nn.Module, family, beta: float, clock):
        self.settings, self.model, self.predict = BASELINES[name], policy, family.predict
        self.frozen = copy.deepcopy(base) if self.settings.two_models else None
        self.models = [policy, self.frozen] if self.frozen is not None else [policy]
        self.beta, self.clock = beta, clock
        if self.settings.recomputes:
            self.model.enable_gradient_checkpointing()
        if self.settings.compiled:
            # What diffusers' compile_repeated_blocks does, also of models that do not name theirs.
            for block in compiling.blocks(self.model, family.BLOCKS):
                block.compile(fullgraph=True)

    def __call__(
        self,
        latents: Tensor,
        cond: dict[str, Tensor],
        times: Times,
        autocast: Callable[[], AbstractContextManager],
        noise: Tensor | None = None,
    ) -> None:
        clock: Clock = self.clock
        half = latents[: len(latents) // 2]
        noise = torch.randn_like(half) if noise is None else noise
        noise = torch.cat((noise, noise))

        def wide(value: Tensor) -> Tensor:
            return value.to(latents).repeat(2).view(-1, 1, 1, 1, 1)

        noisy = wide(times.a) * latents + wide(times.s) * noise
        target = wide(times.p) * noise + wide(times.q) * latents
        t = times.t.repeat(2)
        with autocast():
            with torch.no_grad(), clock.part("reference"):
                if self.frozen is not None:
                    ref = self.predict(self.frozen, noisy, t, cond)
                else:
                    self.model.disable_adapters()
                    try:
                        ref = self.predict(self.model, noisy, t, cond)
                    finally:  # their parameters, which all variants share, are learned again
                        self.model.enable_adapters()
            with clock.part("forward"):
                pred = self.predict(self.model, noisy, t, cond)
        w, l = mean_squares(pred, target).chunk(2)
        ref_w, ref_l = mean_squares(ref, target).chunk(2)
        inside = -0.5 * self.beta * ((w - l) - (ref_w - ref_l))
        loss = -logsigmoid(inside).mean()
        loss.backward()
