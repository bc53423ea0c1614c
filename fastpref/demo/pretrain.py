"""Makes the shipped base checkpoint: `python -m fastpref.demo.pretrain`, six minutes on 2 cores.

Flow matching on flawed clips, so that the base model follows its prompts but not well: there is
something to prefer.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import toy
from . import clips


def encode(prompts: list[str]) -> Tensor:
    """Text embeddings [N, SLOTS, TEXT_DIM]."""
    return torch.stack([c["text"] for c in toy.encode_text(toy.pipeline(""), prompts)])


@torch.no_grad()
def check(model: nn.Module, prompts: list[str], seed: int = 1, steps: int = 20) -> dict[str, float]:
    """Mean judge scores of Euler samples, one per prompt."""
    x = torch.randn(
        len(prompts),
        3,
        clips.FRAMES,
        clips.SIZE,
        clips.SIZE,
        generator=torch.Generator().manual_seed(seed),
    )
    text = encode(prompts)
    for i in range(steps, 0, -1):
        t = torch.full((len(prompts),), 1000.0 * i / steps)
        x = x - toy.predict(model, x, t, {"text": text}) / steps
    videos = [toy.decode(toy.pipeline(""), sample) for sample in x]
    scores = [clips.judge(p, v) for p, v in zip(prompts, videos, strict=True)]
    return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}


def pretrain(output: Path, steps: int, seed: int = 0, batch: int = 32, rate: float = 2e-3) -> None:
    """Trains with AdamW, cosine decay after a short warm-up, and writes the EMA weights in bf16."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = WanTransformer3DModel(**toy.CONFIG)
    with torch.no_grad():
        for block in model.blocks:
            # Wan's gates of self-attention and feed-forward start near 0; open, motion is learned
            # in a fraction of the steps.
            block.scale_shift_table[:, [2, 5]] += 1
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    table = encode(clips.PRETRAINING_PROMPTS)
    running, start = 0.0, time.time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(clips.PRETRAINING_PROMPTS), (batch,), generator=draw).tolist()
        prompts = [clips.PRETRAINING_PROMPTS[i] for i in chosen]
        text = table[chosen]
        # One prompt in twenty is empty, so that guidance works too.
        text = text * (torch.rand(batch, 1, 1, generator=draw) > 0.05)
        # Clean clips first: motion is learned from them, and kept when the flaws set in.
        share = min(1.0, max(0.0, 5 * step / steps - 1.0))
        x0 = 2 * clips.flawed(prompts, draw, share).permute(0, 4, 1, 2, 3) - 1
        u = torch.rand(batch, generator=draw)
        s = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)  # more time at the noisy end: layout first
        noise = torch.randn(x0.shape, generator=draw)
        noisy = (1 - s) * x0 + s * noise
        pred = toy.predict(model, noisy, 1000 * s.flatten(), {"text": text})
        loss = (pred - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value.detach(), 1 - decay)
        running += (loss.item() - running) / min(step + 1, 100)
        if (step + 1) % 200 == 0:
            parts = check(model, clips.PAIR_PROMPTS[::2])
            shown = " ".join(f"{k} {v:.2f}" for k, v in parts.items())
            took = time.time() - start
            print(f"step {step + 1} loss {running:.4f} {shown} {took:.0f} s", flush=True)
    model.load_state_dict(average)
    for name, prompts in (("pairs", clips.PAIR_PROMPTS), ("never seen", clips.NEVER_SEEN * 6)):
        scores = check(model.eval(), prompts)
        print(name, {k: round(v, 3) for k, v in scores.items()}, flush=True)
    toy.save(model, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.steps, arguments.seed)
