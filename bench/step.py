"""The whole step, seconds a pair, against loops as users write them: `python -m bench.step`

    python -m bench.step --family wan --shape 81x480x832         Wan2.1-1.3B, true architecture
    python -m bench.step --family wan --shape 17x256x256         where launches take the time
    python -m bench.step --adapters half                         all variants, what B1 is too
    python -m bench.step --device cpu                            a tiny model: the plumbing

Variants: the baselines B0, B1, B4, B5 (bench/baselines.py) and ours, written MODE/CHECKPOINTING and
what is added: joint/full, deferred/attention+compile, joint/none+compile+cached+graph;
deferred/none+compile+loose is compiled without the rounding of eager PyTorch, which keeps margins
free of noise: what that costs is the distance to deferred/none+compile. Every variant's gradient is
compared with B1's on the same draws before anything is timed; then all take turns in one process. A
variant that is predicted not to fit in the card's memory (bench/forecast.py) is not tried; that, or
one that does not fit, fails, or has a graph that cannot be recorded, is left out with the reason in
its row. --adapters half puts them on the upper half of the blocks in every variant, the baselines
too: what ours then gain is the shared prefix's, the lower half that policy and reference run once
(cached variants have nothing to share). --plan 80 prints the predictions for a card of 80 GiB,
without a GPU.

One call stays within --minutes: name the --variants in the order they are prepared in, the most
telling first (B1 is always before them), or call more than once. A row goes to --output as soon as
nothing in it can change, and on SIGTERM the rounds that are complete are a variant's time. The
table stands in the order of names. --inductor FILE: what is compiled goes there and is found there
by later calls, on this machine or another with the same torch and card.

Exit code 1: a variant is left out for another reason than memory or time; 3: nothing is wrong, but
there was no time for a variant.

Columns: s/pair and its quartiles; x B1, the median of the rounds' ratios; reference, forward and
optimiser (backward is the rest, with the loss and what is recomputed); peak memory of a run that
had this variant alone; MFU on useful FLOPs (nothing recomputed, adapters on all blocks alone)
against 989 TFLOP/s; pairs per kWh. All steps read the same latents: what waiting for data costs is
measured where there is a loader, by `fastpref train` (perf/data_wait_fraction).
"""

from pathlib import Path

from bench import timing
from bench.architectures import ARCHITECTURES
from bench.forecast import forecast, plan
from bench.rows import print_table
from bench.table import NO_MEMORY, NO_TIME, measure
from bench.variants import usual
from fastpref.step import backends, memory


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--family", choices=list(ARCHITECTURES), help="default: wan, tiny on a CPU")
    parser.add_argument("--shape", help="FRAMESxHEIGHTxWIDTH; default: the family's own")
    parser.add_argument("--variants", nargs="+", help="default: by device and tokens")
    parser.add_argument("--adapters", choices=["all", "half"], default="all")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--plan", metavar="CARD", help="print what is predicted for a card (GiB)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--inductor", type=Path, help="read compiled code from this file, add ours")
    parser.add_argument("--attention", default="native", choices=["auto", *backends.BACKENDS])
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16, float32 on a CPU")
    args = parser.parse_args(arguments)
    cpu = args.device.type == "cpu" and not args.plan
    args.family = args.family or ("tiny" if cpu else "wan")
    try:
        if args.plan:
            on, arch = memory.card(args.plan), ARCHITECTURES[args.family]
            names = list(dict.fromkeys(["B1", *(args.variants or usual(arch, args.shape))]))
            told = (args.family, args.shape, args.pairs, args.adapters, names)
            plan(forecast(*told, on), args.pairs, args.rounds, on)
            return 0
        rows = measure(args, args.device)
    except ValueError as error:
        print(f"bench.step: {error}")
        return 1
    print_table(rows)
    timing.append(args.output, [])
    reasons = [row["left_out"] for row in rows if "left_out" in row]
    if not all(why.startswith((NO_MEMORY, NO_TIME)) for why in reasons):
        return 1
    return 3 if any(why.startswith(NO_TIME) for why in reasons) else 0


if __name__ == "__main__":
    raise SystemExit(main())
