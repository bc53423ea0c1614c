"""Prepare: rows to decoded pairs, in threads beside whatever uses them; and the dry run on top."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import write_atomic
from ..models.encoders import Sizes
from .counts import NOTES, Counts, Note, clip_notes
from .dataset import map_ahead
from .media import Clip, MediaError, Sampling, decode, load
from .rows import BadRow, Row, Rows, nothing
from .shards import pair_file, written


@dataclass
class Prepared:
    """A row (without the media's bytes) with its pair id, its media's digests, what was done to
    them and, unless encoded already, both clips.
    """

    row: Row
    pair_id: int
    digests: tuple[bytes, bytes]
    clips: tuple[Clip, Clip] | None
    notes: list[Note]


def content_id(prompt: str, digests: tuple[bytes, bytes]) -> int:
    """Stable id of a pair in [0, 2^63): blake2b of the prompt and of both media's digests."""
    text = prompt.encode()
    whole = len(text).to_bytes(8, "little") + text + b"".join(digests)
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little") >> 1


def prepare(
    row: Row, sampling: Sampling, folder: Path | None, sizes: Sizes | None
) -> Prepared | BadRow:
    """Reads, identifies and decodes a row's media; a pair that `folder` holds is not decoded.

    sizes: of the clips that the model takes; None: not known.
    """
    name = "chosen"
    try:
        chosen = load(row.chosen)
        name = "rejected"
        rejected = load(row.rejected)
        if chosen == rejected:
            return BadRow("identical", row.where, name, "has the same content as chosen")
        digests = (hashlib.blake2b(chosen).digest(), hashlib.blake2b(rejected).digest())
        pair_id = content_id(row.prompt, digests)
        named = _named(row)
        notes = None if folder is None else stored_notes(pair_file(folder, pair_id))
        if notes is not None:
            return Prepared(named, pair_id, digests, None, notes)
        name = "chosen"
        clip_w = decode(chosen, sampling)
        name = "rejected"
        clip_l = decode(rejected, sampling)
    except (MediaError, OSError) as error:
        kind = error.kind if isinstance(error, MediaError) else "unreadable"
        path = getattr(row, name)
        label = f"{path.name} " if isinstance(path, Path) else ""
        return BadRow(kind, row.where, name, f"{label}{error}")
    shape_w, shape_l = list(clip_w.frames.shape[:3]), list(clip_l.frames.shape[:3])
    if shape_w != shape_l:
        flags = "--num_frames" if shape_w[1:] == shape_l[1:] else "--height and --width"
        reason = (
            f"frames x height x width expected {'x'.join(map(str, shape_w))} as in chosen, "
            f"got {'x'.join(map(str, shape_l))}; pass {flags}"
        )
        return BadRow("shape_mismatch", row.where, "rejected", reason)
    if torch.equal(clip_w.frames, clip_l.frames):
        return BadRow("identical_frames", row.where, name, "has the same frames as chosen")
    if sizes is not None:
        try:
            sizes.check(*shape_w)
        except ValueError as error:
            return BadRow("not_encodable", row.where, "chosen, rejected", str(error))
    notes = [
        *clip_notes("chosen", clip_w, sampling.fps),
        *clip_notes("rejected", clip_l, sampling.fps),
    ]
    return Prepared(named, pair_id, digests, (clip_w, clip_l), notes)


def _named(row: Row) -> Row:
    """Without the bytes of its media, which would be kept until a batch is full."""
    media = {name: getattr(row, name) for name in ("chosen", "rejected")}
    return replace(row, **{name: b"" for name, value in media.items() if isinstance(value, bytes)})


def prepared(
    rows: Rows,
    sampling: Sampling,
    folder: Path | None,
    num_workers: int,
    sizes: Sizes | None = None,
) -> Iterator[Prepared | BadRow]:
    """Every row prepared, in order, by `num_workers` threads (PyAV decodes without the GIL)."""

    def work(row: Row | BadRow) -> Prepared | BadRow:
        return row if isinstance(row, BadRow) else prepare(row, sampling, folder, sizes)

    seen: dict[int, str] = {}
    for item in map_ahead(work, rows, num_workers):
        if isinstance(item, BadRow):
            yield item
        elif item.pair_id in seen:
            reason = f"prompt and media are those of {seen[item.pair_id]}"
            yield BadRow("duplicate", item.row.where, "row", reason)
        else:
            seen[item.pair_id] = item.row.where
            yield item


def stored_shapes(path: Path) -> str | None:
    """The shapes of a pair's tensors in one line, from the file's header; None: no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    except (OSError, SafetensorError):
        return None
    return " ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def stored_notes(path: Path) -> list[Note] | None:
    """What was done to the prompt and the media of a pair that is encoded; None: it is not."""
    found = written(path)
    try:
        notes = [] if found is None else [Note(*map(str, note)) for note in found.get("notes", ())]
    except TypeError:
        return None
    return None if found is None or {note.kind for note in notes} - set(NOTES) else notes


def finish(folder: Path | None, rows: Rows, counts: Counts, bad: list[BadRow]) -> None:
    """Writes the counts and the bad rows; ValueError: no pair is left."""
    counts.records, counts.ties = rows.records, rows.ties
    if rows.first_tie is not None:
        counts.first["ties"] = rows.first_tie
    if folder is not None:
        names = ("where", "field", "kind", "reason")
        lines = [json.dumps({name: getattr(row, name) for name in names}) for row in bad]
        write_atomic(folder / "bad_rows.jsonl", "".join(f"{line}\n" for line in lines).encode())
        write_atomic(folder / "counts.json", counts.record())
    if not counts.pairs:
        # Nothing is encoded yet: the repaired data may come here.
        if folder is not None and not (folder / "pairs").exists():
            (folder / "fingerprint.json").unlink(missing_ok=True)
        if not bad:
            raise ValueError(nothing(rows))
        rest = f"; the others are in {folder / 'bad_rows.jsonl'}" if folder and len(bad) > 1 else ""
        raise ValueError(f"{rows.name}: no usable pair, {len(bad)} bad rows; first: {bad[0]}{rest}")


def survey(
    data: str | Path,
    *,
    sampling: Sampling | None = None,
    num_workers: int = 2,
    ranked: str = "all",
    split: str = "train",
    progress: bool = True,
) -> dict[str, Any]:
    """What `encode` would find in `data`, without a model: `fastpref encode --dry_run`.

    Returns the counts, the bad rows, and of the usable pairs' media the number per frame size and
    the least, median and greatest number of frames and of seconds. Raises like `encode`.
    """
    rows = Rows(data, ranked=ranked, split=split)
    counts = Counts()
    bad: list[BadRow] = []
    clips: list[Clip] = []
    with tqdm(total=rows.total, desc="dry run", unit="row", disable=not progress or None) as bar:
        for item in prepared(rows, sampling or Sampling(), None, num_workers):
            if isinstance(item, BadRow):
                bad.append(item)
                counts.add_bad(item)
            else:
                counts.add(item.row, item.digests, item.notes)
                clips += [replace(clip, frames=torch.empty(0)) for clip in item.clips]
            bar.update(rows.records - bar.n)
        bar.update(rows.records - bar.n)
    finish(None, rows, counts, bad)
    sizes = Counter(f"{clip.source_height}x{clip.source_width}" for clip in clips)
    frames, seconds = [c.source_frames for c in clips], [c.seconds for c in clips]
    spread = {
        name: [min(of), statistics.median(of), max(of)]
        for name, of in (("frames", frames), ("seconds", seconds))
    }
    return {"counts": counts, "bad_rows": bad, "sizes": dict(sizes), **spread}
