"""Procedural clips of two objects, one of which passes before the other, and the judge of them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.evidence.mid_prompts import DIRECTIONS, read
from fastpref.demo.clips import BACKGROUND, COLOURS

FRAMES, SIZE = 16, 32
RADIUS, SPEED = 4.0, 1.2  # pixels, pixels per frame
HALF_SIDE = 3.5  # of a square: as large as a disc
LEAST = 8  # pixels of an object that is seen
FLAWS = {
    "colour": (0.1, 0.6),
    "direction": (0.15, 1.0),
    "smoothness": (0.4, 4.0),
    "order": (0.2, 0.8),
    "background": (0.05, 0.2),
}  # what the judge looks at: the largest flaw it does not see, the smallest that scores 0
PLACES = ("first", "second")  # of an object in the prompt
PARTS = (
    *(f"{place}_{kind}" for place in PLACES for kind in ("colour", "direction", "smoothness")),
    "order",
    "background",
)


class Scenes(NamedTuple):
    """What N prompts ask for; the second dimension is the object's place in the prompt."""

    colour: Tensor  # [N, 2, 3] in [0, 1]
    square: Tensor  # [N, 2] bool, else a disc
    direction: Tensor  # [N, 2, 2] (y, x), y downwards
    front: Tensor  # [N] bool: the first passes before the second

    def take(self, rows: Tensor) -> Scenes:
        return Scenes(*(value[rows] for value in self))

    def to(self, device: torch.device) -> Scenes:
        return Scenes(*(value.to(device) for value in self))


def parse(prompts: list[str]) -> Scenes:
    found = [read(text) for text in prompts]
    things = [(first, second) for first, _, second in found]
    return Scenes(
        torch.tensor([[COLOURS[t.colour] for t in pair] for pair in things]),
        torch.tensor([[t.shape == "square" for t in pair] for pair in things]),
        torch.tensor([[DIRECTIONS[t.direction] for t in pair] for pair in things]).float(),
        torch.tensor([order == "before" for _, order, _ in found]),
    )


def render(centres: Tensor, scenes: Scenes, background: Tensor) -> Tensor:
    """Objects at `centres [N, 2, F, 2]` over `background [N, F, H, W, 3]` -> the same shape."""
    cover = covers(centres, scenes.square)[..., None]  # [N, 2, F, H, W, 1]
    colour = scenes.colour[:, :, None, None, None]
    clip = background
    for front in (False, True):  # what is behind first
        which = (scenes.front == front).long()  # the first object where it is its turn
        rows = torch.arange(len(which), device=which.device), 1 - which
        clip = cover[rows] * colour[rows] + (1 - cover[rows]) * clip
    return clip


def covers(centres: Tensor, square: Tensor) -> Tensor:
    """How much of each pixel objects at `centres [..., F, 2]` fill: `[..., F, H, W]` in [0, 1]."""
    dy, dx = away(centres)
    square = square[..., None, None, None]
    disc = RADIUS + 0.5 - (dy * dy + dx * dx).sqrt()
    box = HALF_SIDE + 0.5 - torch.maximum(dy.abs(), dx.abs())
    return torch.where(square, box, disc).clamp(0, 1)


def away(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of every pixel from `centres [..., 2]`: dy `[..., H, 1]` and dx `[..., 1, W]`."""
    n = torch.arange(SIZE, device=centres.device) + 0.0
    return n[:, None] - centres[..., 0, None, None], n[None, :] - centres[..., 1, None, None]


def path(direction: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Straight paths `[..., F, 2]` through the middle plus `offset [..., 2]`."""
    times = torch.arange(FRAMES, device=direction.device) - (FRAMES - 1) / 2
    middle = torch.full_like(direction, (SIZE - 1) / 2) + offset
    return middle[..., None, :] + SPEED * times[:, None] * direction[..., None, :]


def clean(count: int, device: torch.device | None = None) -> Tensor:
    return torch.full((count, FRAMES, SIZE, SIZE, 3), BACKGROUND, device=device)


def to_bytes(clips: Tensor) -> Tensor:
    return (clips * 255).round().to(torch.uint8)


def perfect(text: str) -> Tensor:
    """The clip a prompt asks for, uint8 [F, H, W, 3]."""
    scenes = parse([text])
    return to_bytes(render(path(scenes.direction), scenes, clean(1))[0])


def flawed(asked: Scenes, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Training clips `[N, F, H, W, 3]` in [0, 1]; each kind of flaw strikes some of them.

    Flaws of each object: a wrong heading, a slow or a shaky path, a leak of another colour; of the
    clip: the wrong one in front, a tinted and a speckled background. `share` scales how often they
    strike. All is drawn on the generator's device, where `asked` lies too.
    """
    place = {"generator": generator, "device": generator.device}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **place)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, **place)

    def strike(probability: float, low: float, high: float, *shape: int) -> Tensor:
        """Sizes: 0 where the flaw is absent, else uniform in [low, high]."""
        return (uniform(*shape) < share * probability) * (low + (high - low) * uniform(*shape))

    n = len(asked.front)
    turn = strike(0.2, 0.3, 1.2, n, 2) * (1 - 2 * (uniform(n, 2) < 0.5).float())  # radians
    cos, sin = turn.cos(), turn.sin()
    y, x = asked.direction.unbind(2)
    heading = torch.stack([cos * y + sin * x, cos * x - sin * y], dim=2)
    heading = heading * (1 - strike(0.2, 0.2, 0.7, n, 2))[..., None]
    centres = path(heading, 0.6 * normal(n, 2, 2).clamp(-2, 2))
    shake = 0.05 + strike(0.25, 0.5, 1.2, n, 2)
    centres = centres + shake[..., None, None] * normal(n, 2, FRAMES, 2)
    palette = torch.tensor(list(COLOURS.values()), device=generator.device)
    other = palette[torch.randint(len(COLOURS), (n, 2), **place)]
    leak = strike(0.3, 0.2, 0.8, n, 2)[..., None]
    colour = (1 - leak) * asked.colour + leak * other
    front = asked.front ^ (uniform(n) < share * 0.25)
    tint = strike(0.3, 0.15, 0.45, n, 1) * uniform(n, 3)
    speckle = strike(0.25, 0.05, 0.15, n, 1, 1, 1, 1)
    background = clean(n, generator.device) + tint[:, None, None, None]
    background = background + speckle * normal(n, FRAMES, SIZE, SIZE, 3)
    return render(centres, Scenes(colour, asked.square, heading, front), background).clamp(0, 1)


class Measured(NamedTuple):
    """What is seen of the two objects of a clip."""

    area: Tensor  # [2, F], pixels
    centre: Tensor  # [2, F, 2]; the middle where nothing is seen
    colour: Tensor  # [2, F, 3]


def measure(scene: Scenes, pixels: Tensor) -> Measured:
    """Shares every pixel that is not background among the two objects a scene of one prompt asks
    for, by its colour and, where that does not tell, by its place.
    """
    ground = pixels.flatten(0, 2).median(0).values  # a tint is no object
    thing = (((pixels - ground).norm(dim=-1) - 0.3) / 0.2).clamp(0, 1)  # [F, H, W]
    off = (pixels - scene.colour[0, :, None, None, None]).norm(dim=-1) / 0.3  # [2, F, H, W]
    dy, dx = away(path(scene.direction[0]))
    fit = -(off.square() + (dy * dy + dx * dx) / 36) / 2
    weight = thing * fit.softmax(0)
    area = weight.sum((2, 3))
    safe = area.clamp(min=1e-3)
    places = torch.arange(SIZE) + 0.0
    y = (weight.sum(3) * places).sum(2) / safe
    x = (weight.sum(2) * places).sum(2) / safe
    seen = (area > LEAST)[..., None]
    centre = torch.where(seen, torch.stack([y, x], dim=2), (SIZE - 1) / 2)
    colour = (weight[..., None] * pixels).sum((2, 3)) / safe[..., None]
    return Measured(area, centre, colour)


@lru_cache(maxsize=4096)
def ideal(text: str) -> Measured:
    """What is measured of the perfect clip: all else is measured against it, so that what an
    occlusion does to a centre is no flaw."""
    return measure(parse([text]), perfect(text).float() / 255)


def judge(text: str, clip: Tensor) -> dict[str, float]:
    """How well `clip uint8 [F, H, W, 3]` does what the prompt asks: each part in [0, 1].

    part = 1 - (flaw - unseen) / (worst - unseen), clamped, with (unseen, worst) of FLAWS. Of each
    object, in the frames where neither hides much of the other in the perfect clip, and with the
    distance d [F, 2] of its centre from the one there: `direction`: |slope of d| / speed;
    `smoothness`: rms of d's second difference, px; `colour`: distance from its mean colour there,
    RGB, 1 in a frame without it. `order`: share of the common pixels of both shapes, on straight
    paths fitted to what is seen, that do not show the one in front; `background`: rms distance from
    the clean one around both. `score` is the mean of the parts.
    """
    scene, best = parse([text]), ideal(text)
    pixels = clip.float() / 255
    found = measure(scene, pixels)
    used = (best.area > 0.75 * best.area.amax(1, keepdim=True)).all(0)  # [F]
    d = found.centre - best.centre
    middle = d[:, used].mean(1)  # [2, 2]
    times = (torch.arange(FRAMES) - (FRAMES - 1) / 2)[:, None]  # as many used before 0 as after
    # Least squares instead of the two end points: a shaky end is no wrong direction.
    slope = (times * d)[:, used].sum(1) / times[used].square().sum()
    bend = (d[:, 2:] - 2 * d[:, 1:-1] + d[:, :-2]).square().sum(2)
    whole = used[2:] & used[1:-1] & used[:-2]
    seen = found.area > LEAST
    off = torch.where(seen, (found.colour - best.colour).norm(dim=-1), 1.0)
    fitted = path(scene.direction[0]) + middle[:, None] + slope[:, None] * times
    flaws = {"order": wrong_order(scene, pixels, found, used & seen, fitted)}
    flaws["background"] = dirt(pixels, torch.where(seen[..., None], found.centre, fitted))
    for i, place in enumerate(PLACES):
        flaws[f"{place}_colour"] = off[i][used].mean()
        flaws[f"{place}_direction"] = slope[i].norm() / SPEED
        flaws[f"{place}_smoothness"] = bend[i][whole].mean().sqrt()
    parts = {}
    for name in PARTS:
        unseen, worst = FLAWS[name.split("_")[-1]]
        part = 1 - (float(flaws[name]) - unseen) / (worst - unseen)
        parts[name] = min(max(part, 0.0), 1.0)
    return {"score": sum(parts.values()) / len(parts), **parts}


def wrong_order(
    scene: Scenes, pixels: Tensor, found: Measured, apart: Tensor, fitted: Tensor
) -> Tensor:
    """Share of the pixels common to both shapes at `fitted [2, F, 2]` that show the wrong one.

    It is told by the objects' own colours in the frames `apart [2, F]`, whatever the prompt asks.
    Of paths that hardly cross at least a quarter of what should be common counts; 1 where one is
    never seen.
    """
    if not apart.any(1).all():  # one is never seen
        return torch.ones(())
    weight = apart[..., None].float()
    colour = (weight * found.colour).sum(1) / weight.sum(1).clamp(min=1)  # [2, 3]
    square = scene.square[0]
    common = (covers(fitted, square) > 0.9).all(0)  # [F, H, W]
    asked = (covers(path(scene.direction[0]), square) > 0.9).all(0).sum()
    off = (pixels - colour[:, None, None, None]).square().sum(-1)  # [2, F, H, W]
    front, back = off if scene.front else off.flip(0)
    right = (back + 1e-6) / (front + back + 2e-6) * (torch.minimum(front, back) < 0.3)
    return 1 - (common * right).sum() / torch.maximum(common.sum(), asked / 4)


def dirt(pixels: Tensor, centres: Tensor) -> Tensor:
    """Rms distance from the clean background outside the objects at `centres [2, F, 2]`."""
    dy, dx = away(centres)
    outside = ((dy * dy + dx * dx).sqrt() > RADIUS + 2).all(0)
    return (pixels - BACKGROUND).square().mean(-1)[outside].mean().sqrt()
