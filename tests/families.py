"""Tiny pipelines of the real classes with random weights, saved as the folders users have."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from bench.random_weights import clip_tokenizer, t5_tokenizer
from fastpref import models
from fastpref.models.folder import scheduler_of
from fastpref.pairs.media import write_clip
from fastpref.process import Diffusion, FlowMatching

PROMPTS = [
    "A red fox  jumps over the old stone wall &amp; runs.",
    "Two children build a castle of sand on the beach",
    "a drone flies along the coast at sunset, slowly",
    "Snow falls on a quiet street with yellow lamps",
]


class Family(NamedTuple):
    """A family's name, the builder of its folder, and the size of a clip it takes."""

    name: str
    build: Callable[[Path], Path]
    frames: int
    height: int
    width: int
    pipeline: str  # the diffusers class users load


def seeded(make: Callable[..., nn.Module], *arguments: Any, **config: Any) -> nn.Module:
    """`make(**config)` with reproducible weights, none of them zero: every layer counts."""
    torch.manual_seed(0)
    module = make(*arguments, **config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


def build_wan(path: Path) -> Path:
    """Wan2.1: UniPC with flow_shift 3, UMT5, AutoencoderKLWan with its mean and std."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer(PROMPTS)
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(UMT5EncoderModel, t5_config(UMT5Config, tokenizer)),
        vae=seeded(diffusers.AutoencoderKLWan, base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=seeded(
            diffusers.WanTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )
    pipe.save_pretrained(path)
    return path


def t5_config(kind: type, tokenizer: Any) -> Any:
    """A small T5 or UMT5."""
    return kind(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip


def build_cogvideox(path: Path, *, large: bool = False, patch_t: int | None = None) -> Path:
    """2B: DDIM, shift 3, added positions; large as 5B: DPM, shift 1, rotary; patch_t as 1.5."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(PROMPTS)
    scheduler = diffusers.CogVideoXDPMScheduler if large else diffusers.CogVideoXDDIMScheduler
    extra = {} if patch_t is None else {"patch_size_t": patch_t, "patch_bias": False}
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=seeded(T5EncoderModel, t5_config(T5Config, tokenizer)),
        vae=seeded(
            diffusers.AutoencoderKLCogVideoX,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7 if large else 1.15258426,
            invert_scale_latents=patch_t is not None,
        ),
        transformer=seeded(
            diffusers.CogVideoXTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=2,
            sample_width=16,
            sample_height=12,
            sample_frames=13,
            max_text_seq_length=24,
            use_rotary_positional_embeddings=large,
            **extra,
        ),
        scheduler=scheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0 if large else 3.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )
    pipe.save_pretrained(path)
    return path


def clip_config(tokenizer: Any, **changes: Any) -> Any:
    """A small CLIP text encoder."""
    from transformers import CLIPTextConfig

    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**config, **changes})


def image_vae(**changes: Any) -> nn.Module:
    """A small AutoencoderKL: four pixels per latent."""
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return seeded(AutoencoderKL, **{**config, **changes})


def unet(**changes: Any) -> nn.Module:
    """A small UNet with attention on its inner level."""
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
    }
    return seeded(UNet2DConditionModel, **{**config, **changes})


# What SDXL's UNet has that SD1.5's has not.
SDXL = {
    "cross_attention_dim": 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}

# As in the published folders: SD1.5 samples with PNDM, SDXL with Euler.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_sd15(path: Path) -> Path:
    """SD1.5: epsilon, one CLIP, PNDM on scaled-linear betas."""
    import diffusers
    from transformers import CLIPTextModel

    tokenizer = clip_tokenizer(path.with_name(f"{path.name}-tokenizer"))
    pipe = diffusers.StableDiffusionPipeline(
        vae=image_vae(force_upcast=False),
        text_encoder=seeded(CLIPTextModel, clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(path)
    return path


def build_sdxl(path: Path) -> Path:
    """SDXL: epsilon, two CLIPs, added time ids, a VAE that must not run in half precision."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizers = [
        clip_tokenizer(path.with_name(f"{path.name}-tokenizer")),
        clip_tokenizer(path.with_name(f"{path.name}-tokenizer-2"), pad="!"),
    ]
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=seeded(CLIPTextModel, clip_config(tokenizers[0])),
        text_encoder_2=seeded(
            CLIPTextModelWithProjection, clip_config(tokenizers[1], hidden_size=16)
        ),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet(**SDXL),
        scheduler=diffusers.EulerDiscreteScheduler(
            timestep_spacing="leading", steps_offset=1, **SCHEDULE
        ),
        add_watermarker=False,
    )
    pipe.save_pretrained(path)
    return path


def build_cogvideox_5b(path: Path) -> Path:
    return build_cogvideox(path, large=True)


FAMILIES = {
    "wan": Family("wan", build_wan, 9, 32, 48, "WanPipeline"),
    "cogvideox-2b": Family("cogvideox", build_cogvideox, 9, 32, 48, "CogVideoXPipeline"),
    "cogvideox-5b": Family("cogvideox", build_cogvideox_5b, 9, 32, 48, "CogVideoXPipeline"),
    "sd15": Family("stable_diffusion", build_sd15, 1, 32, 48, "StableDiffusionPipeline"),
    "sdxl": Family("stable_diffusion", build_sdxl, 1, 32, 48, "StableDiffusionXLPipeline"),
}


def frames_of(family: Family, seed: int, count: int | None = None) -> torch.Tensor:
    """A clip that the family takes, uint8 [F, H, W, 3]: coarse noise that changes with time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count or family.frames, family.height // 8, family.width // 8, 3)
    coarse = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def write_media(family: Family, folder: Path) -> Path:
    """A folder of pairs with metadata.jsonl: clips, or images where the family takes one frame."""
    folder.mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        names = []
        for member in range(2):
            frames = frames_of(family, 2 * i + member)
            if len(frames) == 1:
                names.append(f"{i}_{member}.png")
                Image.fromarray(frames[0].numpy()).save(folder / names[-1])
            else:
                names.append(f"{i}_{member}.mp4")
                write_clip(folder / names[-1], frames)
        rows.append({"prompt": prompt, "chosen": names[0], "rejected": names[1]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class Case:
    """A family, its folder on disk, and what is loaded from it."""

    name: str
    family: Family
    path: Path

    @cached_property
    def module(self) -> ModuleType:
        return models.family(self.family.name)

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.module.load(self.path)

    @cached_property
    def encoders(self) -> Any:
        return self.module.pipeline(self.path)

    @cached_property
    def scheduler(self) -> Any:
        return scheduler_of(self.encoders, self.path)

    @cached_property
    def config(self) -> dict:
        return json.loads((self.path / "scheduler" / "scheduler_config.json").read_text())

    @cached_property
    def process(self) -> FlowMatching | Diffusion:
        return self.module.process(self.config)

    def pipe(self) -> Any:
        """The pipeline as a user loads it; a new one, since tests change its parts."""
        import diffusers

        pipe = getattr(diffusers, self.family.pipeline).from_pretrained(self.path)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def latents(self) -> Tensor:
        """[4, C, F, h, w]: two encoded pairs, winners first."""
        clips = [frames_of(self.family, seed) for seed in range(4)]
        return torch.stack([self.module.encode_media(self.encoders, clip) for clip in clips])

    def cond(self, prompts: list[str]) -> dict[str, Tensor]:
        rows = self.module.encode_text(self.encoders, prompts)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def size_of(case: Case) -> dict[str, int]:
    """The size of a family's clip as its pipeline's arguments."""
    size = {"height": case.family.height, "width": case.family.width}
    return size if case.family.frames == 1 else {**size, "num_frames": case.family.frames}


def token_limit(case: Case) -> dict[str, int]:
    """CogVideoX's pipeline has its text length as a default of its own; tiny folders differ."""
    return {"max_sequence_length": 24} if case.family.name == "cogvideox" else {}


def results(output: Any) -> Any:
    return output.frames if hasattr(output, "frames") else output.images


def run(case: Case, pipe: Any, latents: Tensor, steps: int, **extra: Any) -> Any:
    """The pipeline on PROMPTS from given noise [N, C, F, h, w]; without guidance by default."""
    if case.family.name == "cogvideox":
        latents = latents.permute(0, 2, 1, 3, 4)
    if case.family.frames == 1:
        latents = latents.squeeze(2)
    return results(
        pipe(
            PROMPTS[: len(latents)],
            latents=latents,
            num_inference_steps=steps,
            **({"guidance_scale": 1.0} | size_of(case) | token_limit(case) | extra),
        )
    )


def generators(seeds: list[int]) -> list[torch.Generator]:
    """What a pipeline's scheduler draws from, as `sample` seeds it."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ours(case: Case, latents: Tensor) -> Tensor:
    """A pipeline's latents in our order, [N, C, F, h, w]."""
    if case.family.name == "cogvideox":
        return latents.permute(0, 2, 1, 3, 4)
    return latents.unsqueeze(2) if case.family.frames == 1 else latents


FOLDERS = tempfile.TemporaryDirectory(prefix="fastpref-families-")


@cache
def tiny(name: str) -> Case:
    """The family's folder, written once per process and deleted at its end."""
    family = FAMILIES[name]
    return Case(name, family, family.build(Path(FOLDERS.name) / name))
