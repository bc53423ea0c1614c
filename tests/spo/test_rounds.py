"""A round's prompts and batches, and its pairs on the disk."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref.spo import rounds
from fastpref.spo.resampler import Rolled, Transition

ROWS = [1, 2, 4, 7, 8]


def transition(step: int, row: int, members: int = 1) -> Transition:
    x = torch.full((members, 2, 1, 2, 2), float(10 * step + row))
    return Transition(step, row, x, torch.stack([x[0] + 1, x[0] - 1]), 0.5)


def rolled() -> Rolled:
    made = [transition(3, 0), transition(4, 1), transition(4, 1, members=2)]
    how = {"judged": 4, "network": 20, "decodes": 8, "scores": 1.5, "seconds": 2.5}
    return Rolled(made, {3: 1, 4: 1}, **how)


def write(folder, number: int, part: int = 0):
    path = rounds.part_file(folder, number, part)
    rounds.write_part(path, "here", [7, 2], rolled())
    return path


def names(folder) -> list[str]:
    return sorted(path.name[6:16] for path in folder.glob("*.safetensors"))


def test_every_prompt_comes_once_an_epoch_in_an_order_of_its_own():
    count = 4 * len(ROWS)
    chosen = [
        each for number in range(10) for each in rounds.prompts_of(number, count // 10, ROWS, 3)
    ]
    orders = [[row for at, row in chosen if at == epoch] for epoch in range(4)]
    assert all(sorted(order) == ROWS for order in orders)
    assert len({tuple(order) for order in orders}) == 4, "shuffled anew"
    assert [epoch for epoch, _ in chosen] == sorted(epoch for epoch, _ in chosen)
    # A round that is longer than an epoch has prompts of several.
    assert rounds.prompts_of(0, count, ROWS, 3) == chosen
    assert rounds.prompts_of(0, count, ROWS, 4) != chosen
    parts = [(e.tolist(), rows) for e, rows in rounds.batches_of(chosen[:5], 2)]
    assert [pair for epochs, rows in parts for pair in zip(epochs, rows, strict=True)] == chosen[:5]
    assert [len(rows) for _, rows in parts] == [2, 2, 1]


def test_a_round_trains_once_on_each_pair_in_an_order_of_its_own():
    made = [transition(step, 0, members=1 + (step > 6)) for step in range(11)]
    orders = []
    for number in range(3):
        updates = rounds.updates_of(made, 3, 2, 0, number)
        batches = [batch for update in updates for batch in update]
        assert [len(update) for update in updates[:-1]] == [2] * (len(updates) - 1)
        assert all(len({len(each.x) for each in batch}) == 1 for batch in batches)
        # 7 pairs share x_t, 4 do not.
        assert sorted(map(len, batches)) == [1, 1, 3, 3, 3]
        orders.append([each.step for batch in batches for each in batch])
        assert sorted(orders[-1]) == list(range(11))
    assert len({tuple(order) for order in orders}) == 3
    assert rounds.updates_of([], 3, 2, 0, 0) == []


def test_a_part_is_read_as_it_was_written(tmp_path):
    read = rounds.read_part(write(tmp_path, 0), "here")
    first = rolled()
    assert [(t.step, t.row, t.gap) for t in read.transitions] == [
        (t.step, [7, 2][t.row], t.gap) for t in first.transitions
    ], "rows are those of all prompts"
    for a, b in zip(read.transitions, first.transitions, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    for name in rounds.COUNTS:
        assert getattr(read, name) == getattr(first, name)


def altered(path, how: str) -> None:
    """Writes a file again with one thing changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["fastpref"])
    if how == "tensor":
        tensors["000000.x"][0, 0, 0, 0, 0] += 1
    elif how == "row":
        said["transitions"][0][1] = 2
    elif how == "count":
        said["counts"]["judged"] += 1
    save_file(tensors, path, {"fastpref": json.dumps(said)})


@pytest.mark.parametrize("how", ["tensor", "row", "count"])
def test_a_part_that_was_changed_is_none(how, tmp_path):
    path = write(tmp_path, 0)
    altered(path, "nothing")
    assert rounds.read_part(path, "here") is not None
    altered(path, how)
    assert rounds.read_part(path, "here") is None


def test_a_part_of_another_place_or_step_is_none(tmp_path):
    path = write(tmp_path, 0)
    assert rounds.read_part(path, "there") is None, "sampled with something else"
    path.rename(rounds.part_file(tmp_path, 1, 0))
    assert rounds.read_part(rounds.part_file(tmp_path, 1, 0), "here") is None
    assert rounds.read_part(path, "here") is None


def test_rounds_that_a_checkpoint_goes_on_from_are_kept(tmp_path):
    for number in range(6):
        write(tmp_path / "rounds", number)
    for step, number in ((10, 1), (20, 3)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"own": {"round": number}}))
    rounds.prune(tmp_path / "rounds", tmp_path, 4)
    assert names(tmp_path / "rounds") == ["000001-000", "000003-000", "000004-000"]


def test_counts_are_of_each_step():
    total = {}
    for _ in range(2):
        rounds.add(total, rolled())
    wanted = {"network": 40, "decodes": 16, "scores": 3.0, "seconds": 5.0, "judged": 8}
    wanted |= {"pairs": 4, "transitions": 6}
    assert total == wanted | {"kept/3": 2, "judged/3": 4, "kept/4": 2, "judged/4": 4}
