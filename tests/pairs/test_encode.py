"""Encoding: what is stored, samples of a posterior, resuming after kill -9, folders refused."""

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
from commands import BASE, encoded

from fastpref import oracle
from fastpref.files import identity, locked, mark
from fastpref.models import family, toy
from fastpref.pairs import media
from fastpref.pairs.dataset import PairDataset, pair_file
from fastpref.pairs.encode import encode
from fastpref.pairs.prepare import content_id
from fastpref.pairs.rows import read_rows

OTHER = BASE / "transformer"  # than BASE
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


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an encoded set."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "counts.json"
    }


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
    assert counts == {"records": 10, "ties": 0, "pairs": 10, "already_encoded": 0, "bad": {}}
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


def draw(data: Path, output_dir: Path, **options) -> PairDataset:
    """An encoded set of samples, seed 5."""
    options = {"posterior": "sample", "seed": 5} | options
    return PairDataset(encode("house.drawn", BASE, data, output_dir, progress=False, **options))


def test_a_sample_is_a_function_of_seed_pair_and_member(pairs, slow, tmp_path):
    drawn, modes = draw(pairs, tmp_path / "drawn"), encoded(pairs, tmp_path / "modes")
    assert drawn.pair_ids == modes.pair_ids
    seen = []
    for sampled, mode in zip(drawn, modes, strict=True):
        ids, index = torch.tensor([sampled.pair_id] * 2), torch.arange(2)
        means = torch.stack([mode.latents_w, mode.latents_l])
        eps = oracle.normal(5, ids, index, means[0].numel(), domain=oracle.POSTERIOR)
        expected = means + eps.view_as(means)
        assert torch.equal(torch.stack([sampled.latents_w, sampled.latents_l]), expected)
        assert torch.equal(sampled.cond["text"], mode.cond["text"])
        seen += list(eps)
    correlation = torch.corrcoef(torch.stack(seen))
    assert (correlation - torch.eye(20)).abs().max() < 0.2  # all pairs and both members differ
    other, unnamed = draw(pairs, tmp_path / "other", seed=6), draw(pairs, tmp_path / "0", seed=None)
    zero = draw(pairs, tmp_path / "zero", seed=0)
    for i in range(10):
        assert (other[i].latents_w - drawn[i].latents_w).std() > 1
        assert torch.equal(unnamed[i].latents_l, zero[i].latents_l)
    same_mode = draw(pairs, tmp_path / "mode", posterior="mode", seed=None)
    assert torch.equal(same_mode[3].latents_w, modes[3].latents_w)


def test_samples_are_the_same_however_they_are_encoded(pairs, slow, tmp_path):
    """Again, resumed, in another order of rows, in other batches: the same bytes."""
    draw(pairs, tmp_path / "set")
    before = content(tmp_path / "set")
    draw(pairs, tmp_path / "again", num_workers=0, batch_size=3)
    assert content(tmp_path / "again") == before
    for path in [*sorted(tmp_path.glob("set/pairs/*/*"))[::3], tmp_path / "set" / "index.parquet"]:
        path.unlink()
    draw(pairs, tmp_path / "set")
    assert content(tmp_path / "set") == before
    data = shutil.copytree(pairs, tmp_path / "data")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[::-1]))
    draw(data, tmp_path / "reversed")
    turned = content(tmp_path / "reversed")
    assert all(turned[name] == before[name] for name in before if name.startswith("pairs"))


def test_ranked_candidates_have_a_sample_in_each_pair(pairs, slow, tmp_path):
    path = shutil.copytree(pairs, tmp_path / "data") / "ranked.jsonl"
    path.write_text(json.dumps({"prompt": "x", "candidates": [f"{i}_w.mp4" for i in range(3)]}))
    members = [x for pair in draw(path, tmp_path / "set") for x in (pair.latents_w, pair.latents_l)]
    modes = [
        x for pair in encoded(path, tmp_path / "modes") for x in (pair.latents_w, pair.latents_l)
    ]
    eps = torch.stack([a - b for a, b in zip(members, modes, strict=True)]).flatten(1)
    assert len({tuple(x.flatten().tolist()) for x in modes}) == 3
    assert (torch.corrcoef(eps) - torch.eye(6)).abs().max() < 0.2


def test_the_posterior_belongs_to_the_fingerprint(pairs, slow, tmp_path):
    draw(pairs, tmp_path / "set")
    before = content(tmp_path / "set")
    with pytest.raises(ValueError, match=r"another seed \(5 there, 6 here\); choose"):
        draw(pairs, tmp_path / "set", seed=6)
    with pytest.raises(ValueError, match=r"another posterior \(sample there, mode here\), seed \("):
        draw(pairs, tmp_path / "set", posterior="mode", seed=None)
    assert content(tmp_path / "set") == before

    draw(pairs, tmp_path / "old", posterior="mode", seed=None)
    path = tmp_path / "old" / "fingerprint.json"
    mark = json.loads(path.read_text())
    assert mark.pop("posterior") == "mode" and "seed" not in mark
    path.write_text(json.dumps(mark))  # as sets were before there was a choice
    draw(pairs, tmp_path / "old", posterior="mode", seed=None)
    with pytest.raises(ValueError, match=r"another posterior \(mode there, sample here\), seed \("):
        draw(pairs, tmp_path / "old")


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


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_frames": 4}, "num_frames (None there, 4 here)"),
        ({"height": 8, "width": 4}, "height (None there, 8 here), width (None there, 4 here)"),
        ({"fps": 4.0}, "fps (None there, 4.0 here)"),
        ({"dtype": "float16"}, "dtype (float32 there, float16 here)"),
        ({"model": OTHER}, f"model ({identity(BASE)} there, {identity(OTHER)} here)"),
        ({"family": "house.slow"}, "family (fastpref.models.toy there, house.slow here)"),
    ],
)
def test_a_folder_encoded_otherwise_is_refused(change, named, pairs, slow, tmp_path):
    options = {"family": "toy", "model": BASE, "data": pairs, "output_dir": tmp_path / "set"}
    encode(**options, progress=False)
    before = content(tmp_path / "set")
    with pytest.raises(ValueError) as error:
        encode(**{**options, **change}, progress=False)
    assert f"encoded with another {named}; choose another output_dir" in str(error.value)
    assert content(tmp_path / "set") == before


def test_other_data_or_weights_are_noticed(pairs, tmp_path):
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    weights = model / "vae" / "weights.safetensors"
    weights.write_bytes(bytes(64))
    encode("toy", model, pairs, tmp_path / "set", progress=False)
    encode("toy", model, pairs, tmp_path / "set", progress=False)
    (model / "README.md").write_text("no weights")
    encode("toy", model, pairs, tmp_path / "set", progress=False)
    weights.write_bytes(bytes(63) + b"\1")
    with pytest.raises(ValueError, match="encoded with another model"):
        encode("toy", model, pairs, tmp_path / "set", progress=False)
    weights.write_bytes(bytes(64))
    data = shutil.copytree(pairs, tmp_path / "data")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="the data changed since it was encoded; delete that"):
        encode("toy", model, data, tmp_path / "set", progress=False)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_another_split_or_other_rows_of_a_dataset_are_noticed(kind, pairs, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": row.prompt, "chosen": row.chosen.read_bytes(), "rejected": b"no media"}
        | ({"rejected": row.rejected.read_bytes()} if i < 3 else {})
        for i, row in enumerate(read_rows(pairs)[:4])
    ]
    data = tmp_path / "data"

    def save(rows: list[dict]) -> None:
        shutil.rmtree(data, ignore_errors=True)
        stored = datasets.Dataset.from_list(rows)
        if kind == "saved":
            datasets.DatasetDict({"train": stored, "test": stored.select([0])}).save_to_disk(data)
            return
        for part, split in (("train", stored), ("test", stored.select([0]))):
            split.to_parquet(data / f"{part}-00000-of-00001.parquet")

    save(rows)
    for _ in range(2):
        assert len(encoded(data, tmp_path / "set")) == 3
    before = content(tmp_path / "set")
    with pytest.raises(ValueError, match=r"another (split|data_version) \(.* there, .* here\)"):
        encoded(data, tmp_path / "set", split="test")
    if kind == "saved":
        save(rows[:2])
        with pytest.raises(ValueError, match=r"another data_version \("):
            encoded(data, tmp_path / "set")
    assert content(tmp_path / "set") == before


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


def test_folders_of_something_else_are_refused(pairs, tmp_path):
    data = shutil.copytree(pairs, tmp_path / "data")
    before = content(data)
    (tmp_path / "link").symlink_to(data)
    for name in ("data", "link"):
        with pytest.raises(ValueError, match=f"{name}: is the data folder; choose another output_"):
            encoded(data, tmp_path / name)
    assert content(data) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(ValueError, match=r"holds something else \(chapter.txt\): choose another"):
        encoded(data, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    with pytest.raises(ValueError, match=r"metadata.jsonl: is a file; choose another output_dir"):
        encoded(data, data / "metadata.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".fastpref").touch()
    assert len(encoded(data, tmp_path / "empty")) == 10


@pytest.mark.parametrize("text", [b"{", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 100000])
def test_damaged_fingerprints_are_named(text, pairs, tmp_path):
    folder = tmp_path / "set"
    encoded(pairs, folder)
    (folder / "fingerprint.json").write_bytes(text)
    for use in (lambda: encoded(pairs, folder), lambda: PairDataset(folder)):
        with pytest.raises(ValueError, match=r"fingerprint.json: is damaged, expected the JSON"):
            use()


def test_one_encoding_at_a_time(pairs, tmp_path):
    """Two that start together would mix their files: nothing is bound before the first pair."""
    folder = tmp_path / "set"
    with (
        locked(mark(folder, "encode")),
        pytest.raises(ValueError, match="another fastpref is writing there"),
    ):
        encoded(pairs, folder, dtype="bfloat16")
    assert [path.name for path in folder.iterdir()] == [".fastpref"]
    assert len(encoded(pairs, folder)) == 10


def test_writers_at_once_share_no_file(tmp_path):
    """Two processes write one path over and over: what stands is always one of them, whole."""
    code = "import sys; from fastpref.files import write_atomic; from pathlib import Path\n"
    code += "for _ in range(200): write_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 100000)"
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), x]) for x in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_bytes() in (b"a" * 100000, b"b" * 100000)
    assert list(tmp_path.iterdir()) == [path]


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
