"""What the operators are tested with: draws, rows off any alignment, the comparison of bits."""

import torch
from torch import Tensor

import fastpref.loss.ops  # noqa: F401 - registers the operators

OP = torch.ops.fastpref
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_DRAWS = (0, None, None, None, None)


def unaligned(rows: int, elements: int, dtype: torch.dtype, device="cpu", seed: int = 0) -> Tensor:
    """Random numbers that start one element past an aligned address."""
    random = torch.Generator().manual_seed(seed)
    flat = torch.randn(rows * elements + 1, generator=random).to(device, dtype)
    return flat[1:].view(rows, elements)


def draws(pairs: int, device="cpu") -> tuple:
    """(seed, pair_id, index, p, q)."""
    numbers = torch.arange(pairs, device=device)
    p, q = 1.0 + 0.1 * numbers, -1.0 - 0.2 * numbers
    return 2**62 + 5, numbers * 2**60 - 7, numbers + 3, p, q


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(x.view(views[x.itemsize]), y.view(views[y.itemsize]))
        for x, y in zip(a, b, strict=True)
    )
