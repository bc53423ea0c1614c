"""The processes of one run, as torchrun starts them: which this is, what they tell each other.

Without torchrun there is one process, and every function here is what it is for one. What they tell
each other goes through gloo, by a group of its own, in one kind of exchange (`gathered`): a process
that fails takes part in whichever is next with its failure (`fail`), so nobody waits for it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from .files import differences

T = TypeVar("T")

LEAVE = 120  # seconds at most that a failing process waits for the others, in a long step maybe
GONE = "another process of the run is gone; run the same command to go on"


class Elsewhere(RuntimeError):
    """Another process of the run failed, and has said why. saves: it takes part in a last save."""

    def __init__(self, text: str, saves: bool = False) -> None:
        super().__init__(text)
        self.saves = saves


class Lost(RuntimeError):
    """Another process of the run is gone, or does not come."""


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def main() -> bool:
    """Whether this is the process that speaks, and writes what is one for all."""
    return rank() == 0


def local_device() -> str | None:
    """cuda:N, the GPU of this process among several; None: there is one process, or no GPU."""
    import torch

    if world() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', rank())}"


# ---- The group

_control: Any = None  # its process group
_store: Any = None  # what any of them can write and read, also where one is gone
_seconds = 0.0
_exchanges = 0


@contextmanager
def group(seconds: float = 1800) -> Iterator[None]:
    """Around a command: the processes that torchrun has started know each other. seconds: that one
    waits for another. What fails inside on one is told to the others.
    """
    global _control, _store, _seconds, _exchanges
    if world() == 1 or _control is not None:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
        backend = "cpu:gloo,cuda:nccl"
    _store = _own_part(_of_torchrun(seconds), seconds)
    # Of tensors twice as long: who is late is named by the exchange, not by nccl's watchdog.
    how = {"store": _store, "rank": rank(), "world_size": world()}
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * seconds), **how)
    _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    _seconds, _exchanges = seconds, 0
    try:
        yield
    except Exception as error:
        fail(error)
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise Lost(GONE) from error  # in a sum of gradients, or of a shard
        raise
    else:
        barrier()  # rank 0 may hold what the others still ask for
        dist.destroy_process_group()
    finally:
        _control = None


def _of_torchrun(seconds: float) -> Any:
    """ValueError: there is none. Lost: it does not answer, or not all have come."""
    import torch.distributed as dist

    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent or rank() >= world():
        raise ValueError(
            f"WORLD_SIZE is {world()} and RANK {rank()} in the environment, "
            + (f"{', '.join(absent)} not set" if absent else f"expected RANK below {world()}")
            + ": start by torchrun, which sets all, or unset WORLD_SIZE"
        )
    waits = timedelta(seconds=seconds)
    try:
        return next(dist.rendezvous("env://", rank=rank(), world_size=world(), timeout=waits))[0]
    except dist.DistError as error:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise Lost(
            f"{world()} processes did not meet at {where} (MASTER_ADDR, MASTER_PORT) within "
            f"{seconds:g} s: {str(error).splitlines()[0]}"
        ) from None


def _own_part(store: Any, seconds: float) -> Any:
    """A part of the store that no earlier attempt has written in: torchrun keeps one store over its
    restarts, and gloo would read there where processes listened that are gone.

    Rank 0 names it to each process that asks by a name of its own, until that one has heard it.
    """
    import torch.distributed as dist

    name = secrets.token_hex(8)
    if not main():
        store.set(f"fastpref/asks/{rank()}", name)
        name = store.get(f"fastpref/answer/{name}").decode()
        store.set(f"fastpref/{name}/{rank()}", "heard")
    end = time.monotonic() + seconds
    for other in range(1, world()) if main() else ():
        while not store.check([f"fastpref/{name}/{other}"]):
            if store.check([f"fastpref/asks/{other}"]):
                asked = store.get(f"fastpref/asks/{other}").decode()
                store.set(f"fastpref/answer/{asked}", name)
            if time.monotonic() > end:
                raise Lost(f"rank {other} of {world()} did not start within {seconds:g} s")
            time.sleep(0.01)
    return dist.PrefixStore(f"fastpref/{name}", store)


def first_to(what: str) -> bool:
    """Whether no other process of the node has asked this before."""
    if world() == 1:
        return True
    with suppress(Exception):  # the store may be gone with its process
        store = _store or _of_torchrun(10)
        at = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")]
        name = hashlib.blake2b(f"{at} {what}".encode(), digest_size=16).hexdigest()
        return store.add(f"fastpref/first/{name}", 1) == 1
    return True


def end_for_good(code: int) -> None:
    """What ended this process would end it again: torchrun's restarts leave at once with `code`."""
    if _agent():
        with suppress(Exception):
            _of_torchrun(LEAVE).set("fastpref/ended", str(code))


def ended_for_good() -> int | None:
    """The code of an earlier attempt that said so; None: there was none."""
    if _agent():
        with suppress(Exception):
            store = _of_torchrun(LEAVE)
            return int(store.get("fastpref/ended")) if store.check(["fastpref/ended"]) else None
    return None


def _agent() -> bool:
    """Whether a torchrun keeps the store, which restarts what it has started."""
    return world() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# ---- What they tell each other


def gathered(value: T) -> list[T]:
    """What every process says, by rank; on all of them.

    Raises:
        Elsewhere: one has failed.
        Lost: one is gone, or has not come within the group's seconds; it is named.
    """
    return [value] if world() == 1 else _exchange((None, value))


def _exchange(mine: tuple[tuple[str, bool] | None, Any]) -> list[Any]:
    global _exchanges
    import torch.distributed as dist

    _exchanges += 1
    with suppress(Exception):
        _store.set(f"fastpref/at/{rank()}", str(_exchanges))
    found: list[Any] = [None] * world()
    with _reached():
        dist.all_gather_object(found, mine, group=_control)
    failed = {other: failure for other, (failure, _) in enumerate(found) if failure is not None}
    for other, (text, _) in failed.items():
        if other != rank():
            raise Elsewhere(f"rank {other}: {text}", all(saves for _, saves in failed.values()))
    return [value for _, value in found]


@contextmanager
def _reached() -> Iterator[None]:
    """Around what gloo does with all of them."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(_lost(str(error))) from None


def _lost(reason: str) -> str:
    """Who has not come to the exchange that this process waited in."""
    late = []
    with suppress(Exception):
        for other in range(world()):
            name = f"fastpref/at/{other}"
            if not _store.check([name]) or int(_store.get(name)) < _exchanges:
                late.append(str(other))
    if "imed out" in reason and late:
        return (
            f"rank {', '.join(late)} of {world()} did not come within {_seconds:g} s: look at its "
            "machine, or raise --timeout; run the same command to go on"
        )
    return GONE


def fail(error: BaseException, saves: bool = False) -> bool:
    """Tells the others, in the exchange that they come to next, that this process fails, once;
    whether all then make a last save. saves: this one would.
    """
    if isinstance(error, Lost):
        return False
    if hasattr(error, "saves"):  # another's, or told before
        return error.saves
    if world() == 1 or _control is None:
        return saves
    agreed: list[bool] = []

    def tell() -> None:
        with suppress(Exception):
            try:
                _exchange(((str(error), saves), None))
                agreed.append(saves)
            except Elsewhere as other:  # which fails at the same time
                agreed.append(other.saves)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(min(LEAVE, _seconds))
    error.saves = agreed == [True]  # type: ignore[attr-defined]
    return error.saves  # type: ignore[attr-defined]


def barrier() -> None:
    """Until all are here."""
    gathered(None)


def by_main(function: Callable[[], T]) -> T:
    """What rank 0 makes of it, told to all. Its error is raised there, and `Elsewhere` here."""
    found: list[Any] = []
    on_all(lambda: found.append(function() if main() else None))
    if world() > 1:
        import torch.distributed as dist

        with _reached():  # not gathered, which would have room for as much of each
            dist.broadcast_object_list(found, src=0, group=_control)
    return found[0]


def on_all(function: Callable[[], T]) -> list[T]:
    """What each process makes of it, by rank. Where one fails, all do: it with its error, the
    others with `Elsewhere`. function: without an exchange in it.
    """
    try:
        value = function()
    except Exception as error:
        fail(error, saves=isinstance(error, OSError))
        raise
    return gathered(value)


def of_main(value: T) -> list[T]:
    """What every process says, by rank; on rank 0 alone, elsewhere nothing: for what is large."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    barrier()  # nobody has failed
    found: list[Any] | None = [None] * world() if main() else None
    with _reached():
        dist.gather_object(value, found, group=_control)
    return found or []


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
