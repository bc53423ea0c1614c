"""The demo: its judge, its samplers, the interval maths, and the command from end to end."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from commands import command

from fastpref import oracle
from fastpref.demo import clips
from fastpref.demo.pairs import Sampler, make_pairs, shuffle_labels
from fastpref.demo.run import Demo, Options, base_sampler, evaluation_set, main, parse
from fastpref.demo.summary import HEADER, Row, as_text, average, table, verdict
from fastpref.look import evaluate
from fastpref.look.report import Page, read_metrics, run_report
from fastpref.look.sample import sample, starting_noise
from fastpref.models import toy
from fastpref.pairs.media import Sampling, decode
from fastpref.process import FlowMatching


@pytest.fixture(scope="module")
def base() -> Sampler:
    return base_sampler()


# --- prompts and the judge ---


def test_no_evaluation_prompt_is_ever_trained_on():
    assert len(clips.PAIR_PROMPTS) == 36
    assert len(set(clips.HELD_OUT)) == 12
    assert not set(clips.HELD_OUT) & set(clips.PAIR_PROMPTS)
    assert not set(clips.NEVER_SEEN) & set(clips.PRETRAINING_PROMPTS)
    prompts, seeds = evaluation_set(96)
    assert set(prompts) == set(clips.HELD_OUT)
    assert len(set(seeds)) == 96


def spoiled(kind: str, text: str) -> torch.Tensor:
    """The perfect clip with one flaw."""
    colour, direction = clips.parse(text)
    background = torch.full((1, clips.FRAMES, clips.SIZE, clips.SIZE, 3), clips.BACKGROUND)
    centres = clips.path(direction[None], torch.zeros(1, 2))
    if kind == "direction":
        centres = clips.path(-direction[None], torch.zeros(1, 2))
    elif kind == "smoothness":
        shake = torch.tensor([0.7, -0.7]).repeat(clips.FRAMES // 2)
        centres = centres + shake[None, :, None] * direction.flip(0) * torch.tensor([1.0, -1.0])
    elif kind == "colour":
        colour = 0.4 * colour + 0.6 * torch.tensor([0.5, 0.5, 0.5])
    else:
        background = background + torch.tensor([0.0, 0.2, 0.05])
    clip = clips.render(centres, colour[None], background)[0]
    return (clip * 255).round().to(torch.uint8)


@pytest.mark.parametrize("text", [clips.prompt("red", "right"), clips.prompt("cyan", "up-left")])
@pytest.mark.parametrize("kind", clips.PARTS)
def test_the_judge_sees_each_flaw_in_its_part_and_no_other(kind, text):
    best = clips.judge(text, clips.perfect(text))
    assert best["score"] > 0.98
    worse = clips.judge(text, spoiled(kind, text))
    assert worse[kind] < best[kind] - 0.3
    assert worse["score"] < best["score"] - 0.07
    for other in set(clips.PARTS) - {kind}:
        assert abs(worse[other] - best[other]) < 0.15, other


def test_the_judge_reads_the_prompt():
    clip = clips.perfect(clips.prompt("red", "right"))
    right, wrong = (
        clips.judge(clips.prompt(*asked), clip) for asked in (("red", "right"), ("green", "left"))
    )
    assert right["direction"] == right["colour"] == 1
    assert wrong["direction"] == wrong["colour"] == 0
    with pytest.raises(ValueError, match="demo prompt expected like"):
        clips.judge("a red fox", clip)


@pytest.mark.parametrize("value", [0, 26, 255])
def test_a_clip_without_a_disc_has_a_low_finite_score(value):
    clip = torch.full((8, 12, 12, 3), value, dtype=torch.uint8)
    score = clips.judge(clips.prompt("red", "up"), clip)
    assert score["direction"] == 0
    assert score["colour"] == 0
    assert 0 <= score["score"] <= 0.5


def test_training_clips_are_flawed_in_many_ways_but_rarely_in_all():
    prompts = clips.PRETRAINING_PROMPTS * 4
    videos = clips.flawed(prompts, torch.Generator().manual_seed(0))
    again = clips.flawed(prompts, torch.Generator().manual_seed(0))
    assert torch.equal(videos, again)
    scores = [
        clips.judge(p, (v * 255).round().to(torch.uint8))
        for p, v in zip(prompts, videos, strict=True)
    ]
    for part in clips.PARTS:
        good = sum(s[part] > 0.9 for s in scores) / len(scores)
        assert 0.3 < good < 0.8, part


# --- samplers ---


def test_a_sample_is_a_function_of_prompt_and_seed_alone(base):
    prompts = clips.PAIR_PROMPTS[:5]
    together = base.clips(prompts, [11, 12, 13, 14, 15])
    again = base.clips(prompts, [11, 12, 13, 14, 15])
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for i in (0, 4):
        (alone,) = base.clips([prompts[i]], [11 + i])
        # One grey level: sums of another batch shape may round otherwise.
        assert (alone.int() - together[i].int()).abs().max() <= 1
    (other,) = base.clips([prompts[0]], [99])
    assert not torch.equal(other, together[0])


def test_starting_noise_is_the_draw_of_the_seed():
    noise = starting_noise((3, 2, 4), [5, 6])
    ids = torch.tensor([6])
    assert torch.equal(noise[1].flatten(), oracle.normal(0, ids, torch.zeros_like(ids), 24)[0])
    many = starting_noise((1000,), range(20))
    assert many.mean().abs() < 0.03
    assert (many.std() - 1).abs() < 0.02


class Gaussian(torch.nn.Module):
    """The exact velocity for data N(mean, width^2): Euler must reproduce that distribution."""

    mean, width = 0.7, 0.3
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        s = t[0].item() / 1000
        a = 1 - s
        total = (a * self.width) ** 2 + s**2
        clean = self.mean + a * self.width**2 / total * (x - a * self.mean)
        return s / total * (x - a * self.mean) - clean


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_reaches_the_distribution_the_predictor_knows(shift):
    class Family:
        @staticmethod
        def predict(model, noisy, t, cond):
            return model(noisy, t)

    scheduler, seeds = toy.Euler(FlowMatching(shift=shift)), list(range(40))
    out = sample(Gaussian(), Family, scheduler, {}, (500,), steps=500, seeds=seeds)
    assert out.mean().item() == pytest.approx(Gaussian.mean, abs=0.02)
    assert out.std().item() == pytest.approx(Gaussian.width, rel=0.07)


def test_guidance_needs_its_negative_and_extrapolates(base):
    rows = toy.encode_text(base.pipe, [clips.PAIR_PROMPTS[0], ""])
    cond, empty = ({"text": row["text"][None]} for row in rows)

    def draw(**options):
        how = {"steps": 1, "seeds": [3], **options}
        return sample(base.model, toy, base.pipe.scheduler, cond, (3, 8, 12, 12), **how)

    with pytest.raises(ValueError, match="belong together"):
        draw(guidance_scale=3.0)
    noise = starting_noise((3, 8, 12, 12), [3])
    times = torch.tensor([1000.0])
    with torch.no_grad():
        on, off = (toy.predict(base.model, noise, times, c) for c in (cond, empty))
    expected = noise - (off + 3 * (on - off))
    assert torch.allclose(draw(guidance_scale=3.0, negative=empty), expected, atol=1e-5)


# --- intervals ---


def test_win_rate_counts_ties_half_with_wilsons_interval():
    base = torch.zeros(10)
    tuned = torch.tensor([1.0] * 7 + [0.0] * 2 + [-1.0])
    value, low, high = evaluate.win_rate(tuned, base)
    assert value == pytest.approx(0.8)
    # Wilson 1927 for p = 0.8, n = 10.
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    value, low, high = evaluate.win_rate(torch.ones(48), torch.zeros(48))
    assert (value, high) == pytest.approx((1, 1))
    assert low == pytest.approx(48 / (48 + evaluate.Z**2))
    assert evaluate.win_rate(base, base).value == 0.5


def test_gain_is_paired_and_its_interval_is_the_normal_one_for_many_clips():
    generator = torch.Generator().manual_seed(1)
    base = 100 * torch.randn(400, generator=generator, dtype=torch.float64)
    difference = 0.1 + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64)
    value, low, high = evaluate.gain(base + difference, base)
    assert value == pytest.approx(difference.mean().item())
    half = evaluate.Z * difference.std().item() / math.sqrt(400)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)
    assert evaluate.gain(base + difference, base) == (value, low, high)


def test_score_vectors_must_fit():
    with pytest.raises(ValueError, match="two score vectors of one length"):
        evaluate.win_rate(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="not empty"):
        evaluate.gain(torch.ones(0), torch.ones(0))


def test_relative_errors_are_of_means():
    policy = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    reference = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert evaluate.relative_errors(policy, reference) == (1.0, 1.0)


# --- the demo ---


def test_pairs_are_lossless_best_against_worst_and_half_of_the_labels_swap(base, tmp_path):
    known = make_pairs(base, tmp_path / "pairs", 4, "pairs")
    assert known["candidates"] == 24
    assert sum(gap > 0 for gap in known["gaps"]) >= 3  # the judge is noisy
    rows = [json.loads(x) for x in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["chosen", "prompt", "rejected"]] * 4
    for row, gap in zip(rows, known["gaps"], strict=True):
        scores = []
        for kind in ("chosen", "rejected"):
            media = (tmp_path / "pairs" / row[kind]).read_bytes()
            scores.append(clips.judge(row["prompt"], decode(media, Sampling()).frames)["score"])
        assert scores[0] - scores[1] == pytest.approx(gap, abs=1e-9)
    swapped = shuffle_labels(tmp_path / "pairs", tmp_path / "shuffled")
    assert len(swapped) == 2
    text = (tmp_path / "shuffled" / "metadata.jsonl").read_text()
    for i, row in enumerate(json.loads(line) for line in text.splitlines()):
        assert (row["chosen"] == rows[i]["rejected"]) == (i in swapped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives", "dpo,kto"], "--objectives: expected some of dpo,ipo"),
        (["--betas", "high"], "--betas: expected numbers"),
        (["--betas", "2000,nan"], "--betas: expected finite numbers above 0, got nan"),
        (["--betas", "0"], "--betas: expected finite numbers above 0, got 0"),
        (["--betas=-5"], "--betas: expected finite numbers above 0, got -5"),
        (["--betas", "1e400"], "--betas: expected finite numbers above 0, got inf"),
        (["--seed", "2"], "unrecognized arguments: --seed"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--pairs", "7"], "--pairs: expected at least 8, got 7"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", ["3", "16"])
def test_processes_that_cannot_share_a_step_are_refused(count, tmp_path, monkeypatch):
    """Or a step would be of 6 pairs, or 16, beside a line that says 8."""
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ValueError, match=f"^{count} processes: expected 1, 2, 4 or 8"):
        main(["--output_dir", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("text", [b"{", b"[1]", b"{}", b"\xff\x00", b"5"])
def test_a_damaged_demo_json_is_named(text, tmp_path):
    (tmp_path / "demo.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"demo.json: expected a JSON object with pairs and steps"):
        Demo(Options(output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def run(*arguments: str) -> tuple[int, str, str]:
    process = command("demo", *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path):
    rows = {row.name: row for row in main(["--output_dir", str(tmp_path / "demo")])}
    assert list(rows) == ["dpo", "sft", "dpo_windowed", "dpo_shuffled"]
    assert rows["dpo"].wins.value >= 0.8
    assert rows["dpo"].wins.low > max(0.5, rows["dpo_shuffled"].wins.high)
    assert rows["dpo"].gain.low > 0.02
    assert abs(rows["dpo_shuffled"].gain.value) < 0.5 * rows["dpo"].gain.value


@pytest.mark.slow
def test_the_command_ends_with_its_table_and_its_files_open(tmp_path):
    folder = tmp_path / "demo"
    small = ["--pairs", "8", "--steps", "3", "--clips", "12", "--output_dir", str(folder)]
    code, out, err = run("--objectives", "sdpo", *small)
    assert code == 0, err
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("objective "))
    names = ["sdpo", "sft", "dpo_windowed", "dpo_shuffled"]
    for name, line in zip(names, lines[start + 1 :], strict=False):
        first, rate, *_ = line.split()
        assert first == name
        assert 0 <= float(rate) <= 1
    results = json.loads((folder / "results.json").read_text())
    assert [run["objective"] for run in results["runs"]] == names
    assert len(results["runs"][0]["scores"]) == 12
    for name in names:
        assert read_metrics(folder / name)[-1]["global_step"] == 3
        page = (folder / name / "report.html").read_text()
        assert page.count("data:image/") == 3
        assert not re.search("(src|href)=.(http|/)", page)
        assert (folder / name / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    assert "data:image/gif" in (folder / "report.html").read_text()

    # The same command again takes up what stands there and says the same.
    code, out, err = run("--objectives", "sdpo", *small)
    assert code == 0, err
    assert "\n".join(lines[start : start + 5]) in out
    code, out, err = run(*small[:1], "9", *small[2:])
    assert code == 1
    assert err.startswith("fastpref demo: output_dir")
    assert "holds a demo with 8 pairs and 3 steps, got 9 and 3" in err


def test_a_report_survives_what_a_crash_leaves(tmp_path):
    """Lines cut off or overwritten are left out of the curves; a binary config is shown as is."""
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"global_step": i, "loss": 1 / i}).encode() for i in (1, 2)]
    strange = {"global_step": 3, "loss": "x", "rewards/margins/by_level": 5}
    good.append(json.dumps(strange).encode())
    bad = [b"{}", b"null", b"5", b"\xff\x00", b"[" * 100000, b'{"global_step": null}', b""]
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:], good[1][:12]]))
    assert [row["global_step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    (tmp_path / "config.yaml").write_bytes(b"beta: \xff\n")
    assert "beta: \ufffd" in run_report(tmp_path).read_text(encoding="utf-8")
    path.write_bytes(b"\n".join(bad))
    with pytest.raises(ValueError, match=r"metrics.jsonl: no line with a global_step; expected"):
        read_metrics(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"metrics.jsonl not found: expected the output folder"):
        read_metrics(tmp_path)


def test_a_folder_whose_name_is_no_text_has_its_report(tmp_path):
    folder = tmp_path / os.fsdecode(b"run\xff")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"global_step": 1, "loss": 0.5}\n')
    assert "fastpref run run\\udcff" in run_report(folder).read_text(encoding="utf-8")


def test_text_on_a_page_is_escaped(tmp_path):
    page = Page("a <b>")
    page.table(["<i>"], [["x & y"]])
    text = page.save(tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "x &amp; y" in text


# --- the table ---


def row(name: str, gains: list[float], *, beta: float | None = 1000.0, seed: int = 0) -> Row:
    """A trained model whose clips gain this much over a base that scores 0.5 everywhere."""
    base = {k: torch.full((len(gains),), 0.5, dtype=torch.float64) for k in ("score", *clips.PARTS)}
    scores = {k: v + torch.tensor(gains, dtype=torch.float64) for k, v in base.items()}
    return Row(name, beta, seed, Path(f"runs/{name}"), scores, base, 0.1, 0.2, 0.01)


LABELS = {"swapped": [0], "gaps": [0.3, 0.1]}
CONTROLS = [row("sft", [0.01] * 6 + [-0.01] * 2, beta=None), row("dpo_windowed", [0.1] * 8)]


def test_a_line_of_the_table_is_name_then_win_rate_then_gain():
    first, line = table([row("dpo", [0.1, 0.1, 0.0, -0.1])])[0][:2]
    assert first == "dpo"
    assert line.startswith("0.62 [")  # two won, one tied
    text = as_text(HEADER, table([row("dpo", [0.1, 0.3]), row("sft", [0.0, 0.0], beta=None)]))
    lines = text.splitlines()
    assert re.match(r"dpo +1\.00 \[0\.34, 1\.00\] +\+0\.200 \[", lines[1])
    assert re.match(r"sft +0\.50 \[", lines[2])
    assert re.split("  +", lines[1])[3:] == ["+10.0 %", "+20.0 %", "0.0100"]


def test_seeds_are_averaged_per_clip_and_their_spread_is_shown():
    rows = [row("dpo", [0.1, -0.1], seed=0), row("dpo", [0.3, 0.1], seed=1)]
    mean = average(rows)
    assert mean.wins.value == pytest.approx(0.75)
    assert mean.gain.value == pytest.approx(0.1)
    assert mean.win_spread == pytest.approx(0.5**0.5 / 2)
    assert mean.gain_spread == pytest.approx(0.2 * 0.5**0.5)
    assert len(table(rows)) == 1
    assert "sd 0.35" in table(rows)[0][1]


def test_the_words_say_what_the_table_says():
    shuffled = row("dpo_shuffled", [0.01, -0.01] * 4)
    said = verdict([row("dpo", [0.1] * 8), *CONTROLS, shuffled], LABELS)
    assert "100 % of 8 cases" in said[0]
    assert said[0].endswith("better than chance.")
    assert "SFT on the chosen clips alone gains less than dpo: -0.095" in said[1]
    assert "(dpo_windowed) and dpo are not told apart: +0.000" in said[2]
    assert "holds 0.5" in said[3]


def test_an_objective_that_does_not_beat_chance_or_sft_is_said_not_to():
    said = verdict(
        [row("dpo", [0.01, -0.05] * 4), *CONTROLS, row("dpo_shuffled", [-0.1] * 8)], LABELS
    )
    assert "not shown to be better than chance" in said[0]
    assert "SFT on the chosen clips alone gains more than dpo" in said[1]
    assert "below 0.5. Cause:" in said[3]
    assert "score gap of -0.100 is left of +0.200" in said[3]
    assert "by -0.100" in said[3]
