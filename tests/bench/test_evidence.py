"""The comparison of objectives: its grid, its choice, its intervals, its verdicts, its page."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.evidence import __main__ as command
from bench.evidence import page, runs, toy
from bench.evidence.claims import Claim, claims, reached, regret
from bench.evidence.grid import LONG, NAMES, Setting, grid
from bench.evidence.intervals import STUDENT, difference, interval, mean
from bench.evidence.results import Results
from bench.evidence.tables import markdown
from bench.evidence.world import World, asked, once
from fastpref.demo import clips
from fastpref.demo.pairs import SEEDS
from fastpref.look.evaluate import Interval
from fastpref.run.guard import Diverged

BETAS = (200.0, 2000.0, 20000.0)
OWN = {"spo": (3.0, 10.0, 30.0)}

# --- the grid and what each of its runs is trained with ---


def test_every_objective_stands_at_every_beta_alpha_and_seed():
    found = grid(list(NAMES), BETAS, OWN, (0.01, 0.1), 3)
    count = {name: sum(s.name == name for s in found) for name in NAMES}
    once_each = {"sft", "dpo_shuffled", *LONG}
    expected = {n: 3 * (1 if n in once_each else 6 if n == "dmpo" else 3) for n in NAMES}
    assert count == expected
    assert len({s.label for s in found}) == len(found)
    assert {s.beta for s in found if s.name == "dpo_shuffled"} == {2000.0}
    assert {s.beta for s in found if s.name == "spo"} == {3.0, 10.0, 30.0}
    assert [s.seed for s in found] == sorted(s.seed for s in found)  # seed by seed
    five = grid(["dpo_long"], (1.0, 2.0, 5.0, 4.0, 3.0), {}, (), 1)
    assert [s.beta for s in five] == [3.0]
    with pytest.raises(ValueError, match="odd number of them, got 2"):
        grid(["dpo_long"], BETAS[:2], {}, (), 1)


def a_world(**other) -> World:
    nothing = dict.fromkeys(("load", "clips", "judge", "errors"))
    hyper = {name: toy._beside_beta(name) for name in toy.HYPER}
    paths = {"model": Path("m"), "data": Path("right"), "shuffled": Path("wrong")}
    rest = {"settings": {"train_batch_size": 8}, "hyper": hyper, "before": 0.0}
    return World("toy", choice=([], []), report=([], []), **paths, **rest, **nothing, **other)


def test_runs_differ_by_what_their_name_says_and_nothing_else():
    found = {}
    for name in (n for n in NAMES if n != "spo"):
        beta = None if name == "sft" else 2000.0
        setting = Setting(name, beta, 0.1 if name == "dmpo" else None, 1)
        made = runs.config(a_world(), setting, setting.steps(80), Path("out"))
        found[name] = {k: v for k, v in made.to_dict().items() if v is not None}
    plain = found["dpo"]
    assert (plain["objective"], plain["beta"], plain["seed"]) == ("dpo", 2000.0, 1)
    assert (plain["max_train_steps"], plain["checkpointing_steps"]) == (80, 20)

    def changes(name: str) -> dict:
        mine = found[name]
        keys = mine.keys() | plain.keys()
        return {k: mine.get(k) for k in keys if mine.get(k) != plain.get(k)}

    assert changes("ipo") == {"objective": "ipo"}
    assert changes("dmpo") == {"objective": "dmpo", "alpha": 0.1}
    weight = {"importance_steps": 5}
    assert changes("dpo_cm") == {"objective": "dpo_cm", **weight}
    assert changes("dpo_cm_loss") == {"objective": "dpo_cm", "placement": "loss", **weight}
    assert changes("sdpo") == {"objective": "sdpo", **weight}
    assert changes("sdpo_ratio") == {"objective": "sdpo", "placement": "ratio", **weight}
    assert changes("dpo_safeguard") == {"safeguard": 0.6}
    assert changes("sft") == {"objective": "sft", "beta": None}
    assert [*map(float, changes("dpo_windowed").pop("timestep_range"))] == [0.35, 1.0]
    assert changes("dpo_windowed").keys() == {"timestep_range"}
    assert changes("dpo_shuffled") == {"data": "wrong"}
    longer = {"max_train_steps": 320, "checkpointing_steps": 40, "checkpoints_total_limit": 32}
    assert changes("dpo_long") == longer
    assert changes("sdpo_long") == {"objective": "sdpo", **weight, **longer}


def test_choice_and_report_share_no_prompt_and_no_seed_with_each_other_or_the_pairs():
    choice = asked(clips.PAIR_PROMPTS, toy.CHOICE_SEED, toy.CLIPS)
    report = asked(clips.HELD_OUT, SEEDS["evaluation"], toy.CLIPS)
    assert not set(choice[0]) & set(report[0])
    assert set(report[0]) == set(clips.HELD_OUT) and set(choice[0]) == set(clips.PAIR_PROMPTS)
    blocks = [*SEEDS.values(), toy.CHOICE_SEED]
    assert len(set(blocks)) == len(blocks)  # a million apart, and fewer clips in each
    assert min(abs(a - b) for a in blocks for b in blocks if a != b) == 1_000_000


def test_what_was_made_once_is_not_made_again(tmp_path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"right": 1.0}

    first, second = (once(tmp_path / "x.json", make) for _ in range(2))
    assert first == second and first["right"] == 1.0 and first["seconds"] >= 0 and len(made) == 1


# --- intervals ---


def table(seeds: int, prompts: int, a: float, b: float, c: float, seed: int) -> torch.Tensor:
    """Normal effects of seeds (sd a), of prompts (b), and of both together (c)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return a * normal(seeds, 1) + b * normal(1, prompts) + c * normal(seeds, prompts)


def test_an_interval_is_that_of_a_bootstrap_written_out():
    """Loops and Python's own random numbers, 4,000 times, beside it."""
    x = table(3, 5, 0.3, 1.0, 0.1, 1)
    stretch, r = STUDENT[2] / 1.959963984540054, random.Random(1)
    grand = x.mean().item()
    by_prompt = x.mean(0).tolist()
    found = []
    for _ in range(4000):
        seeds = [r.randrange(3) for _ in range(2)]
        prompts = [r.randrange(5) for _ in range(4)]
        drawn = sum(x[s, p].item() for s in seeds for p in prompts) / 8
        over_all_seeds = sum(by_prompt[p] for p in prompts) / 4
        found.append(over_all_seeds + stretch * (drawn - over_all_seeds))
    found.sort()
    ours = mean(x)
    assert ours.value == pytest.approx(grand, abs=1e-12)
    assert ours.low == pytest.approx(found[99], abs=0.06)
    assert ours.high == pytest.approx(found[3899], abs=0.06)


def test_an_interval_has_the_width_of_both_variances():
    """z sqrt(t^2/z^2 s_S^2/S + s_P^2/P), where effects add and both are many."""
    x = table(10, 40, 1.0, 2.0, 0.0, 2)
    variance = (STUDENT[9] / 1.96) ** 2 * x.mean(1).var() / 10 + x.mean(0).var() / 40
    ours = mean(x)
    assert (ours.high - ours.low) / 2 == pytest.approx(1.96 * variance.sqrt().item(), rel=0.05)
    one = mean(x[:1])  # one seed: prompts alone
    alone = 1.96 * (x[0].var() / 40).sqrt().item()
    assert (one.high - one.low) / 2 == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("a, b, c", [(1, 1, 0.3), (0.1, 1, 0.3), (1, 0.1, 0.3)])
def test_intervals_of_three_seeds_and_twelve_prompts_hold_the_truth(a, b, c):
    held = 0
    for seed in range(200):
        low, high = mean(table(3, 12, a, b, c, 100 + seed))[1:]
        held += low <= 0 <= high
    assert 0.86 <= held / 200 <= 0.995, held / 200


def test_a_difference_is_paired():
    """What seeds and prompts do to both alike falls out."""
    both = table(3, 12, 5.0, 5.0, 0.0, 3)
    one, other = both + 0.1 + table(3, 12, 0, 0, 0.01, 4), both
    found = difference(one, other)
    assert 0.08 < found.low < found.value < found.high < 0.12


def test_the_statistic_is_of_means_not_a_mean_of_statistics():
    x, y = table(3, 6, 0, 0, 1, 5) + 4, table(3, 6, 0, 0, 1, 6) + 8
    found = interval(lambda m: m[..., 0] / m[..., 1], [x, y])
    assert found.value == pytest.approx((x.mean() / y.mean()).item())
    assert found.low < found.value < found.high


# --- made-up rows ---

PROMPTS, EACH = 6, 4


def rows_of(truth: dict, seeds: int = 3, noise: float = 0.001) -> list[dict]:
    """Rows of runs with known gains. truth: (name, beta, alpha) to a dict of gain, and where they
    differ choice (gain there), winner (error over the base's), curve (gains), seconds, before.
    """
    g = torch.Generator().manual_seed(0)
    report = [f"prompt {i % PROMPTS}" for i in range(PROMPTS * EACH)]
    choice = [f"other {i % PROMPTS}" for i in range(PROMPTS * EACH)]
    base = [7000 + 10 * i for i in range(PROMPTS * EACH)]
    errors = [10000 + 100 * i for i in range(8)]
    shared = {"device": "a CPU", "torch": "2", "threads": 1, "commit": "abc"}
    first = {"name": "base", "world": "toy", "pairs": 8, "steps": 4, "clips": len(report)}
    first |= {"prompts": {"choice": choice, "report": report}, "parameters": 1, **shared}
    easier = [v + 500 for v in base]
    first |= {"scores": {"choice": easier, "report": base}, "errors": [errors, errors]}

    def noisy(values: list, mean: float, spread: float) -> list[int]:
        wobble = torch.randn(len(values), generator=g).tolist()
        return [round(v + mean + spread * w) for v, w in zip(values, wobble, strict=True)]

    rows = [first]
    for (name, beta, alpha), true in truth.items():
        for seed in range(seeds):
            curve = []
            for i, gain in enumerate(true.get("curve", [true["gain"]] * 4), 1):
                means = noisy([7000.0] * PROMPTS, 1e4 * gain, 1e4 * noise)
                # the base's mean of each prompt
                means = [m + 10 * p + 60 * 1.5 for p, m in enumerate(means)]
                point = {"step": i, "seconds": i * true.get("seconds", 1.0), "report": means}
                curve.append(point | {"accuracy": 0.8, "winner": 0.0, "loser": 0.0})
            mine = {"name": name, "beta": beta, "alpha": alpha, "seed": seed, **shared}
            mine["scores"] = {
                "report": noisy(base, 1e4 * true["gain"], 1e4 * noise),
                "choice": noisy(easier, 1e4 * true.get("choice", true["gain"]), 1e4 * noise),
            }
            up = [e * true.get("winner", 0.0) for e in errors]
            winners = [round(e + u) for e, u in zip(errors, up, strict=True)]
            mine["errors"] = [noisy(winners, 0, 3), errors]
            mine |= {"curve": curve, "logged": [[1, 0.5], [2, 0.6]], "seconds_per_pair": 0.1}
            rows.append(mine | {"before": true.get("before", 0.0)})
    return rows


def flat(gain: float, **other) -> dict:
    return {"gain": gain, **other}


def found_claim(truth: dict, said: str, **how) -> Claim:
    (found,) = [c for c in claims(Results(rows_of(truth, **how))) if c.said == said]
    return found


def over_betas(name: str, gains: tuple, **other) -> dict:
    return {(name, b, None): flat(g, **other) for b, g in zip(BETAS, gains, strict=True)}


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


@pytest.mark.parametrize("end, verdict", [
    (0.01, "holds"), (0.09, "does not hold"), (0.0502, "cannot be told here"),
])  # fmt: skip
def test_a_late_collapse_is_the_change_from_a_quarter_to_the_end(end, verdict):
    way = [0.03, 0.05, 0.06, 0.06, 0.06, 0.05, 0.05, end]  # of 8 checkpoints the second
    truth = {("dpo_long", 2000.0, None): flat(end, curve=way)}
    kept = [0.03, 0.05, 0.06, 0.06, 0.06, 0.05, 0.05, 0.05]
    truth |= {("sdpo_long", 2000.0, None): flat(0.05, curve=kept)}
    found = found_claim(truth, "DPO collapses late", noise=0.002)
    assert found.verdict == verdict
    assert found.found.value == pytest.approx(end - 0.05, abs=0.003)
    relative = found_claim(truth, "SDPO keeps more of it late than DPO", noise=0.002)
    assert relative.verdict == verdict  # the other changes by 0


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


def timed(seconds: float, before: float, end: float = 0.06) -> dict:
    truth = over_betas("dpo", (0.02, 0.04, 0.03), seconds=10.0, before=10.0)
    way = [end / 4, end / 2, 3 * end / 4, end]
    return truth | {("spo", 10.0, None): flat(end, seconds=seconds, curve=way, before=before)}


def test_spos_time_to_dpos_gain():
    """DPO ends after 40 s at 0.04, SPO is there after 2.67 of its 4 quarters."""
    loop, whole = "SPO takes less time to DPO's gain", "the same, with what stands before"
    fifth = "SPO takes at most a fifth of DPO's time"
    found = found_claim(timed(6.0, 60.0), loop)
    assert found.verdict == "holds"
    assert found.found.value == pytest.approx(6.0 * 4 * 0.04 / 0.06 / 40, rel=0.03)
    found = found_claim(timed(6.0, 60.0), whole)
    assert found.verdict == "does not hold"
    assert found.found.value == pytest.approx((60 + 16) / 50, rel=0.03)
    assert found_claim(timed(6.0, 60.0), fifth).verdict == "does not hold"
    assert found_claim(timed(2.0, 60.0), fifth).verdict == "holds"
    never = found_claim(timed(6.0, 60.0, end=0.02), loop)
    assert never.verdict == "does not hold" and never.found.low == math.inf
    assert found_claim(timed(15.0, 60.0), loop, noise=0.02).verdict == "cannot be told here"


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


# --- the command ---


def test_tables_and_pictures_are_made_from_rows_alone(tmp_path, capsys):
    truth = timed(6.0, 60.0) | over_betas("sdpo", (0.02, 0.05, 0.03))
    truth |= {("dpo_long", 2000.0, None): flat(0.05, curve=[0.01 * i for i in range(8)])}
    path = tmp_path / "rows.jsonl"
    for row in (rows := rows_of(truth)):
        runs.append(path, runs.read(path), row)
    assert runs.read(path) == rows
    assert command.main(["--table", str(path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "rows.md").read_text().strip() == said.strip()
    for name in ("winner", "beta", "steps", "seconds"):
        assert (tmp_path / f"rows_{name}.png").stat().st_size > 5000
    path.write_text(path.read_text() + '{"cut')
    with pytest.raises(ValueError, match=rf"rows.jsonl line {len(rows) + 1}: expected a row"):
        command.main(["--table", str(path)])


@pytest.mark.parametrize("flags, match", [
    (["--objectives", "dpo,nothing"], "--objectives"),
    (["--betas", "0"], "--betas: expected finite numbers above 0"),
    (["--betas", "200,2000"], "odd number"),
    (["--alphas", "x"], "--alphas: expected numbers"),
    (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    (["--pairs", "4"], "--pairs: expected at least 8, got 4"),
    (["--table", "nowhere"], "--table nowhere: expected a file of rows"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, match, tmp_path):
    with pytest.raises(ValueError, match=match) as caught:
        command.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_one_size_of_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "compare", lambda options: 1)
    flags = ["--output_dir", str(tmp_path), "--pairs", "8", "--steps", "2"]
    command.main(flags)
    command.main([*flags, "--objectives", "dpo", "--betas", "7"])  # more runs of the same
    with pytest.raises(ValueError, match=r"steps \(2 there, 3 here\)\. Choose another") as caught:
        command.main([*flags[:-1], "3"])
    assert "\n" not in str(caught.value)


@pytest.fixture
def rows_done(monkeypatch) -> list[str]:
    """What a comparison of a world of nothing does, run by run, in which beta 20000 diverges."""
    done = []

    def row(world, setting, steps, folder, base):
        if setting.beta == 20000.0:
            raise Diverged("not finite")
        done.append(setting.label)
        time.sleep(0.02)
        return {**vars(setting), "scores": base["scores"], "errors": base["errors"]}

    class AWorld:
        PAIRS, STEPS, CLIPS, OWN = 8, 1, 1, {}
        BETAS = (*BETAS[:2], 5.0)
        __name__ = "bench.evidence.toy"
        prepare = staticmethod(lambda folder, pairs, clips: a_world())

    monkeypatch.setattr(command.importlib, "import_module", lambda name: AWorld())
    monkeypatch.setattr(runs, "row", row)
    scores = {"scores": {"choice": [1], "report": [1]}, "errors": [[1], [1]]}
    monkeypatch.setattr(command, "base_row", lambda *_: {"name": "base", **scores})
    monkeypatch.setattr(command, "tell", lambda path: None)
    return done


def test_time_that_is_over_leaves_the_rest_for_later(tmp_path, rows_done, capsys):
    flags = ["--output_dir", str(tmp_path), "--objectives", "dpo,spo", "--seeds", "1"]
    assert command.main([*flags, "--minutes", "0"]) == 3  # no spo in this world
    assert "3 runs left" in capsys.readouterr().out and not rows_done
    assert command.main([*flags, "--minutes", "0.0001"]) in (2, 3)  # 6 ms: one run at the most
    assert command.main(flags) == 0 and len(rows_done) == 3
    assert command.main(flags) == 0 and len(rows_done) == 3
    assert command.main([*flags[:-1], "2"]) == 0 and len(rows_done) == 6
    assert [runs.key(r) for r in runs.read(tmp_path / "rows.jsonl")][1] == ("dpo", 200.0, None, 0)


def test_a_run_that_diverges_ends_no_other(tmp_path, rows_done, capsys):
    flags = ["--output_dir", str(tmp_path), "--objectives", "dpo,hinge", "--seeds", "1"]
    assert command.main([*flags, "--betas", "20000,7,8"]) == 2 and len(rows_done) == 4
    assert "dpo-beta20000-seed0 is left out, it diverged: not finite" in capsys.readouterr().out


def test_the_page_says_what_its_rows_say():
    if not page.rows_file("toy").exists():
        pytest.skip("no rows are committed")
    assert page.page() == page.PAGE.read_text()
    for name in page.PICTURES:
        assert (page.BENCH / "results" / f"evidence_toy_{name}.png").exists()


def test_what_the_rows_committed_say_of_themselves():
    """Whole, of one size, and of no place."""
    for world in page.WORLDS:
        path = page.rows_file(world)
        if path.exists():
            rows = runs.read(path)
            assert len({runs.key(r) for r in rows}) == len(rows)
            assert all(r["commit"] and "dirty" not in r["commit"] for r in rows)
            assert not any(word in path.read_text() for word in ("/tmp", "/work", "/home"))
            assert json.loads(path.read_text().splitlines()[0])["name"] == "base"
