"""How several processes share a step: which batches, members and tokens are whose, and the sum of
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import ranks

T = TypeVar("T")


def sum_gradients(parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Each parameter's gradient becomes its sum over all processes, by one reduction of one flat
    buffer in `dtype`. Sharded ones are left out: FSDP has reduced them. All processes must have
    gradients of the same parameters.
    """
    if ranks.world() == 1:
        return
    from torch.distributed.tensor import DTensor

    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    counts = ranks.gathered(sum(grad.numel() for grad in grads))
    if len(set(counts)) > 1:
        raise RuntimeError(f"gradients of {counts} elements, by rank: expected the same on all")
    if not grads:
        return
    flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    # In place: a recorded optimiser reads them where they are.
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])


@dataclass(frozen=True)
class Mesh:
    """data x pair x context: how the processes share a step. Neighbours work on one batch: members
    of its pairs (2: winners and losers apart), and within a member parts of the sequence.
    """

    members: int = 1
    contexts: int = 1

    def __post_init__(self) -> None:
        each = self.members * self.contexts
        if ranks.world() % each:
            raise ValueError(
                f"{ranks.world()} processes, expected a multiple of {each}: so many share a batch "
                "(pair_mode split 2, times ulysses_degree, times ring_degree)"
            )

    @property
    def shares(self) -> int:
        """Of a step's batches."""
        return ranks.world() // (self.members * self.contexts)

    def batches(self, every: int) -> int:
        """Of a step's `every`, how many are this process's. ValueError: no even share."""
        if every % self.shares:
            each = self.members * self.contexts
            raise ValueError(
                f"gradient_accumulation_steps {every}: expected a multiple of {self.shares}; it is "
                f"the batches of a step of all {ranks.world()} processes together, not of each"
                + (f", and {each} processes share a batch" if each > 1 else "")
            )
        return every // self.shares

    @property
    def share(self) -> int:
        """Which of them is this process's."""
        return ranks.rank() // (self.members * self.contexts)

    def dealt(self, items: Sequence[T]) -> Sequence[T]:
        """Those of this process's share, every one of which some process has."""
        return items[self.share :: self.shares]

    @property
    def member(self) -> int:
        """0: winners, 1: losers, where they are apart."""
        return ranks.rank() // self.contexts % self.members

    @property
    def context(self) -> int:
        return ranks.rank() % self.contexts

    @property
    def counts(self) -> bool:
        """Whether this process counts its batches: one of those that share a batch."""
        return self.member == 0 and self.context == 0

    def exchange(self) -> Callable[[Tensor], Tensor]:
        """values [n] -> [2, n], the winners' and the losers', of the two processes that have the
        members of one batch.
        """
        winners = ranks.rank() - self.member * self.contexts
        pair = [winners, winners + self.contexts]
        group = dist.new_group(pair, use_local_synchronization=True)  # all would make all groups

        def exchanged(values: Tensor) -> Tensor:
            both = [torch.empty_like(values) for _ in range(2)]
            dist.all_gather(both, values, group=group)
            return torch.stack(both)

        return exchanged
