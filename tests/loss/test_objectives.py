"""The objectives' settings: order, numbers for the kernels, ranges, beta conventions."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from fastpref import oracle
from fastpref.loss.objectives import OBJECTIVES, SDPO, SPO, convert_beta, objective


def test_order_is_that_of_the_kernels():
    """Name and number stand in one order here and in the list that generates both dispatches."""
    header = (Path(__file__).parents[2] / "csrc" / "objectives.h").read_text()
    listed = re.findall(r"X\((\d+), (\w+)\)", header)
    assert [int(number) for number, _ in listed] == list(range(len(OBJECTIVES)))
    assert [name.lower() for _, name in listed] == [name.replace("_", "") for name in OBJECTIVES]
    assert [objective(name, beta=1.0).number for name in OBJECTIVES] == list(range(len(OBJECTIVES)))
    struct = re.search(r"struct Hyper \{\s*double ([^;]+);", header)[1]
    struct = [name.strip() for name in struct.split(",")]
    full = SDPO(
        beta=3.0,
        label_smoothing=0.2,
        clip=0.3,
        mask_threshold=0.7,
        combine="mean",
        inverse_weight=True,
        sft_weight=0.5,
        placement="loss",
        safeguard=0.6,
    )
    numbers = dict(zip(struct, full.hyper(), strict=True))
    expected = dataclasses.asdict(full) | {"combine": 2.0, "inverse_weight": 1.0, "alpha": 0.0}
    expected["placement"] = 1.0
    assert numbers == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_with_gradients_of_zero_say_so(name):
    """`skip_zeros` asks them: a wrong word refuses it for a false reason, or lets it do nothing."""
    rule, generator = objective(name, beta=2.0), torch.Generator().manual_seed(0)
    err, ref_err = torch.rand(2, 2000, generator=generator, dtype=torch.float64)
    gain = torch.ones(1000, dtype=torch.float64)
    coef = oracle.epilogue(rule.number, rule.hyper_tensor(err.device), err, ref_err, gain, None)[-1]
    zeros = (coef.view(2, -1) == 0).all(0).double().mean().item()
    assert (zeros > 0) == rule.has_zeros and zeros < 1


def test_hyper_tensor_is_made_once():
    cpu = torch.device("cpu")  # 10.5: no other test has had it made already
    spo = objective("spo", beta=10.5)
    with torch._subclasses.FakeTensorMode():
        assert isinstance(spo.hyper_tensor(cpu), torch._subclasses.FakeTensor)
    torch.func.grad(lambda x: x * spo.hyper_tensor(cpu)[0])(torch.ones((), dtype=torch.float64))
    one, two = (objective("spo", beta=10.5).hyper_tensor(cpu) for _ in range(2))
    assert one is two and one.dtype == torch.float64 and one.data_ptr()
    assert one.tolist() == [10.5, 0, 0, 0.1, 0, 0, 0, 0, 0, 0]
    assert objective("spo", beta=9.0).hyper_tensor(cpu)[0] == 9.0


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPO(beta=10.0).beta = 1.0


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("dpo", {}, "dpo needs beta"),
        ("dpo", {"beta": 0}, "dpo: beta must be finite and > 0, got 0"),
        ("dpo", {"beta": float("nan")}, "dpo: beta must be finite and > 0, got nan"),
        ("ipo", {"beta": float("inf")}, "ipo: beta must be finite and > 0, got inf"),
        ("dpo", {"beta": "5"}, "dpo: beta must be a number > 0, got '5'"),
        ("dpo", {"beta": True}, "dpo: beta must be a number > 0, got True"),
        ("dpo", {"beta": 1, "label_smoothing": 0.5}, "label_smoothing .* >= 0 and < 0.5, got 0.5"),
        ("dpo", {"beta": 1, "label_smoothing": -0.1}, "label_smoothing .* >= 0 and < 0.5"),
        ("dmpo", {"beta": 1, "alpha": 0.5}, "dmpo: alpha .* > 0 and < 0.5, got 0.5"),
        ("dmpo", {"beta": 1, "alpha": 0.0}, "dmpo: alpha .* > 0 and < 0.5, got 0.0"),
        ("spo", {"beta": 10, "clip": 1.0}, "spo: clip .* > 0 and < 1, got 1.0"),
        ("dpo_cm", {"beta": 1, "clip": 0}, "dpo_cm: clip .* > 0 and < 1, got 0"),
        ("dpo_cm", {"beta": 1, "mask_threshold": 1.1}, "mask_threshold .* > 0 and <= 1, got 1.1"),
        ("sdpo", {"beta": 1, "mask_threshold": 0.0}, "mask_threshold .* > 0 and <= 1, got 0.0"),
        ("sdpo", {"beta": 1, "combine": "sum"}, "combine must be one of max, min, mean, got 'sum'"),
        ("sdpo", {"beta": 1, "inverse_weight": 2}, "inverse_weight must be true or false, got 2"),
        ("hinge", {"beta": 1, "sft_weight": -1}, "hinge: sft_weight .* >= 0, got -1"),
        ("hinge", {"beta": 1, "alpha": 0.1}, "hinge has no option 'alpha', only beta, sft_weight"),
        ("dmpo", {"beta": 1, "label_smoothing": 0.1}, "dmpo has no option 'label_smoothing'"),
        ("sdpo", {"beta": 1, "mask_treshold": 0.1}, "did you mean mask_threshold?"),
        ("kto", {"beta": 1}, "objective must be one of dpo, ipo, .* got 'kto'"),
        ("spo", {"beta": 1, "beta_convention": "mean"}, "spo has its own scale of beta"),
        ("ipo", {"beta": 1, "beta_convention": "half_mean"}, "ipo has its own scale of beta"),
        ("dpo", {"beta": 1, "beta_convention": "avg"}, "must be one of half_mean, mean, half_sum"),
        ("dpo", {"beta": 1, "beta_convention": "sum"}, "'sum' needs elements"),
        ("dpo", {"beta": 1, "beta_convention": "sum", "elements": 2.5}, "integer >= 1, got 2.5"),
        ("dpo", {"beta": 10**400}, "beta must be finite and > 0"),
        ("dpo", {"beta": -1, "beta_convention": "mean"}, "beta must be finite and > 0, got -1"),
    ],
)
def test_one_line_errors(name, hyper, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        objective(name, **hyper)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dpo", "dpo_cm", "sdpo"])
def test_label_smoothing_where_the_loss_has_labels(name):
    assert objective(name, beta=1.0, label_smoothing=0.1).hyper()[1] == 0.1


@pytest.mark.parametrize(
    ("convention", "factor"), [("half_mean", 1), ("mean", 2), ("half_sum", 96), ("sum", 192)]
)
def test_beta_conventions_give_their_authors_margin(convention, factor):
    """The margin in their own formula, from residuals, equals ours at the converted beta."""
    torch.manual_seed(0)
    pred, ref, y = torch.randn(3, 2, 96, dtype=torch.float64)
    squares = (pred - y).square() - (ref - y).square()  # winner, loser
    reduced = squares.sum(1) if convention.endswith("sum") else squares.mean(1)
    theirs = -(0.5 if "half" in convention else 1) * 0.25 * (reduced[0] - reduced[1])
    ours = objective("dpo", beta=0.25, beta_convention=convention, elements=96)
    assert ours.beta == 0.25 * factor == convert_beta(0.25, convention, 96)
    d_w, d_l = squares.mean(1)
    assert (-0.5 * ours.beta * (d_w - d_l)).item() == pytest.approx(theirs.item(), rel=1e-12)
