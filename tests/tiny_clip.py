"""A tiny CLIP as the folder users have: weights, tokenizer, preprocessor."""

from pathlib import Path

import torch
from families import FOLDERS

from bench.random_weights import clip_tokenizer


def clip_folder(side: int = 32, patch: int = 8) -> Path:
    """Written once per process and size: two layers of width 32 in either tower."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    path = Path(FOLDERS.name) / f"clip-{side}-{patch}"
    if path.exists():
        return path
    tokenizer = clip_tokenizer(path.with_name(f"{path.name}-tokenizer"))
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    tower |= {"num_hidden_layers": 2}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = CLIPConfig(
        text_config=tower
        | {"vocab_size": len(tokenizer)}
        | {name: getattr(tokenizer, name) for name in names},
        vision_config=tower | {"image_size": side, "patch_size": patch},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(path)
    return path
