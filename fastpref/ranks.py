"""The processes of one run, as torchrun starts them: which this is, what they tell each other.

Without torchrun there is one process, and every function here is what it is for one. Objects go
through gloo, on the CPU, also where tensors go through nccl.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .files import differences

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """Another process of the run failed, and has said why."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def main() -> bool:
    """Whether this is the process that speaks, and writes what is one for all."""
    return rank() == 0


def local_device() -> str | None:
    """cuda:N, the GPU of this process among several; None: there is one process, or no GPU."""
    import torch

    if world() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', rank())}"


@contextmanager
def group(seconds: float = 1800) -> Iterator[None]:
    """Around a command: the processes that torchrun has started know each other. seconds: that one
    waits for another.
    """
    import torch
    import torch.distributed as dist

    if world() == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
        backend += ",cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Until all are here."""
    if world() > 1:
        gathered(None)


def gathered(value: T) -> list[T]:
    """What every process says, by rank; on all of them."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def by_main(function: Callable[[], T]) -> T:
    """What rank 0 makes of it, told to all. Its error is raised there, and `Elsewhere` here."""
    if world() == 1:
        return function()
    import torch.distributed as dist

    told: list[Any] = [None]
    failure: BaseException | None = None
    if main():
        try:
            told = [("done", function())]
        except BaseException as error:
            failure, told = error, [("failed", str(error))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    how, value = told[0]
    if how == "failed":
        raise Elsewhere(f"rank 0: {value}")
    return value


def on_all(function: Callable[[], T]) -> T:
    """What each process makes of it. Where one fails, all do: it with its error, the others with
    `Elsewhere`. function: without any other exchange of the processes in it.
    """
    if world() == 1:
        return function()
    failure: BaseException | None = None
    try:
        result = function()
    except BaseException as error:
        failure = error
    told = gathered(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for other, text in enumerate(told):
        if text is not None:
            raise Elsewhere(f"rank {other}: {text}")
    return result


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of this process: every world-th from its own."""
    return items[rank() :: world()]


def check_same(what: str, values: dict[str, Any]) -> None:
    """ValueError names the fields in which a process differs from rank 0."""
    every = gathered(values)
    for other, said in enumerate(every):
        listed = differences(every[0], said)
        if listed:
            listed = listed.replace(" there, ", " on rank 0, ")
            listed = listed.replace(" here)", f" on rank {other})")
            raise ValueError(
                f"{what} differs between the processes: {listed}: start all with the same"
            )


@dataclass(frozen=True)
class Mesh:
    """data x pair x context: how the processes share a step. Neighbours work on one batch: members
    of its pairs (2: winners and losers apart), and within a member parts of the sequence.
    """

    members: int = 1
    contexts: int = 1

    def __post_init__(self) -> None:
        each = self.members * self.contexts
        if world() % each:
            raise ValueError(
                f"{world()} processes do not divide by {each} that share a batch (pair_mode split "
                f"takes {self.members}, context parallelism {self.contexts}): start a multiple"
            )

    @property
    def shares(self) -> int:
        """Of a step's batches."""
        return world() // (self.members * self.contexts)

    @property
    def share(self) -> int:
        """Which of them is this process's."""
        return rank() // (self.members * self.contexts)

    @property
    def member(self) -> int:
        """0: winners, 1: losers, where they are apart."""
        return rank() // self.contexts % self.members

    @property
    def context(self) -> int:
        return rank() % self.contexts

    @property
    def counts(self) -> bool:
        """Whether this process counts its batches: one of those that share a batch."""
        return self.member == 0 and self.context == 0
