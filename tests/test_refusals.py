"""Mistakes in the files and folders a command is given: each is one line, and nothing is lost."""

from __future__ import annotations

import pytest
from pairs import arguments, fails, options


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beta: 1\nbeta: 2\n", "line 2: beta stands there twice"),
        ("beta: " + "[" * 5000, "maximum recursion depth exceeded"),
        (None, "run.yaml: no such file or directory\n"),
    ],
)
def test_config_files(text, says, joined, pairs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    config = [f"--config={file}"] if joined else ["--config", str(file)]
    said = fails(capsys, "train", *config, *arguments(options(pairs, tmp_path / "r")))
    assert said.startswith(f"fastpref train: --config {file}") and says in said
