"""Command lines and YAML whose every mistake is a ValueError of one line.

jsonargparse sees no file, only text that was read and checked here: of its own it would open what
a field `config` names, and copy what YAML's aliases stand for wherever it says a value.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..pairs.text import encoding, is_text, not_utf8
from .config import Config
from .options import Options

MAX_BYTES, MAX_DIGITS = 1 << 18, 40  # of a YAML file; of a whole number in it
MAX_ITEMS = 1000  # of a list: what jsonargparse makes of one takes the square of it
# A Config's types in words.
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (a number in quotes)",
    list[str]: "a list of texts such as [a, b]",
    tuple[float, float]: "two numbers such as [0.0, 0.5]",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises, and takes no shortened flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise ValueError(message)


def names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """Names with commas, each once, all of them known."""
    found = list(dict.fromkeys(text.split(",")))
    for name in found:
        if name not in known:
            raise ValueError(f"{flag}: expected some of {','.join(known)}, got {name!r}")
    return found


def betas(flag: str, text: str) -> list[float]:
    """Finite numbers above 0 with commas, each once."""
    try:
        found = list(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag}: expected numbers with commas, got {text!r}") from None
    for beta in found:
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"{flag}: expected finite numbers above 0, got {beta:g}")
    return found


def config_values(
    arguments: Sequence[str], command: str, kind: type[Options] = Config, **defaults: Any
) -> dict[str, Any]:
    """`--config FILE --field value ...` to the fields of `kind`, not yet checked together.

    defaults: of fields, in place of its own.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        allow_abbrev=False,
        prog=command,
        exit_on_error=False,
        description=kind.__doc__.splitlines()[0],
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the same fields; flags win over it"
    )
    parser.add_class_arguments(kind, as_group=False)
    parser.set_defaults(defaults)
    files, words, rest = [], [], iter(arguments)
    for word in rest:
        if word == "--config":
            files.append(next(rest, None))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            words.append(word)
    if None in files:
        raise ValueError("--config: expected a file")
    for before, word in pairwise(["", *words]):
        name, _, value = word.partition("=") if word[:2] == "--" else (before, "", word)
        try:
            check_text(value)
        except Costly as error:
            raise ValueError(f"{name}: {error}") from None
    # Files in front, wherever they stood: flags win over them.
    words = [f"--config={yaml_text(Path(file), command, kind)}" for file in files] + words
    try:
        values = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        raise ValueError(plain(str(error), kind)) from None
    del values["config"]
    return vars(values)


def plain(message: str, of: type[Options]) -> str:
    """What jsonargparse says, in one line; of a value's type in words."""
    found = re.fullmatch(r'Parser key "(\w+)":.*\b(?:Got|Given) value: (.*)', message, re.DOTALL)
    kind = get_type_hints(of).get(found[1]) if found else None
    if kind is None:
        return " ".join(message.split())
    if type(None) in get_args(kind):  # float | None
        kind = get_args(kind)[0]
    named = get_args(kind) if get_origin(kind) is Literal else ()
    expected = f"one of {', '.join(named)}" if named else WORDS[kind]
    # A bare no, mixed_precision's own default, is a truth value in YAML.
    quote = (named or kind is str) and found[2] in ("True", "False")
    hint = "; YAML reads yes, on, no and off so: put quotes around the word" if quote else ""
    return f"{found[1]}: expected {expected}, got {' '.join(found[2].split()):.200}{hint}"


def parse(
    arguments: Sequence[str], command: str = "fastpref train", kind: type[Options] = Config
) -> Any:
    """`--config FILE --field value ...` to the options of a run."""
    return kind(**config_values(arguments, command, kind))


class Costly(ValueError):
    """YAML that may cost more than its text."""


class Plain(yaml.SafeLoader):
    """YAML that costs what its text does: no aliases, no endless list or number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        mark = self.peek_event().start_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        if self.check_event(yaml.AliasEvent) and self.peek_event().anchor in self.anchors:
            raise Costly(f"{where}: an alias is not read: write out what it stands for")
        if isinstance(parent, yaml.SequenceNode) and index == MAX_ITEMS:
            raise Costly(f"{where}: expected a list of at most {MAX_ITEMS}")
        node = super().compose_node(parent, index)
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise Costly(f"{where}: expected a number of at most {MAX_DIGITS} digits")
        return node


def compose(text: str, within: int = 2) -> yaml.Node | None:
    """The nodes of a YAML text; YAMLError: it is none; Costly.

    within: jsonargparse reads a text where it expects a list or a number as YAML again, and so the
    texts of a list: as many times.
    """
    try:
        node = yaml.compose(text, Loader=Plain)
    except RecursionError as error:
        raise Costly(f"is nested too deeply ({error})") from None
    for found in texts(node) if within else ():
        check_text(found, within - 1)
    return node


def safe_load(text: str) -> Any:
    """yaml.safe_load of what is not Costly."""
    compose(text)
    return yaml.safe_load(text)


def check_text(text: str, within: int = 2) -> None:
    """Costly: a text that jsonargparse may take for YAML."""
    with contextlib.suppress(yaml.YAMLError):  # to jsonargparse it is a text too
        compose(text, within)


def texts(node: Any) -> Iterator[str]:
    """Every text below a YAML node."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":str"):
            yield node.value
    elif node is not None:
        for child in node.value if isinstance(node, yaml.Node) else node:
            yield from texts(child)


def yaml_text(path: Path, command: str, kind: type[Options]) -> str:
    """A YAML file's text, all of it fields of `kind` with values."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes; expected lines of `field: value`")
        text = data.decode(**encoding(data))
        if not is_text(text):
            raise ValueError(not_utf8(text))
        node = compose(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror.lower()}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    unknown = f"is no field; {command} --help lists them"
    check_fields(node, text, f"--config {path}", kind.described(), unknown)
    return text


def check_fields(
    node: yaml.Node | None, text: str, where: str, known: Container[str], unknown: str
) -> None:
    """ValueError where a YAML node is no mapping of fields, or says one twice (the last would win);
    so must be what `<<` adds to it.
    """
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where}: expected lines of `field: value`")
    seen: set[str] = set()
    for key, value in node.value:
        line = f"{where}, line {key.start_mark.line + 1}"
        if key.tag.endswith(":merge"):
            check_fields(value, text, where, known, unknown)
            continue
        got = " ".join(text[key.start_mark.index : key.end_mark.index].split())[:100]
        if not key.tag.endswith(":str"):
            raise ValueError(f"{line}: expected the name of a field before the colon, got {got}")
        if key.value not in known:
            raise ValueError(f"{line}: {got} {unknown}")
        if key.value in seen:
            raise ValueError(f"{line}: {key.value} stands there twice")
        seen.add(key.value)
