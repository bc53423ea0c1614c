"""Tiny models of the real classes with adapters that already say something, and the plain step."""

from __future__ import annotations

import copy
import re
from types import ModuleType
from typing import Any, NamedTuple

import families
import peft
import torch
from torch import Tensor, nn

import fastpref
from fastpref import oracle
from fastpref.models import cogvideox, stable_diffusion, toy, wan
from fastpref.step import pair

PAIRS = 2
NAMES = ("toy", "wan", "cogvideox-2b", "cogvideox-5b", "sd15")
DPO = fastpref.objective("dpo", beta=40.0)


def joint(policy, reference, noisy, t, target, cond, objective, *, gain=None, weight=None, **how):
    """The loop's lines: all members in one forward and one backward. reference: or its errors."""
    ref = reference if isinstance(reference, Tensor) else reference(noisy, t, cond)
    pred = policy(noisy, t, cond)
    out = pair.training_loss(pred, target, ref, objective, gain=gain, weight=weight)
    pair.backward(out, **how)
    return out


def deferred(policy, reference, noisy, t, target, cond, objective, **how):
    """Member by member. reference: or its errors."""
    known = reference if isinstance(reference, Tensor) else None
    how["objective"] = objective
    return pair.deferred(policy, reference, noisy, t, target, cond, known, **how)


STEPS = {"joint": joint, "deferred": deferred}


class Case(NamedTuple):
    """A model with adapters, a frozen copy of its base, and a batch of PAIRS pairs for it."""

    family: ModuleType
    model: nn.Module
    base: nn.Module
    process: Any
    latents: Tensor
    cond: dict[str, Tensor]
    draws: fastpref.Draws
    weight: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def policy(self, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.family.predict(self.model, noisy, t, cond)

    def inputs(self) -> tuple[Tensor, Tensor, Any]:
        """(noisy, t, target)"""
        return self.process.noise(self.latents, self.draws)


def transformer(name: str) -> tuple[ModuleType, nn.Module, Any, tuple[int, ...], int]:
    """(family, model, process, shape of one latent, width of the text), four blocks each."""
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

    flow = fastpref.FlowMatching(shift=3.0)
    # No strong noise: at random weights errors stay near 1 and no gradient is tiny.
    abar = torch.linspace(0.99, 0.2, 1000, dtype=torch.float64)
    if name == "toy":
        config = {**toy.CONFIG, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48}
        return toy, families.seeded(WanTransformer3DModel, **config), flow, (3, 2, 8, 8), 32
    if name == "wan":
        model = families.seeded(
            WanTransformer3DModel, num_attention_heads=2, attention_head_dim=12, text_dim=32,
            freq_dim=32, ffn_dim=48, num_layers=4, rope_max_seq_len=32, cross_attn_norm=True,
        )  # fmt: skip
        return wan, model, flow, (16, 3, 8, 8), 32
    if name.startswith("cogvideox"):
        model = families.seeded(
            CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=16,
            in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=32, num_layers=4,
            sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=5,
            use_rotary_positional_embeddings=name.endswith("5b"),
        )  # fmt: skip
        process = fastpref.Diffusion(alphas_cumprod=abar, prediction_type="v_prediction")
        return cogvideox, model, process, (4, 3, 8, 8), 32
    process = fastpref.Diffusion(alphas_cumprod=abar)
    if name == "sdxl":
        return stable_diffusion, families.unet(**families.SDXL), process, (4, 1, 8, 8), 48
    return stable_diffusion, families.unet(), process, (4, 1, 8, 8), 32


def adapt(model: nn.Module, targets: list[str] | str, seed: int = 1) -> None:
    """LoRA of rank 4 with random B: the policy is not the reference."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.1 * noise)


def last_half(family: ModuleType, model: nn.Module) -> str:
    """Targets in the last half of the family's blocks; on a UNet, in its upper half."""
    paths = family.BLOCKS.split()
    if len(paths) == 1:
        count = len(model.get_submodule(paths[0]))
        here = rf"{paths[0]}\.({'|'.join(str(i) for i in range(count // 2, count))})"
    else:
        here = paths[-1]
    return rf"{here}\..*({'|'.join(re.escape(name) for name in family.LORA_TARGETS)})"


def case(
    name: str, dtype: torch.dtype = torch.float32, *, half: bool = False, pairs: int = PAIRS
) -> Case:
    family, model, process, shape, width = transformer(name)
    model = model.to(dtype).requires_grad_(False)
    base = copy.deepcopy(model)
    adapt(model, last_half(family, model) if half else family.LORA_TARGETS)
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2 * pairs, *shape, generator=generator).to(dtype)
    text = torch.randn(pairs, 5, width, generator=generator).to(dtype)
    cond = {"text": text.repeat(2, 1, 1)}
    if name == "sdxl":
        cond["pooled"] = torch.randn(pairs, 24, generator=generator).to(dtype).repeat(2, 1)
    ids = torch.arange(1, pairs + 1) * 1_000_003
    draws = fastpref.Draws(3, ids, torch.arange(pairs))
    weight = torch.linspace(0.5, 2.0, pairs, dtype=torch.float64)
    return Case(family, model, base, process, latents, cond, draws, weight)


def plain(c: Case, objective: Any, *, gain: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, err [2B], ref_err [2B]) of two models and the oracle; the gradient is in .grad.

    Shares with the code under test no more than the models, the draws and `oracle.loss`.
    """
    noisy, t, target = c.inputs()
    noise = oracle.normal(c.draws.seed, c.draws.pair_id, c.draws.index, c.latents[0].numel())
    noise = noise.view(-1, *c.latents.shape[1:]).repeat(2, *[1] * (c.latents.dim() - 1))
    p, q = (
        v.double().repeat(2).view(-1, *[1] * (c.latents.dim() - 1)) for v in (target.p, target.q)
    )
    y = p * noise.double() + q * c.latents.double()

    def errors(model: nn.Module) -> Tensor:
        said = c.family.predict(model, noisy, t, c.cond)
        residuals.append((said.double() - y).flatten(1))
        return residuals[-1].square().mean(1)

    residuals: list[Tensor] = []
    with torch.no_grad():
        ref_err = errors(c.base)
    err = errors(c.model)
    pairs = len(c.weight)
    if objective is None:
        each = err[:pairs]
    else:
        each = oracle.loss(objective, *err.chunk(2), *ref_err.chunk(2), gain)
    loss = (c.weight * each).mean()
    if objective is not None and objective.safeguard is not None:
        # The loser's error counts lambda times in the gradient, not in the loss.
        one, other = residuals[-1].detach().chunk(2)
        slopes = torch.autograd.grad(loss, err, retain_graph=True)[0].chunk(2)
        own, both = one.square().mean(1), (one * other).mean(1)
        most = (1 - objective.safeguard) * own / both * (slopes[0] / -slopes[1]).clamp(max=1)
        share = torch.where((slopes[1] < 0) & (both > 0), most.clamp(0, 1), 1.0)
        err.backward(torch.cat([slopes[0], share * slopes[1]]))
    else:
        loss.backward()
    return loss.detach(), err.detach(), ref_err


def gradients(parameters: list[Tensor]) -> Tensor:
    """All gradients as one float64 vector; clears them."""
    flat = torch.cat([p.grad.detach().double().flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def run(
    c: Case, form: str, policy: Any, ref: Any, **changes: Any
) -> tuple[fastpref.PairLoss, Tensor]:
    """One step of `form` on DPO: (its numbers, the gradient)."""
    noisy, t, target = c.inputs()
    out = STEPS[form](
        policy, ref, noisy, t, target, c.cond, DPO,
        **{"weight": c.weight, "parameters": c.parameters, **changes},
    )  # fmt: skip
    return out, gradients(c.parameters)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
