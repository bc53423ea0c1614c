"""How many compilations of a block's code a training step asks for, and how many it may."""

from __future__ import annotations

import pytest
import torch
from tiny import DPO, STEPS, case, run
from torch import nn
from torch._dynamo.utils import counters

from fastpref.step import compiling, reference

# (adapters on the last half of the blocks, shared prefix): compilations for one shape of batch.
COUNTS = {(False, True): 3, (False, False): 3, (True, True): 4, (True, False): 5}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """And limits below torch's own, 8 and 256; compile_blocks raises them for the whole process."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=4):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize(("half", "shared"), COUNTS)
def test_compilations_of_a_shape_and_of_two(half, shared, form):
    """All in a shape's first step; a second shape costs as many, within compiling's limit."""
    c = case("wan", half=half)
    other = c._replace(latents=c.latents[..., :6])
    compiling.compile_blocks(c.model, c.family.BLOCKS, backend="aot_eager")
    if shared:
        policy, ref = reference.shared_prefix(c.model, c.family.predict)
    else:
        policy, ref = c.policy, reference.adapters_off(c.model, c.family.predict)
    for shapes, batch in enumerate((c, other), start=1):
        for _ in range(2):
            run(batch, form, policy, ref)
            assert counters["stats"]["unique_graphs"] == shapes * COUNTS[half, shared]


def test_shapes_beyond_torchs_limits_are_compiled_too():
    """Past them a block that must be compiled whole would be an error in the middle of a run."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    compiling.compile_blocks(model, "blocks", backend="eager")
    for batch in range(1, 11):
        assert model.blocks[0](torch.ones(batch, 2)).shape == (batch, 2)
    assert counters["stats"]["unique_graphs"] == 10
    assert 1000 * max(COUNTS.values()) <= compiling.LIMIT, "a thousand shapes of batch"


@pytest.mark.slow
@pytest.mark.parametrize("form", STEPS)
def test_the_sft_control_needs_no_compilation_of_its_own(form):
    c = case("wan")
    compiling.compile_blocks(c.model, c.family.BLOCKS, backend="aot_eager")
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    for objective in (None, DPO, None):
        noisy, t, target = c.inputs()
        STEPS[form](policy, ref, noisy, t, target, c.cond, objective, parameters=c.parameters)
        assert counters["stats"]["unique_graphs"] == 3
