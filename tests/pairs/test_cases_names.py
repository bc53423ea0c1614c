"""Names of media as people have them, after public reports: renpy#2327 and owncloud#31544 (another
composition), transformers#46237 (links of the hub's cache).
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from metadata_files import LINES, one_bad

from fastpref.pairs.rows import BadRow, Rows, read_rows

NAME = "Fête/Ångström 한.mp4"


def put(root: Path, name: str, holds: str = "x") -> Path:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(holds)
    return path


def named(folder: Path, name: str) -> Path | BadRow:
    """What a row with this name of its chosen clip finds."""
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "chosen": name}))
    (row,) = Rows(folder)
    return row if isinstance(row, BadRow) else row.chosen


@pytest.mark.parametrize("on_disk, said", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_compositions_of_a_name(on_disk, said, folder):
    path = put(folder, unicodedata.normalize(on_disk, NAME))
    assert named(folder, unicodedata.normalize(said, NAME)) == path.resolve()


def test_of_two_compositions_the_exact_one_wins(folder):
    paths = {form: put(folder, unicodedata.normalize(form, "é.mp4")) for form in ("NFC", "NFD")}
    assert len(list(folder.glob("*.mp4"))) == 4
    for form, path in paths.items():
        assert named(folder, unicodedata.normalize(form, "é.mp4")) == path.resolve()


def test_of_two_other_compositions_none_is_picked(folder):
    for name in ("é" + "e\u0301.mp4", "e\u0301" + "é.mp4"):
        put(folder, name)
    bad = named(folder, "éé.mp4")
    assert bad.kind == "missing_file" and "; expected one of 'e\\u0301\\xe9.mp4' and " in str(bad)


@pytest.mark.parametrize("said", ["clips/A.MP4", "clips\\a.mp4", "Clips/a.mp4 ", "clips/ａ.mp4"])
def test_names_that_are_almost_right(said, folder):
    """Another file than the one that is named is never read, but said."""
    put(folder, "clips/a.mp4")
    bad = named(folder, said)
    assert bad.kind == "missing_file" and "; expected 'clips/a.mp4', almost the same name" in str(
        bad
    )


def test_nothing_outside_the_folder_is_listed(folder, tmp_path):
    put(tmp_path, "outside/secret.mp4")
    (folder / "link").symlink_to("../outside")
    assert named(folder, "link/SECRET.mp4").kind == "outside"
    assert "expected" not in str(named(folder, "LINK/secret.mp4"))


def test_a_metadata_files_own_name_is_shown(folder):
    path = folder / "\x1b[2J.jsonl"
    path.write_text(json.dumps({**LINES[0], "prompt": ""}))
    assert str(one_bad(path)).startswith(r"\x1b[2J.jsonl line 1, prompt: is empty")


def test_a_folder_is_listed_once(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "listdir", lambda path, of=os.listdir: calls.append(path) or of(path))
    words = [json.dumps({**LINES[0], "chosen": f"{i}.mp4"}) for i in range(50)]
    (folder / "metadata.jsonl").write_text("\n".join(words))
    assert len([row for row in Rows(folder) if row.kind == "missing_file"]) == 50
    assert len(calls) == 1


# The hub's cache: names that are links to what they hold.


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot as huggingface_hub keeps it: a.mp4, clips/b.mp4 and metadata.jsonl are links."""
    repo = tmp_path / "anywhere" / "datasets--owner--pairs"
    root = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    (root / "clips").mkdir(parents=True)
    line = {**LINES[0], "rejected": "clips/b.mp4"}
    for name, holds in (("a.mp4", "a"), ("clips/b.mp4", "b"), ("metadata.jsonl", json.dumps(line))):
        blob = repo / "blobs" / f"digest-of-{name.replace('/', '-')}"
        blob.write_text(holds)
        (root / name).symlink_to(os.path.relpath(blob, (root / name).parent))
    return root


def test_a_snapshot_of_the_hub(snapshot, tmp_path):
    for data in (snapshot, snapshot / "metadata.jsonl"):
        (row,) = read_rows(data)
        assert [row.chosen.read_text(), row.rejected.read_text()] == ["a", "b"]
        assert row.chosen.name == "a.mp4"  # what errors name
    (tmp_path / "cache").symlink_to(snapshot.parents[2])
    assert read_rows(tmp_path / "cache" / snapshot.relative_to(snapshot.parents[2]))


def relinked(snapshot: Path, target: Path | str) -> BadRow:
    (snapshot / "a.mp4").unlink()
    (snapshot / "a.mp4").symlink_to(target)
    bad = one_bad(snapshot)
    assert (bad.kind, bad.field) == ("outside", "chosen") and "a link that leaves" in bad.reason
    return bad


def test_links_elsewhere_are_refused(snapshot, tmp_path):
    repo, blobs = snapshot.parents[1], snapshot.parents[1] / "blobs"
    other = repo.with_name("datasets--owner--other") / "blobs" / "digest"
    other.parent.mkdir(parents=True)
    (blobs / "deep").mkdir()
    for file in (other, repo / "refs", tmp_path / "file", blobs / "deep" / "digest"):
        file.write_text("x")
        relinked(snapshot, os.path.relpath(file, snapshot))
    relinked(snapshot, "/etc/hostname")
    (blobs / "chain").symlink_to("digest-of-a.mp4")
    relinked(snapshot, blobs / "chain")
    (blobs / "out").symlink_to(other)
    relinked(snapshot, "../../blobs/out")
    (snapshot.parent / "second").symlink_to("../blobs/digest-of-a.mp4")
    relinked(snapshot, "../second")
    relinked(snapshot, "../../blobs")
    relinked(snapshot, "../../blobs/none")


def test_a_folder_outside_may_not_lead_back(snapshot, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.mp4").symlink_to(snapshot.parents[1] / "blobs" / "digest-of-a.mp4")
    (snapshot / "out").symlink_to(tmp_path / "outside")
    (snapshot / "metadata.jsonl").unlink()
    assert named(snapshot, "out/x.mp4").kind == "outside"


def test_other_folders_are_no_cache(snapshot):
    repo = snapshot.parents[1].rename(snapshot.parents[2] / "my--pairs")
    kinds = [row.kind for row in Rows(repo / "snapshots" / snapshot.name)]
    assert kinds == ["outside"]
