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
COLLAPSE = 0.5  # of the gain at a quarter of the steps is left: less is a collapse
FEWEST = 3  # betas, to say how much one of them matters


@dataclass(frozen=True)
class Claim:
    """said: what is claimed; measured: the number that `found` is an interval of.

    It is claimed to lie above `edge`, or below it. found is None where the rows lack runs. silent:
    why nothing is judged though there is a number.
    """

    said: str
    measured: str
    found: Interval | None
    edge: float = 0.0
    below: bool = False
    silent: str = ""

    @property
    def verdict(self) -> str:
        """By which side of the edge all of the interval lies on."""
        if self.found is None:
            return "not run"
        if self.silent:
            return f"cannot be told here ({self.silent})"
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


def _few(seeds: list[int]) -> str:
    """Of one seed alone nothing is said of others."""
    return "one seed alone" if len(seeds) == 1 else ""


def _no_gain(tables: dict[str, Tensor]) -> str:
    """Which of the gains, by what they are called, is not shown to be above 0: no share of it can
    be taken.
    """
    lacking = [name for name, table in tables.items() if mean(table).low <= 0]
    return f"{lacking[0]} is not shown to gain" if lacking else ""


def _common(results: Results, one: str, other: str) -> tuple[list[Setting], list[Setting]]:
    """The settings of two names at the betas that both have."""
    mine = {s.beta: s for s in results.settings(one)}
    its = {s.beta: s for s in results.settings(other)}
    both = [b for b in mine if b in its]
    return [mine[b] for b in both], [its[b] for b in both]


def _pooled(tables: list[Tensor]) -> Tensor:
    """The mean over settings."""
    return torch.stack(tables).mean(0)


def _lead(results: Results, said: str, one: str, other: str, below: bool = False) -> Claim:
    """Of one name's chosen setting over the other's, in score."""
    found = None
    if seeds := _seeds(results, one, other):
        mine, its = (results.gains(results.chosen(name), seeds) for name in (one, other))
        found = difference(mine, its)
    measured = f"score gain of {one} less that of {other}"
    return Claim(said, measured, found, below=below, silent=_few(seeds))


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
    """At the betas that both have."""
    for name, shown in (("dpo_cm", "DPO-C&M"), ("sdpo", "SDPO")):
        found, silent, seeds = None, "", _seeds(results, "dpo", name)
        mine, its = _common(results, name, "dpo")
        if seeds and len(mine) >= FEWEST:
            best = [some.index(max(some, key=results.choice_gain)) for some in (mine, its)]
            tables = [results.gains(s, seeds) for s in (*mine, *its)]
            top = {name: tables[best[0]], "dpo": tables[len(mine) + best[1]]}
            lost = [s for s in results.diverged if s.name in top]
            silent = f"{lost[0]} diverged" if lost else _few(seeds) or _no_gain(top)

            def less(m: Tensor, n: int = len(mine), best: list[int] = best) -> Tensor:
                return regret(m[..., :n], best[0]) - regret(m[..., n:], best[1])

            found = interval(less, tables)
        said = f"{shown} is less sensitive to beta than DPO"
        measured = f"share of the best beta's gain lost on average over the betas, {name} less dpo"
        yield Claim(said, measured, found, below=True, silent=silent)


def _collapse(results: Results) -> Iterator[Claim]:
    """From an ordinary run's number of steps to a long run's end, at each beta of long runs."""
    betas = {s.beta for name in LONG for s in results.settings(name)}
    for beta in sorted(betas, reverse=True) or [None]:
        dpo = Setting("dpo_long", beta, None)
        for name, shown in (("dpo", "DPO"), ("dpo_cm", "DPO-C&M"), ("sdpo", "SDPO")):
            long = Setting(f"{name}_long", beta, None)
            at = f"{long.name}, beta {beta:g}" if beta is not None else long.name
            found, silent, _ = _left(results, long)
            measured = f"share that is left of the gain at a quarter of the steps, {at}"
            how = {"edge": COLLAPSE, "silent": silent}
            if name == "dpo":
                yield Claim("DPO collapses late", measured, found, below=True, **how)
                continue
            yield Claim(f"{shown} does not collapse late", measured, found, **how)
            found, silent, _ = _left(results, long, dpo)
            yield Claim(
                f"{shown} keeps more late than DPO",
                f"that share of {at} less that of dpo_long",
                found,
                silent=silent,
            )


def _left(
    results: Results, one: Setting, other: Setting | None = None
) -> tuple[Interval | None, str, list[int]]:
    """Gain at the end over gain at a quarter of the steps, less that of another; why it is silent;
    the seeds of both.
    """
    both = [s for s in (one, other) if s is not None]
    seeds = sorted(set.intersection(*({*results.runs.get(s, {})} for s in both)))
    if not seeds:
        return None, "", seeds
    tables, quarters = [], {}
    for setting in both:
        curve, steps = results.curve(setting, seeds), results.steps(setting, seeds)
        quarter = min(range(len(steps)), key=lambda i: abs(steps[i] - steps[-1] / 4))
        tables += [curve[quarter], curve[-1]]
        quarters[setting.name] = curve[quarter]

    def left(m: Tensor) -> Tensor:
        shares = m[..., 1::2] / m[..., ::2]
        return shares[..., 0] - shares[..., 1:].sum(-1)

    return interval(left, tables), _few(seeds) or _no_gain(quarters), seeds


def _dmpo_optimum(results: Results) -> Iterator[Claim]:
    for axis in ("alpha", "beta"):
        found, said = None, f"DMPO's best {axis} lies inside the grid"
        edges = _edges(results, axis)
        if edges:
            inside, *outer = [results.gains(s) for s in edges]
            found = interval(lambda m: m.min(-1).values, [inside - outer_ for outer_ in outer])
        measured = f"score gain of the best {axis} inside less that of the better edge"
        yield Claim(said, measured, found, silent=_few(_seeds(results, "dmpo")))


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
    silent = ["", ""]
    if seeds := _seeds(results, "spo", "dpo"):
        spo, dpo = results.chosen("spo"), results.chosen("dpo")
        alone = _share_of_time(results, spo, dpo, seeds)
        whole = _share_of_time(results, spo, dpo, seeds, whole=True)
        own = _share_of_time(results, dpo, spo, seeds)
        ends = [{str(s.name): results.curve(s, seeds)[-1]} for s in (dpo, spo)]
        silent = [_few(seeds) or _no_gain(end) for end in ends]
    measured = "seconds of spo's run to dpo's final gain, over dpo's"
    loops = f"{measured}; loops alone"
    before = f"{measured}; with pairs, ranked clips and the preference model"
    how = {"below": True, "silent": silent[0]}
    yield Claim("SPO takes less time to DPO's gain", loops, alone, 1.0, **how)
    yield Claim("the same, with what stands before", before, whole, 1.0, **how)
    yield Claim("SPO takes at most a fifth of DPO's time", loops, alone, FIFTH, **how)
    measured = "seconds of dpo's run to spo's final gain, over spo's; loops alone"
    yield Claim("DPO takes more time to SPO's gain", measured, own, 1.0, silent=silent[1])


def _share_of_time(
    results: Results, one: Setting, other: Setting, seeds: list[int], whole: bool = False
) -> Interval:
    """Seconds of one to the other's final gain, over those of the other to it. whole: with what
    stands before both loops.
    """
    before = [
        average(r["before"] for r in results.rows(s, seeds)) if whole else 0.0 for s in (one, other)
    ]
    curves, points = [], []
    for setting in (one, other):
        curve = results.curve(setting, seeds)
        times = [t[:, None].expand_as(curve[0]) for t in results.seconds(setting, seeds)]
        curves += [*curve, *times]
        points.append(len(curve))

    def share(m: Tensor) -> Tensor:
        mine, my_times, its, its_times = m.split(
            [points[0], points[0], points[1], points[1]], dim=-1
        )
        goal = its[..., -1]
        took = before[0] + reached(goal, mine, my_times)
        return took / (before[1] + reached(goal, its, its_times))

    return interval(share, curves)


def _safeguard(results: Results) -> Iterator[Claim]:
    name, rise, cost, kept = "dpo_safeguard", None, None, None
    seeds, (both, plain) = _seeds(results, "dpo", name), _common(results, name, "dpo")
    if seeds and both:
        errors = [_pooled([results.errors(s, 0, seeds) for s in some]) for some in (both, plain)]
        base = results.base_errors(0).expand(len(seeds), -1)
        rise = interval(lambda m: (m[..., 0] - m[..., 1]) / m[..., 2], [*errors, base])
        gains = [_pooled([results.gains(s, seeds) for s in some]) for some in (both, plain)]
        cost = difference(*gains)
    own = _seeds(results, name)
    if own:
        kept = results.error(results.chosen(name), 0)
    measured = "winner's error over the base's, dpo_safeguard less dpo, mean over equal betas"
    said = "the safeguard keeps winners better than DPO"
    yield Claim(said, measured, rise, below=True, silent=_few(seeds))
    measured = "winner's error over the base's, dpo_safeguard at its chosen beta"
    said = "with it the winner's error does not rise"
    yield Claim(said, measured, kept, below=True, silent=_few(own))
    measured = "score gain of dpo_safeguard less that of dpo, mean over equal betas"
    yield Claim("it costs gain at equal beta", measured, cost, below=True, silent=_few(seeds))
    yield _lead(results, "it costs gain at the betas chosen", name, "dpo", below=True)


def _controls(results: Results) -> Iterator[Claim]:
    yield _lead(results, "control: DPO is better than SFT", "dpo", "sft")
    window = "control: the weight does more than a window of noise levels"
    yield _lead(results, f"{window}: C&M", "dpo_cm", "dpo_windowed")
    yield _lead(results, f"{window}: SDPO", "sdpo", "dpo_windowed")
    found, seeds = None, _seeds(results, "dpo", "dpo_shuffled")
    right, shuffled = _common(results, "dpo", "dpo_shuffled")
    if seeds and right:
        gains = [_pooled([results.gains(s, seeds) for s in some]) for some in (right, shuffled)]
        found = difference(*gains)
    measured = "score gain of dpo less that of dpo_shuffled, at equal beta"
    yield Claim("control: the labels do the work", measured, found, silent=_few(seeds))
