"""What the papers claim, beside what the rows show, judged by 95 % intervals alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean as average

import torch
from torch import Tensor

from bench.evidence.grid import LONG
from bench.evidence.intervals import difference, interval, mean
from bench.evidence.results import Results, Setting
from fastpref.look.evaluate import Interval

FIFTH = 0.2  # of DPO's time SPO's paper claims for SD1.5 (a twentieth for SDXL)


@dataclass(frozen=True)
class Claim:
    """said: what is claimed; measured: the number that `found` is an interval of, and its unit.

    It is claimed to lie above `edge`, or below it. found is None where the rows lack runs; of one
    seed alone it says nothing of others, and nothing is judged.
    """

    said: str
    measured: str
    found: Interval | None
    seeds: int
    edge: float = 0.0
    below: bool = False

    @property
    def verdict(self) -> str:
        """By which side of the edge all of the interval lies on."""
        if self.found is None:
            return "not run"
        if self.seeds < 2:
            return "cannot be told here"
        above, under = self.found.low > self.edge, self.found.high < self.edge
        if under if self.below else above:
            return "holds"
        if above if self.below else under:
            return "does not hold"
        return "cannot be told here"


def claims(results: Results) -> list[Claim]:
    return [
        *_over_dpo(results),
        *_sensitivity(results),
        *_collapse(results),
        *_dmpo_optimum(results),
        *_spo(results),
        *_safeguard(results),
        *_controls(results),
    ]


def _seeds(results: Results, *names: str) -> list[int]:
    """That all the names have; none where one of them was not run."""
    return results.seeds(*names) if set(names) <= set(results.names) else []


def _lead(results: Results, said: str, one: str, other: str, below: bool = False) -> Claim:
    """Of one name's chosen setting over the other's, in score."""
    found = None
    if seeds := _seeds(results, one, other):
        mine, its = (results.gains(results.chosen(name), seeds) for name in (one, other))
        found = difference(mine, its)
    return Claim(said, f"score gain of {one} less that of {other}", found, len(seeds), below=below)


def _over_dpo(results: Results) -> Iterator[Claim]:
    yield _lead(results, "DPO-C&M is better than DPO", "dpo_cm", "dpo")
    yield _lead(results, "the same, the weight on the loss", "dpo_cm_loss", "dpo")
    yield _lead(results, "SDPO is better than DPO", "sdpo", "dpo")
    yield _lead(results, "the same, the weight in the ratio", "sdpo_ratio", "dpo")
    yield _lead(results, "DMPO is better than DPO", "dmpo", "dpo")
    placed = "the weight does more in the ratio than on the loss"
    yield _lead(results, f"{placed}: C&M", "dpo_cm", "dpo_cm_loss")
    yield _lead(results, f"{placed}: SDPO", "sdpo_ratio", "sdpo")


def regret(means: Tensor, best: int) -> Tensor:
    """Share of the best beta's gain that is lost on average over the betas, from [..., betas]."""
    return 1 - means.mean(-1) / means[..., best]


def _sensitivity(results: Results) -> Iterator[Claim]:
    for name, shown in (("dpo_cm", "DPO-C&M"), ("sdpo", "SDPO")):
        found = None
        if seeds := _seeds(results, "dpo", name):
            tables, best, count = [], [], []
            for each in (name, "dpo"):
                settings = results.settings(each)
                best.append(settings.index(results.chosen(each)))
                count.append(len(settings))
                tables += [results.gains(s, seeds) for s in settings]

            def less(m: Tensor, n: int = count[0], best: list[int] = best) -> Tensor:
                return regret(m[..., :n], best[0]) - regret(m[..., n:], best[1])

            found = interval(less, tables)
        measured = (
            f"share of the chosen beta's gain lost on average over the betas, {name} less dpo"
        )
        said = f"{shown} is less sensitive to beta than DPO"
        yield Claim(said, measured, found, len(seeds), below=True)


def _collapse(results: Results) -> Iterator[Claim]:
    """From an ordinary run's number of steps to a long run's end, at each beta of long runs."""
    betas = {s.beta for name in LONG for s in results.settings(name)}
    for beta in sorted(betas, reverse=True):
        at = f", at beta {beta:g}"
        dpo = Setting("dpo_long", beta, None)
        for name, shown in (("dpo", "DPO"), ("dpo_cm", "DPO-C&M"), ("sdpo", "SDPO")):
            long = Setting(f"{name}_long", beta, None)
            seeds = sorted(results.runs.get(long, {}))
            found = mean(_late(results, long, seeds)) if seeds else None
            measured = f"score from a quarter of {long.name} to its end{at}"
            if name == "dpo":
                yield Claim("DPO collapses late", measured, found, len(seeds), below=True)
                continue
            yield Claim(f"{shown} does not collapse late", measured, found, len(seeds))
            seeds = sorted({*seeds} & results.runs.get(dpo, {}).keys())
            found = None
            if seeds:
                found = difference(*(_late(results, s, seeds) for s in (long, dpo)))
            measured = f"that change of {long.name} less that of dpo_long{at}"
            yield Claim(f"{shown} keeps more late than DPO", measured, found, len(seeds))


def _late(results: Results, setting: Setting, seeds: list[int]) -> Tensor:
    """[seeds, prompts]: gain at the end less gain at a quarter of the steps."""
    curve, rows = results.curve(setting, seeds), results.rows(setting, seeds)
    steps = [point["step"] for point in rows[0]["curve"]]
    quarter = min(range(len(steps)), key=lambda i: abs(steps[i] - steps[-1] / 4))
    return curve[-1] - curve[quarter]


def _dmpo_optimum(results: Results) -> Iterator[Claim]:
    for axis in ("alpha", "beta"):
        found, said = None, f"DMPO's best {axis} lies inside the grid"
        edges = _edges(results, axis)
        if edges:
            inside, *outer = [results.gains(s) for s in edges]
            found = interval(lambda m: m.min(-1).values, [inside - outer_ for outer_ in outer])
        measured = f"score gain of the best {axis} inside less that of the better edge"
        yield Claim(said, measured, found, len(_seeds(results, "dmpo")))


def _edges(results: Results, axis: str) -> list[Setting]:
    """The best of dmpo's settings inside the grid along an axis, then at its lowest and highest
    value, chosen on the choice prompts; empty where there is no inside.
    """
    if "dmpo" not in results.names:
        return []
    settings = results.settings("dmpo")
    values = sorted({getattr(s, axis) for s in settings})
    if len(values) < 3:
        return []
    groups: list[Callable[[Setting], bool]] = [
        lambda s: values[0] < getattr(s, axis) < values[-1],
        lambda s: getattr(s, axis) == values[0],
        lambda s: getattr(s, axis) == values[-1],
    ]
    return [max(filter(inside, settings), key=results.choice_gain) for inside in groups]


def reached(goal: Tensor, gains: Tensor, seconds: Tensor) -> Tensor:
    """Seconds to a gain [...], on straight lines through 0 and the points [..., P]; inf: never."""
    zero = torch.zeros_like(goal)
    found = torch.full_like(goal, torch.inf)
    before, since = zero, zero
    for gain, second in zip(gains.unbind(-1), seconds.unbind(-1), strict=True):
        share = ((goal - before) / (gain - before)).clamp(0, 1)
        here = torch.where(gain >= goal, since + share * (second - since), torch.inf)
        found = torch.minimum(found, here)
        before, since = gain, second
    return found


def _spo(results: Results) -> Iterator[Claim]:
    yield _lead(results, "SPO is better than DPO", "spo", "dpo")
    alone = whole = own = None
    if seeds := _seeds(results, "spo", "dpo"):
        spo, dpo = results.chosen("spo"), results.chosen("dpo")
        alone = _share_of_time(results, spo, dpo, seeds)
        whole = _share_of_time(results, spo, dpo, seeds, whole=True)
        own = _share_of_time(results, dpo, spo, seeds)
    measured, many = "seconds of spo to dpo's final gain, over dpo's", len(seeds)
    loops = f"{measured}; loops alone"
    before = f"{measured}; with pairs, ranked clips and the preference model"
    yield Claim("SPO takes less time to DPO's gain", loops, alone, many, 1.0, True)
    yield Claim("the same, with what stands before", before, whole, many, 1.0, True)
    yield Claim("SPO takes at most a fifth of DPO's time", loops, alone, many, FIFTH, True)
    measured = "seconds of dpo to spo's final gain, over spo's; loops alone"
    yield Claim("DPO takes more time to SPO's gain", measured, own, many, 1.0)


def _share_of_time(
    results: Results, one: Setting, other: Setting, seeds: list[int], whole: bool = False
) -> Interval:
    """Seconds of one to the other's final gain, over the other's. whole: with what stands before
    both loops.
    """
    before = [
        average(r["before"] for r in results.rows(s, seeds)) if whole else 0.0 for s in (one, other)
    ]
    goal = results.gains(other, seeds)
    curve = results.curve(one, seeds)
    times = [*results.seconds(one, seeds), results.seconds(other, seeds)[-1]]
    tables = [goal, *curve, *(t[:, None].expand_as(goal) for t in times)]
    points = len(curve)

    def share(m: Tensor) -> Tensor:
        took = reached(m[..., 0], m[..., 1 : points + 1], m[..., points + 1 : -1])
        return (before[0] + took) / (before[1] + m[..., -1])

    return interval(share, tables)


def _safeguard(results: Results) -> Iterator[Claim]:
    name, rise, cost, kept = "dpo_safeguard", None, None, None
    if seeds := _seeds(results, "dpo", name):
        both = [s for s in results.settings(name) if Setting("dpo", s.beta, None) in results.runs]
        plain = [Setting("dpo", s.beta, None) for s in both]
        base = results.base_errors(0).expand(len(seeds), -1)

        def mean_errors(some: list[Setting]) -> Tensor:
            return torch.stack([results.errors(s, 0, seeds) for s in some]).mean(0)

        rise = interval(
            lambda m: (m[..., 0] - m[..., 1]) / m[..., 2],
            [mean_errors(both), mean_errors(plain), base],
        )
        gains = [
            torch.stack([results.gains(s, seeds) for s in some]).mean(0) for some in (both, plain)
        ]
        cost = difference(*gains)
        kept = results.error(results.chosen(name), 0)
    yield Claim(
        "the safeguard keeps winners better than DPO",
        "winner's error over the base's, dpo_safeguard less dpo, mean over equal betas",
        rise,
        len(seeds),
        below=True,
    )
    yield Claim(
        "with it the winner's error does not rise",
        "winner's error over the base's, dpo_safeguard at its chosen beta",
        kept,
        len(seeds),
        below=True,
    )
    measured = "score gain of dpo_safeguard less that of dpo, mean over equal betas"
    yield Claim("it costs gain at equal beta", measured, cost, len(seeds), below=True)
    yield _lead(results, "it costs gain at the betas chosen", name, "dpo", below=True)


def _controls(results: Results) -> Iterator[Claim]:
    yield _lead(results, "control: DPO is better than SFT", "dpo", "sft")
    window = "control: the weight does more than a window of noise levels"
    yield _lead(results, f"{window}: C&M", "dpo_cm", "dpo_windowed")
    yield _lead(results, f"{window}: SDPO", "sdpo", "dpo_windowed")
    found = None
    if seeds := _seeds(results, "dpo", "dpo_shuffled"):
        (shuffled,) = results.settings("dpo_shuffled")
        equal = Setting("dpo", shuffled.beta, None)
        if equal in results.runs:
            found = difference(results.gains(equal, seeds), results.gains(shuffled, seeds))
    measured = "score gain of dpo less that of dpo_shuffled, at equal beta"
    yield Claim("control: the labels do the work", measured, found, len(seeds))
