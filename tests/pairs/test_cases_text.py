"""Metadata as people have them, after public reports: webui#3657 (encodings), DALI#1872 (git-lfs
pointers), WanVideoWrapper#1781 and SimpleTuner#283 (prompts of white space).
"""

from __future__ import annotations

import json

import pytest
from metadata_files import LINES, PROMPTS, metadata, one_bad, table

from fastpref.pairs.rows import Rows, read_rows

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


MARKED = ["utf-8-sig", "utf-16", "utf-32"]
ENCODINGS = ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", *MARKED]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding, suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode(encoding))
    assert [row.prompt for row in read_rows(folder)] == PROMPTS


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end, encoding, suffix, folder):
    words = metadata(suffix).replace("\n", end)
    (folder / f"metadata.{suffix}").write_bytes(words.encode(encoding))
    found = read_rows(folder)
    first = 1 + (suffix == "csv")
    assert [row.prompt for row in found] == PROMPTS
    assert [row.where.split()[-1] for row in found] == [str(first), str(first + 1)]


def test_separators_that_end_no_line(folder):
    """U+2028, U+0085 and others are letters of a prompt, in JSON and in CSV."""
    prompt = "one\u2028two\u0085three\x0bfour"
    words = json.dumps({**LINES[0], "prompt": prompt}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(words.replace("\x0b", "\\u000b"), newline="")
    assert read_rows(folder)[0].prompt == prompt
    (folder / "other.csv").write_text(f"prompt,chosen,rejected\n{prompt},a.mp4,b.mp4\n")
    assert read_rows(folder / "other.csv")[0].prompt == prompt


@pytest.mark.parametrize("said", ["", "sep={}\n", "sep={}\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
def test_delimiters_as_excel_writes_them(mark, encoding, said, folder):
    words = said.format(mark) + table(mark)
    (folder / "metadata.csv").write_bytes(words.encode(encoding))
    found = read_rows(folder)
    assert [row.prompt for row in found] == PROMPTS
    assert found[0].where == f"metadata.csv line {2 + bool(said)}"


def test_a_delimiter_inside_a_quoted_name_is_none(folder):
    words = table(";").replace("prompt;", 'prompt;"x, y";').replace("a.mp4", "7;a.mp4")
    (folder / "metadata.csv").write_text(words)
    assert [row.prompt for row in read_rows(folder)] == PROMPTS


def test_rows_of_empty_cells_are_none(folder):
    (folder / "metadata.csv").write_text(table() + ",,\n,,\n")
    assert len(read_rows(folder)) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_windows_1252_is_named(suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode("cp1252"))
    bad = one_bad(folder)
    assert (bad.kind, bad.field) == ("not_utf8", "prompt")
    assert "as Windows-1252 it reads 'ein grüner Kreis, groß'" in bad.reason


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_utf16_that_ends_within_a_letter(suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"line \d: not whole utf-16 text \(truncated data\); sa"):
        read_rows(folder)


def test_half_a_letter_in_utf16_costs_its_row(folder):
    raw = metadata("jsonl").replace("red", "\ud83d").encode("utf-16", "surrogatepass")
    (folder / "metadata.jsonl").write_bytes(raw)
    assert one_bad(folder).kind == "not_utf8" and len(list(Rows(folder))) == 2


def test_files_put_together_keep_their_marks(folder):
    (folder / "metadata.jsonl").write_bytes(metadata("jsonl").encode("utf-8-sig") * 2)
    assert [row.prompt for row in read_rows(folder)] == PROMPTS * 2


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_git_lfs_pointers(name, folder):
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name}: is a git-lfs pointer, not the file: run git lf"):
        Rows(folder)


def test_git_lfs_pointers_of_a_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_text(POINTER)
    with pytest.raises(ValueError, match=r"train-0.*: is a git-lfs pointer"):
        Rows(tmp_path)


NOTHING_SEEN = [
    " ",
    "\t\n",
    "\u00a0\u3000",
    "\u200b\ufeff",
    "\u2060\u00ad",
    "\x00",
    "\u3164",
    "\u0301",
]


@pytest.mark.parametrize("prompt", NOTHING_SEEN)
def test_blank_prompts(prompt, folder):
    blank = {**LINES[0], "prompt": prompt}
    words = [LINES[0], blank, {**LINES[1], "negative_prompt": prompt}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, words)))
    bad = one_bad(folder)
    assert (bad.kind, bad.field, bad.reason) == (
        "missing_value",
        "prompt",
        "is blank; expected a text",
    )
    assert list(Rows(folder))[2].negative_prompt is None


@pytest.mark.parametrize("prompt", ["?", " a ", "猫", "👩‍🚀", "é"])
def test_prompts_that_are_seen(prompt, folder):
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "prompt": prompt}))
    assert read_rows(folder)[0].prompt == prompt


def test_what_a_terminal_obeys_is_shown(folder):
    evil = "\x1b[2J\u202ea\x9b.mp4"
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "chosen": evil, "w\x1b": 1}))
    bad = one_bad(folder)
    assert str(bad).isprintable() and "x1b[2J" in str(bad)


def test_a_header_with_spaces_and_a_spreadsheets_empty_columns(folder):
    text = 'prompt, chosen, rejected,,\n"a fox, red", a.mp4, b.mp4,,\n'
    (folder / "metadata.csv").write_text(text)
    (row,) = read_rows(folder)
    assert (row.prompt, row.chosen.name, row.rejected.name) == ("a fox, red", "a.mp4", "b.mp4")
