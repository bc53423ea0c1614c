"""A sample's passes through a model, from shapes alone: the bytes alive and the work to be done.

Nothing is computed: the model is copied into fake tensors (shapes, types and strides), and the very
code of a training step runs over them. A compiled block is taken through inductor's own
decompositions, joint-graph passes and partitioner, and stopped before code is generated.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import checkpointing, compiling, reference

CPU = torch.device("cpu")

# What autocast computes in float32 on CUDA and in bfloat16 on a CPU, where shapes are run, of what
# models are made of.
WIDE_ON_CUDA = (
    *("layer_norm", "group_norm", "softmax.int", "sum", "sum.dim_IntList", "exp"),
    *("rsqrt", "reciprocal", "pow.Tensor_Scalar", "log"),
)


@dataclass(frozen=True)
class Work:
    """One kernel: what it computes and the bytes it moves. dim: of attention's heads."""

    kind: Literal["product", "attention", "attention_backward", "traffic"]
    flops: float
    bytes: int
    dim: int = 0


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
    with mode:
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
    return copy.deepcopy(model, tensors)


def _fake(value: Tensor, mode: FakeTensorMode) -> Tensor:
    options = {"dtype": value.dtype, "device": "meta"}
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
        library._destroy()


# ---- Counting


class Meter(TorchDispatchMode):
    """Counts, of all that is called inside `count`, the kernels and the bytes that are alive.

    own: tensors that are not counted: parameters, buffers, inputs.
    """

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

    run._boxed_call = True
    return run


def work_of(func: Any, inputs: Any, out: Any) -> Work | None:
    """The kernel that an operator is, or None where it moves nothing."""
    name = str(func)
    if getattr(func, "is_view", False) or name.startswith(_FREE):
        return None
    given = [v for v in tree_leaves(inputs) if isinstance(v, Tensor)]
    made = [v for v in tree_leaves(out) if isinstance(v, Tensor)]
    moved = sum(map(_bytes, given)) + sum(map(_bytes, made))
    if checkpointing.keeps(func) or "attention" in name:
        kind = "attention_backward" if "backward" in name else "attention"
        q, k = given[1:3] if kind == "attention_backward" else given[:2]  # [B, H, N, D]
        flops = (4.0 if kind == "attention" else 10.0) * math.prod(q.shape) * k.shape[2]
        return Work(kind, flops, moved, q.shape[3])
    count = flop_registry.get(getattr(func, "overloadpacket", func))
    if count is not None:
        return Work("product", float(count(*inputs, out_val=out)), moved)
    return Work("traffic", 0.0, moved) if made else None


# Operators, by their beginnings, that move nothing and are no views.
_FREE = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "aten.lift")


def _bytes(value: Tensor) -> int:
    """What reading or writing a tensor moves: of an expanded one its storage."""
    return int(min(value.numel() * value.element_size(), value.untyped_storage().nbytes()))


def fused(graph: fx.GraphModule) -> tuple[int, Counter[Work]]:
    """(most bytes that a compiled graph has alive beyond its inputs, its kernels).

    As inductor schedules it, nearly: products and attention are kernels of their own; what lies
    between them and is connected is one kernel, which reads its inputs once and writes what others
    use, but computes again what takes a reading or two elementwise. A backward frees what the
    forward has kept as it goes.
    """
    nodes = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    buffer: dict[fx.Node, fx.Node] = {}  # whose memory a node's value lies in
    level: dict[fx.Node, int] = {}  # how many products and attentions must have run before
    group: dict[fx.Node, fx.Node] = {}  # of nodes in one kernel: its first node
    products: dict[fx.Node, Work] = {}

    def first(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            node = group[node]
        return node

    def value(item: Any) -> Any:
        return item.meta.get("val") if isinstance(item, fx.Node) else item

    for node in nodes:
        if node.op == "output":
            continue
        given = list(dict.fromkeys(buffer[n] for n in node.all_input_nodes))
        if getattr(node.target, "is_view", False):
            buffer[node] = given[0]
            continue
        buffer[node] = group[node] = node
        if node.target is getitem:  # one of several outputs
            group[node], level[node] = first(given[0]), level[given[0]]
            continue
        level[node] = max((level[n] + (first(n) in products) for n in given), default=0)
        if node.op != "call_function":
            continue
        target, args = node.target, node.args
        if any(isinstance(a, torch._ops.OpOverload) for a in args):  # wrapped: a seed is kept
            at = next(i for i, a in enumerate(args) if isinstance(a, torch._ops.OpOverload))
            target, args = args[at], args[at + 1 :]
        work = work_of(target, fx.map_arg(args, value), value(node))
        if work is not None and work.kind != "traffic":
            products[node] = work
            continue
        for n in given:
            if n.op == "call_function" and first(n) not in products and level[n] == level[node]:
                group[first(n)] = node
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in group:
        if node.op == "call_function":
            members.setdefault(first(node), []).append(node)
    results = {buffer[n] for n in nodes[-1].all_input_nodes}
    written = results.union(*({buffer[n] for n in k.all_input_nodes} for k in products))
    origin: dict[fx.Node, set[fx.Node]] = {}  # of a value: the buffers it is computed from
    most_read = compiling.AS_EAGER["realize_reads_threshold"]

    def origins(node: fx.Node) -> set[fx.Node]:
        if node not in origin:
            given = [buffer[n] for n in node.all_input_nodes]
            elementwise = node.op == "call_function" and node.target is not getitem
            elementwise &= first(node) not in products and node not in written
            elementwise &= _size(node) > 0 and all(_elements(node) >= _elements(n) for n in given)
            found = set().union(*map(origins, given)) if elementwise else {node}
            origin[node] = found if len(found) <= most_read else {node}
        return origin[node]

    reads: dict[fx.Node, set[fx.Node]] = {}  # kernel -> buffers of others
    for kernel, own in members.items():
        inside = {buffer[n] for node in own for n in node.all_input_nodes}
        outside = [n for n in inside if first(n) is not kernel]
        if kernel not in products:
            outside = [o for n in outside for o in origins(n)]
        reads[kernel] = set(outside)
    wanted = results.union(*reads.values())  # by another kernel: these are written
    work: Counter[Work] = Counter()
    for kernel, own in members.items():
        if kernel in products:
            work[products[kernel]] += 1
            continue
        moved = sum(map(_size, reads[kernel])) + sum(_size(n) for n in own if n in wanted)
        if moved:
            work[Work("traffic", 0.0, moved)] += 1

    # What is alive: a kernel's outputs from then until the last kernel that reads them.
    change = Counter()
    end = {k: max(place[n] for n in own) for k, own in members.items()}
    for node in wanted:
        kept = node.op != "call_function"
        if kept and (node.op != "placeholder" or node.name.startswith("primals")):
            continue  # the model's, or the caller's
        if not kept:
            change[place[node]] += _size(node)
        if node not in results:
            change[max(end[k] for k in members if node in reads[k]) + 0.5] -= _size(node)
    alive = most = 0
    for when in sorted(change):
        alive += change[when]
        most = max(most, alive)
    return most, work


def _elements(node: fx.Node) -> int:
    leaves = tree_leaves(node.meta.get("val"))
    return max((v.numel() for v in leaves if isinstance(v, Tensor)), default=0)


def _size(node: fx.Node) -> int:
    return sum(_bytes(v) for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor))
