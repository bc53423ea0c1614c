"""The resampler on a network that is a formula: what runs, what is kept, what goes on."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from fastpref import FlowMatching
from fastpref.loss import oracle
from fastpref.process import from_config
from fastpref.spo import resampler
from fastpref.spo.grid import network_times, steps
from fastpref.spo.resampler import MOST_DRAWS, Resampler

SHAPE = (2, 1, 3, 3)
SD = {
    **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1},
    **{"beta_start": 0.00085, "beta_end": 0.012},
}


class Network:
    """A prediction that depends on all that it is given; counts what it is asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        self.calls.append((round(float(t[0]), 3), len(x)))
        return (
            torch.tanh(x) + 0.1 * cond["text"].view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1) / 2000
        )


class Judge:
    """The mean of x0-hat is its score; remembers what it saw."""

    def __init__(self, scale=50.0):
        self.scale, self.seen = scale, []

    def __call__(self, clean, rows, t):
        self.seen.append((t, clean.clone(), rows))
        return self.scale * clean.double().flatten(1).mean(1)


def grid(count=6, flow=True, **how):
    if flow:
        process = FlowMatching(shift=2.0)
        return steps(process, network_times(process, {}, count), **how)
    process = from_config(SD)
    return steps(process, network_times(process, SD, count), **how)


def roll(sampler, prompts=3, network=None, judge=None, ids=None, epochs=None):
    ids = torch.arange(prompts) * 7_000_003 + 5 if ids is None else ids
    cond = {"text": (ids % 11).float()}
    epochs = torch.zeros(len(ids), dtype=torch.int64) if epochs is None else epochs
    return sampler.roll(network or Network(), judge or Judge(), SHAPE, ids, cond, epochs)


def same(a, b):
    return (a.step, a.gap) == (b.step, b.gap) and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


@pytest.mark.parametrize("flow", [True, False])
def test_nothing_runs_twice(flow):
    network, judge = Network(), Judge()
    sampler = Resampler(steps=grid(6, flow), candidates=3, first_step=2, threshold=0.0)
    out = roll(sampler, 4, network, judge)
    times = [step.t for step in sampler.steps]
    # Steps that make no pairs ask once a prompt; each later time once a candidate.
    wanted = [4, 4, 4, 12, 12, 12]
    assert network.calls == [(round(t, 3), n) for t, n in zip(times, wanted, strict=True)]
    trains = [2, 3, 4] if flow else [2, 3, 4, 5]  # flow's last step has no noise
    assert [t for t, _, _ in judge.seen] == [times[i + 1] if i < 5 else 0.0 for i in trains]
    assert out.network == 4 * 3 + 12 * 3 and out.decodes == 12 * len(trains)
    assert out.judged == 4 * len(trains) and sum(out.kept.values()) == len(out.transitions)
    assert list(out.kept) == trains and len(out.transitions) == out.judged, "threshold 0 keeps all"
    total = sum(50.0 * clean.double().mean((1, 2, 3, 4)).sum().item() for _, clean, _ in judge.seen)
    assert out.scores == pytest.approx(total)


def test_the_last_step_is_judged_as_it_is_at_t_0():
    judge = Judge()
    sampler = Resampler(steps=grid(6, False), candidates=2, first_step=5, threshold=0.0)
    out = roll(sampler, 2, judge=judge)
    ((t, finished, rows),) = judge.seen
    step = sampler.steps[5]
    assert t == 0.0 and rows == [0, 0, 1, 1]
    for each in out.transitions:
        best, worst = (step.take(each.x[0], y, None) for y in each.y)
        own = finished[2 * each.row : 2 * each.row + 2]
        order = own.flatten(1).mean(1).argsort(descending=True)
        torch.testing.assert_close(best, own[order[0]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(worst, own[order[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flow", [True, False])
def test_best_stands_against_worst_of_what_one_prediction_gave(flow):
    judge = Judge(3.0)
    sampler = Resampler(steps=grid(5, flow), candidates=4, threshold=0.2)
    out = roll(sampler, 6, judge=judge)
    assert 0 < len(out.transitions) < out.judged
    for each in out.transitions:
        step, after = sampler.steps[each.step], sampler.steps[each.step + 1 :]
        assert len(each.x) == 1 and each.gap > 0.2
        text = {"text": torch.tensor([(each.row * 7_000_003 + 5) % 11]).float()}
        pred = Network()(each.x, torch.tensor([step.t]), text)
        scores = []
        for y in each.y:
            z = (y - pred[0]) / (step.sigma / step.on_pred)
            assert 0.5 < z.std() < 1.8, "a candidate is the mean plus sigma times unit noise"
            x_r = step.take(each.x[0], y, None)[None]
            if after:
                x_r = after[0].clean(x_r, Network()(x_r, torch.tensor([after[0].t]), text))
            scores.append(3.0 * x_r.double().mean().item())
        assert math.tanh((scores[0] - scores[1]) / 2) == pytest.approx(each.gap, abs=1e-3)


def test_draws_are_of_the_prompt_alone():
    """Whatever else is in the batch, in whatever order, and however many rows run at once."""
    sampler = Resampler(steps=grid(5), candidates=3, threshold=0.0)
    chunked = Resampler(steps=grid(5), candidates=3, threshold=0.0, rows=2)
    ids = torch.tensor([3, 2**62 + 1, 40])
    epochs = torch.tensor([0, 1, 0])
    together = roll(sampler, ids=ids, epochs=epochs)
    again = roll(chunked, ids=ids.flip(0), epochs=epochs.flip(0))
    for row in range(3):
        alone = roll(sampler, ids=ids[row : row + 1], epochs=epochs[row : row + 1]).transitions
        mine = [t for t in together.transitions if t.row == row]
        flipped = [t for t in again.transitions if t.row == 2 - row]
        assert len(alone) == 4
        for a, b, c in zip(mine, alone, flipped, strict=True):
            assert same(a, b._replace(row=row)) and same(a, c._replace(row=row))
    other = roll(sampler, ids=ids, epochs=epochs + 1)
    reseeded = roll(Resampler(steps=grid(5), candidates=3, threshold=0.0, seed=1), ids=ids)
    for changed in (other, reseeded):
        assert not torch.equal(changed.transitions[0].y, together.transitions[0].y)


@pytest.mark.parametrize(
    "how",
    [
        {"steps": grid(5)},
        {"steps": grid(5), "first_step": 2},
        {"steps": grid(7), "rollout_steps": 3},
        {"steps": grid(6, flow=False), "rollout_steps": 2, "first_step": 1},
    ],
)
def test_no_number_is_drawn_twice(how, monkeypatch):
    """Of start, steps without pairs, candidates and choices, of two epochs: each its own draw."""
    seen = []

    def recorded(real):
        def draw(seed, ids, index, *more):
            seen.extend(zip(ids.tolist(), index.tolist(), strict=True))
            return real(seed, ids, index, *more)

        return draw

    for name in ("normal", "uniform"):
        monkeypatch.setattr(resampler, name, recorded(getattr(resampler, name)))
    sampler = Resampler(candidates=3, threshold=0.0, **how)
    for epoch in range(2):
        roll(sampler, 2, epochs=torch.full((2,), epoch))
    assert len(set(seen)) == len(seen)
    length, k = len(sampler.steps), sampler.candidates
    assert len(seen) > 2 * 2 * k * (length - sampler.first_step - 2)


def test_a_step_without_pairs_takes_the_noise_of_its_own_draw():
    sampler = Resampler(steps=grid(4), candidates=2, first_step=2, threshold=0.0)
    out = roll(sampler, 1, network=lambda x, t, cond: torch.zeros_like(x))
    ids, place = torch.tensor([5]), torch.zeros(1, dtype=torch.int64)

    def normals(slot):
        return oracle.normal(0, ids, place + slot, 18, oracle.SPO).view(1, *SHAPE)

    x = normals(0)
    for i in range(2):
        x = sampler.steps[i].take(x, torch.zeros(()), normals(1 + 3 * i))
    torch.testing.assert_close(out.transitions[0].x, x)


def test_one_candidate_drawn_uniformly_goes_on():
    """The next step begins at each of the candidates as often as at the others, best or not."""
    network, sampler = Network(), Resampler(steps=grid(3), candidates=3, threshold=0.0)
    seen = []

    def judge(clean, rows, t):
        seen.append(clean)
        return clean.double().flatten(1).mean(1)

    went, prompts = Counter(), 400
    ids = torch.arange(prompts) * 7_000_003 + 5
    out = roll(sampler, prompts, network, judge)
    text = {"text": (ids % 11).float()}
    starts = torch.stack([t.x[0] for t in out.transitions if t.step == 1])
    said = network(starts, torch.full((prompts,), sampler.steps[1].t), text)
    clean = sampler.steps[1].clean(starts, said)
    for row, candidates in enumerate(seen[0].view(prompts, 3, *SHAPE)):
        near = [torch.allclose(clean[row], each, rtol=1e-4, atol=1e-4) for each in candidates]
        went[near.index(True)] += 1
    assert sum(went.values()) == prompts and all(
        abs(n / prompts - 1 / 3) < 0.08 for n in went.values()
    )


def test_rollouts_train_on_every_transition():
    network, judge = Network(), Judge()
    sampler = Resampler(steps=grid(8), candidates=2, first_step=1, rollout_steps=3, threshold=0.0)
    out = roll(sampler, 2, network, judge)
    # 1 2 3 | 4 5 6; step 7 has no noise.
    assert [t for t, _, _ in judge.seen] == [sampler.steps[4].t, sampler.steps[7].t]
    paths = [out.transitions[i : i + 3] for i in range(0, len(out.transitions), 3)]
    assert len(paths) == 4 and list(out.kept) == [1, 4]
    for path in paths:
        assert [len(t.x) for t in path] == [1, 2, 2] and len({t.gap for t in path}) == 1
        for before, after in pairwise(path):
            for member in range(2):
                x = before.x[min(member, len(before.x) - 1)]
                end = sampler.steps[before.step].take(x, before.y[member], None)
                torch.testing.assert_close(end, after.x[member], rtol=1e-4, atol=1e-4)


def test_a_window_makes_pairs_inside_and_is_deterministic_outside():
    def paths(seed):
        network, judge = Network(), Judge()
        sampler = Resampler(
            steps=grid(6, window=(2, 4)), candidates=3, rollout_steps=4, threshold=0.0, seed=seed
        )
        return roll(sampler, 2, network, judge), network.calls

    out, calls = paths(0)
    # The rollout ends with the window, and the trajectory with what it is judged by.
    assert [n for _, n in calls] == [2, 2, 2, 6, 6]
    assert {t.step for t in out.transitions} == {2, 3}


@pytest.mark.parametrize(
    "how", [{"eta": 0.0}, {"window": (0, 1)}], ids=["no noise", "window before first_step"]
)
def test_steps_without_noise_are_refused(how):
    with pytest.raises(ValueError, match="all candidates would be the same: expected eta above 0"):
        Resampler(steps=grid(6, **how), first_step=2)


def test_what_is_not_finite_is_told():
    def network(x, t, cond):
        return x * (math.nan if float(t[0]) < 700 else 1.0)

    with pytest.raises(FloatingPointError, match="a candidate is not finite"):
        roll(Resampler(steps=grid(6)), network=network)


def test_draws_end():
    sampler = Resampler(steps=grid(6))
    last = MOST_DRAWS // sampler.draws
    with pytest.raises(ValueError, match=f"epoch {last}: a prompt has {MOST_DRAWS} draws in all"):
        roll(sampler, 1, epochs=torch.tensor([last]))
