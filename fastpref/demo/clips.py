"""Procedural clips of a coloured disc that moves as the prompt says, and the judge of them."""

from __future__ import annotations

import torch
from torch import Tensor

FRAMES, SIZE = 8, 12
RADIUS, SPEED = 2.2, 0.8  # pixels, pixels per frame
BACKGROUND = 0.1
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.9, 0.85, 0.1),
    "cyan": (0.1, 0.85, 0.9),
    "magenta": (0.9, 0.15, 0.85),
}
DIRECTIONS = {
    "right": (0, 1),
    "down-right": (1, 1),
    "down": (1, 0),
    "down-left": (1, -1),
    "left": (0, -1),
    "up-left": (-1, -1),
    "up": (-1, 0),
    "up-right": (-1, 1),
}  # (y, x), y downwards
FLAWS = {
    "direction": (0.15, 1.0),
    "smoothness": (0.3, 3.0),
    "colour": (0.1, 0.6),
    "background": (0.05, 0.2),
}  # what the judge looks at: the largest flaw it does not see, the smallest that scores 0
PARTS = tuple(FLAWS)


def prompt(colour: str, direction: str) -> str:
    return f"a {colour} disc moving {direction}"


def _combinations(shift: int) -> list[str]:
    """One direction per colour, a diagonal of the colour x direction table."""
    directions = list(DIRECTIONS)
    return [prompt(c, directions[(3 * i + shift) % 8]) for i, c in enumerate(COLOURS)]


# Never in a preference pair: neither; seen in pretraining only, the second.
NEVER_SEEN = _combinations(0)
PRETRAINING_ONLY = _combinations(4)
HELD_OUT = NEVER_SEEN + PRETRAINING_ONLY
PAIR_PROMPTS = [p for c in COLOURS for d in DIRECTIONS if (p := prompt(c, d)) not in HELD_OUT]
PRETRAINING_PROMPTS = PAIR_PROMPTS + PRETRAINING_ONLY


def parse(text: str) -> tuple[Tensor, Tensor]:
    """Colour `[3]` in [0, 1] and unit direction `[2]` (y, x) that a demo prompt asks for."""
    words = text.split()
    if len(words) != 5 or words[1] not in COLOURS or words[4] not in DIRECTIONS:
        raise ValueError(f"demo prompt expected like {prompt('red', 'up-left')!r}, got {text!r}")
    direction = torch.tensor(DIRECTIONS[words[4]], dtype=torch.float32)
    return torch.tensor(COLOURS[words[1]]), direction / direction.norm()


def render(centres: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Discs at `centres [N, F, 2]` of `colour [N, 3]` over `background [N, F, H, W, 3]`."""
    n = torch.arange(background.shape[2]) + 0.0
    y, x = n[:, None], n[None, :]
    dy = y - centres[..., 0, None, None]  # [N, F, H, W]
    dx = x - centres[..., 1, None, None]
    cover = (RADIUS + 0.5 - (dy * dy + dx * dx).sqrt()).clamp(0, 1)[..., None]
    return cover * colour[:, None, None, None] + (1 - cover) * background


def path(direction: Tensor, offset: Tensor) -> Tensor:
    """Straight paths `[N, F, 2]` through the middle plus `offset [N, 2]`."""
    times = torch.arange(FRAMES) - (FRAMES - 1) / 2
    middle = (SIZE - 1) / 2 + offset
    return middle[:, None] + SPEED * times[None, :, None] * direction[:, None]


def perfect(text: str) -> Tensor:
    """The clip a prompt asks for, uint8 [F, H, W, 3]."""
    colour, direction = parse(text)
    clip = render(
        path(direction[None], torch.zeros(1, 2)),
        colour[None],
        torch.full((1, FRAMES, SIZE, SIZE, 3), BACKGROUND),
    )
    return (clip[0] * 255).round().to(torch.uint8)


def flawed(prompts: list[str], generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Training clips `[N, F, H, W, 3]` in [0, 1]; each kind of flaw strikes some of them.

    Flaws: a wrong heading, a slow or a shaky path, a leak of another colour, a tinted and a
    speckled background. `share` scales how often they strike.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    n = len(prompts)

    def strike(probability: float, low: float, high: float) -> Tensor:
        """Sizes [N]: 0 where the flaw is absent, else uniform in [low, high]."""
        return (uniform(n) < share * probability) * (low + (high - low) * uniform(n))

    asked = [parse(p) for p in prompts]
    colour = torch.stack([c for c, _ in asked])
    direction = torch.stack([d for _, d in asked])
    turn = strike(0.3, 0.3, 1.0) * (1 - 2 * (uniform(n) < 0.5).float())  # radians, either way
    cos, sin = turn.cos(), turn.sin()
    y, x = direction.unbind(1)
    heading = torch.stack([cos * y + sin * x, cos * x - sin * y], dim=1)
    heading = heading * (1 - strike(0.3, 0.2, 0.6))[:, None]
    centres = path(heading, 0.4 * normal(n, 2).clamp(-2, 2))
    shake = 0.03 + strike(0.35, 0.3, 0.7)
    centres = centres + shake[:, None, None] * normal(n, FRAMES, 2)
    other = torch.tensor(list(COLOURS.values()))[
        torch.randint(len(COLOURS), (n,), generator=generator)
    ]
    leak = strike(0.4, 0.2, 0.9)[:, None]
    colour = (1 - leak) * colour + leak * other
    tint = strike(0.4, 0.15, 0.45)[:, None] * uniform(n, 3)
    speckle = strike(0.3, 0.05, 0.15)[:, None, None, None, None]
    background = BACKGROUND + tint[:, None, None, None]
    background = background + speckle * normal(n, FRAMES, SIZE, SIZE, 3)
    return render(centres, colour, background).clamp(0, 1)


def judge(text: str, clip: Tensor) -> dict[str, float]:
    """How well `clip uint8 [F, H, W, 3]` does what the prompt asks: each part in [0, 1].

    Each part measures a flaw and sees nothing below a threshold, as people do:
    part = 1 - (flaw - unseen) / (worst - unseen), clamped, with (unseen, worst) of FLAWS.
    `direction`: |moved - asked| / |asked| of the disc's mean velocity; `smoothness`: rms of the
    second difference of its path, px; `colour`: distance of its mean colour, RGB; `background`:
    rms distance from the clean one. `score` is the mean of the four parts. A frame without a disc
    counts as one in the middle, without colour.
    """
    colour, direction = parse(text)
    pixels = clip.float() / 255  # [F, H, W, 3]
    frames, height, width, _ = pixels.shape
    weight = ((pixels - BACKGROUND).norm(dim=-1) - 0.35).clamp(min=0).square()  # [F, H, W]
    mass = weight.sum((1, 2))
    seen = mass > 1e-3
    safe = mass.clamp(min=1e-3)
    y = (weight.sum(2) * torch.arange(height)).sum(1) / safe
    x = (weight.sum(1) * torch.arange(width)).sum(1) / safe
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
    centre = torch.where(seen[:, None], torch.stack([y, x], dim=1), middle)  # [F, 2]

    # Least squares instead of the two end points: a shaky end is no wrong direction.
    times = torch.arange(frames) - (frames - 1) / 2
    moved = (times[:, None] * centre).sum(0) / (times * times).sum()
    asked = SPEED * direction
    bend = (centre[2:] - 2 * centre[1:-1] + centre[:-2]).square().sum(1).mean().sqrt()
    mean = (weight[..., None] * pixels).sum((1, 2)) / safe[:, None]  # [F, 3]
    off = torch.where(seen, (mean - colour).norm(dim=-1), torch.ones(frames)).mean()
    near_y = torch.arange(height)[None, :, None] - centre[:, 0, None, None]
    near_x = torch.arange(width)[None, None, :] - centre[:, 1, None, None]
    outside = (near_y.square() + near_x.square()).sqrt() > RADIUS + 1.5
    dirt = (pixels - BACKGROUND).square().mean(-1)[outside].mean().sqrt()
    flaws = {
        "direction": (moved - asked).norm() / asked.norm(),
        "smoothness": bend,
        "colour": off,
        "background": dirt,
    }
    parts = {}
    for name, (unseen, worst) in FLAWS.items():
        part = 1 - (float(flaws[name]) - unseen) / (worst - unseen)
        parts[name] = min(max(part, 0.0), 1.0)
    return {"score": sum(parts.values()) / len(parts), **parts}
