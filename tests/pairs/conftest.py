"""Families outside the package, for encoding: one that logs its clips, one with a posterior."""

from __future__ import annotations

import sys

import pytest

SLOW = '''
"""The toy family, but each clip takes its time and is written down."""
import os
import time
from fastpref.models.toy import *
from fastpref.models import toy

def encode_media(pipe, frames):
    time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
    with open(os.environ["SLOW_LOG"], "a") as log:
        log.write("clip\\n")
    return toy.encode_media(pipe, frames)
'''

DRAWN = '''
"""The toy family with a posterior of standard deviation 1 around the pixels."""
from fastpref.models.toy import *
from fastpref.models import toy

def encode_media(pipe, frames, normal=None):
    mean = toy.encode_media(pipe, frames)
    return mean if normal is None else mean + normal(mean.shape)
'''


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A family outside the package that logs every clip it encodes."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "slow.py").write_text(SLOW)
    (tmp_path / "house" / "drawn.py").write_text(DRAWN)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SLOW_LOG", str(log))
    yield log
    for name in ("house.slow", "house.drawn", "house"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """Of two clips that are none, for metadata to name."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes(name.encode())
    return root
