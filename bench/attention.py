"""Attention's kernels, forward and backward, on the steps' shapes: `python -m bench.attention`

    python -m bench.attention --families wan cogvideox-2b        self-attention of one sample, bf16
    python -m bench.attention --shape 17x256x256                 of other clips
    python -m bench.attention --device cpu                       a tiny shape: the plumbing

Every attention backend that is at hand and agrees with native attention; the others are
named with the reason. Backends take turns; ms are medians, on a GPU its own time. TFLOP/s counts
two products forward and five backward. off: how far output and gradients are at most from float32
attention on the same numbers, relative to their norms, with inputs of size 1 and 16 (a kernel may
be right at one size alone). kernel: the longest of the forward.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench import timing
from bench.architectures import ARCHITECTURES
from bench.meters import attention_kernel
from fastpref.step import backends
from fastpref.step.backends import BACKENDS, SCALES, Call

FAMILIES = ("wan", "cogvideox-2b")
ROWS = 4096  # queries at a time in float32: their scores are what takes the memory


def self_attention(family: str, shape: str | None, device: torch.device) -> Call:
    """Of one sample in a block of the family."""
    arch = ARCHITECTURES[family]
    heads = arch.config["num_attention_heads"]
    tokens = arch.tokens(shape or arch.shape)
    return Call(1, heads, tokens, tokens, arch.dim // heads, torch.bfloat16, device)


def exact(call: Call, scale: float) -> list[Tensor]:
    """What `backends.results` gives, in float32, a head and some queries at a time."""
    q, k, v, grad = (x.detach() for x in backends.inputs(call, scale))
    out = [torch.zeros(x.shape, device=call.device) for x in (q, q, k, v)]
    for at in ((b, h) for b in range(call.batch) for h in range(call.heads)):
        key, value = (x[at].float().requires_grad_() for x in (k, v))
        for begin in range(0, call.queries, ROWS):
            rows = (*at, slice(begin, begin + ROWS))
            query = q[rows].float().requires_grad_()
            found = (query @ key.T * call.dim**-0.5).softmax(-1) @ value
            grads = torch.autograd.grad(found, (query, key, value), grad[rows].float())
            out[0][rows], out[1][rows] = found.detach(), grads[0]
            out[2][at] += grads[1]
            out[3][at] += grads[2]
    return out


def parts(name: str, call: Call) -> dict[str, Callable[[], object]]:
    """The two calls that are timed, inside `backends.serving`."""
    q, k, v, grad = backends.inputs(call)
    with backends.serving(name):
        out = backends.attend(name, q, k, v)
    return {
        "forward": lambda: backends.attend(name, q, k, v),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
    }


def measure(family: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row per backend."""
    device = args.device
    call = self_attention(family, args.shape, device)
    facts = {"bench": "attention", "family": family, "call": str(call)}
    facts |= timing.environment(device)
    rows, timed = [], {}
    truth = {scale: exact(call, scale) for scale in SCALES}
    for name in BACKENDS:
        rows.append({**facts, "backend": name})
        if name != "native":
            why = backends.why_not_here(name, device) or backends.why_not_on(call, name)
            if why:
                rows[-1]["left_out"] = why
                continue
        for scale, right in truth.items():
            off = backends.difference(backends.results(name, call, scale), right)
            rows[-1][f"off_at_{scale:g}"] = off
        rows[-1]["kernel"] = attention_kernel(call, name)
        timed[name] = parts(name, call)
    del truth
    samples: dict[tuple[str, str], list[float]] = {}
    orders = timing.orders(list(timed))
    for k in range(1 + args.rounds):
        for name in next(orders):
            with backends.serving(name):
                for part, run in timed[name].items():
                    seconds = timing.once(run, device, ahead=4_000_000)
                    if k:  # the first round warms up
                        samples.setdefault((name, part), []).append(seconds)
    products = 4.0 * call.batch * call.heads * call.queries * call.keys * call.dim
    for row in rows:
        for part, flops in (("forward", products), ("backward", 2.5 * products)):
            if taken := samples.get((row["backend"], part)):
                found = timing.Timing(tuple(taken))
                row[f"{part}_ms"] = 1e3 * found.median
                row[f"{part}_ms_quartiles"] = [1e3 * q for q in found.quartiles]
                row[f"{part}_tflops"] = flops / found.median / 1e12
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(f"{first['family']}: {first['call']}; {first['device']}, torch {first['torch']}")
    heads = ("forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "off at 1", "off at 16")
    print(f"{'backend':<10}" + "".join(f"{head:>12}" for head in heads) + "  kernel")
    names = ("forward_ms", "forward_tflops", "backward_ms", "backward_tflops")
    for row in rows:
        if "left_out" in row:
            print(f"{row['backend']:<10}  {row['left_out']}")
            continue
        line = "".join(f"{row[name]:12.4g}" for name in names)
        line += "".join(f"{row[f'off_at_{scale:g}']:12.2e}" for scale in SCALES)
        print(f"{row['backend']:<10}{line}  {row['kernel'][:60]}")


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    told = f"default: {' '.join(FAMILIES)}, tiny on a CPU"
    parser.add_argument("--families", nargs="+", choices=list(ARCHITECTURES), help=told)
    parser.add_argument("--shape", help="FRAMESxHEIGHTxWIDTH; default: each family's own")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(arguments)
    for family in args.families or (["tiny"] if args.device.type == "cpu" else FAMILIES):
        try:
            rows = measure(family, args)
        except ValueError as error:
            print(f"bench.attention: {error}")
            return 1
        print_table(rows)
        timing.append(args.output, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
