"""What a run is predicted to need, which choice that makes, and what happens when it was wrong."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from commands import BASE, arguments, options
from families import FAMILIES
from safetensors.torch import load_file

from fastpref import models
from fastpref.cli import main
from fastpref.look.validation import Prompts
from fastpref.pairs.dataset import PairDataset
from fastpref.run import checkpoint, fitting
from fastpref.run.config import Config
from fastpref.run.fitting import needs
from fastpref.run.guard import Guard
from fastpref.run.parsing import config_values
from fastpref.run.parts import add_lora
from fastpref.run.train import train
from fastpref.step import memory

loop = importlib.import_module("fastpref.run.train")

H100, H200 = memory.CARDS["h100-80"], memory.CARDS["h200"]


@pytest.fixture(scope="module")
def pairs(encoded_pairs):
    return encoded_pairs


def predicted(family: str, on: memory.Card = H100, shape: str | None = None, **fields):
    """Of the family's published model, by name."""
    empty = {"family": family, "model": "", "data": "", "output_dir": "", "lora_rank": 64}
    values = config_values([f"--{k}={v}" for k, v in (empty | fields).items()], "test")
    for name in ("pair_mode", "checkpointing", "compile", "mixed_precision"):
        values[name] = fields.get(name)
    found = needs(values, shape, on)
    return found, {row.name: row for row in found.rows}


@pytest.mark.slow
def test_wan_on_a_card_eager():
    """Against what was counted by hand: 30 activations of 100.6 MB a block, 2.84 GB of weights."""
    found, rows = predicted("wan", compile=False)
    assert rows["deferred/none"].kept == pytest.approx(30 * 30.1 * 100.6e6, rel=0.02)
    assert rows["deferred/none"].weights == pytest.approx(2.84e9, rel=0.01)
    assert rows["deferred/none"].trained == pytest.approx(5 * 4 * 47.2e6, rel=0.01)
    assert rows["deferred/attention"].kept == pytest.approx((3.02 + 6.04) * 1e9, rel=0.05)
    assert rows["joint/none"].kept == 2 * rows["deferred/none"].kept
    assert not rows["deferred/none"].fits(H100) and rows["deferred/none"].fits(H200)
    assert found.flags == (
        "--mixed_precision bf16 --pair_mode deferred --checkpointing attention --compile false"
    )
    # By hand 6.4 s a pair on an H100 with everything recomputed.
    assert rows["joint/full"].seconds == pytest.approx(6.4, rel=0.1)


@pytest.mark.slow
def test_wan_on_a_card_compiled():
    """By hand: 60.6 to 66.8 GB kept, 67 to 73 GB in all; 4.36, 4.69 and 5.37 s a pair."""
    found, rows = predicted("wan", compile=True)
    whole = rows["deferred/none+compile"]
    assert 60e9 < whole.kept < 68e9 and 67e9 < whole.peak < 74e9
    assert whole.fits(H100) and not rows["joint/none+compile"].fits(H100)
    assert not rows["joint/none+compile"].fits(H200), "B5"
    expected = {"none": 4.36, "attention": 4.69, "full": 5.37}
    for mode, seconds in expected.items():
        assert rows[f"deferred/{mode}+compile"].seconds == pytest.approx(seconds, rel=0.05)
    assert found.flags.endswith("--pair_mode deferred --checkpointing none --compile true")


@pytest.mark.slow
def test_the_choice_follows_the_card():
    """CogVideoX-5B keeps its attention on 80 GB and everything on 141."""
    for on, mode in ((H100, "attention"), (H200, "none")):
        model = ["--family=cogvideox", "--model=", "--data=", "--output_dir="]
        flags = ["--pair_mode=deferred", "--compile=true", "--lora_rank=64"]
        values = config_values([*model, *flags], "test")
        values |= {"checkpointing": None, "mixed_precision": "bf16"}
        known = models.published.PUBLISHED["cogvideox-5b"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(models.published, "nearest", lambda *a, known=known: known)
            found = needs(values, None, on)
        assert f"--checkpointing {mode}" in found.flags


@pytest.mark.slow
def test_a_unet_compiled_is_predicted_at_most():
    _, rows = predicted("stable_diffusion", shape="1x256x256")
    for mode in memory.MODES:
        eager, compiled = rows[f"joint/{mode}"], rows[f"joint/{mode}+compile"]
        assert compiled.peak == eager.peak
    joint, one = rows["joint/none"], rows["deferred/none"]
    assert joint.launch_bound, "32 x 32 latents do not fill a card"
    assert joint.seconds == pytest.approx(one.seconds / 2, rel=0.01), "launches of a pair, not two"


def test_what_adds_up_in_a_step():
    _, rows = predicted("toy", pair_mode="deferred", checkpointing="none", compile=False)
    (one,) = rows.values()
    _, rows = predicted(
        "toy", pair_mode="joint", checkpointing="none", compile=False, train_batch_size=3
    )
    (six,) = rows.values()
    assert six.kept == 6 * one.kept and six.trained * 5 == one.trained * 4
    full = {"tuning": "full", "pair_mode": "joint", "checkpointing": "none", "compile": False}
    empty = {"family": "toy", "model": "", "data": "", "output_dir": ""}
    values = config_values([f"--{k}={v}" for k, v in (empty | full).items()], "test")
    (whole,) = needs(values, None, H100).rows
    count = sum(p.numel() for p in models.family("toy").load(BASE).parameters())
    assert whole.trained == 4 * 4 * count and 4 * count <= whole.weights < 4 * count + 1e6
    (cached,) = needs(values | {"reference": "cached"}, None, H100).rows
    assert cached.weights < 1e6 and cached.seconds < whole.seconds


def test_cards():
    assert memory.card("h200") is H200 and memory.card("80") is H100 and memory.card("141") is H200
    other = memory.card("24")
    assert other.gib == 24 and other.room < 0.92 * 24 * 2**30
    found, rows = predicted("toy", other, compile=False)
    assert all(row.seconds is None and row.fits(other) for row in rows.values())
    assert "--checkpointing none" in found.flags
    for name in ("b200", "0", "-1", "1e9", "nan"):
        with pytest.raises(ValueError, match=f"--card: expected h100-80, h200 or .*got {name}"):
            memory.card(name)


def small(step: memory.Step, between: tuple[str, str]) -> memory.Card:
    """A card with room for the second choice, not for the first."""
    row = {r.checkpointing: r for r in memory.predictions(step, H100, compile=[False])}
    more, less = (row[name].peak for name in between)
    assert more > less
    gib = ((more + less) / 2 / (1 - memory.SPARE) + memory.CONTEXT) / memory.GIB
    return replace(H100, gib=gib)


@pytest.mark.slow
def test_auto_takes_the_least_that_fits(pairs, tmp_path, monkeypatch, capsys):
    config = Config(**options(pairs, tmp_path, mixed_precision="bf16", pair_mode="deferred"))
    family, dataset = models.family("toy"), PairDataset(pairs)
    model = family.load(BASE, torch.bfloat16).requires_grad_(False)
    add_lora(model, family.LORA_TARGETS, config.lora_rank)

    def made(online: bool = True) -> memory.Step:
        how = {"online": online, **config.only(*fitting.STEP)}
        return fitting.memory_step(family, model, dataset.largest(), torch.bfloat16, **how)

    def pick(on: memory.Card, online=True, **changes) -> str:
        decides = config.only(*fitting.DECIDES) | changes
        return fitting.pick_checkpointing(made(online), on, tmp_path / "memory.json", decides)

    step = made()
    for expected, on in (
        ("attention", small(step, ("none", "attention"))),
        ("full", small(step, ("attention", "full"))),
        ("full", replace(H100, gib=0.56)),
        ("none", H100),
    ):
        (tmp_path / "memory.json").unlink(missing_ok=True)
        assert pick(on) == expected
        said = capsys.readouterr().out
        assert f"checkpointing {expected}: predicted none 0.0" in said
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["checkpointing"] == "none" and record["basis"]["pair_mode"] == "deferred"
    # A run that goes on keeps to its choice, with other options or another card it is made anew.
    fitting.note(tmp_path / "memory.json", record | {"checkpointing": "full"})
    assert pick(H100) == "full" and "checkpointing full: as " in capsys.readouterr().out
    assert pick(H100, online=False) == "none", "of a run that asks the reference"
    for text in ("garbage", "[]", '{"checkpointing": "some"}'):  # it can be made again
        (tmp_path / "memory.json").write_text(text)
        assert pick(H100) == "none"
    capsys.readouterr()
    monkeypatch.setattr(dataset, "shapes", [s.replace("12x12", "24x12") for s in dataset.shapes])
    assert pick(replace(H100, gib=0.56)) == "full" and pick(H100) == "none"
    capsys.readouterr()
    assert pick(H100, pair_mode="joint") == "none"
    assert pick(replace(H100, gib=0.56)) == "full"
    assert "checkpointing full: predicted" in capsys.readouterr().out


def test_full_tuning_holds_a_copy_while_its_cache_lacks_errors(pairs, tmp_path):
    change = {"tuning": "full", "lora_rank": None, "reference": "cached"}
    config = Config(**options(pairs, tmp_path, **change))
    family, dataset = models.family("toy"), PairDataset(pairs)
    model = family.load(BASE, torch.float32)
    where, how = (family, model, dataset.largest(), torch.float32), config.only(*fitting.STEP)
    asked, known = (fitting.memory_step(*where, online=o, **how) for o in (True, False))
    assert (asked.copies, asked.online) == (2, True) and (known.copies, known.online) == (1, False)


def test_a_model_that_shapes_cannot_run_recomputes_all():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

        def forward(self, x, t, cond):
            return self.blocks[0](x) if x.sum() > 0 else x

    inputs = (torch.ones(1, 2), torch.ones(1), {})
    step = memory.Step(Picky(), lambda model, *a: model(*a), "blocks", inputs)
    found, why = memory.least(step, H100, "joint", compile=False)
    assert found == "full" and "cannot be predicted (DataDependent" in why


def exhausted(monkeypatch, at: int) -> None:
    """A step that runs out of memory in the call number `at`."""
    calls, real = [], loop.training_loss

    def training_loss(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")
        return real(*args, **options)

    monkeypatch.setattr(loop, "training_loss", training_loss)


@pytest.mark.parametrize("at", ["save", "judge", "clips"])
def test_memory_that_ends_after_a_step_loses_nothing_either(at, pairs, tmp_path, monkeypatch):
    """In a checkpoint's save, after a flush, in the validation clips: the step is done."""
    change = {"logging_steps": 2, "checkpointing_steps": 3, "checkpointing": "none"}
    if at == "clips":
        change |= {"validation_prompts": ["a red disc moving left"], "validation_steps": 2}
        change["validation_sampling_steps"] = 2
    train(Config(**options(pairs, tmp_path / "unbroken", **change)))
    place, name, number = {
        "save": (checkpoint, "save", 1),
        "judge": (Guard, "judge", 2),
        "clips": (Prompts, "clips", 3),
    }[at]
    calls, real = [], getattr(place, name)

    def once(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **options)

    monkeypatch.setattr(place, name, once)
    run = Config(**options(pairs, tmp_path / "run", **change))
    with pytest.raises(ValueError, match="out of memory"):
        train(run)
    assert checkpoint.newest(tmp_path / "run")[0] is not None
    train(run)
    a, b = (
        load_file(tmp_path / folder / "pytorch_lora_weights.safetensors")
        for folder in ("run", "unbroken")
    )
    assert all(torch.equal(a[k], b[k]) for k in b)
    rows = [
        {row["global_step"]: row["loss"] for row in map(json.loads, file.open())}
        for file in (tmp_path / f / "metrics.jsonl" for f in ("run", "unbroken"))
    ]
    assert rows[0] == rows[1] and list(rows[0]) == [2, 4, 6]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_out_of_memory_names_the_next_choice_and_loses_nothing(
    accumulate, pairs, tmp_path, monkeypatch, capsys
):
    change = {"gradient_accumulation_steps": accumulate, "logging_steps": 2}
    unbroken = train(Config(**options(pairs, tmp_path / "unbroken", **change)))
    flags = arguments(options(pairs, tmp_path / "run", **change))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".fastpref").write_text("train\n")
    record = tmp_path / "run" / "memory.json"  # as on a GPU
    fitting.note(record, {"checkpointing": "none", "basis": {"card": "a"}})
    exhausted(monkeypatch, at=4 * accumulate)  # of step 4 the last batch
    assert main(["train", *flags]) == 1
    said = capsys.readouterr().err
    assert (
        "fastpref train: out of memory with checkpointing none, pair_mode joint; checkpoint-3 is "
        "kept; run the same command again: it goes on with checkpointing attention (CUDA out of "
        "memory. Tried to allocate 2 GiB)"
    ) in said
    assert json.loads(record.read_text()) == {
        "checkpointing": "attention",
        "why": "none ran out of memory",
        "basis": {"card": "a"},
    }
    assert main(["train", *flags]) == 0
    assert "resumed from" in capsys.readouterr().out
    a, b = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path / "run", tmp_path / "unbroken")
    )
    assert unbroken["global_step"] == 6 and all(torch.equal(a[k], b[k]) for k in b)
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("run", "unbroken")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"checkpointing": "none"}, "run it again with --checkpointing attention"),
        ({"checkpointing": "full"}, "run it again with --pair_mode deferred"),
        ({"checkpointing": "full", "pair_mode": "deferred"}, "encode fewer or smaller frames"),
        ({"pair_mode": "deferred"}, "run it again with --checkpointing attention"),
    ],
)
def test_a_named_choice_is_changed_by_its_owner(change, advice, pairs, tmp_path, capsys):
    config = Config(**options(pairs, tmp_path, **change))
    error, names = torch.OutOfMemoryError("CUDA out\nof memory"), config.only(*fitting.MENDS)
    said = str(fitting.exhausted(error, tmp_path, **names))
    assert f"no step was done yet; {advice}" in said and said.endswith("(CUDA out of memory)")
    assert not (tmp_path / "memory.json").exists()


def test_other_memory_is_not_a_steps(pairs, tmp_path, monkeypatch, capsys):
    """What no checkpointing mends is said to be what it is, and nothing is remembered."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastpref.look.validation.Prompts.clips", full)
    flags = arguments(options(pairs, tmp_path / "run", validation_prompts=["a red disc"]))
    assert main(["train", *flags]) == 1
    said = capsys.readouterr().err
    assert "fastpref train: out of memory for the validation clips: another run may have" in said
    monkeypatch.setattr("fastpref.run.policy.load_model", full)
    assert main(["train", *arguments(options(pairs, tmp_path / "other"))]) == 1
    assert (
        "fastpref train: out of memory (CUDA out of memory): try --pair_mode deferred"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*/memory.json"))


def test_a_run_goes_on_with_another_choice(pairs, tmp_path):
    train(Config(**options(pairs, tmp_path, max_train_steps=2, checkpointing="none")))
    changed = {"checkpointing": "full", "pair_mode": "deferred"}
    assert train(Config(**options(pairs, tmp_path, **changed)))["global_step"] == 6


# ---- fastpref doctor


def doctor(capsys, *flags: str) -> tuple[int, str]:
    code = main(["doctor", *flags])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_doctor_ends_with_a_line_of_flags(capsys):
    flags = ("--family", "toy", "--card", "h100-80", "--compile", "false")
    code, said = doctor(capsys, *flags)
    first, head, *rows, last = said.splitlines()
    assert code == 0 and "predicted, not measured" in first and head.startswith("predicted")
    assert len(rows) == 6 and all(row.endswith(" fits") for row in rows)
    assert last.startswith("use, as predicted: --mixed_precision bf16 --pair_mode ")
    assert last.endswith("--cuda_graphs true"), "a step of 18 tokens is launches alone"
    words = last.partition(": ")[2].split()
    plain = {"family": "toy", "model": "m", "data": "d", "output_dir": "o", "beta": 1}
    Config(**config_values([*arguments(plain), *words], "fastpref train"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "cogvideox-5b", "sd15", "sdxl"])
def test_doctor_reads_a_folders_configs_alone(name, capsys, tmp_path):
    family = FAMILIES[name]
    folder = family.build(tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    size = "x".join(map(str, (family.frames, family.height, family.width)))
    kind = family.name
    code, said = doctor(
        capsys, "--family", kind, "--model", str(folder), "--shape", size, "--card", "24",
        "--compile", "false",
    )  # fmt: skip
    assert code == 0, said
    assert f"{kind} {size} on 24 GiB" in said and said.count(" fits\n") == 6


def test_doctor_reads_the_largest_shape_of_a_set(pairs, capsys):
    code, said = doctor(
        capsys, "--family", "toy", "--model", str(BASE), "--data", str(pairs), "--card", "24",
        "--compile", "false", "--pair_mode", "joint",
    )  # fmt: skip
    assert code == 0 and said.startswith("toy 3x8x12x12 latents on 24 GiB") and "joint/full" in said
    assert "deferred/" not in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--card", "24"), "--family: needed"),
        (("--family", "wan"), "--card: no GPU is here: name one, h100-80, h200 or its GiB"),
        (("--family", "wan", "--card", "big"), "--card: expected h100-80, h200 or its memory"),
        (("--family", "wan", "--card", "24", "--shape", "80x480x832"), "expected 4k+1 frames"),
        (("--family", "wan", "--card", "24", "--bta", "1"), "bta"),
        (("--family", "wan", "--card", "24", "--model", "/nowhere"), "/nowhere: no such folder"),
        (("--family", "wan", "--card", "24", "--data", "/nowhere"), "--data /nowhere: expected a"),
        (("--family", "wan", "--device", "cpu"), "--card: no GPU is here"),
        (("--family", "wan", "--card", ""), "--card: no GPU is here"),
        (("--family", "wan", "--card", "24", "--num_frames", "17"), "all of --num_frames --height"),
        (("--family", "toy", "--card", "24", "--shape", "9" * 20 + "x12x12"), "expected FRAMESx"),
        (("--family", "stable_diffusion", "--card", "24", "--shape", "5x512x512"), "makes images"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_doctor_says_what_is_wrong(flags, says, capsys):
    code, said = doctor(capsys, *flags)
    assert code == 1 and says in said and said.count("\n") == 1
