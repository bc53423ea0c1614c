"""Text that is not ours, made fit for a screen."""

import pytest

from fastpref.progress import printable, stage, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a clip.mp4", "a clip.mp4"),
        ("ein grüner Kreis 猫 🎬", "ein grüner Kreis 猫 🎬"),
        (
            "\x1b[2J\x1b]0;title\x07",
            r"\x1b[2J\x1b]0;title\x07",
        ),  # clears the screen, names the window
        ("a\rb\nc\td\x08", r"a\rb\nc\td\x08"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),  # CSI in one byte
        ("evil\u202egpj.mp4\u2066", r"evil\u202egpj.mp4\u2066"),  # right to left: evil4pm.jpg
        ("a\u200bb\u00a0c\u2028d", r"a\u200bb\xa0c\u2028d"),
        ("caf\udce9", r"caf\udce9"),  # a byte that is not UTF-8: no screen can encode it
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown and printable(shown) == shown
    shown.encode()


def test_a_stage_says_names_so(capsys):
    with stage("weights of \x1b[31m"):
        pass
    assert capsys.readouterr().out.startswith(r"weights of \x1b[31m ... ")


def test_a_warning_is_one_line(capsys):
    warn("run\x1b[31m\nhere")
    assert capsys.readouterr().err == "warning: run\\x1b[31m\\nhere\n"
