"""A scorer in a process of its own: an example server in one file, to copy into an environment that
has what the scorer needs; this file needs Python 3.10 and numpy alone.

    python server.py --scorer my_module:function --port 8765
    python -m fastpref.spo.server --scorer my_module:function

`function(frames, prompts, t) -> N numbers`, higher is better: frames, N arrays uint8 [F, H, W, 3]
(an image is a clip of one frame); prompts, N texts; t, N floats: 0 for finished clips, up to 1000
for what was estimated from noise alone. One call at a time; what it raises is answered.

Protocol, version 1 (the address may have any path):

    POST  application/octet-stream, with Content-Length:  HEAD "\\n" CLIPS
          HEAD   {"version": 1, "clips": [[F, H, W, 3], ...], "prompts": [...], "t": [...]} as JSON
          CLIPS  uint8, C order, one clip after the other: sum of F H W 3 bytes
    200   {"scores": [s_1, ..., s_N]}
    4xx   {"error": "one line"}  the request is at fault: the client ends with that line
    5xx   {"error": "one line"}  the server is: the client asks again, for some minutes
    GET   200 {"version": 1, "name": "..."}

Nothing is ever unpickled. There is no password: whoever reaches the port may ask (`--host`).
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np

VERSION = 1
MOST_BYTES, MOST_HEAD = 1 << 30, 1 << 24  # of a request, and of its line of JSON
READ_SECONDS = 300.0  # for a request to arrive, however slowly its bytes come


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own; `server` has function, name and lock."""

    def setup(self) -> None:
        super().setup()
        self.clock = threading.Timer(READ_SECONDS, self.stop_reading)
        self.clock.daemon = True
        self.clock.start()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone
            super().handle()

    def finish(self) -> None:
        self.clock.cancel()
        super().finish()

    def stop_reading(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        self.answer(200, {"version": VERSION, "name": self.server.name})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            return self.send_error(411, f"Content-Length expected a number, got {length!r:.40}")
        if int(length) > MOST_BYTES:
            return self.send_error(413, f"expected at most {MOST_BYTES} bytes, got {length}")
        body = np.empty(int(length), np.uint8)
        got = self.rfile.readinto(body)
        try:
            if got < len(body):
                raise ValueError(f"Content-Length is {length}, but {got} bytes came")
            request = parse(body)
        except ValueError as error:
            return self.send_error(400, str(error))
        try:
            with self.server.lock:
                scores = [float(score) for score in self.server.function(*request)]
        except (Exception, SystemExit) as error:  # whatever the function does
            traceback.print_exc()
            return self.send_error(500, f"{type(error).__name__}: {error}")
        self.answer(200, {"scores": scores})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also what http.server itself refuses."""
        self.answer(code, {"error": " ".join(str(message or code).split())[:500]})

    def answer(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """No line for each request."""


def parse(body: np.ndarray) -> tuple[list[np.ndarray], list[str], list[float]]:
    """(frames, prompts, t) of a request's bytes; ValueError: what was expected, in one line."""
    line, found, _ = body[:MOST_HEAD].tobytes().partition(b"\n")
    try:
        head = json.loads(line if found else b"")
        version, shapes, prompts, t = (head[k] for k in ("version", "clips", "prompts", "t"))
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        expected = "a line of JSON with version, clips, prompts, t"
        raise ValueError(f"expected {expected} first ({type(error).__name__}: {error})") from None
    if version != VERSION:
        raise ValueError(f"version expected {VERSION}, got {version!r:.40}")
    lists = [shapes, prompts, t]
    if not all(isinstance(of, list) and 0 < len(of) == len(shapes) for of in lists):
        raise ValueError("clips, prompts and t expected lists of one length, at least 1")
    for shape, prompt, time in zip(*lists, strict=True):
        sizes = shape if isinstance(shape, list) and len(shape) == 4 else [0]
        if sizes[-1] != 3 or any(type(n) is not int or not 0 < n <= MOST_BYTES for n in sizes):
            raise ValueError(f"clips expected [F, H, W, 3] each, got {shape!r:.80}")
        if not isinstance(prompt, str):
            raise ValueError(f"prompts expected texts, got {prompt!r:.80}")
        if type(time) not in (int, float) or not -math.inf < time < math.inf:
            raise ValueError(f"t expected finite numbers, got {time!r:.80}")
    ends = [len(line) + 1]
    for shape in shapes:
        ends.append(ends[-1] + math.prod(shape))
    if ends[-1] != len(body):
        expected, got = (n - ends[0] for n in (ends[-1], len(body)))
        raise ValueError(f"clips expected {expected} bytes by their sizes, got {got}")
    frames = [body[a:b].reshape(s) for (a, b), s in zip(pairwise(ends), shapes, strict=True)]
    return frames, prompts, t


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores clips over HTTP.")
    parser.add_argument("--scorer", required=True, help="my_module:function")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: any machine may ask")
    parser.add_argument("--port", type=int, default=8765, help="0: any that is free")
    options = parser.parse_args()
    module, _, name = options.scorer.partition(":")
    if not module or not name:
        parser.error(f"--scorer expected my_module:function, got {options.scorer!r}")
    sys.path.append(os.getcwd())
    function = getattr(importlib.import_module(module), name)
    with ThreadingHTTPServer((options.host, options.port), Handler) as server:
        server.function, server.name, server.lock = function, options.scorer, threading.Lock()
        print(f"{options.scorer} at http://{options.host}:{server.server_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
