"""Prompts alone: read from a list or from wherever pairs stand, embedded once, onto the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import ranks
from ..files import differences, model_identity, tidy, write_atomic
from ..models.encoders import open_pipeline
from ..models.folder import encoders_of
from ..pairs.dataset import PairDataset
from ..pairs.encoded import embeddings, stored, write_tensors
from ..pairs.parts import load, text_progress
from ..pairs.shards import (
    Changed,
    conditions,
    digest,
    encoding_of,
    read_fingerprint,
    read_tensors,
    written_digest,
)
from ..pairs.sources import open_source
from ..pairs.text import blank, is_text, lines, not_utf8
from ..progress import warn

COLUMNS = ("prompt", "caption")
BATCH = 8  # prompts per call of the text encoder


def read_prompts(data: str | Path) -> list[str]:
    """The prompts of `data`, each once, in order: a .txt file of one a line, an encoded set, or the
    column `prompt` (or `caption`) of anything that `fastpref encode` reads.

    Raises:
        ValueError: there are none, or the file is no text.
    """
    path, bad = Path(data), 0
    if path.suffix.lower() == ".txt" and not path.is_file():
        raise ValueError(f"data {data}: no such file; expected a .txt of one prompt a line")
    if path.suffix.lower() == ".txt":
        found = [_text(line, f"{path} line {i}") for i, line in enumerate(lines(path), 1)]
    elif (path / "index.parquet").is_file():
        found = PairDataset(path).prompts
    else:
        found = []
        for _, record in open_source(data, "train", COLUMNS):
            text = next((record[c] for c in COLUMNS if c in record), None)
            bad += not isinstance(text, str) or blank(text) or not is_text(text)
            found.append(text if isinstance(text, str) and is_text(text) else "")
    if bad:
        warn(f"data {data}: {bad} records have no prompt and are left out")
    prompts = list(dict.fromkeys(text for text in found if not blank(text)))
    if not prompts:
        raise ValueError(
            f"data {data}: no prompts, expected a .txt of one a line, or a column "
            f"{' or '.join(COLUMNS)}"
        )
    return prompts


def _text(line: str, where: str) -> str:
    if not is_text(line):
        raise ValueError(f"{where}: {not_utf8(line)}")
    return line.strip("\ufeff \t\r\n")


def prompt_id(prompt: str) -> int:
    """A stable id in [0, 2^63): its draws depend on it."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little") >> 1


class PromptSet:
    """Prompts with their embeddings in `folder`, one safetensors file each.

    Attributes:
        prompts, ids: in order; ids [N] int64.
        empty_cond: embeddings of the empty prompt (no batch dimension).
        identity: of the prompts and of what they were embedded with.

    Called again after an interruption it embeds nothing twice.
    Raises ValueError: the folder's were embedded otherwise; Changed: a file changed on disk.
    """

    unit = "prompts"

    def __init__(
        self,
        prompts: Sequence[str],
        folder: Path,
        family: ModuleType,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.prompts, self.folder = list(prompts), folder
        self.ids = torch.tensor([prompt_id(text) for text in prompts], dtype=torch.int64)
        now = {
            "family": family.__name__,
            "model": model_identity(model),
            "encoders": encoders_of(model),
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._encoding = encoding_of(now)

        def embedded() -> None:
            record = folder / "fingerprint.json"
            if record.exists():
                listed = differences(read_fingerprint(folder), now)
                if listed:
                    raise ValueError(
                        f"{folder}: embedded with another {listed}; choose another output_dir"
                    )
                tidy(folder)
            else:
                write_atomic(record, (json.dumps(now, indent=1) + "\n").encode())
            self._embed(family, model, dtype, device)

        ranks.by_main(embedded)
        self.empty_cond = self._read("")
        whole = json.dumps([self._encoding, *self.prompts])
        self.identity = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def cond(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Of some prompts, each [len(rows), ...]."""
        found = [self._read(self.prompts[row]) for row in rows]
        return {name: torch.stack([f[name] for f in found]).to(device) for name in found[0]}

    def _file(self, prompt: str) -> Path:
        return self.folder / (
            f"{prompt_id(prompt):016x}.safetensors" if prompt else "empty.safetensors"
        )

    def _read(self, prompt: str) -> dict[str, Tensor]:
        path = self._file(prompt)
        with suppress(ValueError):  # its advice is of an encoded set
            tensors = read_tensors(path)
            if digest(path, tensors, self._encoding) == written_digest(path):
                return conditions(tensors)
        raise Changed(f"{path}: is not as it was written; delete it and run the same command again")

    def _embed(
        self, family: ModuleType, model: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        lacking = [text for text in ["", *self.prompts] if not self._file(text).exists()]
        if not lacking:
            return
        pipe = open_pipeline(family, model, dtype, device)
        load(pipe, ["text"], progress=True)
        cut = 0
        with text_progress(pipe, f"{len(lacking)} prompts", progress=len(lacking) <= BATCH):
            for some in _parts(lacking):
                # Filled up, so that a batch's shape does not depend on what was left to embed.
                filled = some + [""] * (BATCH - len(some))
                for prompt, row in zip(some, family.encode_text(pipe, filled), strict=False):
                    tensors = stored(embeddings(row), dtype)
                    wrong = [name for name, v in tensors.items() if not v.isfinite().all()]
                    if wrong:
                        raise ValueError(
                            f"prompt {prompt!r:.80}: {wrong[0]} expected finite, got NaN or "
                            "infinity: look at the text encoder's weights and dtype"
                        )
                    write_tensors(self.folder, self._file(prompt), tensors)
                cut += sum(map(bool, pipe.cut(some))) if hasattr(pipe, "cut") else 0
        if cut:
            warn(f"{cut} of {len(lacking)} prompts are longer than the text encoder reads")


def _parts(texts: list[str]) -> Iterator[list[str]]:
    for i in range(0, len(texts), BATCH):
        yield texts[i : i + BATCH]
