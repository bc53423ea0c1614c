"""What benchmarks count with: FLOPs by formula, true sizes, honest meters and orders."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from bench import meters, pair_loss, step, timing
from bench.architectures import ARCHITECTURES
from bench.meters import Clock, SavedBytes
from fastpref.step.backends import Call

CPU = torch.device("cpu")


# ---- Architectures


@pytest.mark.parametrize(
    "name, tokens, products, attention, nothing_recomputed",
    [
        ("wan", 32760, 82.1, 200.9, 2301),
        ("cogvideox-2b", 17776, 47.2, 72.8, 938),
        ("cogvideox-5b", 17776, 169.1, 163.1, 2482),
    ],
)
def test_flops_are_the_published_counts(name, tokens, products, attention, nothing_recomputed):
    """TFLOP of one sample's forward, and of a pair with an online reference, counted by hand."""
    arch = ARCHITECTURES[name]
    assert arch.tokens(arch.shape) == tokens
    found = arch.forward_flops(arch.shape)
    assert found == pytest.approx((1e12 * products, 1e12 * attention), rel=2e-3)
    online = arch.pair_flops(arch.shape, online=True)
    assert online == pytest.approx(1e12 * nothing_recomputed, rel=1e-3)
    cached = arch.pair_flops(arch.shape, online=False)
    assert online - cached == pytest.approx(2 * sum(found))


@pytest.mark.parametrize(
    "name, billions", [("wan", 1.42), ("cogvideox-2b", 1.69), ("cogvideox-5b", 5.57)]
)
def test_architectures_have_the_true_number_of_parameters(name, billions):
    arch = ARCHITECTURES[name]
    model = arch.make(torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=5e-3)
    kinds = {p.dtype for p in model.parameters()}
    assert torch.bfloat16 in kinds
    if name == "wan":  # loading keeps norms and the time embedding in float32
        assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_formula_counts_what_pytorch_counts():
    """Of the tiny model, in whose forward the embeddings are a small part."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fastpref import models

    arch = ARCHITECTURES["tiny"]
    model = arch.make(CPU, torch.float32)
    latents, cond = arch.inputs("17x256x256", 1, CPU, torch.float32)
    first = {name: value[:1] for name, value in cond.items()}
    math = sdpa_kernel(SDPBackend.MATH)  # of plain products, which the counter knows
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        models.family("wan").predict(model, latents[:1], torch.full((1,), 9.0), first)
    assert sum(arch.forward_flops("17x256x256")) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


@pytest.mark.parametrize("shape", ["81x480", "80x480x832", "81x480x840", "0x480x832", "a"])
def test_shapes_that_do_not_fit_are_one_line(shape, capsys):
    assert step.main(["--device", "cpu", "--shape", shape]) == 1
    said = capsys.readouterr().out
    assert said.startswith("bench.step: --shape") and said.count("\n") == 1


# ---- Meters


def test_saved_bytes_counts_storages_once_and_the_most_at_a_time():
    """x is saved twice; the weight is not counted; a graph that is gone is not held."""
    layer = nn.Linear(8, 8, bias=False)
    saved = SavedBytes(layer)
    with saved.count():
        for _ in range(3):
            x = torch.randn(4, 8, requires_grad=True)
            y = layer(x)  # x
            z = (x.detach() * y).exp()  # x's storage again; exp's result
            z.sum().backward()
            del x, y, z
    assert saved.most == 2 * 4 * 8 * 4
    assert saved.now == 0


def test_the_loss_is_timed_in_every_order_once():
    """What a variant leaves in the caches tells on the next two."""
    rounds = list(islice(timing.orders(list("abcde")), 120))
    assert len(set(map(tuple, rounds))) == 120 == pair_loss.ROUNDS


def test_clock_sums_the_parts_of_a_step():
    clock = Clock(CPU)
    with clock.part("before"):
        pass
    for k in range(3):
        clock.begin()
        for _ in range(2):
            with clock.part("forward"):
                torch.randn(200 * (k + 1), 200) @ torch.randn(200, 200)
        with clock.part("backward"):
            pass
    parts = clock.medians()
    assert set(parts) == {"forward", "backward"}
    assert parts["forward"] > parts["backward"] >= 0


def test_the_attention_kernel_is_that_of_the_forward(monkeypatch):
    """Neither its backward's nor that which draws the inputs, though those take longer."""
    call = Call(1, 2, 256, 256, 32, torch.float32, CPU)
    name = meters.attention_kernel(call, "native")
    assert name == "aten::_scaled_dot_product_flash_attention_for_cpu"
    inputs, recorded = meters.backends.inputs, []

    def slow(call):
        torch.randn(3000, 3000) @ torch.randn(3000, 3000)
        made = inputs(call)
        made[0].register_hook(recorded.append)
        return made

    monkeypatch.setattr(meters.backends, "inputs", slow)
    assert meters.attention_kernel(call, "native") == name and not recorded
