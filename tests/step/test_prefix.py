"""The shared prefix: it runs once for policy and reference, changes nothing, or is off."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import DPO, STEPS, case, distance, gradients, plain, run
from torch import nn

from fastpref.step import checkpointing, compiling, reference
from fastpref.step.prefix import Prefix


def count_calls(model: nn.Module) -> Counter:
    """Forward runs of every part from now on, by the part's path."""
    calls: Counter = Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return calls


# What each model computes below an adapter in its last half (UNet: its upper half).
SHARED = {
    "toy": ("patch_embedding", "condition_embedder", "blocks.0", "blocks.1"),
    "wan": ("patch_embedding", "condition_embedder.time_embedder", "rope", "blocks.0", "blocks.1"),
    "cogvideox-2b": ("patch_embed", "time_embedding", "transformer_blocks.1"),
    "cogvideox-5b": ("patch_embed", "time_embedding", "transformer_blocks.1"),
    "sd15": ("conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block"),
}
ABOVE = {"toy": "blocks.2", "wan": "blocks.2", "sd15": "up_blocks.0"}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", SHARED)
def test_the_prefix_runs_once_and_changes_nothing(name, form, capfd):
    c = case(name, half=True)
    whole, wanted = run(c, form, c.policy, reference.adapters_off(c.model, c.family.predict))
    expected = plain(c, DPO)
    assert distance(gradients(c.parameters), wanted) < 1e-5
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    run(c, form, policy, ref)  # checks itself once
    calls = count_calls(c.model)
    out, gradient = run(c, form, policy, ref)
    for field in ("loss", "err", "ref_err", "margin"):
        assert torch.equal(getattr(out, field), getattr(whole, field)), field
    assert torch.equal(gradient, wanted)
    assert distance(out.err, expected[1]) < 1e-5 and distance(out.ref_err, expected[2]) < 1e-5
    passes = 1 if form == "joint" else 2 * len(c.weight)
    for path in SHARED[name]:
        assert calls[path] == passes, path
    assert calls[ABOVE.get(name, "transformer_blocks.2")] == 2 * passes
    assert "shared prefix" not in capfd.readouterr().err


@pytest.mark.parametrize("name", SHARED)
def test_adapters_on_every_block_still_share_the_embedders(name):
    c = case(name)
    whole, wanted = run(c, "joint", c.policy, reference.adapters_off(c.model, c.family.predict))
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    run(c, "joint", policy, ref)
    calls = count_calls(c.model)
    out, gradient = run(c, "joint", policy, ref)
    assert torch.equal(out.err, whole.err) and torch.equal(gradient, wanted)
    assert [calls[path] for path in SHARED[name][:2]] == [1, 1]


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "sd15"])
def test_the_prefix_in_bfloat16_as_runs_have_it(name, form):
    """Weights in bfloat16, adapters in float32, under autocast: equal to the bit; a zero adapter
    starts at the reference.
    """
    c = case(name, torch.bfloat16, half=True)
    with torch.no_grad():
        for p in c.parameters:
            p.data = p.data.float()
        for key, p in c.model.named_parameters():
            if "lora_B" in key:
                p.zero_()

    def predict(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return c.family.predict(*arguments)

    whole, wanted = run(
        c, form, lambda *inputs: predict(c.model, *inputs), reference.adapters_off(c.model, predict)
    )
    policy, ref = reference.shared_prefix(c.model, predict)
    for _ in range(2):
        out, gradient = run(c, form, policy, ref)
        assert (out.margin == 0).all() and torch.equal(out.err, whole.err)
        assert torch.equal(gradient, wanted) and gradient.norm() > 0


@pytest.mark.parametrize("mode", ["attention", "full"])
@pytest.mark.parametrize("form", STEPS)
def test_prefix_and_checkpointing_go_together(form, mode):
    c = case("wan", half=True)
    _, wanted = run(c, form, c.policy, reference.adapters_off(c.model, c.family.predict))
    checkpointing.apply(c.model, c.family.BLOCKS, mode)
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    for _ in range(2):
        assert torch.equal(run(c, form, policy, ref)[1], wanted)


def test_between_the_passes_one_activation_is_kept():
    """Of the frozen blocks' outputs only the last one's, which the first adapted block reads."""
    c = case("wan", half=True, pairs=1)
    prefix = Prefix(c.model, reference.adapter_layers(c.model))
    noisy, t, _ = c.inputs()
    with torch.no_grad(), prefix.record(noisy, t, c.cond):
        c.policy(noisy, t, c.cond)
    first, second = (prefix.outputs[block] for block in c.model.blocks[:2])
    assert first.untyped_storage().nbytes() < 100 < second.untyped_storage().nbytes()
    assert c.model.blocks[2] not in prefix.outputs


def test_other_inputs_get_a_whole_pass():
    c = case("wan", half=True)
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    noisy, t, _ = c.inputs()
    with torch.no_grad():
        ref(noisy, t, c.cond)
        other = policy(noisy.clone(), t, c.cond)
        # Recorded for the same values, but the tensors say nothing of it: computed whole, equal.
        assert torch.equal(other, c.policy(noisy, t, c.cond))
        assert torch.equal(policy(noisy, t, c.cond), other)  # the replay
        calls = count_calls(c.model)
        assert torch.equal(policy(noisy, t, c.cond), other)  # used up: whole again
        assert calls["blocks.0"] == 1


def test_an_adapter_that_does_not_train_is_not_below_the_first():
    """Frozen adapters are off in the reference alone, so what follows them is not shared."""
    c = case("wan")
    with torch.no_grad():
        for name, p in c.model.named_parameters():
            p.requires_grad_(p.requires_grad and "blocks.3." in name)
    whole, wanted = run(c, "joint", c.policy, reference.adapters_off(c.model, c.family.predict))
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    calls = count_calls(c.model)
    for _ in range(2):
        out, gradient = run(c, "joint", policy, ref)
    assert torch.equal(out.err, whole.err) and torch.equal(gradient, wanted)
    assert calls["blocks.0"] == 2 + 2 + 2  # two steps, and the comparison of the first


class Odd(nn.Module):
    """A model whose blocks do not only hand their output on."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.ones(4), requires_grad=False)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        kept = 0
        for block in self.blocks:
            x = block(x)
            kept = kept + 2 * x if self.kind == "hidden sum" else kept
        if self.kind == "repeated":
            x = self.blocks[0](x)
        return (x + kept) * self.scale


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("plain", None),
        ("hidden sum", "the second pass would not say the same"),
        ("repeated", "the second pass would not say the same"),
        ("trains outside", "scale trains and belongs to no part of Odd"),
        ("twice", "a Linear is called twice below the first adapter"),
    ],
)
def test_what_cannot_be_shared_exactly_is_not_shared(kind, says, capfd):
    torch.manual_seed(0)
    model = Odd(kind).requires_grad_(False)
    model.blocks[2].requires_grad_()
    if kind == "trains outside":
        model.scale.requires_grad_()
    if kind == "twice":
        model.forward = lambda x: model.blocks[2](model.blocks[0](model.blocks[0](x)))
    x = torch.randn(2, 4)
    wanted = model(x)
    prefix = Prefix(model, [])
    for _ in range(2):
        with torch.no_grad(), prefix.record(x):
            model(x)
        assert torch.equal(prefix.run(lambda: model(x), x), wanted)
    said = capfd.readouterr().err
    assert prefix.why_not == says
    assert said.count("shared prefix: off, two whole passes instead") == (says is not None)
    assert says is None or says in said
    assert [type(block) for block in model.blocks] == [nn.Linear] * 3


def test_compiled_blocks_that_round_otherwise_still_share(capfd):
    """The comparison runs eagerly; what is recorded and replayed comes from the compiled blocks."""

    def rounding(graph, inputs):
        return lambda *values: tuple(value + 1e-3 for value in graph.forward(*values))

    torch.manual_seed(0)
    model = Odd("plain").requires_grad_(False)
    model.blocks[2].requires_grad_()
    x = torch.randn(2, 4)
    eager = model(x)
    compiling.compile_blocks(model, "blocks", backend=rounding)
    prefix = Prefix(model, [])
    with torch.no_grad():
        whole = model(x)
        assert not torch.equal(whole, eager)
        for _ in range(2):
            with prefix.record(x):
                model(x)
            assert torch.equal(prefix.run(lambda: model(x), x), whole)
    assert prefix.why_not is None and not capfd.readouterr().err


def test_an_error_in_a_pass_leaves_the_model_as_it_was():
    c = case("wan", half=True)
    ref = reference.shared_prefix(c.model, c.family.predict)[1]
    noisy, t, _ = c.inputs()
    before = [type(m) for m in c.model.modules()]
    with pytest.raises(RuntimeError):
        ref(noisy[:, :5], t, c.cond)
    assert [type(m) for m in c.model.modules()] == before
