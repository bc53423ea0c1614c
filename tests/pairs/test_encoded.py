"""The encoded set on disk: what it belongs to, folders that are refused, one writer at a time."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from commands import BASE, content, encoded

from fastpref.files import TEMPORARY, identity, locked, mark
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.rows import read_rows

OTHER = BASE / "transformer"  # than BASE


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


def test_what_a_killed_encoding_left_is_removed(pairs, tmp_path):
    folder = tmp_path / "set"
    encoded(pairs, folder)
    before = content(folder)
    part = next(folder.glob("pairs/*"))
    for path in (folder / f"{TEMPORARY}1.index.parquet.tmp", part / f"{TEMPORARY}2.x.tmp"):
        path.touch()
    (part / "notes.tmp").write_text("a user's")
    encoded(pairs, folder)
    assert content(folder) == before | {str((part / "notes.tmp").relative_to(folder)): b"a user's"}
