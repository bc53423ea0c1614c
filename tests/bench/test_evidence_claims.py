"""What a comparison chooses and says of the papers' claims, on made-up rows of known truth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from evidence_rows import BETAS, flat, over_betas, rows_of, timed

from bench.evidence.claims import Claim, claims, reached, regret
from bench.evidence.intervals import mean
from bench.evidence.results import Results
from bench.evidence.tables import markdown
from fastpref.look.evaluate import Interval


def found_claim(truth: dict, said: str, **how) -> Claim:
    (found,) = [c for c in claims(Results(rows_of(truth, **how))) if c.said == said]
    return found


def test_the_setting_is_chosen_on_one_set_and_reported_on_the_other():
    truth = {
        ("dpo", 200.0, None): flat(0.09, choice=0.01),
        ("dpo", 2000.0, None): flat(0.02, choice=0.05),
        ("dpo", 20000.0, None): flat(0.03, choice=0.02),
    }
    results = Results(rows_of(truth))
    best = results.chosen("dpo")
    assert best.beta == 2000.0
    assert results.choice_gain(best) == pytest.approx(0.05, abs=0.001)
    assert mean(results.gains(best)).value == pytest.approx(0.02, abs=0.001)
    said = markdown(results)
    assert "| dpo, beta 2000 | 1.00 [1.00, 1.00] | +0.020 [" in said
    assert "200: +0.090" in said and "**2000: +0.020" in said


def test_a_win_is_of_the_same_clip_and_a_tie_counts_half():
    rows = rows_of({("dpo", 1.0, None): flat(0.0)}, seeds=1)
    base = rows[0]["scores"]["report"]
    change = [1, -1, 0, 0] + [1, 1, 1, 1] + [0] * 16  # of prompts 0 to 3, 4 to 5 and 0 to 1, ...
    rows[1]["scores"]["report"] = [b + c for b, c in zip(base, change, strict=True)]
    results = Results(rows)
    each = results.wins(results.chosen("dpo"))
    assert each.tolist() == [[0.75, 0.5, 0.5, 0.5, 0.625, 0.625]]


def test_a_name_takes_part_with_the_seeds_that_all_its_settings_have():
    rows = rows_of(over_betas("dpo", (0.01, 0.02, 0.03)))
    late = [r for r in rows if (r["name"], r.get("beta"), r.get("seed")) != ("dpo", 200.0, 2)]
    assert Results(late).seeds("dpo") == [0, 1]
    none = [r for r in rows if r.get("beta") != 200.0 or r["seed"] == 0]
    none = [r for r in none if r.get("beta") != 2000.0 or r["seed"] == 1]
    assert Results(none).names == []
    assert all(c.verdict == "not run" for c in claims(Results(none)))


@pytest.mark.parametrize("lead, verdict", [
    (0.02, "holds"), (-0.02, "does not hold"), (0.0, "cannot be told here"),
])  # fmt: skip
def test_a_lead_is_told_by_its_interval(lead, verdict):
    truth = over_betas("dpo", (0.02, 0.05, 0.03))
    for name in ("dpo_cm", "dpo_cm_loss", "sdpo", "sdpo_ratio", "dpo_windowed"):
        truth |= over_betas(name, (0.02, 0.05 + lead, 0.03))
    truth |= {("dmpo", b, 0.01): flat(0.05 + lead) for b in BETAS}
    truth |= {("sft", None, None): flat(0.05 - lead)}
    truth |= {("dpo_shuffled", 2000.0, None): flat(0.05 - lead)}
    noise = 0.001 if lead else 0.01
    for said in (
        "DPO-C&M is better than DPO",
        "SDPO is better than DPO",
        "DMPO is better than DPO",
        "control: DPO is better than SFT",
        "control: the labels do the work",
    ):
        assert found_claim(truth, said, noise=noise).verdict == verdict, said


@pytest.mark.parametrize("gains, verdict", [
    ((0.048, 0.05, 0.047), "holds"), ((0.0, 0.05, 0.0), "does not hold"),
    ((0.02, 0.05, 0.03), "cannot be told here"),
])  # fmt: skip
def test_sensitivity_is_the_share_lost_over_the_betas(gains, verdict):
    truth = over_betas("dpo", (0.02, 0.05, 0.03)) | over_betas("sdpo", gains)
    found = found_claim(truth, "SDPO is less sensitive to beta than DPO", noise=0.002)
    assert found.verdict == verdict
    lost = [1 - sum(g) / (3 * 0.05) for g in (gains, (0.02, 0.05, 0.03))]
    assert found.found.value == pytest.approx(lost[0] - lost[1], abs=0.02)
    assert regret(torch.tensor([0.02, 0.05, 0.03]), 1).item() == pytest.approx(1 / 3)


def test_sensitivity_needs_gains_and_the_same_betas():
    said = "SDPO is less sensitive to beta than DPO"
    dpo = over_betas("dpo", (0.02, 0.05, 0.03))
    losing = found_claim(dpo | over_betas("sdpo", (-0.05, -0.01, -0.03)), said)
    assert losing.verdict == "cannot be told here (sdpo is not shown to gain)"
    little = found_claim(dpo | over_betas("sdpo", (0.001, 0.002, 0.001)), said, noise=0.02)
    assert little.verdict == "cannot be told here (sdpo is not shown to gain)"
    one = {("sdpo", 2000.0, None): flat(0.05)}
    assert found_claim(dpo | one, said).verdict == "not run"
    more = {("sdpo", 7.0, None): flat(-0.9)} | over_betas("sdpo", (0.02, 0.05, 0.03))
    assert (
        found_claim(dpo | more, said, noise=0.01).verdict == "cannot be told here"
    )  # 7 is no dpo's
    rows = rows_of(dpo | over_betas("sdpo", (0.048, 0.05, 0.047)))
    lost = {"name": "sdpo", "beta": 7.0, "alpha": None, "seed": 1, "diverged": "not finite"}
    (found,) = [c for c in claims(Results([*rows, lost])) if c.said == said]
    assert found.verdict == "cannot be told here (sdpo, beta 7 diverged)"


def test_a_setting_that_diverged_is_never_chosen_and_named():
    rows = rows_of(over_betas("dpo", (0.02, 0.05, 0.03)))
    for row in rows:
        if row["name"] == "dpo" and (row["beta"], row["seed"]) == (2000.0, 1):
            lost = {k: row[k] for k in ("name", "beta", "alpha", "seed")} | {"diverged": "nan"}
            rows[rows.index(row)] = lost
    results = Results(rows)
    assert results.chosen("dpo").beta == 20000.0 and results.seeds("dpo") == [0, 1, 2]
    assert "Diverged, so never chosen: dpo, beta 2000." in markdown(results)


@pytest.mark.parametrize("end, verdict", [
    (0.01, "holds"), (0.045, "does not hold"), (0.0252, "cannot be told here"),
])  # fmt: skip
def test_a_collapse_leaves_less_than_half_of_the_gain_at_a_quarter(end, verdict):
    way = [0.03, 0.05, 0.06, 0.06, 0.06, 0.05, 0.05, end]  # of 8 checkpoints the second
    truth = {("dpo_long", 2000.0, None): flat(end, curve=way)}
    truth |= {("sdpo_long", 2000.0, None): flat(end, curve=way)}
    noise = 0.002 if verdict != "cannot be told here" else 0.01
    found = found_claim(truth, "DPO collapses late", noise=noise)
    assert found.verdict == verdict
    assert found.found.value == pytest.approx(end / 0.05, abs=0.1)
    other = {"holds": "does not hold", "does not hold": "holds"}.get(verdict, verdict)
    assert found_claim(truth, "SDPO does not collapse late", noise=noise).verdict == other


def test_what_is_kept_late_is_told_at_each_beta_and_only_of_gains():
    way = [0.03, 0.05, 0.06, 0.06, 0.06, 0.05, 0.05, 0.02]
    truth = {("dpo_long", 2000.0, None): flat(0.02, curve=way)}
    truth |= {("sdpo_long", 2000.0, None): flat(0.05, curve=[*way[:-1], 0.05])}
    kept = found_claim(truth, "SDPO keeps more late than DPO")
    assert kept.verdict == "holds" and kept.found.value == pytest.approx(1 - 0.4, abs=0.05)
    lower = {(f"{n}_long", 600.0, None): flat(0.0, curve=[-0.01] * 4) for n in ("dpo", "sdpo")}
    each = [c for c in claims(Results(rows_of(truth | lower))) if c.said == "DPO collapses late"]
    assert [c.measured[-10:] for c in each] == [" beta 2000", ", beta 600"]
    assert [c.verdict for c in each][1] == "cannot be told here (dpo_long is not shown to gain)"
    none = found_claim(over_betas("dpo", (0.02, 0.05, 0.03)), "DPO collapses late")
    assert none.verdict == "not run"


def test_a_point_that_one_seed_alone_has_is_left_out():
    rows = rows_of({("dpo_long", 600.0, None): flat(0.05, curve=[0.01 * i for i in range(1, 9)])})
    extra = dict(rows[1]["curve"][2], step=2.5)
    rows[1]["curve"].insert(2, extra)
    results = Results(rows)
    (setting,) = results.settings("dpo_long")
    assert results.steps(setting) == list(range(1, 9))
    assert results.curve(setting).shape == (8, 3, 6)
    assert results.seconds(setting).tolist() == [[float(i)] * 3 for i in range(1, 9)]


@pytest.mark.parametrize("alphas, betas, inside", [
    ((0.02, 0.05, 0.03), (0, 0.03, 0), ("holds", "holds")),
    ((0.05, 0.02, 0.03), (0.03, 0, 0), ("does not hold", "does not hold")),
    ((0.05, 0.05, 0.01), (0, 0.03, 0.03), ("cannot be told here", "cannot be told here")),
])  # fmt: skip
def test_dmpos_optimum_is_inside_if_both_edges_are_worse(alphas, betas, inside):
    truth = {
        ("dmpo", beta, alpha): flat(a + b)
        for alpha, a in zip((0.001, 0.01, 0.1), alphas, strict=True)
        for beta, b in zip(BETAS, betas, strict=True)
    }
    noise = 0.001 if inside[0] != "cannot be told here" else 0.01
    for axis, verdict in zip(("alpha", "beta"), inside, strict=True):
        said = f"DMPO's best {axis} lies inside the grid"
        assert found_claim(truth, said, noise=noise).verdict == verdict, axis


def test_spos_time_to_dpos_gain():
    """DPO ends after 40 s at 0.04, SPO is there after 2.67 of its 4 quarters."""
    loop, whole = "SPO takes less time to DPO's gain", "the same, with what stands before"
    fifth = "SPO takes at most a fifth of DPO's time"
    found = found_claim(timed(6.0, 60.0), loop)
    assert found.verdict == "holds"
    assert found.found.value == pytest.approx(6.0 * 4 * 0.04 / 0.06 / 40, rel=0.05)
    found = found_claim(timed(6.0, 60.0), whole)
    assert found.verdict == "does not hold"
    assert found.found.value == pytest.approx((60 + 16) / 50, rel=0.05)
    assert found_claim(timed(6.0, 60.0), fifth).verdict == "does not hold"
    assert found_claim(timed(2.0, 60.0), fifth).verdict == "holds"
    never = found_claim(timed(6.0, 60.0, end=0.02), loop)
    assert never.verdict == "does not hold" and never.found.low == math.inf
    # DPO has 0.02 after half of its 40 s
    other = found_claim(timed(4.0, 60.0, end=0.02), "DPO takes more time to SPO's gain")
    assert other.verdict == "holds" and other.found.value == pytest.approx(20 / 16, rel=0.05)
    assert found_claim(timed(14.0, 60.0), loop, noise=0.02).verdict == "cannot be told here"


def test_dpo_is_charged_to_where_it_first_had_its_final_gain_and_must_have_one():
    early = timed(6.0, 60.0)
    early["dpo", 2000.0, None]["curve"] = [0.04, 0.05, 0.05, 0.04]  # after 10 of 40 s
    found = found_claim(early, "SPO takes less time to DPO's gain")
    assert found.verdict == "does not hold" and found.found.value == pytest.approx(1.6, rel=0.1)
    nothing = timed(6.0, 60.0)
    for beta in BETAS:
        nothing["dpo", beta, None] = flat(-0.01, curve=[-0.01] * 4)
    found = found_claim(nothing, "SPO takes less time to DPO's gain")
    assert found.verdict == "cannot be told here (dpo is not shown to gain)"


def test_seconds_to_a_gain_stand_on_the_line_between_two_points():
    gains, seconds = torch.tensor([0.02, 0.06, 0.04]), torch.tensor([1.0, 3.0, 4.0])
    for goal, expected in ((0.01, 0.5), (0.04, 2.0), (0.06, 3.0), (0.07, math.inf), (-0.1, 0.0)):
        assert reached(torch.tensor(goal), gains, seconds).item() == pytest.approx(expected)


def test_the_safeguard_keeps_winners_at_equal_beta_and_its_cost():
    truth = over_betas("dpo", (0.03, 0.05, 0.04), winner=0.05)
    truth |= over_betas("dpo_safeguard", (0.02, 0.03, 0.04), winner=-0.01)
    kept = found_claim(truth, "the safeguard keeps winners better than DPO")
    assert kept.verdict == "holds" and kept.found.value == pytest.approx(-0.06, abs=0.001)
    rise = found_claim(truth, "with it the winner's error does not rise")
    assert rise.verdict == "holds" and rise.found.value == pytest.approx(-0.01, abs=0.001)
    cost = found_claim(truth, "it costs gain at equal beta")
    assert cost.verdict == "holds" and cost.found.value == pytest.approx(-0.01, abs=0.001)
    at_best = found_claim(truth, "it costs gain at the betas chosen")
    assert at_best.found.value == pytest.approx(-0.01, abs=0.002)  # 0.05 to 0.04
    worse = truth | over_betas("dpo_safeguard", (0.02, 0.03, 0.04), winner=0.08)
    for said in (
        "the safeguard keeps winners better than DPO",
        "with it the winner's error does not rise",
    ):
        assert found_claim(worse, said).verdict == "does not hold"


def test_a_verdict_needs_the_whole_interval_on_one_side():
    claim = Claim("", "", Interval(0.1, 0.05, 0.15))
    assert claim.verdict == "holds"
    assert replace(claim, below=True).verdict == "does not hold"
    assert replace(claim, edge=0.1).verdict == "cannot be told here"
    assert replace(claim, edge=0.2, below=True).verdict == "holds"
    assert replace(claim, found=Interval(0.0, 0.0, 0.0)).verdict == "cannot be told here"
    assert replace(claim, found=None).verdict == "not run"
    assert replace(claim, silent="why").verdict == "cannot be told here (why)"


def test_of_one_seed_alone_nothing_is_judged():
    truth = over_betas("dpo", (0.02, 0.05, 0.03)) | over_betas("sdpo", (0.02, 0.09, 0.03))
    found = found_claim(truth, "SDPO is better than DPO", seeds=1)
    assert found.verdict == "cannot be told here (one seed alone)"


def test_which_way_round():
    """Each said of two names, with a lead of the first."""
    truth = {("dpo", 2000.0, None): flat(0.01)}
    high = {"dpo_cm": 0.08, "sdpo_ratio": 0.09, "dpo_cm_loss": 0.05, "sdpo": 0.06}
    truth |= {(name, 2000.0, None): flat(gain) for name, gain in high.items()}
    truth |= {("dpo_windowed", 2000.0, None): flat(0.02), ("spo", 10.0, None): flat(0.07)}
    truth |= {("sft", None, None): flat(0.0)}
    found = {c.said: c for c in claims(Results(rows_of(truth)))}
    ratio = "the weight does more in the ratio than on the loss: "
    window = "control: the weight does more than a window of noise levels: "
    leads = {ratio + "C&M": 0.03, ratio + "SDPO": 0.03, window + "C&M": 0.06, window + "SDPO": 0.04}
    leads |= {"SPO is better than DPO": 0.06, "control: DPO is better than SFT": 0.01}
    leads |= {"the same, the weight on the loss": 0.04, "the same, the weight in the ratio": 0.08}
    for said, lead in leads.items():
        assert found[said].found.value == pytest.approx(lead, abs=0.002), said


def test_the_tables_columns():
    truth = {("dpo", 2000.0, None): flat(0.02), ("sdpo", 2000.0, None): flat(0.05, winner=0.1)}
    rows = rows_of(truth)
    for row in rows:
        if row["name"] == "sdpo":
            row["errors"][1] = [round(1.3 * e) for e in row["errors"][1]]
    said = markdown(Results(rows))
    (line,) = [x for x in said.splitlines() if x.startswith("| sdpo, beta 2000 |")]
    gain, lead, winner, loser = (cell.strip() for cell in line.split("|")[3:7])
    assert gain.startswith("+0.050 [") and lead.startswith("+0.030 [")
    assert winner.startswith("+10.0 % [") and loser.startswith("+30.0 % [")
    judged = [c for c in claims(Results(rows)) if c.found is not None]
    assert f" {len(judged)} intervals are read here" in said and judged
    assert "Seconds are the process's own time." in said
    for row in rows:
        row["threads"] = 4
    assert "Seconds are wall time." in markdown(Results(rows))


def test_rows_of_several_calls_with_other_betas_make_a_page():
    truth = over_betas("dpo", (0.02, 0.05, 0.03))
    truth |= {("dpo_shuffled", b, None): flat(0.0) for b in (200.0, 2000.0)}
    truth |= {("dpo_safeguard", 7.0, None): flat(0.01)}
    found = {c.said: c for c in claims(Results(rows_of(truth)))}
    assert found["control: the labels do the work"].found.value == pytest.approx(0.035, abs=0.001)
    assert found["the safeguard keeps winners better than DPO"].verdict == "not run"
    assert found["with it the winner's error does not rise"].found is not None
    own = over_betas("dpo_safeguard", (0.01, 0.02, 0.01), winner=-0.01)
    assert found_claim(own, "with it the winner's error does not rise").verdict == "holds"
    alone = {("dpo_shuffled", 7.0, None): flat(0.0), ("dpo", 2000.0, None): flat(0.05)}
    assert found_claim(alone, "control: the labels do the work").verdict == "not run"
