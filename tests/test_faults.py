"""Commands x faults: whatever is missing, damaged, too large, full or gone, a command says so in
one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from commands import BASE, arguments, encoded, options, write_pairs
from tiny_clip import clip_folder

import fastpref
from fastpref.cli import main
from fastpref.faults import MOST
from fastpref.run.checkpoint import fault

SIZE = ("--num_frames", "8", "--height", "12", "--width", "12", "--steps", "2")
NEW = "exported.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each command reads: media, a model, a set with cached errors, a run, a demo."""
    root = tmp_path_factory.mktemp("tree") / "now"
    write_pairs(root / "media", count=4)
    shutil.copytree(BASE, root / "model")
    encoded(root / "media", root / "set")
    assert call("train", *training(root, max_train_steps=2))[0] == 0
    shutil.copytree(clip_folder(), root / "clip")
    (root / "prompts.txt").write_text("a red disc moving left\na blue disc moving up\n")
    for name in LONG:
        assert call(name, *online(name, root, max_train_steps=2))[0] == 0
    (root / "demo").mkdir()
    (root / "demo" / ".fastpref").write_text("demo\n")
    (root / "demo" / "demo.json").write_text('{"pairs": 8, "steps": 1}')
    (root / "demo" / "labels.json").write_text('{"right": 1.0, "swapped": [], "gaps": []}')
    return root.rename(root.with_name("whole"))


def copied(whole: Path) -> Path:
    """All of it where it was made, as links."""
    root = whole.with_name("now")
    shutil.rmtree(root, ignore_errors=True)
    return shutil.copytree(whole, root, copy_function=os.link)


@pytest.fixture
def tree(whole):
    return copied(whole)


def training(root: Path, **changes) -> list[str]:
    how = {"model": str(root / "model"), "reference": "cached", "draws_per_pair": 2}
    return arguments(options(root / "set", root / "run", max_train_steps=3, **how) | changes)


def online(name: str, root: Path, **changes) -> list[str]:
    """`fastpref spm`, and `fastpref spo` with a plain CLIP."""
    how = {"family": "toy", "model": root / "model", "output_dir": root / name}
    how |= {"guidance_scale": 1.0, "train_batch_size": 2, "max_train_steps": 3}
    how |= {"logging_steps": 1, "checkpointing_steps": 1, "report_to": "none", "device": "cpu"}
    if name == "spm":
        how |= {"data": root / "set", "clip": root / "clip", "held_out": 0.3}
    else:
        how |= {"data": root / "prompts.txt", "scorer": root / "clip", "threshold": 0.0}
        how |= {"num_frames": 8, "height": 12, "width": 12, "sampling_steps": 3, "first_step": 1}
        how |= {"candidates": 2, "prompts_per_round": 2, "win_rate_prompts": 1}
    return arguments(how | changes)


def parts(name: str, root: Path) -> list[str]:
    """A command on the tree."""
    model = ["--family", "toy", "--model", str(root / "model"), "--device", "cpu"]
    lora, data = ["--lora", str(root / "run")], ["--data", str(root / "set")]
    clips = ["--output_dir", str(root / "clips"), *SIZE, "--prompts", "a red disc"]
    media = ["--data", str(root / "media"), "--output_dir", str(root / "set")]
    swept = training(root, output_dir=root / "sweep", max_train_steps=1)
    del swept[(at := swept.index("--beta")) : at + 2]
    one_choice = ["--pair_mode", "joint", "--checkpointing", "none", "--compile", "false"]
    demo = ["--pairs", "8", "--steps", "1", "--clips", "1", "--output_dir", str(root / "demo")]
    if name in LONG:
        return online(name, root)
    return {
        "demo": demo,
        "train": training(root),
        "encode": [*model, *media],
        "cache-reference": training(root),
        "sweep": ["--objectives", "dpo", "--betas", "9", *swept],
        "sample": [*model, *lora, *clips],
        "eval": [*model, *lora, *data, "--draws_per_pair", "1"],
        "export": [*model[:4], *lora, "--format", "diffusers", "--output", str(root / NEW)],
        "report": [str(root / "run")],
        "doctor": [*model, *data, "--card", "80", *one_choice],
    }[name]


# What of the tree a command reads.
SET = ("set/*", "set/pairs/*/*")
READS = {
    "demo": ("demo/*",),
    "train": ("model/*/*", *SET, "set/reference/*", "run/*", "run/*/*"),
    "encode": ("model/*/*", "media/*", *SET),
    "cache-reference": ("model/*/*", *SET, "set/reference/*"),
    "sweep": ("model/*/*", *SET),
    "sample": ("model/*/*", "run/*.safetensors"),
    "eval": ("model/*/*", "run/*.safetensors", *SET),
    "export": ("model/transformer/config.json", "run/*.safetensors"),
    "report": ("run/metrics.jsonl", "run/config.yaml"),
    "doctor": ("model/*/config.json", "set/fingerprint.json", "set/index.parquet"),
}
# Each of these takes a second: walked in the slow tests alone.
LONG = {
    "spm": ("clip/*", *SET, "spm/*", "spm/*/*"),
    "spo": ("clip/*", "prompts.txt", "spo/*", "spo/*/*"),
}


def call(name: str, *rest: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([name, *rest])
    return code, out.getvalue(), err.getvalue()


def one_line(name: str, code: int, err: str) -> str:
    """What a command that has failed says: a line, the last one."""
    assert code == 1 and "Traceback" not in err
    (said,) = (line for line in err.splitlines() if line.startswith(f"fastpref {name}: "))
    assert err.endswith(f"{said}\n") and said.isprintable() and len(said) < MOST + 600
    return said


def replaced(path: Path, data: bytes) -> None:
    path.unlink()  # it is linked to the whole tree's
    path.write_bytes(data)


def half(path: Path) -> None:
    data = path.read_bytes()
    replaced(path, data[: len(data) // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 255
    replaced(path, bytes(data))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def content(data: bytes):
    return lambda path: replaced(path, data)


DAMAGES = {
    "missing": Path.unlink,
    "a folder": a_folder,
    "cut": half,
    "flipped": flipped,
    "empty": content(b""),
    "garbage": content(random.Random(0).randbytes(500)),
    "{}": content(b"{}"),
    "list": content(b'[1, "\x1b[31m", null]'),
    "deep": content(b"[" * 100_000),
    "numbers": content(b'{"global_step": 1' + b"0" * 400 + b', "family": 1e999, "rank": -1}\n'),
}


def files(root: Path, name: str) -> list[Path]:
    """What a command reads, of clips and of pairs one."""
    found = [p for glob in (READS | LONG)[name] for p in sorted(root.glob(glob)) if p.is_file()]
    many = [p for p in found if p.suffix == ".mp4" or {"pairs", "prompts"} & {*p.parts}]
    found = [p for p in found if p not in many[1:] and p.stat().st_size and "events" not in p.name]
    return [path.relative_to(root) for path in found]


def walk(name: str, whole: Path, every: int) -> int:
    """Runs a command with each `every`th of files x damages; how many of them were told."""
    count = 0
    for i, path in enumerate(files(whole, name)):
        for j, (damage, do) in enumerate(DAMAGES.items()):
            if (3 * i + j) % every or (name == "demo" and damage == "missing"):  # it is made anew
                continue
            root = copied(whole)
            do(root / path)
            code, _, err = call(name, *parts(name, root))
            assert "Traceback" not in err, (path, damage)
            if code:
                said = one_line(name, code, err)
                assert "FASTPREF_TRACEBACK" not in said, (path, damage, said)
                count += 1
    return count


@pytest.mark.parametrize("name", READS)
def test_a_damaged_file(name, whole):
    assert walk(name, whole, every=7) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READS, *LONG])
def test_every_damaged_file(name, whole):
    assert walk(name, whole, every=3 if name in LONG else 1) > 6


@pytest.mark.parametrize("name", READS)
def test_shown_where_it_is_asked_for(name, tree, monkeypatch):
    monkeypatch.setenv("FASTPREF_TRACEBACK", "1")
    broken = {"demo": "demo/labels.json", "report": "run/metrics.jsonl"}
    broken["encode"] = "set/fingerprint.json"
    replaced(tree / broken.get(name, "model/transformer/config.json"), b"\xff" * 99)
    with pytest.raises(Exception, match=r"config|labels|metrics|fingerprint"):
        call(name, *parts(name, tree))


LACKING = {
    "demo": "diffusers",
    "train": "peft",
    "encode": "diffusers",
    "cache-reference": "pyarrow",
    "sweep": "jsonargparse",
    "sample": "av",
    "eval": "peft",
    "export": "diffusers",
    "report": "matplotlib",
    "doctor": "yaml",
}


@pytest.mark.parametrize(("name", "module"), LACKING.items())
def test_a_package_that_is_not_installed(name, module, tree, monkeypatch):
    for known in [n for n in sys.modules if n.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, known, None)
    code, _, err = call(name, *parts(name, tree))
    package = {"yaml": "pyyaml"}.get(module, module)
    said = one_line(name, code, err)
    assert said == f"fastpref {name}: {package} is not installed: pip install {package}"


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("import_that_is_nowhere", "import_that_is_nowhere is not installed: pip install"),
        ("raise OSError('libtorch.so: cannot open')", "libtorch.so: cannot open"),
        ("raise ImportError('libcu.so.12: no such file', name='torch')", "libcu.so.12: no such"),
        ("from json import nothing", "cannot import name 'nothing' from 'json'"),
    ],
)
def test_a_torch_that_cannot_be_imported(torch, says, tmp_path):
    torch = f"import {torch}" if torch.isidentifier() else torch
    (tmp_path / "torch.py").write_text(f"{torch}\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    how = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    done = subprocess.run([sys.executable, "-m", "fastpref", "doctor"], **how)
    assert says in one_line("doctor", done.returncode, done.stderr)


FAMILY = """
from fastpref.models.toy import *

def encode_text(pipe, prompts):  # of another width than the model's
    return [{"text": torch.zeros(5, 7)} for _ in prompts]
"""


def test_data_of_other_shapes_than_the_model(tree, monkeypatch):
    (tree / "mine").mkdir()
    (tree / "mine" / "narrow.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(tree)
    how = ["--family", "mine.narrow", "--model", str(BASE), "--device", "cpu"]
    where = ["--data", str(tree / "media"), "--output_dir", str(tree / "narrow")]
    assert call("encode", *how, *where)[0] == 0
    where = arguments(options(tree / "narrow", tree / "other", family="mine.narrow"))
    said = one_line("train", *call("train", *where)[::2])
    assert "shapes do not fit each other (mat1 and mat2 shapes" in said
    assert "do the data, the model and the adapter belong together" in said


def gone(kind: str, buffering: int = -1) -> io.TextIOWrapper:
    """An output that takes nothing."""
    if kind == "full":
        return open("/dev/full", "w", buffering=buffering)
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=buffering)


@pytest.mark.parametrize(("kind", "code"), [("closed", 75), ("full", 1)])
@pytest.mark.parametrize("name", READS)
def test_an_output_that_takes_nothing(name, kind, code, tree):
    err = io.StringIO()
    with gone(kind) as out, redirect_stdout(out), redirect_stderr(err):
        assert main([name, *parts(name, tree)]) == code
    if kind == "full":
        assert "No space left on device" in one_line(name, code, err.getvalue())
    else:
        assert err.getvalue() == ""


def test_outputs_that_are_not_there(tree):
    """fastpref ... >&- 2>&-"""
    with redirect_stdout(None), redirect_stderr(None):
        assert main(["report", *parts("report", tree)]) == 0
        assert main(["report", str(tree / "nowhere")]) == 1


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_a_run_whose_log_takes_no_more_is_saved(kind, tree):
    how = options(tree / "set", tree / "new", checkpointing_steps=100)
    with gone(kind, buffering=1) as err, redirect_stdout(io.StringIO()), redirect_stderr(err):
        assert main(["train", *arguments(how)]) == {"closed": 75, "full": 1}[kind]
    assert fault(tree / "new" / "checkpoint-1") is None


@pytest.mark.parametrize("pair_mode", ["joint", "deferred"])
def test_a_run_out_of_a_cpus_memory_is_saved(pair_mode, tree, monkeypatch):
    """At its second step, where it asks for 4 PB."""
    loop = importlib.import_module("fastpref.run.train")
    name = {"joint": "backward", "deferred": "deferred"}[pair_mode]
    real, calls = getattr(loop, name), []

    def greedy(*inputs, **how):
        calls.append(1)
        torch.empty(10**15 if len(calls) == 2 else 1)
        return real(*inputs, **how)

    monkeypatch.setattr(loop, name, greedy)
    how = {"pair_mode": pair_mode, "checkpointing": "full", "checkpointing_steps": 100}
    flags = arguments(options(tree / "set", tree / "new", **how))
    said = call("train", *flags)[2].splitlines()[-1]
    advice = {"joint": "--pair_mode deferred", "deferred": "encode fewer or smaller frames"}
    assert said.startswith("fastpref train: out of memory with checkpointing full, pair_mode")
    assert "; checkpoint-1 is kept; " in said and advice[pair_mode] in said
    assert fault(tree / "new" / "checkpoint-1") is None


def test_characters_that_the_output_does_not_know(tree):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(out):
        assert main(["sample", *parts("sample", tree), "--prompts", "é \x1b[31m red \udcff"]) == 0
    assert out.buffer.getvalue().endswith(rb"0000.mp4: \xe9 \x1b[31m red \udcff" + b"\n")


def test_names_of_files_do_not_steer_a_terminal(tree, tmp_path):
    rows = [{"prompt": "p", "chosen": "a\x1b[2J.mp4", "rejected": "b\u202e.mp4"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n")
    shutil.copy(next((tree / "media").glob("*.mp4")), tmp_path / "c.mp4")
    code, out, err = call("encode", "--dry_run", "--data", str(tmp_path))
    assert code == 1 and "\x1b" not in out + err and "\u202e" not in out + err
    code, out, err = call("\x1b[31m")
    assert code == 1 and err.startswith(r"fastpref \x1b[31m: expected one of demo, ")


def test_the_module_and_the_version():
    done = subprocess.run(
        [sys.executable, "-m", "fastpref", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fastpref {fastpref.__version__}\n"
