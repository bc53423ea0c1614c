"""The pair dataset: what is read back, and batches of equal shapes in an exact order."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import BASE, write_pairs
from safetensors.torch import save

from bench.overhead import Made, epoch_end, loaders
from fastpref.pairs import order
from fastpref.pairs.dataset import (
    Pair,
    PairDataset,
    batches,
    collate,
    read_tensors,
)
from fastpref.pairs.encode import encode
from fastpref.pairs.order import epoch_batches, epoch_order, left_out
from fastpref.pairs.shards import pair_file


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return encode("toy", BASE, write_pairs(root / "pairs"), root / "encoded", progress=False)


class Shaped:
    """Pairs made up on the spot: shape i of `sizes` is the width of pair i."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.shapes = [str(size) for size in sizes]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Pair:
        latents = torch.full((1, 1, 1, self.sizes[i]), float(i))
        return Pair(latents, -latents, {"text": torch.full((2,), float(i))}, 1.0 + i, i, f"p{i}")


def first(iterator, count):
    return list(itertools.islice(iterator, count))


def ids(taken):
    return [(epoch, batch.pair_id.tolist()) for epoch, batch in taken]


def test_pairs_come_back(encoded):
    dataset = PairDataset(encoded)
    assert len(dataset) == 10 and dataset.pair_ids == sorted(dataset.pair_ids)
    assert all(0 <= i < 2**63 for i in dataset.pair_ids)
    pair = dataset[3]
    assert pair.pair_id == dataset.pair_ids[3] and pair.prompt == dataset.prompts[3]
    assert pair.latents_w.shape == pair.latents_l.shape == (3, 8, 12, 12)
    assert not torch.equal(pair.latents_w, pair.latents_l)
    assert set(pair.cond) == set(dataset.empty_cond) == {"text"}
    assert pair.weight == 1.0
    assert dataset.empty_cond["text"].shape == pair.cond["text"].shape
    assert dataset.empty_cond["text"].abs().max() == 0  # the toy family's empty prompt


def test_collate_puts_winners_first(encoded):
    dataset = PairDataset(encoded)
    pairs = [dataset[i] for i in (4, 1, 7)]
    batch = collate(pairs)
    assert batch.latents.shape == (6, 3, 8, 12, 12) and batch.cond["text"].shape[0] == 6
    for i, pair in enumerate(pairs):
        assert torch.equal(batch.latents[i], pair.latents_w)
        assert torch.equal(batch.latents[3 + i], pair.latents_l)
        assert torch.equal(batch.cond["text"][i], pair.cond["text"])
        assert torch.equal(batch.cond["text"][3 + i], pair.cond["text"])
    assert batch.weight.dtype == torch.float64 and batch.pair_id.dtype == torch.int64
    assert batch.pair_id.tolist() == [p.pair_id for p in pairs]
    assert batch.prompts == [p.prompt for p in pairs]


def test_collate_refuses_unequal_shapes():
    data = Shaped([4, 4, 5])
    with pytest.raises(ValueError, match=r"latents_l of pair 2 expected \[1, 1, 1, 4\] .* pair 0"):
        collate([data[0], data[1], data[2]])
    bare = data[1]._replace(cond={})
    with pytest.raises(ValueError, match=r"cond.text of pair 1 .* got nothing"):
        collate([data[0], bare])


def test_to_casts_what_the_network_sees():
    pair = Shaped([4])[0]
    pair.cond["mask"] = torch.tensor([1, 0])
    batch = collate([pair]).to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.cond["text"].dtype == torch.bfloat16
    assert batch.cond["mask"].dtype == torch.int64
    assert batch.weight.dtype == torch.float64 and batch.pair_id.dtype == torch.int64
    assert collate([pair]).to("cpu").latents.dtype == torch.float32


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    orders = {(s, e): list(epoch_order(50, s, e)) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert list(epoch_order(50, 1, 2)) == orders[1, 2]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's generator moves
    # Fixed for good: a run resumed with a newer version goes on in the same order.
    assert list(epoch_order(8, 0, 0)) == ORDER
    long = list(epoch_order(10_000, 0, 0))
    assert sorted(long) == list(range(10_000))
    assert (long[:4], long[-2:]) == ([693, 1937, 8657, 7551], [8434, 6591])


ORDER = [5, 0, 7, 2, 6, 4, 3, 1]


def test_the_order_is_the_same_in_another_process():
    code = "from fastpref.pairs.order import epoch_order; print([*epoch_order(40, 7, 3)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == list(epoch_order(40, 7, 3))


def test_each_epoch_has_each_pair_once():
    taken = first(batches(Shaped([4] * 10), 3, seed=0), 9)
    assert [epoch for epoch, _ in taken] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        rows = [i for e, b in taken if e == epoch for i in b.pair_id.tolist()]
        assert len(set(rows)) == 9  # one of ten is left out, another one in each epoch
        assert rows == list(epoch_order(10, 0, epoch))[:9]
    other = first(batches(Shaped([4] * 10), 3, seed=1), 9)
    assert ids(other) != ids(taken)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 17])
def test_resume_is_counting(num_workers, start):
    data = Shaped([4, 5] * 8 + [6])  # 2 shapes of 8 pairs fill 2 batches of 3 each; one of 1 none
    assert left_out(data.shapes, 3).startswith("1 of 17 pairs never train: ")
    assert left_out(data.shapes, 1) is None
    whole = first(batches(data, 3, seed=5), 24)
    resumed = first(batches(data, 3, seed=5, start=start, num_workers=num_workers), 24 - start)
    assert ids(resumed) == ids(whole)[start:]
    for (_, a), (_, b) in zip(resumed, whole[start:], strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.weight, b.weight)


def made_shapes(n, kinds):
    return [f"s{(i * i + 3 * i) % 7 % kinds}" for i in range(n)]


@pytest.mark.parametrize(
    "n, kinds, size, rest, wanted",
    [
        (10, 1, 3, False, "82a5c941aa37f038"),
        (12, 7, 5, True, "1ec856fb6d969e32"),
        (17, 3, 2, True, "06b2d93975d5189b"),
        (4096, 2, 1, True, "507a4ab62ad07891"),
        (5000, 1, 1, False, "4d093d6eef1399e9"),
        (9001, 3, 4, True, "35b7fbf918b5b87b"),
        (70_000, 7, 8, True, "5801f7e67f6583e0"),
    ],
)
def test_batches_never_change(n, kinds, size, rest, wanted, monkeypatch):
    """Written down once, of a loop over single rows: cached references and resumed runs hang on
    them. However large the parts are in which they are planned.
    """
    for part in (order.PART, 777):
        monkeypatch.setattr(order, "PART", part)
        shapes = made_shapes(n, kinds)
        found = [list(epoch_batches(shapes, size, 5, epoch, rest=rest)) for epoch in (0, 3)]
        digest = hashlib.blake2b(json.dumps(found).encode(), digest_size=8)
        assert digest.hexdigest() == wanted


@pytest.mark.parametrize("rest", [False, True])
def test_some_of_an_epochs_batches(rest, monkeypatch):
    monkeypatch.setattr(order, "PART", 16)
    every = list(epoch_batches(made_shapes(100, 3), 3, 1, 2, rest=rest))
    for skip in (0, 1, 7, 40, 1000):
        for step in (1, 2, 5, 1000):
            some = epoch_batches(made_shapes(100, 3), 3, 1, 2, rest=rest, skip=skip, step=step)
            assert list(some) == every[skip::step]


@pytest.mark.parametrize("start", [0, 3, 17, 100])
@pytest.mark.parametrize("shares", [1, 2, 3, 4, 7, 16])
def test_shares_interleaved_are_the_stream_of_one_process(shares, start):
    """Across epochs of 7 batches, also where an epoch has none for some share; from any start."""
    data = Shaped([4, 5, 4] * 6)
    whole = first(batches(data, 2, seed=5), start + 4 * 16)[start:]
    streams = [
        batches(data, 2, seed=5, start=start, share=share, shares=shares, num_workers=share % 2)
        for share in range(shares)
    ]
    found = [next(streams[number % shares]) for number in range(len(whole))]
    assert ids(found) == ids(whole) and len({epoch for epoch, _ in whole}) > 6


def test_batches_are_of_one_shape():
    data = Shaped([4] * 9 + [5] * 6 + [6] * 4)
    for epoch in range(3):
        plan = list(epoch_batches(data.shapes, 2, 3, epoch))
        assert len(plan) == 4 + 3 + 2
        assert all(data.sizes[a] == data.sizes[b] for a, b in plan)
        assert len({i for rows in plan for i in rows}) == 18
        widths = [data.sizes[a] for a, _ in plan]
        assert widths != sorted(widths)  # shapes mix within an epoch


@pytest.mark.parametrize(
    "sizes, said",
    [
        ([4, 4], "expected at least train_batch_size = 3 pairs, got 2; lower train_batch_size"),
        ([4, 4, 5, 5], r"train_batch_size = 3 pairs of one shape \(2 shapes\), got 2"),
        ([], "expected at least train_batch_size = 3 pairs, got 0"),
    ],
)
def test_fewer_pairs_than_a_batch(sizes, said):
    with pytest.raises(ValueError, match=said):
        batches(Shaped(sizes), 3, seed=0)


def readers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("fastpref-data")}


def test_readers_work_ahead_and_stop_with_the_loop():
    loaded = []

    class Slow(Shaped):
        def __getitem__(self, i: int) -> Pair:
            loaded.append(i)
            return super().__getitem__(i)

    before = readers()  # those of earlier tests may end at any time
    iterator = batches(Slow([4] * 100), 2, seed=0, num_workers=2)
    next(iterator)
    mine = readers() - before
    assert mine
    deadline = time.monotonic() + 60
    while len(loaded) < 2 * 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(loaded) == 2 * 5  # the one taken and 2 per thread ahead, no more
    iterator.close()
    for thread in mine:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in mine)


def test_an_error_in_a_reader_reaches_the_loop():
    class Broken(Shaped):
        def __getitem__(self, i: int) -> Pair:
            raise ValueError(f"pair {i} is broken")

    with pytest.raises(ValueError, match="is broken"):
        next(batches(Broken([4] * 4), 2, seed=0, num_workers=1))


def test_no_encoded_set(tmp_path):
    with pytest.raises(
        ValueError, match=r"no index.parquet; expected a set made by fastpref encode"
    ):
        PairDataset(tmp_path)


def test_damaged_sets(encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "copy")
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[0])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read .* run the same fastpref"):
        dataset[0]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: cannot be read"):
        dataset[0]
    index = copy / "index.parquet"
    pq.write_table(pq.read_table(index).drop_columns("weight"), index)
    with pytest.raises(ValueError, match=r"index.parquet: is damaged \(.*weight"):
        PairDataset(copy)
    index.write_bytes(b"no parquet")
    with pytest.raises(
        ValueError, match=r"index.parquet: is damaged .* delete it and run the same"
    ):
        PairDataset(copy)


@pytest.mark.parametrize(
    ("column", "damaged", "said"),
    [
        ("weight", lambda v: [None, *v[1:]], r"\(pair \d+\): weight expected 0 or more, got None"),
        ("weight", lambda v: [float("nan"), *v[1:]], r"\(pair \d+\): weight .* got nan"),
        ("weight", lambda v: [-1.0, *v[1:]], r"\(pair \d+\): weight .* got -1.0"),
        ("pair_id", lambda v: list(map(str, v)), r"pair_id expected an integer in \[0, .* '\d+'"),
        ("pair_id", lambda v: [-1, *v[1:]], "pair_id expected an integer"),
        ("prompt", lambda v: [None, *v[1:]], r"\(pair \d+\): prompt expected a text, got None"),
    ],
)
def test_damaged_rows_of_the_index_are_named(column, damaged, said, encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "copy")
    index = copy / "index.parquet"
    table = pq.read_table(index)
    values = damaged(table[column].to_pylist())
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values)), index)
    with pytest.raises(ValueError, match=f"index.parquet: row 1:? {said}"):
        PairDataset(copy)
    pq.write_table(table.slice(0, 0), index)
    with pytest.raises(ValueError, match=r"index.parquet: has no rows, expected one per pair"):
        PairDataset(copy)


@pytest.mark.parametrize("damage", ["missing", "integers"])
def test_pair_files_of_something_else_are_named(damage, encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "copy")
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[0])
    tensors = read_tensors(path)
    tensors["latents_l"] = tensors["latents_l"].int()
    if damage == "missing":
        del tensors["latents_l"]
    path.write_bytes(save(tensors))
    got = {"missing": "nothing", "integers": "torch.int32"}[damage]
    with pytest.raises(
        ValueError,
        match=f"{path.name}: latents_l of pair {dataset.pair_ids[0]} expected floating-point "
        f"latents, got {got}; delete it",
    ):
        dataset[0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches(encoded):
    _, batch = next(batches(PairDataset(encoded), 2, seed=0, num_workers=1, pin_memory=True))
    assert batch.latents.is_pinned() and batch.cond["text"].is_pinned()
    moved = batch.to("cuda", torch.bfloat16)
    torch.cuda.synchronize()
    assert torch.equal(moved.latents.cpu(), batch.latents.bfloat16())


def test_a_step_costs_the_same_in_a_set_of_any_size():
    """The loop's own part, as `python -m bench.overhead` measures it: not O(pairs) a batch."""
    spent = {}
    for name, call in loaders().items():
        times = []
        for _ in range(40):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        spent[name] = statistics.median(times)
    least, *_, most = spent.values()
    assert most < 10 * least + 2e-3, spent  # a pass over 1e6 rows takes 50 ms and more


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_epoch_is_not_planned_in_one_go(num_workers, monkeypatch):
    """At an epoch's end no more parts of its order are looked at than the batches asked for are
    in.
    """
    seen, real = [], order._parts

    def parts(n, seed, epoch):
        for part in real(n, seed, epoch):
            seen.append(epoch)
            yield part

    monkeypatch.setattr(order, "PART", 10)
    monkeypatch.setattr(order, "_parts", parts)
    taken = batches(Shaped([4] * 3000), 2, seed=0, start=1499, num_workers=num_workers)
    for epoch in (0, 1):
        assert next(taken)[0] == epoch
    assert seen == [0] * 300 + [1]


def test_an_epochs_end_costs_little_in_a_large_set():
    """As `python -m bench.overhead` measures it: 1.2 s where the whole epoch was planned at once,
    some 10 ms now, for a permutation of 1e6 rows.
    """
    made = Made(10**6)
    assert min(epoch_end(made) for _ in range(3)) < 0.2
