"""`fastpref encode` on several processes: the bytes of one, whatever ends it in between."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from commands import BASE, content, write_pairs
from launch import kill, run, said, start, wait_for

from fastpref.cli import main
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.shards import pair_file

pytestmark = pytest.mark.distributed

FAMILY = '''
"""The toy family with a posterior; each clip takes its time and is written down with its rank."""
import os
import time
from fastpref.models.toy import *
from fastpref.models import toy

def encode_media(pipe, frames, normal=None):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    with open(os.environ["CLIPS"], "a") as log:
        log.write(os.environ.get("RANK", "0"))
    mean = toy.encode_media(pipe, frames)
    return mean if normal is None else mean + normal(mean.shape)
'''


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Its log: the rank of each clip."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "drawn.py").write_text(FAMILY)
    log = tmp_path / "log"
    log.touch()
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), before])))
    monkeypatch.setenv("CLIPS", str(log))
    monkeypatch.syspath_prepend(tmp_path)
    yield log
    for name in ("house.drawn", "house"):
        sys.modules.pop(name, None)


def flags(data: Path, output_dir: Path, **more) -> list[str]:
    given = {"family": "house.drawn", "model": BASE, "data": data, "output_dir": output_dir}
    given |= {"batch_size": 2, "device": "cpu", **more}
    return [
        "encode",
        *(part for name, value in given.items() for part in (f"--{name}", str(value))),
    ]


def ranked(folder: Path) -> Path:
    """Records of three candidates, some scored alike, one that is listed twice, one unreadable."""
    write_pairs(folder, count=6)
    (folder / "broken.mp4").write_bytes(b"no clip")
    clips = [f"{i}_{member}.mp4" for i in range(6) for member in "wl"]
    rows = [
        {"prompt": f"clips {i}", "candidates": clips[i : i + 3], "scores": [3, 2, 2 - i % 2]}
        for i in range(7)
    ]
    rows += [rows[2], {"prompt": "x", "candidates": ["broken.mp4", clips[0]], "scores": [2, 1]}]
    rows += [{"prompt": "", "candidates": clips[:2], "scores": [1, 2]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


def test_several_processes_write_what_one_writes(family, tmp_path, capsys):
    """Also of ranked candidates, ties, bad rows and a sampled posterior; rank 0 alone speaks, and
    encodes no clip again that another has.
    """
    data = ranked(tmp_path / "data")
    how = {"posterior": "sample", "ties": "keep"}
    assert main(flags(data, tmp_path / "one", **how)) == 0
    line = capsys.readouterr().out.replace(str(tmp_path / "one"), "")
    clips = len(family.read_text())
    family.write_text("")
    out, err = run(2, *flags(data, tmp_path / "two", **how))
    assert content(tmp_path / "one") == content(tmp_path / "two") and err == []
    counts = [(tmp_path / name / "counts.json").read_text() for name in ("one", "two")]
    assert counts[0] == counts[1] and json.loads(counts[0])["already_encoded"] == 0
    assert out.replace(str(tmp_path / "two"), "") == line
    each = family.read_text()
    assert clips <= len(each) <= clips + 3 * 2  # the pairs of a record that is there twice
    assert min(each.count("0"), each.count("1")) > clips // 3
    out, _ = run(2, *flags(data, tmp_path / "two", **how))  # again, with nothing to do
    assert f"({len(PairDataset(tmp_path / 'two'))} already encoded)" in out
    assert len(family.read_text()) == len(each)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_after_a_kill_others_go_on(family, tmp_path):
    """With another number of processes, or one."""
    data = write_pairs(tmp_path / "data", count=10)
    assert main(flags(data, tmp_path / "one")) == 0
    family.write_text("")
    broken = tmp_path / "broken"
    process = start(2, *flags(data, broken), PAUSE="0.2")
    for pair_id in PairDataset(tmp_path / "one").pair_ids[:1]:
        wait_for(pair_file(broken, pair_id), process)
    kill(process, 1)
    _, err = process.communicate(timeout=60)
    assert process.returncode and said(err) == [
        "fastpref encode: interrupted; run the same command to go on"
    ]
    assert not (broken / "index.parquet").exists()
    there = len(list(broken.rglob("pairs/*/*.safetensors")))
    assert 0 < there < 10
    alone = shutil.copytree(broken, tmp_path / "alone")
    family.write_text("")
    assert main(flags(data, alone)) == 0
    assert len(family.read_text()) == 2 * (10 - there)
    out, _ = run(3, *flags(data, broken))
    assert f"10 pairs ({there} already encoded)" in out
    assert content(tmp_path / "one") == content(broken) == content(alone)


def test_a_mistake_is_one_line_and_a_fault_of_one_process_ends_all(family, tmp_path):
    data = write_pairs(tmp_path / "data", count=6)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    _, err = run(2, *flags(data, full), code=1)
    assert err == [
        f"fastpref encode: output_dir {full}: holds something else (mine.txt): choose another "
        "output_dir"
    ]
    assert main(flags(data, tmp_path / "one")) == 0
    whole = PairDataset(tmp_path / "one")
    prompts = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    mine = next(i for i, p in enumerate(whole.prompts) if p == prompts[1]["prompt"])
    path = pair_file(tmp_path / "broken", whole.pair_ids[mine])  # of rank 1
    (tmp_path / "broken" / "pairs").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "fingerprint.json", tmp_path / "broken")
    path.parent.write_text("in the way")
    _, err = run(2, *flags(data, tmp_path / "broken"), code=1, PAUSE="5")  # rank 0 is at work
    assert len(err) == 1 and f"{path.name} cannot be written (" in err[0]
    path.parent.unlink()
    assert main(flags(data, tmp_path / "broken")) == 0
    assert content(tmp_path / "one") == content(tmp_path / "broken")
