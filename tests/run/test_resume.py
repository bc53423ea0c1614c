"""Going on: what a run finds changed or damaged, what it keeps, what it has finished already."""

import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from hashlib import blake2b

import pytest
import torch
from commands import BASE, arguments, content, encoded, fails, options, undigested
from safetensors.torch import load, load_file, save_file

from fastpref import models
from fastpref.cli import main
from fastpref.files import TEMPORARY
from fastpref.run import bookkeeping, checkpoint
from fastpref.run.artifact import whole
from fastpref.run.checkpoint import clean, fault
from fastpref.run.config import Config
from fastpref.run.guard import Diverged, Interrupted
from fastpref.run.telemetry import Log
from fastpref.run.train import train
from fastpref.step import attention

ARTIFACT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pairs(encoded_pairs):
    return encoded_pairs


def run(pairs, folder, **changes):
    return train(Config(**options(pairs, folder, **changes)))


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_a_log_line_across_a_resume_is_that_of_an_unbroken_run(pairs, tmp_path):
    change = {"logging_steps": 3, "checkpointing_steps": 2}
    run(pairs, tmp_path / "whole", **change)
    run(pairs, tmp_path / "broken", **change, max_train_steps=4)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    run(pairs, tmp_path / "broken", **change)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def test_another_base_under_the_same_path_is_refused(pairs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    change = {"model": str(base)}
    run(pairs, tmp_path / "run", **change, max_train_steps=2)
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained on another model \("):
        run(pairs, tmp_path / "run", **change)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == 2


@pytest.fixture(scope="module")
def two_steps(pairs, tmp_path_factory):
    """(a set, a run of two steps on it)"""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(pairs, folder / "set")
    run(folder / "set", folder / "run", max_train_steps=2)
    return folder / "set", folder / "run"


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"fps": 8.0}, {"num_frames": 4}, {}])
def test_a_set_encoded_again_otherwise_is_another_one(change, pairs, two_steps, tmp_path):
    """Under the same path and of the same media; at their own 8 frames a second with the same
    latents too.
    """
    data, folder = shutil.copytree(two_steps[0], tmp_path / "set"), tmp_path / "run"
    shutil.copytree(two_steps[1], folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(two_steps[0]), str(data)))
    shutil.rmtree(data)
    encoded(pairs.parent / "media", data, **change)
    if not change:
        assert run(data, folder, max_train_steps=3)["global_step"] == 3
        return
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was trained on another data \(.*put it back"
    ):
        run(data, folder, max_train_steps=3)


def test_a_run_on_a_set_from_before_digests_goes_on(pairs, tmp_path):
    """Also where encode looks at that set again."""
    data = undigested(shutil.copytree(pairs, tmp_path / "set"))
    before = content(data)
    run(data, tmp_path / "run", max_train_steps=2)
    encoded(pairs.parent / "media", data)
    assert content(data) == before
    assert run(data, tmp_path / "run", max_train_steps=3)["global_step"] == 3


def test_a_finished_run_keeps_its_result_until_it_goes_on(pairs, tmp_path, capsys):
    first = run(pairs, tmp_path, max_train_steps=2)
    record = (tmp_path / "result.json").read_bytes()
    flags = arguments(options(pairs, tmp_path, max_train_steps=4, report_to="wandb"))
    assert main(["train", *flags]) == 1 and "report_to wandb" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == record
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="is trained to step 2, and no checkpoint is left"):
        run(pairs, tmp_path)
    assert (tmp_path / "result.json").read_bytes() == record
    assert run(pairs, tmp_path, max_train_steps=2) == first


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_damaged_result_is_written_again(tuning, pairs, tmp_path, capsys):
    change = {"max_train_steps": 2, "tuning": tuning}
    change |= {"lora_rank": None, "learning_rate": 1e-5} if tuning == "full" else {}
    run(pairs, tmp_path, **change)
    (file,) = (tmp_path / ARTIFACT, *(tmp_path / "transformer").glob("*.safetensors"))[-1:]
    before = file.read_bytes()
    values = load(before)
    for left in (b"", before[:8], b"\xff" * 8 + before[8:], before[:-1]):
        file.write_bytes(left)
        capsys.readouterr()
        assert run(pairs, tmp_path, **change)["global_step"] == 2
        said = capsys.readouterr()
        assert "is missing or damaged: writing it again" in said.err
        assert f"resumed from {tmp_path / 'checkpoint-2'}" in said.out
        again = load(file.read_bytes())  # not mapped: it is cut off next
        assert again.keys() == values.keys()
        assert all((again[name] == value).all() for name, value in values.items())
    run(pairs, tmp_path, **change)
    assert "already trained to step 2" in capsys.readouterr().out


def test_a_model_without_one_of_its_files_is_not_whole(tmp_path):
    model = models.family("toy").load(BASE, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1 and whole(tmp_path)
    for file in (shards[0], tmp_path / "config.json"):
        kept = file.read_bytes()
        file.unlink()
        assert not whole(tmp_path), file.name
        file.write_bytes(kept)
    assert whole(tmp_path)


def test_a_result_is_whole_under_a_name_that_is_no_text(tmp_path):
    """Which safetensors' own reader does not take."""
    save_file({"a": torch.zeros(3)}, tmp_path / ARTIFACT)
    assert whole((tmp_path / ARTIFACT).rename(tmp_path / os.fsdecode(b"\xff")))


def test_checkpoints_cut_off_by_a_kill_are_removed(pairs, tmp_path):
    run(pairs, tmp_path, max_train_steps=1)
    for step, lost in ((3, "manifest.json"), (40, "state.json")):
        unfinished = tmp_path / f".checkpoint-{step}.tmp"
        shutil.copytree(tmp_path / "checkpoint-1", unfinished)
        (unfinished / lost).unlink()
    (tmp_path / "validation").mkdir()
    for name in (f"{TEMPORARY}1.result.json.tmp", f"validation/{TEMPORARY}2.base.safetensors.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "notes.tmp").touch()
    run(pairs, tmp_path, max_train_steps=2)
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert [p.name for p in tmp_path.rglob("*.tmp")] == ["notes.tmp"]


@pytest.mark.parametrize("left", [None, "state.json"])
def test_a_checkpoint_killed_before_its_name_replaced_another_is_kept(left, pairs, tmp_path):
    """A step that is saved twice: between the old one's removal and the new one's name."""
    run(pairs, tmp_path, max_train_steps=2)
    (tmp_path / "result.json").unlink()
    final = tmp_path / "checkpoint-2"
    shutil.copytree(final, tmp_path / ".checkpoint-2.tmp")
    shutil.rmtree(final)
    if left:
        final.mkdir()
        shutil.copy(tmp_path / ".checkpoint-2.tmp" / left, final)
    assert clean(tmp_path) is None and fault(final) is None
    assert not (tmp_path / ".checkpoint-2.tmp").exists()
    shutil.copytree(final, tmp_path / ".checkpoint-2.tmp")
    (tmp_path / ".checkpoint-2.tmp" / "state.json").write_text("{}")
    clean(tmp_path)
    assert fault(final) is None and not (tmp_path / ".checkpoint-2.tmp").exists()


def test_another_run_is_refused_by_a_checkpoint_without_its_name(pairs, tmp_path):
    run(pairs, tmp_path, max_train_steps=1)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.tmp")
    with pytest.raises(ValueError, match=r"holds another run: learning_rate"):
        run(pairs, tmp_path, max_train_steps=1, learning_rate=2e-3)


FILES = ["generators.safetensors", "optimizer.safetensors", "parameters.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_checkpoint_is_noticed(name, two_steps, tmp_path, capsys):
    """The file is as long as before, and what it holds can be read."""
    folder = shutil.copytree(two_steps[1], tmp_path / "run")
    file = folder / "checkpoint-2" / name
    data = bytearray(file.read_bytes())
    at = data.rindex(b"1") if name.endswith("json") else len(data) - 1
    data[at] ^= 1
    file.write_bytes(data)
    said = f"{name} was changed after it was written"
    assert fault(folder / "checkpoint-2") == said
    with pytest.raises(ValueError, match=rf"checkpoint-2 is damaged \({said}\): resume from anoth"):
        checkpoint.load(folder / "checkpoint-2", torch.nn.Linear(1, 1), None)
    shutil.copytree(two_steps[1] / "checkpoint-2", folder / "checkpoint-1")
    found, passed_over = checkpoint.newest(folder)
    assert found == folder / "checkpoint-1" and said in passed_over[0]


def test_what_is_wrong_with_a_checkpoint_is_said(two_steps, tmp_path):
    """A file cut short, gone, or not listed; a manifest of another form."""
    whole = two_steps[1] / "checkpoint-2"
    assert fault(whole) is None
    listed = json.loads((whole / "manifest.json").read_text())
    size = listed["state.json"][0]
    changes = {
        "a": ("state.json", (whole / "state.json").read_bytes()[:-3]),
        "b": ("state.json", None),
        "c": ("manifest.json", json.dumps(listed | {"state.json": [size, "0" * 32]}).encode()),
        "d": ("manifest.json", json.dumps({k: listed[k] for k in FILES[:3]}).encode()),
        "e": ("manifest.json", b"[1]"),
        "f": ("manifest.json", json.dumps(listed | {"state.json": size}).encode()),
        "g": ("manifest.json", None),
    }
    said = {}
    for name, (file, data) in changes.items():
        copy = shutil.copytree(whole, tmp_path / name)
        (copy / file).unlink() if data is None else (copy / file).write_bytes(data)
        said[name] = fault(copy)
    assert said == {
        "a": f"state.json has {size - 3} bytes, expected {size}",
        "b": "state.json is missing",
        "c": "state.json was changed after it was written",
        "d": "manifest.json does not list state.json",
        "e": "manifest.json is not readable",
        "f": "manifest.json is not readable",
        "g": "manifest.json is missing",
    }


def test_files_of_a_run_have_the_mode_that_the_umask_says(pairs, tmp_path):
    before = os.umask(0o027)
    try:
        run(pairs, tmp_path, max_train_steps=2)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.glob("checkpoint-2/*") if p.is_file()]
    assert len(files) == 5 and {p.stat().st_mode & 0o777 for p in files} == {0o640}


def test_a_checkpoint_of_an_older_version_is_named(pairs, tmp_path, capsys):
    run(pairs, tmp_path, max_train_steps=1)
    folder = tmp_path / "checkpoint-1"
    state = json.loads((folder / "state.json").read_text())
    del state["meter"], state["made_of"]
    text = json.dumps(state).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = [len(text), blake2b(text).hexdigest()[:32]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    said = fails(capsys, "train", *arguments(options(pairs, tmp_path)))
    assert f"{folder}: state.json expected step, margin_noise, made_of, " in said
    assert "got no made_of, meter: it is another version's" in said


@contextmanager
def room(size):
    """No file can grow beyond `size`, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_on_the_disk_is_named(pairs, tmp_path, capsys):
    flags = arguments(options(pairs, tmp_path))
    parameters = "checkpoint-2/parameters.safetensors"
    for size, name in ((100, "config.yaml"), (8000, "checkpoint-2")):
        with room(size):
            assert main(["train", *flags]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"fastpref train: {tmp_path / name} cannot be written (")
        assert said.endswith("): mend that, and run the same command again")
        assert "file too large" in said.lower()
    assert main(["train", *flags]) == 0 and not list(tmp_path.glob(".checkpoint-*"))
    assert (tmp_path / parameters).stat().st_size > 8000


def test_a_log_that_does_not_fit_is_named(tmp_path):
    log = Log(tmp_path, [], {}, 0)
    with room(100), pytest.raises(OSError, match=r"metrics.jsonl cannot be written"):
        for step in range(9):
            log.write({"global_step": step, "loss": 0.5})
    with room(100), pytest.raises(OSError, match=r"metrics.jsonl cannot be written"):
        log.close()


def test_killed_after_its_last_save_a_run_still_has_its_numbers(pairs, tmp_path, capsys):
    change = {"validation_prompts": ["a red disc moves right"], "validation_steps": 2}
    change |= {"validation_sampling_steps": 2, "max_train_steps": 2}
    first = run(pairs, tmp_path / "run", **change)
    for name in ("result.json", ARTIFACT, "validation/step-000002.png"):
        (tmp_path / "run" / name).unlink()
    again = run(pairs, tmp_path / "run", **change)
    assert again["metrics"] == first["metrics"] and again["global_step"] == 2
    assert again["seconds_per_pair"] == first["metrics"]["perf/seconds_per_pair"]
    for name in (ARTIFACT, "validation/step-000002.png", "validation/step-000000.png"):
        assert (tmp_path / "run" / name).exists()

    flags = arguments(options(pairs, tmp_path / "sweep", max_train_steps=2))
    del flags[flags.index("--beta") : flags.index("--beta") + 2]
    command = ["sweep", "--objectives", "dpo", "--betas", "100", *flags]
    capsys.readouterr()
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    (tmp_path / "sweep" / "dpo-beta100" / "result.json").unlink()
    assert main(command) == 0 and capsys.readouterr().out.splitlines()[-2:] == table


def test_what_is_saved_after_a_fall_back_stays(pairs, tmp_path, capsys):
    run(pairs, tmp_path)
    for newer in (tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"):
        (newer / "optimizer.safetensors").write_bytes(b"cut")
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "result.json").unlink()
    change = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    run(pairs, tmp_path, **change, max_train_steps=3)
    assert "checkpoint-6 is damaged" in capsys.readouterr().err
    assert fault(tmp_path / "checkpoint-3") is None and not (tmp_path / "checkpoint-2").exists()


def test_an_adapter_that_is_not_finite_is_no_result(pairs, tmp_path):
    with pytest.raises(Diverged, match="a trained parameter is not finite"):
        run(pairs, tmp_path, weight_decay=1e39, learning_rate=1.0, max_train_steps=2)
    assert not (tmp_path / ARTIFACT).exists() and not (tmp_path / "result.json").exists()
    with pytest.raises(ValueError, match="weight_decay: expected a finite number"):
        Config(**options(pairs, tmp_path, weight_decay=float("inf")))


@pytest.mark.parametrize(("mode", "rows"), [("joint", 4), ("deferred", 1)])
def test_attention_is_picked_on_what_a_step_runs(mode, rows, pairs, tmp_path, monkeypatch):
    seen = []

    def choose(wanted, model, probe, device):
        seen.append(len(probe()))
        return choice(wanted, model, probe, device)

    choice = attention.choose
    monkeypatch.setattr(attention, "choose", choose)
    run(pairs, tmp_path, pair_mode=mode, max_train_steps=1)
    assert seen == [rows]


def test_where_there_is_no_terminal_a_log_step_is_a_line(pairs, tmp_path, capsys):
    run(pairs, tmp_path, max_train_steps=4, logging_steps=2)
    said = capsys.readouterr().err
    assert (
        "step 2 of 4: loss 0." in said and "step 4 of 4: loss 0." in said and "step 3" not in said
    )


def test_prompt_dropout_needs_the_empty_prompts_own_shape(pairs, tmp_path):
    undigested(shutil.copytree(pairs, tmp_path / "set"))
    file = tmp_path / "set" / "empty.safetensors"
    save_file({k: v[1:].clone() for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"empty.safetensors: the empty prompt's .* expected"):
        run(tmp_path / "set", tmp_path / "run", prompt_dropout=0.1)


def test_cut_records_are_one_line(pairs, tmp_path, capsys):
    train(Config(**options(pairs, tmp_path, max_train_steps=2)))
    record = tmp_path / "config.yaml"
    kept = record.read_text()
    record.write_text(kept[:-40] + "\n: [")
    capsys.readouterr()
    again = arguments(options(pairs, tmp_path, max_train_steps=2))
    assert "config.yaml is not readable" in fails(capsys, "train", *again)
    record.write_text(kept)
    done = tmp_path / "result.json"
    result = json.loads(done.read_text())
    for change in ({"global_step": "2"}, {"seconds_per_pair": None}, {"metrics": []}):
        done.write_text(json.dumps(result | change))
        assert "result.json is not readable" in fails(capsys, "train", *again)
    done.write_text(json.dumps(result))
    (tmp_path / "attention.json").write_text('{"attention": ["native"]}')
    train(Config(**options(pairs, tmp_path, max_train_steps=3)))


@pytest.mark.parametrize(("name", "every", "left"), [("save", 2, 2), ("validate", 100, 3)])
def test_a_signal_beside_a_step_leaves_at_a_saved_one(
    name, every, left, pairs, tmp_path, monkeypatch
):
    """During a save that was due: there. After step 2, which was not to be saved: at step 3."""
    real = getattr(bookkeeping, name)

    def arrives(run):
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)
        real(run)

    monkeypatch.setattr(bookkeeping, name, arrives)
    config = Config(**options(pairs, tmp_path, checkpointing_steps=every))
    with pytest.raises(Interrupted, match=f"saved at step {left} in"):
        train(config)
    assert (tmp_path / f"checkpoint-{left}").exists()
    assert train(config)["global_step"] == 6


def test_a_run_from_before_an_option_goes_on(pairs, tmp_path):
    """By that option's default, and no other value."""
    run(pairs, tmp_path, max_train_steps=1)
    record = tmp_path / "config.yaml"
    kept = [line for line in record.read_text().splitlines(True) if "reduce_dtype" not in line]
    record.write_text("".join(kept))
    with pytest.raises(ValueError, match=r"another run: reduce_dtype \(fp32 there, bf16 here\)"):
        run(pairs, tmp_path, max_train_steps=2, reduce_dtype="bf16")
    assert run(pairs, tmp_path, max_train_steps=2)["global_step"] == 2
