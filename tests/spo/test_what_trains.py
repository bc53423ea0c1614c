"""What the online loop samples, asks its scorer, trains on and compares."""

import json
import math
import shutil

import judges
import pytest
import torch
from online import once_assembled, options, rows, same

from fastpref.run.folder import claim
from fastpref.spo import loop, rounds, win_rate
from fastpref.spo.assemble import rows_per_pair
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo
from fastpref.step.reference import adapter_layers


def test_training_sees_what_sampling_saw(prompts, tmp_path, monkeypatch):
    """The same x_t to the bit, in the precision that the network is fed, at the same t, with the
    same prompt; and every prediction is guided.
    """
    asked, trained, real = [], [], loop.step_loss

    def change(run, online):
        policy, empty = run.policy, online.prompts.empty_cond["text"]

        def recorded(x, t, cond):
            said = policy(x, t, cond)
            if not torch.is_grad_enabled():
                asked.extend(zip(x, t, cond["text"], strict=True))
                none = {"text": empty.expand_as(cond["text"])}
                c, u = (family_says(run, x, t, of) for of in (cond, none))
                torch.testing.assert_close(said, u + 2 * (c - u), rtol=0.02, atol=0.05)
            return said

        run.policy = recorded

    def family_says(run, x, t, cond):
        with torch.autocast("cpu", torch.bfloat16):
            return run.family.predict(run.model, x, t, cond).float()

    def step_loss(policy, says, batch, objective):
        trained.extend(zip(batch.x, batch.t, batch.cond["text"], strict=True))
        return real(policy, says, batch, objective)

    once_assembled(monkeypatch, change)
    monkeypatch.setattr(loop, "step_loss", step_loss)
    how = {"mixed_precision": "bf16", "guidance_scale": 2.0, "train_batch_size": 3}
    how |= {"scorer": "judges:brightness", "win_rate_prompts": 0, "max_train_steps": 2}
    spo(SPOConfig(**options(prompts, tmp_path / "run", **how)))
    assert len(trained) == 6
    for row in trained:
        same = [all(map(torch.equal, row, each)) for each in asked if each[0].dtype == row[0].dtype]
        assert any(same)


@pytest.mark.parametrize("rollout", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_memory_is_predicted_for_as_many_rows_as_train(
    scale, rollout, prompts, tmp_path, monkeypatch
):
    rows = []

    def change(run, online):
        def count(module, given, said):
            if torch.is_grad_enabled():
                rows.append(len(said[0]))

        run.model.register_forward_hook(count)

    once_assembled(monkeypatch, change)
    how = {"guidance_scale": scale, "rollout_steps": rollout, "max_train_steps": 4}
    how |= {"threshold": 0.0, "win_rate_prompts": 0}
    config = SPOConfig(**options(prompts, tmp_path / "run", **how))
    spo(config)
    assert max(rows) == config.train_batch_size * rows_per_pair(config)


def test_the_sampler_is_the_one_that_is_asked_for(prompts, tmp_path, monkeypatch):
    made = []
    once_assembled(monkeypatch, lambda run, online: made.append(online.resampler))
    asked = {"candidates": 3, "first_step": 1, "rollout_steps": 2, "threshold": 0.2, "seed": 7}
    how = asked | {"eta": 0.7, "sde_window": [1, 3], "sample_rows": 2, "max_train_steps": 1}
    how |= {"scorer": "judges:brightness", "win_rate_prompts": 0}
    spo(SPOConfig(**options(prompts, tmp_path / "run", **how)))
    (sampler,) = made
    assert {name: getattr(sampler, name) for name in asked} == asked and sampler.rows == 2
    assert [step.sigma > 0 for step in sampler.steps] == [False, True, True, False, False]
    for step, after in zip(sampler.steps[1:3], sampler.steps[2:4], strict=True):
        (a, s, *_), (a_r, s_r, *_) = step.mix, after.mix
        assert step.sigma == pytest.approx(0.7 * s_r * math.sqrt(1 - (a * s_r / (a_r * s)) ** 2))


def test_what_the_scorer_is_asked(prompts, tmp_path, monkeypatch):
    """Candidates of a prompt side by side, with its text, at the time that their x0-hat is of."""
    calls, grids = [], []

    def change(run, online):
        grids.append([step.t for step in online.resampler.steps])

        def score(frames, texts, times):
            calls.append((texts, times))
            return judges.judge(frames, texts, times)

        online.scorer = score

    once_assembled(monkeypatch, change)
    how = {"max_train_steps": 1, "decode_batch": 2}
    spo(SPOConfig(**options(prompts, tmp_path / "run", **how)))
    held, *sampled, last = calls
    texts = prompts.read_text().splitlines()
    assert held[0] == last[0] and not held[1].any() and not last[1].any(), "finished samples"
    assert all(len(set(words)) == 1 and len(words) == 2 for words, _ in sampled)
    seen = [words[0] for words, _ in sampled]
    assert len(set(seen)) == 4 and set(seen) <= set(texts) - set(held[0])
    wanted = sorted(grids[0][2:5] * 4)
    assert sorted(times[0].item() for _, times in sampled) == pytest.approx(wanted)


def test_a_batch_of_prompts_decides_nothing(prompts, tmp_path, monkeypatch):
    found, marks, real = [], [], rounds.mark

    def mark(run):
        marks.append(real(run))
        return marks[-1]

    monkeypatch.setattr(rounds, "mark", mark)
    for size in (1, 3):
        how = {"sample_batch_size": size, "max_train_steps": 1, "threshold": 0.0}
        folder = tmp_path / str(size)
        spo(SPOConfig(**options(prompts, folder, **how)))
        parts = sorted((folder / "rounds").glob("round-000000-*"))
        pairs = [each for part in parts for each in rounds.read_part(part, marks[-1]).transitions]
        found.append(sorted(pairs, key=lambda each: (each.row, each.step)))
    assert len(found[0]) == len(found[1]) == 12
    for a, b in zip(*found, strict=True):
        assert (a.row, a.step) == (b.row, b.step)
        torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-4)


def test_batches_of_a_step_count_by_their_pairs(prompts, tmp_path):
    norms = []
    for size, accumulate in ((64, 1), (5, 64)):
        how = {"train_batch_size": size, "gradient_accumulation_steps": accumulate}
        how |= {"threshold": 0.0, "max_train_steps": 1, "max_grad_norm": 0.0}
        spo(SPOConfig(**options(prompts, tmp_path / str(size), **how)))
        norms.append(rows(tmp_path / str(size))[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3), "12 pairs at once, or 5, 5 and 2"


def test_the_win_rate_is_over_the_base_under_one_noise(prompts, tmp_path, monkeypatch):
    seen, real = [], win_rate.sample

    def sample(model, *args, **how):
        off = {layer._disable_adapters for layer in adapter_layers(model)}
        seen.append((off, how["seeds"], how["guidance_scale"], sorted(how["negative"])))
        return real(model, *args, **how)

    monkeypatch.setattr(win_rate, "sample", sample)
    path = claim(tmp_path / "run", "spo").parent / "win_rate.json"
    path.write_text('{"base": [1e9, 1e9], "rounds": []}')  # left by a run without a checkpoint
    how = options(prompts, tmp_path / "run", guidance_scale=2.0, max_train_steps=1)
    spo(SPOConfig(**how))
    assert seen == [(off, [0, 1], 2.0, ["text"]) for off in ({True}, {False})]
    base = json.loads(path.read_text())["base"]
    path.unlink()  # of the base it is measured again, whatever has been trained
    spo(SPOConfig(**how | {"max_train_steps": 2}))
    record = json.loads(path.read_text())
    assert record["base"] == base and record["rounds"][-1]["scores"] != base
    # From an older checkpoint on, what was measured later is measured again.
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "result.json").unlink()
    path.write_text(json.dumps(record | {"rounds": [{**record["rounds"][-1], "scores": [9, 9]}]}))
    spo(SPOConfig(**how | {"max_train_steps": 2}))
    assert json.loads(path.read_text())["rounds"][-1] == record["rounds"][-1]


def test_a_round_is_counted_once_where_its_first_update_fails(
    whole, prompts, tmp_path, monkeypatch
):
    real, runs = loop.step_loss, []

    def step_loss(policy, says, batch, objective):
        if runs[0].own["round"] == 1 and not runs[0].own["updates"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, says, batch, objective)

    with monkeypatch.context() as within:
        once_assembled(within, lambda run, online: runs.append(run))
        within.setattr(loop, "step_loss", step_loss)
        with pytest.raises(ValueError, match="out of memory"):
            spo(SPOConfig(**options(prompts, tmp_path / "run")))
    result = spo(SPOConfig(**options(prompts, tmp_path / "run")))
    for name in ("judged", "pairs", "network", "decodes"):
        assert result["online"][name] == whole[1]["online"][name]
    same(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_compiled_blocks_see_the_adapters_switched(prompts, tmp_path):
    """Guided, over a shared prefix: before it trains policy and reference are one, then two; and
    the base of the win rate is the base.
    """
    bases = []
    for name, compiled in (("eager", False), ("compiled", True)):
        how = {"compile": compiled, "guidance_scale": 2.0, "threshold": 0.0, "max_train_steps": 3}
        result = spo(SPOConfig(**options(prompts, tmp_path / name, **how)))
        assert result["margin_noise"] < 1e-3
        assert result["metrics"]["errors/policy_w"] != result["metrics"]["errors/reference_w"]
        record = json.loads((tmp_path / name / "win_rate.json").read_text())
        bases.append(record["base"])
        assert record["rounds"][-1]["scores"] != record["base"]
    assert bases[0] == pytest.approx(bases[1])
