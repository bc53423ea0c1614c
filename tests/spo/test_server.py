"""The example server of scores: what it answers, what it refuses, and that nothing ends it."""

import ast
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from scoring import Running

from fastpref.spo import scorers, server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("server"), setup="s.READ_SECONDS = 1.0")
    yield running
    running.kill()


def request(head: object, clips: bytes = b"", length: int | None = None) -> bytes:
    line = head if isinstance(head, bytes) else json.dumps(head).encode()
    body = line + b"\n" + clips
    length = len(body) if length is None else length
    return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % length + body


def raw(running: Running, data: bytes, end: bool = False) -> tuple[int, dict]:
    """Status and JSON of what is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as line:
        line.sendall(data)
        if end:
            line.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := line.recv(1 << 16):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), json.loads(body)


def alive(running: Running) -> None:
    head = {"version": 1, "clips": [[1, 1, 2, 3]], "prompts": ["ab"], "t": [0.5]}
    assert raw(running, request(head, bytes(range(6)))) == (200, {"scores": [55 / 7 + 2.5]})


def test_it_says_who_it_is_and_scores(running):
    connection = HTTPConnection("127.0.0.1", running.port)
    connection.request("GET", "/any/path")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (
        200,
        {"version": 1, "name": "mine:scored"},
    )
    alive(running)


def test_it_needs_no_fastpref_and_no_torch(tmp_path):
    """A copy of the one file, elsewhere, as a user starts it."""
    copy = tmp_path / "server.py"
    copy.write_text(Path(server.__file__).read_text())
    code = (
        "import sys, runpy; sys.argv = ['server.py', '--help']\n"
        f"try: runpy.run_path({str(copy)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'fastpref'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--scorer" in done.stdout and "127.0.0.1" not in done.stderr


@pytest.mark.parametrize("module", [scorers, server])
def test_nothing_is_unpickled(module):
    """Neither file imports what unpickles, or what could."""
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Attribute):
            assert (getattr(node.value, "id", None), node.attr) not in {
                ("np", "load"),
                ("torch", "load"),
            }
    assert "json" in names
    assert not {n for n in names if n and re_pickle(n)}


def re_pickle(name: str) -> bool:
    return name.split(".")[0] in {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill"}


HEAD = {"version": 1, "clips": [[1, 1, 1, 3]], "prompts": ["a"], "t": [0]}
WRONG = {
    "no JSON": (b"{", b"", "JSONDecodeError"),
    "no text": (b"\xff\xfe\xff", b"", "Unicode"),
    "nested": (b"[" * 100_000, b"", "RecursionError"),
    "a list": ([1], b"", "TypeError"),
    "nothing": ({}, b"", "KeyError: 'version'"),
    "no t": ({k: v for k, v in HEAD.items() if k != "t"}, b"abc", "KeyError: 't'"),
    "version": (HEAD | {"version": 2}, b"abc", "version expected 1, got 2"),
    "no clip": (HEAD | {"clips": [], "prompts": [], "t": []}, b"", "at least 1"),
    "text for list": (HEAD | {"prompts": "a"}, b"abc", "lists of one length"),
    "null": (HEAD | {"clips": None}, b"abc", "lists of one length"),
    "counts": (HEAD | {"prompts": ["a", "b"]}, b"abc", "lists of one length"),
    "negative": (HEAD | {"clips": [[-1, -1, 1, 3]]}, b"abc", "clips expected [F, H, W, 3]"),
    "zero": (HEAD | {"clips": [[1, 0, 1, 3]]}, b"", "got [1, 0, 1, 3]"),
    "channels": (HEAD | {"clips": [[1, 1, 3, 1]]}, b"abc", "got [1, 1, 3, 1]"),
    "floats": (HEAD | {"clips": [[1.0, 1, 1, 3]]}, b"abc", "got [1.0, 1, 1, 3]"),
    "true": (HEAD | {"clips": [[True, 1, 1, 3]]}, b"abc", "got [True, 1, 1, 3]"),
    "three sizes": (HEAD | {"clips": [[1, 1, 3]]}, b"abc", "got [1, 1, 3]"),
    "huge": (HEAD | {"clips": [[10**300] * 3 + [3]]}, b"abc", "got [1000"),
    "digits": (b'{"version": 1, "clips": [[' + b"9" * 5000, b"", "ValueError"),
    "too few": (HEAD, b"ab", "clips expected 3 bytes by their sizes, got 2"),
    "too many": (HEAD, b"abcd", "clips expected 3 bytes by their sizes, got 4"),
    "prompt": (HEAD | {"prompts": [1]}, b"abc", "prompts expected texts, got 1"),
    "t nan": (HEAD | {"t": [float("nan")]}, b"abc", "t expected finite numbers, got nan"),
    "t inf": (HEAD | {"t": [-float("inf")]}, b"abc", "t expected finite numbers, got -inf"),
    "t text": (HEAD | {"t": ["0"]}, b"abc", "t expected finite numbers, got '0'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_is_wrong_is_told_in_one_line(running, case):
    head, clips, said = WRONG[case]
    status, answer = raw(running, request(head, clips))
    assert status == 400 and said in answer["error"] and "\n" not in answer["error"]
    assert len(answer["error"]) <= 500


def test_lengths_that_are_none(running):
    for length in ("", "-1", "+3", "1_0", "٣", "1e3", "0x10", "9" * 5000):
        data = f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()
        status, answer = raw(running, data)
        assert status == 411 and "Content-Length expected a number" in answer["error"]
    assert raw(running, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")[0] == 411
    status, answer = raw(running, request(HEAD, length=10**17))
    assert status == 413 and answer["error"] == f"expected at most {1 << 30} bytes, got {10**17}"
    status, answer = raw(running, request(HEAD, b"abc", length=200), end=True)
    assert status == 400 and "Content-Length is 200, but " in answer["error"]
    alive(running)


def test_half_a_body_holds_no_thread(running):
    """Whether its client is silent or sends a byte now and then, after READ_SECONDS (here 1)."""
    begin = time.monotonic()
    lines = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(3)]
    silent, slow, head = lines
    silent.sendall(request(HEAD, b"a", length=10**6))
    slow.sendall(request(HEAD, b"a", length=10**6))
    head.sendall(b"POST / HT")
    alive(running)  # meanwhile
    dripping = threading.Event()

    def drip() -> None:
        while not dripping.wait(0.1):
            try:
                slow.sendall(b"a")
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    for line in (silent, slow):
        assert b" 400 " in line.recv(1 << 16)
    assert b"Bad request" in head.recv(1 << 16) and head.recv(1) == b""
    dripping.set()
    for line in lines:
        line.close()
    assert 0.8 < time.monotonic() - begin < 4
    alive(running)


def test_what_the_function_raises_is_answered_and_it_lives_on(running):
    status, answer = raw(running, request(HEAD | {"prompts": ["fail"]}, b"abc"))
    assert (status, answer) == (500, {"error": ("RuntimeError: no memory" + "!" * 999)[:500]})
    alive(running)
    status, answer = raw(running, request(HEAD | {"prompts": ["leave"]}, b"abc"))
    assert (status, answer) == (500, {"error": "SystemExit: no card"})
    alive(running)


def test_the_function_is_called_once_at_a_time(running):
    data = request(HEAD | {"prompts": ["wait"]}, b"abc")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(raw(running, data))) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200, 200, 200], answers


def test_noise_never_ends_it(running):
    """Requests with bytes changed, lost and doubled: each is answered or closed, none is a 500."""
    rng = random.Random(0)
    good = request(
        {"version": 1, "clips": [[1, 2, 1, 3], [2, 1, 1, 3]], "prompts": ["a", "b"], "t": [0, 9.5]},
        bytes(range(12)),
    )
    statuses = set()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[at] = rng.randrange(256)
            elif change == 1:
                del data[at : at + rng.randint(1, 9)]
            elif change == 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            else:
                data[at:at] = rng.choice(
                    [b"-", b"9" * 30, b"\n", b"\r\n\r\n", b"[", b"null", b"\0"]
                )
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as line:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while piece := line.recv(1 << 16):
                    answer += piece
            except ConnectionResetError:
                pass  # answered before all was read
        found = answer.split(b" ", 2)
        statuses.add(int(found[1]) if found[0].startswith(b"HTTP/") else 0)
    assert 400 in statuses and 200 in statuses and 500 not in statuses, statuses
    alive(running)
    assert running.process.poll() is None


def test_a_client_that_leaves_is_no_error(running):
    """In the middle of a call of its function and of its body, reset each time."""
    log = running.folder / "server.log"
    before = log.read_text()
    for data in (request(HEAD | {"prompts": ["wait"]}, b"abc"), request(HEAD, length=10**6)):
        line = socket.create_connection(("127.0.0.1", running.port))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.sendall(data)
        time.sleep(0.1)
        line.close()
    time.sleep(0.4)
    alive(running)
    assert log.read_text() == before


def test_its_parser_gives_back_what_was_sent():
    clips = [
        np.random.default_rng(i).integers(256, size=(i + 1, 2, 3, 3), dtype="u1") for i in (0, 1)
    ]
    head = {
        "version": 1,
        "clips": [list(c.shape) for c in clips],
        "prompts": ["ü", "\n"],
        "t": [1, 0.1],
    }
    body = np.frombuffer(
        json.dumps(head).encode() + b"\n" + b"".join(c.tobytes() for c in clips), np.uint8
    )
    frames, prompts, t = server.parse(body)
    assert all(np.array_equal(a, b) for a, b in zip(frames, clips, strict=True))
    assert (prompts, t) == (["ü", "\n"], [1, 0.1])
