"""The simulation of many ranks, at a small size, and what the page on scale says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import paper, scale
from fastpref.pairs import dataset


def test_a_rank_is_measured_and_every_pair_is_in_one_batch(tmp_path, capsys):
    scale.main(["--pairs", "3000", "--ranks", "7", "--batch", "4", "--output", str(tmp_path / "o")])
    said = capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "o").read_text().splitlines())
    assert (row["pairs"], row["ranks"], row["batch"], row["more"]) == (3000, 7, 4, 0)
    assert row["once"] + row["in_no_batch"] == 3000 and row["in_no_batch"] <= 3 * 3
    assert row["once"] % 4 == 0 and f"{row['once']:,}\n" in said
    assert row["end_gb"] - row["start_gb"] < 0.02 and row["open_s"] > 0


def test_what_is_covered_twice_or_never_is_seen(tmp_path, monkeypatch):
    data = dataset.PairDataset(scale.make(tmp_path, 100))
    assert scale.coverage(data, 1, 3) == {"once": 100, "in_no_batch": 0, "more": 0}
    real = scale.every

    def wrong(parts, skip, step):
        return real(parts, max(skip, 1), step)

    monkeypatch.setattr(scale, "every", wrong)
    assert scale.coverage(data, 1, 3) == {"once": 33, "in_no_batch": 34, "more": 33}


def test_what_is_simulated_is_a_set_as_encode_writes_it(tmp_path):
    """Changed, it is refused; its pairs alone are not there."""
    data = dataset.PairDataset(scale.make(tmp_path, 50))
    assert np.array(data.pair_ids).tolist() == sorted(data.pair_ids) and len(data) == 50
    with pytest.raises(ValueError, match="cannot be read"):
        data[0]
    (tmp_path / "fingerprint.json").write_text('{"family": "toy", "model": "x"}')
    with pytest.raises(ValueError, match="was changed after"):
        dataset.PairDataset(tmp_path)


def test_the_page_on_scale_says_what_the_script_predicts():
    page = (Path(paper.__file__).parent / "SCALE.md").read_text()
    said = paper.table()
    assert said in page
    small, full, *_ = paper.cases()
    assert small.summed == 4 * 47_185_920 and full.gathered == 3 * full.summed  # 8 x 64 x 3072 x 30
    assert small.moved(8) == pytest.approx(2 * 7 / 8 * small.summed / 450e9)
    assert small.moved(16) == pytest.approx(2 * 15 / 16 * small.summed / 50e9)
    assert full.moved(16) == pytest.approx(15 / 16 * 4 * full.summed / 50e9)
    assert f"{small.seconds:.3g} (measured)" in said and small.seconds == pytest.approx(
        4.71, abs=1e-2
    )
