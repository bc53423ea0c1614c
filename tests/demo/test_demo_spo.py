"""The demo's SPO: its CLIP, its preference model, its row, what it cost and the words for it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import command
from test_demo import row

from fastpref.demo import clips, online, timeline
from fastpref.demo.pairs import SAMPLING_STEPS, make_pairs, write_rows
from fastpref.demo.pretrain_clip import WORDS, compare
from fastpref.demo.run import BASE, Demo, Options, base_sampler, main, parse
from fastpref.demo.timeline import Spent, elapsed, lines, sentences
from fastpref.look.report import read_metrics
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.media import Sampling, decode, write_clip
from fastpref.spo.preference_model import StepAwarePreferenceModel


@pytest.fixture(scope="module")
def base():
    return base_sampler()


# --- the CLIP that ships ---


def test_the_shipped_clip_tells_prompts_apart_and_reads_every_word():
    model = StepAwarePreferenceModel.from_pretrained(online.CLIP, frames="tile")
    prompts = clips.PAIR_PROMPTS + clips.NEVER_SEEN
    videos = torch.stack([clips.perfect(text) for text in prompts]).float() / 255
    with torch.no_grad():
        best = compare(model, videos, prompts).argmax(1)
    assert (best == torch.arange(len(prompts))).double().mean() > 0.9
    words = model.tokenizer(prompts)["input_ids"]
    assert all(len(ids) == 7 and WORDS.index("<unk>") not in ids for ids in words)
    assert all(ids[0] == 1 and ids[-1] == len(WORDS) - 1 == max(ids) for ids in words)


def test_candidates_stand_best_first_as_the_noisy_judge_saw_them(base, tmp_path):
    known = make_pairs(base, tmp_path, 6, "pairs")
    pairs, ranked = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("metadata.jsonl", "ranked.jsonl")
    )
    table = []
    for pair, record in zip(pairs, ranked, strict=True):
        names = record["candidates"]
        assert (names[0], names[-1]) == (pair["chosen"], pair["rejected"])
        assert len(set(names)) == 6
        frames = [decode((tmp_path / n).read_bytes(), Sampling()).frames for n in names]
        table.append([clips.judge(pair["prompt"], clip)["score"] for clip in frames])
    table = torch.tensor(table)
    assert (table[:, 0] - table[:, -1]).tolist() == pytest.approx(known["gaps"], abs=1e-6)
    assert (table[:, :3].mean(1) > table[:, 3:].mean(1)).all()


def test_accuracy_is_of_the_chosen_clip_at_every_noise_level(base, tmp_path):
    """A clip of the prompt against one of another: the plain CLIP tells them, swapped it errs."""
    rows = []
    for i, text in enumerate(clips.PAIR_PROMPTS[:12]):
        other = clips.PAIR_PROMPTS[(i + 18) % 36]
        for name, shown in (("right", text), ("wrong", other)):
            write_clip(tmp_path / f"{i}-{name}.mp4", clips.perfect(shown))
        rows.append({"prompt": text, "chosen": f"{i}-right.mp4", "rejected": f"{i}-wrong.mp4"})
    found = []
    for swapped in (False, True):
        folder = tmp_path / f"set-{swapped}"
        if swapped:
            rows = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
        write_rows(tmp_path / "metadata.jsonl", rows)
        encode("toy", BASE, tmp_path, folder, progress=False)
        clip = StepAwarePreferenceModel.from_pretrained(online.CLIP, frames="tile")
        clip.save_pretrained(tmp_path / "clip")
        found.append(online.accuracy(base, str(tmp_path / "clip"), PairDataset(folder), 7))
    assert len(found[0]) == 4
    assert found[0][0] == 1 and found[1][0] == 0
    assert found[0][1] > 0.8 and found[1][1] < 0.2


# --- the row ---


def test_spo_has_its_own_scale_of_beta_and_is_one_row(tmp_path):
    options = parse(["--objectives", "dpo,spo", "--betas", "500,2000"])
    assert options.objectives == ["dpo", "spo"]
    with pytest.raises(ValueError, match=r"expected some of dpo,.*,spo, got 'ppo'"):
        parse(["--objectives", "ppo"])


@pytest.mark.slow
def test_a_small_row_of_spo_learns_samples_trains_and_is_timed(tmp_path):
    demo = Demo(Options(objectives=["spo"], output_dir=tmp_path / "d", pairs=3, steps=2, clips=2))
    found = demo.run("spo", None, 0, "spo")
    assert found.beta is None
    spent = found.spent
    assert len(spent.accuracy) == 4 and spent.before > 0
    assert len(spent.curve) == 1 and spent.curve[0][0] > 0
    assert spent.curve[0][1] == pytest.approx(found.gain.value, abs=1e-9)
    totals = spent.sampled
    # 3 prompts a round: of 10 steps six make 4 candidates each, which the network then has seen;
    # before them it is asked at the start and after one step.
    assert totals["judged"] == 3 * 6
    assert totals["decodes"] == 4 * totals["judged"]
    assert totals["network"] == 3 * 2 + totals["decodes"]
    assert 0 < totals["pairs"] < totals["judged"]
    learned = read_metrics(tmp_path / "d" / "spm")[-1]
    assert learned["global_step"] == 4
    index = PairDataset(tmp_path / "d" / "encoded" / "ranked")
    assert len(index) == 3 * 3 * 15, "every candidate against every other"
    trained = read_metrics(tmp_path / "d" / "spo")[-1]
    assert trained["global_step"] == 1 and trained["online/kept"] > 0
    assert SAMPLING_STEPS == 20


# --- seconds and words ---


def test_elapsed_adds_what_was_logged_and_leaves_out_what_has_no_time(tmp_path):
    rows = [
        {"global_step": 0, "eval/accuracy": 0.5},
        {"global_step": 5, "perf/seconds_per_pair": 0.1},
        {"global_step": 15, "perf/seconds_per_pair": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert elapsed(tmp_path, 8) == pytest.approx({5: 4.0, 15: 20.0})


def test_a_gain_is_reached_on_the_line_between_two_points():
    spent = Spent(curve=[(10.0, 0.02), (20.0, 0.06)])
    assert spent.reaches(0.01) == pytest.approx(5)
    assert spent.reaches(0.03) == pytest.approx(12.5)
    assert spent.reaches(0.06) == pytest.approx(20)
    assert spent.reaches(0.07) is None
    assert Spent(curve=[(10.0, -0.01), (20.0, 0.01)]).reaches(0.0) == pytest.approx(15)


TOTALS = {"judged": 100, "pairs": 40, "network": 800, "decodes": 400, "seconds": 8.0}


def timed(name: str, curve: list[tuple[float, float]], **more):
    beta = None if name == "spo" else 2000.0
    return replace(row(name, [0.1] * 4, beta=beta), spent=Spent(curve=curve, **more))


def test_the_words_compare_spo_with_dpo_at_equal_gain(tmp_path):
    dpo = timed("dpo", [(10.0, 0.03), (20.0, 0.05)], before=14.0)
    how = {"before": 5.0, "accuracy": [0.9, 0.8, 0.7, 0.6], "sampled": TOTALS}
    spo = timed("spo", [(8.0, 0.04), (16.0, 0.06)], **how)
    assert lines([dpo, row("sft", [0.0]), spo]) == [
        ["dpo", "20 s", "14 s", "+0.030, +0.050"],
        ["spo", "16 s", "5 s", "+0.040, +0.060"],
    ]
    said = " ".join(sentences([dpo, spo]))
    assert "right on 90, 80, 70, 60 % of unseen pairs" in said
    assert "a pair of 40 of 100 groups" in said
    assert "20.0 samples of the network and 10.0 decodes, and sampling 50 % of the time" in said
    assert "+0.050 after 20 s, SPO has after 12 s of training (0.60 of DPO's)" in said
    assert "with what stands before it after 17 s of 34 s (0.50)." in said
    weak = replace(spo, spent=replace(spo.spent, curve=[(16.0, 0.04)]))
    assert "SPO does not reach DPO's score gain, +0.050 after 20 s." in sentences([dpo, weak])
    lost = replace(dpo, spent=Spent(curve=[(20.0, -0.01)]))
    assert len(sentences([lost, spo])) == 2  # nothing to reach
    assert sentences([dpo]) == []
    timeline.picture(tmp_path / "p.png", [dpo, spo, replace(spo, seed=1)])
    assert (tmp_path / "p.png").stat().st_size > 5000


# --- the whole ---


@pytest.mark.slow
def test_spo_beats_the_base_in_the_demos_world(tmp_path):
    found = main(["--objectives", "spo,dpo", "--output_dir", str(tmp_path / "demo")])
    rows = {row.name: row for row in found}
    assert rows["spo"].wins.value >= 0.8
    assert rows["spo"].gain.low > 0
    assert min(rows["spo"].spent.accuracy[:3]) > 0.75
    assert len(rows["spo"].spent.curve) == len(rows["dpo"].spent.curve) == 4


@pytest.mark.slow
def test_the_command_shows_spo_in_its_tables_pictures_and_page(tmp_path):
    folder = tmp_path / "demo"
    small = ["--pairs", "8", "--steps", "4", "--clips", "12", "--output_dir", str(folder)]
    shown = []
    for _ in range(2):  # the second time it takes up what stands there
        process = command("demo", "--objectives", "dpo,spo", *small)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        shown.append(out[out.index("objective ") : out.index(str(folder / "report.html"))])
    assert shown[0] == shown[1]
    tables = [line.split()[0] for line in shown[0].splitlines() if re.match("(dpo|spo)  ", line)]
    assert tables == ["dpo", "spo"] * 2
    page = (folder / "report.html").read_text()
    assert "gain_vs_seconds.png" in page and "spo: win rate" in page
    results = json.loads((folder / "results.json").read_text())
    spo = next(run for run in results["runs"] if run["objective"] == "spo")
    assert spo["beta"] is None and spo["before"] > 0
    assert spo["sampled"]["decodes"] > spo["sampled"]["pairs"] > 0
    assert Path(folder / "spo" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
