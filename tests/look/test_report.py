"""`fastpref report` of files that are not as a run wrote them: what they may cost, and show."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import time

import pytest
from commands import fails

from fastpref.cli import main
from fastpref.look import report
from fastpref.look.report import Page, read_metrics
from fastpref.run.telemetry import BINS, Log

HONEST = {
    "epoch": 0, "loss": 0.7, "rewards/chosen": 0.1, "rewards/rejected": 0.0,
    "rewards/margins": 0.1, "errors/policy_w": 0.5, "errors/reference_w": 0.5,
    "errors/policy_l": 0.5, "errors/reference_l": 0.5, "rewards/margins/by_level": [0.1] * BINS,
}  # fmt: skip


def lines(folder, *rows):
    """A metrics.jsonl of rows, or of text as it is."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))


def short(value) -> str:
    return str(value)[:24]


@pytest.mark.parametrize(
    "bad",
    [
        {"global_step": 10**400},
        '{"global_step": 1e999}',
        '{"global_step": NaN}',
        '{"global_step": -1}',
        '{"global_step": "2"}',
        '{"global_step": null}',
        "[1]",
        "[" * 100_000,
        '{"global_step": 1, "x": ' + "9" * 5000 + "}",
        '{"global_step": 1, "x": "' + "y" * 50_000 + '"}',
    ],
    ids=short,
)
def test_a_line_that_no_run_wrote_is_left_out(bad, tmp_path, capsys):
    lines(tmp_path, bad)
    assert "no line with a global_step" in fails(capsys, "report", str(tmp_path))
    lines(tmp_path, {"global_step": 1, **HONEST}, bad, {"global_step": 2, **HONEST})
    assert [row["global_step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert main(["report", str(tmp_path)]) == 0
    Log(tmp_path, [], {}, 2).close()
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in kept] == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        1e308,
        -1e308,
        "x",
        None,
        [1],
        {"a": 1},
        [0.1] * 200_000,
        [0] * 5000,
        [[1]] * 10,
        [10**400] * 9,
    ],
    ids=short,
)
def test_a_value_that_cannot_be_drawn_is_left_out(value, tmp_path, recwarn):
    changed = {"global_step": 1} | dict.fromkeys(HONEST, value)
    lines(tmp_path, {"global_step": 0, **HONEST}, changed, {"global_step": 2, **HONEST})
    begin = time.process_time()
    assert main(["report", str(tmp_path)]) == 0
    assert time.process_time() - begin < 5
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_no_more_bins_than_can_be_seen():
    for count, drawn in ((BINS, BINS), (5000, 0)):
        _, (axis,) = report._figure(1)
        report._levels(axis, [{"rewards/margins/by_level": [0.5] * count}] * 3)
        assert len(axis.patches) == drawn


def test_many_lines_cost_what_a_picture_shows(tmp_path):
    """Every 2^k-th of them is drawn; a file beyond any run's is not read."""
    lines(tmp_path, *({"global_step": i, **HONEST} for i in range(20_000)))
    rows = read_metrics(tmp_path)
    steps = [row["global_step"] for row in rows]
    assert report.MOST_ROWS / 2 < len(rows) <= report.MOST_ROWS
    assert steps == list(range(0, 20_000, 8))
    begin = time.process_time()
    assert main(["report", str(tmp_path)]) == 0
    assert time.process_time() - begin < 10


def test_a_file_larger_than_any_runs(tmp_path, capsys):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(report.MOST_BYTES + 1)
    said = fails(capsys, "report", str(tmp_path))
    assert f"metrics.jsonl: {report.MOST_BYTES + 1} bytes, expected at most" in said


def test_a_line_without_an_end_is_not_held(tmp_path):
    """300 MB of it, where 200 more cannot be had."""
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(300 << 20)
    code = f"""
import resource
from fastpref.look.report import read_metrics
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
try:
    read_metrics({str(tmp_path)!r})
except ValueError as error:
    assert "no line with a global_step" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_run_says_of_itself_is_text(tmp_path):
    """No markup of ours, nothing that a browser or a terminal obeys."""
    run = tmp_path / "<b>\x1b[31m\u202e"
    run.mkdir()
    lines(run, {"global_step": 1, **HONEST})
    (run / "config.yaml").write_text("model: </pre><script>alert(1)</script>\x1b]0;\x07\u202e\n")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page
    assert not any(c in page for c in "\x1b\x07\u202e")
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\x1b]0;\x07\u202e" in page


def test_a_long_record_is_cut(tmp_path):
    lines(tmp_path, {"global_step": 1, **HONEST})
    (tmp_path / "config.yaml").write_text("model: x\n" * 1_000_000)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size < 3 << 20


def test_a_page_escapes_all_that_it_is_given(tmp_path):
    page, bad = Page("<i>\x1b"), "<i>\x1b&"
    page.heading(bad)
    page.text(bad)
    page.code(f"{bad}\n{bad}")
    page.table([bad], [[bad]])
    page.link(bad, bad)
    text = page.save(tmp_path / "page.html").read_text()
    assert "<i>" not in text and "\x1b" not in text
    assert html.escape(r"<i>\x1b&") + "\n" + html.escape(r"<i>\x1b&") in text
