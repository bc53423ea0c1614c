"""The comparison of objectives: its grid, its runs' configs, its command and its page."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from evidence_rows import BETAS, flat, over_betas, rows_of, timed

from bench.evidence import __main__ as command
from bench.evidence import page, rows, runs, toy
from bench.evidence.grid import LONG, NAMES, Run, grid
from bench.evidence.world import World, asked, once
from fastpref.demo import clips
from fastpref.demo.pairs import SEEDS
from fastpref.run.guard import Diverged

OWN = {"spo": (3.0, 10.0, 30.0)}

# --- the grid and what each of its runs is trained with ---


def test_every_objective_stands_at_every_beta_alpha_and_seed():
    found = grid(list(NAMES), BETAS, OWN, (0.01, 0.1), 3)
    count = {name: sum(s.name == name for s in found) for name in NAMES}
    few = {"sft": 1, "dpo_shuffled": 1, "dmpo": 6} | dict.fromkeys(LONG, 2)
    expected = {n: 3 * few.get(n, 3) for n in NAMES}
    assert count == expected
    assert len({s.label for s in found}) == len(found)
    assert {s.beta for s in found if s.name == "dpo_shuffled"} == {2000.0}
    assert {s.beta for s in found if s.name == "spo"} == {3.0, 10.0, 30.0}
    assert [s.seed for s in found] == sorted(s.seed for s in found)  # seed by seed
    five = grid(["dpo_long"], (1.0, 2.0, 5.0, 4.0, 3.0), {}, (), 1)
    assert [s.beta for s in five] == [3.0, 2.0]
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
        setting = Run(name, beta, 0.1 if name == "dmpo" else None, 1)
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
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not readable"):
        once(tmp_path / "x.json", make)
    assert first == second and first["right"] == 1.0 and first["seconds"] >= 0 and len(made) == 1


# --- the command ---


def test_tables_and_pictures_are_made_from_rows_alone(tmp_path, capsys):
    truth = timed(6.0, 60.0) | over_betas("sdpo", (0.02, 0.05, 0.03))
    truth |= {("dpo_long", 2000.0, None): flat(0.05, curve=[0.01 * i for i in range(8)])}
    path = tmp_path / "rows.jsonl"
    for row in (made := rows_of(truth)):
        rows.append(path, rows.read(path), row)
    assert rows.read(path) == made
    assert command.main(["--table", str(path)]) == 0
    assert "| dpo, beta 2000 |" in capsys.readouterr().out
    pictures = {f"rows_{name}.png" for name in ("winner", "beta", "steps", "seconds")}
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", *pictures}
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)


def broken(change) -> list:
    """Two runs' rows, the last one changed."""
    made = rows_of({("dpo", 7.0, None): flat(0.1)}, seeds=2)
    change(made)
    return made


@pytest.mark.parametrize("change, line, match", [
    (lambda r: r.append("cut"), 4, "all its fields"),
    (lambda r: r.pop(0), 1, "the base model's row"),
    (lambda r: r.append(dict(r[2])), 4, "each run once"),
    (lambda r: r[2].update(name="ppo"), 3, "one of dpo, ipo"),
    (lambda r: r[2].pop("beta"), 3, "all its fields"),
    (lambda r: r[2].update(beta="7"), 3, "as long as the base"),
    (lambda r: r[2].update(seed=None), 3, "as long as the base"),
    (lambda r: r[2]["scores"].pop("choice"), 3, "all its fields"),
    (lambda r: r[2]["scores"].update(report=[1]), 3, "as long as the base"),
    (lambda r: r[2]["scores"]["report"].__setitem__(0, float("nan")), 3, "as long as the base"),
    (lambda r: r[2].update(errors=[[1], [1]]), 3, "as long as the base"),
    (lambda r: r[2].update(curve=[]), 3, "as long as the base"),
    (lambda r: r[2]["curve"][0].pop("report"), 3, "all its fields"),
    (lambda r: r[2]["curve"][0].update(seconds=None), 3, "as long as the base"),
    (lambda r: r[2].pop("threads"), 3, "all its fields"),
    (lambda r: r[2].update(before=None), 3, "as long as the base"),
    (lambda r: r[0].pop("prompts"), 1, "all its fields"),
    (lambda r: r[0].update(scores={"choice": [], "report": []}), 1, "as long as the base"),
])  # fmt: skip
def test_a_row_that_is_none_is_named(tmp_path, change, line, match):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in broken(change)))
    with pytest.raises(ValueError, match=match) as caught:
        rows.read(path)
    assert str(caught.value).startswith(f"{path} line {line}: ") and "\n" not in str(caught.value)


def test_what_is_no_file_of_rows_is_left_as_it_is(tmp_path):
    for name in ("page.md", "notes.txt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="expected a file of rows"):
            command.main(["--table", str(tmp_path / name)])
    (tmp_path / "cut.jsonl").write_text('{"name": "base"')
    with pytest.raises(ValueError, match="line 1: expected JSON"):
        command.main(["--table", str(tmp_path / "cut.jsonl")])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected rows, got an empty file"):
        command.main(["--table", str(tmp_path / "empty.jsonl")])
    assert (tmp_path / "page.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("flags, match", [
    (["--objectives", "dpo,nothing"], "--objectives"),
    (["--betas", "0"], "--betas: expected finite numbers above 0"),
    (["--betas", "200,2000"], "odd number"),
    (["--alphas", "x"], "--alphas: expected numbers"),
    (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    (["--pairs", "4"], "--pairs: expected at least 8, got 4"),
    (["--minutes", "nan"], "--minutes: expected at least 0, got nan"),
    (["--minutes", "-1"], "--minutes: expected at least 0, got -1"),
    (["--output_dir", ""], "--output_dir: expected a folder, got nothing"),
    (["--table", "nowhere"], "--table nowhere: expected a file of rows"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, match, tmp_path):
    with pytest.raises(ValueError, match=match) as caught:
        command.main(["--output_dir", str(tmp_path / "out"), *flags])
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
    """What a comparison of a world of nothing does, run by run."""
    done = []
    base, made = rows_of({("dpo", 7.0, None): flat(0.1)}, seeds=1)

    def row(world, setting, steps, folder, base):
        done.append(setting.label)
        time.sleep(0.02)
        return made | vars(setting)

    class AWorld:
        PAIRS, STEPS, CLIPS, OWN = 8, 4, 24, {}
        BETAS = (*BETAS[:2], 5.0)
        __name__ = "bench.evidence.toy"
        prepare = staticmethod(lambda folder, pairs, clips: a_world())

    monkeypatch.setattr(command.importlib, "import_module", lambda name: AWorld())
    monkeypatch.setattr(runs, "row", row)
    monkeypatch.setattr(command, "base_row", lambda *_: base)
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
    assert [rows.key(r) for r in rows.read(tmp_path / "rows.jsonl")][1] == ("dpo", 200.0, None, 0)


def test_rows_of_another_comparison_are_not_gone_on_with(tmp_path, rows_done):
    flags = ["--output_dir", str(tmp_path), "--objectives", "dpo", "--seeds", "1"]
    command.main(flags)
    path = tmp_path / "rows.jsonl"
    base, *others = rows.read(path)
    for change in ({"pairs": 16}, {"world": "mid"}):
        path.write_text("".join(json.dumps(r) + "\n" for r in (base | change, *others)))
        with pytest.raises(ValueError, match=r"line 1: another comparison's: (pairs|world) \("):
            command.main(flags)
    path.write_text("".join(json.dumps(r) + "\n" for r in others))
    with pytest.raises(ValueError, match="line 1: expected the base model's row"):
        command.main(flags)
    assert len(rows_done) == 3


def test_a_mistake_is_told_before_the_first_run(tmp_path, rows_done):
    flags = ["--output_dir", str(tmp_path), "--objectives", "dpo,dmpo", "--alphas", "0.7"]
    with pytest.raises(ValueError, match=r"alpha.*0\.7"):
        command.main(flags)
    assert not rows_done


def test_a_run_that_diverges_is_a_row_and_is_not_repeated(tmp_path, monkeypatch):
    def diverging(*_):
        raise Diverged("not finite")

    monkeypatch.setattr(runs, "trained", diverging)
    found = runs.row(a_world(), Run("dpo", 7.0, None, 1), 4, tmp_path, {})
    assert (found["name"], found["beta"], found["seed"]) == ("dpo", 7.0, 1)
    assert found["diverged"] == "not finite" and "scores" not in found
    assert rows.line(found, {}) == "diverged, not finite"


def test_held_out_accuracy_is_of_winners_whose_error_fell_more():
    reference = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    change = torch.tensor([[-0.5, -0.25], [0.25, 0.5], [0.5, 0.25], [0.5, 0.5]])
    assert runs.ordered(reference + change, reference) == pytest.approx((2 + 0.5) / 4)


def test_what_the_runs_are_made_of_is_kept(tmp_path, rows_done, monkeypatch):
    flags = ["--output_dir", str(tmp_path), "--objectives", "dpo", "--seeds", "1"]
    command.main(flags)
    monkeypatch.setattr(command, "SAFEGUARD", 0.9)
    with pytest.raises(ValueError, match=r"safeguard \(0\.6 there, 0\.9 here\)"):
        command.main(flags)


def test_no_two_runs_share_a_folder():
    labels = {Run("dpo", beta, None, 0).label for beta in (1000000.1, 1000000.2, 1e6)}
    assert len(labels) == 3 and "dpo-beta1000000-seed0" in labels


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
            kept = rows.read(path)
            assert all(r["commit"] and "dirty" not in r["commit"] for r in kept)
            assert not any(word in path.read_text() for word in ("/tmp", "/work", "/home"))
