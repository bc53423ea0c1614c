"""The step-wise resampler: candidates of a step, judged by what they become, best against worst.

Step-aware preference optimisation, arXiv 2406.04314. At x_t one prediction gives k candidates
x_r = mean + sigma z_j. The network runs on each at r: that gives the x0-hat by which it is judged,
and the prediction that the next step starts from, so nothing runs twice. One candidate, drawn
uniformly, goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..loss.oracle import SPO, normal, uniform
from .grid import Step

# (noisy [N, ...], t [N], cond [N, ...]) -> prediction [N, ...] float
Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
# (x0-hat [N, ...], the prompts' rows [N], t) -> scores [N] float64
Score = Callable[[Tensor, list[int], float], Tensor]
MOST_DRAWS = 2**28  # of a prompt: what a counter of draws holds


class Transition(NamedTuple):
    """One step of a winner and of a loser, for training; on the CPU, float32.

    x: [1, ...] where both begin at the same x_t, else [2, ...], winner first. y: [2, ...], the
    predictions that would have led to them. gap: softmax of their scores, winner's less loser's.
    """

    step: int
    row: int  # of the prompt
    x: Tensor
    y: Tensor
    gap: float


@dataclass
class Rolled:
    """What one batch of prompts gave.

    kept: of each step how many groups of candidates were; judged: of all steps. network: rows that
    it was asked for; decodes: samples that were judged; scores: their sum; seconds: of it all.
    """

    transitions: list[Transition] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    judged: int = 0
    network: int = 0
    decodes: int = 0
    scores: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """How candidates are made and judged.

    candidates: k. first_step: earlier steps make none. rollout_steps: steps that each candidate is
    rolled before it is judged; every one of them trains. threshold: a pair is kept where softmax of
    its two scores differs by more. rows: the network is asked for at once; None: all.
    Raises ValueError where no step could make a pair.
    """

    steps: list[Step]
    candidates: int = 4
    first_step: int = 0
    rollout_steps: int = 1
    threshold: float = 0.3
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not any(map(self.trains, range(len(self.steps)))):
            raise ValueError(
                f"no step from first_step {self.first_step} of {len(self.steps)} has noise "
                "(sigma > 0), so all candidates would be the same: expected eta above 0, and an "
                "sde_window that reaches beyond first_step"
            )

    def trains(self, i: int) -> bool:
        """Whether step i makes candidates: sigma = 0 would make them all the same."""
        return i >= self.first_step and self.steps[i].sigma > 0

    @property
    def draws(self) -> int:
        """Of a prompt and epoch: the start's, then of each step its candidates' and its choice."""
        return 1 + len(self.steps) * (self.candidates + 1)

    @torch.no_grad()
    def roll(
        self,
        predict: Predict,
        score: Score,
        shape: Sequence[int],
        ids: Tensor,
        cond: dict[str, Tensor],
        epochs: Tensor,
    ) -> Rolled:
        """Trajectories of prompts from noise to the last step that trains.

        They run on the device of cond [P, ...]. Every draw is a function of (seed, id, epoch) and
        of its place in the trajectory alone.

        ids, epochs: [P] int64. shape: of one sample's latents.
        Raises ValueError after more epochs than there are draws, FloatingPointError where a
        candidate is not finite.
        """
        out, steps, k, count = Rolled(), self.steps, self.candidates, len(ids)
        if (int(epochs.max()) + 1) * self.draws > MOST_DRAWS:
            raise ValueError(f"epoch {int(epochs.max())}: a prompt has {MOST_DRAWS} draws in all")
        device = next(iter(cond.values())).device
        ids, first = ids.to(device), epochs.to(device) * self.draws
        elements = torch.Size(shape).numel()

        def normals(rows: Tensor, slot: Tensor | int) -> Tensor:
            return normal(self.seed, ids[rows], first[rows] + slot, elements, SPO).view(-1, *shape)

        def ask(x: Tensor, i: int, rows: Tensor) -> Tensor:
            out.network += len(rows)
            said = []
            for part in torch.arange(len(rows), device=device).split(self.rows or len(rows)):
                t = torch.full_like(rows[part], steps[i].t, dtype=torch.float32)
                of = {name: value[rows[part]] for name, value in cond.items()}
                said.append(predict(x[part], t, of).float())
            return torch.cat(said)

        alone = torch.arange(count, device=device)
        every, member = alone.repeat_interleave(k), torch.arange(k, device=device).repeat(count)
        x = normals(alone, 0)
        pred, i = ask(x, 0, alone), 0
        last = max(filter(self.trains, range(len(steps))))
        while i <= last:  # what comes after nobody looks at
            length = self._length(i)
            if not length:
                z = normals(alone, self._slot(i)) if steps[i].sigma else None
                x, i = steps[i].take(x, pred, z), i + 1
                pred = ask(x, i, alone) if i < len(steps) else pred
                continue
            begin, path = i, []
            x, pred = x[every], pred[every]
            for i in range(begin, begin + length):
                z = normals(every, self._slot(i) + member)
                path.append((i, x, steps[i].implied(pred, z)))
                x = steps[i].take(x, pred, z)
                if i + 1 < len(steps):
                    pred = ask(x, i + 1, every)
            i += 1
            end = i == len(steps)
            clean, t = (x, 0.0) if end else (steps[i].clean(x, pred), steps[i].t)
            if not clean.isfinite().all():
                raise FloatingPointError(f"step {i} of {len(steps)}: a candidate is not finite")
            scores = score(clean, every.tolist(), t).cpu().view(count, k)
            self._keep(out, path, scores, begin)
            u = uniform(self.seed, ids, first + self._slot(begin) + k, SPO)
            chosen = k * alone + (u * k).long().clamp(max=k - 1)
            x, pred = x[chosen], pred[chosen]
        return out

    def _slot(self, i: int) -> int:
        """The first draw of step i."""
        return 1 + i * (self.candidates + 1)

    def _length(self, i: int) -> int:
        """How many steps candidates made at step i are rolled."""
        ahead = range(i, min(i + self.rollout_steps, len(self.steps)))
        return next((n for n, j in enumerate(ahead) if not self.trains(j)), len(ahead))

    def _keep(
        self, out: Rolled, path: list[tuple[int, Tensor, Tensor]], scores: Tensor, begin: int
    ) -> None:
        """Adds the pairs whose scores [P, k] tell best from worst."""
        count, k = scores.shape
        out.decodes += scores.numel()
        out.judged += count
        out.scores += scores.sum().item()
        best, worst = scores.argmax(1), scores.argmin(1)
        gaps = torch.tanh((scores.amax(1) - scores.amin(1)) / 2)
        kept = (gaps > self.threshold).nonzero().flatten().tolist()
        out.kept[begin] = len(kept)
        for p in kept:
            both = [p * k + int(best[p]), p * k + int(worst[p])]
            for i, x, y in path:
                begins = both[:1] if i == begin else both
                out.transitions.append(
                    Transition(i, p, x[begins].cpu(), y[both].cpu(), gaps[p].item())
                )
