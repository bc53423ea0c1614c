"""What stands on disk of an encoded set is what was written, or it does not train."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import BASE, arguments, content, encoded, fails, options, undigested, write_pairs
from safetensors import safe_open
from safetensors.torch import load, save

from fastpref.cli import main
from fastpref.pairs.dataset import PairDataset, batches
from fastpref.pairs.shards import digest, encoding_of, index_digest, pair_file
from fastpref.run import bookkeeping

CHANGED = r"{}: was changed after it was written; delete it and run the same fastpref encode again"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(media, their set, the same in bfloat16)"""
    root = tmp_path_factory.mktemp("sets")
    media = write_pairs(root / "media", count=4)
    return (
        media,
        encoded(media, root / "set").folder,
        encoded(media, root / "half", dtype="bfloat16").folder,
    )


@pytest.fixture
def copy(sets, tmp_path):
    return shutil.copytree(sets[1], tmp_path / "copy")


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("at", [-1, -4000])
def test_a_flipped_bit_of_a_pair_is_noticed(at, copy):
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[2])
    path.write_bytes(flipped(path.read_bytes(), at))
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        dataset[2]
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        list(islice(batches(dataset, 2, 0, num_workers=1), 2))
    dataset[1]


def test_a_run_of_media_ends_where_its_own_set_changed(sets, tmp_path, capsys):
    """Whose encoding is looked at again by each command; the run goes on once that pair is new."""
    run = options(sets[0], tmp_path / "run", max_train_steps=2)
    assert main(["train", *arguments(run)]) == 0
    dataset = PairDataset(tmp_path / "run" / "encoded")
    path = pair_file(dataset.folder, dataset.pair_ids[3])
    path.write_bytes(flipped(path.read_bytes(), -9))
    capsys.readouterr()
    longer = arguments(run | {"max_train_steps": 4})
    assert main(["train", *longer]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastpref train: ")
    assert said.endswith(CHANGED.format(path.name))
    path.unlink()
    assert main(["train", *longer]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["global_step"] == 4


def test_pairs_that_changed_places_are_noticed(copy):
    dataset = PairDataset(copy)
    a, b = (pair_file(copy, i) for i in dataset.pair_ids[:2])
    whole = a.read_bytes(), b.read_bytes()
    a.write_bytes(whole[1])
    b.write_bytes(whole[0])
    for i, path in enumerate((a, b)):
        with pytest.raises(ValueError, match=CHANGED.format(path.name)):
            dataset[i]


def test_members_that_changed_places_are_noticed(copy):
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[0])
    tensors = load(path.read_bytes())
    with safe_open(path, "pt") as file:
        marks = file.metadata()
    tensors["latents_w"], tensors["latents_l"] = tensors["latents_l"], tensors["latents_w"]
    path.write_bytes(save(tensors, marks))
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        dataset[0]


def test_the_same_pair_encoded_otherwise_is_noticed(sets, copy):
    """Also where encode is called again, which finds a file as it writes them."""
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[0])
    shutil.copy(pair_file(sets[2], dataset.pair_ids[0]), path)
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        dataset[0]
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        encoded(sets[0], copy)[0]
    path.unlink()
    encoded(sets[0], copy)
    assert content(copy) == content(sets[1])


def test_a_pair_that_was_not_written_by_encode_is_not_indexed(sets, copy):
    path = pair_file(copy, PairDataset(copy).pair_ids[0])
    path.write_bytes(save(load(path.read_bytes())))
    with pytest.raises(ValueError, match=f"{path.name}: is not as fastpref encode wrote it; delet"):
        encoded(sets[0], copy)
    path.unlink()
    encoded(sets[0], copy)
    assert content(copy) == content(sets[1])


def test_what_changed_while_an_encoding_was_interrupted_is_noticed(sets, copy):
    path = pair_file(copy, PairDataset(copy).pair_ids[1])
    (copy / "index.parquet").unlink()
    path.write_bytes(flipped(path.read_bytes(), -1))
    with pytest.raises(ValueError, match=CHANGED.format(path.name)):
        encoded(sets[0], copy)[1]


def test_another_empty_prompt_is_noticed(sets, copy):
    path = copy / "empty.safetensors"
    for other in (flipped(path.read_bytes(), -1), (sets[2] / path.name).read_bytes()):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=CHANGED.format(path.name)):
            PairDataset(copy)


@pytest.mark.parametrize("column", ["weight", "prompt", "digest", "where"])
def test_an_index_of_other_values_is_noticed(column, copy):
    index = copy / "index.parquet"
    table = pq.read_table(index)
    values = table[column].to_pylist()
    other = [values[1], values[0], *values[2:]] if column != "weight" else [0.5, *values[1:]]
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(other)), index)
    with pytest.raises(
        ValueError, match=r"index.parquet: was changed after it was written; delete"
    ):
        PairDataset(copy)


def test_an_index_without_its_digests_is_noticed(copy):
    index = copy / "index.parquet"
    table = pq.read_table(index)
    for other in (
        table.drop_columns("digest"),
        table.replace_schema_metadata(),
        table.drop_columns("digest").replace_schema_metadata(),
        table.slice(0, 3),
    ):
        pq.write_table(other, index)
        with pytest.raises(ValueError, match=r"index.parquet: was changed after it was written"):
            PairDataset(copy)


def test_what_a_set_was_encoded_with_cannot_be_said_otherwise(copy):
    record = copy / "fingerprint.json"
    mark = json.loads(record.read_text())
    for other in (mark | {"fps": 8.0}, {k: v for k, v in mark.items() if k != "digests"}):
        record.write_text(json.dumps(other))
        with pytest.raises(
            ValueError, match=r"fingerprint.json: was changed after the set was enc"
        ):
            PairDataset(copy)


def test_whole_numbers_of_the_data_are_read_as_they_were_written(sets, tmp_path):
    """An index holds 3 as 3.0."""
    media = shutil.copytree(sets[0], tmp_path / "media")
    rows = [json.loads(line) for line in (media / "metadata.jsonl").read_text().splitlines()]
    rows = [
        row | {"score_chosen": 3, "score_rejected": i, "weight": 2} for i, row in enumerate(rows)
    ]
    (media / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert set(encoded(media, tmp_path / "set").weights) == {2.0}


@pytest.mark.parametrize("before", [False, True])
def test_a_pair_stands_once_in_the_index(before, copy):
    if before:
        undigested(copy)
    index = copy / "index.parquet"
    table = pq.read_table(index)
    pq.write_table(pa.concat_tables([table, *[table.slice(1, 1)] * 95]), index)
    pair = table["pair_id"][1].as_py()
    with pytest.raises(
        ValueError, match=rf"index.parquet: pair {pair} stands in 96 rows, expected"
    ):
        PairDataset(copy)


def test_an_index_costs_no_more_than_its_bytes(copy):
    index = copy / "index.parquet"
    table = pq.read_table(index).slice(0, 1)
    long = table.set_column(1, "prompt", pa.array(["x" * 100_000]))
    pq.write_table(pa.concat_tables([long] * 1000).combine_chunks(), index)  # 100 MB of prompts
    assert index.stat().st_size < 50_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"holds 100000000 bytes of texts that are repeated"):
        PairDataset(copy)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["{}", '{"family": 3, "model": "x"}', '{"family": "toy"}', '{"family": "toy", "model": 1}',
     '{"family": "toy", "model": "x", "encoders": ["vae"]}'],
)  # fmt: skip
def test_fingerprints_of_another_form_are_one_line(text, sets, copy, tmp_path, capsys):
    (copy / "fingerprint.json").write_text(text)
    run = options(copy, tmp_path / "run", max_train_steps=1)
    for said in (
        fails(capsys, "train", *arguments(run)),
        fails(capsys, "encode", "--family", "toy", "--model", str(BASE), "--data", str(sets[0]),
              "--output_dir", str(copy)),
    ):  # fmt: skip
        assert "fingerprint.json: is damaged, expected the JSON object that fastpref encode" in said


@pytest.mark.parametrize("name", ["pair_id", "prompt", "weight", "shapes", "digest"])
def test_columns_of_another_type_are_one_line(name, copy, tmp_path, capsys):
    index = copy / "index.parquet"
    table = pq.read_table(index)
    place = table.column_names.index(name)
    run = arguments(options(copy, tmp_path / "run", max_train_steps=1))
    for values in ([[1]] * 4, [b"\xff"] * 4, [{"a": 1}] * 4, [None] * 4, [True] * 4):
        pq.write_table(table.set_column(place, name, pa.array(values)), index)
        said = fails(capsys, "train", *run)
        assert "index.parquet: " in said and "; delete it and run the same fastpref encode" in said


def test_a_digest_covers_name_type_shape_and_bits(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.bfloat16)}
    one = digest(tmp_path / "x.safetensors", tensors, "e")
    assert one == digest(Path("x.safetensors"), dict(reversed(tensors.items())), "e")
    assert len(one) == 32
    others = [
        digest(Path("y.safetensors"), tensors, "e"),
        digest(Path("x.safetensors"), tensors, "f"),
        digest(Path("x.safetensors"), {"c": tensors["a"], "b": tensors["b"]}, "e"),
        digest(Path("x.safetensors"), tensors | {"a": tensors["a"].view(3, 2)}, "e"),
        digest(Path("x.safetensors"), tensors | {"a": tensors["a"].view(torch.int32)}, "e"),
        digest(Path("x.safetensors"), tensors | {"b": -tensors["b"]}, "e"),
        digest(Path("x.safetensors"), {"a": tensors["a"]}, "e"),
    ]
    assert len({one, *others}) == 1 + len(others)


def test_names_and_digests_never_change():
    """Written down once: a set of one version must be read by the next."""
    name = "pairs/12/000000000000ab12.safetensors"
    assert pair_file(Path("set"), 0xAB12) == Path("set") / name
    tensors = {"latents_w": torch.arange(3.0), "mask": torch.tensor([True])}
    assert digest(Path("00ab.safetensors"), tensors, "e") == "cc27980f0ba60340906568bcccf99c2d"
    said = {"family": "toy", "fps": 8.0, "data": "x"}
    assert encoding_of(said) == "2f3f1f1e65394df9b64bf6df1cfb5ac5"
    rows = {"pair_id": [1, 2], "prompt": ["a", "b"], "score_chosen": [None, 1.5]}
    for parts in (lambda v: [v], lambda v: [[], v[:1], v[1:]]):
        columns = ((name, parts(values)) for name, values in rows.items())
        assert index_digest(columns) == "c7ebb0deccfa3776274cc57662914fd5"


def test_which_pairs_there_are_is_no_part_of_what_a_pair_is():
    said = {"family": "toy", "fps": None}
    assert encoding_of(said) == encoding_of({"data": "x", "fps": None, "family": "toy"})
    assert encoding_of(said) != encoding_of(said | {"fps": 8.0})


def test_nothing_is_added_to_a_set_from_before_digests(sets, copy):
    """Which was encoded by other rules."""
    pair_file(undigested(copy), PairDataset(copy).pair_ids[1]).unlink()
    before = content(copy)
    with pytest.raises(ValueError, match=r"copy.*: is not finished, by an older fastpref that rea"):
        encoded(sets[0], copy)
    assert content(copy) == before


def test_a_set_from_before_digests_is_read(copy):
    """Of a pair that changed its shapes are seen."""
    before = [pair.latents_w.clone() for pair in PairDataset(copy)]
    after = [pair.latents_w for pair in PairDataset(undigested(copy))]
    assert all(map(torch.equal, before, after))
    dataset = PairDataset(copy)
    path = pair_file(copy, dataset.pair_ids[0])
    tensors = load(path.read_bytes())
    path.write_bytes(save({name: value[:1] for name, value in tensors.items()}))
    with pytest.raises(ValueError, match=f"{path.name}: expected cond.text:8x32 .* as the index s"):
        dataset[0]


def test_what_was_trained_before_a_pair_changed_is_saved(sets, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(PairDataset(sets[1]).folder, tmp_path / "set")
    run = options(folder, tmp_path / "run", max_train_steps=40, checkpointing_steps=40)
    path, real = pair_file(folder, PairDataset(folder).pair_ids[3]), bookkeeping.update

    def update(run, *given):
        if run.step == 2:
            path.write_bytes(flipped(path.read_bytes(), -9))
        return real(run, *given)

    monkeypatch.setattr(bookkeeping, "update", update)
    assert main(["train", *arguments(run)]) == 1
    assert capsys.readouterr().err.strip().endswith(CHANGED.format(path.name))
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert 3 <= int(saved.name.removeprefix("checkpoint-")) < 40


def test_an_index_in_several_row_groups_is_the_same(sets, copy):
    """Each with a dictionary of its own."""
    before, index = PairDataset(copy), copy / "index.parquet"
    pq.write_table(pq.read_table(index), index, row_group_size=3)
    after = PairDataset(copy)
    for name in ("pair_ids", "prompts", "weights", "shapes", "ties"):
        one, other = getattr(before, name), getattr(after, name)
        assert one == other and list(one) == list(other) and len(one) == 4
    assert after[3].prompt == before.prompts[3] and len(set(before.prompts)) > 1


def test_columns_are_read_as_lists_are(copy):
    data = PairDataset(copy)
    for column in (data.pair_ids, data.prompts, data.weights, data.shapes, data.ties):
        rows = list(column)
        assert column == rows and column != rows[:3] and column != [*rows[:3], "other"]
        assert column[-1] == rows[3] and column[1:3] == rows[1:3] and column[::-2] == rows[::-2]
        assert type(column[0]) is type(rows[0]) in (int, str, float, bool)
        with pytest.raises(IndexError):
            column[4]
