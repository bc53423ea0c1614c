"""What the README shows runs as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import BASE, write_pairs

from fastpref.pairs.encode import encode
from fastpref.run.parsing import parse

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_loop_runs_and_learns(tmp_path):
    encoded = tmp_path / "runs" / "demo" / "encoded" / "pairs"
    encode("toy", BASE, write_pairs(tmp_path / "data"), encoded, progress=False)
    (code,) = blocks("python")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    printed = [[float(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert [row[0] for row in printed] == list(range(0, 80, 10))
    assert printed[0][2] == 0  # policy equals reference: no margin is above zero
    assert printed[-1][2] > 0.5
    assert (tmp_path / "runs" / "pytorch_lora_weights.safetensors").exists()


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parent.parent / picture).is_file(), picture


TRAIN = re.findall(r"^fastpref train [^`]*?[^\\]$", README, re.S | re.M)
assert len(TRAIN) == 2


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_parse(command):
    words = shlex.split(command.replace("\\\n", " "))
    assert parse(words[2:]).output_dir
