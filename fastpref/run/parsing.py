"""Command lines and YAML whose every mistake is a ValueError of one line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from .config import Config

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


def config_values(arguments: Sequence[str], command: str, **defaults: Any) -> dict[str, Any]:
    """`--config FILE --field value ...` to the fields of a Config, not yet checked together.

    defaults: of fields, in place of Config's own.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        allow_abbrev=False,
        prog=command,
        exit_on_error=False,
        description=Config.__doc__.splitlines()[0],
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the same fields; flags win over it"
    )
    parser.add_class_arguments(Config, as_group=False)
    parser.set_defaults(defaults)
    words = [word for a in arguments for word in (a.split("=", 1) if a[:9] == "--config=" else [a])]
    for flag, file in pairwise(words):
        if flag == "--config":
            check_yaml(Path(file))
    try:
        values = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        raise ValueError(plain(str(error))) from None
    del values["config"]
    return vars(values)


def plain(message: str) -> str:
    """What jsonargparse says, in one line; of a value's type in words."""
    found = re.fullmatch(r'Parser key "(\w+)":.*\b(?:Got|Given) value: (.*)', message, re.DOTALL)
    kind = get_type_hints(Config).get(found[1]) if found else None
    if kind is None:
        return " ".join(message.split())
    if type(None) in get_args(kind):  # float | None
        kind = get_args(kind)[0]
    named = get_args(kind) if get_origin(kind) is Literal else ()
    expected = f"one of {', '.join(named)}" if named else WORDS[kind]
    # A bare no, mixed_precision's own default, is a truth value in YAML.
    quote = (named or kind is str) and found[2] in ("True", "False")
    hint = "; YAML reads yes, on, no and off so: put quotes around the word" if quote else ""
    return f"{found[1]}: expected {expected}, got {' '.join(found[2].split())}{hint}"


def parse(arguments: Sequence[str], command: str = "fastpref train") -> Config:
    """`--config FILE --field value ...` to a Config."""
    return Config(**config_values(arguments, command))


def check_yaml(path: Path) -> None:
    """ValueError where a YAML file is no mapping of names, or says a field twice (the last would
    win).
    """
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror.lower()}") from None
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config {path}: expected lines of `field: value`")
    seen: set[str] = set()
    for key, _ in node.value:
        where = f"--config {path}, line {key.start_mark.line + 1}"
        if not key.tag.endswith((":str", ":merge")):
            got = " ".join(text[key.start_mark.index : key.end_mark.index].split())
            raise ValueError(f"{where}: expected the name of a field before the colon, got {got}")
        if key.value in seen:
            raise ValueError(f"{where}: {key.value} stands there twice")
        seen.add(key.value)
