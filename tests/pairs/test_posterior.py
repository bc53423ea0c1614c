"""Samples of a posterior: functions of seed, pair and member, whatever else an encoding does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import BASE, content, encoded

from fastpref import oracle
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode


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
    del mark["digests"]
    path.write_text(json.dumps(mark))  # as sets were before there was a choice
    draw(pairs, tmp_path / "old", posterior="mode", seed=None)
    with pytest.raises(ValueError, match=r"another posterior \(mode there, sample here\), seed \("):
        draw(pairs, tmp_path / "old")
