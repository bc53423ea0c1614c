"""What one prediction for both members of a pair saves SPO's step: `python -m bench.spo`

    python -m bench.spo                                   a tiny Wan, float32
    python -m bench.spo --family wan --device cuda        Wan2.1-1.3B, true architecture, bf16

A pair that shares x_t asks policy and reference once (one); as other trainers write it, once for
each member (two). Parts of a pair's step: the forwards of both, and the whole with its backward;
with guidance, as SPO trains, and without. Both forms give the same gradient before they are timed.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import peft
import torch
from torch import Tensor, nn

import fastpref
from bench import timing
from bench.architectures import ARCHITECTURES, Architecture
from fastpref import models
from fastpref.spo.grid import network_times, steps
from fastpref.spo.resampler import Transition
from fastpref.spo.step import Batch, collate, step_loss
from fastpref.step import reference
from fastpref.step.guidance import guided

RANK, STEPS, AT = 16, 20, 10
SPO = fastpref.objective("spo", beta=10.0)


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--family", choices=list(ARCHITECTURES), default="tiny")
    parser.add_argument("--shape", help="FRAMESxHEIGHTxWIDTH; default: the family's")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    args = parser.parse_args(arguments)
    facts, arch = timing.environment(args.device), ARCHITECTURES[args.family]
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    shape = args.shape or arch.shape
    print(f"{args.family} {shape}, {args.pairs} pairs; {facts['device']}, torch {facts['torch']}")
    print(
        f"{'guidance':<10} {'part':<10} {'one':>10} {'two':>10} {'two / one':>10}   seconds a pair"
    )
    family = models.family(arch.family)
    model = adapted(arch, family, args.device, dtype)
    for scale in (1.0, 5.0):
        calls = variants(arch, family, model, shape, scale, args.pairs, args.device, dtype)
        for part, (one, two) in calls.items():
            found = timing.interleave({"one": one, "two": two}, args.device, rounds=args.rounds)
            ratio = found["two"].times_slower_than(found["one"])
            seconds = {name: taken.median / args.pairs for name, taken in found.items()}
            line = " ".join(f"{seconds[name]:10.4g}" for name in ("one", "two"))
            print(f"{scale:<10g} {part:<10} {line} {ratio:10.2f}", flush=True)
            row = {"bench": "spo", "family": args.family, "shape": shape, "pairs": args.pairs}
            row |= {"guidance_scale": scale, "part": part, "s_per_pair": seconds}
            timing.append(args.output, [row | {"two_over_one": ratio, **facts}])


def apart(batch: Batch) -> Batch:
    """The same pairs, a row for each member: as if they shared no x_t."""
    cond = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in batch.cond.items()}
    return batch._replace(x=torch.cat([batch.x] * 2), t=batch.t.repeat(2), cond=cond)


def adapted(
    arch: Architecture, family: ModuleType, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """With adapters on every block that say something."""
    model = arch.make(device, dtype)
    lora = peft.LoraConfig(r=RANK, target_modules=family.LORA_TARGETS, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.02 * torch.randn_like(p, dtype=torch.float32)
    return model


def variants(
    arch: Architecture,
    family: ModuleType,
    model: nn.Module,
    shape: str,
    scale: float,
    pairs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, tuple[Callable[[], object], ...]]:
    """By part the calls (one, two)."""
    process = family.process(arch.scheduler)
    sampler = steps(process, network_times(process, arch.scheduler, STEPS))
    latent = arch.latent(shape)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    made = [Transition(AT, i, normal(1, *latent), normal(2, *latent), 1.0) for i in range(pairs)]
    cond = {"text": normal(pairs, *arch.text).to(dtype)}
    empty = {"text": normal(*arch.text).to(device, dtype)}
    one = collate(made, sampler, cond, device, dtype)
    batches = (one, apart(one))

    def predict(model: nn.Module, *inputs: object) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return family.predict(model, *inputs)

    # No prefix is shared here: adapters are on every block.
    policy, says = reference.of_run(model, None, guided(predict, empty, scale), shared=False)
    trains = [p for p in model.parameters() if p.requires_grad]

    def forward(batch: Batch) -> Tensor:
        return step_loss(policy, says, batch, SPO).loss

    def whole(batch: Batch) -> None:
        for p in trains:
            p.grad = None
        forward(batch).backward()

    gradients = []
    for batch in batches:
        whole(batch)
        gradients.append(torch.cat([p.grad.double().flatten() for p in trains]))
    off = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    assert off < (1e-4 if dtype == torch.float32 else 0.05), f"the gradients differ by {off:.2g}"
    parts = {"forwards": forward, "step": whole}
    return {name: tuple(partial(call, batch) for batch in batches) for name, call in parts.items()}


if __name__ == "__main__":
    main()
