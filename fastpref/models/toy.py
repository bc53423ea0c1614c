"""The toy family: a tiny Wan transformer in pixel space, prompts embedded by hashing their words.

It needs no VAE and no text encoder, so it trains and samples on a CPU in seconds; the transformer
is diffusers' own class, so everything learned here holds for the real Wan.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..process import Diffusion, FlowMatching, from_config
from .encoders import Sizes, check_frames
from .folder import check_rotary, load_model, read_config, scheduler_config

TEXT_DIM = 32
SLOTS = 8
PATCH = 4
SPAN = 4.0  # of the coordinate channels: above the noise, or motion is learned ten times slower

# Self- and cross-attention projections of every block, as diffusers names them.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = "blocks"

# Three coordinate channels stand beside RGB, since rotary attention barely sees absolute position.
CONFIG: dict[str, Any] = {
    "patch_size": (1, PATCH, PATCH),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 6,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 192,
    "num_layers": 4,
    "rope_max_seq_len": 64,
}


class Pipeline(NamedTuple):
    """What media and text need beside the transformer: for pixels and hashed words, nothing."""

    dtype: torch.dtype
    path: str | Path
    sizes: Sizes

    @property
    def scheduler(self) -> Euler | None:
        """For flow matching our own; none where the folder is of another kind."""
        found = process(scheduler_config(self.path))
        return Euler(found) if isinstance(found, FlowMatching) else None


class Euler:
    """Euler's method for flow matching, called as a scheduler of diffusers.

    FlowMatchEulerDiscreteScheduler has another grid and rounds it to float32: the demo's pairs,
    and so its table, would be others.
    """

    def __init__(self, process: FlowMatching) -> None:
        self.config = process  # has num_train_timesteps, as a scheduler's config

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        shift, total = self.config.shift, self.config.num_train_timesteps
        u = torch.linspace(1, 1 / total, steps + 1, dtype=torch.float64)[:-1]
        sigmas = torch.cat((shift * u / (1 + (shift - 1) * u), u.new_zeros(1)))
        self.timesteps = total * sigmas[:-1].to(device)
        self.changes = iter(sigmas.diff().tolist())

    def step(self, pred: Tensor, t: Tensor, x: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (x + next(self.changes) * pred,)


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformer of a diffusers folder (`path/transformer`), in `dtype`."""
    from diffusers import WanTransformer3DModel

    model = load_model(WanTransformer3DModel, path, "transformer", dtype)
    if model.config.in_channels != 6 or model.config.out_channels != 3:
        raise ValueError(
            f"toy.load: {path} has {model.config.in_channels} input and "
            f"{model.config.out_channels} output channels; expected 6 (RGB and t, y, x) and 3: "
            "is this another family's model?"
        )
    return model


def process(scheduler_config: dict[str, Any]) -> FlowMatching | Diffusion:
    """The noising process of the folder's scheduler: flow matching with its shift."""
    return from_config(scheduler_config)


def coordinates(like: Tensor) -> Tensor:
    """Channels t, y, x in [-SPAN, SPAN] for a batch `[N, C, F, H, W]` -> `[N, 3, F, H, W]`."""
    sizes = like.shape[2:]
    # Made where it is used: a copy from the host could not be recorded in a CUDA graph.
    place = {"device": like.device}
    axes = [
        torch.linspace(-SPAN, SPAN, n, **place) if n > 1 else torch.zeros(1, **place) for n in sizes
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return grid.to(like.dtype).expand(like.shape[0], -1, -1, -1, -1)


def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Velocity eps - x0 at `noisy [N, 3, F, H, W]`, times `t [N]` in [0, 1000]."""
    check_rotary(model, noisy)
    return model(
        hidden_states=torch.cat([noisy, coordinates(noisy)], dim=1),
        timestep=t,
        encoder_hidden_states=cond["text"].to(noisy.dtype),
        return_dict=False,
    )[0]


def pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> Pipeline:
    """What `encode_media`, `encode_text` and `decode` need; the toy family has no VAE to load."""
    from diffusers import WanTransformer3DModel

    config = CONFIG
    if (Path(path) / "transformer").is_dir():
        config = CONFIG | read_config(WanTransformer3DModel, path, "transformer")
    most = tuple(n * config["rope_max_seq_len"] for n in config["patch_size"])
    return Pipeline(dtype, path, Sizes(patch=tuple(config["patch_size"]), most=most))


def encode_media(pipe: Pipeline, frames: Tensor) -> Tensor:
    """Pixels `uint8 [F, H, W, 3]` -> `[3, F, H, W]` in [-1, 1]; H and W divisible by 4."""
    # A family that builds on this one may have a pipe of its own.
    check_frames(frames, getattr(pipe, "sizes", Sizes(patch=CONFIG["patch_size"])))
    # contiguous: safetensors refuses what is permuted.
    return (frames.permute(3, 0, 1, 2).float() / 127.5 - 1).to(pipe.dtype).contiguous()


def embed_word(word: str) -> Tensor:
    """A fixed unit Gaussian vector `[TEXT_DIM]` for any word, from its SHAKE-256 hash."""
    # Not hash(), which Python salts anew in every process.
    digest = hashlib.shake_256(word.encode()).digest(4 * TEXT_DIM)
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
    # + 0.5: at -1 and 1 erfinv is infinite.
    uniform = (torch.tensor(words, dtype=torch.float64) + 0.5) / 2**32
    return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).float()


def encode_text(pipe: Pipeline, prompts: list[str]) -> list[dict[str, Tensor]]:
    """One `{"text": [SLOTS, TEXT_DIM]}` per prompt: word i is added to slot i mod SLOTS."""
    result = []
    for prompt in prompts:
        slots = torch.zeros(SLOTS, TEXT_DIM)
        for i, word in enumerate(re.findall(r"\w+", prompt.lower())):
            slots[i % SLOTS] += embed_word(word)
        result.append({"text": slots.to(pipe.dtype)})
    return result


def decode(pipe: Pipeline, latents: Tensor) -> Tensor:
    """`[3, F, H, W]` in [-1, 1] -> pixels `uint8 [F, H, W, 3]`."""
    return decode_many(pipe, latents[None])[0]


def decode_many(pipe: Pipeline, latents: Tensor) -> list[Tensor]:
    """`[N, 3, F, H, W]` -> N clips as of `decode`."""
    pixels = ((latents.float() + 1) * 127.5).round().clamp(0, 255)
    return [clip.permute(1, 2, 3, 0).contiguous() for clip in pixels.to(torch.uint8)]


def save(model: nn.Module, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a folder `load` reads: every tensor of `model` in `dtype`, and the scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from safetensors.torch import save_file

    folder = Path(path) / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(dtype).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {"_class_name": WanTransformer3DModel.__name__, **dict(model.config)}
    config = {k: v for k, v in config.items() if k in CONFIG or k == "_class_name"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(Path(path) / "scheduler")
