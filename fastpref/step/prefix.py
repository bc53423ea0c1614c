"""The shared prefix: what stands below the first adapter runs once, for reference and policy.

The reference pass runs first, and its parts (the model's children, lists of blocks opened) are
watched. What ran before the first part with an adapter saw only frozen weights, so the policy would
compute the same there: in the policy's pass recorded outputs stand in its place, without a graph,
and the first adapted block is the first to run. Nothing about a family is assumed, and before the
first replay its outcome is compared, bit for bit, with that of a whole pass.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Place = tuple[nn.Module, str, nn.Module]  # parent, name, part


class Prefix:
    """Two passes over one model that share their prefix: the first recorded, the second replayed.

    Make it once adapters and compiled blocks are in their places. Between the passes one activation
    is kept per part whose output is still in use (on a transformer: the first adapted block's
    input, the embeddings and the modulation).

    adapters: the layers whose output differs between the passes.
    why_not: None, or why nothing is shared: every pass is then a whole one.
    """

    def __init__(self, model: nn.Module, adapters: list[nn.Module]) -> None:
        self.places = list(_places(model))
        self.adapted = {
            part
            for _, _, part in self.places
            if any(p.requires_grad for p in part.parameters())
            or not set(adapters).isdisjoint(part.modules())
        }
        self.why_not: str | None = None
        self.checked = False
        self.forget()
        inside = {p for _, _, part in self.places for p in part.parameters()}
        for name, p in model.named_parameters():
            if p.requires_grad and p not in inside:
                self._give_up(f"{name} trains and belongs to no part of {type(model).__name__}")
                break

    def forget(self) -> None:
        """Frees what was recorded."""
        self.inputs: tuple[Any, ...] = ()
        self.outputs: dict[nn.Module, Any] = {}

    @contextmanager
    def record(self, *inputs: Any) -> Iterator[None]:
        """The pass inside, over `inputs`, is the first."""
        self.forget()
        if self.why_not:
            yield
            return
        outputs: dict[nn.Module, Any] = {}
        last: nn.Module | None = None
        started = False

        def watch(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal last, started
            if started:
                return part(*args, **kwargs)
            if last is not None:  # what only goes on to the next part need not be kept
                passed = {id(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
                outputs[last] = tree_map(
                    lambda v: _Passed(v) if id(v) in passed else v, outputs[last]
                )
            if part in self.adapted:
                started = True
                for each in outputs:
                    outputs[each] = tree_map(_settle, outputs[each])
                return part(*args, **kwargs)
            if part in outputs:
                self._give_up(f"a {type(part).__name__} is called twice below the first adapter")
            outputs[part] = part(*args, **kwargs)
            last = part
            return outputs[part]

        with _standing_in(self.places, watch):
            yield
        if not started and not self.why_not:
            self._give_up("no part with an adapter was called")
        if not self.why_not:
            self.inputs, self.outputs = inputs, outputs

    def run(self, predict: Callable[[], Tensor], *inputs: Any) -> Tensor:
        """`predict()`: the second pass if `inputs` are the recorded ones, else a whole one."""
        # By identity: to compare values would wait for the device.
        same = len(inputs) == len(self.inputs)
        if not same or not all(a is b for a, b in zip(inputs, self.inputs, strict=True)):
            return predict()
        # The recorded values live on in the stand-ins as long as a checkpointed graph needs them.
        outputs = self.outputs
        if not self.checked:
            self.checked = True
            self._check(predict, inputs)
        self.forget()
        return predict() if self.why_not else self._second(predict, outputs)

    def _second(self, predict: Callable[[], Tensor], outputs: dict[nn.Module, Any]) -> Tensor:
        places = [place for place in self.places if place[2] in outputs]
        with _standing_in(places, lambda part, *args, **kwargs: outputs[part]):
            return predict()

    def _check(self, predict: Callable[[], Tensor], inputs: tuple[Any, ...]) -> None:
        """Whether a second pass says what a whole one does; eagerly, since compiled code rounds."""
        # Asked, since set_stance imports it, which takes most of a second.
        compiles = "torch._dynamo" in sys.modules
        stance = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        with torch.no_grad(), stance:
            with self.record(*inputs):
                whole = predict()
            # torch.equal but for NaN, which is as good as itself here.
            same = self.why_not is None and torch.allclose(
                whole, self._second(predict, self.outputs), rtol=0, atol=0, equal_nan=True
            )
        if not same and self.why_not is None:
            self._give_up("the second pass would not say the same")

    def _give_up(self, why: str) -> None:
        self.why_not = why
        self.forget()
        print(f"shared prefix: off, two whole passes instead ({why})", file=sys.stderr)


class _Passed:
    """A tensor handed straight to the next part: alive if something else holds it too."""

    def __init__(self, value: Tensor) -> None:
        # Weak, or the recording would itself keep it alive. The blank: one zero under any shape.
        self.value = weakref.ref(value)
        self.blank = value.new_zeros(()).expand(value.shape)


def _settle(value: Any) -> Any:
    """What the second pass is given for a recorded value: itself, or a blank nobody reads."""
    if not isinstance(value, _Passed):
        return value
    alive = value.value()
    return value.blank if alive is None else alive


# A hook runs around a part's forward; only another module can stand in its place.
class _StandIn(nn.Module):
    """Stands in a part's place for one pass; whoever looks at its attributes sees the part's."""

    def __init__(self, part: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        # nn.Module's own way would make the part a child, its parameters under new names.
        self.__dict__["part"], self.__dict__["call"] = part, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.part, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["part"], name)


def _places(model: nn.Module) -> Iterator[Place]:
    for name, child in model.named_children():
        # Nobody calls a list: its members are called.
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _places(child)
        else:
            yield model, name, child


@contextmanager
def _standing_in(places: list[Place], call: Callable[..., Any]) -> Iterator[None]:
    try:
        for parent, name, part in places:
            parent._modules[name] = _StandIn(part, call)
        yield
    finally:
        for parent, name, part in places:
            parent._modules[name] = part
