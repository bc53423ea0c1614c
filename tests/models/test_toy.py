"""The toy family: a folder that loads back, prompts, media, and the shape of what it predicts."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from fastpref import models
from fastpref.demo.run import BASE
from fastpref.models import toy
from fastpref.models.folder import scheduler_of
from fastpref.process import FlowMatching


@pytest.fixture(scope="module")
def model():
    return toy.load(BASE).eval()


def test_the_family_has_its_nine_names():
    assert models.family("toy") is toy


def test_the_shipped_folder_is_small_bf16_and_loads_as_diffusers_would(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    tensors = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    theirs = WanTransformer3DModel.from_pretrained(BASE, subfolder="transformer").eval()
    for (name, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b.float()), name
    assert sum(p.numel() for p in model.parameters()) == 549_264
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(BASE, subfolder="scheduler")
    process = toy.process(dict(scheduler.config))
    assert isinstance(process, FlowMatching)
    assert process.shift == 1.0


def test_what_is_saved_predicts_the_same_when_loaded(tmp_path, model):
    toy.save(model, tmp_path, torch.float32)
    again = toy.load(tmp_path).eval()
    noisy = torch.randn(2, 3, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    cond = {"text": torch.randn(2, toy.SLOTS, toy.TEXT_DIM)}
    t = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        first = toy.predict(model, noisy, t, cond)
        assert first.shape == noisy.shape
        assert torch.equal(first, toy.predict(again, noisy, t, cond))


def test_every_adapter_target_is_in_every_block(model):
    blocks = model.get_submodule(toy.BLOCKS)
    assert len(blocks) == 4
    for block in blocks:
        names = [name for name, _ in block.named_modules()]
        for target in toy.LORA_TARGETS:
            assert sum(name.endswith(f".{target}") for name in names) == 2, target


def test_a_word_has_one_vector_whatever_the_prompt():
    pipe = toy.pipeline(BASE)
    one, other, empty = (c["text"] for c in toy.encode_text(pipe, ["A red disc.", "red fox", ""]))
    assert one.shape == (toy.SLOTS, toy.TEXT_DIM)
    assert torch.equal(one[1], other[0])
    assert torch.equal(one[1], toy.embed_word("red"))
    assert not torch.equal(one[1], one[2])
    assert one[3:].abs().max() == 0
    assert empty.abs().max() == 0


def test_embeddings_are_the_same_on_every_machine_and_unit_normal():
    vector = toy.embed_word("red")
    expected = torch.tensor([-0.2958518863, -1.6530983448, 0.4115250707, 0.1961626410])
    assert torch.allclose(vector[:4], expected, atol=1e-6)
    many = torch.stack([toy.embed_word(f"word{i}") for i in range(500)])
    assert many.mean().abs() < 0.03
    assert (many.std() - 1).abs() < 0.03


def test_words_beyond_the_slots_still_count():
    pipe = toy.pipeline(BASE)
    words = [f"w{i}" for i in range(toy.SLOTS + 1)]
    (cond,) = toy.encode_text(pipe, [" ".join(words)])
    assert torch.equal(cond["text"][0], toy.embed_word("w0") + toy.embed_word(f"w{toy.SLOTS}"))


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 12, 12), (1, 4, 20), (5, 16, 8)])
def test_media_of_any_size_come_back_to_the_byte(frames, height, width, model):
    pipe = toy.pipeline(BASE)
    generator = torch.Generator().manual_seed(frames)
    clip = torch.randint(256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
    latents = toy.encode_media(pipe, clip)
    assert latents.shape == (3, frames, height, width)
    assert latents.abs().max() <= 1
    assert torch.equal(toy.decode(pipe, latents), clip)
    with torch.no_grad():
        cond = {"text": torch.zeros(1, toy.SLOTS, toy.TEXT_DIM)}
        assert toy.predict(model, latents[None], torch.tensor([500.0]), cond).isfinite().all()


def test_coordinates_run_from_end_to_end():
    t, y, x = toy.coordinates(torch.zeros(2, 3, 1, 4, 8))[1]
    assert t.abs().max() == 0
    assert (y[0, 0, 0].item(), y[0, 3, 0].item()) == (-4, 4)
    assert (x[0, 0, 0].item(), x[0, 0, 7].item()) == (-4, 4)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(8, 12, 10, 3, dtype=torch.uint8), "divisible by 4, got 12x10"),
        (torch.zeros(8, 12, 12, 3), "expected uint8"),
        (torch.zeros(8, 3, 12, 12, dtype=torch.uint8), r"\[F, H, W, 3\]"),
    ],
)
def test_media_that_do_not_fit_are_named(frames, message):
    with pytest.raises(ValueError, match=message):
        toy.encode_media(toy.pipeline(BASE), frames)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"transformer: config\.json cannot be read"):
        toy.load(tmp_path)


def test_another_class_is_named(tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet3D"}))
    with pytest.raises(ValueError, match="expected a WanTransformer3DModel, got UNet3D"):
        toy.load(tmp_path / "model")


def remove(tensors, name):
    del tensors[name]


def shrink(tensors, name):
    tensors[name] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, r"weights lack blocks.1.attn1.to_q.weight; expected"),
        (shrink, r"weights cannot be read .*blocks.1.attn1.to_q.weight expected shape"),
    ],
)
def test_tensors_that_are_missing_or_do_not_fit_are_named(change, said, tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    change(tensors, "blocks.1.attn1.to_q.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model/transformer: {said}") as error:
        toy.load(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0garbage" * 100, b"\x08" + bytes(7) + b"{}      "])
def test_weights_that_are_no_safetensors_are_named(content, tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    folder = tmp_path / "model" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model/transformer: weights (cannot be read|lack)") as e:
        toy.load(tmp_path / "model")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eulers_grid_is_in_float64(shift):
    """The demo's numbers hang on each bit of it."""
    scheduler = toy.Euler(FlowMatching(shift=shift))
    u = torch.linspace(1, 1e-3, 21, dtype=torch.float64)[:-1]
    sigmas = [*(shift * u / (1 + (shift - 1) * u)).tolist(), 0.0]
    x, v = torch.randn(2, 1000)
    for _ in range(2):  # a scheduler starts again
        scheduler.set_timesteps(20, torch.device("cpu"))
        assert scheduler.timesteps.tolist() == [1000 * s for s in sigmas[:-1]]
        ours = theirs = x
        for t, s, r in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
            (ours,) = scheduler.step(v, t, ours, return_dict=False)
            theirs = theirs + (r - s) * v
            assert torch.equal(ours, theirs)


def test_a_toy_of_another_process_has_the_folders_scheduler(tmp_path):
    assert type(toy.pipeline(BASE).scheduler) is toy.Euler
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    assert toy.pipeline(tmp_path).scheduler is None
    assert type(scheduler_of(toy.pipeline(tmp_path), tmp_path)) is DDIMScheduler
