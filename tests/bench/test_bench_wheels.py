"""Which wheels another machine needs: what it lacks, and what that needs in turn."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from bench import wheels

ROOT = Path(wheels.__file__).parents[1]


def said(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["bash", "bench/device.sh", "--wheels", *arguments], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHON": sys.executable}, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("separator", ["\n", ", "])
def test_what_the_list_lacks_is_named_with_what_it_needs(separator, tmp_path):
    """jsonargparse needs docstring-parser for its extra [signatures] alone."""
    lacking = ["docstring-parser", "jsonargparse"]
    names = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    there = [f"{n} {v}" for n, v in names.items() if wheels.plain(n) not in lacking]
    (tmp_path / "names").write_text(separator.join(there))
    assert said(str(tmp_path / "names")) == [f"{n}=={metadata.version(n)}" for n in lacking]


def test_without_a_list_it_is_this_interpreter():
    assert said() == []
    needs = ["pytest", "fastpref.no_such.package>=2", "missing-too; platform_system == 'None'"]
    assert wheels.lacking(needs, None) == {"fastpref-no-such-package": ""}
