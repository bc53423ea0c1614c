"""The families' numbers on tiny pipelines of the real classes, each step against diffusers' own:
noising, target, timestep, the model's call, text, media, samples, loss.
"""

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import options
from families import (
    FAMILIES,
    PROMPTS,
    Case,
    build_cogvideox,
    frames_of,
    ours,
    run,
    tiny,
    token_limit,
    write_media,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastpref import models, oracle
from fastpref.look.sample import starting_noise
from fastpref.loss.functional import Draws, pair_error
from fastpref.models import encoders as model_encoders
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.media import Sampling, decode
from fastpref.pairs.rows import read_rows
from fastpref.run.config import Config
from fastpref.run.parts import add_lora
from fastpref.run.train import train


@pytest.fixture(params=FAMILIES)
def case(request) -> Case:
    return tiny(request.param)


def draws_of(count: int, index: int = 0) -> Draws:
    pair_id = torch.arange(count) * 7919 + 3
    return Draws(11, pair_id, torch.full_like(pair_id, index))


def normals(draws: Draws, shape: torch.Size) -> Tensor:
    """The unit normals of the draws, [B, *shape], winners' and losers' alike."""
    return oracle.normal(draws.seed, draws.pair_id, draws.index, shape.numel()).view(-1, *shape)


class Scheduler:
    """Noising, target and timestep of draws through diffusers' own scheduler alone."""

    def __init__(self, case: Case) -> None:
        name = case.config["_class_name"]
        # SD and SDXL are trained with DDPM's noising whatever they sample with.
        kind = diffusers.DDPMScheduler if case.family.frames == 1 else getattr(diffusers, name)
        self.scheduler = kind.from_config(case.config)
        self.flow = case.family.name == "wan"
        if self.flow:
            self.unshifted = kind.from_config({**case.config, "flow_shift": 1.0})
            for scheduler in (self.scheduler, self.unshifted):
                scheduler.set_timesteps(1000)

    def __call__(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, y) for latents [2B, C, F, h, w]."""
        eps = normals(draws, x0.shape[1:]).repeat(2, 1, 1, 1, 1)
        u = oracle.uniform(draws.seed, draws.pair_id, draws.index, oracle.TIMESTEP).repeat(2)
        if not self.flow:
            t = (u * self.scheduler.config.num_train_timesteps).floor().long()
            x_t = self.scheduler.add_noise(x0, eps, t)
            v = self.scheduler.config.prediction_type == "v_prediction"
            return x_t, t, self.scheduler.get_velocity(x0, eps, t) if v else eps
        # The scheduler knows a grid of 1000 times; a draw falls between two of them.
        grid, levels = (s.sigmas.flip(0).numpy() for s in (self.unshifted, self.scheduler))
        sigma = torch.from_numpy(np.interp(u, grid, levels)).view(-1, 1, 1, 1, 1)
        alpha, sigma = self.scheduler._sigma_to_alpha_sigma_t(sigma)
        x_t = (alpha * x0 + sigma * eps).float()
        return x_t, 1000 * sigma.flatten(), eps - x0


def test_noising_target_and_timestep_are_the_schedulers(case):
    latents = case.latents[:1].repeat(32, 1, 1, 1, 1) + torch.arange(32).view(-1, 1, 1, 1, 1) / 32
    draws = draws_of(16)
    x_t, t, target = case.process.noise(latents, draws)
    expected_x, expected_t, expected_y = Scheduler(case)(latents, draws)
    assert t.dtype == torch.float32 and t.unique().numel() > 10
    if case.family.name == "wan":
        torch.testing.assert_close(t.double(), expected_t.double(), rtol=0, atol=0.01)
        timesteps = Scheduler(case).scheduler.timesteps  # truncated to integers
        assert (t[:, None] - timesteps).abs().min(1).values.max() <= 2
    else:
        assert torch.equal(t, expected_t.float())
    torch.testing.assert_close(x_t, expected_x.float(), rtol=1e-4, atol=1e-4)
    size = expected_y.double().square().flatten(1).mean(1)
    assert (pair_error(expected_y.float(), target) / size).max() < 1e-7
    assert (pair_error(torch.zeros_like(x_t), target) / size - 1).abs().max() < 1e-5


def test_the_schedulers_own_way_back(case):
    """From x_t and the exact target, the scheduler that users sample with finds x0 again."""
    draws = draws_of(2)
    process = case.process.replace(timestep_range=(0.5, 0.502))
    x_t, t, target = process.noise(case.latents, draws)
    eps = normals(draws, case.latents.shape[1:]).repeat(2, 1, 1, 1, 1)
    p, q = (value.repeat(2).view(-1, 1, 1, 1, 1) for value in (target.p, target.q))
    y = p * eps + q * case.latents
    scheduler = Scheduler(case).scheduler
    for row in range(4):
        if case.family.name == "wan":
            scheduler._step_index = (scheduler.sigmas - t[row] / 1000).abs().argmin().item()
            x0 = scheduler.convert_model_output(y[row], sample=x_t[row])
            tolerance = 1e-2  # the grid's nearest sigma
        else:
            scheduler = diffusers.DDIMScheduler.from_config(
                {**case.config, "clip_sample": False}, timestep_spacing="trailing"
            )
            scheduler.alphas_cumprod = Scheduler(case).scheduler.alphas_cumprod.float()
            scheduler.set_timesteps(1000)
            x0 = scheduler.step(y[row], t[row].long(), x_t[row]).pred_original_sample
            tolerance = 1e-3
        torch.testing.assert_close(x0, case.latents[row], rtol=0, atol=tolerance)


def test_predict_is_the_pipelines_call(case):
    """A hook on the pipeline's model sees the inputs and the output that `predict` has."""
    pipe, calls = case.pipe(), []
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    model.register_forward_hook(
        lambda _, inputs, named, output: calls.append((inputs, named, output[0])), with_kwargs=True
    )
    noise = starting_noise(case.latents.shape[1:], [1, 2])
    run(case, pipe, noise, 3, output_type="latent")
    assert len(calls) >= 3
    cond = case.cond(PROMPTS[:2])
    for inputs, named, expected in calls:
        noisy = ours(case, inputs[0] if inputs else named["hidden_states"])
        t = named["timestep"] if "timestep" in named else inputs[1].expand(2)
        with torch.no_grad():
            pred = case.module.predict(case.model, noisy, t.float(), cond)
        torch.testing.assert_close(pred, ours(case, expected), rtol=1e-5, atol=1e-6)
        assert pred.std() > 0.1


def test_encode_text_is_encode_prompt(case):
    prompts = ["", *PROMPTS, "  many   words " + " ".join(PROMPTS * 9), "&lt;b&gt; “quoted”"]
    rows = case.module.encode_text(case.encoders, prompts)
    pipe = case.pipe()
    extra = {"wan": {"max_sequence_length": 512}}.get(case.family.name, token_limit(case))
    shared = {"device": torch.device("cpu"), "do_classifier_free_guidance": True, **extra}
    if case.family.frames == 1:
        shared["num_images_per_prompt"] = 1
    for prompt, row in zip(prompts, rows, strict=True):
        with torch.no_grad():
            text, unconditional, *pooled = pipe.encode_prompt(prompt, **shared)
        if not prompt:  # what the pipeline guides against
            text, pooled = unconditional, pooled[1:]
        torch.testing.assert_close(row["text"], text[0], rtol=1e-5, atol=1e-5)
        assert row.keys() == ({"text", "pooled"} if pooled else {"text"})
        if pooled:
            torch.testing.assert_close(row["pooled"], pooled[0][0], rtol=1e-5, atol=1e-5)
    assert {tuple(row["text"].shape) for row in rows} == {tuple(rows[0]["text"].shape)}
    assert not torch.equal(rows[1]["text"], rows[2]["text"])
    if case.family.name == "wan":
        assert rows[1]["text"].shape[0] == 512 and not rows[1]["text"][100:].any()
        assert rows[5]["text"].all(-1).sum() == (rows[5]["text"].abs().sum(-1) > 0).sum()


def test_media_go_through_the_pipelines_vae(case):
    """What is stored, the pipeline's own last step decodes to the VAE's plain reconstruction."""
    frames = [frames_of(case.family, seed) for seed in range(2)]
    latents = torch.stack([case.module.encode_media(case.encoders, clip) for clip in frames])
    assert torch.equal(latents, case.latents[:2]) and latents.dtype == torch.float32
    pipe = case.pipe()
    stored = latents
    if case.family.name == "cogvideox":
        stored = latents.permute(0, 2, 1, 3, 4)
    if case.family.frames == 1:
        stored = latents.squeeze(2)
    output = run(
        *(case, pipe, starting_noise(latents.shape[1:], [1, 2]), 1),
        output_type="np",
        callback_on_step_end=lambda *_: {"latents": stored},
    )
    output = torch.from_numpy(np.asarray(output)).view(2, *frames[0].shape)

    images = [[Image.fromarray(frame.numpy()) for frame in clip] for clip in frames]
    with torch.no_grad():
        if case.family.frames == 1:
            x = pipe.image_processor.preprocess([clip[0] for clip in images])
            plain = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample[:, :, None]
        else:
            x = pipe.video_processor.preprocess_video(images)
            plain = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    plain = (plain / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(output, plain, rtol=0, atol=5e-4)

    decoded = torch.stack([case.module.decode(case.encoders, row) for row in latents])
    assert decoded.dtype == torch.uint8 and decoded.shape == output.shape
    difference = (decoded.int() - (output * 255).round().int()).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.999
    assert decoded.float().std() > 3


def test_sampled_latents_are_the_posteriors(case, tmp_path):
    """mean + std eps of diffusers' latent_dist, normalised; the same bits again and resumed."""
    data, arguments = write_media(case.family, tmp_path / "media"), (case.family.name, case.path)
    options = {"posterior": "sample", "seed": 5, "progress": False}
    dataset = PairDataset(encode(*arguments, data, tmp_path / "set", **options))
    modes = PairDataset(encode(*arguments, data, tmp_path / "modes", progress=False))
    rows, pipe = {row.prompt: row for row in read_rows(data)}, case.pipe()
    config, image = pipe.vae.config, case.family.frames == 1
    for pair, mode in zip(dataset, modes, strict=True):
        row = rows[pair.prompt]
        members = ((row.chosen, pair.latents_w, mode.latents_w),
                   (row.rejected, pair.latents_l, mode.latents_l))  # fmt: skip
        for index, (path, sampled, plain) in enumerate(members):
            frames = decode(path.read_bytes(), Sampling()).frames
            frames = [Image.fromarray(frame.numpy()) for frame in frames]
            with torch.no_grad():
                if image:
                    x = pipe.image_processor.preprocess(frames[0])
                else:
                    x = pipe.video_processor.preprocess_video([frames])
                posterior = pipe.vae.encode(x).latent_dist
            key = torch.tensor([pair.pair_id]), torch.tensor([index])
            count = posterior.mean.numel()
            eps = oracle.normal(5, *key, count, domain=oracle.POSTERIOR)
            for stored, z in (
                (plain, posterior.mode()),
                (sampled, posterior.mean + posterior.std * eps.view_as(posterior.mean)),
            ):
                if case.family.name == "wan":
                    mean, std = (
                        torch.tensor(values).view(1, -1, 1, 1, 1)
                        for values in (config.latents_mean, config.latents_std)
                    )
                    z = (z - mean) / std
                else:
                    z = z * config.scaling_factor
                z = z[0].unsqueeze(1) if image else z[0]
                torch.testing.assert_close(stored, z, rtol=1e-5, atol=1e-5)
            assert (sampled - plain).std() > 0.05 * plain.std()

    before = {path: load_file(path) for path in (tmp_path / "set").glob("pairs/*/*")}
    for path in sorted(before)[:2]:
        path.unlink()
    for folder in ("set", "again"):
        encode(*arguments, data, tmp_path / folder, **options)
        for path, expected in before.items():
            found = load_file(tmp_path / folder / path.relative_to(tmp_path / "set"))
            # Prompts are embedded in batches, whose size may move a text encoder's last bit.
            for name in ("latents_w", "latents_l"):
                assert torch.equal(found[name], expected[name])


def direct(case: Case, pipe: Any, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The pipeline's model called as its pipeline's source calls it."""
    height, width = case.family.height, case.family.width
    if case.family.name == "wan":
        return pipe.transformer(x_t, t, cond["text"]).sample
    if case.family.name == "cogvideox":
        rotary = None
        if pipe.transformer.config.use_rotary_positional_embeddings:
            device = torch.device("cpu")
            rotary = pipe._prepare_rotary_positional_embeddings(height, width, x_t.shape[2], device)
        swapped = x_t.transpose(1, 2)
        return pipe.transformer(swapped, cond["text"], t, image_rotary_emb=rotary).sample.transpose(
            1, 2
        )
    added = None
    if "pooled" in cond:
        size = (height, width)
        ids = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, 24)
        added = {"text_embeds": cond["pooled"], "time_ids": ids.repeat(len(x_t), 1)}
    return pipe.unet(x_t[:, :, 0], t, cond["text"], added_cond_kwargs=added).sample[:, :, None]


def test_the_loss_is_diffusers_own(case, tmp_path):
    """Two steps of `train` against errors and DPO computed from the folder by diffusers alone."""
    media = write_media(case.family, tmp_path / "media")
    encoded = encode(case.family.name, case.path, media, tmp_path / "encoded", progress=False)
    given = options(
        *(encoded, tmp_path / "run"),
        family=case.family.name,
        model=str(case.path),
        train_batch_size=4,
        max_train_steps=2,
        checkpointing_steps=1,
        learning_rate=0.1,
        beta=20.0,
        seed=11,
    )
    train(Config(**given))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]

    dataset, pipe = PairDataset(encoded), case.pipe()
    pairs = sorted((dataset[i] for i in range(len(dataset))), key=lambda pair: pair.pair_id)
    latents = torch.stack([p.latents_w for p in pairs] + [p.latents_l for p in pairs])
    cond = {k: torch.stack([p.cond[k] for p in pairs]).repeat(2, *[1] * pairs[0].cond[k].dim())
            for k in pairs[0].cond}  # fmt: skip
    component = "unet" if case.family.frames == 1 else "transformer"
    policy = getattr(case.pipe(), component).requires_grad_(False)
    add_lora(policy, case.module.LORA_TARGETS, given.get("lora_rank"))
    values = load_file(tmp_path / "run" / "checkpoint-1" / "parameters.safetensors")
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name])

    for step in range(2):
        ids = torch.tensor([pair.pair_id for pair in pairs])
        x_t, t, y = Scheduler(case)(latents, Draws(11, ids, torch.full_like(ids, step)))
        with torch.no_grad():
            ref = direct(case, pipe, x_t, t.float(), cond)
            tuned = case.pipe()
            setattr(tuned, component, policy)
            pred = direct(case, tuned, x_t, t.float(), cond) if step else ref
        (err_w, err_l), (ref_w, ref_l) = (
            (value - y).double().square().flatten(1).mean(1).chunk(2) for value in (pred, ref)
        )
        loss = -torch.nn.functional.logsigmoid(-10.0 * ((err_w - ref_w) - (err_l - ref_l))).mean()
        expected = {
            "errors/policy_w": err_w,
            "errors/policy_l": err_l,
            "errors/reference_w": ref_w,
            "errors/reference_l": ref_l,
        }
        for name, value in expected.items():
            assert logged[step][name] == pytest.approx(value.mean().item(), rel=2e-4), name
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert abs(logged[1]["errors/policy_w"] / logged[1]["errors/reference_w"] - 1) > 1e-3


def test_every_target_is_in_every_attention(case):
    names = [name for name, _ in case.model.named_modules()]
    attentions = {name.rsplit(".", 1)[0] for name in names if name.endswith(".to_q")}
    assert attentions
    paths = case.module.BLOCKS.split()
    for path in paths:
        case.model.get_submodule(path)
    for attention in attentions:
        assert attention.split(".")[0] in paths
        for target in case.module.LORA_TARGETS:
            assert f"{attention}.{target}" in names


# ---- what each family has of its own


@pytest.mark.parametrize("size", [(1, 4, 6), (3, 6, 4), (4, 12, 16), (5, 2, 16)])
@pytest.mark.parametrize("patch_t", [None, 2])
def test_rotary_embeddings_follow_the_clips_size(size, patch_t, tmp_path_factory):
    path = tiny("cogvideox-5b").path
    if patch_t:
        path = tmp_path_factory.mktemp("cogvideox-1.5")
        build_cogvideox(path, large=True, patch_t=patch_t)
        if size[0] % patch_t:
            size = (size[0] + 1, *size[1:])
    pipe = diffusers.CogVideoXPipeline.from_pretrained(path)
    expected = pipe._prepare_rotary_positional_embeddings(
        8 * size[1], 8 * size[2], size[0], torch.device("cpu")
    )
    module, c = models.family("cogvideox"), pipe.transformer.config
    sizes = (c.patch_size, c.patch_size_t, c.sample_height, c.sample_width)
    for a, b in zip(module.rotary(16, sizes, size, torch.device("cpu")), expected, strict=True):
        assert torch.equal(a, b)
    noisy, cond = torch.randn(2, 4, *size), {"text": torch.randn(2, 24, 32)}
    t = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        pred = module.predict(pipe.transformer, noisy, t, cond)
        theirs = pipe.transformer(
            noisy.transpose(1, 2), cond["text"], t, image_rotary_emb=expected
        ).sample.transpose(1, 2)
    assert torch.equal(pred, theirs)


def test_a_clip_for_cogvideox_one_five(tmp_path):
    """Two latent frames make a token, so their number must be even; scaled as in 1.0."""
    path, module = build_cogvideox(tmp_path, large=True, patch_t=2), models.family("cogvideox")
    encoders, family = module.pipeline(path), FAMILIES["cogvideox-5b"]
    with pytest.raises(
        ValueError, match="divisible by 2, got 3 from 9 frames: pass --num_frames 5 or 13"
    ):
        module.encode_media(encoders, frames_of(family, 0))
    latents = module.encode_media(encoders, frames_of(family, 0, count=5))
    pipe = diffusers.CogVideoXPipeline.from_pretrained(path)
    assert pipe.vae.config.invert_scale_latents
    with torch.no_grad():
        frames = pipe.decode_latents(latents[None].transpose(1, 2))[0]
    assert torch.equal(module.decode(encoders, latents), model_encoders.to_frames(frames))


def test_sdxl_is_told_the_size_in_pixels():
    module, case = models.family("stable_diffusion"), tiny("sdxl")
    assert case.model.vae_factor == 4
    cond, t = case.cond(PROMPTS[:1]), torch.tensor([500.0])
    with torch.no_grad():
        first = module.predict(case.model, case.latents[:1], t, cond)
        case.model.vae_factor = 8
        other = module.predict(case.model, case.latents[:1], t, cond)
        case.model.vae_factor = 4
    assert not torch.equal(first, other)


def test_sdxls_latents_are_normalised_as_its_pipeline_does(tmp_path):
    """Playground 2.5's VAE has a mean and a std per channel."""
    given = tiny("sdxl")
    path = shutil.copytree(given.path, tmp_path / "model")
    config = json.loads((path / "vae" / "config.json").read_text())
    config |= {"latents_mean": [-1.5, 0.2, 1.1, -0.8], "latents_std": [8.5, 5.5, 0.7, 3.0]}
    (path / "vae" / "config.json").write_text(json.dumps(config))
    case = Case("sdxl", given.family, path)
    test_media_go_through_the_pipelines_vae(case)
    assert (case.latents - given.latents).abs().mean() > 0.1 * given.latents.abs().mean()
