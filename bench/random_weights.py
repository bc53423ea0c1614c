"""A published architecture as a diffusers folder of random weights, and two pairs of tiny media."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.architectures import ARCHITECTURES
from fastpref.models.published import PUBLISHED, Architecture
from fastpref.progress import stage

PROMPTS = ["a red fox jumps over the old stone wall", "snow falls on a quiet street with lamps"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A family's parts beside its transformer or UNet, as published, and the smallest clip.

    texts: part, its class and what its config adds to the class's defaults. small: what of that
    a small text encoder has instead. dtype: of the files; the VAE's own where it differs.
    """

    architecture: Architecture
    pipeline: str
    vae: tuple[str, dict[str, Any]]
    texts: dict[str, tuple[str, dict[str, Any]]]
    small: dict[str, Any] = field(default_factory=lambda: {"num_layers": 2})
    clip: str = "5x64x64"
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype | None = None

    @property
    def part(self) -> str:
        return "unet" if self.architecture.kind.startswith("UNet") else "transformer"


_T5 = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
_CLIP_BIG = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280, "vocab_size": 49408, "hidden_act": "gelu",
}  # fmt: skip
_IMAGE_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_FEW_LAYERS = {"num_hidden_layers": 2}

SIZES = {
    "wan": Size(
        architecture=PUBLISHED["wan"], pipeline="WanPipeline",
        vae=("AutoencoderKLWan", {}), vae_dtype=torch.float32,
        texts={"text_encoder": ("UMT5EncoderModel", _T5 | {"vocab_size": 256384})},
    ),
    "cogvideox-2b": Size(
        architecture=PUBLISHED["cogvideox-2b"], pipeline="CogVideoXPipeline", dtype=torch.float16,
        vae=(
            "AutoencoderKLCogVideoX",
            {"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3,
             "latent_channels": 16, "scaling_factor": 1.15258426},
        ),
        texts={"text_encoder": ("T5EncoderModel", _T5 | {"vocab_size": 32128})},
    ),
    "sd15": Size(
        architecture=PUBLISHED["sd15"], pipeline="StableDiffusionPipeline", dtype=torch.float16,
        vae=("AutoencoderKL", _IMAGE_VAE | {"scaling_factor": 0.18215, "force_upcast": False}),
        texts={"text_encoder": ("CLIPTextModel", _CLIP)}, small=_FEW_LAYERS, clip="1x64x64",
    ),
    "sdxl": Size(
        architecture=PUBLISHED["sdxl"], pipeline="StableDiffusionXLPipeline", dtype=torch.float16,
        vae=("AutoencoderKL", _IMAGE_VAE | {"scaling_factor": 0.13025, "force_upcast": True}),
        texts={
            "text_encoder": ("CLIPTextModel", _CLIP),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG),
        },
        small=_FEW_LAYERS, clip="1x64x64",
    ),
    # To see the command itself work within seconds.
    "tiny": Size(
        architecture=ARCHITECTURES["tiny"], pipeline="WanPipeline", vae_dtype=torch.float32,
        vae=("AutoencoderKLWan", {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
        texts={
            "text_encoder": (
                "UMT5EncoderModel",
                _T5 | {"d_model": 64, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64},
            )
        },
    ),
}  # fmt: skip


def t5_tokenizer(texts: list[str]) -> Any:
    """A tokenizer of the texts' words that ends every text with </s>, as T5's do.

    Of words, since ties make trained subwords differ from run to run.
    """
    from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer of 77 tokens: CLIP's alphabet of bytes, without merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"pad_token": pad, "unk_token": "<|endoftext|>", "model_max_length": 77}
    return CLIPTokenizer.from_pretrained(folder, **options)


def make(size: Size, path: Path, text_encoder: str) -> None:
    """Writes the folder part by part: the largest one alone is in memory."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": size.pipeline}
    index["_diffusers_version"] = diffusers.__version__
    if size.pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index |= {"image_encoder": [None, None], "requires_safety_checker": False}

    def write(part: str, kind: type, config: dict[str, Any], dtype: torch.dtype) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the classes' own initial values, at once in the dtype
        try:
            with stage(f"making the {part}, {kind.__name__}"):
                if issubclass(kind, transformers.PreTrainedModel):
                    model = kind(kind.config_class(**config))
                else:
                    model = kind.from_config(config)
        finally:
            torch.set_default_dtype(before)
        torch.nn.Module.to(model, dtype)  # what a constructor made in float32; quietly
        with stage(f"writing {sum(p.numel() for p in model.parameters()):,} parameters"):
            model.save_pretrained(path / part)
        index[part] = [kind.__module__.partition(".")[0], kind.__name__]

    for part, (name, config) in size.texts.items():
        beside = path / part.replace("text_encoder", "tokenizer")
        if name.startswith("CLIP"):
            tokenizer = clip_tokenizer(beside, pad="!" if part.endswith("2") else "<|endoftext|>")
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            config = config | {n: getattr(tokenizer, n) for n in names}
        else:
            tokenizer = t5_tokenizer(PROMPTS)
        tokenizer.save_pretrained(beside)
        index[beside.name] = ["transformers", type(tokenizer).__name__]
        if text_encoder == "small":
            config = config | size.small | {"vocab_size": len(tokenizer)}
        write(part, getattr(transformers, name), config, size.dtype)
    name, config = size.vae
    write("vae", getattr(diffusers, name), config, size.vae_dtype or size.dtype)
    known = size.architecture
    write(size.part, getattr(diffusers, known.kind), known.config, size.dtype)
    scheduler = getattr(diffusers, known.scheduler["_class_name"]).from_config(known.scheduler)
    scheduler.save_pretrained(path / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (path / "model_index.json").write_text(json.dumps(index, indent=1))


def write_media(size: Size, folder: Path) -> None:
    """Two pairs of coarse noise with metadata.jsonl: clips, or images of one frame."""
    from PIL import Image

    from fastpref.pairs.media import write_clip

    folder.mkdir(parents=True)
    frames, height, width = (int(n) for n in size.clip.split("x"))
    random, rows = torch.Generator().manual_seed(0), []
    for i, prompt in enumerate(PROMPTS):
        row = {"prompt": prompt}
        for member in ("chosen", "rejected"):
            shape = (frames, height // 8, width // 8, 3)
            coarse = torch.randint(256, shape, generator=random, dtype=torch.uint8)
            clip = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
            row[member] = f"{i}_{member}.{'png' if frames == 1 else 'mp4'}"
            if frames == 1:
                Image.fromarray(clip[0].numpy()).save(folder / row[member])
            else:
                write_clip(folder / row[member], clip)
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
