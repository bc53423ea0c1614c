"""The oracle: golden values, published random-number vectors, and what NaN does to it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpref
from fastpref import oracle
from fastpref.loss.objectives import OBJECTIVES, objective

F64 = torch.float64


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_golden(golden):
    """loss and both derivatives to 1e-12, by autograd and by the epilogue the ops fall back on."""
    published = {"dpo", "ipo", "hinge", "dmpo", "dpo_cm", "sdpo", "spo"}
    assert {case["objective"] for case in golden} == published <= set(OBJECTIVES)
    for case in golden:
        obj = objective(case["objective"], **case["hyper"])
        err = f64(case["err_w"], case["err_l"]).requires_grad_()
        ref = f64(case["ref_w"], case["ref_l"])
        gain, weight = f64(case["gain"]), f64(case["weight"])
        loss = weight * oracle.loss(obj, err[:1], err[1:], ref[:1], ref[1:], gain)
        (coef,) = torch.autograd.grad(loss.sum(), err)
        hyper = f64(*obj.hyper())
        _, again, _, _, _, coef_again = oracle.epilogue(obj.number, hyper, err, ref, gain, weight)
        expected = [case["loss"], case["dloss_derr_w"], case["dloss_derr_l"]]
        for got in ([loss.item(), *coef.tolist()], [again.item(), *coef_again.tolist()]):
            assert got == pytest.approx(expected, rel=1e-12, abs=0), case


@pytest.mark.parametrize("name", OBJECTIVES)
def test_derivative_is_the_slope(name):
    """Autograd agrees with central differences where the importance weights are held fixed."""
    torch.manual_seed(1)
    obj = objective(name, beta=10.0 if name == "spo" else 40.0, sft_weight=0.3)
    err = (0.5 + 0.02 * torch.rand(2, 64, dtype=F64)).requires_grad_()
    ref = 0.5 + 0.02 * torch.rand(2, 64, dtype=F64)
    # Detached weights hide from autograd what a difference would see: hold them at 1.
    gain = torch.full((64,), 5.0 if name == "spo" else 0.0, dtype=F64)
    (slope,) = torch.autograd.grad(oracle.loss(obj, *err, *ref, gain).sum(), err)
    step = 1e-6
    for member in range(2):
        shift = torch.zeros_like(err)
        shift[member] = step
        up, down = (oracle.loss(obj, *(err + s).detach(), *ref, gain) for s in (shift, -shift))
        torch.testing.assert_close((up - down) / (2 * step), slope[member], rtol=1e-6, atol=1e-6)


def test_dmpo_has_its_optimum_at_the_logit_and_saturates():
    obj = objective("dmpo", beta=2.0, alpha=0.01)
    best = math.log(0.99 / 0.01)
    margins = f64(best, -1e4, 1e4, -40.0)
    zero = torch.zeros_like(margins)
    err_l = margins.clone().requires_grad_()  # beta 2: the margin is err_l
    value = oracle.loss(obj, zero, err_l, zero, zero)
    (slope,) = torch.autograd.grad(value.sum(), err_l)
    assert value.tolist() == pytest.approx([0, -math.log(0.01), -math.log(0.99), -math.log(0.01)])
    assert slope.isfinite().all() and abs(slope[0]) < 1e-15
    assert slope[3].item() == pytest.approx(math.exp(-40) * (-40 - best), rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(4))
def test_no_mask_hides_an_error_that_is_not_finite(name, bad, where):
    """Gain 1e30 masks everything and the margins saturate: the loss is NaN all the same."""
    obj = objective(name, beta=1e6)
    errors = [f64(0.5, 0.5).requires_grad_() for _ in range(4)]
    with torch.no_grad():
        errors[where][0] = bad
    gain = f64(1e30, 1e30)
    value = oracle.loss(obj, *errors, gain)
    assert value.isfinite().tolist() == [False, True]
    err, ref = torch.cat(errors[:2]), torch.cat(errors[2:])
    out = oracle.epilogue(obj.number, f64(*obj.hyper()), err, ref, gain, None)
    assert not out[0].isfinite() and not out[-1][[0, 2]].isfinite().any()
    assert out[-1][[1, 3]].isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_epilogue_is_the_same_wherever_it_is_called(name):
    """Under a caller's saved-tensor hooks, which see nothing of it; in a checkpoint, which it would
    otherwise run again; where hooks are forbidden; without gradients; in inference mode.
    """
    obj = objective(name, beta=10.0)
    err, ref = f64(0.5, 0.625, 0.25, 0.75), f64(0.375, 0.5, 0.5, 0.625)
    rest = [f64(*obj.hyper()), f64(0.25, 0.5), f64(0.5, 2.0)]

    def run(err, ref, hyper, gain, weight):
        return oracle.epilogue(obj.number, hyper, err, ref, gain, weight)

    def refuse(_):
        raise AssertionError("a caller's hook saw the epilogue's own tensors")

    expected, ran = run(err, ref, *rest), []
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        found = [run(err, ref, *rest)]
    with torch.autograd.graph.disable_saved_tensors_hooks("as torch.func does"):
        found.append(run(err, ref, *rest))
    leaf = err.clone().requires_grad_()
    checkpoint(lambda x: ran.append(run(x, ref, *rest)) or x.sin(), leaf, use_reentrant=False)
    with torch.no_grad():
        found.append(run(err, ref, *rest))
    with torch.inference_mode():
        found += [run(err, ref, *rest), run(*(x.clone() for x in (err, ref, *rest)))]
    assert len(ran) == 1
    for each in (*found, *ran):
        assert all(torch.equal(a, b) for a, b in zip(each, expected, strict=True))
        assert not any(x.requires_grad for x in each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(dtype):
    """The loss keeps the dtype of its errors and is near the float64 one."""
    errors = [f64(0.5, 0.25), f64(0.75, 0.5), f64(0.625, 0.25), f64(0.5, 0.375)]
    for name in OBJECTIVES:
        obj, gain = objective(name, beta=4.0), f64(0.25, 0.125)
        exact = oracle.loss(obj, *errors, gain)
        value = oracle.loss(obj, *(e.to(dtype) for e in errors), gain.to(dtype))
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with Random123."""
    words = oracle.philox(*key, *(torch.tensor([c]) for c in counter))
    assert [f"{w.item():08x}" for w in words] == expected.split()


def test_pair_error_of_one_prediction_for_both_members():
    pred = f64(1.0, 2.0, 3.0, 4.0).view(2, 2)
    target = torch.stack([pred[0] + 1, pred[1] - 2, pred[0], pred[1] * 2])
    assert oracle.pair_error(pred, target).tolist() == [1.0, 4.0, 0.0, 12.5]


@pytest.mark.parametrize("name", ["dpo_cm", "sdpo", "spo"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_gain_that_is_not_finite_reaches_the_loss(name, bad):
    """An infinite gain would make the importance weight 0, and the pair silently masked."""
    obj = objective(name, beta=10.0)
    err = torch.tensor([0.5, 0.6], dtype=torch.float64)
    gain = torch.tensor([bad], dtype=torch.float64)
    out = fastpref.loss_from_errors(err, err + 0.1, obj, gain=gain)
    assert out.loss.isnan() and out.coef.isnan().all()
    assert oracle.loss(obj, *err.view(2, 1), *(err + 0.1).view(2, 1), gain).isnan().all()
    masked = torch.tensor([1e30], dtype=torch.float64)  # how a masked step is carried
    assert fastpref.loss_from_errors(err, err + 0.1, obj, gain=masked).loss.isfinite()
