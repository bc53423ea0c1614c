"""Every model on every rung against two models in one plain batch: loss, errors, gradients."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import DPO, NAMES, STEPS, case, distance, gradients, plain

from fastpref.pairs.dataset import Pair
from fastpref.step import cache, checkpointing, compiling, filling, graphs, reference

RUNGS = (
    "adapters off", "shared prefix", "frozen copy", "cached", "checkpointing attention",
    "checkpointing full", "static buffers", "compiled",
)  # fmt: skip
# Wan's and CogVideoX-5B's own code computes parts in float32 whatever the dtype.
WIDE = ("cogvideox-2b", "sd15")


class Pairs(list):
    """A case's pairs as `filling.fill` reads a set."""

    def __init__(self, c) -> None:
        w, l = c.latents.chunk(2)
        for i, pair_id in enumerate(c.draws.pair_id.tolist()):
            cond = {name: value[i] for name, value in c.cond.items()}
            self.append(
                Pair(
                    latents_w=w[i],
                    latents_l=l[i],
                    cond=cond,
                    weight=1.0,
                    pair_id=pair_id,
                    prompt="",
                )
            )
        self.shapes = ["one"] * len(self)
        self.pair_ids = c.draws.pair_id.tolist()


def cached(c, form, folder):
    """The errors of the base, filled and read back."""
    count = len(c.draws.pair_id)
    kind = {"draws_per_pair": count, "train_batch_size": count, "seed": 0, "pair_mode": form}

    def prepare(k, batch):
        index = torch.full_like(batch.pair_id, k)
        return batch, type(c.draws)(c.draws.seed, batch.pair_id, index)

    errors = cache.ErrorCache(folder, kind, Pairs(c))
    filling.fill(errors, reference.base(c.base, c.family.predict), c.process, prepare)
    return cache.ErrorCache(folder, kind, Pairs(c)).get(c.draws)


def take(c, form, rung, folder):
    """One step of the form on the rung."""
    policy, ref = c.policy, None
    if rung == "cached":
        ref = cached(c, form, folder)
    elif rung == "frozen copy":
        ref = reference.base(copy.deepcopy(c.base), c.family.predict)
    elif rung.startswith("checkpointing"):
        checkpointing.apply(c.model, c.family.BLOCKS, rung.split()[1])
    elif rung == "compiled":
        compiling.compile_blocks(c.model, c.family.BLOCKS, backend="aot_eager")
    if rung in ("shared prefix", "compiled"):
        policy, ref = reference.shared_prefix(c.model, c.family.predict)
    elif ref is None:
        ref = reference.adapters_off(c.model, c.family.predict)

    def step(latents, pair_id, index, weight, **cond):
        draws = type(c.draws)(c.draws.seed, pair_id, index)
        noisy, t, target = c.process.noise(latents, draws)
        return STEPS[form](
            policy, ref, noisy, t, target, cond, DPO,
            weight=weight, parameters=c.parameters,
        )  # fmt: skip

    if rung == "static buffers":
        step = graphs.StepGraph(step, torch.device("cpu"), parameters=c.parameters)
    ids = {"pair_id": c.draws.pair_id, "index": c.draws.index}
    return step(latents=c.latents, weight=c.weight, **ids, **c.cond)


def cases():
    for name in NAMES:
        for dtype in (torch.float32, torch.float64) if name in WIDE else (torch.float32,):
            for form in STEPS:
                for rung in RUNGS:
                    slow = rung == "compiled"
                    yield pytest.param(
                        name, dtype, form, rung,
                        id=f"{name}-{str(dtype)[6:]}-{form}-{rung.replace(' ', '_')}",
                        marks=[pytest.mark.slow] if slow else [],
                    )  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """(loss, err, ref_err, gradient) of the plain step, once for each model."""
    known: dict = {}

    def of(name, dtype):
        if (name, dtype) not in known:
            c = case(name, dtype)
            known[name, dtype] = (*plain(c, DPO), gradients(c.parameters))
        return SimpleNamespace(
            **dict(zip(("loss", "err", "ref_err", "grad"), known[name, dtype], strict=True))
        )

    return of


@pytest.mark.parametrize(("name", "dtype", "form", "rung"), list(cases()))
def test_every_rung_is_the_plain_two_model_step(name, dtype, form, rung, expected, tmp_path):
    torch._dynamo.reset()
    wanted, c = expected(name, dtype), case(name, dtype)
    out = take(c, form, rung, tmp_path)
    near = 1e-5 if dtype == torch.float32 else 1e-10
    assert abs(out.loss - wanted.loss) <= near * abs(wanted.loss)
    for i in range(4):  # winner and loser, of each of the two models
        here, there = ((v.err, v.ref_err)[i // 2].chunk(2)[i % 2] for v in (out, wanted))
        assert distance(here, there) < near
    assert wanted.grad.norm() > 0
    assert distance(gradients(c.parameters), wanted.grad) < near
