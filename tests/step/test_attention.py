"""The choice of an attention backend: what a run computes, what is at hand, what is refused."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from fastpref import models
from fastpref.step import attention, backends, checkpointing, compiling
from fastpref.step.backends import Call

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = ("flash", "native")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wan() -> tuple[nn.Module, callable]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=48,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = torch.randn(2, 16, 3, 8, 8), torch.tensor([10.0, 10.0])
    cond = {"text": torch.randn(2, 7, 32)}
    return model, lambda: models.family("wan").predict(model, *inputs, cond)


def cogvideox() -> tuple[nn.Module, callable]:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
        time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    inputs = torch.randn(1, 16, 3, 8, 8), torch.tensor([10.0])
    cond = {"text": torch.randn(1, 6, 32)}
    return model, lambda: models.family("cogvideox").predict(model, *inputs, cond)


def unet() -> tuple[nn.Module, callable]:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    cond = {"text": torch.randn(1, 7, 32)}
    inputs = torch.randn(1, 4, 1, 8, 8), torch.tensor([10.0])
    return model, lambda: models.family("stable_diffusion").predict(model, *inputs, cond)


FAMILIES = {"wan": wan, "cogvideox": cogvideox, "unet": unet}


# ---- What a run computes


def test_observe_reads_the_attentions_of_a_forward():
    """Tokens and heads by hand: Wan's 3x4x4 patches and its text, CogVideoX's both in one."""
    f32 = torch.float32
    assert backends.observe(wan()[1]) == [
        Call(2, 2, 48, 48, 16, f32, CPU),
        Call(2, 2, 48, 7, 16, f32, CPU),
    ]
    assert backends.observe(cogvideox()[1]) == [Call(1, 2, 54, 54, 16, f32, CPU)]
    found = backends.observe(unet()[1])
    assert found[0] == Call(1, 2, 16, 16, 32, f32, CPU) and Call(1, 2, 16, 7, 32, f32, CPU) in found
    assert backends.observe(lambda: None) == []


def test_observe_changes_nothing():
    _, probe = wan()
    before, inside = probe(), []
    backends.observe(lambda: inside.append(probe()))
    assert torch.equal(before, inside[0])


def test_which_models_go_through_the_dispatcher():
    assert attention.through_dispatcher(wan()[0])
    assert not attention.through_dispatcher(cogvideox()[0])
    assert not attention.through_dispatcher(unet()[0])


# ---- Choosing


def untouchable() -> None:
    raise AssertionError("there is nothing to choose, so no forward is run")


@pytest.mark.parametrize("wanted", ["auto", "native"])
def test_on_a_cpu_it_is_native_at_once(wanted):
    choice = attention.choose(wanted, wan()[0], untouchable, CPU)
    assert choice == attention.Choice("native") and str(choice) == "native"


@pytest.mark.parametrize("wanted", ["cudnn", "flash", "flash3", "flash_attn", "xformers"])
def test_on_a_cpu_a_kernel_of_gpus_is_refused(wanted):
    with pytest.raises(ValueError) as raised:
        attention.choose(wanted, wan()[0], untouchable, CPU)
    assert str(raised.value) == (
        f"attention {wanted}: needs an NVIDIA GPU, this run is on cpu: use attention native,"
        " or use attention auto"
    )


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"expected auto or one of native, cudnn, .* got flash4"):
        attention.choose("flash4", wan()[0], untouchable, CPU)


@pytest.mark.parametrize(
    "name, install",
    [
        ("flash3", "pip install flash-attn-3"),
        ("flash_attn", "pip install flash-attn --no-build-isolation"),
        ("xformers", "pip install fastpref[attention]"),
    ],
)
def test_what_is_not_installed_names_what_to_install(name, install):
    if importlib.util.find_spec(backends._PACKAGES[name][0]) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError) as raised:
        attention.choose(name, wan()[0], wan()[1], CUDA)
    assert install in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["flash", "flash_attn"])
def test_kernels_for_half_precision_say_so(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="this run in float32: use mixed_precision bf16"):
        attention.choose(name, *wan(), CUDA)


@pytest.mark.parametrize("family", ["cogvideox", "unet"])
def test_a_package_is_refused_where_pytorchs_attention_is_called(family, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    model, probe = half(*FAMILIES[family]())
    with pytest.raises(ValueError) as raised:
        attention.choose("flash_attn", model, probe, CUDA)
    assert str(raised.value) == (
        f"attention flash_attn: {type(model).__name__} calls PyTorch's attention itself: use cudnn"
        " or flash, or use attention auto"
    )


def half(model: nn.Module, probe: callable) -> tuple[nn.Module, callable]:
    """The same in bf16: attention gets bf16 under autocast."""

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return probe()

    return model, run


def as_on_a_gpu(model: nn.Module, probe: callable) -> tuple[nn.Module, callable]:
    """Norms in float32, as CUDA's autocast computes them, those of queries and keys among them."""
    for name, module in model.named_modules():
        if "norm" in name.rpartition(".")[2]:
            module.register_forward_hook(
                lambda _, args, out: out.float() if isinstance(out, torch.Tensor) else out
            )
    return half(model, probe)


@pytest.mark.parametrize("family, sizes", [("wan", (2, 2, 48, 48)), ("cogvideox", (1, 2, 54, 54))])
def test_queries_that_autocast_will_cast_count_as_cast(family, sizes, monkeypatch):
    """The norms' float32 is not what attention computes in; xformers, which no one casts for, is
    refused.
    """
    model, probe = as_on_a_gpu(*FAMILIES[family]())
    assert backends.observe(probe)[0] == Call(*sizes, 16, torch.bfloat16, CPU, mixed=True)
    assert "flash" in attention.choose("auto", model, probe, CUDA, rounds=1).seconds
    assert attention.choose("flash", model, probe, CUDA).name == "flash"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    if attention.through_dispatcher(model):
        with pytest.raises(ValueError, match="xformers: does not cast queries, keys and values of"):
            attention.choose("xformers", model, probe, CUDA)


def test_what_autocast_leaves_alone_is_observed_as_it_is():
    q, wide = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(wide, wide, wide).dtype == torch.float64
        calls = backends.observe(lambda: (attend(wide, wide, wide), attend(q, q, q)))
    assert [call.dtype for call in calls] == [torch.float64, torch.bfloat16]
    assert not any(call.mixed for call in calls)


def test_a_kernel_that_does_not_run_on_the_shape_is_refused_in_one_line():
    """cuDNN cannot serve tensors that lie on a CPU, whatever device the run says it has."""
    with pytest.raises(ValueError) as raised:
        attention.choose("cudnn", *half(*wan()), CUDA)
    said = str(raised.value)
    assert said.startswith("attention cudnn: does not run on [2, 2, 48, 16] on 48 keys in bfloat16")
    assert "\n" not in said


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_a_package_that_diffusers_does_not_take_is_refused_in_one_line(monkeypatch):
    """As an old one is, which computes all the same."""
    right = backends.attend
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        backends, "attend",
        lambda name, *qkv: right("native" if name == "flash_attn" else name, *qkv),
    )  # fmt: skip
    model, probe = half(*wan())
    with pytest.raises(ValueError) as raised:
        attention.choose("flash_attn", model, probe, CUDA)
    said = str(raised.value)
    assert said.startswith("attention flash_attn: cannot be set (Flash Attention backend 'flash'")
    assert "flash-attn>=" in said and "\n" not in said


def test_a_package_gets_what_autocast_would_cast(monkeypatch):
    """Queries and keys leave their norms in float32; what is computed is the same to the bit."""
    asked, dispatch = [], transformer_wan.dispatch_attention_fn

    def ask(query, key, value, **how):
        asked.append({x.dtype for x in (query, key, value)})
        return dispatch(query, key, value, **how)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", ask)
    model, probe = as_on_a_gpu(*wan())
    before = probe()
    assert asked == 4 * [{torch.float32, torch.bfloat16}]
    with attention.casting(model):
        inside = probe()
    assert asked[4:] == 4 * [{torch.bfloat16}]
    assert torch.equal(inside, before)
    assert transformer_wan.dispatch_attention_fn is ask


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_auto_times_what_runs_and_says_why_the_rest_does_not(family):
    """On CPU tensors PyTorch's flash attention runs and agrees; cuDNN does not run."""
    choice = attention.choose("auto", *half(*FAMILIES[family]()), CUDA, rounds=3)
    assert {"native", "flash"} <= set(choice.seconds)
    fastest = min(choice.seconds, key=choice.seconds.get)
    clearly = choice.seconds[fastest] < 0.97 * choice.seconds["native"]
    assert choice.name == (fastest if clearly else "native")
    assert all(0 < s < 10 for s in choice.seconds.values())
    assert "does not run" in choice.refused["cudnn"]
    assert set(choice.seconds) | set(choice.refused) == set(backends.BACKENDS)
    assert str(choice).startswith(f"{choice.name} (") and "\n" not in str(choice)


@pytest.mark.parametrize(("seconds", "name"), [(0.98, "native"), (0.96, "flash")])
def test_auto_stays_native_within_the_noise(seconds, name, monkeypatch):
    taken = {"native": 1.0, "flash": seconds}
    monkeypatch.setattr(backends, "seconds", lambda name, call: taken.get(name, 9.0))
    assert attention.choose("auto", *half(*wan()), CUDA, rounds=1).name == name


def test_auto_leaves_out_what_is_wrong(monkeypatch):
    """A planted kernel: first its gradient of v is off by a tenth, then one output is NaN."""
    right = backends.attend

    def biased(name, q, k, v):
        if name != "flash":
            return right(name, q, k, v)
        return right("native", q, k, 1.1 * v - 0.1 * v.detach())

    def broken(name, q, k, v):
        out = right("native", q, k, v)
        return out * torch.where(torch.arange(16) == 3, torch.nan, 1.0) if name == "flash" else out

    for planted in (biased, broken):
        monkeypatch.setattr(backends, "attend", planted)
        choice = attention.choose("auto", *half(*wan()), CUDA, rounds=1)
        assert "strays from native attention" in choice.refused["flash"], planted.__name__
        assert "flash" not in choice.seconds
        with pytest.raises(ValueError, match="attention flash: strays from native attention"):
            attention.choose("flash", *half(*wan()), CUDA)


def test_a_kernel_that_is_right_at_one_size_alone_is_refused(monkeypatch):
    """Attention as it is written down, all in bfloat16: right within rounding, as long as no score
    is so large that its own rounding counts.
    """
    right = backends.attend

    def written(name, q, k, v):
        if name != "flash":
            return right(name, q, k, v)
        return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v

    monkeypatch.setattr(backends, "attend", written)
    call = Call(2, 2, 48, 48, 16, torch.bfloat16, CPU)
    off = {
        scale: backends.difference(*(backends.results(n, call, scale) for n in BOTH))
        for scale in backends.SCALES
    }
    assert off[1.0] < 1e-2 and off[16.0] > 0.1
    said = r"attention flash: strays from native attention on \[2, 2, 48, 16\] on 48 keys in "
    with pytest.raises(ValueError, match=said + "bfloat16 with inputs of size 16, by 0"):
        attention.choose("flash", *half(*wan()), CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 2, 16, 16, 32), (1, 2, 48, 7, 16), (1, 1, 512, 300, 128)])
def test_two_kernels_that_are_right_are_not_refused(size, dtype):
    """PyTorch's flash kernel for a CPU beside its plain one; where no query of a few is undecided
    their gradients of queries and keys are rounding alone at size 16 (with torch 2.13's draws the
    first of these shapes: by 0.4 of their norm).
    """
    call = Call(*size, dtype, CPU)
    with sdpa_kernel(SDPBackend.MATH):  # attention native, that is
        assert backends.why_not_on(call, "flash") is None


def test_difference_is_relative_to_the_norm_of_output_and_gradients(monkeypatch):
    call = Call(2, 3, 40, 24, 16, torch.float32, CPU)
    native = backends.results("native", call)
    assert backends.difference(backends.results("native", call), native) == 0.0
    right = backends.attend
    monkeypatch.setattr(
        backends, "attend",
        lambda name, q, k, v: right("native", q, k, v) * (1.25 if name == "cudnn" else 1.0),
    )  # fmt: skip
    off = backends.difference(backends.results("cudnn", call), native)
    assert off == pytest.approx(0.25, rel=1e-5)
    least = tuple(4 * x.norm().item() for x in native)
    off = backends.difference(backends.results("cudnn", call), native, least)
    assert off == pytest.approx(0.25 / 4, rel=1e-5)
    wrong = [*native[:3], native[3] * torch.nan]
    assert backends.difference(wrong, native) == torch.inf


# ---- Setting it


@pytest.mark.parametrize("family", ["wan", "cogvideox", "unet"])
@pytest.mark.parametrize("name", ["native", "flash"])
def test_use_runs_that_backend_and_restores(family, name):
    """On PyTorch's flash kernel for CPUs."""
    model, probe = half(*FAMILIES[family]())
    before = probe()
    priority = torch._C._get_sdp_priority_order()
    with attention.use(model, name):
        with torch.profiler.profile() as profile:
            inside = probe()
        names = {event.name for event in profile.events()}
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
        if name == "flash" and family != "wan":
            first = torch._C._get_sdp_priority_order()[0]
            assert first == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    torch.testing.assert_close(inside, before, rtol=2e-2, atol=2e-2)
    assert torch._C._get_sdp_priority_order() == priority
    assert torch.equal(probe(), before)


def test_the_dispatcher_is_told_and_untold():
    model, probe = half(*wan())
    _, other_probe = half(*wan())
    processor = model.blocks[0].attn1.processor
    with attention.use(model, "cudnn"):
        assert processor._attention_backend == "_native_cudnn"
        with pytest.raises(RuntimeError):  # it is really asked for, and a CPU has none
            probe()
    assert processor._attention_backend is None
    # The process's default, which the dispatcher keeps beside, is as it was: other models run.
    assert torch.equal(other_probe(), probe())


def on_a_gpu(family: str) -> tuple[nn.Module, callable]:
    """The model there and its forward under autocast."""
    model, _ = FAMILIES[family]()
    model.cuda()
    random = torch.Generator("cuda").manual_seed(0)
    shape = {"wan": (2, 16, 3, 8, 8), "cogvideox": (1, 16, 3, 8, 8), "unet": (1, 4, 1, 8, 8)}
    noisy = torch.randn(shape[family], generator=random, device="cuda")
    t = torch.full((len(noisy),), 10.0, device="cuda")
    tokens = {"cogvideox": 6}.get(family, 7)
    cond = {"text": torch.randn(len(noisy), tokens, 32, generator=random, device="cuda")}
    predict = models.family({"unet": "stable_diffusion"}.get(family, family)).predict

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            return predict(model, noisy, t, cond)

    return model, run


@pytest.mark.cuda
@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_every_backend_that_is_chosen_agrees_with_native(family):
    """Every name: chosen and equal to native within tolerance, or refused in one line."""
    model, run = on_a_gpu(family)
    choice = attention.choose("auto", model, run, CUDA)
    assert choice.name in choice.seconds and {"cudnn", "flash"} & choice.seconds.keys(), choice
    base = run()
    for name in choice.seconds:
        with attention.use(model, name):
            out = run()
            out.float().square().mean().backward()
        torch.testing.assert_close(out, base, rtol=5e-2, atol=5e-2)
    for name in choice.refused:
        with pytest.raises(ValueError, match=f"attention {name}: "):
            attention.choose(name, model, run, CUDA)


@pytest.mark.cuda
@GPU
def test_on_a_gpu_every_backend_is_compiled_and_checkpointed():
    """Wan's blocks, whole, keeping what attention gave; gradients against eager native ones."""
    model, run = on_a_gpu("wan")
    names = attention.choose("auto", model, run, CUDA).seconds

    def gradients() -> torch.Tensor:
        model.zero_grad()
        run().float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted = gradients()
    checkpointing.apply(model, "blocks", "attention")
    eager = [block.forward for block in model.blocks]
    for name in names:
        torch._dynamo.reset()
        for block, forward in zip(model.blocks, eager, strict=True):
            block.forward = forward
        with attention.use(model, name):
            compiling.compile_blocks(model, "blocks")
            off = (gradients() - wanted).norm() / wanted.norm()
        assert off < 2e-2, name


def test_watch_sees_what_pytorch_is_asked():
    """Keyword and positional arguments alike."""
    q = torch.randn(1, 2, 5, 8)
    k = torch.randn(1, 2, 9, 8)
    calls = backends.observe(lambda: (attend(q, k, k), attend(query=k, key=k, value=k)))
    assert calls == [Call(1, 2, 9, 9, 8, q.dtype, CPU), Call(1, 2, 5, 9, 8, q.dtype, CPU)]
