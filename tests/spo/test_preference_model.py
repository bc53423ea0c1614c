"""The step-aware preference model: CLIP's own scores before training, steps that train, folders."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import clip_folder

from fastpref.spo.pixels import preprocess, read_preprocessor, tiled
from fastpref.spo.preference_model import RECORD, STEPS, StepAwarePreferenceModel

PROMPTS = ["a red fox", "a red fox", "snow falls on a quiet street"]
TIMES = [0.0, 1.0, 480.5, 1000.0]


@cache
def folder() -> Path:
    return clip_folder()


def load(path: Path | None = None, **options) -> StepAwarePreferenceModel:
    torch.manual_seed(0)  # of the time's embedding
    return StepAwarePreferenceModel.from_pretrained(path or folder(), **options)


def clips(*sizes: tuple[int, int, int], seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (*size, 3), generator=random, dtype=torch.uint8) for size in sizes]


def moved(model: StepAwarePreferenceModel, scale: float = 0.1) -> StepAwarePreferenceModel:
    """The model with step parts that are not zero."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("clip."):
                value += scale * torch.randn(value.shape, generator=random).to(value)
    return model


def features(found: object) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_scores_as_the_plain_clip_at_every_step(dtype):
    model = load(dtype=dtype)
    shown = clips((1, 40, 56), (1, 32, 32), (1, 70, 33))
    pixels = torch.cat([model.pixels(clip) for clip in shown])
    with torch.no_grad():
        plain = features(model.clip.get_image_features(pixel_values=pixels.to(dtype)))
        text = features(model.clip.get_text_features(**words(model, PROMPTS)))
    unit = torch.nn.functional.normalize
    wanted = (unit(plain.double()) * unit(text.double())).sum(1)
    wanted = wanted * model.clip.logit_scale.double().exp()
    for t in TIMES:
        at = torch.full((3,), t, dtype=torch.float64)
        assert torch.equal(model.image_features(pixels, at), plain)
        scores = model(shown, PROMPTS, at)
        assert scores.dtype == torch.float64 and torch.equal(scores, wanted)
    logits = model.clip(**words(model, PROMPTS), pixel_values=pixels.to(dtype)).logits_per_image
    accuracy = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1}
    torch.testing.assert_close(wanted, logits.diagonal().double(), **accuracy)


def words(model: StepAwarePreferenceModel, prompts: list[str]) -> dict:
    found = model.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def test_every_part_of_the_step_changes_scores_and_hangs_on_t():
    shown, at = clips((1, 32, 32)), torch.tensor([100.0])
    before = load()(shown, ["a"], at)
    for name in ("layers.0.1.weight", "layers.1.1.weight", "pooled.1.weight"):
        rows = load().get_parameter(name).shape[0] // 32
        for i in range(rows):
            model = load()
            with torch.no_grad():
                model.get_parameter(name)[32 * i : 32 * (i + 1)] += 0.3
            after, later = (model(shown, ["a"], t) for t in (at, at + 500))
            assert not torch.equal(after, before), f"{name}, modulation {i}"
            assert not torch.equal(after, later), f"{name}, modulation {i}"


def test_gradients_reach_the_step_vision_and_text_when_training_alone():
    model = moved(load()).train()
    shown, at = clips((2, 32, 32), (1, 32, 32)), torch.tensor([3.0, 700.0])
    (model(shown, ["a b", "c"], at) * torch.tensor([1.0, -1.0])).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to every logit of a softmax.
    assert [name for name in dead if "k_proj.bias" not in name] == []
    assert not model.eval()(shown, ["a b", "c"], at).requires_grad


def test_a_batch_a_chunk_and_an_order_change_nothing():
    model = moved(load())
    shown = clips((3, 40, 48), (1, 32, 32), (9, 33, 32), (2, 32, 40))
    prompts, at = ["a", "b", "a", "c"], torch.tensor([0.0, 900.0, 30.0, 500.0])
    whole = model(shown, prompts, at)
    alone = [model([shown[i]], [prompts[i]], at[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-5)
    model.batch_size = 3
    torch.testing.assert_close(model(shown, prompts, at), whole, rtol=1e-5, atol=1e-5)


def test_frames_evenly_spaced_are_averaged_or_tiled():
    model = moved(load(num_frames=3))
    (clip,) = clips((9, 32, 48))
    at = torch.tensor([200.0])
    each = [model([clip[i : i + 1]], ["a"], at) for i in (0, 4, 8)]
    mean = torch.stack(each).mean(0)
    torch.testing.assert_close(model([clip], ["a"], at), mean, rtol=1e-5, atol=1e-5)
    other = moved(load(num_frames=3, frames="tile"))
    picture = torch.zeros(96, 96, 3, dtype=torch.uint8)
    for i, frame in enumerate((0, 4, 8)):
        y, x = divmod(i, 2)
        picture[16 + 32 * y : 48 + 32 * y, 48 * x : 48 * x + 48] = clip[frame]
    assert torch.equal(tiled(clip[[0, 4, 8]])[0], picture)
    assert torch.equal(other([clip], ["a"], at), model([picture[None]], ["a"], at))
    assert not torch.equal(other([clip], ["a"], at), other([clip.flip(0)], ["a"], at)), "motion"


@pytest.mark.parametrize("size", [(48, 32), (31, 77), (100, 64), (8, 9)])
def test_pixels_are_those_of_transformers_preprocessor(size):
    import PIL.Image
    from transformers import CLIPImageProcessor

    (clip,) = clips((1, *size))
    own = load().pixels(clip)[0]
    processor = CLIPImageProcessor.from_pretrained(folder())
    theirs = processor(PIL.Image.fromarray(clip[0].numpy()), return_tensors="pt")["pixel_values"][0]
    assert own.shape == theirs.shape == (3, 32, 32)
    # Pillow's weights are of 22 bits: now and then it rounds to the next of 255 levels.
    levels = (own - theirs).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]
    assert levels.max() < 1.01 and (levels > 0.01).double().mean() < 0.01


def test_a_prompt_that_is_too_long_is_cut():
    model = moved(load())
    shown, at = clips((1, 32, 32)), torch.tensor([5.0])
    long = "a long prompt " * 40
    assert torch.equal(model(shown, [long], at), model(shown, [long + "more"], at))


def test_a_saved_folder_gives_the_model_back(tmp_path):
    model = moved(load(frames="tile", num_frames=4))
    shown, prompts, at = clips((5, 32, 48), (1, 32, 32)), ["a", "b"], torch.tensor([7.0, 600.0])
    path = tmp_path / "model"
    model.save_pretrained(path)
    model.save_pretrained(path)  # over itself
    again = load(path)
    assert (again.frames, again.num_frames) == ("tile", 4)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(shown, prompts, at), again(shown, prompts, at))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert load(path, frames="mean", num_frames=2).frames == "mean"
    half = moved(load(dtype=torch.bfloat16))
    half.save_pretrained(path)
    same = load(path, dtype=torch.bfloat16)(shown, prompts, at)
    assert torch.equal(half(shown, prompts, at), same)


def damage(path: Path, how: str) -> None:
    if how == "foreign":
        (path / "config.json").write_text('{"model_type": "bert"}')
    elif how == "no config":
        (path / "config.json").unlink()
    elif how == "weights cut":
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "steps cut":
        (path / STEPS).write_bytes((path / STEPS).read_bytes()[:-100])
    elif how == "steps missing":
        (path / STEPS).unlink()
    elif how == "record missing":
        (path / RECORD).unlink()
    elif how == "steps of another":
        tensors = load_file(path / STEPS)
        save_file({n: v[:-1].contiguous() for n, v in tensors.items()}, path / STEPS)
    elif how == "record":
        (path / RECORD).write_text('{"frames": "every", "num_frames": 8}')
    elif how == "record empty":
        (path / RECORD).write_text("{}")
    elif how == "no words":
        (path / "tokenizer.json").unlink()
    elif how == "record nested":
        (path / RECORD).write_text("[" * 100_000)
    elif how == "preprocessor":
        found = json.loads((path / "preprocessor_config.json").read_text())
        (path / "preprocessor_config.json").write_text(json.dumps(found | {"resample": 2}))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("foreign", "config.json expected model_type clip, got bert"),
        ("no config", "expected model_type clip, got None"),
        ("weights cut", "weights cannot be read"),
        ("steps cut", f"{STEPS} cannot be read"),
        ("steps missing", f"{STEPS} is missing"),
        ("record missing", f"{RECORD} is missing"),
        ("steps of another", "does not belong to the CLIP beside it"),
        ("record", "frames: expected mean or tile, got 'every'"),
        ("record empty", f"{RECORD} expected frames and num_frames, got nothing"),
        ("no words", "its tokenizer knows no words: tokenizer.json"),
        ("record nested", f"{RECORD} is damaged"),
        ("preprocessor", "expected a bicubic resize"),
    ],
)
def test_a_folder_that_is_damaged_is_one_line(how, says, tmp_path):
    path = tmp_path / "model"
    load().save_pretrained(path)
    damage(path, how)
    with pytest.raises(ValueError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_input_is_named():
    model = load()
    at = torch.zeros(1)
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        model(clips((1, 32, 32)), ["a", "b"], at)
    with pytest.raises(ValueError, match=r"expected clips uint8 \[F, H, W, 3\], got float32"):
        model([clips((1, 32, 32))[0].float()], ["a"], at)
    with pytest.raises(ValueError, match="no such folder"):
        load(Path("/nowhere/clip"))
    with pytest.raises(ValueError, match="num_frames: expected 1 or more, got 0"):
        load(num_frames=0)


def test_old_files_of_a_preprocessor_are_read(tmp_path):
    model = load()
    old = {"size": 32, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    found = read_preprocessor(tmp_path, model.clip)
    white = torch.full((1, 40, 50, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(preprocess(white, found), torch.ones(1, 3, 32, 32))


def test_a_runs_folder_names_the_model_in_it(tmp_path):
    load().save_pretrained(tmp_path / "preference_model")
    with pytest.raises(ValueError, match=r"got None: .*: take .*preference_model$"):
        load(tmp_path)
