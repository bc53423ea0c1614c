"""What ends a command before its end: signals, and any exception told in one line."""

from __future__ import annotations

import contextlib
import dis
import importlib.metadata
import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from . import ranks
from .progress import printable, speaks

OK, USER_ERROR, INTERRUPTED = 0, 1, 75
ENDS = {"Diverged": 2, "Interrupted": INTERRUPTED}  # of run/guard.py, by name: it imports torch

# SIGHUP: a terminal that closes; SIGUSR1: Slurm before its time limit (--signal=USR1@60).
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

AGAIN = "interrupted; run the same command to go on"
MOST = 1000  # characters of an exception's own words
PACKAGE = Path(__file__).parent
MORE = "FASTPREF_TRACEBACK=1 shows the rest"
REPORT = f"{MORE}; if fastpref is at fault, please report it"
# Where a module is not called as what it is installed by.
INSTALLED_BY = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf", "flash_attn": "flash-attn"}
MEMORY = re.compile(
    r"out of memory|can't allocate memory|_ALLOC_FAILED|alloc_cpu|size calculation overflowed"
)
SHAPES = re.compile(r"\b(shape|size|dimension|channel)s?\b", re.IGNORECASE)
PLAIN = {RecursionError: "something is nested too deeply", OverflowError: "a number is too large"}
# What needs less of it, by command; of others: fewer or smaller frames.
SMALLER = {
    "train": "--pair_mode deferred, --checkpointing full or a smaller --train_batch_size",
    "sweep": "--pair_mode deferred, --checkpointing full or a smaller --train_batch_size",
    "cache-reference": "--pair_mode deferred or a smaller --train_batch_size, here and in training",
    "spm": "a smaller --train_batch_size, or --tune modulation",
    "spo": "a smaller --train_batch_size, --sample_rows or --decode_batch",
    "encode": "a smaller --batch_size, --num_frames, --height and --width, or --dtype bfloat16",
    "sample": "smaller --num_frames, --height and --width, or one prompt at a time",
    "eval": "a set of fewer or smaller frames, or --device cpu",
    "demo": "fewer --pairs and --clips",
}


def on_signals(handler: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Sets what STOPS do; returns what they did. Those that are ignored stay so (SIGINT of
    `fastpref ... &`, SIGHUP of `nohup fastpref ...`), but for SIGTERM.
    """
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in STOPS:
            # None: a handler of somebody's C code.
            if number == signal.SIGTERM or signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    return before


def interrupt(number: int, frame: Any) -> None:
    """A handler: KeyboardInterrupt. SIGHUP comes twice, of a terminal and of its shell."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


def leaving(name: str) -> Callable[[int, Any], None]:
    """A handler that leaves at once, where nothing is to be saved yet."""

    def leave(number: int, frame: Any) -> None:
        if speaks():
            say(f"fastpref {name}: {AGAIN}")
        os._exit(INTERRUPTED)

    return leave


def ended(name: str, command: Callable[[], None]) -> int:
    """The exit code of `fastpref NAME`, run to its end; what ended it early is a line."""
    who = f"fastpref {cut(name)}"
    with output():
        try:
            command()
            print(end="", flush=True)
        except BrokenPipeError:  # fastpref ... | head
            return INTERRUPTED
        except KeyboardInterrupt:
            once(f"{who}: {AGAIN}")
            ranks.first_to(f"{who}: {ranks.GONE}")
            return INTERRUPTED
        except ranks.Elsewhere:  # where it failed it is said
            return USER_ERROR
        except Exception as error:
            kind = type(error).__name__
            # torchrun knows no codes, and would try a mistake as often as it is let.
            if kind == "Diverged" or _mistake(error) or getattr(error, "wished", False):
                ranks.end_for_good(ENDS.get(kind, USER_ERROR))
            if kind in ENDS:
                once(f"{who}: {kind.lower()}: {cut(str(error))}")
                return ENDS[kind]
            if os.environ.get("FASTPREF_TRACEBACK"):  # for a bug report
                raise
            once(f"{who}: {told(error, name)}")
            for end in (AGAIN, ranks.GONE):  # torchrun ends the others, who need not say so
                ranks.first_to(f"{who}: {end}")
            return USER_ERROR
    return OK


def _mistake(error: Exception) -> bool:
    """Whether only a person can mend it: not a file or a memory that may be better next time."""
    passing = ("Changed", "OutOfMemory")
    return isinstance(error, ValueError) and type(error).__name__ not in passing


def once(text: str) -> None:
    """One line, said on each node by the first of the processes that want to."""
    if ranks.first_to(text):
        say(text)


class _Terminal(io.FileIO):
    """A terminal that may go: what is written to it then is lost, and no error of a run's."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Around a command: what it says never stops it because a terminal is gone or knows fewer
    characters; BrokenPipeError where a pipe's reader is.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    if not speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # or Python says so again when it exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.stdout, sys.stderr = before


def _lasting(stream: Any) -> Any:
    if stream is None:  # closed
        return open(os.devnull, "w")
    if stream.isatty():
        raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
        stream = io.TextIOWrapper(raw, encoding=stream.encoding, line_buffering=True)
    if isinstance(stream, io.TextIOWrapper):  # no caller's own
        stream.reconfigure(errors="backslashreplace")
    return stream


def say(text: str) -> None:
    """One line to stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def told(error: BaseException, command: str) -> str:
    """What `fastpref COMMAND` says of an exception: one line, with a remedy where one is known.

    fastpref's own are sentences already, and OSErrors name their file. Of others: type, message,
    where in fastpref they arose, and how to see the rest.
    """
    kind, text, frames = type(error).__name__, cut(str(error)), list(_frames(error))
    if text and (isinstance(error, OSError) or (frames and _raised_by_us(frames[-1]))):
        return text
    lacking = [e for e in _causes(error) if isinstance(e, ImportError)]
    if lacking:
        return missing(lacking[-1])
    if out_of_memory(error):
        less = SMALLER.get(command, "fewer or smaller frames")
        return f"out of memory ({text or kind}): try {less}, or a larger machine"
    if isinstance(error, RuntimeError | IndexError) and SHAPES.search(text):
        return (
            f"shapes do not fit each other ({text}): do the data, the model and the adapter belong "
            f"together, and can the model take this size? {MORE}"
        )
    if type(error) in PLAIN:
        text = f"{PLAIN[type(error)]}: {text}"
    where, own = "", [frame for frame in frames if _ours(frame)]
    if own:
        path = Path(own[-1].tb_frame.f_code.co_filename).relative_to(PACKAGE.parent)
        where = f" ({path}:{own[-1].tb_lineno})"
    return f"{kind}: {text}{where}; {REPORT}" if text else f"{kind}{where}; {REPORT}"


def missing(error: ImportError) -> str:
    """An ImportError of any library with what to install."""
    text, name = cut(str(error)), (error.name or "").split(".")[0]
    package = INSTALLED_BY.get(name, name)
    absent = isinstance(error, ModuleNotFoundError)
    if name and absent and (not _installed(name) or str(error).startswith("No package metadata")):
        return f"{package} is not installed: pip install {package}"
    if name and (absent or text.startswith("cannot import name")):
        return f"{text}: another version of it is needed, try pip install --upgrade {package}"
    return f"{text}; {MORE}"  # a library's own sentence


def out_of_memory(error: BaseException) -> bool:
    """Whether a card's, a CPU's, numpy's or pyarrow's memory ran out, of this process."""
    if isinstance(error, ranks.Elsewhere):
        return False
    # By name: this file does without torch, whose import may be the fault.
    if isinstance(error, MemoryError) or type(error).__name__.startswith("OutOfMemory"):
        return True
    return isinstance(error, RuntimeError) and bool(MEMORY.search(str(error)))


def cut(text: str) -> str:
    """`text` in one line of MOST characters: its begin, and its end, where remedies stand."""
    text = " ".join(text.split())
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec
        return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _frames(error: BaseException) -> Iterator[TracebackType]:
    here = error.__traceback__
    while here is not None:
        yield here
        here = here.tb_next


def _ours(frame: TracebackType) -> bool:
    path = Path(frame.tb_frame.f_code.co_filename)
    return path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE.parent / "bench")


def _raised_by_us(frame: TracebackType) -> bool:
    """By a `raise`, not by what an expression ran into."""
    operation = dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]]
    return _ours(frame) and operation == "RAISE_VARARGS"
