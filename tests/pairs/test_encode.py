"""Encoding: what is stored, under which names, and resuming after kill -9."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from commands import BASE, content, encoded

from fastpref.models import family, toy
from fastpref.pairs import media
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.prepare import content_id
from fastpref.pairs.rows import read_rows
from fastpref.pairs.shards import pair_file

OTHER = BASE / "transformer"  # than BASE


def test_latents_and_embeddings_are_the_familys(pairs, tmp_path):
    dataset = encoded(pairs, tmp_path / "set")
    by_prompt = {row.prompt: row for row in read_rows(pairs)}
    assert set(dataset.prompts) == set(by_prompt)
    pipe = toy.pipeline("")
    for pair in (dataset[i] for i in range(len(dataset))):
        row = by_prompt[pair.prompt]
        for stored, path in ((pair.latents_w, row.chosen), (pair.latents_l, row.rejected)):
            frames = media.decode(path.read_bytes(), media.Sampling()).frames
            assert torch.equal(stored, toy.encode_media(pipe, frames))
        assert torch.equal(pair.cond["text"], toy.encode_text(pipe, [row.prompt])[0]["text"])


def test_what_stands_in_the_folder(pairs, tmp_path):
    folder = tmp_path / "set"
    dataset = encoded(pairs, folder, num_frames=4, height=8, width=8, fps=4, dtype="bfloat16")
    assert dataset[0].latents_w.shape == (3, 4, 8, 8)
    assert dataset[0].latents_w.dtype == dataset[0].cond["text"].dtype == torch.bfloat16
    assert (folder / ".fastpref").is_file()  # its lock
    names = {path.suffix for path in folder.rglob("[!.]*") if path.is_file()}
    assert names == {".safetensors", ".parquet", ".json", ".jsonl"}  # nothing pickled, no .tmp left
    mark = dataset.fingerprint
    assert [mark[k] for k in ("num_frames", "height", "width", "fps")] == [4, 8, 8, 4]
    assert mark["family"] == "fastpref.models.toy" and mark["dtype"] == "bfloat16"
    counts = json.loads((folder / "counts.json").read_text())
    noted = {"cut_prompts": 0, "slower": 0, "resized": 20, "cropped": 0, "composited": 0}
    first = {"resized": "metadata.jsonl line 1, chosen: 0_w.mp4 (12x12 to 8x8)"}
    assert counts == {
        **{"records": 10, "ties": 0, "pairs": 10, "already_encoded": 0, "bad": {}},
        **{"notes": noted, "first": first},
    }
    assert (folder / "bad_rows.jsonl").read_text() == ""


def test_the_index_keeps_scores_weights_and_negative_prompts(pairs, tmp_path):
    data = shutil.copytree(pairs, tmp_path / "data")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    extra = {
        "score_chosen": 0.75,
        "score_rejected": 0.5,
        "weight": 3.0,
        "negative_prompt": "blurry",
    }
    (data / "metadata.jsonl").write_text(json.dumps({**lines[0], **extra}) + "\n")
    dataset = encoded(data, tmp_path / "set")
    assert dataset.weights == [3.0] and dataset[0].weight == 3.0
    row = pq.read_table(tmp_path / "set" / "index.parquet").to_pylist()[0]
    assert {key: row[key] for key in extra} == extra and row["where"] == "metadata.jsonl line 1"


def test_pair_ids_depend_on_content_alone(pairs, tmp_path):
    """Other file names, another order of rows, other options: the same pairs have the same ids."""
    first = encoded(pairs, tmp_path / "first")
    data = tmp_path / "renamed"
    data.mkdir()
    rows = read_rows(pairs)
    random.Random(0).shuffle(rows)
    lines = ["prompt,chosen,rejected"]
    for i, row in enumerate(rows):
        shutil.copy(row.chosen, data / f"good-{i}.mp4")
        shutil.copy(row.rejected, data / f"bad-{i}.mp4")
        lines.append(f'"{row.prompt}",good-{i}.mp4,bad-{i}.mp4')
    (data / "metadata.csv").write_text("\n".join(lines))
    second = encoded(data, tmp_path / "second", num_frames=2)
    assert second.pair_ids == first.pair_ids and second.prompts == first.prompts
    assert len(set(first.pair_ids)) == 10


def test_content_id():
    a, b = b"a" * 64, b"b" * 64
    ids = {content_id(p, d) for p in ("x", "y", "") for d in ((a, b), (b, a), (a, a))}
    assert len(ids) == 9 and all(0 <= i < 2**63 for i in ids)
    assert content_id("x", (a, b)) == CONTENT_ID  # fixed for good: draws and caches hang on it


CONTENT_ID = 7701886557308314318


def test_nothing_depends_on_the_number_of_workers_or_the_batch(pairs, tmp_path):
    encoded(pairs, tmp_path / "one", num_workers=0, batch_size=1)
    encoded(pairs, tmp_path / "two", num_workers=3, batch_size=4)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_kill_and_resume_redoes_nothing(pairs, slow, tmp_path):
    """kill -9 in the middle; the second call encodes exactly what is missing, to the same bytes."""
    folder = tmp_path / "set"
    call = "import sys, fastpref.pairs.encode as e; e.encode(*sys.argv[1:], batch_size=1)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SLOW_SECONDS": "0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", call, "house.slow", str(BASE), str(pairs), str(folder)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.rglob("pairs/*/*.safetensors"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = {p: p.stat().st_mtime_ns for p in folder.rglob("pairs/*/*.safetensors")}
    assert 4 <= len(stored) < 10
    with pytest.raises(ValueError, match="if its encoding was interrupted, run the same command"):
        PairDataset(folder)
    slow.write_text("")
    encode("house.slow", str(BASE), pairs, folder, progress=False)
    assert len(slow.read_text().split()) == 2 * (10 - len(stored))
    assert all(path.stat().st_mtime_ns == when for path, when in stored.items())
    assert json.loads((folder / "counts.json").read_text())["already_encoded"] == len(stored)
    encode("house.slow", str(BASE), pairs, tmp_path / "unbroken", progress=False)
    assert content(folder) == content(tmp_path / "unbroken")


def test_a_damaged_pair_is_encoded_again(pairs, slow, tmp_path):
    folder = encode("house.slow", str(BASE), pairs, tmp_path / "set", progress=False)
    before = content(folder)
    path = pair_file(folder, PairDataset(folder).pair_ids[2])
    path.write_bytes(path.read_bytes()[:-1])
    slow.write_text("")
    encode("house.slow", str(BASE), pairs, folder, progress=False)
    assert len(slow.read_text().split()) == 2 and content(folder) == before


def test_media_away_for_a_while_cost_nothing(pairs, tmp_path):
    """Without its media every row of a finished set is bad; with them back it goes on as it was."""
    data = shutil.copytree(pairs, tmp_path / "data")
    encoded(data, tmp_path / "set")
    before = content(tmp_path / "set")
    for path in data.glob("*.mp4"):
        path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match="no usable pair, 10 bad rows"):
        encoded(data, tmp_path / "set")
    for path in tmp_path.glob("*.mp4"):
        path.rename(data / path.name)
    encoded(data, tmp_path / "set")
    assert content(tmp_path / "set") == before


def test_ranked_candidates_are_encoded_once(pairs, slow, tmp_path):
    names = [f"{i}_w.mp4" for i in range(4)]
    path = shutil.copytree(pairs, tmp_path / "data") / "ranked.jsonl"
    path.write_text(json.dumps({"prompt": "x", "candidates": names}))
    encode("house.slow", str(BASE), path, tmp_path / "all", progress=False)
    assert len(PairDataset(tmp_path / "all")) == 6 and len(slow.read_text().split()) == 4
    encode("house.slow", str(BASE), path, tmp_path / "set", ranked="best_worst", progress=False)
    dataset = PairDataset(tmp_path / "set")
    assert len(dataset) == 1 and dataset.pair_ids[0] in PairDataset(tmp_path / "all").pair_ids


def test_images_are_clips_of_one_frame(tmp_path):
    from PIL import Image

    (tmp_path / "data").mkdir()
    pictures = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    for name, picture in zip("ab", pictures, strict=True):
        Image.fromarray(picture.numpy()).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "metadata.csv").write_text("prompt,chosen,rejected\nx,a.png,b.png\n")
    pair = encoded(tmp_path / "data", tmp_path / "set")[0]
    assert pair.latents_w.shape == (3, 1, 8, 12)
    assert torch.equal(toy.decode(None, pair.latents_l)[0], pictures[1])


def test_families_are_modules(slow):
    assert family("toy") is toy
    assert family("house.slow").__name__ == "house.slow"
    for name in ("nothing", "house.nothing", "no.where"):
        with pytest.raises(ValueError, match=f"family: expected one of .*toy.* got '{name}'"):
            family(name)
    with pytest.raises(ValueError, match=r"family json.decoder: json.decoder lacks LORA_TARGETS"):
        family("json.decoder")
    (Path(sys.modules["house"].__file__).parent / "needy.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match="needs the package no_such_package; install it"):
        family("house.needy")
