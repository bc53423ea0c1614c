"""Compiled code that is carried: a second process finds it, and the file stays what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import inductor, timing
from bench.inductor import Carried

CPU = torch.device("cpu")
# Compiles a block or two, and says what Inductor had to compile.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from bench.inductor import Carried

carried = Carried(Path(sys.argv[1]), torch.device("cpu"), sys.argv[2])
loaded = carried.load()
for factor in sys.argv[3:]:
    call = torch.compile(lambda x: (x * float(factor)).sin().sum())
    call(torch.ones(8, requires_grad=True)).backward()
    carried.save()
found = counters["inductor"]
print(json.dumps([loaded, found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


@pytest.fixture
def process(tmp_path):
    """(bytes loaded, hits, misses) of a process on a machine that has compiled nothing yet."""
    calls = []

    def run(*arguments: str) -> list[int]:
        calls.append(arguments)
        fresh = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"machine{len(calls)}")}
        root = Path(inductor.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "carried.zip"), *arguments],
            cwd=root, env=os.environ | fresh, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_another_machine_compiles_only_what_is_new(process, tmp_path):
    path = tmp_path / "carried.zip"
    assert process("first", "2.0") == [0, 0, 2], "a forward and a backward"
    loaded, hits, misses = process("second", "2.0", "3.0")
    assert loaded > 0 and (hits, misses) == (2, 2)
    before = path.read_bytes()
    assert process("third", "3.0", "2.0")[1:] == [4, 0]
    assert path.read_bytes() == before, "it had nothing to add"
    names = [
        f"{torch.__version__}/{timing.device_name(CPU)}/{name}" for name in ("first", "second")
    ]
    assert zipfile.ZipFile(path).namelist() == names


class Compiled:
    """Stands in for what this process has compiled: so many bytes that do not compress."""

    def __init__(self, monkeypatch) -> None:
        self.bytes, self.misses = b"", 0
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (self.bytes, None))
        monkeypatch.setattr(inductor, "counters", {"inductor": self})

    def __getitem__(self, name: str) -> int:
        return {"fxgraph_cache_miss": self.misses}[name]

    def more(self, size: int) -> None:
        self.bytes, self.misses = os.urandom(size), self.misses + 1


def test_code_of_others_stays_and_is_not_read(tmp_path, monkeypatch):
    path, compiled, read = tmp_path / "carried.zip", Compiled(monkeypatch), []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", read.append)
    compiled.more(1000)
    mine = Carried(path, CPU, "wan")
    mine.save()
    with monkeypatch.context() as other:
        other.setattr(timing, "device_name", lambda device: "A card")
        assert Carried(path, CPU, "wan").load() == 0
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.99.0")
        there, first = Carried(path, CPU, "wan"), compiled.bytes
        assert there.load() == 0 and not read
        compiled.more(2000)
        there.save()
    assert mine.load() == 1000 and read == [first]


def test_entries_of_others_make_room(tmp_path, monkeypatch):
    """Those of another torch or card first."""
    path, compiled = tmp_path / "carried.zip", Compiled(monkeypatch)
    for version, table in (("2.99.0", "a"), (torch.__version__, "b"), (torch.__version__, "c")):
        with monkeypatch.context() as other:
            other.setattr(torch, "__version__", version)
            monkeypatch.setattr(inductor, "MOST", 10**9 if table != "c" else 2600)
            compiled.more(1000)
            Carried(path, CPU, table).save()
    with zipfile.ZipFile(path) as archive:
        assert [name[-1] for name in archive.namelist()] == ["b", "c"]


def test_a_file_too_large_is_not_written(tmp_path, monkeypatch, capsys):
    path, compiled = tmp_path / "new" / "carried.zip", Compiled(monkeypatch)
    carried = Carried(path, CPU, "table")
    carried.save()
    assert not path.exists(), "nothing was compiled"
    compiled.more(1000)
    carried.save()
    before = path.read_bytes()
    compiled.more(inductor.MOST)
    carried.save()
    assert path.read_bytes() == before
    assert capsys.readouterr().out.endswith(" MB, at most 16: unchanged\n")
    assert [file.name for file in path.parent.iterdir()] == ["carried.zip"]


def test_a_file_that_is_none_is_begun_anew(tmp_path, monkeypatch):
    path, compiled = tmp_path / "carried.zip", Compiled(monkeypatch)
    path.write_bytes(b"cut short")
    carried = Carried(path, CPU, "table")
    with pytest.warns(UserWarning, match=r"carried.zip cannot be read and is begun anew"):
        assert carried.load() == 0
    compiled.more(1000)
    with pytest.warns(UserWarning, match="begun anew"):
        carried.save()
    assert zipfile.ZipFile(path).read(carried.entry) == compiled.bytes
