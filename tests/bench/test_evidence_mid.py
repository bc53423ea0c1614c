"""The evidence's larger world: its prompts, its judge, its pretraining, its pairs, and one run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.evidence import mid, mid_clips, mid_pretrain, mid_prompts
from bench.evidence.__main__ import main
from bench.evidence.mid_clips import PARTS, PLACES
from bench.evidence.mid_prompts import Thing
from fastpref.demo.clips import COLOURS
from fastpref.models import toy
from fastpref.pairs.media import Sampling, decode

RED, BLUE = Thing("red", "disc", "right"), Thing("blue", "square", "down")
TEXTS = [
    mid_prompts.prompt(RED, "before", BLUE),
    mid_prompts.prompt(RED, "behind", BLUE),
    mid_prompts.prompt(Thing("cyan", "square", "up"), "behind", Thing("yellow", "disc", "down")),
]
TINY = mid_pretrain.Options(steps=4, batch=4, width=48, layers=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mid") / "base"
    mid_pretrain.pretrain(folder, TINY)
    return folder


# --- prompts ---


def test_prompts_read_back():
    for text in mid_prompts.PRETRAINING_PROMPTS + mid_prompts.NEVER_SEEN:
        first, order, second = mid_prompts.read(text)
        assert mid_prompts.prompt(first, order, second) == text
        assert first.colour != second.colour and first.direction != second.direction
    for wrong in ("", TEXTS[0].replace("red", "grey"), TEXTS[0].replace("before", "under")):
        with pytest.raises(ValueError, match="prompt expected like 'a red disc moving right"):
            mid_prompts.read(wrong)


def test_no_reported_prompt_is_ever_trained_on():
    sets = [
        mid_prompts.PAIR_PROMPTS,
        mid_prompts.VALIDATION_PROMPTS,
        mid_prompts.CHOICE,
        mid_prompts.REPORT,
    ]
    assert len({text for some in sets for text in some}) == sum(map(len, sets))
    held_out = set(mid_prompts.CHOICE + mid_prompts.REPORT)
    assert held_out & set(mid_prompts.PRETRAINING_ONLY) and held_out & set(mid_prompts.NEVER_SEEN)
    assert not set(mid_prompts.NEVER_SEEN) & set(mid_prompts.PRETRAINING_PROMPTS)

    def things(prompts: list[str]) -> set[tuple[str, str]]:
        """Colours and directions that stand together."""
        found = [mid_prompts.read(text) for text in prompts]
        return {(t.colour, t.direction) for first, _, second in found for t in (first, second)}

    seen = things(mid_prompts.PRETRAINING_PROMPTS)
    paired = things(mid_prompts.PAIR_PROMPTS + mid_prompts.VALIDATION_PROMPTS)
    assert len(paired) == 12 and len(seen) == 18
    for text in held_out:
        assert things([text]) - paired
    for text in mid_prompts.NEVER_SEEN:
        assert things([text]) - seen


def test_the_words_tell_whose_each_attribute_is():
    """Cross-attention sees a set of words, whatever their order."""
    prompts = [mid_prompts.prompt(RED, "before", BLUE)]
    for name, one, other in zip(Thing._fields, RED, BLUE, strict=True):
        swapped = RED._replace(**{name: other}), BLUE._replace(**{name: one})
        prompts.append(mid_prompts.prompt(swapped[0], "before", swapped[1]))
    encoded = toy.encode_text(toy.pipeline(""), prompts)
    assert len({tuple(sorted(map(tuple, row["text"].tolist()))) for row in encoded}) == 4


# --- clips and the judge ---


def spoiled(part: str, text: str) -> torch.Tensor:
    """The perfect clip with one flaw."""
    scenes, background = mid_clips.parse([text]), mid_clips.clean(1)
    centres = mid_clips.path(scenes.direction)
    place, _, kind = part.rpartition("_")
    i = PLACES.index(place) if place else None
    if kind == "colour":
        scenes.colour[0, i] = 0.4 * scenes.colour[0, i] + 0.6 * torch.tensor([0.5, 0.5, 0.5])
    elif kind == "direction":
        centres[0, i] = mid_clips.path(0.2 * scenes.direction[0, i])
    elif kind == "smoothness":
        shake = torch.tensor([1.2, -1.2]).repeat(mid_clips.FRAMES // 2)
        centres[0, i] += shake[:, None] * scenes.direction[0, i].flip(0)
    elif kind == "order":
        scenes = scenes._replace(front=~scenes.front)
    else:
        background = background + torch.tensor([0.0, 0.3, 0.05])
    return mid_clips.to_bytes(mid_clips.render(centres, scenes, background)[0])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("part", PARTS)
def test_the_judge_sees_each_flaw_in_its_part_and_no_other(part, text):
    best = mid_clips.judge(text, mid_clips.perfect(text))
    assert min(best.values()) > 0.999
    worse = mid_clips.judge(text, spoiled(part, text))
    assert worse[part] < 0.6
    assert worse["score"] < best["score"] - 0.05
    for other in set(PARTS) - {part}:
        assert worse[other] > 0.8, other


@pytest.mark.parametrize("place", PLACES)
def test_another_colour_or_the_opposite_motion_scores_less(place):
    for text in mid_prompts.PAIR_PROMPTS[:40]:
        first, order, second = mid_prompts.read(text)
        thing, other = (first, second) if place == "first" else (second, first)
        names = [name for name in COLOURS if name not in (first.colour, second.colour)]
        back = {"right": "left", "left": "right", "up": "down", "down": "up"}[thing.direction]
        for part, shown in (
            ("colour", thing._replace(colour=names[0])),
            ("direction", thing._replace(direction=back)),
        ):
            pair = (shown, other) if place == "first" else (other, shown)
            clip = mid_clips.perfect(mid_prompts.prompt(pair[0], order, pair[1]))
            scores = mid_clips.judge(text, clip)
            assert scores[f"{place}_{part}"] < 0.1
            assert scores["score"] < 0.89


def test_an_object_that_is_missing_scores_nothing():
    scores = mid_clips.judge(TEXTS[0], mid_clips.to_bytes(mid_clips.clean(1)[0]))
    for part in ("first_colour", "second_colour", "first_direction", "second_direction", "order"):
        assert scores[part] < 0.1, part


def test_what_is_in_front_hides_the_other():
    before, behind = (mid_clips.perfect(text) for text in TEXTS[:2])
    middle = mid_clips.SIZE // 2
    reddest = [clip[:, middle, middle].float().argmax(1) for clip in (before, behind)]
    assert reddest[0][7:9].tolist() == [0, 0]
    assert reddest[1][7:9].tolist() == [2, 2]


def test_flawed_clips_are_equal_for_equal_seeds_and_worse_with_more_flaws():
    prompts = mid_prompts.PAIR_PROMPTS[:48]

    def clips(seed: int, share: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mid_clips.flawed(mid_clips.parse(prompts), generator, share)

    assert torch.equal(clips(0, 1.0), clips(0, 1.0))
    assert not torch.equal(clips(0, 1.0), clips(1, 1.0))
    clean, flawed = (
        mid_pretrain.judge_all(prompts, list(mid_clips.to_bytes(clips(0, share))))
        for share in (0.0, 1.0)
    )
    assert clean["score"].mean() > 0.97
    for part in PARTS:
        assert 0.5 < flawed[part].mean() < clean[part].mean() - 0.05, part


# --- pretraining and pairs ---


def test_pretraining_goes_on_where_it_was_interrupted(base, tmp_path, monkeypatch):
    monkeypatch.setattr(mid_pretrain, "SAVE_STEPS", 2)
    save = mid_pretrain.Pretraining.save

    def killed(self, path):
        save(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mid_pretrain.Pretraining, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            mid_pretrain.pretrain(tmp_path / "base", TINY)
    assert not (tmp_path / "base").exists()
    with pytest.raises(ValueError, match=r"is of .* delete it"):
        mid_pretrain.pretrain(tmp_path / "base", mid_pretrain.Options(steps=6))
    mid_pretrain.pretrain(tmp_path / "base", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / name).read_bytes() == (base / name).read_bytes()


def test_pretraining_learns():
    run = mid_pretrain.Pretraining(
        mid_pretrain.Options(steps=40, batch=4, width=48, layers=1, rate=3e-3), torch.device("cpu")
    )
    losses = [run.update(bf16=False).item() for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    noise = torch.randn(4, 3, 16, 32, 32)
    with torch.no_grad():
        text = {"text": run.text[:4]}
        velocity = toy.predict(run.average, noise, torch.full((4,), 1000.0), text)
    assert (noise - velocity).mean() < -0.15  # dark, as the clips are


def test_the_size_is_the_checkpoints_own(base):
    model = toy.load(base)
    assert model.config.num_layers == 1 and tuple(model.config.patch_size) == (4, 4, 4)
    full = mid_pretrain.fresh(mid_pretrain.Options.width, mid_pretrain.Options.layers)
    assert 10e6 < sum(p.numel() for p in full.parameters()) < 30e6


def test_clips_depend_on_their_seeds_alone(base):
    model = mid._load(base, None)
    prompts = [TEXTS[0], TEXTS[1], TEXTS[2]]
    one = mid_pretrain.sampled(model, prompts, [5, 6, 7])
    other = mid_pretrain.sampled(model, prompts[1:], [6, 8])
    assert (one[1].int() - other[0].int()).abs().max() <= 1
    assert not torch.equal(one[2], other[1])


def test_pairs_are_the_noisy_judges_and_made_once(base, tmp_path, monkeypatch):
    model, sampled, seen = mid._load(base, None), mid.sampled, {}

    def watched(model, prompts, seeds):
        clips = sampled(model, prompts, seeds)
        assert not seen.keys() & set(seeds)  # each has a noise of its own
        seen.update(zip(seeds, clips, strict=True))
        return clips

    monkeypatch.setattr(mid, "sampled", watched)
    monkeypatch.setattr(mid, "AT_ONCE", 2)
    made = mid.make_pairs(model, tmp_path, 3, "pairs", TEXTS)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == TEXTS
    generator = torch.Generator().manual_seed(mid.SEEDS["pairs"])
    noise = 0.05 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    clips = [clip for _, clip in sorted(seen.items())]
    scores = mid_pretrain.judge_all([t for t in TEXTS for _ in range(6)], clips)["score"].view(3, 6)
    for i, row in enumerate(rows):
        order = (scores + noise)[i].argsort()
        for kind, member in (("chosen", order[-1]), ("rejected", order[0])):
            file = (tmp_path / row[kind]).read_bytes()
            assert torch.equal(decode(file, Sampling()).frames, clips[6 * i + member])
        assert made["gaps"][i] == pytest.approx((scores[i, order[-1]] - scores[i, order[0]]).item())
    assert made["right"] == sum(gap > 0 for gap in made["gaps"]) / 3
    (tmp_path / "parts" / "00002.json").unlink()
    seen.clear()
    again = mid.make_pairs(model, tmp_path, 3, "pairs", TEXTS)
    assert len(seen) == 6 and again["gaps"] == made["gaps"]


# --- all of it ---


@pytest.mark.slow
def test_the_command_runs_end_to_end_on_a_small_base(base, tmp_path):
    names = ["dpo", "dpo_cm", "sdpo", "sft", "dpo_windowed", "dpo_shuffled"]
    shutil.copytree(base, tmp_path / "world" / "base")
    arguments = ["--world", "mid", "--objectives", ",".join(names), "--betas", "2000"]
    arguments += ["--seeds", "1", "--pairs", "8", "--steps", "2", "--clips", "4"]
    main([*arguments, "--output_dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["base", *names]
    assert rows[0]["world"] == "mid" and not set.intersection(
        *map(set, rows[0]["prompts"].values())
    )
    for row in rows[1:]:
        assert row["steps"] == 2 and len(row["scores"]["report"]) == 4
        assert row["errors"] != rows[0]["errors"]
