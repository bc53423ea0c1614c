"""A sample's passes through a model, from shapes alone: the bytes alive and the work to be done.

Nothing is computed: the model is copied into fake tensors (shapes, types and strides), and the very
code of a training step runs over them. A compiled block is taken through inductor's own
decompositions, joint-graph passes and partitioner, and stopped before code is generated.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import attention, checkpointing, compiling, reference
from .fusion import Work, fused, work_of

CPU = torch.device("cpu")

# What autocast computes in float32 on CUDA and in bfloat16 on a CPU, where shapes are run, of what
# models are made of.
WIDE_ON_CUDA = (
    *("layer_norm", "group_norm", "softmax.int", "sum", "sum.dim_IntList", "exp"),
    *("rsqrt", "reciprocal", "pow.Tensor_Scalar", "log"),
)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """One sample's reference pass, forward and backward, without weights and their gradients.

    kept: bytes that the graph holds between forward and backward. peak: the most that forward and
    backward have alive at a time; reference_peak: that the reference's pass has. work: the kernels
    of "reference", "forward" and "backward".
    """

    kept: int
    peak: int
    reference_peak: int
    work: dict[str, Counter[Work]] = field(repr=False)

    def stretched(self, shorter: Passes, blocks: int) -> Passes:
        """Of `blocks` more equal blocks; shorter: the same with one block less."""

        def more(a: int, b: int) -> int:
            return a + blocks * (a - b)

        work = {}
        for name, counted in self.work.items():
            one = shorter.work[name]
            each = {w: more(counted[w], one[w]) for w in counted.keys() | one.keys()}
            work[name] = Counter({w: n for w, n in each.items() if n > 0})
        return Passes(
            kept=more(self.kept, shorter.kept),
            peak=more(self.peak, shorter.peak),
            reference_peak=more(self.reference_peak, shorter.reference_peak),
            work=work,
        )


def passes(
    model: nn.Module,
    predict: reference.Predict,
    blocks: str,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]],
    *,
    checkpoint: checkpointing.Mode,
    compiled: bool,
    shared: bool = True,
    cuda: bool = True,
) -> Passes:
    """What one sample's reference pass, forward and backward take; nothing is computed.

    model: with its adapters, as it is before checkpointing and compiling; on any device, also meta.
    inputs: (noisy, t, cond) of one sample. shared: what stands below the first adapter runs once
    for reference and policy. cuda: autocast as on a GPU. Of blocks that are all alike three are
    looked at, and the rest is like the third.
    """
    count = like_each_other(model, blocks)
    # The first block is unlike the others: no gradient enters it. The third is one of them.
    sizes = (2, 3) if count > 3 else (None,)
    found = []
    for size in sizes:
        with _autocast_of_cuda() if cuda else ExitStack():
            found.append(
                _passes(model, predict, blocks, inputs, checkpoint, compiled, shared, size)
            )
    return found[1].stretched(found[0], count - 3) if count > 3 else found[0]


def like_each_other(model: nn.Module, paths: str) -> int:
    """How many blocks there are, where all have the same layers, sizes, types and parameters that
    train; else 0.
    """
    if " " in paths:
        return 0

    def described(block: nn.Module) -> list[Any]:
        parameters = block.named_parameters()
        return [type(block), *((n, p.shape, p.dtype, p.requires_grad) for n, p in parameters)]

    found = [described(block) for block in compiling.blocks(model, paths)]
    return len(found) if all(each == found[0] for each in found) else 0


def _passes(
    model: nn.Module,
    predict: reference.Predict,
    paths: str,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]],
    checkpoint: checkpointing.Mode,
    compiled: bool,
    shared: bool,
    size: int | None,
) -> Passes:
    # What a family keeps beside its model (rotary tables, time ids) is real.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = faked(model, mode)
    if size is not None:
        parent, _, name = paths.rpartition(".")
        setattr(twin.get_submodule(parent), name, twin.get_submodule(paths)[:size])
    noisy, t, cond = inputs
    noisy, t, *texts = (_fake(v, mode) for v in (noisy, t, *cond.values()))
    cond = dict(zip(cond, texts, strict=True))
    parameters = [p for p in twin.parameters() if p.requires_grad]
    checkpointing.apply(twin, paths, checkpoint)
    meter = Meter([*twin.parameters(), *twin.buffers(), noisy, t, *texts])
    if compiled:
        compiling.compile_blocks(twin, paths, backend=stand_in)
    policy, says = _policy(twin, predict, shared)
    with attention.natively(twin), mode:
        for p in parameters:
            p.grad = torch.zeros_like(p)  # that of a step adds to it: no memory of its own
            meter.own(p.grad)

        def backward(pred: Tensor) -> None:
            pred.backward(torch.empty_like(pred), inputs=parameters)

        if compiled:  # compiling is not a part of the pass
            says(noisy, t, cond)
            backward(policy(noisy, t, cond))
        with meter.count("reference"):
            says(noisy, t, cond)
        reference_peak, meter.peak = meter.peak, 0
        with meter.count("forward"):
            pred = policy(noisy, t, cond)
        kept = meter.alive - pred.nbytes
        with meter.count("backward"):
            backward(pred)
    return Passes(kept=kept, peak=meter.peak, reference_peak=reference_peak, work=meter.work)


def _policy(
    model: nn.Module, predict: reference.Predict, shared: bool
) -> tuple[reference.Policy, reference.Reference]:
    """As a run has them."""
    adapters = reference.adapter_layers(model)
    if adapters and shared:
        return reference.shared_prefix(model, predict, checked=True)
    off = reference.adapters_off if adapters else reference.base
    return lambda noisy, t, cond: predict(model, noisy, t, cond), off(model, predict)


# ---- Fake tensors


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of `model` whose parameters and buffers are fake tensors on a CPU."""
    tensors = {id(v): _fake(v, mode) for v in (*model.parameters(), *model.buffers())}
    # By deepcopy's memo each tensor counts as copied already, into its fake.
    return copy.deepcopy(model, tensors)


def _fake(value: Tensor, mode: FakeTensorMode) -> Tensor:
    options = {"dtype": value.dtype, "device": "meta"}
    # Not by mode.from_tensor, which keeps the device: a model on meta is to run too.
    shell = torch.empty_strided(value.shape, value.stride(), **options)
    fake = FakeTensor(mode, shell, CPU)
    if not isinstance(value, nn.Parameter):
        return fake
    return nn.Parameter(fake, requires_grad=value.requires_grad)


@contextmanager
def _autocast_of_cuda() -> Iterator[None]:
    """Inside, autocast to bfloat16 on a CPU keeps in float32 what it keeps so on CUDA."""
    library = torch.library.Library("aten", "IMPL")
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def wide(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.is_floating_point()
        return value.float() if narrow and value.dtype.itemsize < 4 else value

    def kernel(op: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(here):
                return op(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})

        return run

    @torch.library.impl(library, "rms_norm", "AutocastCPU")
    def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        # On CUDA one kernel, on a CPU five: layer norm's is one on both and keeps the same.
        return torch.ops.aten.layer_norm(wide(x), shape, wide(weight), None, eps or 1e-6)

    try:
        for name in WIDE_ON_CUDA:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, kernel(op), "AutocastCPU")
        yield
    finally:
        # Else its kernels stay in the process: a Library has no public end.
        library._destroy()


# ---- Counting


class Meter(TorchDispatchMode):
    """Counts, of all that is called inside `count`, the kernels and the bytes that are alive.

    own: tensors that are not counted: parameters, buffers, inputs.
    """

    # A class attribute: torch calls a compiled graph, and hands it no meter.
    now: Meter | None = None  # the one that counts
    supports_higher_order_operators = True

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.alive = self.peak = 0
        self.work: dict[str, Counter[Work]] = {}
        self.counting: Counter[Work] | None = None
        for each in own:
            self.own(each)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks run as compiled below this mode."""
        return True

    def own(self, tensor: Tensor) -> None:
        # The C++ storage's address: all views of a tensor share it.
        self.known.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def count(self, name: str) -> Iterator[None]:
        self.counting = self.work[name] = Counter()
        Meter.now = self
        try:
            with self:
                yield
        finally:
            Meter.now = self.counting = None

    @staticmethod
    @contextmanager
    def around(extra: int, work: Counter[Work]) -> Iterator[list[Any]]:
        """A compiled graph runs inside, its outputs come in the list: it counts as a whole."""
        meter, results = Meter.now, []
        if meter is None:
            yield results
            return
        counting, meter.counting = meter.counting, None
        counting.update(work)
        meter.peak = max(meter.peak, meter.alive + extra)
        yield results
        meter.counting = counting
        meter.hold(results)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.counting is not None and not getattr(func, "is_view", False):
            self.hold(out)
            if (work := work_of(func, args, out)) is not None:
                self.counting[work] += 1
        return out

    def hold(self, out: Any) -> None:
        """Counts what is new in `out`, from now on until it is freed."""
        for value in tree_leaves(out):
            if not isinstance(value, FakeTensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, int(storage.nbytes())
            if key in self.known:
                continue
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def stand_in(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: inductor, up to where it would generate code."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, inner_compile=_stand_in)


def _stand_in(graph: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
    extra, work = fused(graph)

    def run(args: list[Any]) -> Any:
        with Meter.around(extra, work) as results:
            values = list(args)
            args.clear()
            results.append(fx.Interpreter(graph).run(*values))
            del values
        return results.pop()

    # torch then hands over its only list of the inputs: cleared, they end before outputs count.
    run._boxed_call = True
    return run
