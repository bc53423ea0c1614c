"""The pair step: every form of it against two models in one plain batch; memory; what it skips."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from tiny import NAMES, STEPS, Case, case, distance, gradients, plain

import fastpref
from fastpref.step import pair, reference

OBJECTIVES = {
    "dpo": {"beta": 40.0},
    "dpo+sft": {"beta": 40.0, "sft_weight": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.5},
    "hinge": {"beta": 1.0},
    "dmpo": {"beta": 40.0, "alpha": 0.1},
    "dpo_cm": {"beta": 40.0, "mask_threshold": 0.2},
    "sdpo": {"beta": 40.0, "mask_threshold": 0.2, "combine": "mean"},
    "sdpo+sft": {"beta": 40.0, "mask_threshold": 0.2, "inverse_weight": True, "sft_weight": 0.3},
    "dpo+safeguard": {"beta": 40.0, "safeguard": 0.3},
    "dpo_cm+safeguard": {"beta": 40.0, "mask_threshold": 0.2, "safeguard": 0.6},
    "sft": None,
}


def make(name):
    hyper = OBJECTIVES[name]
    return None if hyper is None else fastpref.objective(name.split("+")[0], **hyper)


def gain_of(c: Case, objective):
    return c.process.gain(c.draws) if objective is not None and objective.needs_gain else None


def run(c: Case, form: str, objective, *, policy=None, ref=None, **changes):
    """One step of `form`; returns (PairLoss, gradient)."""
    noisy, t, target = c.inputs()
    how = {"gain": gain_of(c, objective), "weight": c.weight, "parameters": c.parameters}
    out = STEPS[form](
        policy or c.policy,
        ref or reference.adapters_off(c.model, c.family.predict),
        noisy, t, target, c.cond, objective, **{**how, **changes},
    )  # fmt: skip
    return out, gradients(c.parameters)


def assert_same(out, gradient, expected, wanted, tolerance):
    loss, err, ref_err = expected
    assert distance(out.err, err) < tolerance
    assert distance(out.ref_err, ref_err) < tolerance
    assert abs(out.loss - loss) <= tolerance * abs(loss)
    assert distance(gradient, wanted) < tolerance


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["dpo", "sdpo", "dpo+safeguard"])
def test_every_model_steps_as_two_models_do(name, form, objective):
    c, objective = case(name), make(objective)
    expected = plain(c, objective, gain=gain_of(c, objective))
    wanted = gradients(c.parameters)
    assert wanted.norm() > 0
    assert_same(*run(c, form, objective), expected, wanted, 1e-5)


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_in_float64(form, objective):
    """Float64 goes through the oracle's implementation of the same operators."""
    c, objective = case("sd15", torch.float64), make(objective)
    expected = plain(c, objective, gain=gain_of(c, objective))
    wanted = gradients(c.parameters)
    assert_same(*run(c, form, objective), expected, wanted, 1e-10)


@pytest.mark.parametrize("form", STEPS)
def test_a_transformer_in_float64(form):
    """CogVideoX-2B; Wan's and 5B's own code computes parts in float32 whatever the dtype."""
    c, objective = case("cogvideox-2b", torch.float64), make("dpo")
    expected = plain(c, objective)
    wanted = gradients(c.parameters)
    assert_same(*run(c, form, objective), expected, wanted, 1e-10)


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", ["toy", "cogvideox-5b", "sd15"])
def test_a_zero_adapter_starts_at_the_reference_exactly(name, form):
    c = case(name)
    with torch.no_grad():
        for key, p in c.model.named_parameters():
            if "lora_B" in key:
                p.zero_()
    out, gradient = run(c, form, make("dpo"), weight=None)
    assert torch.equal(out.err, out.ref_err) and (out.margin == 0).all()
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert gradient.norm() > 0


@pytest.mark.parametrize("form", STEPS)
def test_gradients_accumulate_with_their_scale(form):
    c, objective = case("sd15", torch.float64), make("sdpo+sft")
    _, whole = run(c, form, objective)
    for p in c.parameters:
        p.grad = torch.ones_like(p)
    _, more = run(c, form, objective, scale=0.25)
    assert distance(more - 1, 0.25 * whole) < 1e-10


@pytest.mark.parametrize("form", STEPS)
def test_a_target_may_be_a_tensor_and_the_reference_errors(form):
    c, objective = case("sd15", torch.float64), make("dmpo")
    out, wanted = run(c, form, objective)
    noisy, t, target = c.inputs()
    y = torch.cat([
        fastpref.oracle.mix(
            half,
            fastpref.oracle.normal(c.draws.seed, c.draws.pair_id, c.draws.index, half[0].numel()),
            target.q, target.p,
        )
        for half in c.latents.chunk(2)
    ])  # fmt: skip

    again = STEPS[form](
        c.policy, out.ref_err, noisy, t, y, c.cond, objective, weight=c.weight,
        parameters=c.parameters,
    )  # fmt: skip
    assert torch.equal(again.ref_err, out.ref_err) and distance(again.err, out.err) < 1e-12
    assert distance(gradients(c.parameters), wanted) < 1e-10


def test_member_by_member_every_pair_has_its_own_lambda():
    c, rule = case("sd15", torch.float64), make("dpo+safeguard")
    joint, one_by_one = (run(c, form, rule)[0] for form in ("joint", "deferred"))
    assert len(set(joint.safeguard.tolist())) == len(c.weight) and (joint.safeguard < 1).any()
    for field in ("safeguard", "coef", "pair_loss"):
        torch.testing.assert_close(getattr(one_by_one, field), getattr(joint, field))


def test_a_parameter_the_prediction_does_not_use_stays_without_gradient():
    c = case("sd15", torch.float64)
    idle = torch.nn.Parameter(torch.ones(3))
    for form in STEPS:
        run(c, form, make("dpo"), parameters=[*c.parameters, idle])
        assert idle.grad is None


def peak_saved_bytes(model, work) -> int:
    """The most that autograd keeps at once during `work()`: bytes of the saved tensors' storages,
    each counted once, parameters and buffers left out.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, list[int]] = {}  # address -> [bytes, times held]
    peak = 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def release(address):
        held[address][1] -= 1
        if not held[address][1]:
            del held[address]

    def pack(tensor):
        nonlocal peak
        storage, kept = tensor.untyped_storage(), Kept(tensor)
        if storage.data_ptr() not in own:
            held.setdefault(storage.data_ptr(), [storage.nbytes(), 0])[1] += 1
            weakref.finalize(kept, release, storage.data_ptr())
            peak = max(peak, sum(size for size, _ in held.values()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        work()
    assert not held
    return peak


@pytest.mark.parametrize("pairs", [1, 2])
def test_deferred_keeps_the_activations_of_one_member(pairs):
    c = case("wan", pairs=pairs)
    kept = {f: peak_saved_bytes(c.model, lambda f=f: run(c, f, make("dpo"))) for f in STEPS}
    assert kept["joint"] > 100_000
    assert kept["deferred"] <= 0.6 / pairs * kept["joint"]


def count_backwards(c: Case, work) -> int:
    """How often `work()` adds to the first adapter's gradient by a backward."""
    calls = []
    hook = c.parameters[0].register_hook(calls.append)
    work()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize(("form", "backwards"), [("joint", 0), ("deferred", 2)])
def test_pairs_without_a_gradient_spare_their_backward(form, backwards):
    """With every pair masked: none in joint; in deferred the losers', whose winners have run."""
    c = case("sd15", torch.float64)
    masked = fastpref.objective("dpo_cm", beta=40.0, mask_threshold=1.0)
    out, gradient = run(c, form, masked)
    assert (out.coef == 0).all() and gradient.norm() == 0
    ran = count_backwards(c, lambda: run(c, form, masked, skip_zeros=True))
    assert ran == backwards
    again, gradient = run(c, form, masked, skip_zeros=True)
    assert (gradient == 0).all() and torch.equal(again.err, out.err)
    # With the sft term nothing is zero, and nothing is left out.
    kept = fastpref.objective("dpo_cm", beta=40.0, mask_threshold=1.0, sft_weight=0.3)
    assert run(c, form, kept, skip_zeros=True)[1].norm() > 0


def test_skipping_one_pair_leaves_the_others_gradient_bit_for_bit():
    c = case("sd15", torch.float64)
    margin = run(c, "joint", make("dpo"))[0].margin
    # Swap members so that the first pair is won and the second lost; hinge is flat beyond m = 1.
    winners = [0 if margin[0] > 0 else 2, 1 if margin[1] < 0 else 3]
    c = c._replace(latents=c.latents[[*winners, *((w + 2) % 4 for w in winners)]])
    objective = fastpref.objective("hinge", beta=40.0 * 1.5 / margin[0].abs().item())
    out, whole = run(c, "deferred", objective)
    assert (out.coef.view(2, -1) == 0).all(0).tolist() == [True, False]
    ran = count_backwards(c, lambda: run(c, "deferred", objective, skip_zeros=True))
    assert ran == 3  # both winners and one loser
    assert torch.equal(run(c, "deferred", objective, skip_zeros=True)[1], whole)


def test_a_joint_batch_with_one_pair_that_counts_is_not_skipped():
    """Hinge beyond its margin for the first pair alone, then for the second alone."""
    c = case("sd15", torch.float64)
    margin = run(c, "joint", make("dpo"))[0].margin
    for flat in range(2):
        winners = [i if (margin[i] > 0) == (i == flat) else i + 2 for i in range(2)]
        swapped = c._replace(latents=c.latents[[*winners, *((w + 2) % 4 for w in winners)]])
        objective = fastpref.objective("hinge", beta=40.0 * 1.5 / margin[flat].abs().item())
        out, whole = run(swapped, "joint", objective)
        assert (out.coef.view(2, -1) == 0).all(0).tolist() == [flat == 0, flat == 1]
        assert torch.equal(run(swapped, "joint", objective, skip_zeros=True)[1], whole)
        assert whole.norm() > 0


@pytest.mark.parametrize("form", STEPS)
def test_what_is_not_finite_is_never_skipped(form):
    c = case("sd15", torch.float64)
    c.cond["text"][0, 0, 0] = math.nan
    masked = fastpref.objective("dpo_cm", beta=40.0, mask_threshold=1.0)
    out, gradient = run(c, form, masked, skip_zeros=True)
    assert out.loss.isnan() and not gradient.isfinite().all()


def test_a_window_on_the_timestep_is_a_mask_without_the_waste():
    """E[weight_t loss_t] over all times, weight 1 inside a window and 0 outside, is the share of
    the window times E[loss_t] over draws restricted to it: gradients of 2 x 30,000 draws agree.
    """
    groups, pairs, elements = 30, 1000, 4
    shift, window = 3.0, (0.2, 0.7)
    low, high = (sigma / (shift - (shift - 1) * sigma) for sigma in window)
    every = fastpref.FlowMatching(shift=shift)
    inside = every.replace(timestep_range=window)
    a = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    x0 = 1 + torch.randn(2 * pairs, elements, generator=torch.Generator().manual_seed(0)).double()

    def policy(noisy, t, cond):
        return a[0] * noisy + a[1] * (t / 1000).unsqueeze(1)

    def gradient(process, group, weight):
        draws = fastpref.Draws(group, torch.arange(pairs), torch.zeros(pairs, dtype=torch.int64))
        noisy, t, target = process.noise(x0, draws)
        level = process.level(draws)
        mask = ((level >= window[0]) & (level < window[1])).double() if weight else None
        zero = lambda noisy, t, cond: torch.zeros_like(noisy)  # noqa: E731
        STEPS["joint"](
            policy, zero, noisy, t, target, {}, None, weight=mask, parameters=[a]
        )  # fmt: skip
        return gradients([a])

    masked = torch.stack([gradient(every, g, True) for g in range(groups)])
    restricted = (high - low) * torch.stack([gradient(inside, g, False) for g in range(groups)])
    error = (masked.var(0) + restricted.var(0)).div(groups).sqrt()
    change = (masked.mean(0) - restricted.mean(0)).abs()
    assert (change < 3 * error).all() and (error < 0.03 * masked.mean(0).abs()).all()
    # All of the restricted draws count, so they say more than as many masked ones.
    assert (restricted.var(0) < masked.var(0)).all()


def test_deferred_refuses_one_prediction_for_both_members():
    c = case("sd15")
    noisy, t, target = c.inputs()
    with pytest.raises(ValueError, match=r"noisy must have 4 rows.*got 2.*is for preference_loss"):
        pair.deferred(
            c.policy, c.policy, noisy[:2], t[:2], target, c.cond,
            objective=make("dpo"), parameters=c.parameters,
        )  # fmt: skip


def test_half_precision_gradients_take_the_coefficient_in_full():
    """In bfloat16 1.00390625 = 1 + 2^-8 would round to 1."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    factor = torch.tensor(1 + 2.0**-8, dtype=torch.float64)
    pair.add_scaled([p], [torch.tensor([1.0, 129.0], dtype=torch.bfloat16)], factor)
    # 129 (1 + 2^-8) = 129.50390625 rounds to 130; 129 times the rounded factor stays 129.
    assert p.grad.tolist() == [1.0, 130.0]
