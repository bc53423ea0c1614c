"""Scorers behind an address: servers that score, and servers that fail in every way."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from scoring import HOW, MODULE, PROMPTS, TIMES, Running, clips

from fastpref.faults import interrupt
from fastpref.spo import scorers


def expected(frames: list[torch.Tensor], prompts: list[str], t: torch.Tensor) -> torch.Tensor:
    """What the module of the servers under test gives, of the function itself."""
    names = {}
    exec(MODULE, names)
    scores = names["scored"]([f.numpy().copy() for f in frames], prompts, t.tolist())
    return torch.tensor([float(s) for s in scores], dtype=torch.float64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of 0.05, 0.1, ... seconds."""
    monkeypatch.setattr(scorers, "PAUSE", 0.05)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("server"))
    yield running
    running.kill()


def test_a_server_gives_what_its_function_gives(running, monkeypatch):
    """In one request and in several: a clip above the limit goes alone."""
    frames = clips()
    strided = [frames[0].flip(1), frames[1].transpose(1, 2), *frames[2:]]
    score = scorers.open_scorer(running.url + "/any?path=1", **HOW)
    for some in (frames, strided):
        assert torch.equal(score(some, PROMPTS, TIMES), expected(some, PROMPTS, TIMES))
    assert score([], [], TIMES[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"'nan': expected a finite score, got nan \(1 of 5 are"):
        score(frames, ["a", "b", "nan", "d", "e"], TIMES)

    sizes = [clip.numel() for clip in frames]  # 72, 180, 324, 126, 288
    for most, want in ((10**6, [5]), (252, [2, 1, 1, 1]), (1, [1] * 5), (450, [2, 2, 1])):
        monkeypatch.setattr(scorers, "REQUEST_BYTES", most)
        parts = list(scorers._parts(sizes))
        assert [len(sizes[p]) for p in parts] == want, most
        assert [n for p in parts for n in sizes[p]] == sizes
        assert torch.equal(score(frames, PROMPTS, TIMES), expected(frames, PROMPTS, TIMES))


def test_a_server_killed_in_the_middle_and_started_again(tmp_path, monkeypatch, capsys):
    """The run goes on with equal scores, says once that it waits, and needs nobody."""
    monkeypatch.setattr(scorers, "PAUSE", 0.1)
    running = Running(tmp_path)
    score = scorers.open_scorer(running.url, **HOW)
    frames, want = clips(), expected(clips(), PROMPTS, TIMES)
    starter = threading.Timer(0.5, running.again)
    try:
        for i in range(40):
            if i == 15:
                # In the middle of a call: the function waits 0.3 s for this prompt.
                threading.Timer(0.1, running.kill).start()
                starter.start()
                begin = time.monotonic()
                waits = ["wait", *PROMPTS[1:]]
                assert torch.equal(score(frames, waits, TIMES), expected(frames, waits, TIMES))
                assert time.monotonic() - begin > 0.4
            assert torch.equal(score(frames, PROMPTS, TIMES), want)
    finally:
        starter.join()
        running.kill()
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and said.count("\n") == 1
    assert f"warning: scorer {running.url}: no answer (" in said
    assert "; waiting for it, 241 s at most" not in said and " s at most" in said


def test_a_server_that_stays_away_is_one_error(tmp_path, quick):
    running = Running(tmp_path)
    score = scorers.open_scorer(running.url, **HOW, retries=3)
    running.kill()
    begin = time.monotonic()
    with pytest.raises(ValueError) as caught:
        score(clips(), PROMPTS, TIMES)
    assert 0.35 <= time.monotonic() - begin < 2  # 0.05 + 0.1 + 0.2
    assert re.fullmatch(
        rf"scorer {running.url}: no answer \(.*[Cc]onnection refused\); asked 4 times in 0 s: "
        "mend or start its server, then run the same command to go on",
        str(caught.value),
    )


def test_by_default_five_minutes_are_waited():
    pauses = [min(scorers.PAUSE * 2**i, scorers.LONGEST) for i in range(scorers.RETRIES)]
    assert 290 <= sum(pauses) <= 310


class Fake:
    """A server that answers each connection with the next of `answers`: bytes, or a function of
    the connection; the last of them for ever.
    """

    def __init__(
        self, *answers: bytes | Callable[[socket.socket], None], greeting: bytes | None = None
    ) -> None:
        self.answers, self.asked = answers, 0
        self.greeting = greeting or said({"version": 1, "name": "fake"})
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line:
            data = b""
            while b"\r\n\r\n" not in data:
                data += line.recv(1 << 16)
            head, _, body = data.partition(b"\r\n\r\n")
            self.path = head.split()[1]
            length = int((re.search(rb"Content-Length: (\d+)", head) or [0, 0])[1])
            while len(body) < length:
                body += line.recv(1 << 16)
            if head.startswith(b"GET"):
                line.sendall(self.greeting)
                return
            self.asked += 1
            answer = self.answers[min(self.asked, len(self.answers)) - 1]
            if callable(answer):
                answer(line)
            else:
                line.sendall(answer)


def said(value: object, status: str = "200 OK", more: int = 0, head: str = "") -> bytes:
    """An answer; more: bytes that its Content-Length promises and that never come."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head += f"Content-Length: {len(body) + more}\r\n"
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


SCORES = [1.0, -2.5, 3e-300, 0.0, 7]


def ask(*answers, timeout: float = 5.0, retries: int = 2) -> tuple[torch.Tensor, Fake]:
    fake = Fake(*answers)
    score = scorers.open_scorer(fake.url, **HOW, timeout=timeout, retries=retries)
    try:
        return score(clips(), PROMPTS, TIMES), fake
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"scorer {fake.url}: ") and "\n" not in text and len(text) < 700
        raise
    finally:
        fake.listener.close()
        ask.last = fake


def drip(line: socket.socket) -> None:
    """An answer whose bytes come one by one, each within any timeout of a socket."""
    line.sendall(said(b"", more=1000))
    try:
        for _ in range(1000):
            line.sendall(b" ")
            time.sleep(0.05)
    except OSError:
        pass


def open_end(line: socket.socket) -> None:
    """Half an answer that only the end of the connection would end, and that never comes."""
    line.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"scores": [')
    time.sleep(1)


def endless(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            line.sendall(b" " * (1 << 16))
    except OSError:
        pass


PASSING = {
    "nothing": b"",
    "half a status": b"HTTP/1.1 20",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half an answer": said(b'{"scores": [1, ', more=40),
    "half of chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "busy": said({"error": "model is loading"}, "503 Service Unavailable"),
    "a gateway": said(b"<html>Bad gateway", "502 Bad Gateway"),
    "slow": lambda line: time.sleep(1),
    "dripping": drip,
    "open end": open_end,
}


# What takes its whole timeout, longer than the pauses together: asked again once alone.
SLOW = ("slow", "dripping", "open end")


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_asked_again(quick, capsys, case):
    twice = [] if case in SLOW else [PASSING[case]]
    scores, fake = ask(PASSING[case], *twice, said({"scores": SCORES}), timeout=0.3)
    assert torch.equal(scores, torch.tensor(SCORES, dtype=torch.float64))
    assert fake.asked == 2 + len(twice)
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("nothing", "no answer .*closed connection"),
        ("half an answer", r"no answer \(IncompleteRead\(15 bytes read, 40 more expected\)"),
        ("busy", "answered 503: model is loading"),
        ("a gateway", "answered 502: '<html>Bad gateway'"),
        ("slow", "no answer within 0.2 s"),
        ("dripping", "no answer within 0.2 s"),
    ],
)
def test_what_does_not_pass_is_an_error_in_the_end(quick, case, reason):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=reason) as caught:
        ask(PASSING[case], timeout=0.2)
    times = 2 if case in SLOW else 3
    assert f"; asked {times} times in 0 s: mend or start its server" in str(caught.value)
    assert time.monotonic() - begin < 2


WRONG = {
    "a request at fault": (
        said({"error": "t is wrong"}, "400 Bad Request"),
        "answered 400: t is w",
    ),
    "not found": (said(b"<html>\n\x1b[31mno", "404 Not Found"), r"answered 404: '<html> \\x1b"),
    "redirect": (
        said(b"", "302 Found", head="Location: http://other:1/x\r\n"),
        "answered 302: redirected to http://other:1/x: give that address",
    ),
    "no JSON": (said(b"<html>hello"), "answered 200, expected a JSON object, got '<html>hello'"),
    "no object": (said([1.0] * 5), "expected a JSON object"),
    "nested": (said(b"[" * 100_000), "expected a JSON object"),
    "digits": (said(b'{"scores": [' + b"9" * 5000 + b"]}"), "expected a JSON object"),
    "endless": (endless, "more than 4 MiB"),
    "no scores": (said({"score": SCORES}), "expected 5 numbers, one per clip, got None"),
    "too few": (said({"scores": SCORES[:4]}), r"expected 5 numbers, one per clip, got \[4\]"),
    "too many": (said({"scores": [*SCORES, 1]}), r"expected 5 numbers, one per clip, got \[6\]"),
    "a number": (said({"scores": 1.0}), r"expected 5 numbers, one per clip, got \[\]"),
    "texts": (said({"scores": ["1"] * 5}), r"expected 5 numbers, one per clip, got \['1', '1"),
    "null": (said({"scores": [None] * 5}), r"expected 5 numbers, one per clip, got \[None"),
    "large": (said(b'{"scores": [1,2,3,4,1' + b"0" * 400 + b"]}"), "expected 5 numbers"),
    "NaN": (
        said(b'{"scores": [1,2,NaN,4,5]}'),
        r"'line\\nbreak': expected a finite score, got nan",
    ),
    "infinity": (said(b'{"scores": [1,-1e999,3,4,5]}'), "'schnee, größer': expected a finite sc"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_not_change_is_an_error_at_once(case):
    answer, reason = WRONG[case]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        ask(answer)
    assert ask.last.asked == 1 and time.monotonic() - begin < 0.9


def test_a_refusal_before_all_was_read_is_heard():
    """A body that fits no buffer of the network, refused by its length alone."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(said({"version": 1, "name": ""}))

        def do_POST(self):
            self.wfile.write(said({"error": "too long"}, "413 Payload Too Large"))

    with HTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        score = scorers.open_scorer(f"http://127.0.0.1:{refusing.server_port}", **HOW, retries=0)
        with pytest.raises(ValueError, match="answered 413: too long"):
            score([torch.zeros(1, 4000, 4000, 3, dtype=torch.uint8)], ["a"], TIMES[:1])
        refusing.shutdown()


@pytest.mark.parametrize(
    "name",
    [
        "http://",
        "http://:80",
        "ftp://a/b",
        "http://a:70000",
        "http://a b",
        "http://[::1",
        "http://größe/",
        "https://a:b",
        "file:///etc",
    ],
)
def test_an_address_that_is_none(name):
    with pytest.raises(
        ValueError, match="expected http://host:port or https://host:port"
    ) as caught:
        scorers.open_scorer(name, **HOW)
    assert str(caught.value).startswith(f"scorer {name}: ")


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(ValueError, match="scorer host:1: expected http") as caught:
        scorers.open_scorer("http://me:secret@host:1", **HOW)
    assert "secret" not in str(caught.value)


def test_an_address_is_asked_as_it_is():
    fake = Fake()
    for end, path in (("", b"/score"), ("?a=1&b=%20", b"/score?a=1&b=%20"), ("#x", b"/score")):
        scorers.open_scorer(fake.url + end, **HOW)
        assert fake.path == path
    scorers.open_scorer(fake.url.removesuffix("/score"), **HOW)
    assert fake.path == b"/"
    fake.listener.close()


def test_a_wrong_address_is_told_when_it_is_opened():
    """At once, and whatever answers there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"refused\); is its server running, and is this its addr"):
        scorers.open_scorer(f"http://127.0.0.1:{port}", **HOW)
    with pytest.raises(ValueError, match=r"no answer .*; is its server running"):
        scorers.open_scorer("http://no-such-host.invalid:1", **HOW)
    assert time.monotonic() - begin < 3

    for greeting, reason in (
        (b'HTTP/1.1 200 OK\r\n\r\n{"version": 2}', "version expected 1, got 2: is this the addr"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "version expected 1, got None"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "expected a JSON object, got '<html>'"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "answered 404: ''"),
        (b"HTTP/1.1 301 Moved\r\n\r\n", "redirected to nowhere"),
    ):
        fake = Fake(greeting=greeting)
        with pytest.raises(ValueError, match=reason):
            scorers.open_scorer(fake.url, **HOW)
        fake.listener.close()


@pytest.mark.parametrize("how", ["noted", "raised"])
def test_a_signal_ends_the_wait(capsys, how):
    """Whether its handler leaves a note, as a loop's does, or raises, as a command's does."""
    fake, arrived = Fake(said({}, "503 Service Unavailable")), []
    score = scorers.open_scorer(fake.url, **HOW, stopping=lambda: bool(arrived))
    note = {"noted": lambda *_: arrived.append(1), "raised": interrupt}[how]
    before = signal.signal(signal.SIGTERM, note)
    try:
        begin = time.monotonic()
        threading.Timer(0.4, os.kill, [os.getpid(), signal.SIGTERM]).start()
        with pytest.raises(KeyboardInterrupt):
            score(clips(), PROMPTS, TIMES)
    finally:
        signal.signal(signal.SIGTERM, before)
        fake.listener.close()
    assert 0.3 < time.monotonic() - begin < 0.9
    assert "waiting for it, 301 s at most" in capsys.readouterr().err
