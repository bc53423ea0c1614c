"""Which pairs train, and how much each counts."""

from collections import Counter

import pytest
from commands import encoded, write_pairs

from fastpref.pairs.dataset import PairDataset
from fastpref.spo import labels


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return encoded(write_pairs(folder / "media", count=48), folder / "set").folder


def test_an_example_counts_by_its_prompt(pairs):
    data = PairDataset(pairs)
    rows = [*range(0, 48, 2), 1]
    weights = labels.example_weights(data, rows)
    counts = Counter(data.prompts[i] for i in rows)
    assert len(set(counts.values())) > 1 and len(weights) == len(rows)
    assert sum(weights.values()) == pytest.approx(len(rows))
    product = {i: weights[data.pair_ids[i]] * counts[data.prompts[i]] for i in rows}
    assert max(product.values()) == pytest.approx(min(product.values()))
    data.weights = [0.0] * 48
    with pytest.raises(ValueError, match="every pair has weight 0"):
        labels.example_weights(data, rows)


def test_prompts_are_held_out_whole_and_whatever_the_seed(pairs):
    data = PairDataset(pairs)
    trained, held = labels.split(data, 0.3)
    assert sorted(trained + held) == list(range(48))
    prompts = [{data.prompts[i] for i in rows} for rows in (trained, held)]
    assert prompts[0].isdisjoint(prompts[1]) and all(prompts)
    assert labels.split(data, 0.0) == (list(range(48)), [])
    more = labels.split(data, 0.6)[1]
    assert set(held) < set(more)
    with pytest.raises(ValueError, match="are held out; lower it, or add prompts"):
        labels.split(data, 0.9999)
