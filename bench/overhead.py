"""Microseconds a call of each operator costs beside its work: `python -m bench.overhead`

On tensors too small to matter: the pybind11 function alone, the torch operator (checks, allocation,
dispatch), the operator recorded by autograd, that and its backward, and the PyTorch lines it stands
for. Calls are timed in batches of 100; on a GPU without waiting for it. Last the loop's own part:
the next batch of sets of 1e2 to 1e6 pairs, which must not grow with the set, and the slowest of the
twelve batches around an epoch's end, where the next epoch's order is drawn.
"""

import time
from collections.abc import Callable

import torch

import fastpref
from bench import timing
from bench.pair_loss import mean_squares
from fastpref import oracle
from fastpref.loss import native
from fastpref.pairs.dataset import Pair, batches

CALLS = 100
SIZES = (10**2, 10**4, 10**6)


def variants(device: torch.device) -> dict[str, Callable[[], object]]:
    pred, ref, target = (torch.randn(2, 64, device=device).bfloat16() for _ in range(3))
    learned = pred.clone().requires_grad_()
    pair_id, index = torch.tensor([[7], [0]], device=device)
    one = torch.ones(1, device=device)
    objective = fastpref.objective("dpo", beta=2000.0)
    hyper = objective.hyper_tensor(device)
    op = torch.ops.fastpref
    no_draws = (0, None, None, None, None)
    err = torch.empty(2, dtype=torch.float64, device=device)

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return op.pair_loss(policy, target, ref, None, hyper, None, None, 0, False, *no_draws)[0]

    def eager(policy: torch.Tensor) -> torch.Tensor:
        errors, ref_errors = mean_squares(policy, target), mean_squares(ref, target)
        return oracle.loss(objective, *errors.chunk(2), *ref_errors.chunk(2)).mean()

    def public(policy: torch.Tensor) -> torch.Tensor:
        return fastpref.preference_loss(policy, target, ref, objective).loss

    def backward(call: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(learned), learned)

    calls: dict[str, Callable[[], object]] = {
        "pair_error: op": lambda: op.pair_error(pred, target, *no_draws),
        "pair_error: eager": lambda: mean_squares(pred, target),
        "add_noise: op": lambda: op.add_noise(target, pair_id, index, one, one, 1),
        "add_noise: eager": lambda: target * one + torch.randn_like(target) * one,
        "pair_loss: op": lambda: loss(pred),
        "pair_loss: op, recorded": lambda: loss(learned),
        "pair_loss: op, backward": backward(loss),
        "preference_loss: backward": backward(public),
        "pair_loss: eager": lambda: eager(pred),
        "pair_loss: eager, recorded": lambda: eager(learned),
        "pair_loss: eager, backward": backward(eager),
    }
    kernels = native.launchers(pred, pred.dtype)
    if kernels is not None:
        workspace = native.workspace_of(kernels, (2, 2, 2, 64), False, pred)
        place = 0 if workspace is None else workspace.data_ptr()
        calls["pair_error: direct"] = lambda: kernels.pair_error(
            2, 2, 2, 64, pred.data_ptr(), 0, 1, target.data_ptr(), 1, 0, 0, 0, 0, 0,
            err.data_ptr(), 0, place, 0, native.last(pred),
        )  # fmt: skip
    return calls


class Made:
    """A set of as many pairs as asked for, each of 64 numbers, made when it is read."""

    def __init__(self, pairs: int) -> None:
        self.shapes = ["64"] * pairs

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: int) -> Pair:
        latents = torch.full((1, 1, 8, 8), float(i))
        return Pair(latents, -latents, {"text": latents[0, 0]}, 1.0, i, "")


def loaders() -> dict[str, Callable[[], object]]:
    """The next batch of 8 pairs, within an epoch whose order is there."""
    calls = {}
    for pairs in SIZES:
        stream = batches(Made(pairs), 8, seed=0, num_workers=2)
        next(stream)
        calls[f"next batch of {pairs:,} pairs"] = stream.__next__
    return calls


def epoch_end(made: Made) -> float:
    """Seconds of the slowest of twelve batches of 8 pairs, an epoch's end in the middle of them."""
    stream = batches(made, 8, seed=0, start=len(made) // 8 - 6, num_workers=2)
    next(stream)  # passes over what comes before, as a resumed run does once
    slowest = 0.0
    for _ in range(12):
        begin = time.perf_counter()
        next(stream)
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest


def epoch_ends(rounds: int) -> dict[str, timing.Timing]:
    sets = {f"epoch's end of {pairs:,} pairs": Made(pairs) for pairs in SIZES}
    return {
        name: timing.Timing(tuple(epoch_end(made) for _ in range(rounds)))
        for name, made in sets.items()
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(arguments)
    calls = variants(args.device) | loaders()
    batches = {name: repeated(call) for name, call in calls.items()}
    # The wall clock for every device: what is measured is the host.
    timings = timing.interleave(batches, torch.device("cpu"), rounds=args.rounds, warmup=1)
    taken = {name: (found, CALLS) for name, found in timings.items()}
    taken |= {name: (found, 1) for name, found in epoch_ends(args.rounds).items()}
    facts = timing.environment(args.device)
    rows = [
        {
            "bench": "overhead",
            "call": name,
            "us": round(found.median / calls * 1e6, 2),
            "us_quartiles": [round(q / calls * 1e6, 2) for q in found.quartiles],
            **facts,
        }
        for name, (found, calls) in sorted(taken.items())
    ]
    print(f"microseconds a call; {facts['device']}, torch {facts['torch']}")
    for row in rows:
        low, high = row["us_quartiles"]
        print(f"{row['call']:<28} {row['us']:8.2f}  ({low:.2f} to {high:.2f})")
    timing.append(args.output, rows)


if __name__ == "__main__":
    main()
