"""The kernels, the traffic and the memory of a compiled graph, counted by hand."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastpref.step.fusion import Work, fused

N = 64
SIZE = 4 * N * N  # bytes of a float32 matrix


def graph(function, *inputs: Tensor):
    return make_fx(function, tracing_mode="fake")(*inputs)


def traffic(work: Counter[Work]) -> list[int]:
    return sorted(w.bytes for w, n in work.items() for _ in range(n) if w.kind == "traffic")


def test_what_lies_between_products_is_one_kernel():
    def run(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight
        return ((y * 2 + x).relu() - 1) @ weight

    alive, work = fused(graph(run, *torch.randn(2, N, N)))
    products = [w for w in work.elements() if w.kind == "product"]
    assert [w.flops for w in products] == [2.0 * N**3] * 2
    assert [w.bytes for w in products] == [3 * SIZE] * 2
    assert traffic(work) == [3 * SIZE], "y and x read, the next product's input written"
    assert alive == 2 * SIZE, "y beside what is made of it, that beside the result"


def test_what_is_cheap_is_computed_again_and_not_written():
    """A value of one buffer that is used before and after a product; of two it is stored."""

    def run(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        wide = x * 3
        y = (wide + 1) @ weight
        return y + wide

    inputs = torch.randn(3, N, N)
    assert traffic(fused(graph(run, *inputs))[1]) == [2 * SIZE, 3 * SIZE]

    def stored(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        both = x + other
        y = (both + 1) @ weight
        return y + both

    assert traffic(fused(graph(stored, *inputs))[1]) == [3 * SIZE, 4 * SIZE]


def test_views_move_nothing_and_attention_is_counted():
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.view(2, 8, 4, 16).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads)

    _, work = fused(graph(run, *torch.randn(3, 2, 8, 64)))
    (attention,) = (w for w in work if w.kind != "traffic")
    assert (attention.kind, attention.dim) == ("attention", 16)
    assert attention.flops == 4.0 * (2 * 4 * 8 * 16) * 8
    assert not traffic(work)
