"""Pairs without a winner: kept on request, in every layout, and refused by what cannot use them."""

import json

import pyarrow.parquet as pq
import pytest
from commands import BASE, arguments, content, encoded, fails, options, write_pairs

from fastpref.cli import main
from fastpref.pairs.rows import Rows

LAYOUTS = {
    "chosen": [
        {"prompt": "x", "chosen": "a.mp4", "rejected": "b.mp4", "score_chosen": s, **low}
        for s, low in ((2, {"score_rejected": 1}), (1, {"score_rejected": 1}))
    ],
    "video": [
        {"prompt": "x", "video_a": "a.mp4", "video_b": "b.mp4", "winner": winner}
        for winner in ("a", "tie")
    ],
    "pick-a-pic": [
        {"caption": "x", "jpg_0": "a.mp4", "jpg_1": "b.mp4", "label_0": label} for label in (1, 0.5)
    ],
    "candidates": [
        {"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": scores}
        for scores in ([1, 0], [3, 3])
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_are_kept_as_such_in_every_layout(layout, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [json.dumps(row) for row in LAYOUTS[layout]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    dropped = Rows(tmp_path)
    assert [row.tie for row in dropped] == [False] and dropped.ties == 1
    kept = Rows(tmp_path, ties="keep")
    found = [(row.tie, row.chosen.name, row.rejected.name) for row in kept]
    assert found == [(False, "a.mp4", "b.mp4"), (True, "a.mp4", "b.mp4")] and kept.ties == 0
    with pytest.raises(ValueError, match="ties: expected drop or keep, got 'some'"):
        Rows(tmp_path, ties="some")


@pytest.fixture
def media(tmp_path):
    """Four pairs, the second and the last without a winner."""
    folder = write_pairs(tmp_path / "media", count=4)
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"score_chosen": 1.0, "score_rejected": float(i % 2)}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_set_says_which_of_its_pairs_are_ties(media, tmp_path):
    kept = encoded(media, tmp_path / "kept", ties="keep")
    dropped = encoded(media, tmp_path / "dropped")
    assert len(kept) == 4 and sum(kept.ties) == 2 and kept.fingerprint["ties"] == "keep"
    assert len(dropped) == 2 and dropped.ties == [False, False]
    assert "ties" not in dropped.fingerprint
    assert "tie" not in pq.read_table(tmp_path / "dropped" / "index.parquet").column_names
    with_winner = {i for i, tie in zip(kept.pair_ids, kept.ties, strict=True) if not tie}
    assert with_winner == set(dropped.pair_ids)
    before = content(kept.folder)
    encoded(media, tmp_path / "kept", ties="keep")
    assert content(kept.folder) == before
    with pytest.raises(ValueError, match=r"encoded with another ties \(keep there, None here\)"):
        encoded(media, tmp_path / "kept")


def test_what_trains_on_winners_refuses_ties(media, tmp_path, capsys):
    data = tmp_path / "kept"
    base = {"family": "toy", "model": BASE, "data": media, "output_dir": data}
    assert fails(capsys, "encode", *arguments(base), "--ties", "some")
    assert main(["encode", *arguments(base), "--ties", "keep"]) == 0
    capsys.readouterr()
    del base["output_dir"]
    values = options(data, tmp_path / "run")
    swept = {**values, "output_dir": tmp_path / "sweep", "objectives": "dpo", "betas": "10"}
    del swept["beta"]
    for name, flags in {
        "train": values,
        "sweep": swept,
        "cache-reference": {**values, "reference": "cached"},
        "eval": base | {"data": data, "tuned": tmp_path / "none"},
    }.items():
        said = fails(capsys, name, *arguments(flags))
        assert "2 of its pairs are ties, which fastpref spm alone trains on" in said, (name, said)
