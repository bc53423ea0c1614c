"""A loop of one's own over the same Run: SFT on the chosen clips, as a fork would write it."""

import ast
import inspect
import runpy
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from commands import options
from safetensors.torch import load_file

from fastpref.loss.functional import pair_error
from fastpref.run import bookkeeping as book
from fastpref.run.announce import announce
from fastpref.run.assemble import assemble
from fastpref.run.config import Config
from fastpref.run.folder import open_run
from fastpref.run.guard import Interrupted
from fastpref.run.parts import place
from fastpref.run.train import train


def sft(config: Config, leave_at: int | None = None) -> dict:
    device, dtype = place(config.device, config.mixed_precision)
    start, result = open_run(config)
    if result is not None:
        return result
    run = assemble(config, device, dtype, start)
    book.check(run)
    announce(run)
    with book.at_work(run):
        while not run.done:
            for epoch, batch, draws in islice(run.batches, config.gradient_accumulation_steps):  # noqa: B007
                times = run.process.times(draws).to(device)
                chosen = batch.latents.chunk(2)[0]
                noisy, t, target = run.process.noise(chosen, draws, times)
                cond = {name: value.chunk(2)[0] for name, value in batch.cond.items()}
                err = pair_error(run.policy(noisy, t, cond), target)
                (err.mean() / config.gradient_accumulation_steps).backward()
                run.meter.add({"loss": err}, times.level)
            grad_norm = book.update(run)
            if run.due(config.logging_steps):
                book.log(run, epoch, grad_norm)
            if run.step == leave_at:
                signal.raise_signal(signal.SIGTERM)
            if run.due(config.checkpointing_steps) or run.stop:
                book.save(run)
            book.leave_if_asked(run)
    return book.finish(run)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_resumes_and_ends_as_the_sft_objective_does(accumulate, encoded_pairs, tmp_path):
    change = {"objective": "sft", "beta": None, "gradient_accumulation_steps": accumulate}
    configs = {n: Config(**options(encoded_pairs, tmp_path / n, **change)) for n in "abc"}
    result = sft(configs["a"])
    assert result["global_step"] == 6 and (tmp_path / "a" / "README.md").exists()
    with pytest.raises(Interrupted, match="saved at step 2"):
        sft(configs["b"], leave_at=2)
    assert not (tmp_path / "b" / "result.json").exists()
    again = sft(configs["b"])
    theirs = train(configs["c"])
    own, resumed, plain = (adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(own[key], resumed[key]) for key in own)
    assert result["metrics"]["loss"] == again["metrics"]["loss"]
    # `train` runs the losers through the model as well: other batches, other rounding.
    assert plain.keys() == own.keys()
    for key, value in plain.items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-5)
    assert result["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=1e-5)
    assert sft(configs["a"]) == result, "already done"


def test_a_copy_of_the_loop_runs_anywhere(encoded_pairs, tmp_path):
    (tmp_path / "mine.py").write_text(Path(inspect.getfile(train)).read_text())
    mine = runpy.run_path(str(tmp_path / "mine.py"))["train"]
    for name, loop in (("a", mine), ("b", train)):
        loop(Config(**options(encoded_pairs, tmp_path / name, max_train_steps=2)))
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_the_loop_reads_on_two_screens():
    """All of a step in sight: nothing of it is a long function inside the function."""
    source = inspect.getsource(train)
    assert len(source.splitlines()) <= 120
    (whole,) = ast.parse(source).body
    inner = [node for node in ast.walk(whole) if isinstance(node, ast.FunctionDef)]
    for node in inner:
        assert node is whole or node.body[-1].end_lineno - node.body[0].lineno < 10, node.name
    step = ("process.noise(", "run.reference(", "run.policy(", "training_loss(", "backward(")
    loop = ("run.batches", "update(", "log(", "save(", "validate(run)", "finish(")
    for words in (step, loop):
        where = [source.rindex(word) for word in words]
        assert where == sorted(where)
