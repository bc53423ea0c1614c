"""Checkpointing: equal gradients, how often attention runs in the backward, what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import case, gradients
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.step import checkpointing

MODES = ("none", "attention", "full")
MODELS = ("toy", "wan", "cogvideox-5b", "sd15")


class Watch(TorchDispatchMode):
    """Counts the forward runs of attention, and the bytes of what is alive of all that was made."""

    def __init__(self):
        super().__init__()
        self.attention, self.made = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.attention += "attention" in str(func) and "backward" not in str(func)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def alive(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def measure(c):
    """(gradient, bytes alive after the forward, attention calls forward and backward)"""
    noisy, t, _ = c.inputs()
    with Watch() as forward:
        pred = c.policy(noisy, t, c.cond)
    bytes_alive = forward.alive
    with Watch() as backward:
        pred.backward(torch.ones_like(pred) / pred.numel())
    return gradients(c.parameters), bytes_alive, forward.attention, backward.attention


@pytest.mark.parametrize("name", MODELS)
def test_modes_differ_in_memory_and_attention_alone(name):
    gradient, alive, again = {}, {}, {}
    for mode in MODES:
        c = case(name)
        count = checkpointing.apply(c.model, c.family.BLOCKS, mode)
        assert count == (0 if mode == "none" else 5 if name == "sd15" else 4)
        gradient[mode], alive[mode], first, again[mode] = measure(c)
        assert first == {"toy": 8, "wan": 8, "cogvideox-5b": 4, "sd15": 8}[name]
    assert torch.equal(gradient["full"], gradient["none"])
    assert torch.equal(gradient["attention"], gradient["none"])
    assert again == {"none": 0, "attention": 0, "full": first}
    assert alive["none"] > 1.5 * alive["attention"] > 1.5 * alive["full"]


class Block(nn.Module):
    """Attention between two layers."""

    def __init__(self, attend=nn.functional.scaled_dot_product_attention):
        super().__init__()
        self.first, self.last, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), attend

    def forward(self, x):
        q, k, v = self.first(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return x + self.last(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def through(model, seed=0):
    """The gradient of every parameter."""
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    return gradients(list(model.parameters()))


@torch.library.custom_op("fastpref_test::flash_attn_fwd", mutates_args=())
def library_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    runs.append(1)
    return nn.functional.scaled_dot_product_attention(q, k, v)


runs: list[int] = []
library_attention.register_autograd(
    lambda ctx, grad: (grad, grad, grad),
    setup_context=lambda ctx, inputs, output: None,
)


@pytest.mark.parametrize(("mode", "expected"), [("none", 2), ("attention", 2), ("full", 4)])
def test_attention_of_a_library_is_kept_too(mode, expected):
    """flash-attn, xformers and diffusers' FA3 register operators with such names."""
    model = Stack(Block(library_attention), Block(library_attention))
    checkpointing.apply(model, "blocks", mode)
    runs.clear()
    through(model)
    assert len(runs) == expected


def test_every_backend_of_torch_is_known():
    names = {
        "flash_attention": "flash_attention_backward",
        "efficient_attention": "efficient_attention_backward",
        "cudnn_attention": "cudnn_attention_backward",
        "flash_attention_for_cpu": "flash_attention_for_cpu_backward",
        "fused_attention_overrideable": "fused_attention_overrideable_backward",
    }
    for forward, backward in names.items():
        ops = [
            getattr(torch.ops.aten, f"_scaled_dot_product_{n}").default for n in (forward, backward)
        ]
        assert [checkpointing.keeps(op) for op in ops] == [True, False], forward
    assert not checkpointing.keeps(torch.ops.aten.mm.default)


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_compiled_blocks_run_their_own_weights(mode):
    model = Stack(Block(), Block())
    checkpointing.apply(model, "blocks", mode)
    wanted = through(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(through(other), wanted) and wanted.norm() > 0
    for block in other.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(through(other), wanted, rtol=1e-6, atol=1e-8)


def test_applied_again_the_last_mode_holds():
    model = Stack(Block(), Block())
    checkpointing.apply(model, "blocks", "attention")
    checkpointing.apply(model, "blocks", "full")
    x = torch.randn(2, 16, 8)
    with Watch() as forward:
        loss = model(x).sum()
    with Watch() as backward:
        loss.backward()
    assert (forward.attention, backward.attention) == (2, 2)
    with torch.no_grad():
        assert not model(x).requires_grad
    checkpointing.apply(model, "blocks", "none")
    loss = model(x).sum()
    with Watch() as backward:
        loss.backward()
    assert backward.attention == 0


@pytest.mark.parametrize(
    ("blocks", "mode", "says"),
    [
        ("blocks", "some", "expected none, attention or full, got 'some'"),
        ("layers", "full", "Stack has no blocks at 'layers'"),
    ],
)
def test_mistakes_are_named(blocks, mode, says):
    with pytest.raises(ValueError, match=says):
        checkpointing.apply(Stack(Block()), blocks, mode)


def test_active_dropout_is_refused():
    block = Block()
    block.drop = nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"Block has dropout 0\.1"):
        checkpointing.apply(Stack(block), "blocks", "full")
    assert checkpointing.apply(Stack(block).eval(), "blocks", "full") == 1
