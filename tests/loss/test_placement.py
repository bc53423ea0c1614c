"""dpo_cm and sdpo in both placements: values and slopes worked out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

import fastpref
from fastpref import oracle
from fastpref.loss.objectives import objective

BETA, CLIP, LEAST, SMOOTH = 40.0, 0.05, 0.8, 0.1
# (e_w, e_l, r_w, r_l, g): both kept and clipped from below, both within, the loser, the winner and
# both masked.
CASES = {
    "clipped": (0.30, 0.32, 0.31, 0.30, 0.60),
    "within": (0.30, 0.32, 0.31, 0.30, 0.10),
    "loser masked": (0.30, 0.95, 0.31, 0.90, 0.60),
    "winner masked": (0.95, 0.30, 0.93, 0.33, 0.60),
    "masked": (0.95, 1.30, 0.90, 1.31, 0.60),
}
COMBINED = {"max": max, "min": min, "mean": lambda a, b: (a + b) / 2}


def smoothed(m: float) -> tuple[float, float]:
    """-(1-s) log sigma(m) - s log sigma(-m), and its slope."""
    right = 1 / (1 + math.exp(-m))
    value = -(1 - SMOOTH) * math.log(right) - SMOOTH * math.log(1 - right)
    return value, -(1 - SMOOTH) * (1 - right) + SMOOTH * right


def by_hand(name, placement, how, e_w, e_l, r_w, r_l, g) -> list[float]:
    """[loss, dL/de_w, dL/de_l, margin]."""
    bar = [math.exp(-g * e / 2) for e in (e_w, e_l)]

    def clipped(w: float) -> float:
        return min(max(w, 1 - CLIP), 1 + CLIP)

    d_w, d_l, half = e_w - r_w, e_l - r_l, BETA / 2
    if name == "dpo_cm":
        c_w, c_l = (clipped(w) if w >= LEAST else 0.0 for w in bar)
        if placement == "ratio":
            m = -half * (c_w * d_w - c_l * d_l)
            value, slope = smoothed(m) if c_w or c_l else (0.0, 0.0)
            return [value, -half * c_w * slope, half * c_l * slope, m]
        m = -half * (d_w - d_l)
        value, slope = (x * (c_w + c_l) / 2 for x in smoothed(m))
        return [value, -half * slope, half * slope, m]
    w = COMBINED[how.get("combine", "max")](*bar)
    c = clipped(w)
    c = 1 / c if how.get("inverse_weight") else c
    kept, m = float(w >= LEAST), -half * (d_w - d_l)
    if placement == "ratio":
        value, slope = smoothed(c * m)
        return [kept * value, -half * kept * c * slope, half * kept * c * slope, c * m]
    value, slope = smoothed(m)
    return [kept * c * value, -half * kept * c * slope, half * kept * c * slope, m]


HOW = [("dpo_cm", {})] + [
    ("sdpo", {"combine": combine, "inverse_weight": inverse})
    for combine in COMBINED
    for inverse in (False, True)
]


@pytest.mark.parametrize("placement", ["ratio", "loss"])
@pytest.mark.parametrize(("name", "how"), HOW, ids=str)
def test_values_and_slopes(name, how, placement):
    options = {"beta": BETA, "clip": CLIP, "mask_threshold": LEAST, "label_smoothing": SMOOTH}
    rule = objective(name, placement=placement, **options, **how)
    cases = torch.tensor(list(CASES.values()), dtype=torch.float64)
    expected = [by_hand(name, placement, how, *case) for case in CASES.values()]
    err, ref = cases[:, :2].T.reshape(-1), cases[:, 2:4].T.reshape(-1)
    loss, slope_w, slope_l, margin = torch.tensor(expected, dtype=torch.float64).T
    out = fastpref.loss_from_errors(err, ref, rule, gain=cases[:, 4])
    close = {"rtol": 1e-9, "atol": 1e-15}
    torch.testing.assert_close(out.pair_loss, loss, **close)
    torch.testing.assert_close(out.coef, torch.cat([slope_w, slope_l]), **close)
    torch.testing.assert_close(out.margin, margin, **close)
    errors = [*err.clone().requires_grad_().chunk(2), *ref.chunk(2)]
    said = oracle.loss(rule, *errors, cases[:, 4])
    torch.testing.assert_close(said, loss, rtol=1e-12, atol=1e-15)
    slopes = torch.autograd.grad(said.sum(), errors[:2])
    torch.testing.assert_close(torch.stack(slopes), torch.stack([slope_w, slope_l]), **close)


def test_defaults_are_what_they_were():
    """ratio for dpo_cm, loss for sdpo; both are told apart by every case that is kept."""
    for name, default, other in (("dpo_cm", "ratio", "loss"), ("sdpo", "loss", "ratio")):
        rule = objective(name, beta=BETA)
        assert rule.placement == default
        assert rule.hyper() == objective(name, beta=BETA, placement=default).hyper()
        assert rule.hyper() != objective(name, beta=BETA, placement=other).hyper()
    with pytest.raises(ValueError, match="sdpo: placement must be one of ratio, loss, got 'in'"):
        objective("sdpo", beta=1.0, placement="in")
    with pytest.raises(TypeError, match="dpo has no option 'placement'"):
        objective("dpo", beta=1.0, placement="ratio")
