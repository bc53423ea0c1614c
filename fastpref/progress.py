"""What a command says on the screen while it works: the parts of a start, the loop's bar; and
text that is not ours made fit for a screen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def printable(text: str) -> str:
    """`text` in one line, what a terminal would obey or hide (ESC, bidi overrides, zero-width,
    lone surrogates) as Python's escapes; names and cells of files come from anyone.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def speaks() -> bool:
    """Whether this process does: of several that torchrun has started the first one."""
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return alone or os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """`warning: TEXT` in a line of its own, above a bar where there is one."""
    if not speaks():
        return
    from tqdm import tqdm

    tqdm.write(printable(f"warning: {text}"), file=sys.stderr)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Prints what begins, at once, and behind it the seconds that it took: `NAME ... 2.6 s`."""
    print(f"{printable(name)} ... ", end="", flush=True)
    begin = time.perf_counter()
    try:
        yield
    except BaseException:
        print(flush=True)  # what it says of itself gets a line of its own
        raise
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)


def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose first call is a `stage`: what is compiled or recorded is so in that one."""
    import torch

    waiting = [stage(name)]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            return function(*args, **kwargs)
        with waiting.pop():
            result = function(*args, **kwargs)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # or the seconds would be those of launching it
            return result

    return call


def steps_bar(total: int, done: int) -> tqdm:
    """The loop's bar, on a terminal alone. delay: tqdm draws it with the first update, not at once,
    so it stands below what a `stage` says of the first step.
    """
    from tqdm import tqdm

    how = {"unit": "step", "disable": None if speaks() else True, "delay": 1e-9, "file": sys.stderr}
    return tqdm(total=total, initial=done, **how)
