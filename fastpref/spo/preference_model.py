"""The step-aware preference model: a CLIP that is told how noisy a sample's estimate is.

SPO's scorer (arXiv 2406.04314): CLIP or PickScore, its vision tower conditioned on the timestep t
by adaLN in every layer and on the pooled output (DiT, arXiv 2212.09748). All of that begins at
zero: untrained, it scores as the plain model does, at every t.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import flush, share, writing
from ..models.folder import arguments, check_path, load_part
from .pixels import PREPROCESSOR, json_object, preprocess, read_preprocessor, tiled

Frames = Literal["mean", "tile"]
FREQUENCIES = 256  # of the timestep's embedding
RECORD, STEPS = "step_aware.json", "step_aware.safetensors"


class StepAwarePreferenceModel(nn.Module):
    """`model(frames, prompts, t)`: scores [N] float64, exp(logit_scale) * cosine(image, text).

    The difference of two scores of a prompt is a logit: P(i preferred to j) = sigmoid(s_i - s_j).
    Gradients are kept in training mode alone.

    Args:
        clip: transformers' CLIPModel.
        tokenizer: its tokenizer.
        preprocessor: its preprocessor_config.json.
        frames: of a clip up to `num_frames`, evenly spaced, are scored: each alone and averaged
            (mean), or side by side in one picture (tile), which shows motion.
        batch_size: pictures per forward.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Any,
        preprocessor: dict[str, Any],
        *,
        frames: Frames = "mean",
        num_frames: int = 8,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        if frames not in get_args(Frames):
            raise ValueError(f"frames: expected mean or tile, got {frames!r}")
        if type(num_frames) is not int or num_frames < 1:
            raise ValueError(f"num_frames: expected 1 or more, got {num_frames!r}")
        self.clip, self.tokenizer, self.preprocessor = clip, tokenizer, preprocessor
        self.frames, self.num_frames, self.batch_size = frames, num_frames, batch_size
        vision = clip.config.vision_config
        width, like = vision.hidden_size, clip.visual_projection.weight
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        # Per layer shift, scale and gate of attention, then of the MLP; shift and scale at the end.
        self.layers = nn.ModuleList(_zero(width, 6) for _ in range(vision.num_hidden_layers))
        self.pooled = _zero(width, 2)
        for part in (self.time, self.layers, self.pooled):
            part.to(like)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def forward(self, frames: Sequence[Tensor], prompts: Sequence[str], t: Tensor) -> Tensor:
        """frames: N clips uint8 [F, H, W, 3]; t [N]: what the network is fed, 0 (clean) to 1000."""
        if not len(frames) == len(prompts) == len(t):
            raise ValueError(
                f"scores: expected as many clips as prompts and times, got {len(frames)}, "
                f"{len(prompts)} and {len(t)}"
            )
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            shown = [self.pictures(clip) for clip in frames]
            counts = torch.tensor([len(pictures) for pictures in shown], device=self.device)
            pixels = torch.cat([self.pixels(pictures) for pictures in shown])
            times = t.to(self.device).repeat_interleave(counts)
            parts = zip(pixels.split(self.batch_size), times.split(self.batch_size), strict=True)
            image = _unit(torch.cat([self.image_features(*part) for part in parts]))
            known = list(dict.fromkeys(prompts))
            texts = torch.cat(
                [
                    self.text_features(known[i : i + self.batch_size])
                    for i in range(0, len(known), self.batch_size)
                ]
            )
            text = _unit(texts[[known.index(prompt) for prompt in prompts]])
            cosines = (image * text.repeat_interleave(counts, 0)).sum(1)
            means = torch.stack([part.mean() for part in cosines.split(counts.tolist())])
            return self.clip.logit_scale.double().exp() * means

    def text_features(self, prompts: list[str]) -> Tensor:
        """[N, D]; of a longer prompt the first 77 tokens are read."""
        # All of one length, so that a prompt's score does not hang on its neighbours.
        most = self.clip.config.text_config.max_position_embeddings
        words = self.tokenizer(
            prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt"
        ).to(self.device)
        found = self.clip.get_text_features(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        )
        return found if isinstance(found, Tensor) else found.pooler_output  # transformers 4, 5

    def image_features(self, pixels: Tensor, t: Tensor) -> Tensor:
        """[N, D] of pixels [N, 3, S, S] at times [N]: CLIP's vision tower, modulated."""
        vision, like = self.clip.vision_model, self.pooled[1].weight
        step = self.time(_frequencies(t).to(like.dtype))
        x = vision.pre_layrnorm(vision.embeddings(pixels.to(like.dtype)))
        for layer, modulation in zip(vision.encoder.layers, self.layers, strict=True):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(step)[:, None].chunk(
                6, dim=-1
            )
            h = layer.layer_norm1(x) * (1 + scale_a) + shift_a
            x = x + layer.self_attn(hidden_states=h, attention_mask=None)[0] * (1 + gate_a)
            h = layer.layer_norm2(x) * (1 + scale_m) + shift_m
            x = x + layer.mlp(h) * (1 + gate_m)
        shift, scale = self.pooled(step).chunk(2, dim=-1)
        return self.clip.visual_projection(vision.post_layernorm(x[:, 0]) * (1 + scale) + shift)

    def pictures(self, clip: Tensor) -> Tensor:
        """What is scored of a clip uint8 [F, H, W, 3]: its frames, or one picture of them."""
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != torch.uint8 or not len(clip):
            raise ValueError(
                "scores: expected clips uint8 [F, H, W, 3], got "
                f"{str(clip.dtype).removeprefix('torch.')} {list(clip.shape)}"
            )
        count = min(len(clip), self.num_frames)
        taken = clip[torch.linspace(0, len(clip) - 1, count).round().long()]
        return tiled(taken) if self.frames == "tile" else taken

    def pixels(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 [N, H, W, 3] -> float32 [N, 3, S, S] on the model's device, as CLIP's
        preprocessor makes them.
        """
        return preprocess(pictures.to(self.device), self.preprocessor)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads, whole or not at all: CLIP's own files, its
        tokenizer and preprocessor, and the step's parts.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self.clip.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / PREPROCESSOR).write_text(json.dumps(self.preprocessor, indent=1))
            save_file(self.step_parts(), temporary / STEPS)
            record = {"frames": self.frames, "num_frames": self.num_frames}
            (temporary / RECORD).write_text(json.dumps(record, indent=1))
            for file in temporary.iterdir():
                share(file)
                flush(file)
            if path.exists():  # nothing is renamed over a folder that holds files
                shutil.rmtree(path)
            temporary.rename(path)
            flush(path.parent)

    def step_parts(self) -> dict[str, Tensor]:
        """The tensors that CLIP has not."""
        return {
            name: value.detach().contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith("clip.")
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        frames: Frames | None = None,
        num_frames: int | None = None,
    ) -> StepAwarePreferenceModel:
        """A trained one from its folder; from a folder or hub id of CLIP or PickScore one that
        scores as that does. frames, num_frames: the folder's own, or mean and 8.

        Raises:
            ValueError: the folder is none of these, or damaged.
        """
        from transformers import AutoTokenizer, CLIPModel

        check_folder(path)
        clip = load_part(CLIPModel, path, "", **arguments(CLIPModel, path, "", dtype))
        tokenizer = load_part(AutoTokenizer, path, "")
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes do with nothing
            raise ValueError(
                f"model {path}: its tokenizer knows no words: tokenizer.json, or vocab.json and "
                "merges.txt, are missing; copy the folder again"
            )
        record = Path(path) / RECORD
        said = json_object(record, f"model {path}") if record.exists() else {}
        if record.exists() and said.keys() != {"frames", "num_frames"}:
            raise ValueError(
                f"model {path}: {RECORD} expected frames and num_frames, got "
                f"{', '.join(said) or 'nothing':.80}; copy the folder again"
            )
        how = {"frames": "mean", "num_frames": 8} | said
        how |= {k: v for k, v in (("frames", frames), ("num_frames", num_frames)) if v is not None}
        try:
            model = cls(clip, tokenizer, read_preprocessor(path, clip), **how)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model {path}: {error}") from None
        if said:
            _fill(model, Path(path) / STEPS)
        return model.to(device)


def _zero(width: int, count: int) -> nn.Sequential:
    """`count` modulations [N, count * width] of the step's embedding, all zero at first."""
    linear = nn.Linear(width, count * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def _frequencies(t: Tensor) -> Tensor:
    """Sinusoids [N, FREQUENCIES] float32 of times [N], as DiT's."""
    half = torch.arange(FREQUENCIES // 2, device=t.device, dtype=torch.float64)
    angles = t.double()[:, None] * torch.exp(-math.log(10_000) * half / len(half))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.double(), dim=1)


def check_folder(path: str | Path) -> None:
    """ValueError: no folder of a CLIP (nor a hub id, of which nothing is asked)."""
    check_path(path)
    path = Path(path)
    if not path.is_dir():
        return
    config = path / "config.json"
    kind = json_object(config, f"model {path}").get("model_type") if config.exists() else None
    if kind != "clip":
        inside = path / "preference_model"
        hint = f": take {inside}" if inside.is_dir() else ""
        raise ValueError(
            f"model {path}: config.json expected model_type clip, got {kind}: expected a folder of "
            f"transformers' CLIPModel (CLIP, PickScore) or of a trained preference model{hint}"
        )
    if (path / RECORD).exists() != (path / STEPS).exists():
        lost = STEPS if (path / RECORD).exists() else RECORD
        raise ValueError(f"model {path}: {lost} is missing; copy the folder again")


def _fill(model: StepAwarePreferenceModel, path: Path) -> None:
    """Puts a file's step parts into a model."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the folder again") from None
    own = model.step_parts()
    wrong = [n for n in {**own, **found} if n not in own or n not in found]
    wrong = wrong or [n for n in own if own[n].shape != found[n].shape]
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]} does not belong to the CLIP beside it; copy the folder again"
        )
    model.load_state_dict(found, strict=False)
