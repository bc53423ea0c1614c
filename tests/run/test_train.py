"""The loop: what the first step computes, exact resume, damaged checkpoints, runs that must be
refused.
"""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from commands import BASE, arguments, command, fails, options, undigested
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref import models
from fastpref.cli import main
from fastpref.run import adapters
from fastpref.run.announce import warn_of_repeats
from fastpref.run.config import Config
from fastpref.run.folder import alone
from fastpref.run.train import train
from fastpref.step import reference


@pytest.fixture(scope="module")
def unbroken(pairs, tmp_path_factory):
    """Six steps without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    return train(Config(**options(pairs, folder))), folder


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def assert_equal_adapters(a, b):
    a, b = adapter(a), adapter(b)
    assert a.keys() == b.keys() and len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("objective", ["dpo", "ipo", "hinge", "dmpo", "dpo_cm", "sdpo"])
def test_first_step_starts_at_the_reference(objective, pairs, tmp_path):
    train(Config(**options(pairs, tmp_path, objective=objective, max_train_steps=2)))
    first, second = rows(tmp_path)
    assert (
        first["rewards/margins"] == 0
        and first["implicit_acc"] == first["rewards/accuracies"] == 0.5
    )
    assert first["errors/policy_w"] == first["errors/reference_w"] > 0
    assert first["errors/policy_l"] == first["errors/reference_l"] > first["errors/reference_w"]
    expected = {
        "dpo": math.log(2),
        "ipo": (1 / 2000) ** 2,
        "hinge": 1.0,
        "dmpo": -math.log(2) - 0.5 * math.log(0.01 * 0.99),
    }
    if objective in expected:
        assert first["loss"] == pytest.approx(expected[objective], rel=1e-12)
    assert second["rewards/margins"] != 0
    assert json.loads((tmp_path / "result.json").read_text())["margin_noise"] == 0


def test_training_fits_the_pairs(pairs, tmp_path):
    train(
        Config(**options(pairs, tmp_path, max_train_steps=40, train_batch_size=5, logging_steps=10))
    )
    last = rows(tmp_path)[-1]
    assert last["implicit_acc"] > 0.8 and last["rewards/margins"] > 0
    assert last["loss"] < 0.8 * math.log(2)


def test_sft_lowers_the_chosen_error(pairs, tmp_path):
    values = options(
        pairs, tmp_path, objective="sft", max_train_steps=30, train_batch_size=5, logging_steps=10
    )
    del values["beta"]
    train(Config(**values))
    last = rows(tmp_path)[-1]
    assert last["errors/policy_w"] < last["errors/reference_w"]
    assert "rewards/margins" not in last


def test_resume_is_bit_equal(pairs, unbroken, tmp_path):
    train(Config(**options(pairs, tmp_path, max_train_steps=4)))
    train(Config(**options(pairs, tmp_path, resume_from_checkpoint="latest")))
    assert_equal_adapters(tmp_path, unbroken[1])
    wanted = [
        {k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(unbroken[1])
    ]
    assert [
        {k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(tmp_path)
    ] == wanted


@pytest.mark.parametrize(
    "extra", [{"tuning": "full"}, {"gradient_accumulation_steps": 2}, {"checkpointing": "full"}]
)
def test_resume_is_bit_equal_in_other_modes(extra, pairs, tmp_path):
    if "tuning" in extra:
        extra = {**extra, "lora_rank": None}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(Config(**options(pairs, whole, max_train_steps=3, **extra)))
    train(Config(**options(pairs, broken, max_train_steps=2, **extra)))
    train(Config(**options(pairs, broken, max_train_steps=3, **extra)))
    a = load_file(whole / "checkpoint-3" / "parameters.safetensors")
    b = load_file(broken / "checkpoint-3" / "parameters.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if "tuning" in extra:
        assert (whole / "transformer" / "diffusion_pytorch_model.safetensors").exists()


def test_a_decaying_schedule_resumes_and_cannot_be_stretched(pairs, tmp_path):
    change = {"lr_scheduler": "cosine", "logging_steps": 4, "checkpointing_steps": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(Config(**options(pairs, whole, **change)))
    process = Config(**options(pairs, broken, **change))
    train(process)
    for path in ("checkpoint-6", "result.json"):  # as if killed after step 3's save
        found = broken / path
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    train(Config(**options(pairs, broken, **change)))
    assert_equal_adapters(whole, broken)
    with pytest.raises(ValueError, match=r"max_train_steps \(6 there, 8 here\)"):
        train(Config(**options(pairs, whole, max_train_steps=8, **change)))


def test_only_this_runs_newest_checkpoint_is_resumed(pairs, unbroken, tmp_path):
    train(Config(**options(pairs, tmp_path, max_train_steps=4)))
    for place, says in (
        (unbroken[1] / "checkpoint-6", "expected latest or a checkpoint in"),
        (tmp_path / "checkpoint-2", "checkpoint-4 is newer than"),
    ):
        with pytest.raises(ValueError, match=says):
            train(Config(**options(pairs, tmp_path, resume_from_checkpoint=str(place))))


def test_a_folder_with_other_things_is_not_touched(pairs, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds something else: choose another one"):
        train(Config(**options(pairs, tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_two_processes_do_not_share_a_run(pairs, tmp_path, capsys):
    with alone(tmp_path / "run"):
        process = command("train", *arguments(options(pairs, tmp_path / "run")))
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "another fastpref is writing there" in said


def test_a_run_that_never_stepped_diverges(pairs, tmp_path, capsys):
    flags = arguments(options(pairs, tmp_path, beta=1e308))
    assert main(["train", *flags]) == 2
    assert "diverged" in capsys.readouterr().err
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_lost_adapter_is_exported_again(pairs, unbroken, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[1], copy)
    (copy / "pytorch_lora_weights.safetensors").unlink()
    again = train(Config(**options(pairs, copy)))
    assert again["output_dir"] == str(copy)
    assert_equal_adapters(copy, unbroken[1])


@pytest.mark.parametrize("fault", ["missing", "nan", "rank", "metadata"])
def test_foreign_adapter_files_are_refused(fault, unbroken, tmp_path, capsys):
    with safe_open(unbroken[1] / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    values = adapter(unbroken[1])
    first = sorted(values)[0]
    if fault == "missing":
        del values[first]
    elif fault == "nan":
        values[first].fill_(torch.nan)
    elif fault == "rank":
        metadata["transformer.r"] = 3
    else:
        metadata = [1]
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(values, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    said = fails(
        capsys, "eval", "--family", "toy", "--model", str(BASE), "--lora", str(path),
        "--data", str(unbroken[1] / "encoded"),
    )  # fmt: skip
    assert str(path) in said


def test_beta_convention_scales_margins_and_their_noise(pairs, tmp_path):
    values = options(pairs, tmp_path / "a", max_train_steps=2, beta=2000.0)
    train(Config(**values))
    other = {"output_dir": str(tmp_path / "b"), "beta_convention": "mean", "beta": 1000.0}
    train(Config(**values | other))
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert a[-1]["rewards/margins"] == b[-1]["rewards/margins"] != 0


def test_full_tuning_keeps_float32_weights(pairs, tmp_path):
    change = {"tuning": "full", "lora_rank": None, "mixed_precision": "bf16"}
    train(Config(**options(pairs, tmp_path, max_train_steps=2, learning_rate=1e-5, **change)))
    kept = load_file(tmp_path / "checkpoint-2" / "parameters.safetensors")
    base = dict(models.family("toy").load(BASE, torch.float32).named_parameters())
    assert all(value.dtype == torch.float32 for value in kept.values())
    moved = [(kept[k] != base[k]).float().mean().item() for k in kept if kept[k].numel() > 1000]
    assert min(moved) > 0.9


def test_data_of_another_family_or_already_encoded(pairs, unbroken, tmp_path):
    encoded = unbroken[1] / "encoded"
    with pytest.raises(ValueError, match=r"num_frames has no effect: data .* is already encoded"):
        train(Config(**options(encoded, tmp_path / "a", num_frames=8)))
    copy = tmp_path / "copy"
    undigested(shutil.copytree(encoded, copy))
    mark = json.loads((copy / "fingerprint.json").read_text())
    (copy / "fingerprint.json").write_text(json.dumps(mark | {"family": "fastpref.models.wan"}))
    with pytest.raises(ValueError, match=r"encoded with family fastpref\.models\.wan"):
        train(Config(**options(copy, tmp_path / "b")))


def test_checkpointing_changes_nothing(pairs, unbroken, tmp_path):
    train(Config(**options(pairs, tmp_path, checkpointing="full")))
    for name, value in adapter(tmp_path).items():
        torch.testing.assert_close(value, adapter(unbroken[1])[name], rtol=1e-4, atol=1e-6)


def test_accumulation_equals_one_large_batch(pairs, tmp_path):
    train(Config(**options(pairs, tmp_path / "a", max_train_steps=1, train_batch_size=4)))
    train(
        Config(**options(pairs, tmp_path / "b", max_train_steps=1, gradient_accumulation_steps=2))
    )
    (a,), (b,) = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert a["errors/policy_w"] == pytest.approx(b["errors/policy_w"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "victim", ["parameters.safetensors", "optimizer.safetensors", "manifest.json"]
)
def test_damaged_checkpoint_falls_back(victim, pairs, unbroken, tmp_path, capsys):
    train(Config(**options(pairs, tmp_path, max_train_steps=4)))
    path = tmp_path / "checkpoint-4" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(Config(**options(pairs, tmp_path)))
    said = capsys.readouterr()
    assert "checkpoint-4 is damaged" in said.err and "falling back to" in said.err
    assert f"resumed from {tmp_path / 'checkpoint-2'}" in said.out
    assert_equal_adapters(tmp_path, unbroken[1])


def test_finished_run_is_left_alone(pairs, unbroken, capsys):
    before = {p: p.stat().st_mtime_ns for p in unbroken[1].rglob("*")}
    again = train(Config(**options(pairs, unbroken[1])))
    assert again == unbroken[0] and "already trained to step 6" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in unbroken[1].rglob("*")} == before


def test_another_runs_folder_is_refused(pairs, unbroken):
    with pytest.raises(ValueError, match=r"holds another run: beta \(1000.0 there, 500.0 here\)"):
        train(Config(**options(pairs, unbroken[1], beta=500.0)))


def test_prompt_dropout_and_window_change_the_run(pairs, unbroken, tmp_path):
    for name, change in (("a", {"prompt_dropout": 0.9}), ("b", {"timestep_range": (0.5, 1.0)})):
        train(Config(**options(pairs, tmp_path / name, max_train_steps=2, **change)))
        first, reference = rows(tmp_path / name)[0], rows(unbroken[1])[0]
        assert first["errors/reference_w"] != reference["errors/reference_w"]
        assert first["rewards/margins"] == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_pictures(precision, pairs, tmp_path):
    prompts = ["a red disc moving left", "a blue disc moving up"]
    change = {"validation_prompts": prompts, "validation_steps": 2, "validation_sampling_steps": 2}
    change["mixed_precision"] = precision
    train(Config(**options(pairs, tmp_path, max_train_steps=3, **change)))
    made = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert made == ["base.safetensors", "step-000000.png", "step-000002.png"]
    first, second = ((tmp_path / "validation" / name).read_bytes() for name in made[1:])
    assert first != second


def test_bf16_trains(pairs, tmp_path):
    result = train(Config(**options(pairs, tmp_path, mixed_precision="bf16", max_train_steps=4)))
    assert math.isfinite(result["metrics"]["loss"])
    assert all(v.dtype == torch.float32 for v in adapter(tmp_path).values())
    assert any(v.abs().sum() > 0 for k, v in adapter(tmp_path).items() if "lora_B" in k)


def test_exported_adapter_loads_back(pairs, unbroken):
    family = models.family("toy")
    model = adapters.load_lora(unbroken[1], family.load(BASE, torch.float32))
    base = family.load(BASE, torch.float32)
    x, t = (
        torch.randn(1, 3, 8, 12, 12, generator=torch.Generator().manual_seed(1)),
        torch.tensor([500.0]),
    )
    cond = family.encode_text(family.pipeline(BASE, torch.float32), ["a red disc moving left"])[0]
    cond = {k: v.unsqueeze(0) for k, v in cond.items()}
    with torch.no_grad():
        adapted, plain = family.predict(model, x, t, cond), family.predict(base, x, t, cond)
        assert not torch.equal(adapted, plain)
        with reference.disabled(reference.adapter_layers(model)):
            assert torch.equal(family.predict(model, x, t, cond), plain)
    trained = load_file(unbroken[1] / "checkpoint-6" / "parameters.safetensors")
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(value.data, trained[name]), name


@pytest.mark.parametrize(
    "change", [{"r": 10**13}, {"rank_pattern": {"blocks.0.attn1.to_q": 3 * 10**6}}, {"r": "4"}]
)
def test_an_adapter_of_another_rank_than_it_says_is_refused(change, unbroken, tmp_path):
    """Before anything of that rank is made."""
    path = tmp_path / "adapter.safetensors"
    with safe_open(unbroken[1] / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    said |= {f"transformer.{name}": value for name, value in change.items()}
    save_file(adapter(unbroken[1]), path, metadata={"lora_adapter_metadata": json.dumps(said)})
    model = models.family("toy").load(BASE, torch.float32)
    (rank,) = (r.popitem()[1] if isinstance(r, dict) else r for r in change.values())
    with pytest.raises(ValueError, match=rf"\(rank {rank!r}, but lora_A of rank 4: blocks"):
        adapters.load_lora(path, model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_adapter_loads_as_diffusers_does(unbroken):
    """The keys and metadata are what a diffusers model's own loader expects."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(BASE, subfolder="transformer")
    model.load_lora_adapter(unbroken[1] / "pytorch_lora_weights.safetensors", prefix="transformer")
    loaded = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    values = adapter(unbroken[1])
    assert len(loaded) == len(values)
    for name, value in values.items():
        place = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(loaded[place].float(), value), name


def test_model_card_and_config(pairs, unbroken):
    card = (unbroken[1] / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front and "dpo" in front["tags"]  # a folder here is none elsewhere
    assert "| beta (convention) | 1000 (half_mean) |" in card and "10 pairs" in card
    recorded = yaml.safe_load((unbroken[1] / "config.yaml").read_text())
    assert Config(**recorded) == Config(**options(pairs, unbroken[1]))


def test_self_check_warns_of_adapters_that_do_nothing(pairs, tmp_path, capsys):
    train(Config(**options(pairs, tmp_path, learning_rate=1e-30, max_train_steps=1)))
    assert "after the first step the adapters change nothing" in capsys.readouterr().err


def test_repeated_draws_are_warned_of(pairs, tmp_path, capsys):
    train(Config(**options(pairs, tmp_path, draws_per_pair=1, max_train_steps=6)))
    assert "1.2 epochs with draws_per_pair 1" in capsys.readouterr().err


def test_an_epoch_is_what_its_batches_hold(capsys):
    """Six pairs fill one batch of four: after two steps, not three, draws of two come again."""
    shapes = ["8x8"] * 6
    for accumulate, enough in ((1, 2), (2, 1)):
        how = {"train_batch_size": 4, "gradient_accumulation_steps": accumulate}
        for steps in (enough, enough + 1):
            values = options("data", "run", draws_per_pair=2, max_train_steps=steps, **how)
            warn_of_repeats(Config(**values), shapes)
            said = capsys.readouterr().err
            assert bool(said) == (steps > enough)
        assert f"{steps * accumulate:.1f} epochs with draws_per_pair 2: later epochs repeat" in said


@pytest.mark.slow
def test_the_same_command_goes_on_after_sigterm(pairs, tmp_path):
    long = options(pairs, tmp_path, max_train_steps=2000, checkpointing_steps=1000)
    parts = ("train", *arguments(long))
    process = command(*parts)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > 3, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command to go on" in said
    saved = [p.name for p in tmp_path.glob("checkpoint-*")]
    assert len(saved) == 1 and int(saved[0].split("-")[1]) < 2000
    reached = int(saved[0].split("-")[1])
    process = command("train", *arguments(long | {"max_train_steps": reached + 2}))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resumed from {tmp_path / saved[0]}" in said
    assert [row["global_step"] for row in rows(tmp_path)] == list(range(1, reached + 3))


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_nine_anywhere_loses_nothing(pairs, tmp_path):
    """Killed ten times, some of them in the middle of a save, the run ends as the unbroken one
    does.
    """
    steps = {"max_train_steps": 24, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = command("train", *arguments(options(pairs, whole, **steps)))
    assert process.wait(timeout=300) == 0, process.communicate()
    in_a_save = 0
    for attempt in range(10):
        process = command("train", *arguments(options(pairs, broken, **steps)))
        goal = 2 * (attempt + 1)
        partial, final = broken / f".checkpoint-{goal}.tmp", broken / f"checkpoint-{goal}"
        # Every second time as soon as a save is under way.
        early = [partial, final] if attempt % 2 else [final]
        wait_for(lambda early=early: any(path.exists() for path in early), process)
        in_a_save += partial.exists()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        newest = max(int(p.name.split("-")[1]) for p in broken.glob("checkpoint-*"))
        assert goal - 1 <= newest <= goal + 3  # at most the steps since the last save are lost
    assert in_a_save > 0
    process = command("train", *arguments(options(pairs, broken, **steps)))
    assert process.wait(timeout=300) == 0, process.communicate()
    assert_equal_adapters(whole, broken)
    steps_logged = [row["global_step"] for row in rows(broken)]
    assert steps_logged == list(range(1, 25))
