"""Makes the shipped CLIP: `python -m fastpref.demo.pretrain_clip`, four minutes on 2 cores.

It learns which prompt a clip was made for, and nothing of what the judge likes: for the demo it is
what CLIP is for PickScore, and the preference model learns the rest from labelled clips.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..spo.pixels import PREPROCESSOR
from ..spo.preference_model import StepAwarePreferenceModel
from . import clips

SIDE = 36  # eight frames of 12x12 as tiles of one picture
# The end has the largest number: older transformers look for that, newer ones for its number.
WORDS = ["<pad>", "<s>", "<unk>", "a", "disc", "moving", *clips.COLOURS, *clips.DIRECTIONS, "</s>"]
LONGEST = 8  # a prompt's five words between <s> and </s>, and one more
CONFIG: dict[str, Any] = {
    "projection_dim": 64,
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 6,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
        "vocab_size": len(WORDS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": len(WORDS) - 1,
    },
}
PICTURES = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.25] * 3,
    "image_std": [0.3] * 3,
}


def write_tokenizer(folder: Path) -> None:
    """Words between spaces, of WORDS alone, between <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, ids[word]) for word in ("<s>", "</s>")]
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    words.save(str(folder / "tokenizer.json"))
    # By hand: each version of transformers writes another class's name.
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LONGEST}
    said |= {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1) + "\n")


def pretrain(output: Path, steps: int, seed: int = 0, batch: int = 64, rate: float = 1e-3) -> None:
    """Trains a CLIP to tell the prompts of flawed clips apart, and writes it in bf16."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output)
    clip = CLIPModel(CLIPConfig(**CONFIG))
    # Its step's parts are zero, and not trained: this is the plain CLIP.
    tokenizer, pictures = (
        AutoTokenizer.from_pretrained(output),
        PICTURES | {"rescale_factor": 1 / 255},
    )
    model = StepAwarePreferenceModel(clip, tokenizer, pictures, frames="tile").train()
    print(f"{sum(p.numel() for p in clip.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    prompts, start, running, right = clips.PRETRAINING_PROMPTS, time.time(), 0.0, 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(prompts), (batch,), generator=draw)
        logits = compare(model, clips.flawed([prompts[i] for i in chosen], draw), prompts)
        # Against every prompt rather than those of the batch: some would stand there twice.
        loss = nn.functional.cross_entropy(logits, chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        hits = (logits.argmax(1) == chosen).float().mean().item()
        running += (loss.item() - running) / min(step + 1, 100)
        right += (hits - right) / min(step + 1, 100)
        if (step + 1) % 100 == 0:
            took = time.time() - start
            print(f"step {step + 1} loss {running:.3f} right {right:.2f} {took:.0f} s", flush=True)
    clip.to(torch.bfloat16).save_pretrained(output)
    (output / PREPROCESSOR).write_text(json.dumps(PICTURES, indent=1) + "\n")


def compare(model: StepAwarePreferenceModel, videos: Tensor, prompts: list[str]) -> Tensor:
    """Logits [N, prompts] of clips [N, F, H, W, 3] in [0, 1]."""
    frames = (255 * videos).round().to(torch.uint8)
    pixels = torch.cat([model.pixels(model.pictures(clip)) for clip in frames])
    image = model.image_features(pixels, torch.zeros(len(pixels)))
    found = [nn.functional.normalize(x, dim=1) for x in (image, model.text_features(prompts))]
    return model.clip.logit_scale.exp() * found[0] @ found[1].T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "clip")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.steps, arguments.seed)
