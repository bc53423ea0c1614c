"""The loss region against PyTorch as users write it: `python -m bench.pair_loss`

Two forms, each for one pair of latents (Wan 480p and CogVideoX shapes) in bf16:
  target  given policy and reference predictions and a target tensor: the loss and the gradient by
          the policy's prediction (forward and backward).
  noise   given the latents and both predictions: draw noise (one for both members), make x_t, and
          then the same. Ours draws it again in the loss, the baselines keep it for their target.
Baselines: eager PyTorch written as DiffusionDPO writes it, and torch.compile of the very same
function. Gradients are checked against the float64 oracle before anything is timed. All variants
take turns in all orders; `x ours` is the median of the rounds' ratios, "again" ours once more.
On a GPU the inputs rotate, so that the L2 cache does not lie; `ms` is the GPU's own time, with the
whole call queued before it begins, and `wall` that of a call on an idle GPU, launches included.
GB/s counts what must be moved: each input read once, each output written once.
"bare" bounds what ours could reach around these kernels: the same two native calls and autograd,
with every address and output ready and nothing checked.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastpref
from bench import timing
from fastpref import oracle
from fastpref.loss import native
from fastpref.loss.objectives import OBJECTIVES, Objective

SHAPES = {"wan": (16, 21, 60, 104), "cogvideox": (13, 16, 60, 90)}
HYPER = {"dpo": {"beta": 2000.0}, "spo": {"beta": 10.0}}
DEFAULT_HYPER = {"beta": 500.0}
ROUNDS = 120  # all orders of five variants
GAIN = 0.1  # keeps dpo_cm and sdpo below the mask and spo inside its clamp


@dataclass
class Inputs:
    """One pair's tensors, winners first; y = eps - x0 for the target form."""

    x0: Tensor  # [2B, ...]
    pred: Tensor  # [2B, ...], [B, ...] for spo; requires a gradient
    ref: Tensor
    y: Tensor  # [2B, ...]
    sigma: Tensor  # [B] float32
    gain: Tensor | None  # [B] float64
    draws: fastpref.Draws


def make_inputs(
    objective: Objective, shape: tuple[int, ...], pairs: int, device, seed: int
) -> Inputs:
    random = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, *shape, generator=random, device=device)

    rows = pairs if objective.name == "spo" else 2 * pairs
    x0 = normal(2 * pairs)
    numbers = torch.arange(pairs, device=device)
    draws = fastpref.Draws(seed, numbers + 1, numbers * 0)
    # The target the draws give, so that both forms meet a prediction of the same quality.
    eps = oracle.normal(seed, draws.pair_id, draws.index, x0[0].numel())
    y = eps.view(pairs, *shape).repeat(2, *[1] * len(shape)) - x0
    pred = y[:rows] + 0.5 * normal(rows)
    return Inputs(
        x0=x0.bfloat16(),
        pred=pred.bfloat16().requires_grad_(),
        ref=(pred + 0.05 * normal(rows)).bfloat16(),
        y=y.bfloat16(),
        sigma=torch.full((pairs,), 0.6, device=device),
        gain=torch.full((pairs,), GAIN, dtype=torch.float64, device=device)
        if objective.needs_gain
        else None,
        draws=draws,
    )


# --- The code users write ---


def mean_squares(pred: Tensor, target: Tensor) -> Tensor:
    if len(pred) < len(target):
        pred = torch.cat((pred, pred))
    return (pred.float() - target.float()).pow(2).mean(dim=list(range(1, target.dim())))


def usual_loss(objective: Objective, i: Inputs, pred: Tensor, target: Tensor) -> Tensor:
    losses = mean_squares(pred, target)
    with torch.no_grad():
        ref_losses = mean_squares(i.ref, target)
    w, l = losses.chunk(2)
    ref_w, ref_l = ref_losses.chunk(2)
    if objective.name != "dpo":
        return oracle.loss(objective, w, l, ref_w, ref_l, i.gain).mean()
    inside = -0.5 * objective.beta * ((w - l) - (ref_w - ref_l))
    return -logsigmoid(inside).mean()


def usual_noise(i: Inputs) -> tuple[Tensor, Tensor]:
    half = i.x0[: len(i.sigma)]
    noise = torch.randn_like(half)
    noise = torch.cat((noise, noise))
    sigma = i.sigma.to(i.x0.dtype).repeat(2).view(-1, *[1] * (i.x0.dim() - 1))
    return (1 - sigma) * i.x0 + sigma * noise, noise - i.x0


def usual_target_form(objective: Objective, i: Inputs) -> Tensor:
    return usual_loss(objective, i, i.pred, i.y)


def usual_noise_form(objective: Objective, i: Inputs) -> tuple[Tensor, Tensor]:
    noisy, target = usual_noise(i)
    return usual_loss(objective, i, i.pred, target), noisy


# --- Ours ---


def our_target_form(objective: Objective, i: Inputs) -> Tensor:
    return fastpref.preference_loss(i.pred, i.y, i.ref, objective, gain=i.gain).loss


def our_noise_form(objective: Objective, i: Inputs) -> tuple[Tensor, Tensor]:
    noisy = fastpref.add_noise(i.x0, i.draws, 1 - i.sigma, i.sigma)
    target = fastpref.Target(i.x0, i.draws, torch.ones_like(i.sigma), -torch.ones_like(i.sigma))
    return fastpref.preference_loss(i.pred, target, i.ref, objective, gain=i.gain).loss, noisy


def gradient(form: Callable, objective: Objective, i: Inputs) -> Tensor:
    result = form(objective, i)
    loss = result[0] if isinstance(result, tuple) else result
    return torch.autograd.grad(loss, i.pred)[0]


def check(name: str, form: Callable, objective: Objective, i: Inputs) -> None:
    """Compare with the float64 oracle: bf16 and a float32 margin allow for 3 %."""
    pred = i.pred.detach().double().requires_grad_()
    err_w, err_l = oracle.pair_error(pred, i.y).chunk(2)
    ref_w, ref_l = oracle.pair_error(i.ref, i.y).chunk(2)
    loss = oracle.loss(objective, err_w, err_l, ref_w, ref_l, i.gain).mean()
    (true,) = torch.autograd.grad(loss, pred)
    got = gradient(form, objective, i).double()
    off = ((got - true).norm() / true.norm()).item()
    if not (off < 0.03 and true.norm() > 0):
        raise SystemExit(f"bench.pair_loss: the gradient of {name} is off by {off:.2%}")


def variants(device: torch.device) -> dict[str, dict[str, Callable]]:
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    forms = {
        "target": {"ours": our_target_form, "eager": usual_target_form},
        "noise": {"ours": our_noise_form, "eager": usual_noise_form},
    }
    for calls in forms.values():
        calls["compile"] = compiled(calls["eager"])
        if device.type == "cuda":
            options = {"triton.cooperative_reductions": True}
            calls["compile+coop"] = compiled(calls["eager"], options=options)
        calls["again"] = calls["ours"]
    return forms


# --- The bound of ours: what no wrapping of the kernels can do without ---


def bare(objective: Objective, i: Inputs) -> Callable[[], Tensor]:
    """The gradient by the two calls of the core in an autograd function, all else ready before."""
    pred, element = i.pred.detach(), native.DTYPES[i.pred.dtype]
    core = native.launchers(pred, pred.dtype)
    rows, pairs, pred_rows = len(i.y), len(i.sigma), len(pred)
    shape = (pairs, pred_rows, i.y[0].numel())
    hyper, grad = objective.hyper_tensor(pred.device), torch.empty_like(pred)
    loss, pair_loss, margin = (native.empty(pred, pairs) for _ in range(3))
    err, ref_err, importance, coef = (native.empty(pred, rows) for _ in range(4))
    workspace = native.workspace_of(core, (rows, *shape), True, pred)

    def at(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, _):
            core.pair_loss(
                *shape, at(pred), at(i.ref), element, at(i.y), element, 0, 0, 0, 0, 0, at(err),
                at(ref_err), at(workspace), objective.number, at(hyper), at(i.gain), 0, at(loss),
                at(pair_loss), at(margin), at(importance), at(coef), 0, 0, native.last(pred),
            )  # fmt: skip
            return loss[0].clone()

        @staticmethod
        def backward(ctx, _):
            core.pair_grad(
                rows, *shape, at(pred), element, at(i.y), element, 0, 0, 0, 0, 0, at(coef), 0,
                2.0 / rows, at(grad), native.last(pred),
            )  # fmt: skip
            return grad

    def run() -> Tensor:
        return torch.autograd.grad(Bare.apply(i.pred), i.pred)[0]

    if not torch.equal(run(), gradient(our_target_form, objective, i)):
        raise SystemExit("bench.pair_loss: the gradient of bare is not ours")
    return run


def moved(form: str, i: Inputs) -> int:
    """Bytes: predictions, target (or x0) and gradient; in the noise form x0 and x_t as well."""
    tensors = [i.pred, i.ref, i.y, i.pred] + [i.x0, i.x0] * (form == "noise")
    return sum(t.nbytes for t in tensors)


def measure(args: argparse.Namespace, shape: str) -> list[dict[str, object]]:
    device: torch.device = args.device
    objective = fastpref.objective(args.objective, **HYPER.get(args.objective, DEFAULT_HYPER))
    sets = [
        make_inputs(objective, SHAPES[shape], args.pairs, device, seed)
        for seed in range(8 if device.type == "cuda" else 1)
    ]
    rows = []
    for form, calls in variants(device).items():
        for name, call in calls.items():
            if form == "target" or name == "ours":  # the baselines' noise is another one
                check(name, call, objective, sets[0])
        turns = {name: cycle(sets) for name in calls}
        turned = {
            name: lambda call=call, turn=turns[name]: gradient(call, objective, next(turn))
            for name, call in calls.items()
        }
        if form == "target":
            bound = cycle([bare(objective, i) for i in sets])
            turned["bare"] = lambda bound=bound: next(bound)()
        timings = walls = timing.interleave(turned, device, rounds=args.rounds, busy=True)
        if device.type == "cuda":
            walls = timing.interleave(turned, device, rounds=args.rounds)
        for name, taken in timings.items():
            low, high = taken.quartiles
            rows.append(
                {
                    "bench": "pair_loss",
                    "shape": shape,
                    "pairs": args.pairs,
                    "objective": objective.name,
                    "form": form,
                    "variant": name,
                    "ms": round(taken.median * 1e3, 4),
                    "ms_quartiles": [round(low * 1e3, 4), round(high * 1e3, 4)],
                    "ratio": round(taken.times_slower_than(timings["ours"]), 3),
                    "wall_ms": round(walls[name].median * 1e3, 4),
                    "wall_ratio": round(walls[name].times_slower_than(walls["ours"]), 3),
                    "gb_s": round(moved(form, sets[0]) / taken.median / 1e9, 1),
                    "rounds": args.rounds,
                    **timing.environment(device),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--objective", default="dpo", choices=list(OBJECTIVES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(arguments)
    rows = [row for shape in args.shapes for row in measure(args, shape)]
    first = rows[0]
    print(
        f"{first['objective']}, {args.pairs} pair, bf16, forward and backward; {first['device']},"
    )
    print(f"{first['threads']} threads, {first['cpu_features']}, torch {first['torch']}")
    print(f"{'shape':<10} {'form':<7} {'variant':<13} {'ms':>8} {'quartiles':>17}", end="")
    print(f" {'x ours':>7} {'GB/s':>7} {'wall ms':>8} {'x ours':>7}")
    for row in rows:
        low, high = row["ms_quartiles"]
        print(
            f"{row['shape']:<10} {row['form']:<7} {row['variant']:<13} {row['ms']:8.3f}"
            f" {low:8.3f} {high:8.3f} {row['ratio']:7.2f}"
            f" {row['gb_s']:7.1f} {row['wall_ms']:8.3f} {row['wall_ratio']:7.2f}"
        )
    timing.append(args.output, rows)


if __name__ == "__main__":
    main()
