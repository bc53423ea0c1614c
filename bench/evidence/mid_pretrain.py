"""Makes the base of the world `mid`: `python -m bench.evidence.mid_pretrain --output DIR`.

Flow matching on flawed clips, as of fastpref.demo.pretrain. It is written once, at the end; what is
done until then stands beside it in DIR.partial, every SAVE_STEPS steps, and is taken up again.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence import mid_clips
from bench.evidence.mid_clips import FRAMES, SIZE
from bench.evidence.mid_prompts import NEVER_SEEN, PAIR_PROMPTS, PRETRAINING_PROMPTS
from fastpref.files import write_atomic
from fastpref.look.sample import sample
from fastpref.models import toy
from fastpref.process import FlowMatching

STATEFUL = ("model", "average", "optimizer")
SAVE_STEPS = 250
HEAD = 48  # numbers of an attention head
SHAPE = (3, FRAMES, SIZE, SIZE)


def config(width: int, layers: int) -> dict[str, Any]:
    """The toy family's transformer in another size; four frames of 4x4 pixels are a token."""
    return toy.CONFIG | {
        "patch_size": (4, 4, 4),
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "freq_dim": 256,
        "ffn_dim": 4 * width,
        "num_layers": layers,
    }


def training_flops(model: nn.Module) -> float:
    """Of one clip's forward and backward, in all weights: 6 per parameter and token."""
    tokens = FRAMES * SIZE * SIZE / math.prod(model.config.patch_size)
    return 6.0 * tokens * sum(p.numel() for p in model.parameters())


def fresh(width: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**config(width, layers))
    with torch.no_grad():
        for block in model.blocks:
            # Wan's gates of self-attention and feed-forward start near 0; open, motion is learned
            # in a fraction of the steps.
            block.scale_shift_table[:, [2, 5]] += 1
    return model


@cache
def texts() -> Tensor:
    """What the model reads of every prompt of pretraining, [prompts, 8, 32]."""
    found = toy.encode_text(toy.pipeline(""), PRETRAINING_PROMPTS)
    return torch.stack([cond["text"] for cond in found])


def judge_all(prompts: list[str], clips: list[Tensor]) -> dict[str, Tensor]:
    """Noise-free scores `[N]` float64: the whole `score` and each of its parts."""
    each = [mid_clips.judge(p, c.cpu()) for p, c in zip(prompts, clips, strict=True)]
    return {k: torch.tensor([e[k] for e in each], dtype=torch.float64) for k in each[0]}


def sampled(
    model: nn.Module, prompts: list[str], seeds: list[int], chunk: int = 48
) -> list[Tensor]:
    """One clip `uint8 [F, H, W, 3]` per prompt and seed."""
    result, scheduler, pipe = [], toy.Euler(FlowMatching()), toy.pipeline("")
    for start in range(0, len(prompts), chunk):
        some = slice(start, start + chunk)
        cond = {"text": torch.stack([c["text"] for c in toy.encode_text(pipe, prompts[some])])}
        latents = sample(model, toy, scheduler, cond, SHAPE, steps=20, seeds=seeds[some])
        result += toy.decode_many(pipe, latents.cpu())
    return result


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a pretraining can be asked for; what stands half done is of the same."""

    steps: int = 3000
    batch: int = 32
    rate: float = 1e-3
    width: int = 384
    layers: int = 4
    seed: int = 0


class Pretraining:
    """The model, its moving average and its optimiser, which go to the disk and come back."""

    def __init__(self, options: Options, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.options, self.step = options, 0
        self.model = fresh(options.width, options.layers).to(device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.draw = torch.Generator(device).manual_seed(options.seed)
        self.text = texts().to(device)
        self.asked = mid_clips.parse(PRETRAINING_PROMPTS).to(device)

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in STATEFUL}
        state |= {"draw": self.draw.get_state(), "step": self.step, "options": asdict(self.options)}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(path, buffer.getvalue())

    def take_up(self, path: Path) -> None:
        """ValueError: what stands there is of other options."""
        state = torch.load(path, map_location="cpu")
        if state["options"] != asdict(self.options):
            raise ValueError(
                f"{path}: is of {state['options']}, got {asdict(self.options)}: delete it, or "
                "choose another output"
            )
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.draw.set_state(state["draw"])
        self.step = state["step"]

    def loss(self) -> Tensor:
        """Mean squared error of the velocity on clips drawn anew."""
        batch, place = self.options.batch, {"device": self.draw.device, "generator": self.draw}
        chosen = torch.randint(len(self.text), (batch,), **place)
        # One prompt in twenty is empty, so that guidance works too.
        text = self.text[chosen] * (torch.rand(batch, 1, 1, **place) > 0.05)
        # Clean clips first: motion is learned from them, and kept when the flaws set in.
        share = min(1.0, max(0.0, 5 * self.step / self.options.steps - 1.0))
        clips = mid_clips.flawed(self.asked.take(chosen), self.draw, share)
        x0 = 2 * clips.permute(0, 4, 1, 2, 3) - 1
        u = torch.rand(batch, **place)
        s = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)  # more time at the noisy end: layout first
        noise = torch.randn(x0.shape, **place)
        noisy = (1 - s) * x0 + s * noise
        pred = toy.predict(self.model, noisy, 1000 * s.flatten(), {"text": text})
        return (pred.float() - (noise - x0)).square().mean()

    def update(self, bf16: bool) -> Tensor:
        """One step; returns its loss."""
        rate = min(1.0, (self.step + 1) / 100) * self.options.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.step / self.options.steps))
        with torch.autocast(self.draw.device.type, torch.bfloat16, enabled=bf16):
            loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.998, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        self.step += 1
        return loss.detach()

    def check(self, prompts: list[str]) -> str:
        """Mean scores of the average's clips, one per prompt."""
        clips = sampled(self.average, prompts, list(range(len(prompts))))
        return " ".join(f"{k} {v.mean():.2f}" for k, v in judge_all(prompts, clips).items())


def pretrain(output: Path, options: Options, bf16: bool | None = None) -> None:
    """Trains with AdamW, cosine decay after a short warm-up, and writes the EMA weights in bf16.

    bf16: under autocast; None: on a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = device.type == "cuda" if bf16 is None else bf16
    partial, run = output.with_name(output.name + ".partial"), Pretraining(options, device)
    state = partial / "state.pt"
    if state.exists():
        run.take_up(state)
    count = sum(p.numel() for p in run.model.parameters())
    total = options.steps * options.batch * training_flops(run.model)
    print(f"{count:,} parameters on {device}, {total:.1e} operations in all", flush=True)
    mean, taken, start = 0.0, 0, time.time()
    while run.step < options.steps:
        loss, taken = run.update(bf16), taken + 1
        mean += (loss - mean) / min(taken, 100)
        if run.step % SAVE_STEPS == 0 or run.step == options.steps:
            run.save(state)
            said = f"step {run.step} loss {mean:.4f} {run.check(PAIR_PROMPTS[:24])}"
            print(f"{said} {time.time() - start:.0f} s", flush=True)
    print("never seen:", run.check(NEVER_SEEN[:48]), flush=True)
    toy.save(run.average, partial / "base")
    os.replace(partial / "base", output)
    shutil.rmtree(partial)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that must not exist yet")
    parser.add_argument("--bf16", action="store_true", default=None, help="autocast on a CPU too")
    for f in fields(Options):
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    found = vars(parser.parse_args(arguments))
    output, bf16 = found.pop("output"), found.pop("bf16")
    if output.exists():
        parser.error(f"--output {output} is there already: delete it, or choose another one")
    pretrain(output, Options(**found), bf16)


if __name__ == "__main__":
    main()
