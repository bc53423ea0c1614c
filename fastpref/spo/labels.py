"""What the preference model is taught: which pairs train, how much each counts, who wins it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import ranks
from ..files import write_atomic, writing
from ..pairs.dataset import Pair, PairDataset

LABELS = "labels.jsonl"


@dataclass(frozen=True)
class Subset:
    """Some pairs of a set, by row: what `pairs.dataset.batches` reads."""

    whole: PairDataset
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Pair:
        return self.whole[self.rows[i]]

    @property
    def shapes(self) -> list[str]:
        return [self.whole.shapes[i] for i in self.rows]


def split(dataset: PairDataset, share: float) -> tuple[list[int], list[int]]:
    """(rows that train, rows held out): about `share` of the prompts, whatever the seed, with all
    of their pairs. ValueError: none is left to train on.
    """
    held = {prompt for prompt in set(dataset.prompts) if _place(prompt) < share}
    rows: tuple[list[int], list[int]] = ([], [])
    for i, prompt in enumerate(dataset.prompts):
        rows[prompt in held].append(i)
    if not rows[0]:
        raise ValueError(
            f"held_out {share:g}: all {len(held)} prompts of {dataset.folder} are held out; "
            "lower it, or add prompts"
        )
    return rows


def _place(prompt: str) -> float:
    """A prompt's place in [0, 1), by its hash."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def example_weights(dataset: PairDataset, rows: list[int]) -> dict[int, float]:
    """By pair id: the pair's own weight / the pairs of its prompt, scaled to a mean of 1 over
    `rows` (not over a batch: in a batch of one it would have no effect).

    Raises:
        ValueError: all are zero.
    """
    counts = Counter(dataset.prompts[i] for i in rows)
    weights = {dataset.pair_ids[i]: dataset.weights[i] / counts[dataset.prompts[i]] for i in rows}
    mean = math.fsum(weights.values()) / len(weights)
    if not mean:
        raise ValueError(f"data {dataset.folder}: every pair has weight 0, so nothing is learned")
    return {i: weight / mean for i, weight in weights.items()}


def given(dataset: PairDataset) -> dict[int, float]:
    """By pair id: the probability that the first is preferred, as the set says: 1, ties 0.5."""
    ties = zip(dataset.pair_ids, dataset.ties, strict=True)
    return {pair_id: 0.5 if tie else 1.0 for pair_id, tie in ties}


def relabelled(
    dataset: PairDataset,
    folder: Path,
    mark: dict[str, Any],
    margin: float,
    judge: Callable[[Pair], float],
) -> dict[int, float]:
    """The same as a model says: 1 or 0; 0.5 where the probabilities of both differ by less than
    `margin`.

    judge: the logit of the first against the second. Logits are kept in the folder's labels.jsonl
    (labels-N.jsonl of process N of several, which share the pairs), so that no pair is judged
    twice. mark: what they hang on; of another one they are left.

    Raises:
        ValueError: a logit is not finite.
    """
    path = folder / (LABELS if ranks.main() else f"labels-{ranks.rank()}.jsonl")
    own = _read(path, mark)
    lines = [json.dumps(mark), *(json.dumps([i, logit]) for i, logit in own.items())]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    ranks.barrier()  # what earlier ones have judged is read once all have kept their own
    known: dict[int, float] = {}
    for found in sorted(folder.glob("labels*.jsonl")):
        known |= _read(found, mark)
    ranks.barrier()
    lacking = [i for i, pair_id in enumerate(dataset.pair_ids) if pair_id not in known]
    own, rows = {}, ranks.share(lacking)
    with writing(path), path.open("a") as file:
        for i in tqdm(rows, desc="labels", unit="pair", disable=None if ranks.main() else True):
            pair = dataset[i]
            logit = judge(pair)
            if not math.isfinite(logit):
                raise ValueError(f"relabel: the score of pair {pair.pair_id} is not finite")
            own[pair.pair_id] = logit
            file.write(json.dumps([pair.pair_id, logit]) + "\n")
            file.flush()
    for said in ranks.gathered(own):
        known |= said
    # p - (1 - p) of p = sigmoid(logit) is tanh(logit / 2).
    return {
        i: 0.5 if abs(math.tanh(known[i] / 2)) < margin else float(known[i] > 0)
        for i in dataset.pair_ids
    }


def _read(path: Path, mark: dict[str, Any]) -> dict[int, float]:
    """The logits by pair id, as far as the file goes that a kill may have cut."""
    found: dict[int, float] = {}
    try:
        first, *lines = path.read_text().splitlines()
        if json.loads(first) != json.loads(json.dumps(mark)):
            return {}
        for line in lines:
            pair_id, logit = json.loads(line)
            found[int(pair_id)] = float(logit)
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return found
