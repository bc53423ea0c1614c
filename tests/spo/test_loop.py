"""`fastpref spo` on the demo's base: rounds, resume in either phase, what it says and refuses."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import judges
import pytest
import torch
from commands import BASE, arguments, fails
from online import adapter, once_assembled, options, rows, same, stop, stopped

from fastpref.cli import main
from fastpref.run.guard import Diverged, Interrupted
from fastpref.spo import loop
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo


def test_it_trains_and_says_what_it_did(whole, prompts):
    folder, result = whole
    assert result["global_step"] == 6 and result["margin_noise"] == 0
    log, spent = rows(folder), result["online"]
    assert [row["global_step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and log[0]["spo/clamped"] == 0
    sampled = [row for row in log if "online/kept" in row]
    assert sampled[0] == log[0] and [row["epoch"] for row in sampled] == list(range(len(sampled)))
    for row in sampled:
        by_step = row["online/kept_by_step"]
        assert len(by_step) == 5 and by_step[0] is None and by_step[4] is None
        assert row["online/kept"] == pytest.approx(sum(by_step[1:4]) / 3)
        assert row["online/decodes_per_pair"] == pytest.approx(2 / row["online/kept"])
        # Of a prompt: one row each for start and the first step's end, two for each of 3 steps.
        assert row["online/network_rows_per_pair"] == pytest.approx(8 / 3 / row["online/kept"])
    assert spent["judged"] == 12 * (1 + log[-1]["epoch"]) == 12 * len(sampled)
    record = json.loads((folder / "win_rate.json").read_text())
    assert len(record["base"]) == 2 and record["rounds"][0]["win_rate"][0] == 0.5
    last = record["rounds"][-1]
    assert last["global_step"] == 6 and result["online"]["online/win_rate"] == last["win_rate"][0]
    assert log[-1]["errors/policy_w"] != log[-1]["errors/reference_w"]
    own = json.loads((folder / "checkpoint-6" / "state.json").read_text())["own"]
    before = [row["global_step"] for row in log if row["epoch"] < own["round"]]
    assert own["since"] == max(before, default=0), "the step that sampled its pairs"
    card = (folder / "README.md").read_text()
    assert "| objective | spo |" in card and "(8 prompts, " in card
    assert "preference pairs of the model's own steps with fastpref" in card
    assert spo(SPOConfig(**options(prompts, folder))) == result, "already done"
    smaller = {"sample_rows": 1, "decode_batch": 1, "scorer_timeout": 9.0, "win_rate_rounds": 5}
    assert spo(SPOConfig(**options(prompts, folder, **smaller))) == result, "no other run"


@pytest.mark.parametrize("call", [3, 5, 10])
def test_stopped_while_it_samples_it_goes_on(call, whole, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "calls", {"count": 0, "at": call, "then": stop})
    config = SPOConfig(**options(prompts, tmp_path / "run"))
    with pytest.raises(Interrupted, match=r"saved at step \d in .*; run the same command"):
        spo(config)
    before = judges.calls["count"]
    assert before <= call + 1, "not even the batch of prompts is finished"
    assert not (tmp_path / "run" / "result.json").exists()
    spo(config)
    same(tmp_path / "run", whole[0])


@pytest.mark.parametrize("update", [1, 4])
def test_stopped_while_it_trains_it_goes_on(update, whole, prompts, tmp_path, monkeypatch):
    spo(stopped(tmp_path / "run", update, prompts, monkeypatch))
    same(tmp_path / "run", whole[0])


@pytest.mark.parametrize("where", ["win_rate", "roll"])
def test_a_signal_is_heard_before_the_networks_next_call(
    where, whole, prompts, tmp_path, monkeypatch
):
    """Both may take long: nothing is sampled or scored any more, and what was trained is saved."""
    monkeypatch.setattr(judges, "calls", {"count": 0, "at": None, "then": None})
    real, asked = getattr(loop, where), []

    def late(run, *rest):
        if run.step:
            stop()
            asked.append(judges.calls["count"])
        return real(run, *rest)

    config = SPOConfig(**options(prompts, tmp_path / "run", checkpointing_steps=100))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"saved at step [1-6]"):
        patch.setattr(loop, where, late)
        spo(config)
    assert asked == [judges.calls["count"]]
    spo(config)
    same(tmp_path / "run", whole[0])


def test_memory_that_runs_out_in_sampling_is_mended_by_its_own_options(
    prompts, tmp_path, monkeypatch
):
    more = {"count": 0, "at": 11, "then": lambda: bytearray(10**17)}
    monkeypatch.setattr(judges, "calls", more)
    how = {"win_rate_prompts": 0, "checkpointing_steps": 100}
    with pytest.raises(
        ValueError, match=r"out of memory for sampling: .* smaller --sample_rows or"
    ):
        spo(SPOConfig(**options(prompts, tmp_path / "run", **how)))
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert saved.name != "checkpoint-0"
    how |= {"sample_rows": 1, "decode_batch": 1, "scorer_timeout": 9}
    assert spo(SPOConfig(**options(prompts, tmp_path / "run", **how)))["global_step"] == 6


@pytest.mark.parametrize(
    "change",
    [
        {"rollout_steps": 3, "sampling_steps": 6},
        {"sde_window": [1, 3], "eta": 0.7, "gradient_accumulation_steps": 2},
        {"guidance_scale": 2.0, "sample_rows": 3, "decode_batch": 3},
        {"tuning": "full", "lora_rank": None, "learning_rate": 1e-5},
        {"mixed_precision": "bf16", "decode_frames": 3, "checkpointing": "full"},
    ],
    ids=lambda change: "-".join(change),
)
def test_other_ways(change, prompts, tmp_path):
    change |= {"scorer": "judges:brightness", "max_train_steps": 3, "win_rate_rounds": 1}
    result = spo(SPOConfig(**options(prompts, tmp_path / "run", **change)))
    assert result["global_step"] == 3 and result["metrics"]["loss"] < 0.75
    record = json.loads((tmp_path / "run" / "win_rate.json").read_text())
    assert record["rounds"][-1]["scores"] != record["base"], "it has moved"
    assert result["metrics"]["errors/policy_w"] != result["metrics"]["errors/reference_w"]


def test_the_policy_learns_what_the_scorer_likes(prompts, tmp_path):
    change = {"scorer": "judges:brightness", "max_train_steps": 24, "prompts_per_round": 8}
    change |= {"sample_batch_size": 8, "train_batch_size": 8, "win_rate_rounds": 100}
    change |= {"candidates": 4, "learning_rate": 3e-3, "logging_steps": 8}
    result = spo(SPOConfig(**options(prompts, tmp_path / "run", **change)))
    assert result["online"]["online/win_rate"] == 1 and result["online"]["online/score_gain"] > 1


def test_a_scorer_that_tells_nothing_apart_is_said(prompts, tmp_path, monkeypatch):
    """Each time that it is asked as many times; and nothing is lost that was trained before."""
    monkeypatch.setattr(loop, "MOST_EMPTY", 3)
    made, real = [], loop.assemble

    def assemble(*args):
        made[:] = real(*args)
        return made

    def step_loss(*args, **kwargs):
        made[1].scorer = lambda frames, texts, t: torch.zeros(len(frames)).double()
        return real_loss(*args, **kwargs)

    real_loss = loop.step_loss
    monkeypatch.setattr(loop, "assemble", assemble)
    monkeypatch.setattr(loop, "step_loss", step_loss)
    config = SPOConfig(**options(prompts, tmp_path / "run", checkpointing_steps=100))
    said = r"3 rounds in a row kept no pair: .* threshold 0.1"
    with pytest.raises(ValueError, match=said):
        spo(config)
    assert made[0].step and made[0].saved == made[0].step and made[0].own["round"] == 4
    monkeypatch.setattr(judges, "judge", judges.constant)
    with pytest.raises(ValueError, match=said):
        spo(config)
    assert made[0].own["round"] == 7


def test_memory_that_runs_out_while_it_samples(whole, prompts, tmp_path, monkeypatch):
    """The line names what mends it, and what was trained is saved: it goes on with that."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(judges, "calls", {"count": 0, "at": 10, "then": full})
    how = options(prompts, tmp_path / "run", checkpointing_steps=100)
    with pytest.raises(ValueError, match=r"out of memory for sampling: .* smaller --sample_rows"):
        spo(SPOConfig(**how))
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(saved.name.removeprefix("checkpoint-")) > 0
    spo(SPOConfig(**how | {"decode_batch": 1}))
    one, other = adapter(tmp_path / "run"), adapter(whole[0])
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_policy_that_is_not_finite_ends_it(prompts, tmp_path, monkeypatch):
    real = loop.step_loss

    def step_loss(policy, reference, batch, objective):
        with torch.no_grad():
            for parameter in policies[0].parameters:
                parameter.fill_(float("nan"))
        return real(policy, reference, batch, objective)

    policies = []
    once_assembled(monkeypatch, lambda run, online: policies.append(run))
    monkeypatch.setattr(loop, "step_loss", step_loss)
    with pytest.raises(Diverged, match=r"round \d: .*not finite|not finite"):
        spo(SPOConfig(**options(prompts, tmp_path / "run", train_batch_size=64)))


def test_another_run_or_scorer_is_refused(whole, prompts, tmp_path, capsys):
    folder = whole[0]
    said = fails(capsys, "spo", *arguments(options(prompts, folder, candidates=3)))
    assert "holds another run: candidates (2 there, 3 here)" in said
    said = fails(capsys, "train", *arguments({"family": "toy", "model": BASE, "data": prompts,
                                             "output_dir": folder, "beta": 1}))  # fmt: skip
    assert "is one of fastpref spo, expected one of fastpref train" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eta": 0.0}, "eta: expected 0 < value <= 1, got 0.0"),
        ({"candidates": 1}, "candidates: expected at least 2, got 1"),
        ({"scorer_timeout": 1e10}, "scorer_timeout: expected at most 86400, got 10000000000.0"),
        ({"first_step": 4}, "all candidates would be the same"),
        ({"first_step": 9}, "no step from first_step 9 of 5"),
        ({"sde_window": "[3, 2]"}, "sde_window: expected two steps, first < end, got [3, 2]"),
        ({"win_rate_prompts": 8}, "win_rate_prompts 8 leaves none of 8 prompts to train on"),
        ({"height": 13}, "height and width expected divisible by 4, got 13x12"),
        ({"scorer": "judges:nobody"}, "judges:nobody"),
        ({"scorer": "nowhere"}, "scorer nowhere: no such folder"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing has no effect on FlowMatching"),
        ({"decoder": str(BASE)}, "decodes with no VAE of diffusers"),
    ],
)
def test_mistakes(change, said, prompts, tmp_path, capsys):
    assert said in fails(capsys, "spo", *arguments(options(prompts, tmp_path / "run", **change)))


def test_the_command_says_what_it_cost(prompts, tmp_path, capsys):
    flags = arguments(options(prompts, tmp_path / "run", max_train_steps=1, win_rate_prompts=0))
    assert main(["spo", *flags]) == 0
    said = capsys.readouterr().out
    assert "pairs kept of 12 judged; to sample one took" in said and " decodes, all of them" in said
    assert "prompts    8 train; 4 a round" in said
    assert not (tmp_path / "run" / "win_rate.json").exists()


@pytest.fixture
def server(tmp_path):
    """The demo's judge in a process of its own; `start()` starts it again where it was."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []

    def start():
        words = ["-m", "fastpref.spo.server", "--scorer", "judges:served", "--port", str(port)]
        here = Path(judges.__file__).parent
        process = subprocess.Popen(
            [sys.executable, *words], cwd=here, stdout=subprocess.PIPE, text=True
        )
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        running.append(process)
        return process

    yield start, f"http://127.0.0.1:{port}"
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_scorer_that_dies_and_comes_back_changes_nothing(
    server, whole, prompts, tmp_path, monkeypatch
):
    """A server that scores as the function does: killed while a round samples, started again."""
    start, address = server
    first = start()
    made, calls = [], []

    def change(run, online):
        scorer = online.scorer

        def score(frames, texts, t):
            calls.append(None)
            if len(calls) == 9:
                first.kill()
                first.wait()
                made.append(start())
            return scorer(frames, texts, t)

        online.scorer = score

    once_assembled(monkeypatch, change)
    spo(SPOConfig(**options(prompts, tmp_path / "run", scorer=address)))
    assert made, "it was killed"
    same(tmp_path / "run", whole[0])


def test_a_scorer_that_stays_away_is_one_line_and_nothing_is_lost(
    server, whole, prompts, tmp_path, monkeypatch
):
    start, address = server
    first = start()
    monkeypatch.setattr("fastpref.spo.scorers.PAUSE", 0.01)
    monkeypatch.setattr("fastpref.spo.scorers.LONGEST", 0.01)
    real = loop.next_round

    def next_round(run, empty=0):
        real(run, empty)
        first.kill()
        first.wait()

    monkeypatch.setattr(loop, "next_round", next_round)
    # One checkpoint at the end of all: what the first round trained is saved since it fails.
    change = {"scorer": address, "checkpointing_steps": 100, "win_rate_rounds": 100}
    config = SPOConfig(**options(prompts, tmp_path / "run", **change))
    with pytest.raises(ValueError, match=f"scorer {address}"):
        spo(config)
    monkeypatch.setattr(loop, "next_round", real)
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(saved.name.removeprefix("checkpoint-")) >= 2
    start()
    spo(config)
    one, other = adapter(tmp_path / "run"), adapter(whole[0])
    assert all(torch.equal(one[key], other[key]) for key in one)
