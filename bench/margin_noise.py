"""What rounding alone makes of the margins before the first step: `python -m bench.margin_noise`

    python -m bench.margin_noise                                 every family, tiny models
    python -m bench.margin_noise --family wan --device cuda      Wan2.1-1.3B, true architecture

Policy and reference are one model with a zero adapter, so every margin should be 0. Per pair mode
three ways to run the blocks: eager; compiled, as this package does (`compiling.AS_EAGER`); loose,
as Inductor compiles on its own. max |m|: of the pairs, in bf16 at beta 5000. What the rounding
costs in time: `python -m bench.step`, deferred/none+compile against deferred/none+compile+loose.

On a GPU a named transformer has its true size, at the smallest of its shapes; UNets stay tiny.
"""

from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import peft
import torch
from torch import Tensor, nn

import fastpref
from bench import timing
from bench.architectures import ARCHITECTURES
from fastpref import models
from fastpref.models.published import PUBLISHED, Architecture
from fastpref.pairs.dataset import Batch
from fastpref.step import compiling, reference

BETA, RANK, SEED = 5000.0, 4, 3
WAYS = {"eager": None, "compiled": {}, "loose": {"options": None}}
MODES = ("joint", "deferred")


def _cogvideox(name: str) -> Architecture:
    small = {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "time_embed_dim": 16,
        "text_embed_dim": 32, "max_text_seq_length": 6,
    }  # fmt: skip
    full = PUBLISHED[name]
    return replace(full.of(full.config | small), shape="9x64x64")


def _unet(name: str, text: int, **config: object) -> Architecture:
    config |= {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": text,
    }  # fmt: skip
    return replace(PUBLISHED[name], config=config, shape="1x64x64", text=(7, text))


POOLED = 24  # of SDXL's second text encoder
TINY = {
    "wan": ARCHITECTURES["tiny"],
    "cogvideox-2b": _cogvideox("cogvideox-2b"),
    "cogvideox-5b": _cogvideox("cogvideox-5b"),
    "sd15": _unet("sd15", 32, attention_head_dim=2),
    "sdxl": replace(
        _unet(
            "sdxl", 48, attention_head_dim=8, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=POOLED + 6 * 8,
            use_linear_projection=True, transformer_layers_per_block=(1, 2),
        ),
        pooled=POOLED,
    ),
}  # fmt: skip


def adapted(arch: Architecture, device: torch.device) -> nn.Module:
    """The architecture with adapters that say nothing yet, as training puts them in."""
    model = arch.make(device, torch.bfloat16)
    targets = models.family(arch.family).LORA_TARGETS
    lora = peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights="gaussian")
    peft.inject_adapter_in_model(lora, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def batch_of(arch: Architecture, index: int, device: torch.device) -> Batch:
    """One pair of noise that no other index has."""
    shape = arch.latent(arch.shape)
    random = torch.Generator(device).manual_seed(index)
    draw = partial(torch.randn, generator=random, device=device)
    cond = {"text": draw(1, *arch.text)}
    if arch.pooled is not None:
        cond["pooled"] = draw(1, arch.pooled)
    cond = {name: torch.cat([value] * 2).bfloat16() for name, value in cond.items()}
    ids = torch.tensor([index + 1])
    return Batch(draw(2, *shape).bfloat16(), cond, torch.ones(1), ids, [])


def largest(arch: Architecture, mode: str, way: str, pairs: int, device: torch.device) -> float:
    """max |m| of one pair mode, run in one way."""
    torch._dynamo.reset()
    family = models.family(arch.family)
    process, model = family.process(arch.scheduler), adapted(arch, device)
    if WAYS[way] is not None:
        compiling.compile_blocks(model, family.BLOCKS, **WAYS[way])

    def predict(model: nn.Module, *inputs: object) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return family.predict(model, *inputs)

    policy, says = reference.shared_prefix(model, predict)
    margins = []
    for index in range(pairs):
        batch = batch_of(arch, index, device)
        draws = fastpref.Draws(SEED, batch.pair_id, torch.zeros_like(batch.pair_id))
        w, l = reference.changes(policy, says, process, batch, draws, mode).chunk(2)
        margins.append((0.5 * BETA * (w - l)).abs().max().item())
    return max(margins)


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--family", choices=list(TINY), nargs="+", help="default: all, tiny")
    modes = "default: both, deferred of a true architecture"
    parser.add_argument("--modes", choices=MODES, nargs="+", help=modes)
    parser.add_argument("--pairs", type=int, help="default: 12, 4 of a true architecture")
    args = parser.parse_args(arguments)
    facts = timing.environment(args.device)
    print(f"bf16, beta {BETA:g}; {facts['device']}, torch {facts['torch']}")
    print(f"{'family':<14} {'mode':<10} {'run':<10} {'max |m|':>9}")
    for name in args.family or TINY:
        true = args.device.type == "cuda" and bool(args.family) and name in ARCHITECTURES
        arch = TINY[name]
        if true:
            arch = replace(ARCHITECTURES[name], shape=ARCHITECTURES[name].small[0])
        pairs = args.pairs or (4 if true else 12)
        for mode in args.modes or (["deferred"] if true else MODES):
            for way in WAYS:
                found = largest(arch, mode, way, pairs, args.device)
                print(f"{name:<14} {mode:<10} {way:<10} {found:9.3g}", flush=True)
                what = {"family": name, "model": "true" if true else "tiny", "shape": arch.shape}
                what |= {"pair_mode": mode, "run": way, "pairs": pairs, "beta": BETA}
                row = {"bench": "margin_noise", **what, "max_margin": found, **facts}
                with redirect_stdout(None):  # that rows are appended is said once
                    timing.append(args.output, [row])
    timing.append(args.output, [])


if __name__ == "__main__":
    main()
