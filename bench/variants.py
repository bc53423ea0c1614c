"""What is timed: baselines and ours over one set of weights, data and draws."""

import copy
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

import fastpref
from bench.architectures import ARCHITECTURES, Architecture
from bench.baselines import BASELINES, UsualStep
from bench.meters import Clock
from fastpref import models, oracle
from fastpref.pairs.dataset import Batch
from fastpref.process import Times
from fastpref.step import attention, backends, checkpointing, compiling, pair, reference
from fastpref.step.graphs import StepGraph

BETA, SEED, RANK = 500.0, 1, 64
LEARNING_RATE = 1e-5
DRAWS = 4  # that the steps go through

# Of a table: on a GPU where tokens are many, where they are few, and on a CPU.
LARGE = (
    *("B0", "B1", "B4", "B5", "joint/full", "deferred/full", "deferred/attention"),
    *("deferred/attention+compile", "deferred/none+compile", "deferred/none+compile+cached"),
)
SMALL = (
    *("B0", "B1", "joint/none", "joint/none+compile", "joint/none+compile+graph"),
    *("joint/none+compile+cached+graph", "B4", "B5"),
)
CPU = (
    *("B0", "B1", "joint/full", "joint/none", "deferred/attention", "deferred/none"),
    *("joint/none+graph", "joint/none+cached", "deferred/none+cached"),
)
FEW_TOKENS = 4000  # of a sample: below, launches count and a pair fits in one batch


def adapt(model: nn.Module, arch: Architecture, adapters: str) -> None:
    """Puts float32 adapters on all blocks, or on the upper half of them."""
    import peft

    family = models.family(arch.family)
    targets: list[str] | str = family.LORA_TARGETS
    if adapters == "half":  # by a pattern, as peft takes it
        upper = "|".join(str(k) for k in range(arch.layers // 2, arch.layers))
        targets = rf"{family.BLOCKS}\.({upper})\..*({'|'.join(map(re.escape, targets))})"
    model.add_adapter(peft.LoraConfig(r=RANK, target_modules=targets))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


class Setting:
    """Model, data and optimisers that all variants share; their weights are the same tensors.

    args.adapters: on all blocks, or on the upper half of them.
    """

    def __init__(self, args: Namespace, device: torch.device) -> None:
        self.arch: Architecture = ARCHITECTURES[args.family]
        self.shape, self.pairs, self.device = args.shape or self.arch.shape, args.pairs, device
        usual = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, args.dtype or usual)
        self.family = models.family(self.arch.family)
        self.process = self.family.process(self.arch.scheduler)
        self.objective = fastpref.objective("dpo", beta=BETA)
        self.latents, self.cond = self.arch.inputs(self.shape, self.pairs, device, self.dtype)
        self.base = self.arch.make(device, self.dtype)
        self.model = copy.deepcopy(self.base, memo={id(t): t for t in tensors(self.base)})
        self.adapters: str = args.adapters
        adapt(self.model, self.arch, self.adapters)
        random = torch.Generator(device).manual_seed(1)
        for name, p in self.model.named_parameters():
            if "lora_B" in name:  # zeros would hide every gradient of A
                p.data.normal_(0, 0.02, generator=random)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stack = ExitStack()
        self.attention = attention.choose(
            args.attention, self.model, lambda: self.predict(self.model), device
        )
        self.calls = backends.observe(lambda: self.predict(self.model))

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        t = torch.full((1,), 500.0, device=self.device)
        cond = {name: value[:1] for name, value in self.cond.items()}
        with self.autocast():
            return self.family.predict(model, self.latents[:1], t, cond)

    def autocast(self) -> AbstractContextManager:
        wide = self.dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not wide)

    def attention_of(self, model: nn.Module) -> AbstractContextManager:
        """What our variants run in: the backend of --attention, unless the model keeps it."""
        kept = self.attention.name == "native" or attention.through_dispatcher(model)
        return nullcontext() if kept else attention.use(model, self.attention.name)

    def keep_attention(self, *models: nn.Module, name: str) -> None:
        """Tells models that go through diffusers' dispatcher, for as long as they live: one that is
        not told does as the one that was told last.
        """
        for model in models:
            if self.attention.name == "native" or not attention.through_dispatcher(model):
                continue
            if name == "native":
                model.set_attention_backend(name)
            else:
                self.stack.enter_context(attention.use(model, name))

    def update(self, kind: str, clock: Clock, graphs: list[StepGraph]) -> Callable[[], None]:
        """Clip, optimiser's step, gradients away: usual, ours (fused) or as a graph, one more."""
        if kind not in self.optimizers:
            options = {"usual": {}, "ours": {"fused": True}}.get(kind)
            if options is None:
                rate = torch.tensor(LEARNING_RATE, device=self.device)
                options = {"fused": True, "lr": rate, "capturable": self.device.type == "cuda"}
            options = {"lr": LEARNING_RATE, **options}
            self.optimizers[kind] = torch.optim.AdamW(self.parameters, **options)
        optimizer = self.optimizers[kind]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()

        if kind == "graph":  # reads the gradients where the step's graph puts them
            step = StepGraph(step, self.device, name="optimiser")
            graphs.append(step)

        def update() -> None:
            with clock.part("optimizer"):
                step()
                optimizer.zero_grad()

        return update

    def twin(self) -> nn.Module:
        """A model of its own with the same weights, to be compiled and checkpointed."""
        return copy.deepcopy(self.model, memo={id(t): t for t in tensors(self.model)})

    def draws(self, index: int) -> fastpref.Draws:
        """Of the pairs in one step, on the host."""
        numbers = torch.arange(self.pairs)
        return fastpref.Draws(SEED, numbers + 1, torch.full_like(numbers, index))

    def times(self, draws: fastpref.Draws) -> Tensor:
        """`Times` as our process draws them, in one tensor on the device."""
        times = torch.stack(self.process.times(draws))
        return times.to(self.device, non_blocking=True)


class Usual:
    """A baseline, with gradients left in .grad."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting, self.clock = setting, Clock(setting.device)
        self.what, self.cached = BASELINES[name].what, False
        self.models = 2 if BASELINES[name].two_models else 1
        self.graphs: list[StepGraph] = []
        self.model, self.update = setting.twin(), setting.update("usual", self.clock, self.graphs)
        family = setting.family
        self.run = UsualStep(name, self.model, setting.base, family, BETA, self.clock)
        setting.keep_attention(*self.run.models, name="native")
        # Ready beforehand: those loops draw times in a few launches, not by our host's arithmetic,
        # which the variants of ours pay for in each step.
        self.times = [Times(*setting.times(setting.draws(k)).float()) for k in range(DRAWS)]

    def gradient(self, index: int, *, same_noise: bool = False) -> None:
        """Draw number `index`; same_noise: our noise instead of one of its own."""
        setting, noise = self.setting, None
        if same_noise:
            draws = setting.draws(index)
            noise = oracle.normal(SEED, draws.pair_id, draws.index, setting.latents[0].numel())
            noise = noise.view(-1, *setting.latents.shape[1:]).to(setting.latents)
        self.run(setting.latents, setting.cond, self.times[index], setting.autocast, noise)


def rungs(name: str) -> tuple[str, str, list[str]]:
    """(pair mode, checkpointing, what is added) of a variant of ours; ValueError: there is none."""
    form, *added = name.split("+")
    mode, _, kept = form.partition("/")
    known = mode in ("joint", "deferred") and kept in ("none", "attention", "full")
    known = known and not set(added) - {"compile", "loose", "cached", "graph"}
    if not known or ("loose" in added and "compile" not in added):
        raise ValueError(
            f"--variants: expected {', '.join(BASELINES)} or joint|deferred/none|attention|full"
            f" and +compile or +compile+loose, +cached, +graph, got {name}"
        )
    return mode, kept, added


class Ours:
    """MODE/CHECKPOINTING+compile+cached+graph, with gradients left in .grad; +loose: compiled as
    Inductor does on its own, rounding as it comes.

    As `fastpref train` does it: where the reference is not cached, its pass and the policy's share
    what stands below the first adapter.
    """

    models = 1

    def __init__(self, name: str, setting: Setting) -> None:
        mode, kept, added = rungs(name)
        self.setting, self.clock = setting, Clock(setting.device)
        self.cached, self.what = "cached" in added, "ours"
        self.deferred = mode == "deferred"
        self.model = setting.twin()
        setting.keep_attention(self.model, name=setting.attention.name)
        checkpointing.apply(self.model, setting.family.BLOCKS, kept)
        if "compile" in added:
            options = None if "loose" in added else compiling.AS_EAGER
            compiling.compile_blocks(self.model, setting.family.BLOCKS, options=options)
        predict = setting.family.predict
        if self.cached:
            policy = partial(predict, self.model)
            online = reference.adapters_off(self.model, predict)
        else:
            policy, online = reference.shared_prefix(self.model, predict)
        self.policy = self._part("forward", policy)
        self.reference = self._part("reference", online)
        self.known = self._fill(mode) if self.cached else [None] * DRAWS
        self.graphs: list[StepGraph] = []
        if "graph" in added:
            options = {"parameters": setting.parameters, "name": name}
            self.graphs.append(StepGraph(self._step, setting.device, **options))
        kind = "graph" if self.graphs else "ours"
        self.update = setting.update(kind, self.clock, self.graphs)

    def gradient(self, index: int, *, same_noise: bool = True) -> None:
        draws = self.setting.draws(index)
        with self.setting.attention_of(self.model):
            call = self.graphs[0] if self.graphs else self._step
            inputs = {"latents": self.setting.latents, **self.setting.cond}
            call(
                pair_id=draws.pair_id,
                index=draws.index,
                times=self.setting.times(draws),
                ref_err=self.known[index],
                **inputs,
            )

    def _step(
        self,
        latents: Tensor,
        pair_id: Tensor,
        index: Tensor,
        times: Tensor,
        ref_err: Tensor | None,
        **cond: Tensor,
    ) -> Tensor:
        draws = fastpref.Draws(SEED, pair_id, index)
        noisy, t, target = self.setting.process.noise(latents, draws, Times(*times))
        objective, parameters = self.setting.objective, self.setting.parameters
        if self.deferred:
            how = {"objective": objective, "parameters": parameters}
            inputs = (noisy, t, target, cond, ref_err)
            return pair.deferred(self.policy, self.reference, *inputs, **how).loss
        ref = self.reference(noisy, t, cond) if ref_err is None else ref_err
        out = pair.training_loss(self.policy(noisy, t, cond), target, ref, objective)
        pair.backward(out, parameters=parameters)
        return out.loss

    def _part(self, name: str, call: Callable) -> Callable:
        def run(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            with self.clock.part(name), self.setting.autocast():
                return call(noisy, t, cond)

        return run

    def _fill(self, mode: str) -> list[Tensor]:
        """The errors [2B] of all draws that are timed, as a cache gives them to a step."""
        setting = self.setting
        batch = Batch(setting.latents, setting.cond, torch.ones(setting.pairs), torch.empty(0), [])
        with setting.attention_of(self.model):
            return [
                reference.errors(self.reference, setting.process, batch, setting.draws(k), mode)
                for k in range(DRAWS)
            ]


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def default_variants(setting: Setting) -> tuple[str, ...]:
    return CPU if setting.device.type == "cpu" else usual(setting.arch, setting.shape)


def usual(arch: Architecture, shape: str | None) -> tuple[str, ...]:
    """On a GPU, of clips of this shape."""
    return SMALL if arch.tokens(shape or arch.shape) <= FEW_TOKENS else LARGE
