"""Frames as CLIP sees them: its preprocessor in plain torch, where the model is, in batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PREPROCESSOR = "preprocessor_config.json"


def tiled(frames: Tensor) -> Tensor:
    """Frames [F, H, W, 3] in the grid that comes nearest to a square, row by row: one picture
    [1, S, S, 3] with black around it, of which a crop to a square cuts nothing.
    """
    count, height, width = frames.shape[:3]
    columns = min(
        range(1, count + 1),
        key=lambda n: abs(math.log(n * width / (math.ceil(count / n) * height))),
    )
    rows = math.ceil(count / columns)
    side = max(rows * height, columns * width)
    picture = frames.new_zeros(side, side, 3)
    top, left = (side - rows * height) // 2, (side - columns * width) // 2
    for i, frame in enumerate(frames):
        y, x = top + i // columns * height, left + i % columns * width
        picture[y : y + height, x : x + width] = frame
    return picture[None]


def preprocess(pictures: Tensor, config: dict[str, Any]) -> Tensor:
    """Pictures uint8 [N, H, W, 3] -> float32 [N, 3, S, S] as a checked preprocessor config says:
    bicubic, the shortest edge to S, cut in the middle, (x / 255 - mean) / std.
    """
    height, width = pictures.shape[1:3]
    size, crop = config["size"]["shortest_edge"], config["crop_size"]["height"]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    x = pictures.permute(0, 3, 1, 2).float()
    # Width, then height, each to whole levels, as Pillow does, which CLIP was trained with.
    for to in ((x.shape[2], width), (height, width)):
        x = nn.functional.interpolate(x, to, mode="bicubic", antialias=True)
        x = x.round().clamp(0, 255)
    top, left = (height - crop) // 2, (width - crop) // 2
    x = x[:, :, top : top + crop, left : left + crop] * config["rescale_factor"]
    mean, std = (x.new_tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (x - mean) / std


def read_preprocessor(path: str | Path, clip: nn.Module) -> dict[str, Any]:
    """The preprocessor_config.json of a folder or hub id, as far as `preprocess` reads it.

    Raises:
        ValueError: it cannot be read, or says what is not done here.
    """
    from transformers.utils import cached_file

    where = f"model {path}"
    try:
        file = cached_file(str(path), PREPROCESSOR)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where}: {PREPROCESSOR} cannot be read ({reason}); copy the original CLIP's"
        ) from None
    found = json_object(Path(file), where)
    side = clip.config.vision_config.image_size
    size, crop = found.get("size", side), found.get("crop_size", side)
    # Old files have a number in place of the mapping.
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    wanted = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
    wanted |= {"resample": 3}
    read = {
        "size": size,
        "crop_size": crop,
        "rescale_factor": found.get("rescale_factor", 1 / 255),
        "image_mean": found.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": found.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
    }
    numbers = [*_numbers(read["image_mean"]), *_numbers(read["image_std"])]
    right = (
        all(found.get(name, value) == value for name, value in wanted.items())
        and type(size.get("shortest_edge")) is int
        and size["shortest_edge"] >= side
        and crop == {"height": side, "width": side}
        and len(numbers) == 6
        and min(_numbers(read["image_std"])) > 0
        and len(_numbers([read["rescale_factor"]])) == 1
    )
    if not right:
        raise ValueError(
            f"{where}: {PREPROCESSOR} expected a bicubic resize of the shortest edge to {side} "
            f"pixels or more, a middle cut of {side}x{side}, and image_mean and image_std of three "
            "numbers; copy the file of the original model"
        )
    return wanted | read | {"image_processor_type": "CLIPImageProcessor"}


def _numbers(values: Any) -> list[float]:
    """The finite numbers of a list."""
    values = values if isinstance(values, list) else []
    return [v for v in values if type(v) in (int, float) and math.isfinite(v)]


def json_object(path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {path.name} is damaged, expected a JSON object; copy it again")
    return found
