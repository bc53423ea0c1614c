"""What can be wrong in a call of `fastpref.functional`: each check says it in one line."""

import pytest
import torch

import fastpref
from fastpref.loss.objectives import objective

GOOD = {
    "pred": torch.zeros(4, 3),
    "target": torch.zeros(4, 3),
    "ref": torch.zeros(4, 3),
    "objective": objective("dpo", beta=1.0),
}
IDS = torch.arange(2)
DRAWS = fastpref.Draws(0, IDS, IDS)
MADE = fastpref.Target(torch.zeros(4, 3), DRAWS, torch.ones(2), torch.ones(2))
SDPO, SPO = objective("sdpo", beta=1.0), objective("spo", beta=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(4, 3, dtype=torch.int64)}, "pred must be a float32, .* got int64 "),
        ({"pred": [1.0]}, r"pred must be a float32, .* got list \[1.0\]"),
        ({"pred": torch.zeros(4)}, r"pred must be \[rows, ...\] .* got float32 \[4\] on cpu"),
        ({"pred": torch.zeros(4, 0)}, "pred must be .* at least one element"),
        ({"pred": torch.zeros(2, 3)}, "pred must have 4 rows like target, .* got 2 .only in spo"),
        ({"target": torch.zeros(4, 3, dtype=torch.bool)}, "target must be a float32, .* got bool"),
        ({"target": torch.zeros(4, 3, device="meta")}, "target must be on cpu, got .* on meta"),
        ({"target": torch.zeros(4, 2)}, r"target must be shaped like pred, \[4, 3\] .* \[4, 2\]"),
        (
            {k: torch.zeros(3, 3) for k in ("pred", "target", "ref")},
            "target must have an even number of rows, winners then losers, got 3",
        ),
        ({"target": None}, "target must be a float32, .* got NoneType None"),
        (
            {"target": fastpref.Target(torch.zeros(4, 2), DRAWS, torch.ones(2), torch.ones(2))},
            r"target.x0 must be shaped like pred, \[4, 3\]",
        ),
        (
            {"target": fastpref.Target(torch.zeros(4, 3), DRAWS, torch.ones(4), torch.ones(2))},
            r"target.p must be \[2\], one number each, got float32 \[4\]",
        ),
        (
            {
                "target": fastpref.Target(
                    torch.zeros(4, 3),
                    fastpref.Draws(0, torch.arange(3), torch.arange(3)),
                    torch.ones(3),
                    torch.ones(3),
                )
            },
            "draws must have 2 pairs for 4 rows of x0, got 3",
        ),
        (
            {"target": fastpref.Target(torch.zeros(4, 3), 7, None, None)},
            "draws must be fastpref.Dr",
        ),
        ({"ref": torch.zeros(4, 2)}, r"ref must be predictions like pred, .* or errors \[4\]"),
        ({"ref": torch.zeros(2)}, r"ref must be predictions like pred, .* got float32 \[2\]"),
        ({"ref": torch.zeros(4, 3).half()}, "ref must be in pred's dtype, .* got float16"),
        ({"ref": torch.zeros(4, dtype=torch.int64)}, "ref must be a float32, .* got int64"),
        ({"ref": torch.zeros(4, device="meta")}, "ref must be on cpu, got float32 .* on meta"),
        ({"objective": "dpo"}, "objective must be made by fastpref.objective.* got str 'dpo'"),
        ({"objective": SDPO}, r"sdpo needs gain \[2\] \(process.gain"),
        ({"objective": SPO}, r"spo needs gain \[2\] \(k of the denoising step\)"),
        ({"gain": torch.ones(2)}, r"gain has no effect on dpo, expected None, got float32 \[2\]"),
        ({"objective": SDPO, "gain": torch.ones(4)}, r"gain must be \[2\], one number each"),
        ({"objective": SDPO, "gain": 0.5}, "gain must be a float32, .* got float 0.5"),
        ({"weight": torch.ones(2, 1)}, r"weight must be \[2\], .* got float32 \[2, 1\]"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, "weight must be a float32, .* got int64"),
        ({"weight": torch.ones(2, device="meta")}, "weight must be on cpu, got .* on meta"),
        ({"target": torch.zeros(4, 3, requires_grad=True)}, "target must not require a gradient"),
    ],
)
def test_errors_of_preference_loss(change, message):
    arguments = GOOD | {"pred": torch.zeros(4, 3, requires_grad=True)} | change
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        fastpref.preference_loss(**arguments)
    assert "\n" not in str(caught.value)


D = torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastpref.loss_from_errors(D.float(), D, SPO), "err must be a float64 tensor"),
        (lambda: fastpref.loss_from_errors(D, None, SPO), "ref_err must be a float64 .* NoneType"),
        (
            lambda: fastpref.loss_from_errors(D[:3], D[:3], SPO),
            "err must be .* even number of rows",
        ),
        (lambda: fastpref.loss_from_errors(D, D[:2], SPO), "ref_err must be like err, float64"),
        (lambda: fastpref.loss_from_errors(D, D, SPO), r"loss_from_errors: spo needs gain \[2\]"),
        (lambda: fastpref.pair_error(D, D), r"pair_error: pred must be \[rows, ...\]"),
        (
            lambda: fastpref.pair_error(torch.zeros(4, 3), torch.zeros(6, 3)),
            r"target must be shaped like pred, \[4, 3\]",
        ),
        (
            lambda: fastpref.unit_seed(torch.zeros(2, 3), torch.zeros(4, 3)),
            "unit_seed: pred must have the target's 4 rows, got 2",
        ),
        (
            lambda: fastpref.add_noise(torch.zeros(3, 3), DRAWS, D[:2], D[:2]),
            "draws must have 3 or 1 pairs for 3 rows of x0, got 2",
        ),
        (
            lambda: fastpref.add_noise(torch.zeros(4, 3), DRAWS, D, D[:2]),
            r"add_noise: a must be \[2\], one number each, got float64 \[4\]",
        ),
        (
            lambda: fastpref.add_noise(torch.zeros(4, 3).int(), DRAWS, D[:2], D[:2]),
            "add_noise: x0 must be a float32, .* got int32",
        ),
        (
            lambda: fastpref.add_noise(torch.zeros(4, 3), DRAWS, D[:2], D[:2], torch.int32),
            "add_noise: dtype must be float32, .* got torch.int32",
        ),
        (
            lambda: fastpref.add_noise(torch.zeros(4, 3, device="meta"), DRAWS, D[:2], D[:2]),
            r"draws must be on meta, got int64 \[2\] on cpu",
        ),
        (lambda: fastpref.Draws(0, IDS.int(), IDS), "Draws: pair_id must be an int64 .* got int32"),
        (lambda: fastpref.Draws(0, IDS, 3), "Draws: index must be an int64 tensor, got int 3"),
        (lambda: fastpref.Draws(0, IDS, IDS[:1]), "Draws: index must be like pair_id"),
        (lambda: fastpref.Draws(0, IDS[0], IDS[0]), r"Draws: pair_id must be \[B\]"),
        (lambda: fastpref.Draws(-1, IDS, IDS), "Draws: seed must be an integer, 0 <= seed < 2.63"),
        (lambda: fastpref.Draws(1.5, IDS, IDS), "Draws: seed must be an integer, .* got 1.5"),
    ],
)
def test_errors_of_the_others(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
