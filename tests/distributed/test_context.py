"""The tokens of a clip over 2 and 4 processes: what a step says and teaches is one process's.

Run as a script it is one of those processes; rank 0 prints what the tests look at.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from commands import arguments, options
from launch import run
from safetensors.torch import load_file
from torch import Tensor

from fastpref import ranks
from fastpref.look.sample import sample
from fastpref.mesh import Mesh
from fastpref.run import sharding
from fastpref.run.config import Config
from fastpref.run.parts import predictor
from fastpref.run.train import train
from fastpref.step import checkpointing, compiling, context, pair, reference

pytestmark = pytest.mark.distributed

HERE = Path(__file__)
CPU = torch.device("cpu")
ROUNDING = 2e-5  # of a parameter's gradient, or of a ten-thousandth of the largest


def one_flash_kernel() -> torch.library.Library:
    """The CPU's flash attention under the name of the GPU's, which diffusers calls: its ring then
    runs here.
    """
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    def forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        random = torch.zeros(2, dtype=torch.uint64)
        return out, lse, None, None, q.shape[2], k.shape[2], random, random[0], q.new_empty(0)

    def backward(grad, q, k, v, out, lse, *rest, scale=None):
        of_cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return of_cpu(grad, q, k, v, out, lse, 0.0, False, scale=scale)

    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    return library


def step(c: tiny.Case, form: str = "joint", policy: Any = None, ref: Any = None, **how: Any):
    """(its numbers, {name: gradient}) of one step on this process."""
    noisy, t, target = c.inputs()
    ref = reference.adapters_off(c.model, c.family.predict) if ref is None else ref
    out = {**tiny.STEPS, "split": split}[form](
        policy or c.policy, ref, noisy, t, target, c.cond, tiny.DPO,
        weight=c.weight, parameters=c.parameters, **how,
    )  # fmt: skip
    names = [name for name, p in c.model.named_parameters() if p.requires_grad]
    grads = tiny.gradients(c.parameters).split([p.numel() for p in c.parameters])
    return out, dict(zip(names, grads, strict=True))


def split(policy, ref, noisy, t, target, cond, objective, **how):
    return pair.split(policy, ref, noisy, t, target, cond, objective=objective, **how)


def apart(said: tuple, alone: tuple) -> dict[str, Any]:
    """How far the sum of all processes' gradients is from one process's, of the parameter where it
    is most; how much of it this process had itself; and whether all know the same loss.
    """
    largest = max(grad.norm() for grad in alone[1].values())
    worst, own = (0.0, ""), []
    for name, grad in said[1].items():
        size = max(alone[1][name].norm(), 1e-4 * largest)
        own.append(((grad - alone[1][name]).norm() / size).item())
        dist.all_reduce(grad)
        worst = max(worst, ((grad - alone[1][name]).norm().item() / size.item(), name))
    losses = set(ranks.gathered(said[0].loss.item()))
    off = abs(said[0].loss.item() - alone[0].loss.item())
    return {"off": worst, "own": min(own), "losses": len(losses), "loss": off, "of": len(own)}


def scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**flow)


def clips(c: tiny.Case) -> Tensor:
    cond = {"text": c.cond["text"][:2]}
    how = {
        "steps": 3,
        "seeds": [1, 2],
        "guidance_scale": 3.0,
        "negative": {"text": 0 * cond["text"]},
    }
    return sample(c.model, c.family, scheduler(), cond, c.latents.shape[1:], **how)


def in_shards(c: tiny.Case, alone: tuple, **how: Any) -> dict[str, Any]:
    """As `apart` for full tuning of a model in shards, whose gradients come summed."""
    noisy, t, target = c.inputs()
    out = tiny.joint(
        c.policy, how["ref"], noisy, t, target, c.cond, tiny.DPO,
        weight=c.weight, parameters=c.parameters,
    )  # fmt: skip
    largest = max(grad.norm() for grad in alone[1].values())
    off = []
    for name, p in c.model.named_parameters():
        one = alone[1][name]
        grad = p.grad.full_tensor().flatten() - one
        off.append((grad.norm() / max(one.norm(), 1e-4 * largest)).item())
    return {"off": max(off), "loss": abs((out.loss - alone[0].loss).item()), "of": len(off)}


def as_on_a_gpu(c: tiny.Case) -> dict[str, Any]:
    """Policy and reference of bfloat16 weights with float32 adapters under autocast, which on CUDA
    leaves the norms of queries and keys in float32.
    """
    for p in c.parameters:
        p.data = p.data.float()
    for name, part in c.model.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            part.register_forward_hook(lambda _, args, out: out.float())
    predict = predictor(c.family, CPU, torch.bfloat16)
    ref = reference.adapters_off(c.model, predict)
    return {"policy": lambda *inputs: predict(c.model, *inputs), "ref": ref}


def two() -> dict[str, Any]:
    said = {}
    c, shared = tiny.case("wan"), tiny.case("wan", half=True)
    half, whole = tiny.case("wan", torch.bfloat16), tiny.case("wan")
    halves = as_on_a_gpu(half)
    whole.model.requires_grad_(True)
    frozen = {"ref": reference.base(whole.base, whole.family.predict)}
    alone, alone_shared, pictures = step(c), step(shared), clips(c)
    alone_half, alone_whole = step(half, **halves), step(whole, **frozen)

    whole_shards = whole._replace(model=copy.deepcopy(whole.model))
    sharding.shard(whole_shards.model, "blocks", device=CPU)

    models = [whole_shards.model, c.model, shared.model, half.model, whole.model, whole.base]
    with context.use(models, ulysses=2, ring=1, device=CPU):
        for form in ("joint", "deferred"):
            said[form] = apart(step(c, form), alone)
        said["full tuning"] = apart(step(whole, **frozen), alone_whole)
        said["in shards"] = in_shards(whole_shards, alone_whole, **frozen)
        said["autocast"] = apart(step(half, **halves), alone_half)
        said["clips"] = [
            tiny.distance(clips(c), pictures),
            len(set(ranks.gathered(clips(c).sum().item()))),
        ]
        policy, ref = reference.shared_prefix(shared.model, c.family.predict)
        calls = [0, 0]
        for i, block in ((0, shared.model.blocks[0]), (1, shared.model.blocks[-1])):
            block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        step(shared, policy=policy, ref=ref)  # whose first replay is compared with a whole pass
        calls[:] = [0, 0]
        said["shared prefix"] = apart(step(shared, policy=policy, ref=ref), alone_shared)
        said["calls"] = calls
    after = step(c)[1]
    said["taken back"] = all(torch.equal(grad, alone[1][name]) for name, grad in after.items())
    for mode in ("full", "attention"):
        checkpointing.apply(c.model, c.family.BLOCKS, mode)
        with context.use([c.model], ulysses=2, ring=1, device=CPU):
            said[mode] = apart(step(c), alone)
    checkpointing.apply(c.model, c.family.BLOCKS, "none")
    kernel = one_flash_kernel()
    c.model.set_attention_backend("_native_flash")
    with context.use([c.model], ulysses=1, ring=2, device=CPU):
        said["ring"] = apart(step(c), alone)
        said["ring, deferred"] = apart(step(c, "deferred"), alone)
    del kernel
    return said


def four() -> dict[str, Any]:
    """Shares of the data, and members of pairs, beside contexts."""
    said = {}
    c = tiny.case("wan")
    alone = step(c)
    other = c._replace(latents=-c.latents)
    second = step(other)
    both = {name: grad + second[1][name] for name, grad in alone[1].items()}
    with context.use([c.model], ulysses=2, ring=1, device=CPU):
        mesh = Mesh(contexts=2)
        mine = step([c, other][mesh.share])
        said["shares"] = apart((alone[0], mine[1]), (alone[0], both))
        mesh = Mesh(members=2, contexts=2)
        how = {"member_of": mesh.member, "exchange": mesh.exchange()}
        said["split"] = apart(step(c, "split", **how), alone)
    kernel = one_flash_kernel()
    c.model.set_attention_backend("_native_flash")
    with context.use([c.model], ulysses=2, ring=2, device=CPU):
        said["ring and ulysses"] = apart(step(c), alone)
    del kernel
    return said


def compiled() -> dict[str, Any]:
    """One block, with a checkpoint, which a ring takes compiled alone."""
    said = {}
    kernel = one_flash_kernel()
    c = tiny.case("wan")
    alone = step(c)
    c.model.set_attention_backend("_native_flash")
    checkpointing.apply(c.model, "blocks.3", "full")
    compiling.compile_blocks(c.model, "blocks.3", backend="aot_eager")
    for name, ulysses, ring in (("ulysses", 2, 1), ("ring", 1, 2)):
        with context.use([c.model], ulysses=ulysses, ring=ring, device=CPU):
            said[name] = apart(step(c, ref=alone[0].ref_err), alone)
    said["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    del kernel
    return said


def told(world: int, what: str) -> list[dict[str, Any]]:
    """What each of the processes says of `what`."""
    paths = [str(path) for path in (HERE.parents[2], HERE.parents[1], HERE.parent)]
    out, _ = run(world, str(HERE), what, PYTHONPATH=os.pathsep.join(paths))
    every = json.loads(out.splitlines()[-1])
    assert len(every) == world
    return every


def check(found: dict[str, Any], parameters: int, rounding: float = ROUNDING) -> None:
    assert found["of"] == parameters
    assert found["off"][0] < rounding, found
    assert found["losses"] == 1 and found["loss"] < 1e-6, found
    # A parameter whose gradient were whole on every process would count twice in the sum.
    assert found["own"] > 0.2, found


@pytest.fixture(scope="module")
def by_two() -> list[dict[str, Any]]:
    return told(2, "two")


HOW = ("joint", "deferred", "full", "attention", "ring", "ring, deferred")
ADAPTER = "pytorch_lora_weights.safetensors"
ADAPTERS = 64  # A and B of eight layers in four blocks


@pytest.mark.parametrize(
    "how", ["joint", "deferred", "full", "attention", "ring", "ring, deferred"]
)
def test_gradients_of_two_are_parts_of_a_sum(how, by_two):
    """Also with checkpoints, full and attention, and where keys and values go round."""
    for said in by_two:
        check(said[how], ADAPTERS)


def test_all_that_trains_in_full_tuning(by_two):
    """Outside the blocks too: patches, times and text, the last layer, the modulation."""
    for said in by_two:
        check(said["full tuning"], 187)


def test_full_tuning_in_shards(by_two):
    """Of weights and gradients over the processes that share the clip."""
    for said in by_two:
        found = said["in shards"]
        assert found["of"] == 187 and found["off"] < ROUNDING and found["loss"] < 1e-6, found


def test_autocast_that_leaves_queries_wide(by_two):
    for said in by_two:
        check(said["autocast"], ADAPTERS, rounding=0.05)


def test_the_shared_prefix_stays_shared(by_two):
    for said in by_two:
        check(said["shared prefix"], ADAPTERS // 2)
        assert said["calls"] == [1, 2]  # of the first block and the last: reference, policy


def test_a_clip_is_the_same(by_two):
    for said in by_two:
        off, different = said["clips"]
        assert off < 1e-5 and different == 1


def test_a_model_is_given_back_as_it_was(by_two):
    assert all(said["taken back"] for said in by_two)


def test_contexts_beside_shares_and_members_on_four():
    for said in told(4, "four"):
        for how in ("shares", "split", "ring and ulysses"):
            check(said[how], ADAPTERS)


def test_compiled_blocks():
    """A backend with a log-sum-exp, checkpoints in the blocks, ulysses and ring."""
    for said in told(2, "compiled"):
        for how in ("ulysses", "ring"):
            check(said[how], ADAPTERS)
        assert said["graphs"] == 2  # whole, each once


def test_the_command_gives_the_same_run(encoded_pairs, tmp_path):
    """And the same validation clips, to the pixel."""
    few = {"max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    few |= {"validation_steps": 4, "validation_sampling_steps": 3}
    one = options(encoded_pairs, tmp_path / "one", **few, validation_prompts=["a red disc"])
    train(Config(**one))
    two = options(encoded_pairs, tmp_path / "two", **few, validation_prompts="[a red disc]")
    _, said = run(2, "train", *arguments(two | {"ulysses_degree": 2}))
    assert not [line for line in said if "epochs repeat" not in line]
    a, b = (load_file(tmp_path / here / ADAPTER) for here in ("one", "two"))
    flat = [torch.cat([value.flatten() for value in of.values()]) for of in (a, b)]
    assert tiny.distance(*flat) < 1e-4
    sheets = [tmp_path / here / "validation" / "step-000004.png" for here in ("one", "two")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_what_cannot_be_shared_out_is_one_line(encoded_pairs, tmp_path):
    """Whichever process says it."""
    ring = options(encoded_pairs, tmp_path / "run", ring_degree=2)
    _, said = run(2, "train", *arguments(ring), code=1)
    assert len(said) == 1 and "train: ring_degree 2: runs with attention cudnn" in said[0], said


if __name__ == "__main__":
    with ranks.group():
        found = {"two": two, "four": four, "compiled": compiled}[sys.argv[1]]()
        every = ranks.gathered(found)
    if ranks.main():
        print(json.dumps(every))
