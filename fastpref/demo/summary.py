"""The demo's end: one table, what it means in words, the picture, the page, the files to open."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomic
from ..look.evaluate import Interval, gain, win_rate
from ..look.report import Page, Point, gain_against_winner_error
from . import timeline
from .clips import HELD_OUT, PARTS
from .timeline import Spent

HEADER = (
    "objective",
    "win rate over base",
    "score gain",
    "chosen's error",
    "rejected's error",
    "s/pair",
)
DESCRIPTION = {
    "sft": "SFT on the chosen clips alone",
    "dpo_windowed": "DPO drawn only from noise levels s >= 0.35 (dpo_windowed)",
}
LEGEND = (
    "Win rate: share of clips that the noise-free judge scores above the base model's clip of the "
    "same prompt and starting noise, ties 0.5. Score gain: mean difference of these scores, which "
    "lie between 0 and 1. Brackets: 95 % intervals over clips (Wilson; paired bootstrap). Errors: "
    "of the chosen and the rejected clips of unseen pairs, relative to the base model's."
)


@dataclass
class Row:
    """One trained model: scores beside the base's on the same clips, errors on unseen pairs."""

    name: str
    beta: float | None
    seed: int
    folder: Path
    scores: dict[str, Tensor]  # each [clips] float64
    base_scores: dict[str, Tensor]
    winner_error: float  # relative to the base: 0.1 is 10 % above
    loser_error: float
    seconds_per_pair: float
    spent: Spent = field(default_factory=Spent)

    @property
    def wins(self) -> Interval:
        return win_rate(self.scores["score"], self.base_scores["score"])

    @property
    def gain(self) -> Interval:
        return gain(self.scores["score"], self.base_scores["score"])

    def line(self) -> str:
        return f"win rate {self.wins.value:.2f}, score gain {self.gain.value:+.3f}"

    def results(self) -> dict[str, str]:
        """For the run's own page."""
        parts = {}
        for part in ("score", *PARTS):
            base, tuned = self.base_scores[part].mean(), self.scores[part].mean()
            parts[f"{part}: base, tuned"] = f"{base:.3f}, {tuned:.3f}"
        return dict(zip(HEADER[1:], cells([self])[1:], strict=True)) | parts


@dataclass(frozen=True)
class Average:
    """Rows of one objective and beta over seeds, as one."""

    wins: Interval
    gain: Interval
    win_spread: float | None  # standard deviation over seeds; None for one seed
    gain_spread: float | None


def average(rows: Sequence[Row]) -> Average:
    """Means over seeds. A clip counts once, with its mean over seeds, which share their clips."""
    if len(rows) == 1:
        return Average(rows[0].wins, rows[0].gain, None, None)
    base = rows[0].base_scores["score"]
    scores = torch.stack([row.scores["score"] for row in rows])
    won = ((scores > base).double() + 0.5 * (scores == base).double()).mean(0)
    wins = gain(won, torch.zeros_like(won))
    spread = [
        statistics.stdev(values)
        for values in ([r.wins.value for r in rows], [r.gain.value for r in rows])
    ]
    return Average(wins, gain(scores.mean(0), base), spread[0], spread[1])


def cells(rows: Sequence[Row], show_beta: bool = False) -> list[str]:
    """The table's line for the seeds of one objective and beta."""
    mean = average(rows)
    spread = ["", ""]
    if mean.win_spread is not None:
        spread = [f" sd {mean.win_spread:.2f}", f" sd {mean.gain_spread:.3f}"]
    beta = f" beta {rows[0].beta:g}" if show_beta and rows[0].beta is not None else ""
    w, g = mean.wins, mean.gain
    return [
        rows[0].name,
        f"{w.value:.2f} [{w.low:.2f}, {w.high:.2f}]{spread[0]}{beta}",
        f"{g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}]{spread[1]}",
        f"{100 * statistics.mean(r.winner_error for r in rows):+.1f} %",
        f"{100 * statistics.mean(r.loser_error for r in rows):+.1f} %",
        f"{statistics.mean(r.seconds_per_pair for r in rows):.4f}",
    ]


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one objective and beta together, in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.beta), []).append(row)
    return list(groups.values())


def table(rows: Sequence[Row]) -> list[list[str]]:
    betas = {row.beta for row in rows if row.beta is not None}
    return [cells(group, show_beta=len(betas) > 1) for group in grouped(rows)]


def as_text(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns aligned with two spaces between."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *lines)
    )


def verdict(rows: Sequence[Row], labels: dict[str, Any]) -> list[str]:
    """What the table says, in sentences a newcomer can check against it."""
    first, *others = grouped(rows)
    name, mine, clips = first[0].name, average(first), len(first[0].scores["score"])
    chance = "better than chance" if mine.wins.low > 0.5 else "not shown to be better than chance"
    sentences = [
        f"The {name} model's clip beats the base model's in {100 * mine.wins.value:.0f} % of "
        f"{clips} cases, on {min(clips, len(HELD_OUT))} prompts it never trained on: {chance}."
    ]
    for group in others:
        if group[0].name == "dpo_shuffled":
            sentences.append(shuffled_sentence(group, labels))
            continue
        # On the same clips: sharper than comparing the two intervals of the table.
        lead = gain(*(mean_score(g) for g in (group, first)))
        if lead.low > 0 or lead.high < 0:
            said = f"gains {'more' if lead.value > 0 else 'less'} than {name}"
        else:
            said = f"and {name} are not told apart"
        beta = f" (beta {group[0].beta:g})" if group[0].name == name else ""
        interval = f"{lead.value:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
        sentences.append(
            f"{DESCRIPTION.get(group[0].name, group[0].name)}{beta} {said}: {interval}."
        )
    return sentences


def mean_score(group: Sequence[Row]) -> Tensor:
    """Score of every clip, averaged over seeds, [clips]."""
    return torch.stack([row.scores["score"] for row in group]).mean(0)


def shuffled_sentence(group: Sequence[Row], labels: dict[str, Any]) -> str:
    """Whether shuffled labels leave the win rate at one half; if not, direction and cause."""
    mean = average(group)
    interval = mean.wins
    text = (
        "With shuffled labels (dpo_shuffled) the win rate is "
        f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    )
    if interval.low <= 0.5 <= interval.high:
        return f"{text}, which holds 0.5: the labels do the work."
    change = {
        part: statistics.mean((r.scores[part] - r.base_scores[part]).mean().item() for r in group)
        for part in PARTS
    }
    part = max(change, key=lambda name: abs(change[name]))
    swapped, gaps = set(labels["swapped"]), labels["gaps"]
    kept = statistics.mean(-g if i in swapped else g for i, g in enumerate(gaps))
    direction = "above" if interval.value > 0.5 else "below"
    return (
        f"{text}, {direction} 0.5. Cause: the swapped half and the other do not quite cancel (a "
        f"mean score gap of {kept:+.3f} is left of {statistics.mean(gaps):+.3f}) and random labels "
        f"move the model too, alike on most clips: by {mean.gain.value:+.3f}, mostly in {part} "
        f"({change[part]:+.3f}). Clips that share their starting noise show even such a small move."
    )


def summarise(folder: Path, rows: Sequence[Row], labels: dict[str, Any], seconds: float) -> None:
    """Prints the table and its meaning; writes results.json, the picture and report.html."""
    lines = table(rows)
    sentences = verdict(rows, labels)
    picture = folder / "gain_vs_winner_error.png"
    gain_against_winner_error(
        picture,
        [Point(r.name, r.beta, r.seed, r.gain.value, r.winner_error) for r in rows],
    )
    write_atomic(folder / "results.json", json.dumps(as_json(rows, labels), indent=1).encode())
    first = rows[0].folder
    page = Page("fastpref demo")
    page.text(" ".join(sentences))
    page.table(HEADER, lines)
    page.text(LEGEND)
    page.heading(f"Base against {rows[0].name}: couples of clips, base left, tuned right")
    page.picture(first / "samples.gif")
    page.picture(first / "samples.png")
    page.heading("Score gain against damage to the chosen clips")
    page.picture(picture)
    in_time = timeline.lines(rows)
    if in_time:
        sentences += timeline.sentences(rows)
        timeline.picture(folder / "gain_vs_seconds.png", rows)
        page.heading("Score gain against the seconds of training")
        page.table(timeline.HEADER, in_time)
        page.text(" ".join([*timeline.sentences(rows), timeline.NOTE]))
        page.picture(folder / "gain_vs_seconds.png")
    page.heading(f"Training of {rows[0].name}")
    page.picture(first / "curves.png")
    page.heading("Runs")
    for row in rows:
        page.link(f"{row.folder.name}: {row.line()}", f"{row.folder.name}/report.html")
    page.save(folder / "report.html")

    print()
    print(as_text(HEADER, lines))
    print()
    if in_time:
        print(as_text(timeline.HEADER, in_time))
        print()
    print("\n".join(sentences))
    print()
    print(f"{folder / 'report.html'}  all of it on one page: clips, curves, picture, every run")
    print(f"{first / 'samples.gif'}  base beside tuned, moving")
    print(f"{first / 'pytorch_lora_weights.safetensors'}  the adapter; config.yaml beside it")
    print(f"the same on your own clips: fastpref train --help   ({seconds:.0f} s in all)")


def as_json(rows: Sequence[Row], labels: dict[str, Any]) -> dict[str, Any]:
    """Everything the table was made of, for a machine."""
    return {
        "labels_right": labels["right"],
        "base_score": rows[0].base_scores["score"].mean().item(),
        "runs": [
            {
                "objective": row.name,
                "beta": row.beta,
                "seed": row.seed,
                "win_rate": list(row.wins),
                "score_gain": list(row.gain),
                "winner_error": row.winner_error,
                "loser_error": row.loser_error,
                "seconds_per_pair": row.seconds_per_pair,
                **asdict(row.spent),
                "scores": [round(s, 6) for s in row.scores["score"].tolist()],
            }
            for row in rows
        ],
    }
