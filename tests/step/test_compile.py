"""Blocks compiled in place: the same numbers, three compilations, adapters on and off."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch._inductor.config as inductor
from diffusers import CogVideoXTransformer3DModel, UNet2DConditionModel, WanTransformer3DModel
from tiny import DPO, STEPS, case, distance, gradients
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.graph import GraphLowering

from fastpref import models
from fastpref.loss.functional import Draws
from fastpref.pairs.dataset import Batch
from fastpref.step import checkpointing, compiling, reference

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def wan():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=48,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    noisy = torch.randn(2, 16, 3, 8, 8)
    return models.family("wan"), model, noisy, {"text": torch.randn(2, 7, 32)}


def cogvideox():
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
        time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    noisy = torch.randn(1, 16, 3, 8, 8)
    return models.family("cogvideox"), model, noisy, {"text": torch.randn(1, 6, 32)}


def unet():
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    noisy = torch.randn(2, 4, 1, 8, 8)
    return models.family("stable_diffusion"), model, noisy, {"text": torch.randn(2, 7, 32)}


class Run:
    """A model with adapters that matter, and what a training step asks of it."""

    def __init__(self, make) -> None:
        torch.manual_seed(0)
        self.family, self.model, self.noisy, self.cond = make()
        self.t = torch.full((len(self.noisy),), 300.0, device=self.noisy.device)
        self.model.requires_grad_(False)
        self.base = self.policy()
        lora = peft.LoraConfig(r=4, target_modules=self.family.LORA_TARGETS)
        peft.inject_adapter_in_model(lora, self.model)
        for name, p in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.reference = reference.adapters_off(self.model, self.family.predict)

    def policy(self) -> Tensor:
        return self.family.predict(self.model, self.noisy, self.t, self.cond)

    def step(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Reference, policy, gradients."""
        ref = self.reference(self.noisy, self.t, self.cond)
        pred = self.policy()
        grads = torch.autograd.grad((pred - self.noisy).square().mean(), self.parameters)
        return ref, pred.detach(), list(grads)

    def move(self) -> None:
        """As an optimiser does."""
        with torch.no_grad():
            for p in self.parameters:
                p += 0.05 * torch.sign(p)


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def check(make, expected: int, backend="aot_eager", mode="none", **tolerance) -> None:
    """Three steps, the weights moving between them, each against the same step uncompiled."""
    run = Run(make)
    checkpointing.apply(run.model, run.family.BLOCKS, mode)
    assert compiling.compile_blocks(run.model, run.family.BLOCKS, backend=backend) > 1
    for _ in range(3):
        compiled = run.step()
        assert compilations() == expected, "all in the first step, none after"
        with compiling.eagerly():
            plain = run.step()
        assert compilations() == expected
        torch.testing.assert_close(compiled, plain, **tolerance)
        off, on, grads = compiled
        torch.testing.assert_close(off, run.base, **tolerance)
        assert (off - on).abs().max() > 0.01, "adapters on and off say the same"
        assert min(g.abs().max() for g in grads) > 0
        run.move()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "attention"])
def test_three_compilations_and_the_same_numbers(mode):
    """Reference, first block, other blocks; checkpointing is part of what is compiled."""
    check(wan, 3, mode=mode, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_compiled_keeps_what_checkpointing_keeps():
    """In the compiled backward of `full` attention is computed again, in that of `attention` not;
    a copy of the model has compiled blocks of its own.
    """
    again: list[int] = []

    def seen(graph, inputs):
        # Among the arguments too: a recomputed operator may be wrapped in one that sets the seed.
        again.append(sum(ATTENTION in (n.target, *n.args) for n in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=seen,
        partition_fn=min_cut_rematerialization_partition,
    )
    expected = {"full": 2, "attention": 0}  # self- and cross-attention
    for mode, count in expected.items():
        torch._dynamo.reset()
        again.clear()
        run = Run(wan)
        checkpointing.apply(run.model, "blocks", mode)
        compiling.compile_blocks(run.model, "blocks", backend=backend)
        run.step()
        assert again == [count, count], mode  # first block, other blocks

    said, twin = run.policy().detach(), copy.deepcopy(run.model)
    for p in twin.parameters():
        p.data.zero_()
    before = compilations()
    assert torch.equal(run.policy(), said) and not run.policy().eq(0).all()
    run.model = twin
    assert run.policy().eq(0).all() and compilations() == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["attention", "full"])
def test_checkpoints_begin_at_the_first_adapter(mode):
    """Blocks below it record nothing, and a checkpoint without a graph cannot be compiled."""
    plain, compiled = case("wan", half=True), case("wan", half=True)
    for c in (plain, compiled):
        checkpointing.apply(c.model, c.family.BLOCKS, mode)
    compiling.compile_blocks(compiled.model, compiled.family.BLOCKS, backend="aot_eager")
    found = []
    for c in (plain, compiled):
        noisy, t, _ = c.inputs()
        c.policy(noisy, t, c.cond).square().mean().backward()
        found.append(gradients(c.parameters))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_path_that_leads_nowhere():
    with pytest.raises(ValueError, match="WanTransformer3DModel has no blocks at 'layers'"):
        compiling.compile_blocks(wan()[1], "layers")


@pytest.mark.slow
@pytest.mark.parametrize("make, expected", [(cogvideox, 3), (unet, 10)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_other_families(make, expected, mode):
    """A UNet's five blocks are five different ones, each with one way in."""
    check(make, expected, mode=mode, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make, mode", [(wan, "none"), (wan, "attention"), (cogvideox, "none")])
def test_inductor(make, mode):
    check(make, 3, backend="inductor", mode=mode, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_options_hold_in_forward_and_backward_and_nowhere_else(monkeypatch):
    """A backward is compiled later, out of the call that brought them; other code in the process
    keeps Inductor's own.
    """
    seen, real = [], GraphLowering.run

    def run(graph, *inputs):
        now = {name: getattr(inductor, name) for name in compiling.AS_EAGER}
        seen.append((graph.is_backward, now))
        return real(graph, *inputs)

    monkeypatch.setattr(GraphLowering, "run", run)
    before = {name: getattr(inductor, name) for name in compiling.AS_EAGER}
    for options, expected in ((compiling.AS_EAGER, compiling.AS_EAGER), (None, before)):
        seen.clear()
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        compiling.compile_blocks(model, "0", options=options)
        with torch.compiler.config.patch(force_disable_caches=True):
            out = model(torch.randn(2, 4)).sum()
            assert {name: getattr(inductor, name) for name in compiling.AS_EAGER} == before
            out.backward()
        assert seen == [(False, expected), (True, expected)]


def silent(name: str, half: bool):
    """A case in training's precision whose adapters say nothing yet: every margin should be 0."""
    c = case(name, torch.bfloat16, half=half)
    kept = set(type(c.model)._keep_in_fp32_modules or ())
    for model in (c.model, c.base):
        for path, p in model.named_parameters():
            if "lora_" in path or kept & set(path.split(".")):
                p.data = p.data.float()
            if "lora_B" in path:
                p.data.zero_()
    return c


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode, half",
    [
        ("toy", "joint", True),
        ("wan", "joint", False),
        ("wan", "deferred", True),
        ("cogvideox-2b", "deferred", False),
        ("cogvideox-5b", "joint", True),
        ("sd15", "deferred", False),
        ("sdxl", "joint", False),
        ("sdxl", "deferred", True),
    ],
)
def test_compiled_margins_of_equal_models_are_zero(name, mode, half, beta=5000.0):
    """Largest of 12 pairs in bf16, the reference with the adapters off and as a cache is filled."""
    c = silent(name, half)

    def predict(model, *inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return c.family.predict(model, *inputs)

    for model in (c.model, c.base):
        compiling.compile_blocks(model, c.family.BLOCKS)
    policy, online = reference.shared_prefix(c.model, predict)
    margins = []
    for index in range(6):
        draws = Draws(c.draws.seed, c.draws.pair_id, torch.full_like(c.draws.index, index))
        where = (c.process, Batch(c.latents, c.cond, c.weight, draws.pair_id, []), draws, mode)
        kept = reference.errors(reference.base(c.base, predict), *where)
        now = reference.errors(online, *where)
        for change in (reference.changes(policy, online, *where), now - kept):
            w, l = change.chunk(2)
            margins.append(0.5 * beta * (w - l))
    assert len(margins) == 12 and now.min() > 0
    limit = 1e-2 if name.startswith("sd") else 0.0
    assert torch.cat(margins).abs().max() <= limit


# ---- Full tuning: what lies outside the blocks and what blocks add to it learn too


def tuned(name, form, mode="none", *, backend=None, dtype=torch.float32, device="cpu"):
    """The gradient of every parameter of a fully tuned model, by one step as a run takes it."""
    c = case(name)
    model, frozen = copy.deepcopy(c.base).requires_grad_(True).to(device), c.base.to(device)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():  # as after some steps: not the reference
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=random).to(device)

    def predict(model, *inputs):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return c.family.predict(model, *inputs)

    torch._dynamo.reset()
    checkpointing.apply(model, c.family.BLOCKS, mode)
    if backend:
        for each in (model, frozen):
            compiling.compile_blocks(each, c.family.BLOCKS, backend=backend)
    draws = Draws(c.draws.seed, c.draws.pair_id.to(device), c.draws.index.to(device))
    noisy, t, target = c.process.noise(c.latents.to(device), draws)
    cond = {key: value.to(device) for key, value in c.cond.items()}
    STEPS[form](
        lambda *inputs: predict(model, *inputs), reference.base(frozen, predict),
        noisy, t, target, cond, DPO,
        weight=c.weight.to(device), parameters=list(model.parameters()),
    )  # fmt: skip
    return {key: p.grad for key, p in model.named_parameters()}


LEARNT = {  # by what is in a parameter's name
    "wan": ["scale_shift_table", "time_embedder", "time_proj", "text_embedder", "norm"],
    "cogvideox-2b": ["time_embedding", "norm1.linear", "norm2.linear", "norm_out.linear", "norm_q"],
    "sd15": ["time_embedding", "time_emb_proj", "norm"],
}


def together(grads, part):
    return torch.cat([g.flatten() for key, g in grads.items() if part in key])


def assert_eager(name, got, wanted):
    """To rounding, each parameter by itself.

    Of what is zero but for rounding (a bias of all keys, which a softmax does not see) the absolute
    size tells.
    """
    assert got.keys() == wanted.keys() and not [key for key, g in got.items() if g is None]
    whole = together(wanted, "").norm()
    for key, g in wanted.items():
        assert (got[key] - g).norm() < 2e-5 * g.norm() + 1e-8 * whole, key
    for part in LEARNT[name]:
        assert together(got, part).norm() > 1e-3 * whole, part


@pytest.mark.parametrize(
    "name, form, mode",
    [
        ("wan", "joint", "full"),
        ("wan", "deferred", "attention"),
        ("cogvideox-2b", "joint", "full"),
        pytest.param("sd15", "deferred", "full", marks=pytest.mark.slow),
    ],
)
def test_full_tuning_compiled_is_full_tuning(name, form, mode):
    """Modulation tables, time embeddings and norms among the rest: elsewhere compiling blocks that
    are checkpointed left gradients of them out (FastVideo's issue 1718).
    """
    assert_eager(name, tuned(name, form, mode, backend="aot_eager"), tuned(name, form))


def assert_half(name, got, eager, wanted):
    """In bf16 no further from float32 than twice what eager bf16 is, kind by kind."""
    for part in [*LEARNT[name], ""]:
        off, eagers = (distance(together(g, part), together(wanted, part)) for g in (got, eager))
        assert 0 < off < 2 * eagers < 0.2, part


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, form, mode", [("wan", "joint", "full"), ("cogvideox-2b", "deferred", "attention")]
)
def test_full_tuning_by_inductor(name, form, mode):
    wanted = tuned(name, form)
    assert_eager(name, tuned(name, form, mode, backend="inductor"), wanted)
    half = {"dtype": torch.bfloat16}
    assert_half(
        name, tuned(name, form, mode, backend="inductor", **half), tuned(name, form, **half), wanted
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("mode", ["none", "attention", "full"])
def test_full_tuning_on_a_gpu(mode, form):
    wanted = tuned("wan", form, device="cuda")
    compiled = tuned("wan", form, mode, backend="inductor", device="cuda")
    assert_eager("wan", compiled, wanted)
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    compiled = tuned("wan", form, mode, backend="inductor", **half)
    assert_half("wan", compiled, tuned("wan", form, **half), wanted)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["none", "attention", "full"])
def test_inductor_on_a_gpu(mode):
    def make():
        family, model, noisy, cond = wan()
        return family, model.cuda(), noisy.cuda(), {"text": cond["text"].cuda()}

    check(make, 3, backend="inductor", mode=mode, rtol=1e-3, atol=1e-4)
