"""Pictures of a comparison, made from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.evidence.grid import CONTROLS, LONG
from bench.evidence.intervals import mean
from bench.evidence.results import Results, Setting

DPI = 100
GREY = "0.6"


def draw(results: Results, folder: Path, stem: str) -> list[tuple[str, str]]:
    """Writes `stem`_NAME.png each into the folder; what they show, and their names."""
    found = []
    for name, (said, picture) in PICTURES.items():
        figure = picture(results)
        figure.savefig(folder / f"{stem}_{name}.png", dpi=DPI)
        found.append((said, f"{stem}_{name}.png"))
    return found


def _figure(
    down: int, across: int, width: float, height: float, **share: bool
) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **share)
    return figure, list(axes.flat)


def _lines(results: Results) -> list[tuple[str, list[Setting], str]]:
    """(label, settings from weak to strong beta, colour) of each name, and of dmpo's alphas."""
    found = []
    for name in results.ordinary():
        settings = results.settings(name)
        for alpha in sorted({s.alpha for s in settings}, key=lambda a: a or 0):
            label = name if alpha is None else f"{name}, alpha {alpha:g}"
            found.append((label, [s for s in settings if s.alpha == alpha]))
    return [(label, mine, f"C{i % 10}") for i, (label, mine) in enumerate(found)]


def winner(results: Results) -> Any:
    """Gain against the winner's error: a line through each objective's betas."""
    figure, (axis,) = _figure(1, 1, 8.5, 5.5)
    for i, (label, settings, colour) in enumerate(_lines(results)):
        gains = [results.gains(s).mean().item() for s in settings]
        errors = [100 * results.winner_error(s) for s in settings]
        dashed = "--" if i >= 10 else "-"
        marker = "x" if settings[0].name in CONTROLS else "os"[i >= 10]
        axis.plot(errors, gains, dashed, marker=marker, ms=4, lw=1, color=colour, label=label)
        best = results.chosen(settings[0].name)
        if best in settings:
            at = settings.index(best)
            axis.plot(errors[at], gains[at], marker=marker, ms=9, mew=2, color=colour)
    axis.axhline(0, color="grey", lw=0.5)
    axis.axvline(0, color="grey", lw=0.5)
    axis.set_xscale("symlog", linthresh=2)  # from -2 to some 90 %
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(
        xlabel="winner's error over the base's, %",
        ylabel="score gain over the base",
        title="up is better, left is safer; large: the chosen setting",
    )
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def beta(results: Results) -> Any:
    """Gain against beta, a panel for each objective, dpo in grey in all."""
    lines = [line for line in _lines(results) if len(line[1]) > 1]
    across = min(4, len(lines)) or 1
    down = math.ceil(len(lines) / across) or 1
    figure, axes = _figure(down, across, 2.7 * across, 2.3 * down, sharey=True)
    dpo = [(s.beta, mean(results.gains(s))) for s in results.settings("dpo")]
    for axis, (label, settings, _) in zip(axes, lines, strict=False):
        if settings[0].name not in ("ipo", "spo"):  # of another scale
            axis.plot([b for b, _ in dpo], [g.value for _, g in dpo], color=GREY, lw=1)
        found = [mean(results.gains(s)) for s in settings]
        betas = [s.beta for s in settings]
        axis.plot(betas, [g.value for g in found], marker="o", ms=3, color="C0")
        axis.fill_between(
            betas, [g.low for g in found], [g.high for g in found], color="C0", alpha=0.2, lw=0
        )
        axis.axhline(0, color="grey", lw=0.5)
        axis.set_xscale("log")
        axis.set_xticks(betas, [f"{b:g}" for b in betas])
        axis.minorticks_off()
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, -high / 4), high)  # what is ruined does not press the rest together
    for axis in axes[len(lines) :]:
        axis.set_axis_off()
    figure.supxlabel("beta", fontsize=9)
    figure.supylabel("score gain over the base", fontsize=9)
    return figure


def steps(results: Results) -> Any:
    """Accuracy over steps of the chosen settings, in training and held out; long runs' gain."""
    figure, (trained, held, late) = _figure(1, 3, 12.5, 3.8)
    names = [n for n in results.ordinary() if n not in ("sft", "spo")]
    for i, name in enumerate(names):
        rows = results.rows(results.chosen(name))
        look: dict[str, Any] = {"color": f"C{i % 10}", "ls": "--" if i >= 10 else "-", "lw": 1.2}
        logged: dict[int, list[float]] = {}
        for step, accuracy in (point for row in rows for point in row["logged"]):
            logged.setdefault(step, []).append(accuracy)
        at = sorted(step for step in logged if len(logged[step]) == len(rows))
        trained.plot(at, [sum(logged[s]) / len(rows) for s in at], label=name, **look)
        right = torch.tensor(results.points(results.chosen(name), "accuracy")).mean(1)
        held.plot(results.steps(results.chosen(name)), right, label=name, marker=".", **look)
    trained.set(title="implicit accuracy in training", xlabel="step")
    held.set(title="the same on held-out pairs", xlabel="step")
    held.legend(fontsize=6)
    betas = sorted({s.beta for name in LONG for s in results.settings(name)})
    for i, name in enumerate(LONG):
        for setting in results.settings(name):
            marks = results.steps(setting)
            style = {"color": f"C{i}", "ls": "--" if setting.beta != betas[-1] else "-"}
            _band(late, marks, results, setting, label=f"{name}, beta {setting.beta:g}", **style)
    late.axhline(0, color="grey", lw=0.5)
    late.set(title="score gain of the long runs", xlabel="step")
    if late.lines[1:]:
        late.legend(fontsize=7)
    return figure


def _band(axis: Any, at: Sequence[float], results: Results, setting: Setting, **style: Any) -> None:
    """Gains at the checkpoints of a judged run, from 0, with their interval."""
    found = [mean(table) for table in results.curve(setting)]
    (line,) = axis.plot([0, *at], [0, *(g.value for g in found)], marker=".", **style)
    low, high = [0, *(g.low for g in found)], [0, *(g.high for g in found)]
    axis.fill_between([0, *at], low, high, color=line.get_color(), alpha=0.2, lw=0)


def seconds(results: Results) -> Any:
    """Gain against seconds, of the loop and with what stands before it."""
    figure, axes = _figure(1, 2, 10, 3.8)
    titles = ("the loops alone", "with pairs, ranked clips and the preference model before")
    for axis, title, whole in zip(axes, titles, (0, 1), strict=True):
        for name in ("dpo", "spo"):
            if name not in results.names:
                continue
            setting = results.chosen(name)
            rows = results.rows(setting)
            before = whole * sum(r["before"] for r in rows) / len(rows)
            at = (results.seconds(setting).mean(1) + before).tolist()
            found = [mean(table) for table in results.curve(setting)]
            times, gains = [before, *at], [0.0, *(g.value for g in found)]
            (line,) = axis.plot(times, gains, marker=".", label=str(setting))
            low, high = [0.0, *(g.low for g in found)], [0.0, *(g.high for g in found)]
            axis.fill_between(times, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axis.axhline(0, color="grey", lw=0.5)
        axis.set(title=title, xlabel="seconds", ylabel="score gain over the base")
        axis.title.set_fontsize(9)
        if axis.lines[1:]:
            axis.legend(fontsize=8, loc="lower right")
    return figure


PICTURES: dict[str, tuple[str, Callable[[Results], Any]]] = {
    "winner": (
        "Score gain against the winner's error, a line through each objective's betas",
        winner,
    ),
    "beta": ("Score gain against beta, with 95 % intervals; grey: dpo", beta),
    "steps": ("Implicit accuracy over steps of the chosen settings; gain of the long runs", steps),
    "seconds": ("Score gain against seconds, DPO and SPO", seconds),
}
