"""Training the preference model: its step against a plain calculation, what it learns, how it goes
on after a kill.
"""

import json
import math
import signal
from collections import Counter
from functools import partial

import families
import pytest
import torch
from commands import BASE, arguments, encoded, fails, kill_at, write_pairs
from families import FAMILIES, PROMPTS, tiny, write_media
from safetensors.torch import load_file
from tiny_clip import clip_folder

from fastpref.cli import main
from fastpref.loss.functional import Draws
from fastpref.loss.oracle import normal
from fastpref.models import toy
from fastpref.models.encoders import decoded
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.run import bookkeeping
from fastpref.run.guard import Diverged, Interrupted
from fastpref.run.parts import place
from fastpref.spo import labels, spm
from fastpref.spo.decoding import decoder
from fastpref.spo.preference_model import StepAwarePreferenceModel
from fastpref.spo.spm_config import SPMConfig


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """48 pairs of clips, each prompt's own against noise on it."""
    folder = tmp_path_factory.mktemp("spm")
    return encoded(write_pairs(folder / "media", count=48), folder / "set").folder


def values(data, output_dir, **changes) -> dict:
    return {
        "family": "toy",
        "model": str(BASE),
        "data": str(data),
        "clip": str(clip_folder()),
        "output_dir": str(output_dir),
        "frames_scored": 4,
        "learning_rate": 1e-3,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "held_out": 0.3,
        "eval_pairs": 2,
        "eval_steps": 3,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "report_to": "none",
        "device": "cpu",
        **changes,
    }


def run(data, output_dir, **changes) -> dict:
    return spm.train(SPMConfig(**values(data, output_dir, **changes)))


def assembled(data, output_dir, **changes) -> spm.Run:
    output_dir.mkdir(exist_ok=True)
    config = SPMConfig(**values(data, output_dir, **changes))
    return spm.assemble(config, *place("cpu", config.mixed_precision))


def state(folder, step: int) -> dict[str, torch.Tensor]:
    parts = ("parameters", "optimizer")
    files = [load_file(folder / f"checkpoint-{step}" / f"{part}.safetensors") for part in parts]
    return {**files[0], **files[1]}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lines(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


# ---- The step


def test_it_sees_the_guided_estimate_of_both_members_under_one_noise(pairs, tmp_path):
    made = assembled(pairs, tmp_path / "run", guidance_scale=3.0)
    seen = []
    made.decode = seen.extend
    data = PairDataset(pairs)
    batch, draws = made.prepare(0, spm.collate([data[3], data[7]]))
    times = made.process.times(draws)
    spm.decoded_estimates(made, batch, draws, times)
    base = toy.load(BASE)
    empty = toy.encode_text(toy.pipeline(BASE), [""])[0]["text"]
    for member in range(4):
        sigma = times.level[member % 2]
        pair = (data[3], data[7])[member % 2]
        clean = (pair.latents_w, pair.latents_l)[member // 2]
        one = draws.pair_id[member % 2 : member % 2 + 1]
        eps = normal(draws.seed, one, torch.zeros(1, dtype=torch.int64), clean.numel())
        eps = eps.view_as(clean).float()
        x = ((1 - sigma) * clean + sigma * eps).float()
        with torch.no_grad():
            c, u = (
                toy.predict(base, x[None], 1000 * sigma[None].float(), {"text": text[None]})[0]
                for text in (pair.cond["text"], empty)
            )
        wanted = x - sigma.float() * (u + 3 * (c - u))
        torch.testing.assert_close(seen[member], wanted, rtol=1e-4, atol=1e-4)


def test_both_members_are_scored_at_their_pairs_t_and_prompt(pairs, tmp_path):
    made, asked = assembled(pairs, tmp_path / "run"), []
    made.model = lambda *scorers: asked.append(scorers)
    spm.scored(made, list("abcd"), ["x", "y"], torch.tensor([3.0, 4.0]))
    ((clips, prompts, t),) = asked
    assert (clips, prompts, t.tolist()) == (list("abcd"), ["x", "y"] * 2, [3.0, 4.0] * 2)


def test_pictures_are_decoded_as_a_run_of_spo_decodes_them(tmp_path):
    case = tiny("sd15")
    other = families.image_vae(latent_channels=4)
    torch.nn.init.zeros_(other.decoder.conv_out.weight)
    torch.nn.init.ones_(other.decoder.conv_out.bias)
    other.save_pretrained(tmp_path / "vae")
    change = {"family": case.family.name, "model": str(case.path)}
    config = SPMConfig(**values("x", tmp_path, decoder=str(tmp_path / "vae"), **change))
    decode = decoder(config, case.module, case.module.pipeline(case.path))
    assert all((clip == 255).all() for clip in decode(torch.randn(3, 4, 1, 4, 4)))
    config = SPMConfig(**values("x", tmp_path, decode_frames=2))
    decode = decoder(config, toy, toy.pipeline(config.model))
    assert [clip.shape[0] for clip in decode(torch.zeros(2, 3, 5, 8, 8))] == [2, 2]


def test_t_is_uniform_whatever_the_shift_of_the_scheduler(tmp_path):
    case = tiny("wan")
    data = encode(
        case.family.name,
        case.path,
        write_media(case.family, tmp_path / "media"),
        tmp_path / "set",
        progress=False,
    )
    made = assembled(data, tmp_path / "run", family="wan", model=str(case.path), held_out=0.0)
    assert case.process.shift == 3
    ids = torch.arange(4000)
    level = made.process.times(Draws(0, ids, torch.zeros_like(ids))).level
    assert abs(level.mean() - 0.5) < 0.02 and abs((level < 0.1).double().mean() - 0.1) < 0.02


def test_the_loss_is_cross_entropy_with_ties_of_a_half():
    scores = torch.tensor([2.0, 1.0, 0.5, 3.0, 1.5, 1.5, 1.0, 1.0], dtype=torch.float64)
    known = {1: 1.0, 2: 0.5, 3: 0.0, 4: 1.0}
    loss, right = spm.preference_loss(scores, known, torch.tensor([1, 2, 3, 4]))
    wins = [(2.0, 1.5), (1.0, 1.5), (0.5, 1.0), (3.0, 1.0)]
    for i, (label, pair) in enumerate(zip(known.values(), wins, strict=True)):
        logs = torch.tensor(pair, dtype=torch.float64).log_softmax(0)
        torch.testing.assert_close(loss[i], -(label * logs[0] + (1 - label) * logs[1]))
    assert right.tolist() == [1.0, 0.5, 1.0, 1.0]
    torch.testing.assert_close(
        spm.preference_loss(torch.zeros(2).double(), {1: 0.5}, torch.tensor([1]))[0],
        torch.tensor([math.log(2)], dtype=torch.float64),
    )


def test_the_weights_scale_the_gradient(pairs, tmp_path):
    """Pairs of weight zero leave the parameters where they are."""
    made = assembled(pairs, tmp_path / "a")
    found = {}
    for scale in (1.0, 0.0):
        patch = pytest.MonkeyPatch()
        patch.setattr(spm, "example_weights", lambda *_, s=scale: dict.fromkeys(made.labels, s))
        run(pairs, tmp_path / f"w{scale}", max_train_steps=1, weight_decay=0.0, max_grad_norm=0.0)
        patch.undo()
        found[scale] = lines(tmp_path / f"w{scale}")[1]
    assert found[1.0]["grad_norm"] > 0 == found[0.0]["grad_norm"]


# ---- What it learns


def test_it_learns_what_is_preferred(pairs, tmp_path):
    """Of prompts that it has not seen, at every step; the plain CLIP beside it knows nothing."""
    change = {"max_train_steps": 40, "train_batch_size": 8, "eval_pairs": 12, "eval_steps": 40}
    result = run(pairs, tmp_path / "run", **change, logging_steps=20, checkpointing_steps=40)
    found = result["metrics"]
    assert 0.2 < found["eval/plain_accuracy"] < 0.7
    assert found["eval/accuracy"] > 0.85 and found["eval/loss"] < 0.55
    by_level = found["eval/accuracy/by_level"]
    assert len(by_level) == 10 and min(by_level) >= 0.5
    first, *_, last = lines(tmp_path / "run")
    assert (first["global_step"], last["global_step"]) == (0, 40)
    assert first["eval/accuracy"] == first["eval/plain_accuracy"] == found["eval/plain_accuracy"]
    assert last["eval/accuracy"] == found["eval/accuracy"]
    # The folder is a scorer: on clean clips of held-out prompts too.
    judge = StepAwarePreferenceModel.from_pretrained(tmp_path / "run" / "preference_model")
    data = PairDataset(pairs)
    decode = partial(decoded, toy, toy.pipeline(BASE), batch_size=2)
    margins = [
        spm.clean_margin(judge, decode, torch.float32, data[i]) for i in labels.split(data, 0.3)[1]
    ]
    assert sum(margin > 0 for margin in margins) >= 0.85 * len(margins)


def test_accuracy_is_measured_at_the_same_draws_once_in_every_bin(pairs, tmp_path):
    made = assembled(pairs, tmp_path / "run", eval_pairs=3)
    seen = []
    add = spm.Meter.add
    patch = pytest.MonkeyPatch()
    patch.setattr(spm.Meter, "add", lambda m, v, level: (seen.append(level), add(m, v, level))[1])
    with bookkeeping.at_work(made):
        spm.evaluate(made)
        first = dict(made.own)
        spm.evaluate(made)
        assert made.own == first and made.model.training
    patch.undo()
    half = torch.cat(seen[: len(seen) // 2])
    assert (10 * half).long().bincount(minlength=10).tolist() == [3] * 10


@pytest.mark.parametrize("tune", ["all", "vision", "modulation"])
def test_what_trains(tune, pairs, tmp_path):
    run(pairs, tmp_path / "run", tune=tune, max_train_steps=2)
    model = StepAwarePreferenceModel.from_pretrained(tmp_path / "run" / "preference_model")
    before = StepAwarePreferenceModel.from_pretrained(clip_folder()).clip.state_dict()
    moved = {n for n, v in model.clip.state_dict().items() if not torch.equal(v, before[n])}
    text = {n for n in before if n.startswith(("text", "logit_scale"))}
    assert bool(moved & text) == (tune == "all")
    assert bool(moved - text) == (tune != "modulation")
    assert model.pooled[1].weight.any() and model.layers[0][1].bias.any()


def test_ties_pull_scores_together(tmp_path):
    media = write_pairs(tmp_path / "media", count=12)
    file = media / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    text = (json.dumps(row | {"score_chosen": 1, "score_rejected": 1}) + "\n" for row in rows)
    file.write_text("".join(text))
    change = {"held_out": 0.0, "max_train_steps": 20, "learning_rate": 3e-3}
    run(media, tmp_path / "run", **change)  # media are encoded, their ties kept
    data = PairDataset(tmp_path / "run" / "encoded")
    assert data.ties == [True] * 12
    decode = partial(decoded, toy, toy.pipeline(BASE), batch_size=2)
    spread = []
    for path in (clip_folder(), tmp_path / "run" / "preference_model"):
        model = StepAwarePreferenceModel.from_pretrained(path, num_frames=4)
        margins = [spm.clean_margin(model, decode, torch.float32, data[i]) for i in range(12)]
        spread.append(sum(map(abs, margins)) / 12)
    assert spread[1] < 0.7 * spread[0]
    losses = [row["loss"] for row in lines(tmp_path / "run") if "loss" in row]
    assert len(losses) == 20 and min(losses) >= math.log(2) - 1e-9


def test_a_model_may_say_who_wins(pairs, tmp_path):
    change = {"relabel": "clip", "tie_margin": 0.01, "eval_pairs": 100}
    made = assembled(pairs, tmp_path / "run", **change)
    data = PairDataset(pairs)
    plain = StepAwarePreferenceModel.from_pretrained(clip_folder(), num_frames=4)
    for i in range(len(data)):
        pair = data[i]
        clips = [toy.decode(None, x) for x in (pair.latents_w, pair.latents_l)]
        p = plain(clips, [pair.prompt] * 2, torch.zeros(2)).softmax(0)
        label = 0.5 if abs(p[0] - p[1]) < 0.01 else float(p[0] > p[1])
        assert made.labels[pair.pair_id] == label
    assert len(set(made.labels.values())) == 3, "some ties, some the other way round"
    held = {data.pair_ids[i] for i in made.held.rows}
    assert held and all(made.labels[i] != 0.5 for i in held)


def test_no_pair_is_labelled_twice_and_none_of_another_model(pairs, tmp_path):
    data, asked = PairDataset(pairs), []

    def judge(pair):
        asked.append(pair.pair_id)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return float(pair.pair_id % 7) - 3

    how = (data, tmp_path, {"model": "a"}, 0.1)
    with pytest.raises(KeyboardInterrupt):
        labels.relabelled(*how, judge)
    file = tmp_path / labels.LABELS
    file.write_bytes(file.read_bytes()[:-4])  # a line that a kill has cut
    found = labels.relabelled(*how, judge)
    twice = Counter(asked)
    assert len(found) == 48 and sorted(twice.values()) == [1] * 46 + [2] * 2
    assert labels.relabelled(*how, None) == found
    asked.clear()
    labels.relabelled(data, tmp_path, {"model": "b"}, 0.1, lambda pair: asked.append(0) or 1.0)
    assert len(asked) == 48
    with pytest.raises(ValueError, match=r"the score of pair \d+ is not finite"):
        labels.relabelled(data, tmp_path, {"model": "c"}, 0.1, lambda pair: math.nan)


# ---- Going on


def test_stopped_it_goes_on_to_the_same_parameters_and_lines(pairs, tmp_path, monkeypatch, capsys):
    change = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    result = run(pairs, tmp_path / "whole", **change)
    update = bookkeeping.update

    def stop(made):
        norm = update(made)
        if made.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return norm

    monkeypatch.setattr(bookkeeping, "update", stop)
    with pytest.raises(Interrupted, match="saved at step 3"):
        run(pairs, tmp_path / "broken", **change)
    monkeypatch.undo()
    again = run(pairs, tmp_path / "broken", **change)
    assert same(state(tmp_path / "whole", 6), state(tmp_path / "broken", 6))
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    for name, value in result["metrics"].items():
        assert name.startswith("perf/") or again["metrics"][name] == value
    capsys.readouterr()
    assert run(pairs, tmp_path / "broken", **change)["global_step"] == 6
    assert "is already trained to step 6" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds another run: tune \(all there, vision here\)"):
        run(pairs, tmp_path / "broken", **change, tune="vision")


def test_begun_again_it_has_one_line_of_each_step(pairs, tmp_path, monkeypatch):
    def die(made):
        raise SystemError

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(bookkeeping, "update", die)
        run(pairs, tmp_path / "run", seed=3)
    run(pairs, tmp_path / "run", max_train_steps=1)
    steps = [row["global_step"] for row in lines(tmp_path / "run")]
    assert steps[0] == 0 and steps.count(0) == 1


def killed_and_resumed(name, tmp_path, **changes) -> None:
    """`fastpref spm` from media on disk, whole and with a kill -9; equal in every bit."""
    case = tiny(name)
    media = write_media(case.family, tmp_path / "media")
    flags = {"family": case.family.name, "model": str(case.path), "held_out": 0.5, **changes}
    flags |= {"max_train_steps": 8, "checkpointing_steps": 1, "train_batch_size": 1}
    whole, broken = (values(media, tmp_path / part, **flags) for part in ("whole", "broken"))
    assert main(["spm", *arguments(whole)]) == 0
    kill_at(tmp_path / "broken" / "checkpoint-2", "spm", *arguments(broken))
    assert not (tmp_path / "broken" / "result.json").exists()
    assert main(["spm", *arguments(broken)]) == 0
    assert same(state(tmp_path / "whole", 8), state(tmp_path / "broken", 8))
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    made = [
        StepAwarePreferenceModel.from_pretrained(tmp_path / part / "preference_model").state_dict()
        for part in ("whole", "broken")
    ]
    assert same(*made)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_killed_on_any_family_it_goes_on_to_the_same_bits(name, tmp_path):
    own = {"relabel": "clip", "tie_margin": 1e-4} if name == "sd15" else {"frames": "tile"}
    killed_and_resumed(name, tmp_path, **own)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision(name, tmp_path):
    case = tiny(name)
    media = write_media(case.family, tmp_path / "media")
    result = run(
        media,
        tmp_path / "run",
        family=case.family.name,
        model=str(case.path),
        held_out=0.5,
        mixed_precision="bf16",
        train_batch_size=1,
    )
    assert math.isfinite(result["metrics"]["loss"])


# ---- Mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tie_margin": 0.2}, "tie_margin has no effect with relabel none: remove it"),
        ({"held_out": 1.0}, "held_out: expected 0 <= value < 1, got 1.0"),
        ({"frames": "every"}, "frames: expected one of mean, tile, got every"),
        ({"clip": "/nowhere"}, "model /nowhere: no such folder"),
        ({"clip": str(BASE / "transformer")}, "config.json expected model_type clip, got None"),
        ({"beta": 3}, "beta"),
    ],
)
def test_a_mistake_is_one_line(change, says, pairs, tmp_path, capsys):
    assert says in fails(capsys, "spm", *arguments(values(pairs, tmp_path / "run", **change)))


def test_other_folders_are_refused(pairs, tmp_path, capsys):
    flags = values(pairs, tmp_path / "run", max_train_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".fastpref").write_text("train\n")
    said = fails(capsys, "spm", *arguments(flags))
    assert "is one of fastpref train, expected one of fastpref spm" in said


def test_a_model_that_is_not_finite_is_not_written(pairs, tmp_path):
    with pytest.raises(Diverged):
        run(
            pairs,
            tmp_path / "run",
            learning_rate=1e30,
            max_train_steps=24,
            weight_decay=0.0,
            held_out=0.0,
            train_batch_size=1,
        )
    assert not (tmp_path / "run" / "preference_model").exists()


def test_without_held_out_pairs_it_says_so(pairs, tmp_path, capsys):
    result = run(pairs, tmp_path / "run", held_out=0.0, max_train_steps=1)
    assert "no pair is held out" in capsys.readouterr().err
    assert not any(name.startswith("eval/") for name in result["metrics"])


def test_what_the_tiny_media_hold_out():
    """The kill tests measure on some prompts and train on others."""
    assert 0 < sum(labels._place(prompt) < 0.5 for prompt in PROMPTS) < 4
