"""The kernels of an operator and of a compiled graph: what they compute, move and keep alive."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import checkpointing, compiling


@dataclass(frozen=True)
class Work:
    """One kernel: what it computes and the bytes it moves. dim: of attention's heads."""

    kind: Literal["product", "attention", "attention_backward", "traffic"]
    flops: float
    bytes: int
    dim: int = 0


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
        # A backward's first tensor is the gradient. Two products forward, five backward.
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
    made = kernels(nodes)
    buffer, kernel_of, products = made.buffer, made.kernel_of, made.products
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, kernel in kernel_of.items():
        if node.op == "call_function":
            members.setdefault(kernel, []).append(node)
    results = {buffer[n] for n in nodes[-1].all_input_nodes}
    written = results.union(*({buffer[n] for n in k.all_input_nodes} for k in products))
    origin: dict[fx.Node, set[fx.Node]] = {}  # of a value: the buffers it is computed from
    most_read = compiling.AS_EAGER["realize_reads_threshold"]

    def origins(node: fx.Node) -> set[fx.Node]:
        if node not in origin:
            given = [buffer[n] for n in node.all_input_nodes]
            elementwise = node.op == "call_function" and node.target is not getitem
            elementwise &= kernel_of[node] not in products and node not in written
            elementwise &= _size(node) > 0 and all(_elements(node) >= _elements(n) for n in given)
            found = set().union(*map(origins, given)) if elementwise else {node}
            origin[node] = found if len(found) <= most_read else {node}
        return origin[node]

    reads: dict[fx.Node, set[fx.Node]] = {}  # kernel -> buffers of others
    for kernel, own in members.items():
        inside = {buffer[n] for node in own for n in node.all_input_nodes}
        outside = [n for n in inside if kernel_of[n] is not kernel]
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
    place = {node: i for i, node in enumerate(nodes)}
    end = {kernel: max(place[n] for n in own) for kernel, own in members.items()}
    freed = {node: max(end[k] for k in members if node in reads[k]) for node in wanted - results}
    return _most_alive(wanted, place, freed), work


@dataclass(frozen=True)
class Kernels:
    """Which kernel of a compiled graph computes what.

    buffer: of a node, in whose memory its value lies. kernel_of: of a buffer, the node that names
    its kernel. products: the kernels that are products or attention.
    """

    buffer: dict[fx.Node, fx.Node]
    kernel_of: dict[fx.Node, fx.Node]
    products: dict[fx.Node, Work]


def kernels(nodes: list[fx.Node]) -> Kernels:
    """Products and attention are kernels of their own; what is connected between them is one."""
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
    return Kernels(buffer, {node: first(node) for node in group}, products)


def _most_alive(wanted: set[fx.Node], place: dict[fx.Node, int], freed: dict[fx.Node, int]) -> int:
    """The most bytes of kernels' outputs at once, each from its place until its last reader's.

    freed: of those that are no results, that reader's place.
    """
    change: Counter[float] = Counter()
    for node in wanted:
        kept = node.op != "call_function"
        # AOTAutograd's name for what a forward was given; what else a backward is given, it frees.
        if kept and (node.op != "placeholder" or node.name.startswith("primals")):
            continue  # the model's, or the caller's
        if not kept:
            change[place[node]] += _size(node)
        if node in freed:
            # Half a place later: its last reader has its own output by then.
            change[freed[node] + 0.5] -= _size(node)
    alive = most = 0
    for when in sorted(change):
        alive += change[when]
        most = max(most, alive)
    return most


def _elements(node: fx.Node) -> int:
    leaves = tree_leaves(node.meta.get("val"))
    return max((v.numel() for v in leaves if isinstance(v, Tensor)), default=0)


def _size(node: fx.Node) -> int:
    return sum(_bytes(v) for v in tree_leaves(node.meta.get("val")) if isinstance(v, Tensor))
