"""What shapes alone say of a model's passes, against what real ones keep, free and compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from families import unet
from tiny import last_half, transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from bench.architectures import ARCHITECTURES
from bench.meters import SavedBytes
from fastpref import models
from fastpref.step import attention, checkpointing, compiling, reference, simulate

BF16 = torch.bfloat16
SIZES = ((5, 16, 16), (9, 8, 24))  # frames, height, width of latents: two numbers of tokens
TRANSFORMERS = ("wan", "cogvideox-2b", "cogvideox-5b")


class Case(NamedTuple):
    family: Any
    model: nn.Module
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]]

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, cond: dict) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=noisy.dtype == BF16):
            return self.family.predict(model, noisy, t, cond)

    def passes(self, **changes: Any) -> simulate.Passes:
        options = {"checkpoint": "none", "compiled": False, "cuda": False, **changes}
        return simulate.passes(self.model, self.predict, self.family.BLOCKS, self.inputs, **options)


def case(name: str, size: tuple[int, int, int] = SIZES[0], rows: int = 1, half=False) -> Case:
    """A real class with adapters, its frozen weights in bfloat16 as a run has them."""
    torch.manual_seed(0)
    if name == "unet":
        family, model, channels, width = models.family("stable_diffusion"), unet(), 4, 32
        size = (1, *size[1:])
    else:
        family, model, _, (channels, *_), width = transformer(name)
    model.requires_grad_(False).to(BF16)
    targets = last_half(family, model) if half else family.LORA_TARGETS
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    noisy = torch.randn(rows, channels, *size, dtype=BF16)
    cond = {"text": torch.randn(rows, 5, width, dtype=BF16)}
    return Case(family, model, (noisy, torch.full((rows,), 300.0), cond))


def saved(c: Case) -> int:
    """Bytes that the hooks of the graph's saved tensors see, inputs aside."""
    meter = SavedBytes(c.model)
    noisy, t, cond = c.inputs
    for each in (noisy, t, *cond.values()):
        meter.own.add(each.untyped_storage().data_ptr())
    with meter.count():
        pred = c.predict(c.model, *c.inputs)
        del pred
    return meter.most


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*TRANSFORMERS, "unet"])
def test_what_a_graph_keeps(name, size):
    c = case(name, size)  # hooks also see CogVideoX-5B's rotary tables, which outlive a graph
    assert c.passes().kept == pytest.approx(saved(c), rel=0.03)


def allocated(c: Case, mode: str) -> tuple[int, int]:
    """(alive after the forward, peak of forward and backward) by the allocator's own events."""
    parameters = [p for p in c.model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    checkpointing.apply(c.model, c.family.BLOCKS, mode)

    def step() -> None:
        with torch.autograd.profiler.record_function("forward"):
            pred = c.predict(c.model, *c.inputs)
            grad = torch.ones_like(pred)
        with torch.autograd.profiler.record_function("backward"):
            pred.backward(grad, inputs=parameters)

    step()
    with profile(profile_memory=True) as trace:
        step()
    events = trace.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "backward")
    alive = peak = kept = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
        if event.start_ns() < begin:
            kept = alive
    return kept, peak


@pytest.mark.parametrize("mode", ["none", "attention", "full"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_is_alive_at_the_peak(name, mode):
    """Against the events of PyTorch's allocator, which also see the work space of the CPU's
    attention: more than anything else at small sizes, 8 % at the most here.
    """
    c = case(name, (9, 48, 40))
    found = c.passes(checkpoint=mode)
    kept, peak = allocated(c, mode)
    output = 2 * c.inputs[0].nbytes  # prediction and seed, which are the step's
    assert found.kept == pytest.approx(kept - output, rel=0.001)
    assert found.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*TRANSFORMERS, "unet"])
def test_what_a_compiled_graph_keeps(name, size):
    """By inductor itself: what its compiled functions hand to the hooks of saved tensors."""
    torch._dynamo.reset()
    c = case(name, size)
    expected = c.passes(compiled=True).kept
    assert expected < 0.95 * c.passes().kept, "compiled blocks keep less"
    compiling.compile_blocks(c.model, c.family.BLOCKS)
    assert expected == pytest.approx(saved(c), rel=0.05)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_equal_blocks_are_looked_at_three_times(compiled, monkeypatch):
    c = case("wan")  # of four blocks
    few = c.passes(compiled=compiled)
    monkeypatch.setattr(simulate, "like_each_other", lambda *a: 0)
    every = c.passes(compiled=compiled)
    assert few.kept == pytest.approx(every.kept, rel=0.01)
    assert few.peak == pytest.approx(every.peak, rel=0.01)
    for part, work in every.work.items():
        for kind in ("product", "attention", "attention_backward", "traffic"):
            a, b = (sum(n for w, n in f.items() if w.kind == kind) for f in (few.work[part], work))
            assert a == b, (part, kind)


def test_blocks_that_differ_are_all_looked_at():
    whole, half = case("wan"), case("wan", half=True)
    assert simulate.like_each_other(whole.model, "blocks") == 4
    assert simulate.like_each_other(half.model, "blocks") == 0
    # Below the first adapter policy and reference have one pass, without a graph.
    a, b = whole.passes(), half.passes()
    assert b.kept == pytest.approx(a.kept / 2, rel=0.15)
    flops = {
        w: sum(n * e.flops for e, n in p.work["forward"].items()) for w, p in enumerate((a, b))
    }
    assert flops[1] == pytest.approx(flops[0] / 2, rel=0.1)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_rows_add_up(name):
    one, three = case(name).passes(), case(name, rows=3).passes()
    assert three.kept == pytest.approx(3 * one.kept, rel=0.01)
    assert three.peak == pytest.approx(3 * one.peak, rel=0.02)


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "cogvideox-5b"])
def test_work_is_what_the_formulas_say(name):
    """Of the true architectures, at their own shapes: bench/architectures.py counts by hand."""
    arch, meta = ARCHITECTURES[name], torch.device("meta")
    model, family = arch.make(meta, BF16), models.family(arch.family)
    latents, cond = arch.inputs(arch.shape, 1, meta, BF16)
    inputs = (latents[:1], torch.empty(1, device=meta), {k: v[:1] for k, v in cond.items()})
    peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=family.LORA_TARGETS), model)
    found = Case(family, model, inputs).passes()
    products, attention = arch.forward_flops(arch.shape)

    def flops(part: str, kind: str) -> float:
        return sum(n * w.flops for w, n in found.work[part].items() if w.kind == kind)

    assert flops("reference", "product") == pytest.approx(products, rel=0.01)
    for part in ("reference", "forward"):
        assert flops(part, "attention") == pytest.approx(attention, rel=1e-3)
    assert flops("backward", "attention_backward") == pytest.approx(2.5 * attention, rel=1e-3)
    assert flops("forward", "product") == pytest.approx(1.03 * products, rel=0.03)  # adapters


def test_autocast_as_on_cuda_and_only_inside():
    x, weight = torch.randn(2, 8), torch.randn(8)

    def dtypes() -> list[torch.dtype]:
        with torch.autocast("cpu", BF16):
            v = x.bfloat16()
            norms = [F.layer_norm(v, (8,)), F.rms_norm(v, (8,), weight), F.group_norm(v, 2)]
            return [each.dtype for each in (*norms, v.softmax(-1), v.exp(), F.linear(v, v))]

    before = dtypes()
    with simulate._autocast_of_cuda():
        assert dtypes() == [torch.float32] * 5 + [BF16]
    assert dtypes() == before == [BF16] * 6
    c = case("wan")  # whose q and k are normed in float32 there
    assert c.passes(cuda=True).kept > c.passes().kept


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b"])
def test_a_backend_of_a_gpu_is_looked_at_like_pytorchs_own(name):
    """cuDNN's attention does not run on a CPU, whose other choice keeps all scores."""
    c = case(name)
    expected = c.passes()
    with attention.use(c.model, "cudnn"):
        found = c.passes()
    assert (found.kept, found.peak) == (expected.kept, expected.peak)


@pytest.mark.slow
def test_nothing_of_the_model_changes():
    c = case("wan")
    before = {n: (p.data_ptr(), p.grad) for n, p in c.model.named_parameters()}
    forward = [block.forward for block in c.model.blocks]
    c.passes(checkpoint="full", compiled=True)
    assert before == {n: (p.data_ptr(), p.grad) for n, p in c.model.named_parameters()}
    assert forward == [block.forward for block in c.model.blocks]
    says = reference.adapters_off(c.model, c.predict)
    assert says(*c.inputs).isfinite().all()
