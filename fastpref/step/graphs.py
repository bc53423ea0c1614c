"""CUDA graphs: a whole sample step recorded once per shape, then replayed in one launch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor | None]


class StepGraph:
    """`function(**inputs)`, a few tensors in and out, recorded as a CUDA graph and replayed.

    For whatever a step does on the device: noising, the reference's and the policy's forward, loss
    and backward into `.grad`; the reference pass alone; clipping and the optimiser's step.

        graph = StepGraph(step, device, parameters=parameters)
        out = graph(latents=latents, pair_id=pair_id, index=index, weight=weight, ...)

    The first `warmup` calls with inputs of new shapes run `function` on a side stream, as steps
    like all others; then it is recorded, and from there on inputs are copied into the buffers it
    was recorded with and everything is launched at once. So a replay takes new numbers from its
    inputs and from tensors that live outside (weights, an objective's `hyper_tensor`, a learning
    rate that is a tensor): change those in place. Python runs in the first calls alone: what
    differs from step to step must not be a Python number, and nothing may wait for the device. Keep
    no loss of a step outside alive: its gradient graph would tie the recording to another stream.

    parameters: leaves whose `.grad` the function adds to. They get buffers of their own, which stay
    theirs: setting `.grad` to None (`zero_grad`) makes the next call begin at zero.
    limit: shapes that are recorded; batches of further shapes run without a graph.
    name: what messages call it.

    Outputs (a tensor or a tuple, named tuple or dict of them, None allowed) carry no gradient, and
    the next call overwrites them. Where CUDA graphs do not exist, or a recording fails, the same
    function runs without: one line on stderr and `why_not` say so. PyTorch does not always recover
    from a recording that failed: its allocator and its generator of random numbers may go on as if
    it still ran. Draw no random numbers of PyTorch's after that, record nothing else, and measure
    neither time nor memory in that process.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        parameters: Sequence[Tensor] = (),
        warmup: int = 3,  # as in PyTorch's own recipe
        limit: int = 8,
        name: str = "step",
    ) -> None:
        self.function, self.device, self.name = function, device, name
        self.parameters, self.warmup, self.limit = list(parameters), warmup, limit
        self.records: dict[Any, _Record] = {}
        self.grads: list[Tensor] = []
        self.why_not: str | None = None
        self.pool: Any = None
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)  # one: the allocator keeps memory for each stream
        else:
            self._give_up(f"{device.type} has no CUDA graphs")

    def __call__(self, **inputs: Tensor | None) -> Any:
        key = tuple((k, v if v is None else (v.shape, v.dtype)) for k, v in inputs.items())
        self._own_gradients()
        if key not in self.records:
            if len(self.records) == self.limit:  # buckets: those that came first keep their graphs
                moved = {
                    k: v if v is None else v.to(self.device, non_blocking=True)
                    for k, v in inputs.items()
                }
                return _detached(self.function(**moved))
            self.records[key] = _Record(inputs, self.device)
        record = self.records[key]
        record.fill(inputs)
        if self.why_not is None and record.calls < self.warmup:
            return self._aside(record)
        if self.why_not or (record.graph is None and not self._capture(record)):
            return _detached(self.function(**record.inputs))
        record.graph.replay()
        return record.outputs

    def _own_gradients(self) -> None:
        """Every parameter's `.grad` is the buffer that graphs add to, with the value it had."""
        if not self.grads:
            self.grads = [torch.zeros_like(p) for p in self.parameters]
        new, old = [], []
        for p, grad in zip(self.parameters, self.grads, strict=True):
            # A recording adds to an address: whatever tensor .grad is now, it has to be the buffer.
            if p.grad is not grad:
                (new if p.grad is None else old).append(grad)
                if p.grad is not None:
                    grad.copy_(p.grad)
                p.grad = grad
        if new:
            torch._foreach_zero_(new)

    def _aside(self, record: _Record) -> Any:
        """A step on the side stream: lazy initialisations may not happen in a recording."""
        record.calls += 1
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            outputs = _detached(self.function(**record.inputs))
        main.wait_stream(self.side)
        return outputs

    def _capture(self, record: _Record) -> bool:
        graph = torch.cuda.CUDAGraph()
        # One pool: shapes take turns, and none reads what another has left in it.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # A recording that fails leaves its own stream current. thread_local: the data loader's
            # threads may pin memory meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                record.outputs = _detached(self.function(**record.inputs))
        except Exception as error:  # whatever a model does that a recording cannot hold
            first: BaseException = error
            while first.__context__ is not None:  # ending the broken recording raises again
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):  # without the graph there is no more room
                raise first from None
            self._give_up(str(first).strip().partition("\n")[0] or type(first).__name__)
            return False
        record.graph = graph
        return True

    def _give_up(self, why: str) -> None:
        self.why_not = why
        print(f"graphs: the {self.name} runs without CUDA graphs ({why})", file=sys.stderr)


def recorded_pass(
    function: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """A reference pass (noisy, t, cond) as a CUDA graph; what it says is overwritten by the next
    pass.
    """

    def whole(noisy: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return function(noisy, t, cond)

    graph = StepGraph(whole, device, name="reference pass")
    return lambda noisy, t, cond: graph(noisy=noisy, t=t, **cond)


class _Record:
    """One shape of inputs: the buffers, and once recorded the graph and its outputs."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs = {
            k: v if v is None else torch.empty_like(v, device=device) for k, v in inputs.items()
        }
        self.calls, self.outputs = 0, None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def fill(self, inputs: Inputs) -> None:
        for name, value in inputs.items():
            if value is not None:
                self.inputs[name].copy_(value, non_blocking=True)


def _detached(value: Any) -> Any:
    """The same without gradients: a graph kept alive would hold on to a whole step's memory."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(each) for name, each in value.items()}
    if isinstance(value, tuple):
        each = [_detached(v) for v in value]
        return type(value)(*each) if hasattr(value, "_fields") else tuple(each)
    if value is None:
        return None
    raise TypeError(f"StepGraph: expected tensors from the function, got {type(value).__name__}")
