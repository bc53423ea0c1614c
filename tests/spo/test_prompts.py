"""Prompts from wherever they stand, embedded once, each file whole or named."""

import json

import pytest
import torch
from commands import BASE, encoded, write_pairs
from families import PROMPTS, tiny

from fastpref.models import toy
from fastpref.spo import prompts
from fastpref.spo.prompts import PromptSet, prompt_id, read_prompts

CPU = torch.device("cpu")


def test_wherever_they_stand(tmp_path, capsys):
    texts = ["a cat", "two dogs", "a cat", "Ünïcode “quoted”"]
    unique = ["a cat", "two dogs", "Ünïcode “quoted”"]
    plain = tmp_path / "p.txt"
    for encoding, end in (("utf-8-sig", "\r\n"), ("utf-16", "\n"), ("utf-8", "\n\n")):
        plain.write_bytes(end.join(texts).encode(encoding))
        assert read_prompts(plain) == unique, encoding
    lines = tmp_path / "metadata.jsonl"
    records = [{"prompt": text, "chosen": "none.mp4"} for text in texts] + [{"prompt": 3}, {}]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_prompts(tmp_path) == read_prompts(lines) == unique
    assert "2 records have no prompt and are left out" in capsys.readouterr().err
    (tmp_path / "p.csv").write_text("caption\na cat\ntwo dogs\n")
    assert read_prompts(tmp_path / "p.csv") == unique[:2]
    pairs = write_pairs(tmp_path / "pairs", count=4)
    known = encoded(pairs, tmp_path / "encoded")
    assert read_prompts(tmp_path / "encoded") == list(dict.fromkeys(known.prompts))
    assert sorted(read_prompts(pairs)) == sorted(known.prompts)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.txt", b"\n \n", "no prompts, expected a .txt of one a line, or a column prompt"),
        ("p.txt", "schön".encode("latin-1"), "p.txt line 1: is not UTF-8"),
        ("p.jsonl", b'{"text": "a"}\n', "no prompts"),
        ("p.png", b"", r"expected a folder or a .jsonl, .csv, .parquet file"),
        ("gone.txt", None, "data .*gone.txt: no such file; expected a .txt of one prompt a line"),
    ],
)
def test_none_is_one_line(name, data, said, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises((ValueError, OSError), match=said):
        read_prompts(tmp_path / name)


def made(folder, texts=("a", "b", "c"), **changes):
    how = {"family": toy, "model": str(BASE), "dtype": torch.float32, "device": CPU, **changes}
    return PromptSet(list(texts), folder, **how)


def test_embedded_once_and_read_back(tmp_path, monkeypatch):
    texts = [f"a {i} disc moving up" for i in range(20)]
    first = made(tmp_path / "a", texts)
    rows = toy.encode_text(toy.pipeline(BASE), ["", *texts])
    assert torch.equal(first.empty_cond["text"], rows[0]["text"])
    cond = first.cond([3, 19], CPU)
    assert torch.equal(cond["text"], torch.stack([rows[4]["text"], rows[20]["text"]]))
    assert len(first) == 20 and first.ids.tolist() == [prompt_id(text) for text in texts]
    # Killed after some of them: the rest is embedded, in batches of the same shape.
    for text in texts[5:9]:
        first._file(text).unlink()
    seen, real = [], toy.encode_text
    monkeypatch.setattr(toy, "encode_text", lambda p, t: seen.append(t) or real(p, t))
    again = made(tmp_path / "a", texts)
    assert seen == [[*texts[5:9], "", "", "", ""]] and again.identity == first.identity
    assert made(tmp_path / "b", texts[1:]).identity != first.identity


def test_another_encoding_or_a_changed_file_is_refused(tmp_path):
    known = made(tmp_path)
    with pytest.raises(ValueError, match=r"embedded with another dtype \(float32 there, bfloat16"):
        made(tmp_path, dtype=torch.bfloat16)
    path = known._file("b")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not as it was written; delete it"):
        known.cond([1], CPU)
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match="is not as it was written"):
        known.cond([1], CPU)
    path.unlink()
    assert made(tmp_path).cond([1], CPU)["text"].shape == (1, toy.SLOTS, toy.TEXT_DIM)


@pytest.mark.parametrize("name", ["wan", "sdxl"])
def test_real_text_encoders(name, tmp_path, capsys):
    case = tiny(name)
    long = "a very long prompt " * 300
    texts = [*PROMPTS, long]
    found = PromptSet(texts, tmp_path, case.module, str(case.path), torch.float32, CPU)
    assert "1 of 6 prompts are longer than the text encoder reads" in capsys.readouterr().err
    one = case.module.encode_text(case.encoders, PROMPTS[:1])[0]
    for key, value in found.cond([0], CPU).items():
        torch.testing.assert_close(value[0], one[key])


def test_a_prompts_id_is_of_its_text_alone():
    assert prompt_id("a cat") == prompt_id("a cat") != prompt_id("a cat ")
    assert 0 <= prompt_id("ü") < 2**63 and prompts.BATCH == 8
