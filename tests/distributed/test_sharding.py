"""Full tuning in shards: the steps of one process, checkpoints that any number of processes read.

The file is also what torchrun starts: `test_sharding.py WHAT FOLDER`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastpref
from fastpref import ranks
from fastpref.look.sample import sample
from fastpref.run import artifact, checkpoint, optimisation, sharding
from fastpref.run.guard import Guard
from fastpref.step import checkpointing, compiling, pair, reference

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NAMES = ("wan", "sd15")
BATCHES, STEPS, SAVED = 4, 3, 2  # of a step, of a run, the step of its checkpoint
STATE = {"margin_noise": None, "made_of": {}, "meter": {}, "metrics": {}}
RATE = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}


class Tuning:
    """A tiny model, fully tuned: a step is BATCHES batches of one pair, whoever computes them."""

    def __init__(self, name: str, mode: str = "none", compile: bool = False, **how: Any):
        self.case = tiny.case(name, pairs=BATCHES)
        family, self.model = self.case.family, self.case.base.requires_grad_(True)
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        with torch.no_grad():  # no longer its own reference
            for i, p in enumerate(self.model.parameters()):
                p += 0.01 * torch.arange(p.numel()).add(i).sin().view(p.shape)
        checkpointing.apply(self.model, family.BLOCKS, mode)
        for model in (self.model, frozen):
            if compile:
                compiling.compile_blocks(model, family.BLOCKS, backend="aot_eager")
            if ranks.world() > 1:
                sharding.shard(model, family.BLOCKS, device=CPU, **how)
        self.parameters = list(checkpoint.trainable(self.model).values())
        self.optimizer = optimisation.adamw(self.parameters, weight_decay=0.01, **RATE)
        self.guard = Guard(CPU)
        both = reference.of_run(self.model, frozen, family.predict, shared=False)
        self.policy, self.reference = both

    def inputs(self, *own: int) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], fastpref.Target]:
        c, own = self.case, list(own)
        rows = [*own, *(BATCHES + i for i in own)]
        draws = fastpref.Draws(c.draws.seed, c.draws.pair_id[own], c.draws.index[own])
        noisy, t, target = c.process.noise(c.latents[rows], draws)
        return (noisy, t, {k: v[rows] for k, v in c.cond.items()}), target

    def step(self) -> float:
        mine = ranks.share(range(BATCHES))
        for i in mine:
            inputs, target = self.inputs(i)
            said, ref = self.policy(*inputs), self.reference(*inputs)
            (pair.training_loss(said, target, ref, tiny.DPO).loss / BATCHES).backward()
        norm = optimisation.update(self.optimizer, self.parameters, self.guard, 1.0)
        self.optimizer.zero_grad()
        return norm.item()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments, whole."""
        found = checkpoint.trainable(self.model) | checkpoint.moments(self.model, self.optimizer)
        return {k: sharding.full(v.detach()).clone().contiguous() for k, v in found.items()}


# ---- What the processes do


def train(name: str, folder: Path) -> None:
    """A run with a checkpoint in it, which goes on while that is written."""
    run, norms = Tuning(name), []
    for step in range(1, STEPS + 1):
        norms.append(run.step())
        if step == SAVED:
            kept = run.tensors()
            how = (folder, step, run.model, run.optimizer, STATE, 2)
            if ranks.world() == 1:
                checkpoint.save(*how)
            else:
                wait = checkpoint.save_shards(*how, torch.distributed.new_group(backend="gloo"))
    if ranks.world() > 1:
        assert wait() == folder / f"checkpoint-{SAVED}"
    write(folder / "saved.safetensors", kept)
    write(folder / "end.safetensors", run.tensors() | {"norms": torch.tensor(norms)})
    plain = run.model if ranks.world() == 1 else sharding.whole(run.model)
    if ranks.main():
        artifact.export(folder, plain)


def resume(name: str, folder: Path, out: Path) -> Tuning:
    """What is read of a checkpoint, and the end of the run that goes on from there."""
    run = Tuning(name)
    run.step()  # parameters and optimiser hold something else
    state = checkpoint.load(folder / f"checkpoint-{SAVED}", run.model, run.optimizer)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "saved.safetensors", run.tensors())
    for _ in range(state["step"], STEPS):
        run.step()
    write(out / "end.safetensors", run.tensors())
    return run


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    if ranks.main():
        save_file(tensors, path)


def skip(run: Tuning) -> None:
    """A step with a NaN on rank 1 alone is skipped by all; a NaN in its shard is seen by all."""
    before, was = run.tensors(), run.case.latents.clone()
    if ranks.rank() == 1:
        run.case.latents.view(-1)[0] = float("nan")
        run.case.latents[:] = run.case.latents.view(-1)[0]
    assert not run.step() < float("inf")
    after = run.tensors()
    assert run.guard.skipped == 1 and all(after[k].equal(v) for k, v in before.items())
    run.case.latents[:] = was
    assert run.step() < float("inf") and run.guard.skipped == 1
    after = run.tensors()
    assert all(not after[k].equal(before[k]) for k in checkpoint.trainable(run.model))

    assert sharding.finite(run.parameters)
    if ranks.rank() == 1:
        sharding.local(run.parameters[-1].detach())[0] = float("nan")
    assert not sharding.finite(run.parameters)


def full_disk(run: Tuning, folder: Path) -> None:
    """Where one cannot write its part all say so, and the checkpoint before stays the newest."""
    group = torch.distributed.new_group(backend="gloo")
    how = (run.model, run.optimizer, STATE, 2, group)
    checkpoint.save_shards(folder, 1, *how)()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written \(File too large\): mend"):
        checkpoint.save_shards(folder, 2, *how)()
    assert checkpoint.newest(folder) == (folder / "checkpoint-1", [])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for step in (2, 3):
        checkpoint.save_shards(folder, step, *how)()
    ranks.barrier()
    assert [p.name for p in checkpoint.folders(folder)] == ["checkpoint-3", "checkpoint-2"]


def look(run: Tuning) -> None:
    """A pass without gradient, as between two steps, leaves no weights behind for the next one."""
    inputs, _ = run.inputs(0)
    with torch.no_grad():
        before = run.policy(*inputs)
        now = checkpoint.trainable(run.model).values()
        assert all(p is q for p, q in zip(now, run.parameters, strict=True))
        for p in run.parameters:
            p *= 0.5
        assert not run.policy(*inputs).allclose(before)
        for p in run.parameters:
            p *= 2
        assert run.policy(*inputs).equal(before)


def sampled(run: Tuning) -> None:
    """One whose clip is not finite makes as many passes as the others, who have theirs."""
    case, scale = run.case, float("nan") if ranks.rank() == 1 else 1.0
    cond = {name: scale * value[:1] for name, value in case.cond.items()}
    how = {"steps": 3, "seeds": [1]}
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    given = (run.model, case.family, scheduler, cond, case.latents.shape[1:])
    try:
        assert sample(*given, **how).isfinite().all() and ranks.main()
    except ValueError as error:
        assert "step 1 of 3: 1: expected finite values" in str(error) and not ranks.main()
    ranks.barrier()


def compose() -> None:
    """Checkpointed, compiled or offloaded blocks take the same steps."""
    ends = []
    for how in ({}, {"mode": "full", "compile": True}, {"mode": "attention", "offload": True}):
        run = Tuning("wan", **how)
        run.step()
        run.step()
        ends.append(run.tensors())
    for other in ends[1:]:
        assert all(other[k].equal(v) for k, v in ends[0].items())


def one_by_one() -> None:
    """Member by member, of two pairs each: the gradient of all at once, of DPO and of sft."""
    for objective in (tiny.DPO, dataclasses.replace(tiny.DPO, safeguard=0.5), None):
        found = []
        for form in ("joint", "deferred"):
            run = Tuning("wan")
            (noisy, t, cond), target = run.inputs(*ranks.share(range(BATCHES)))
            how = {"scale": 0.5, "parameters": run.parameters}
            if form == "joint":
                said, ref = (says(noisy, t, cond) for says in (run.policy, run.reference))
                pair.backward(pair.training_loss(said, target, ref, objective), **how)
            else:
                given = (run.policy, run.reference, noisy, t, target, cond)
                pair.deferred(*given, objective=objective, **how)
            found.append(torch.cat([sharding.full(p.grad).flatten() for p in run.parameters]))
        assert tiny.distance(*found) < 1e-5 and found[0].norm() > 0


def halved() -> None:
    """Sums in bfloat16, as asked."""
    wide, half = Tuning("wan", reduced=torch.float32), Tuning("wan", reduced=torch.bfloat16)
    assert wide.step() == Tuning("wan").step()
    norm = half.step()
    a, b = (
        sharding.full(run.optimizer.state[run.parameters[0]]["exp_avg"]) for run in (wide, half)
    )
    assert 1e-5 < tiny.distance(a, b) < 2e-2 and norm > 0


def adapters() -> None:
    """A bfloat16 base in shards below float32 adapters that are not."""
    said = []
    for in_shards in (False, True):
        case = tiny.case("wan", torch.bfloat16, half=True)
        for p in case.parameters:
            p.data = p.data.float()
        if in_shards:
            checkpointing.apply(case.model, case.family.BLOCKS, "full")
            sharding.shard(case.model, case.family.BLOCKS, device=CPU)
            assert all(hasattr(p, "to_local") != p.requires_grad for p in case.model.parameters())

        def predict(*given, predict=case.family.predict):
            with torch.autocast("cpu", torch.bfloat16):
                return predict(*given)

        both = reference.of_run(case.model, None, predict, shared=True)
        said += [tiny.run(case, form, *both) for form in ("joint", "deferred")]
    for (plain, gradient), (out, found) in zip(said[:2], said[2:], strict=True):
        assert plain.loss.equal(out.loss) and gradient.equal(found) and gradient.norm() > 0


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks.group():
        if what == "train":
            for name in NAMES:
                train(name, folder / name / str(ranks.world()))
            return
        for name in NAMES:
            for saved_by in (4, 1):
                run = resume(name, folder / name / str(saved_by), folder / name / f"{saved_by}to2")
        look(run)
        skip(run)
        full_disk(run, folder / "full_disk")
        sampled(Tuning("wan"))
        compose()
        one_by_one()
        halved()
        adapters()


# ---- What is asked of it


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """NAME/N: the same run by N processes; NAME/NtoM: gone on with by M from its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        train(name, folder / name / "1")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    for count, what in ((4, "train"), (2, "resume")):
        launch.run(count, __file__, what, str(folder), PYTHONPATH=paths)
    for name in NAMES:
        resume(name, folder / name / "4", folder / name / "4to1")
    return folder


def read(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float) -> None:
    """Parameters, and moments of either kind, each as one vector."""
    assert found.keys() == wanted.keys()
    for kind in ("", "/exp_avg", "/exp_avg_sq", "/step"):
        names = [k for k in wanted if k.endswith(kind) and (kind or "/" not in k)]
        a, b = (torch.cat([of[k].double().flatten() for k in names]) for of in (found, wanted))
        assert tiny.distance(a, b) <= within, kind


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_shards_are_those_of_one_process(name, runs):
    """Within the rounding of sums: parameters move by 1e-2 in a run, rounding is 2e-8 of them."""
    one, four = (read(runs / name / count, "end") for count in "14")
    torch.testing.assert_close(one.pop("norms"), four.pop("norms"), rtol=1e-6, atol=0)
    same(four, one, within=2e-6)
    parameters = [{k: v for k, v in end.items() if "/" not in k} for end in (four, one)]
    for other in ("1to2", "4to2", "4to1"):
        same(read(runs / name / other, "end"), one, within=2e-6)
    flat = [torch.cat([v.flatten() for v in end.values()]) for end in parameters]
    assert tiny.distance(*flat) < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_by_any_number_of_processes(name, runs):
    """To the bit, as it was when it was saved: the run went on while it was written."""
    for saved_by, read_by in (("4", "4to2"), ("4", "4to1"), ("1", "1to2")):
        before, after = (read(runs / name / of, "saved") for of in (saved_by, read_by))
        assert before.keys() == after.keys()
        assert all(before[k].equal(after[k]) for k in before), read_by


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_one_ordinary_model(name, runs):
    [one], [four] = (list((runs / name / count).glob("*/config.json")) for count in "14")
    assert one.read_text() == four.read_text()
    found = load_file(four.with_name("diffusion_pytorch_model.safetensors"))
    assert found.keys() == load_file(one.with_name("diffusion_pytorch_model.safetensors")).keys()
    end = read(runs / name / "4", "end")
    assert all(value.equal(end[key]) for key, value in found.items())


def test_a_damaged_or_unfinished_one_is_passed_over(runs, tmp_path):
    shutil.copytree(runs / "wan" / "4" / "checkpoint-2", tmp_path / "checkpoint-2")
    for step in (3, 4):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}")
    names = sorted(p.name for p in (tmp_path / "checkpoint-2").iterdir())
    assert len(names) == 7 and not [n for n in names if not n.endswith((".safetensors", ".json"))]
    [third] = [n for n in names if n.startswith("shard-00003")]
    (tmp_path / "checkpoint-4" / third).unlink()
    with (tmp_path / "checkpoint-3" / third).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    found, passed_over = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert [third in line for line in passed_over] == [True, True]
    # As a kill leaves it before the last part of it, or all but its name, was written.
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.tmp")
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.tmp")
    checkpoint.clean(tmp_path)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert not list(tmp_path.glob(".checkpoint*"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
