"""StepGraph: the same numbers as the function it holds, from static buffers, on every device."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import STEPS
from torch import Tensor, nn

import fastpref
from fastpref import models
from fastpref.loss.functional import Draws, PairLoss
from fastpref.step import reference
from fastpref.step.graphs import StepGraph, _detached, _Record, recorded_pass

OBJECTIVE = fastpref.objective("dpo", beta=500.0)
SHAPE = (16, 3, 8, 8)


@pytest.fixture
def line(device):
    """A parameter p, and the step that adds the gradient of mean (p x - y)^2 to it."""
    p = nn.Parameter(torch.tensor([2.0], device=device))

    def function(x: Tensor, y: Tensor | None) -> dict[str, Tensor | None]:
        loss = (p * x - (0.0 if y is None else y)).square().mean()
        loss.backward()
        return {"loss": loss, "twice": 2 * x, "none": None}

    return p, function


def values(count: int, seed: int, size: int = 4) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, generator=random), "y": torch.randn(size, generator=random)}
        for _ in range(count)
    ]


def test_every_call_is_a_step_of_its_own(line, device, capsys):
    p, function = line
    graph = StepGraph(function, device, parameters=[p], name="line")
    for each in values(8, seed=1):
        p.grad = None
        out = graph(**each)
        x, y = each["x"], each["y"]
        torch.testing.assert_close(out["loss"].cpu(), (2 * x - y).square().mean())
        torch.testing.assert_close(out["twice"].cpu(), 2 * x)
        assert out["none"] is None and not out["loss"].requires_grad
        torch.testing.assert_close(p.grad.cpu(), (2 * (2 * x - y) * x).mean().view(1))
    said = capsys.readouterr().err
    if device.type == "cpu":
        assert said == "graphs: the line runs without CUDA graphs (cpu has no CUDA graphs)\n"
    else:
        assert said == "" and graph.why_not is None
        assert all(record.graph is not None for record in graph.records.values())


def test_gradients_accumulate_until_they_are_dropped(line, device):
    p, function = line
    graph = StepGraph(function, device, parameters=[p])
    batches = values(9, seed=2)
    each = [(2 * (2 * b["x"] - b["y"]) * b["x"]).mean() for b in batches]
    p.grad = torch.full_like(p, 0.5)  # what was there before the first call counts
    graph(**batches[0])
    torch.testing.assert_close(p.grad.cpu(), each[0].view(1) + 0.5)
    buffer = p.grad
    for k in range(1, 9):
        if k == 5:
            p.grad = None
        graph(**batches[k])
    assert p.grad is buffer, "the recorded graph adds to this buffer"
    torch.testing.assert_close(p.grad.cpu(), torch.stack(each[5:]).sum().view(1))


def test_shapes_have_buffers_of_their_own_and_extra_shapes_run_too(line, device):
    p, function = line
    graph = StepGraph(function, device, parameters=[p], limit=2)
    for k in range(15):
        (each,) = values(1, seed=k, size=4 + k % 3)
        out = graph(**each)
        torch.testing.assert_close(out["twice"].cpu(), 2 * each["x"])
    assert len(graph.records) == 2
    assert graph(x=torch.ones(4), y=None)["loss"].item() == 4.0


def test_inputs_may_be_changed_after_the_call(line, device):
    """They are copied: the loader may reuse its memory."""
    p, function = line
    graph = StepGraph(function, device, parameters=[p])
    for _ in range(5):
        x = torch.ones(4, device=device)
        out = graph(x=x, y=torch.zeros(4))
        x.fill_(9.0)
        assert out["twice"].eq(2).all()
    (record,) = graph.records.values()
    assert record.inputs["x"].eq(1).all()


def test_what_is_no_tensor_is_refused(device):
    graph = StepGraph(lambda x: 3.0, device)
    with pytest.raises(TypeError, match="expected tensors from the function, got float"):
        graph(x=torch.ones(2))


def test_the_functions_own_error_comes_through(line, device):
    p, function = line
    graph = StepGraph(function, device, parameters=[p])
    with pytest.raises(RuntimeError, match="must match"):
        graph(x=torch.ones(3), y=torch.ones(4))


# ---- A whole sample step


def adapted_wan(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=48,
        num_layers=2, rope_max_seq_len=32,
    ).requires_grad_(False)  # fmt: skip
    family = models.family("wan")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=family.LORA_TARGETS), model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.to(device)


def sample_step(model: nn.Module, process, pair_step):
    """Noising, reference, policy, loss and backward: tensors in, PairLoss out."""
    family = models.family("wan")
    says = reference.adapters_off(model, family.predict)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(latents: Tensor, text: Tensor, pair_id: Tensor, index: Tensor) -> PairLoss:
        draws = Draws(7, pair_id, index)
        noisy, t, target = process.noise(latents, draws)
        return pair_step(
            lambda x, t, cond: family.predict(model, x, t, cond),
            says, noisy, t, target, {"text": text}, OBJECTIVE,
            scale=1.0, parameters=parameters,
        )  # fmt: skip

    return run, parameters


def batch(seed: int, device: torch.device) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(4, *SHAPE, generator=random).to(device),
        "text": torch.randn(4, 8, 32, generator=random).to(device),
        "pair_id": torch.tensor([seed, 2**40 + seed]).to(device),
        "index": torch.full((2,), seed).to(device),
    }


@pytest.mark.parametrize("form", ["joint", "deferred"])
def test_a_sample_step_replayed_is_the_step(form, device):
    """Other pairs, other draws, other latents at every call, and the weights move between them."""
    model = adapted_wan(device)
    process = fastpref.FlowMatching(shift=3.0)
    run, parameters = sample_step(model, process, STEPS[form])
    graph = StepGraph(run, device, parameters=parameters)
    # On a GPU a recorded product may be another kernel; the margin is 250 times the errors.
    close = {} if device.type == "cpu" else {"rtol": 1e-4, "atol": 1e-3}
    for k in range(6):
        each = batch(k, device)
        for p in parameters:
            p.grad = None
        # A gradient graph that outlives its step would tie a recording to this step's stream.
        plain = _detached(run(**each))
        expected = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        out = graph(**each)
        for name in ("loss", "err", "ref_err", "margin"):
            torch.testing.assert_close(getattr(out, name), getattr(plain, name), **close)
        for p, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
        assert torch.stack([g.abs().max() for g in expected]).min() > 0
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * p.grad
    if device.type == "cuda":
        assert graph.why_not is None, graph.why_not


def test_a_reference_pass_is_recorded(device):
    """What it says in the fourth call and later is what the model says, of new inputs."""
    random = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 5).to(device)

    @torch.no_grad()
    def says(noisy, t, cond):
        return model(noisy) * t[:, None] + cond["text"]

    graph = recorded_pass(says, device)
    for _ in range(6):
        noisy, text = torch.randn(2, 4, 5, generator=random).to(device)
        t = torch.rand(4, generator=random).to(device)
        wanted = says(noisy, t, {"text": text})
        torch.testing.assert_close(graph(noisy, t, {"text": text}), wanted)


def test_the_objectives_numbers_are_read_at_every_replay(device):
    """A schedule of beta is a copy into the objective's tensor."""
    objective = fastpref.objective("dpo", beta=123.0)
    hyper = objective.hyper_tensor(device)
    before = hyper.clone()
    err = torch.tensor([0.5, 0.7], dtype=torch.float64)

    def run(err: Tensor) -> Tensor:
        return fastpref.loss_from_errors(err, err.flip(0), objective).loss

    graph = StepGraph(run, device)
    try:
        for k in range(6):
            hyper[0] = 10.0 * (k + 1)
            expected = fastpref.loss_from_errors(
                err, err.flip(0), fastpref.objective("dpo", beta=10.0 * (k + 1))
            ).loss
            torch.testing.assert_close(graph(err=err).cpu(), expected)
    finally:
        hyper.copy_(before)


def test_the_optimisers_step_is_recorded_too(device):
    """With its learning rate as a tensor: the parameters of a run without graphs."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(5, generator=random) for _ in range(7)]
    ends = []
    for recorded in (False, True):
        p = nn.Parameter(torch.ones(5, device=device))
        gpu = device.type == "cuda"
        rate = torch.tensor(0.1, device=device)
        optimizer = torch.optim.AdamW([p], lr=rate, fused=True, capturable=gpu)

        def update(lr: Tensor, rate=rate, optimizer=optimizer) -> Tensor:
            rate.copy_(lr)
            optimizer.step()
            return rate

        graph = StepGraph(update, device, parameters=[p], name="optimiser")
        for k, grad in enumerate(grads):
            p.grad = grad.to(device)
            lr = torch.tensor(0.1 / (k + 1), device=device)
            if recorded:
                graph(lr=lr)
            else:
                update(lr)
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends)
    assert (ends[0] - 1).abs().min() > 0.01


def test_all_warm_up_calls_share_one_stream(monkeypatch):
    """The allocator keeps what a stream freed for that stream: three would hold a step's memory
    three times. Played on a CPU, whose streams say whom they wait for.
    """
    waits = []

    class Stream:
        def __init__(self, device=None):
            self.wait_stream = lambda other: waits.append((self, other))

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    graph = StepGraph(lambda x: 2 * x, torch.device("cuda"))
    x = torch.ones(3)
    for _ in range(graph.warmup):
        assert graph._aside(_Record({"x": x}, x.device)).shape == (3,)
    assert waits == [(graph.side, main), (main, graph.side)] * graph.warmup


def never_recorded() -> None:
    """A step that waits for the device: one line, the right numbers, and the stream is ours."""
    p = nn.Parameter(torch.tensor([2.0], device="cuda"))

    def function(x: Tensor) -> Tensor:
        loss = (p * x).square().mean() * (1.0 if x.sum().item() > 0 else -1.0)
        loss.backward()
        return loss

    graph = StepGraph(function, torch.device("cuda"), parameters=[p], name="step")
    stream = torch.cuda.current_stream()
    for k in range(6):
        p.grad = None
        out = graph(x=torch.full((4,), float(k - 2)))
        sign = 1.0 if k > 2 else -1.0
        torch.testing.assert_close(out.item(), sign * (2.0 * (k - 2)) ** 2)
        torch.testing.assert_close(p.grad.item(), sign * 4.0 * (k - 2) ** 2)
    assert torch.cuda.current_stream() == stream and graph.why_not is not None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_recorded_runs_without():
    """In a process of its own: PyTorch may not recover from a recording that failed."""
    command = [sys.executable, "-c", "import test_graphs; test_graphs.never_recorded()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("graphs: ")]
    assert len(said) == 1 and said[0].startswith("graphs: the step runs without CUDA graphs (")
