"""Pictures of a run and one HTML page that opens offline: curves, clips, tables."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from ..progress import printable

# What a run's metrics.jsonl may cost to read and draw: a line of ours has under 4 KB and 10 bins,
# and a million of them make 1 GB.
MOST_BYTES, LONGEST_LINE, MOST_ROWS, MOST_BINS = 1 << 30, 16 << 10, 4000, 100
LARGEST = 1e100  # that is drawn: matplotlib squares
MOST_TEXT, MOST_CAPTION = 1 << 20, 300  # characters of a config.yaml, of a sheet's line

THUMBNAIL = 56  # pixels a frame is wide in the contact sheet, about
SHARES = ("online/kept", "spo/clamped", "eval/accuracy", "eval/plain_accuracy", "safeguard/lambda")
ERRORS = ("policy_w", "reference_w", "policy_l", "reference_l")


class Comparison(NamedTuple):
    """One prompt and seed: the base model's clip and the tuned one's, uint8 [F, H, W, 3]."""

    caption: str
    base: Tensor
    tuned: Tensor


class Point(NamedTuple):
    """One run in the picture of score gain against the winner's error."""

    name: str
    beta: float | None
    seed: int
    gain: float
    winner_error: float


def _enlarged(frames: Tensor, width: int = THUMBNAIL) -> list[Any]:
    """PIL images of about `width`; small clips grow by whole factors, pixels stay squares."""
    from PIL import Image

    factor = max(1, width // frames.shape[2])
    images = [Image.fromarray(f.numpy()) for f in frames]
    if frames.shape[2] > width:
        return [i.resize((width, i.height * width // i.width)) for i in images]
    size = (images[0].width * factor, images[0].height * factor)
    return [i.resize(size, Image.Resampling.NEAREST) for i in images]


def contact_sheet(path: Path, comparisons: Sequence[Comparison], *, columns: int = 8) -> None:
    """A PNG with one row per comparison: the base model's frames, then the tuned model's."""
    from PIL import Image, ImageDraw

    if not comparisons:
        raise ValueError("contact_sheet: comparisons expected at least one, got none")

    def shown(frames: Tensor) -> list[Any]:
        keep = torch.linspace(0, len(frames) - 1, min(columns, len(frames))).round().long()
        return _enlarged(frames[keep])

    rows = [(c.caption, shown(c.base), shown(c.tuned)) for c in comparisons]
    width, height = rows[0][1][0].size
    strip = len(rows[0][1]) * (width + 1)
    margin, line, gap = 6, 16, 18
    size = (2 * margin + 2 * strip + gap, margin + line + len(rows) * (height + line + 6))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    right = "tuned (same prompt, same starting noise)"
    draw.text((margin, margin), "base", fill="black")
    draw.text((margin + strip + gap, margin), right, fill="black")
    for i, (caption, *sides) in enumerate(rows):
        top = margin + line + i * (height + line + 6)
        draw.text((margin, top + 2), printable(caption[:MOST_CAPTION]), fill="black")
        for side, images in enumerate(sides):
            for k, image in enumerate(images):
                left = margin + side * (strip + gap) + k * (width + 1)
                sheet.paste(image, (left, top + line))
    sheet.save(path)


def animation(
    path: Path, comparisons: Sequence[Comparison], *, fps: int = 8, across: int = 4
) -> None:
    """A looping GIF of the comparisons in a grid: base left in each couple, tuned right."""
    from PIL import Image

    if not comparisons:
        raise ValueError("animation: comparisons expected at least one, got none")
    couples = [(_enlarged(c.base), _enlarged(c.tuned)) for c in comparisons]
    width, height = couples[0][0][0].size
    down = -(-len(couples) // across)
    size = (across * (2 * width + 14) - 10, down * (height + 8) - 8)
    pictures = []
    for f in range(len(couples[0][0])):
        picture = Image.new("RGB", size, "white")
        for i, (base, tuned) in enumerate(couples):
            left, top = i % across * (2 * width + 14), i // across * (height + 8)
            picture.paste(base[f], (left, top))
            picture.paste(tuned[f], (left + width + 2, top))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def metric_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, what it says) of a run's metrics.jsonl, without those that were cut off or damaged.

    Raises:
        ValueError: a file larger than any run's.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected at most {MOST_BYTES}: move it away")
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the latter: JSON nested too deeply
                continue
            if isinstance(row, dict) and _number(row.get("global_step")) >= 0:
                yield line.rstrip(b"\n") + b"\n", row


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; of more than `MOST_ROWS` every second, fourth, ... one,
    as a picture shows no more.

    Raises:
        ValueError: no such file, one larger than any run's, or not one line with a global_step.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} not found: expected the output folder of a training run")
    rows, every = [], 1
    for i, (_, row) in enumerate(metric_lines(path)):
        if i % every == 0:
            rows.append(row)
        if len(rows) > MOST_ROWS:
            rows, every = rows[::2], 2 * every
    if not rows:
        raise ValueError(
            f"{path}: no line with a global_step; expected the metrics of a run that has logged"
        )
    return rows


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(4 * columns, 3.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _number(value: Any) -> float:
    """`value`, or nan for what cannot be drawn."""
    drawn = isinstance(value, int | float) and abs(value) < LARGEST
    return float(value) if drawn else math.nan


def curves(run: Path, path: Path) -> None:
    """Plots loss, margins and accuracy, the four errors, and values per noise-level bin; of a run
    that samples its pairs how many it kept, and its win rate; of a preference model its accuracy.
    """
    rows = read_metrics(run)
    steps = [row["global_step"] for row in rows]
    shares = {key: _points(rows, key) for key in SHARES}
    shares["online/win_rate"] = _win_rates(run / "win_rate.json")
    shares = {key: points for key, points in shares.items() if points}
    figure, axes = _figure(5 if shares else 4)

    def line(axis: Any, key: str, label: str | None = None, **style: Any) -> None:
        values = [_number(row.get(key)) for row in rows]
        if not all(map(math.isnan, values)):
            # A line through one value shows nothing.
            marker = "." if len(values) < 3 else None
            axis.plot(steps, values, label=label, marker=marker, **style)

    line(axes[0], "loss")
    axes[0].set(title="loss", xlabel="step")
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        line(axes[1], key, key.removeprefix("rewards/"))
    axes[1].axhline(0, color="grey", linewidth=0.5)
    axes[1].set(title="rewards (margin = chosen - rejected)", xlabel="step")
    for name, colour in zip(ERRORS, ("tab:green", "tab:green", "tab:red", "tab:red"), strict=True):
        dashed = "--" if name.startswith("reference") else "-"
        line(axes[2], f"errors/{name}", name, color=colour, linestyle=dashed)
    axes[2].set(title="errors (w chosen, l rejected)", xlabel="step")
    _levels(axes[3], rows)
    for key, points in shares.items():
        axes[4].plot(*zip(*points, strict=True), label=key.partition("/")[2], marker=".")
        axes[4].set(title="shares", xlabel="step")
        axes[4].legend(fontsize=7)
    for axis in axes[1:3]:
        if axis.lines[1:]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where a row has a number."""
    found = [(float(row["global_step"]), _number(row.get(key))) for row in rows]
    return [point for point in found if not math.isnan(point[1])]


def _win_rates(path: Path) -> list[tuple[float, float]]:
    """(step, win rate) of an online run's win_rate.json, as far as it can be read."""
    try:
        rows = json.loads(path.read_bytes())["rounds"]
        return [(float(row["global_step"]), float(row["win_rate"][0])) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return []


def _levels(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Means over the run per noise-level bin: importance weights if there are any, or margins."""
    for key, title in (
        ("importance/weight", "importance weight by noise level"),
        ("rewards/margins", "margin by noise level"),
    ):
        binned = [row.get(f"{key}/by_level") for row in rows]
        binned = [v for v in binned if isinstance(v, list) and 0 < len(v) <= MOST_BINS]
        if binned:
            means = []
            for column in zip(*binned, strict=False):
                values = [v for v in map(_number, column) if not math.isnan(v)]
                means.append(sum(values) / len(values) if values else 0.0)
            width = 1 / len(means)
            axis.bar([(i + 0.5) * width for i in range(len(means))], means, width * 0.9)
            axis.set(title=title, xlabel="noise level (1 = pure noise)")
            return
    axis.set_axis_off()


def gain_against_winner_error(path: Path, points: Sequence[Point]) -> None:
    """The trade that every objective makes: score gained against damage to the chosen clips."""
    figure, (axis,) = _figure(1)
    figure.set_size_inches(6.5, 4.5)
    names = list(dict.fromkeys(p.name for p in points))
    betas = sorted({p.beta for p in points if p.beta is not None})
    for i, name in enumerate(names):
        for beta in [None, *betas]:
            mine = [p for p in points if p.name == name and p.beta == beta]
            if mine:
                shown = f"{name}, beta {beta:g}" if beta is not None and len(betas) > 1 else name
                axis.plot(
                    [100 * p.winner_error for p in mine],
                    [p.gain for p in mine],
                    linestyle="",
                    marker="os^Dv"[betas.index(beta) % 5] if beta is not None else "x",
                    color=f"C{i % 10}",
                    label=shown,
                )
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.axvline(0, color="grey", linewidth=0.5)
    axis.set(
        xlabel="change of the chosen clips' error against the reference, %",
        ylabel="score gain over the base",
        title="up is better, left is safer",
    )
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%;image-rendering:pixelated}table{border-collapse:collapse}
td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #ddd}
pre{background:#f5f5f5;padding:.8rem;overflow:auto}"""


def _escaped(text: str) -> str:
    """As HTML shows it, line by line."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


class Page:
    """One HTML file with every picture inside it."""

    def __init__(self, title: str) -> None:
        self.title = _escaped(title)
        self.parts = [f"<h1>{self.title}</h1>"]

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{_escaped(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{_escaped(text)}</p>")

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{_escaped(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def cells(tag: str, row: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{_escaped(c)}</{tag}>" for c in row) + "</tr>"

        body = "".join(cells("td", row) for row in rows)
        self.parts.append(f"<table>{cells('th', header)}{body}</table>")

    def link(self, text: str, target: str) -> None:
        self.parts.append(f'<p><a href="{quote(target)}">{_escaped(text)}</a></p>')

    def picture(self, path: Path) -> None:
        kind = {".png": "image/png", ".gif": "image/gif"}[path.suffix]
        data = base64.b64encode(path.read_bytes()).decode()
        name = _escaped(path.name)
        self.parts.append(f'<p><img alt="{name}" src="data:{kind};base64,{data}"></p>')

    def save(self, path: Path) -> Path:
        head = f'<meta charset="utf-8"><title>{self.title}</title>'
        path.write_text(
            f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>'
            f"<body>{''.join(self.parts)}</body></html>\n",
            encoding="utf-8",
            errors="backslashreplace",  # of a folder's name that is no UTF-8
        )
        return path


def run_report(
    run: Path, comparisons: Sequence[Comparison] = (), results: dict[str, str] | None = None
) -> Path:
    """Writes curves.png, samples.png, samples.gif and report.html into a run's folder."""
    run = Path(run)
    page = Page(f"fastpref run {run.name}")
    if results:
        page.table(("result", "value"), list(results.items()))
    curves(run, run / "curves.png")
    page.heading("Training")
    page.picture(run / "curves.png")
    if comparisons:
        contact_sheet(run / "samples.png", comparisons)
        animation(run / "samples.gif", comparisons)
        page.heading("Clips, base against tuned at the same seeds")
        page.picture(run / "samples.gif")
        page.picture(run / "samples.png")
    if (run / "config.yaml").is_file():
        page.heading("Configuration")
        with (run / "config.yaml").open(encoding="utf-8", errors="replace") as file:
            page.code(file.read(MOST_TEXT))
    return page.save(run / "report.html")
