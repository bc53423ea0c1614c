"""Scorers: what says which of two clips is better, in this process or behind an address."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

from .. import models
from ..faults import cut, out_of_memory
from ..progress import warn
from .server import VERSION

# (frames, prompts, t) -> scores: N clips uint8 [F, H, W, 3], N texts, float64 [N] (0 clean, 1000
# noise) -> float64 [N], higher is better: P(i preferred to j) = sigmoid(s_i - s_j).
Scorer = Callable[[list[Tensor], list[str], Tensor], Tensor]

FORMS = "a hub id (owner/name), package.module:function or http://host:port"
TIMEOUT = 120.0  # seconds for one request and its answer
RETRIES, PAUSE, LONGEST = 14, 1.0, 30.0  # pauses of 1, 2, 4, ... 30, 30 s: five minutes in all
REQUEST_BYTES = 64 << 20  # of clips; a larger clip goes alone
ANSWER_BYTES = 4 << 20


class _Failed(Exception):
    """A request that may succeed when it is sent again."""


def open_scorer(
    name: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
    stopping: Callable[[], bool] = lambda: False,
) -> Scorer:
    """A scorer by its name.

    `http://host:port/...` or https: a server of the protocol in `server.py`, which is asked once
    now; a later request that fails is sent again, `retries` times at most.
    `package.module:function`: that function.
    Else a folder or hub id of a preference model, or of a plain CLIP, on `device` in `dtype`.

    stopping: asked while a server is waited for; where it says True, KeyboardInterrupt is raised.

    Raises:
        ValueError: no such scorer. The scorer itself: one that fails, or does not give N finite
            numbers for N clips.
    """
    if re.match(r"\w+://", name):
        score = _remote(name, timeout, retries, stopping)
    elif ":" in name and not Path(name).is_dir():
        score = _imported(name)
    else:
        if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ValueError(f"scorer {name}: no such folder; expected one, {FORMS}")
        from .preference_model import StepAwarePreferenceModel

        score = StepAwarePreferenceModel.from_pretrained(name, dtype=dtype, device=device)

    def checked(frames: list[Tensor], prompts: list[str], t: Tensor) -> Tensor:
        return _numbers(name, score(frames, prompts, t), prompts)

    return checked


def _numbers(name: str, scores: Any, prompts: list[str]) -> Tensor:
    """What a scorer gave as float64 `[N]` on the CPU; ValueError: not N finite numbers."""
    expected = f"scorer {name}: expected {len(prompts)} numbers, one per clip, got"
    try:
        if not isinstance(scores, Tensor):
            scores = torch.as_tensor(scores, dtype=torch.float64)  # floats would be float32
        found = scores.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{expected} {cut(repr(scores)):.80}") from None
    if found.shape != (len(prompts),):
        raise ValueError(f"{expected} {list(found.shape)}")
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"scorer {name}: {prompts[bad[0]]!r:.80}: expected a finite score, got "
            f"{found[bad[0]].item()} ({len(bad)} of {len(prompts)} are not finite)"
        )
    return found


def _imported(name: str) -> Scorer:
    """`package.module:function`, also of a module in the current folder; ValueError as opening."""
    module, _, attribute = name.partition(":")
    try:
        with torch.enable_grad():  # a module may switch gradients off, which is not for training
            function = attrgetter(attribute)(models.search(module))
    except (Exception, SystemExit) as error:  # whatever its code raises
        if isinstance(error, ModuleNotFoundError) and models.within(error.name, module):
            raise ValueError(
                f"scorer {name}: no module {module} is installed or in {Path.cwd()}; expected "
                f"a folder, {FORMS}"
            ) from None
        raise ValueError(f"scorer {name}: cannot be imported: {models.origin(error)}") from error
    try:
        inspect.signature(function).bind("frames", "prompts", "t")
    except TypeError as error:
        raise ValueError(
            f"scorer {name}: expected a function of (frames, prompts, t): {error}"
        ) from None
    except ValueError:  # one in C that does not say
        pass

    def score(frames: list[Tensor], prompts: list[str], t: Tensor) -> Any:
        try:
            with torch.no_grad():
                return function(frames, prompts, t)
        except (Exception, SystemExit) as error:  # whatever its code raises
            if out_of_memory(error):
                raise
            raise ValueError(f"scorer {name}: failed: {models.origin(error)}") from error

    return score


def _remote(name: str, timeout: float, retries: int, stopping: Callable[[], bool]) -> Scorer:
    """The client of the protocol in `server.py`; ValueError: nobody there speaks it."""
    url = _address(name)
    try:
        said = _ask(url, None, timeout)
    except _Failed as error:
        raise ValueError(
            f"scorer {name}: {error}; is its server running, and is this its address?"
        ) from None
    if said.get("version") != VERSION:
        raise ValueError(
            f"scorer {name}: version expected {VERSION}, got {said.get('version')!r:.40}: is this "
            "the address of a scorer's server, and the server as new as this fastpref?"
        )

    def score(frames: list[Tensor], prompts: list[str], t: Tensor) -> Tensor:
        scores, times = [torch.zeros(0, dtype=torch.float64)], t.tolist()
        for part in _parts([clip.numel() for clip in frames]):
            clips = [clip.cpu().contiguous() for clip in frames[part]]
            shapes = [list(clip.shape) for clip in clips]
            head = {"version": VERSION, "clips": shapes, "prompts": prompts[part], "t": times[part]}
            body = [json.dumps(head).encode() + b"\n", *(memoryview(c.numpy()) for c in clips)]
            answer = _patiently(url, body, timeout, retries, stopping)
            scores.append(_numbers(name, answer.get("scores"), prompts[part]))
        return torch.cat(scores)

    return score


def _address(name: str) -> SplitResult:
    expected = "expected http://host:port or https://host:port, with any path"
    try:
        url = urlsplit(name)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid or url.username is not None or not re.fullmatch("[!-~]+", name):
        raise ValueError(f"scorer {name.rpartition('@')[2]}: {expected}")
    return url


def _parts(sizes: list[int]) -> Iterator[slice]:
    """Ranges of clips that have at most REQUEST_BYTES together, or are one."""
    begin = total = 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > REQUEST_BYTES:
            yield slice(begin, i)
            begin, total = i, 0
        total += size
    if sizes:
        yield slice(begin, len(sizes))


def _patiently(
    url: SplitResult, body: list, timeout: float, retries: int, stopping: Callable[[], bool]
) -> dict:
    """The answer to a request that is sent again while the server fails or is not there."""
    pauses = [min(PAUSE * 2**i, LONGEST) for i in range(retries)]
    failed = None
    for asked in count(1):
        try:
            return _ask(url, body, timeout)
        except _Failed as error:
            said = f"scorer {url.geturl()}: {error}"
        failed = failed or time.monotonic()
        waited = time.monotonic() - failed
        # Where a server hangs every try takes `timeout`, and not all of them are made.
        if asked > retries or waited > sum(pauses):
            raise ValueError(
                f"{said}; asked {asked} times in {waited:.0f} s: mend or start its server, then "
                "run the same command to go on"
            )
        if asked == 1:
            warn(f"{said}; waiting for it, {sum(pauses):.0f} s at most")
        _wait(pauses[asked - 1], stopping)


def _wait(seconds: float, stopping: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stopping():  # a signal whose handler left a note alone
            raise KeyboardInterrupt
        time.sleep(min(left, 0.2))


def _ask(url: SplitResult, body: list | None, timeout: float) -> dict:
    """POSTs `body`, or GETs, and returns the JSON of the answer; all of it within `timeout` s.

    Raises:
        _Failed: no answer, half of one, or a status of 500 and above.
        ValueError: an answer that asking again would not change.
    """
    kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[url.scheme]
    connection = kind(url.hostname, url.port, timeout=timeout)
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            # Not TLS's own, which is not for another thread.
            socket.socket.shutdown(line, socket.SHUT_RDWR)

    clock = threading.Timer(timeout, hang_up)  # a socket's timeout begins anew with every byte
    clock.daemon = True
    try:
        connection.connect()
        line = connection.sock
        clock.start()
        response = _send(connection, url, body)
        data = response.read(ANSWER_BYTES + 1)
        if response.length and len(data) <= ANSWER_BYTES:
            raise http.client.IncompleteRead(data, response.length)
        if late.is_set():  # what looks like an answer's end is ours
            raise TimeoutError
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"scorer {url.geturl()}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise _Failed(f"no answer within {timeout:g} s") from None
        raise _Failed(f"no answer ({cut(str(error)) or type(error).__name__:.200})") from None
    finally:
        clock.cancel()
        connection.close()
    return _read(url.geturl(), response, data)


def _send(
    connection: http.client.HTTPConnection, url: SplitResult, body: list | None
) -> http.client.HTTPResponse:
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if body is None:
        connection.request("GET", path)
        return connection.getresponse()
    size = sum(memoryview(piece).nbytes for piece in body)
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
    # Who refuses a request may answer before it has read all.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", path, body, headers)
    return connection.getresponse()


def _read(name: str, response: http.client.HTTPResponse, data: bytes) -> dict:
    """The JSON object of a whole answer; _Failed and ValueError as `_ask`."""
    status = f"answered {response.status}"
    if 300 <= response.status < 400:
        where = response.headers.get("Location", "nowhere")
        raise ValueError(f"scorer {name}: {status}: redirected to {where:.200}: give that address")
    try:
        if len(data) > ANSWER_BYTES:
            raise ValueError(f"more than {ANSWER_BYTES >> 20} MiB")
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        answer = {"error": f"{cut(data[:200].decode(errors='replace'))!r} ({cut(str(error)):.200})"}
        if response.status == 200:
            raise ValueError(
                f"scorer {name}: {status}, expected a JSON object, got {answer['error']}: is this "
                "the address of a scorer's server?"
            ) from None
    if response.status != 200:
        said = f"{status}: {cut(str(answer.get('error')))}"
        raise _Failed(said) if response.status >= 500 else ValueError(f"scorer {name}: {said}")
    return answer
