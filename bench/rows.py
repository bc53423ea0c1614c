"""What a row of bench.step says of a variant that was timed, and the table that rows make."""

import math
from collections.abc import Callable

import torch

from bench import timing
from bench.architectures import PEAK
from bench.meters import Power
from bench.variants import Ours, Setting, Usual


def describe(
    variant: Usual | Ours, taken: timing.Timing, first: timing.Timing | None, setting: Setting
) -> dict[str, object]:
    """Seconds a pair, their parts, MFU; first: B1's."""
    pairs, parts = setting.pairs, variant.clock.medians()
    split = {name: parts.get(name) for name in ("reference", "forward", "optimizer")}
    if variant.cached:
        split["reference"] = 0.0
    if None not in split.values():
        split["backward"] = max(0.0, taken.median - sum(split.values()))
    flops = setting.arch.pair_flops(setting.shape, online=not variant.cached)
    low, high = taken.quartiles
    counted = setting.device.type == "cuda" and setting.adapters == "all"
    mfu = flops * pairs / taken.median / PEAK if counted else None
    without = [graph.why_not for graph in variant.graphs if graph.why_not]
    return {
        "what": without[0] if without else variant.what,
        "s_per_pair": taken.median / pairs,
        "s_per_pair_quartiles": [low / pairs, high / pairs],
        "times_faster_than_B1": first and first.times_slower_than(taken),
        "split": {name: v if v is None else v / pairs for name, v in split.items()},
        "mfu": mfu,
    }


def energy(call: Callable, seconds: float, setting: Setting, power: Power) -> float | None:
    """Pairs per kWh, over at least 1.5 seconds: the counter moves every tenth."""
    steps = max(1, math.ceil(1.5 / seconds))
    torch.cuda.synchronize()
    before = power.joules()
    for _ in range(steps):
        call()
    torch.cuda.synchronize()
    spent = power.joules() - before
    return round(3.6e6 * steps * setting.pairs / spent, 1) if spent else None


def print_table(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(
        f"{first['family']} {first['shape']}, {first['tokens']} tokens, {first['pairs']} pair(s) a"
        f" step, {first['dtype']}; adapters {first['adapters']}; attention {first['attention']}"
        f" {first.get('attention_kernel', '')}\n{first['device']}, {first['threads']} threads,"
        f" torch {first['torch']}, commit {first['commit']}"
    )
    heads = ("s/pair", "quartiles", "x B1", "ref", "fwd", "bwd", "opt", "peak GB", "MFU", "/kWh")
    heads += ("pred. s", "pred. GB") if "predicted_gb" in first else ()
    print(f"{'variant':<32} {heads[0]:>8} {heads[1]:>17} {heads[2]:>6}", end="")
    print("".join(f" {head:>7}" for head in heads[3:]))
    for row in rows:
        if "left_out" in row:
            print(f"{row['variant']:<32} {row['left_out']}")
            continue
        low, high = row["s_per_pair_quartiles"]
        print(f"{row['variant']:<32} {row['s_per_pair']:8.4f} {low:8.4f} {high:8.4f}", end="")
        times = row["times_faster_than_B1"]
        print(f" {'-' if times is None else format(times, '.2f'):>6}", end="")
        values = [row["split"].get(part) for part in ("reference", "forward", "backward")]
        values += [row["split"].get("optimizer"), row["peak_gb"], row["mfu"], row["pairs_per_kwh"]]
        values += [row[name] for name in ("predicted_s", "predicted_gb") if name in row]
        print("".join(f" {'-' if v is None else format(v, '.3g'):>7}" for v in values))
    by_name = {row["variant"]: row for row in rows if "s_per_pair" in row}
    saved = [by_name.get(n, {}).get("activation_bytes") for n in ("deferred/none", "joint/none")]
    if all(saved):
        print(f"activations held, deferred over joint: {saved[0] / saved[1]:.2f} (goal <= 0.6)")
    cached = [row for name, row in by_name.items() if "+cached" in name]
    if cached and "B0" in by_name:
        best = min(cached, key=lambda row: row["s_per_pair"])
        ratio = by_name["B0"]["s_per_pair"] / best["s_per_pair"]
        print(f"cached over B0: {ratio:.2f}x ({best['variant']}; goal on a CPU >= 1.2)")
