"""Score gain against the seconds of training, DPO beside SPO, and what SPO's pairs cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..look.report import read_metrics
from ..run import checkpoint

if TYPE_CHECKING:
    from .summary import Row

HEADER = ("objective", "training", "before it", "score gain at a quarter, half, ...")
NOTE = (
    "Seconds of the training loops: SPO's hold its sampling and judging. Before it: clips are "
    "sampled and labelled (for SPO three times as many), and SPO's preference model learns. The "
    "paper claims a twentieth of DPO's compute for SDXL and a fifth for SD1.5 (arXiv 2406.04314)."
)


@dataclass(frozen=True)
class Spent:
    """What a run cost, and its score gain on the way.

    before: seconds in which clips were sampled and labelled, and a preference model learned.
    curve: (seconds of training, score gain). accuracy: of the preference model on unseen pairs, by
    quarter of the noise level. sampled: the totals of an online run.
    """

    curve: list[tuple[float, float]] = field(default_factory=list)
    before: float = 0.0
    accuracy: list[float] = field(default_factory=list)
    sampled: dict[str, Any] = field(default_factory=dict)

    def reaches(self, gain: float) -> float | None:
        """Seconds of training to this score gain, between two points on a line; None: never."""
        start = (0.0, 0.0)
        for end in self.curve:
            if end[1] >= gain:
                share = (gain - start[1]) / (end[1] - start[1])
                return start[0] + share * (end[0] - start[0])
            start = end
        return None


def elapsed(run: Path, pairs: int) -> dict[int, float]:
    """Seconds of a run's loop by step, as far as it logged them; saves apart. pairs: of a step."""
    seconds, step, found = 0.0, 0, {}
    for row in read_metrics(run):
        if "perf/seconds_per_pair" in row:
            seconds += row["perf/seconds_per_pair"] * pairs * (row["global_step"] - step)
            step = row["global_step"]
            found[step] = seconds
    return found


def curve(
    run: Path, pairs: int, model: nn.Module, gain: Callable[[], float]
) -> list[tuple[float, float]]:
    """(seconds, gain) at each checkpoint of a run.

    model: with the run's adapters in it; it gets the parameters of each checkpoint in turn, the
    last one in the end. gain: of the model as it is.
    """
    from safetensors.torch import load_file

    seconds, found = elapsed(run, pairs), []
    for saved in reversed(checkpoint.folders(run)):
        step = int(saved.name.removeprefix(checkpoint.PREFIX))
        model.load_state_dict(load_file(saved / "parameters.safetensors"), strict=False)
        if step in seconds:
            found.append((seconds[step], gain()))
    return found


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's lines, of the rows that have a curve."""
    return [
        [
            row.name,
            f"{row.spent.curve[-1][0]:.0f} s",
            f"{row.spent.before:.0f} s",
            ", ".join(f"{gain:+.3f}" for _, gain in row.spent.curve),
        ]
        for row in rows
        if row.spent.curve
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What the first SPO run cost, and when it has gained what the first DPO run ends with."""
    spo = next((row.spent for row in rows if row.name == "spo"), None)
    dpo = next((row.spent for row in rows if row.name == "dpo" and row.spent.curve), None)
    if spo is None:
        return []
    total = spo.sampled
    judged, pairs = total["judged"], max(1, total["pairs"])
    right = ", ".join(f"{100 * share:.0f}" for share in spo.accuracy)
    said = [
        f"The preference model is right on {right} % of unseen pairs in the four quarters of the "
        "noise level, the cleanest first.",
        f"SPO kept a pair of {total['pairs']} of {judged} groups of candidates; a kept pair cost "
        f"{total['network'] / pairs:.1f} samples of the network and {total['decodes'] / pairs:.1f} "
        f"decodes, and sampling {100 * total['seconds'] / max(spo.curve[-1][0], 1e-9):.0f} % of "
        "the time."
        if spo.curve
        else "",
    ]
    if dpo and spo.curve and dpo.curve[-1][1] > 0:
        end, goal = dpo.curve[-1]
        took = spo.reaches(goal)
        if took is None:
            said.append(f"SPO does not reach DPO's score gain, {goal:+.3f} after {end:.0f} s.")
        else:
            whole = spo.before + took
            said.append(
                f"DPO's score gain, {goal:+.3f} after {end:.0f} s, SPO has after {took:.0f} s of "
                f"training ({took / end:.2f} of DPO's); with what stands before it after "
                f"{whole:.0f} s of {dpo.before + end:.0f} s ({whole / (dpo.before + end):.2f})."
            )
    return said


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Score gain against seconds, a line per run; dashed: with what stands before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in rows if row.spent.curve]
    names = list(dict.fromkeys(row.name for row in rows))
    for row in rows:
        times, gains = zip((0.0, 0.0), *row.spent.curve, strict=True)
        colour = f"C{names.index(row.name)}"
        axis.plot(times, gains, color=colour, marker=".", label=row.name)
        if row.spent.before:
            late = [row.spent.before + t for t in times]
            said = f"{row.name}, with what stands before it"
            axis.plot(late, gains, color=colour, marker=".", linestyle="--", label=said)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(xlabel="seconds of training", ylabel="score gain over the base")
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # once per name
    axis.legend(found.values(), found.keys(), fontsize=8)
    figure.savefig(path, dpi=110)
