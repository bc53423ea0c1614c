"""Signals: what asks a command to stop saves what is done, and the same command goes on."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from commands import arguments, options

from fastpref.cli import main
from fastpref.faults import STOPS, interrupt, on_signals
from fastpref.run import bookkeeping
from fastpref.run.checkpoint import fault
from fastpref.run.guard import Signals


@pytest.fixture(autouse=True)
def heeded():
    """As in a terminal, whatever these tests run in; as before in the end."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_run_finishes_its_step_and_saves(number, encoded_pairs, tmp_path, monkeypatch, capsys):
    real = bookkeeping.update

    def arrives(run):
        if run.step == 2:
            signal.raise_signal(number)
        return real(run)

    monkeypatch.setattr(bookkeeping, "update", arrives)
    flags = arguments(options(encoded_pairs, tmp_path, checkpointing_steps=100))
    assert main(["train", *flags]) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    again = "run the same command to go on"
    assert said == f"fastpref train: interrupted: saved at step 3 in {tmp_path}; {again}"
    assert fault(tmp_path / "checkpoint-3") is None
    monkeypatch.undo()
    assert main(["train", *flags]) == 0
    assert f"resumed from {tmp_path / 'checkpoint-3'}" in capsys.readouterr().out


def test_one_that_is_ignored_stays_so(encoded_pairs, tmp_path, monkeypatch):
    """SIGHUP under nohup, SIGINT of what runs in the background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    real = bookkeeping.update

    def arrives(run):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        return real(run)

    monkeypatch.setattr(bookkeeping, "update", arrives)
    assert main(["train", *arguments(options(encoded_pairs, tmp_path))]) == 0


HANGUP, SLURM, LIMIT, KEY = signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("arriving", "waits"),
    [
        ((HANGUP, HANGUP), True),  # of the terminal, and of its shell
        ((SLURM, LIMIT), True),  # some time before a job's end, and there
        ((HANGUP, KEY), True),
        ((LIMIT, LIMIT), False),
        ((KEY, KEY), False),
        ((KEY, HANGUP, LIMIT), False),
    ],
)
def test_who_asks_twice_does_not_wait_for_the_save(arriving, waits):
    before = [signal.getsignal(number) for number in STOPS]
    stop = Signals()
    try:
        for number in arriving[:-1]:
            signal.raise_signal(number)
            assert stop
        if waits:
            signal.raise_signal(arriving[-1])
        else:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(arriving[-1])
    finally:
        stop.restore()
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_second_hangup_does_not_disturb_the_first():
    """On the way out, where it would be an exception within one."""
    on_signals(interrupt)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(HANGUP)
    signal.raise_signal(HANGUP)


STOPPED = """
import os, signal
from fastpref.models.toy import *
from fastpref.models import toy

calls = []

def stop():
    calls.append(1)
    if len(calls) == 3:
        signal.raise_signal(int(os.environ["SIGNAL"]))

def predict(*inputs):
    stop()
    return toy.predict(*inputs)

def encode_media(*inputs):
    stop()
    return toy.encode_media(*inputs)
"""


@pytest.mark.parametrize("name", ["encode", "cache-reference", "sweep"])
def test_whatever_resumes_leaves_at_any_of_them(name, pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "stopped_family").mkdir()
    (tmp_path / "stopped_family" / "toy.py").write_text(STOPPED)
    monkeypatch.syspath_prepend(tmp_path)
    how = options(pairs, tmp_path / "out", family="stopped_family.toy", reference="cached")
    parts = arguments(how | {"max_train_steps": 1})
    if name == "encode":
        parts = [p for n in ("family", "model", "data", "output_dir") for p in (f"--{n}", how[n])]
    if name == "sweep":
        del parts[(at := parts.index("--beta")) : at + 2]
        parts += ["--objectives", "dpo", "--betas", "9"]
    for number in STOPS:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # heeded once a command
        sys.modules.pop("stopped_family.toy", None)
        monkeypatch.setenv("SIGNAL", str(int(number)))
        assert main([name, *parts]) == 75
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"fastpref {name}: interrupted; run the same command to go on"
    monkeypatch.setenv("SIGNAL", "0")
    assert main([name, *parts]) == 0


def hung_up(parts: list[str], begun, ignored: bool) -> int:
    """Exit code of a command whose terminal closes, with what it says going there, once `begun`."""
    ours, theirs = pty.openpty()
    disposition = signal.SIG_IGN if ignored else signal.SIG_DFL

    def owns_the_terminal():
        os.setsid()
        os.close(os.open(os.ttyname(1), os.O_RDWR))
        signal.signal(signal.SIGHUP, disposition)

    run = [sys.executable, "-m", "fastpref", *parts]
    with subprocess.Popen(
        run, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=owns_the_terminal
    ) as process:
        os.close(theirs)
        end = time.time() + 120
        while not begun():
            assert process.poll() is None and time.time() < end, os.read(ours, 10_000)
            time.sleep(0.005)
        os.close(ours)
        return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes(ignored, encoded_pairs, tmp_path):
    steps = 60 if ignored else 100_000
    how = {"max_train_steps": steps, "checkpointing_steps": 100_000}
    flags = options(encoded_pairs, tmp_path, **how)
    log = tmp_path / "metrics.jsonl"
    code = hung_up(
        ["train", *arguments(flags)], lambda: log.exists() and log.stat().st_size > 2000, ignored
    )
    assert code == (0 if ignored else 75)
    (saved,) = tmp_path.glob("checkpoint-*")
    assert fault(saved) is None
