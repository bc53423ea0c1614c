"""What several test files need: a folder of mp4 pairs, a run's arguments, the command line
with its one line of a mistake and in a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import fastpref
from fastpref.cli import main
from fastpref.demo import clips
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.media import write_clip

BASE = Path(fastpref.__file__).parent / "demo" / "base"


def write_pairs(folder: Path, count: int = 10, seed: int = 0) -> Path:
    """`count` pairs of mp4 clips (the clip asked for against noise on it) with metadata.jsonl."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt = clips.PAIR_PROMPTS[i % len(clips.PAIR_PROMPTS)]
        chosen = clips.perfect(prompt)
        noise = torch.randint(-60, 60, chosen.shape, generator=generator)
        rejected = (chosen.int() + noise).clamp(0, 255).to(torch.uint8)
        write_clip(folder / f"{i}_w.mp4", chosen)
        write_clip(folder / f"{i}_l.mp4", rejected)
        rows.append({"prompt": prompt, "chosen": f"{i}_w.mp4", "rejected": f"{i}_l.mp4"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(data: Path, output_dir: Path, **changes) -> dict:
    """A short run on the shipped base model."""
    return {
        "family": "toy",
        "model": str(BASE),
        "data": str(data),
        "output_dir": str(output_dir),
        "beta": 1000.0,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "report_to": "none",
        "device": "cpu",
        **changes,
    }


def arguments(values: dict) -> list[str]:
    """The same as flags."""
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def fails(capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """What `fastpref PARTS` says when it exits with 1: one line."""
    assert main(list(parts)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def command(*parts: str, **extra) -> subprocess.Popen:
    """`fastpref PARTS` in a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from fastpref.cli import main; sys.exit(main())",
            *parts,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **extra,
    )


def kill_at(path: Path, *parts: str) -> None:
    """Runs `fastpref PARTS` in a process and ends it by SIGKILL once `path` is there."""
    process = command(*parts)
    end = time.time() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an encoded set."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "counts.json"
    }


def encoded(data: Path, output_dir: Path, **options) -> PairDataset:
    """The toy family's set of some media."""
    return PairDataset(encode("toy", BASE, data, output_dir, progress=False, **options))


def undigested(folder: Path) -> Path:
    """Makes a set one from before its files had digests."""
    import pyarrow.parquet as pq

    mark = json.loads((folder / "fingerprint.json").read_text())
    del mark["digests"]
    (folder / "fingerprint.json").write_text(json.dumps(mark))
    for path in folder.rglob("*.safetensors"):
        if path.parent.name != "reference":
            path.write_bytes(save(load(path.read_bytes())))
    table = pq.read_table(folder / "index.parquet").drop_columns("digest")
    pq.write_table(table.replace_schema_metadata(), folder / "index.parquet")
    return folder
