"""The truth the tests compare with: objectives, errors and draws in plain PyTorch, on any device.

Written from the formulas, independently of csrc/; it also serves the ops where nothing is compiled.
Everything is differentiable by autograd; importance weights are detached, as defined.
"""

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import logsigmoid


class Hyper(NamedTuple):
    """An objective's numbers as 0-d tensors, in the order of `Hyper` in csrc/objectives.h."""

    beta: Tensor
    label_smoothing: Tensor
    alpha: Tensor
    clip: Tensor
    mask_threshold: Tensor
    combine: Tensor  # 0 max, 1 min, 2 mean
    inverse_weight: Tensor
    sft_weight: Tensor
    placement: Tensor  # 0 ratio, 1 loss
    safeguard: Tensor


class Objective(Protocol):
    """What `loss` reads of an objective (fastpref.objectives has them)."""

    @property
    def number(self) -> int: ...
    def hyper_tensor(self, device: torch.device) -> Tensor: ...


# --- Objectives: each takes hyper, four errors [B] and the gain [B] and returns (loss, margin). ---


def margin(
    beta: Tensor | float, err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor
) -> Tensor:
    """m = -(beta/2) ((e_w - r_w) - (e_l - r_l)), the implicit reward difference."""
    return -0.5 * beta * ((err_w - ref_w) - (err_l - ref_l))


def importance(err: Tensor, gain: Tensor) -> Tensor:
    """wbar = exp(-g e / 2), detached: the importance weight of one reverse step, per dimension."""
    return torch.exp(-0.5 * gain * err.detach())


def _smoothed(m: Tensor, s: Tensor) -> Tensor:
    return -(1 - s) * logsigmoid(m) - s * logsigmoid(-m)


def _kept(wbar: Tensor, h: Hyper) -> Tensor:
    return ~(wbar < h.mask_threshold)  # a NaN is kept, and so reaches the loss


def _clip(x: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    # Not torch.clamp, whose gradient at the very edge depends on torch's version; a NaN passes.
    return torch.where(x < lo, lo, torch.where(x > hi, hi, x))


def _clipped(wbar: Tensor, h: Hyper) -> Tensor:
    # clamp will do here: wbar is detached, nobody asks for its gradient at the edge.
    return wbar.clamp(1 - h.clip, 1 + h.clip)


def _dpo(h, e_w, e_l, r_w, r_l, gain):
    m = margin(h.beta, e_w, e_l, r_w, r_l)
    return _smoothed(m, h.label_smoothing), m


def _ipo(h, e_w, e_l, r_w, r_l, gain):
    return ((e_l - r_l) - (e_w - r_w) - 0.5 / h.beta) ** 2, margin(h.beta, e_w, e_l, r_w, r_l)


def _hinge(h, e_w, e_l, r_w, r_l, gain):
    m = margin(h.beta, e_w, e_l, r_w, r_l)
    return _clip(1 - m, 0.0, torch.inf), m


def _dmpo(h, e_w, e_l, r_w, r_l, gain):
    m = margin(h.beta, e_w, e_l, r_w, r_l)
    right, wrong = logsigmoid(m), logsigmoid(-m)
    # exp(log sigma) rather than sigma, whose autograd (1 - y) y is lost to rounding in the tails.
    return right.exp() * (right - torch.log1p(-h.alpha)) + wrong.exp() * (wrong - h.alpha.log()), m


def _dpo_cm(h, e_w, e_l, r_w, r_l, gain):
    bar_w, bar_l = importance(e_w, gain), importance(e_l, gain)
    kept_w, kept_l = _kept(bar_w, h), _kept(bar_l, h)
    c_w, c_l = _clipped(bar_w, h) * kept_w, _clipped(bar_l, h) * kept_l
    outside = h.placement == 1
    weighted = -0.5 * h.beta * (c_w * (e_w - r_w) - c_l * (e_l - r_l))
    m = torch.where(outside, margin(h.beta, e_w, e_l, r_w, r_l), weighted)
    scale = torch.where(outside, (c_w + c_l) / 2, (kept_w | kept_l).to(m.dtype))
    return _smoothed(m, h.label_smoothing) * scale, m


def _sdpo(h, e_w, e_l, r_w, r_l, gain):
    bar_w, bar_l = importance(e_w, gain), importance(e_l, gain)
    mean_or_min = torch.where(h.combine == 2, (bar_w + bar_l) / 2, torch.minimum(bar_w, bar_l))
    wbar = torch.where(h.combine == 0, torch.maximum(bar_w, bar_l), mean_or_min)
    c = _clipped(wbar, h)
    c = torch.where(h.inverse_weight != 0, 1 / c, c)
    on_ratio = torch.where(h.placement == 0, c, 1.0)
    m = on_ratio * margin(h.beta, e_w, e_l, r_w, r_l)
    return _kept(wbar, h) * (c / on_ratio) * _smoothed(m, h.label_smoothing), m


def _spo(h, e_w, e_l, r_w, r_l, gain):
    lo, hi = torch.log1p(-h.clip), torch.log1p(h.clip)
    rho_w, rho_l = (_clip(-0.5 * gain * d, lo, hi) for d in (e_w - r_w, e_l - r_l))
    m = h.beta * (rho_w - rho_l)
    return -logsigmoid(m), m


# By number: in the order of csrc/objectives.h and of fastpref.objectives.OBJECTIVES.
OBJECTIVES = (_dpo, _ipo, _hinge, _dmpo, _dpo_cm, _sdpo, _spo)
_WEIGHTED = (_dpo_cm, _sdpo)


def _evaluate(
    number: int, h: Hyper, err_w: Tensor, err_l: Tensor, ref_w: Tensor, ref_l: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    value, m = OBJECTIVES[number](h, err_w, err_l, ref_w, ref_l, gain)
    # 1, or NaN where an input is not finite: a mask or a saturated sigmoid must not hide it.
    finite = 1 + sum(0 * e.detach() for e in (err_w, err_l, ref_w, ref_l, gain))
    return (value + h.sft_weight * err_w) * finite, m


def loss(
    objective: Objective,
    err_w: Tensor,
    err_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    gain: Tensor | float | None = None,
) -> Tensor:
    """The pairs' losses [B] with the SFT term, unweighted, from the four errors [B].

    gain is the importance gain g of dpo_cm and sdpo, or k of spo; the others ignore it.
    Formulas and sources: `fastpref.objectives`. Not finite where an error or the gain is not.
    """
    hyper = objective.hyper_tensor(err_w.device)
    gain = torch.as_tensor(0.0 if gain is None else gain, dtype=err_w.dtype, device=err_w.device)
    return _evaluate(objective.number, Hyper(*hyper), err_w, err_l, ref_w, ref_l, gain)[0]


def _same(tensor: Tensor) -> Tensor:
    return tensor


# The thread's dispatch state outside any op, as it is at import.
_DISPATCH = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def epilogue(
    number: int,
    hyper: Tensor,
    err: Tensor,
    ref_err: Tensor,
    gain: Tensor | None,
    weight: Tensor | None,
    cross: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mean loss [], pair_loss [B], margin [B], importance [2B], lambda [B], coef [2B]).

    err, ref_err [2B], winners first; pair_loss carries the weight. coef = d pair_loss / d err, the
    losers' times lambda, the safeguard's by cross = <R_w, R_l> / D [B]; without one lambda is [0].
    Nothing returned has a graph.
    """
    gain = torch.zeros_like(ref_err[: len(ref_err) // 2]) if gain is None else gain
    weight = torch.ones_like(gain) if weight is None else weight
    # What is saved here for a moment is no business of the caller's hooks, least of all of a
    # checkpoint's, which would run its region again. (torch.func.grad refuses to work under hooks,
    # and inside torch.func's transforms there are none, and none may be set.)
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()
    aside = saved_tensors_hooks(_same, _same) if allowed else nullcontext()
    # Inside an op autograd's keys are off, under torch.compile more than those: hence the guard.
    # Outside of inference mode operations are recorded (also where gradients were off: leaving it
    # turns them on), and copies of what it made can be saved.
    dispatch = torch._C._ForceDispatchKeyGuard(*_DISPATCH)
    with dispatch, torch.inference_mode(False), aside:
        hyper, err, ref_err, gain, weight = (
            x.detach().clone() for x in (hyper, err, ref_err, gain, weight)
        )
        leaves = [e.requires_grad_() for e in err.clone().chunk(2)]
        value, m = _evaluate(number, Hyper(*hyper), *leaves, *ref_err.chunk(2), gain)
        value = value * weight
        # materialize: a new objective may leave the loser's error out.
        coefs = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    pair_loss, m = value.detach(), m.detach()
    # Plus 0 or NaN: of a branch not taken torch.where's backward says 0, whatever the loss is.
    coef = torch.cat(coefs) + pair_loss.mul(0).repeat(2)
    weighted = OBJECTIVES[number] in _WEIGHTED
    wbar = importance(err, gain.repeat(2)) if weighted else torch.ones_like(err)
    share = err.new_empty(0)
    if cross is not None:
        share = safeguard(
            *coef.chunk(2), err.chunk(2)[0], cross, hyper[Hyper._fields.index("safeguard")]
        )
        coef = torch.cat([coef.chunk(2)[0], coef.chunk(2)[1] * share])
    return pair_loss.mean(), pair_loss, m, wbar, share, coef


def safeguard(
    coef_w: Tensor, coef_l: Tensor, err_w: Tensor, cross: Tensor, mu: Tensor | float
) -> Tensor:
    """lambda [B] of Diffusion-SDPO: see `fastpref.objectives.Objective`."""
    balance = (coef_w / -coef_l).clamp(max=1)
    share = ((1 - mu) * balance * (err_w / cross)).clamp(0, 1)
    return torch.where((coef_l < 0) & (cross > 0), share, 1.0)


# --- Errors and noise ---


def pair_error(pred: Tensor, target: Tensor) -> Tensor:
    """err[r] = mean over elements of (pred[r % len(pred)] - target[r])^2, [rows] float64."""
    rows = target.shape[0]
    pred = pred.reshape(pred.shape[0], -1).double().repeat(rows // pred.shape[0], 1)
    return (pred - target.reshape(rows, -1).double()).square().mean(1)


def pair_cross(pred: Tensor, target: Tensor) -> Tensor:
    """<R_w, R_l> / D [B] float64 of residuals R = pred - target [2B, ...], winners first."""
    winner, loser = (pred.double() - target.double()).flatten(1).chunk(2)
    return (winner * loser).mean(1)


def pair_grad(pred: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """sum over rows r of factor[r] * 2 (pred - target[r]) / elements, like pred; factor [rows]."""
    rows, times = target.shape[0], target.shape[0] // pred.shape[0]
    wide = pred.reshape(pred.shape[0], -1).double().repeat(times, 1)
    residual = wide - target.reshape(rows, -1).double()
    terms = (factor * 2 / residual.shape[1])[:, None] * residual
    return terms.view(times, *pred.shape).sum(0).to(pred.dtype)


def mix(x0: Tensor, noise: Tensor, on_x0: Tensor, on_noise: Tensor) -> Tensor:
    """on_noise * noise + on_x0 * x0, rows of x0 in order w, l; noise [P, D], on_* [P]; float32.

    Rounded as csrc does: the product with x0 first, then once (float64 stays float64).
    """
    times = x0.shape[0] // noise.shape[0]
    flat = x0.reshape(x0.shape[0], -1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    scale_x, scale_n = (v.to(flat.dtype).repeat(times)[:, None] for v in (on_x0, on_noise))
    on_noise = scale_n.double() * noise.repeat(times, 1).double()
    return (on_noise + (scale_x * flat).double()).to(flat.dtype).view_as(x0)


# --- Draws: Philox4x32-10 and Box-Muller ---


# What a draw is for: each domain has its own numbers.
TIMESTEP, NOISE, POSTERIOR, PROMPT_DROPOUT, SPO = range(5)

_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; int64 wraps, which keeps all 64 bits."""
    product = constant * word
    return (product >> 32) & _WORD, product & _WORD


def philox(
    key0: int, key1: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words, held in int64 tensors."""
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def words(
    seed: int, pair_id: Tensor, index: Tensor, groups: Tensor, domain: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of element groups [G] of draws (seed, pair_id [B], index [B]): four of [B, G]."""
    # The counter's four words are all taken: the domain has the top 4 bits of the index's.
    draw = (domain << 28) | (index & 0x0FFFFFFF)
    counters = (draw, pair_id & _WORD, (pair_id >> 32) & _WORD)
    group = groups.expand(pair_id.shape[0], -1)
    return philox(seed & _WORD, (seed >> 32) & _WORD, group, *(c[:, None] for c in counters))


def uniform(seed: int, pair_id: Tensor, index: Tensor, domain: int) -> Tensor:
    """One uniform number in the open interval (0, 1) per draw, [B] float64.

    52 bits and a half, so that neither end is ever rounded to.
    """
    group = torch.zeros(1, dtype=torch.int64, device=pair_id.device)
    x, y, _, _ = words(seed, pair_id, index, group, domain)
    return (((x << 20) | (y >> 12)).double() + 0.5).mul(2.0**-52)[:, 0]


def normal(seed: int, pair_id: Tensor, index: Tensor, elements: int, domain: int = NOISE) -> Tensor:
    """Standard normals [B, elements] float32, functions of (seed, pair_id, index, domain, element).

    Element 4g + j comes from word group g: r0 cos a0, r0 sin a0, r1 cos a1, r1 sin a1.
    """
    groups = torch.arange((elements + 3) // 4, device=pair_id.device)
    x, y, z, w = words(seed, pair_id, index, groups, domain)

    def radius(word: Tensor) -> Tensor:
        u = (word.float().double() * 2.0**-32 + 2.0**-33).float()  # the float csrc/philox.h takes
        return (-2 * u.double().log()).clamp(min=0).sqrt()

    def angle(word: Tensor) -> Tensor:
        return word.double() * (2 * torch.pi / 2**32)

    r0, r1, a0, a1 = radius(x), radius(z), angle(y), angle(w)
    four = torch.stack((r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()), -1)
    return four.flatten(1)[:, :elements].float()
