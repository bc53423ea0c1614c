"""The prompts of two objects that cross, and which of them are held out."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from fastpref.demo.clips import COLOURS

DIRECTIONS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}  # (y, x)
SHAPES = ("disc", "square")
ORDERS = ("before", "behind")


class Thing(NamedTuple):
    """One object as a prompt names it."""

    colour: str
    shape: str
    direction: str


def prompt(first: Thing, order: str, second: Thing) -> str:
    """The toy family adds word i + 8 to word i, which here tells whose each colour is."""
    a, b = (f"a {thing.colour} {thing.shape} moving {thing.direction}" for thing in (first, second))
    return f"{a} passes {order} {b}"


def read(text: str) -> tuple[Thing, str, Thing]:
    """The two objects of a prompt and their order; ValueError: it is none of this world."""
    words = text.split()
    if len(words) == 12:
        first, second = (Thing(*words[i : i + 2], words[i + 3]) for i in (1, 8))
        order = words[6]
        known = order in ORDERS and all(
            t.colour in COLOURS and t.shape in SHAPES and t.direction in DIRECTIONS
            for t in (first, second)
        )
        if known and prompt(first, order, second) == text:
            return first, order, second
    sample = prompt(Thing("red", "disc", "right"), "behind", Thing("blue", "square", "up"))
    raise ValueError(f"prompt expected like {sample!r}, got {text!r}")


def held_out(thing: Thing) -> int:
    """Of the colour x direction table: 0 for a pair's, 1 of pretraining only, 2 never seen."""
    place = list(COLOURS).index(thing.colour) + list(DIRECTIONS).index(thing.direction)
    return (2, 0, 1, 0)[place % 4]


def every(kind: int) -> list[str]:
    """All prompts whose objects, the most held out of the two, are of this kind; shuffled."""
    things = [Thing(*words) for words in product(COLOURS, SHAPES, DIRECTIONS)]
    found = [
        prompt(first, order, second)
        for first, order, second in product(things, ORDERS, things)
        if first.colour != second.colour and first.direction != second.direction
        if max(held_out(first), held_out(second)) == kind
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(kind))
    return [found[i] for i in order.tolist()]


VALIDATION_PROMPTS, PAIR_PROMPTS = every(0)[:64], every(0)[64:]
PRETRAINING_ONLY, NEVER_SEEN = every(1), every(2)
PRETRAINING_PROMPTS = VALIDATION_PROMPTS + PAIR_PROMPTS + PRETRAINING_ONLY
# Half never seen, half of pretraining only. Beta is chosen on a third, and reported on the others.
HELD_OUT = [text for both in zip(NEVER_SEEN, PRETRAINING_ONLY, strict=False) for text in both]
CHOICE = [text for i, text in enumerate(HELD_OUT) if i // 2 % 3 == 0]
REPORT = [text for i, text in enumerate(HELD_OUT) if i // 2 % 3]
