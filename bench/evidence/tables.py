"""The page of a comparison, made from its rows alone: tables and verdicts, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from statistics import mean as average

from bench.evidence.claims import Claim, claims
from bench.evidence.grid import CONTROLS, LONGER, SAFEGUARD
from bench.evidence.intervals import RESAMPLES, difference, mean
from bench.evidence.results import Results, Setting
from bench.paper import head, row
from fastpref.look.evaluate import Interval


def signed(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def percent(found: Interval) -> str:
    value, low, high = (100 * x for x in found)
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def plain(found: Interval) -> str:
    value, low, high = ("never" if isinf(x) else f"{x:.2f}" for x in found)
    return f"{value} [{low}, {high}]"


def share(found: Interval) -> str:
    """Of what lies between 0 and 1, which a seed's stretched part may leave."""
    return plain(Interval(found.value, max(0.0, found.low), min(1.0, found.high)))


def named(setting: Setting) -> str:
    return f"{setting} (control)" if setting.name in CONTROLS else str(setting)


def chosen_table(results: Results) -> list[str]:
    """A line for each objective at the setting that was chosen."""
    lines = head(
        "objective",
        "win rate over the base",
        "score gain",
        "over dpo's gain",
        "winner's error",
        "loser's error",
        "s/pair",
        "seeds",
    )
    for name in results.ordinary():
        best = results.chosen(name)
        lead = "-"
        if name != "dpo" and "dpo" in results.names and (seeds := results.seeds(name, "dpo")):
            dpo = results.gains(results.chosen("dpo"), seeds)
            lead = signed(difference(results.gains(best, seeds), dpo))
        taken = average(r["seconds_per_pair"] for r in results.rows(best))
        cells = (
            share(mean(results.wins(best))),
            signed(mean(results.gains(best))),
            lead,
            percent(results.error(best, 0)),
            percent(results.error(best, 1)),
            f"{taken:.4f}",
            len(results.seeds(name)),
        )
        lines.append(row(named(best), *cells))
    return lines


def beta_table(results: Results) -> list[str]:
    """Score gain and winner's error at every beta, the chosen one in bold."""
    lines = head("objective", "score gain and winner's error at beta ...")
    for name in results.ordinary():
        best, settings = results.chosen(name), results.settings(name)
        for alpha in sorted({s.alpha for s in settings}, key=lambda a: a or 0):
            cells = []
            for s in (s for s in settings if s.alpha == alpha and s.beta is not None):
                gain, error = results.gains(s).mean().item(), 100 * results.winner_error(s)
                cell = f"{s.beta:g}: {gain:+.3f}, {error:+.1f} %"
                cells.append(f"**{cell}**" if s == best else cell)
            if cells:
                shown = name if alpha is None else f"{name}, alpha {alpha:g}"
                lines.append(row(shown, "; ".join(cells)))
    return lines


def claim_table(found: Sequence[Claim]) -> list[str]:
    lines = head("claim", "verdict", "interval", "of")
    for claim in found:
        shown = "-"
        if claim.found is not None:
            shown = (signed if claim.edge == 0 else plain)(claim.found)
        aside = ""
        if claim.below or claim.edge:
            aside = f" (claimed: {'below' if claim.below else 'above'} {claim.edge:g})"
        lines.append(row(claim.said, f"**{claim.verdict}**", shown, claim.measured + aside))
    return lines


def markdown(results: Results, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """All of a comparison. pictures: what they show, and where they are."""
    found = claims(results)
    judged = [claim for claim in found if claim.found is not None]
    parts = [
        _setting(results),
        "\n".join(claim_table(found)),
        _legend(results, len(judged)),
        "\n".join(chosen_table(results)),
        "\n".join(beta_table(results)),
        *(f"![{said}]({where})" for said, where in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(results: Results) -> str:
    """How much was run, where."""
    base, runs = results.base, [r for each in results.runs.values() for r in each.values()]
    where = sorted({(r["device"], r["torch"], r["threads"], r["commit"]) for r in runs})
    each = [f"{d}, torch {t}, {n} thread{'s' * (n > 1)}, commit {c}" for d, t, n, c in where]
    seeds = sorted({len(results.seeds(name)) for name in results.names}, reverse=True) or [0]
    many = "" if seeds == [1] else "s"
    clips = {which: len(base["prompts"][which]) for which in ("choice", "report")}
    return (
        f"{len(runs)} run{'s' * (len(runs) != 1)} of {base['steps']} steps on {base['pairs']} "
        f"pairs ({' or '.join(map(str, seeds))} seed{many} a setting), {clips['choice']} clips to "
        f"choose on and {clips['report']} to report on: {'; '.join(each)}."
    )


def _legend(results: Results, judged: int) -> str:
    runs = [r for each in results.runs.values() for r in each.values()]
    alone = all(r["threads"] == 1 and not r["cuda"] for r in runs)
    seconds = "the process's own time" if alone else "wall time"
    lost = ""
    if results.diverged:
        lost = f" Diverged, so never chosen: {'; '.join(map(str, results.diverged))}."
    return (
        "A verdict is what a 95 % interval over prompts and seeds says: it lies wholly on the "
        "claimed side, wholly on the other, or on both. It is a bootstrap of both with Student's "
        f"factor ({RESAMPLES:,} resamples, `bench/evidence/intervals.py`; of errors over held-out "
        "pairs and seeds), nominal: with 3 seeds and 12 prompts it held the truth in 93 to 100 % "
        "of simulations. Base model, pairs and judge are the same in all runs: of others it says "
        f"nothing. {judged} intervals are read here and none is corrected for that: one in twenty "
        "may err by chance. Each objective stands at the beta (and alpha) with the highest score "
        "gain on the choice prompts; everything else is of the report prompts. Safeguard: mu "
        f"{SAFEGUARD:g}. `_long`: {LONGER} times the steps. Seconds are {seconds}.{lost}"
    )
