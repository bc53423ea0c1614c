"""What an online run finds in its folder: of itself, of other attempts, damaged."""

import json

import judges
import pytest
import torch
from online import adapter, options, rows, same, stopped

from fastpref.pairs.shards import Changed
from fastpref.run.checkpoint import fault
from fastpref.spo import loop, rounds
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo


def edited(data: bytes, name: str, value: object) -> bytes:
    """A round's part whose header says something else of it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    said = json.loads(header["__metadata__"]["fastpref"])
    said[name] = value(said[name])
    header["__metadata__"] = {"fastpref": json.dumps(said)}
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


PARTS = {
    "cut": lambda data, other: data[:-30],
    "flipped": lambda data, other: data[:-3] + b"abc",
    "of another row": lambda data, other: edited(
        data, "transitions", lambda of: [[step, row + 1, gap] for step, row, gap in of]
    ),
    "of another count": lambda data, other: edited(
        data, "counts", lambda of: of | {"judged": of["judged"] + 1}
    ),
    "of another seed": lambda data, other: other,
}


def test_a_part_of_a_round_that_is_not_its_own_is_named(prompts, tmp_path, monkeypatch):
    how = {"train_batch_size": 2}
    config = stopped(tmp_path / "run", 2, prompts, monkeypatch, **how)
    stopped(tmp_path / "other", 2, prompts, monkeypatch, seed=5, **how)
    part, other = (tmp_path / name / "rounds" / "round-000000-001.safetensors"
                   for name in ("run", "other"))  # fmt: skip
    kept = part.read_bytes()
    for make in PARTS.values():
        part.write_bytes(make(kept, other.read_bytes()))
        with pytest.raises(ValueError, match=r"round-000000-001.safetensors: is missing or damage"):
            spo(config)
        assert part.read_bytes() == make(kept, other.read_bytes()), "it is not removed"
    part.unlink()
    with pytest.raises(ValueError, match=r"round-000000-001.safetensors: is missing or damaged"):
        spo(config)
    part.write_bytes(kept)
    assert spo(config)["global_step"] == 6


def test_rounds_that_no_checkpoint_goes_on_from_are_removed(prompts, tmp_path, monkeypatch):
    most, real = [], rounds.write_part

    def write_part(path, *rest):
        real(path, *rest)
        most.append(len(list(path.parent.iterdir())))

    monkeypatch.setattr(rounds, "write_part", write_part)
    change = {"scorer": "judges:brightness", "checkpointing_steps": 100, "max_train_steps": 12}
    spo(SPOConfig(**options(prompts, tmp_path / "run", **change)))
    assert len(most) > 6 and max(most) == 2


def test_killed_before_its_first_checkpoint_it_samples_nothing_twice(
    whole, prompts, tmp_path, monkeypatch
):
    """As kill -9 would, an error of no kind that is mended leaves it as it is."""

    def die():
        raise SystemError

    monkeypatch.setattr(judges, "calls", {"count": 0, "at": 5, "then": die})
    config = SPOConfig(**options(prompts, tmp_path / "run"))
    with pytest.raises(ValueError, match="SystemError"):
        spo(config)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    part = tmp_path / "run" / "rounds" / "round-000000-000.safetensors"
    before = part.stat().st_mtime_ns
    stopped(tmp_path / "run", 1, prompts, monkeypatch)
    assert part.stat().st_mtime_ns == before
    spo(config)
    same(tmp_path / "run", whole[0])


def test_what_another_attempt_left_is_not_taken_over(whole, prompts, tmp_path, monkeypatch):
    def die():
        raise SystemError

    monkeypatch.setattr(judges, "calls", {"count": 0, "at": 5, "then": die})
    with pytest.raises(ValueError, match="SystemError"):
        spo(SPOConfig(**options(prompts, tmp_path / "run", seed=7, win_rate_prompts=3)))
    spo(SPOConfig(**options(prompts, tmp_path / "run")))
    same(tmp_path / "run", whole[0])


def test_embeddings_that_change_in_a_run_take_nothing_with_them(prompts, tmp_path, monkeypatch):
    real, folder = loop.step_loss, tmp_path / "run"
    kept = {}

    def step_loss(*args, **kwargs):
        kept.update({path: path.read_bytes() for path in (folder / "prompts").glob("*[0-9a-f].*")})
        for path, data in kept.items():
            path.write_bytes(data[:-1] + b"?")
        return real(*args, **kwargs)

    how = {"train_batch_size": 2, "checkpointing_steps": 100, "win_rate_prompts": 0}
    config = SPOConfig(**options(prompts, folder, **how))
    with monkeypatch.context() as patch, pytest.raises(Changed, match="delete it and run the same"):
        patch.setattr(loop, "step_loss", step_loss)
        spo(config)
    assert fault(folder / "checkpoint-1") is None
    for path in kept:
        path.unlink()
    assert spo(config)["global_step"] == 6
    spo(SPOConfig(**options(prompts, tmp_path / "other", **how)))
    one, two = adapter(folder), adapter(tmp_path / "other")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(folder) == rows(tmp_path / "other")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"rounds": []}',
        '{"rounds": [1], "base": [1, 2]}',
        '{"rounds": [{"global_step": 2}], "base": [1, 2]}',
        '{"rounds": [], "base": [1, 2, 3]}',
        '{"rounds": [], "base": ["1", null]}',
    ],
)
def test_a_damaged_win_rate_ends_no_run(text, prompts, tmp_path, capsys):
    folder = tmp_path / "run"
    spo(SPOConfig(**options(prompts, folder, max_train_steps=2)))
    whole = json.loads((folder / "win_rate.json").read_text())
    (folder / "win_rate.json").write_text(text)
    spo(SPOConfig(**options(prompts, folder, max_train_steps=3)))
    record = json.loads((folder / "win_rate.json").read_text())
    assert "win_rate.json is damaged" in capsys.readouterr().err
    assert record["base"] == whole["base"] and record["rounds"][-1]["global_step"] == 3
