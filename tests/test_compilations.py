"""How many compilations of a block's code a training step asks for."""

from __future__ import annotations

import pytest
import torch
from tiny import DPO, STEPS, case, run
from torch._dynamo.utils import counters

from fastpref import compiling, reference

# (adapters on the last half of the blocks, shared prefix): compilations for one shape of batch.
COUNTS = {(False, True): 3, (False, False): 3, (True, True): 4, (True, False): 5}


@pytest.mark.slow
@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize(("half", "shared"), COUNTS)
def test_compilations_of_a_shape_and_of_two(half, shared, form):
    """All in a shape's first step; a second shape costs as many, within compiling's limit."""
    torch._dynamo.reset()
    counters.clear()
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 3  # compile_blocks raises it
    c = case("wan", half=half)
    other = c._replace(latents=c.latents[..., :6])
    try:
        compiling.compile_blocks(c.model, c.family.BLOCKS, backend="aot_eager")
        if shared:
            policy, ref = reference.shared_prefix(c.model, c.family.predict)
        else:
            policy, ref = c.policy, reference.adapters_off(c.model, c.family.predict)
        for shapes, batch in enumerate((c, other), start=1):
            for _ in range(2):
                run(batch, form, policy, ref)
                assert counters["stats"]["unique_graphs"] == shapes * COUNTS[half, shared]
    finally:
        torch._dynamo.config.recompile_limit = before
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", STEPS)
def test_the_sft_control_needs_no_compilation_of_its_own(form):
    torch._dynamo.reset()
    counters.clear()
    c = case("wan")
    try:
        compiling.compile_blocks(c.model, c.family.BLOCKS, backend="aot_eager")
        policy, ref = reference.shared_prefix(c.model, c.family.predict)
        for objective in (None, DPO, None):
            noisy, t, target = c.inputs()
            STEPS[form](
                policy, ref, noisy, t, target, c.cond, c.draws, objective, parameters=c.parameters
            )
            assert counters["stats"]["unique_graphs"] == 3
    finally:
        torch._dynamo.reset()
