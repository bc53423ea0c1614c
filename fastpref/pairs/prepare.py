"""Prepare: rows to decoded pairs, in threads beside whatever uses them; and the dry run on top."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import write_atomic
from ..models.encoders import Sizes
from ..progress import printable
from .dataset import map_ahead
from .media import Clip, MediaError, Sampling, decode, load
from .notes import NOTES, Note, clip_notes, place
from .rows import BadRow, Row, Rows, nothing
from .shards import pair_file, written


@dataclass
class Prepared:
    """A row (without the media's bytes) with its pair id, its media's digests and what was done to
    them; both clips if it is to be encoded; why it is a bad row, if it is.
    """

    row: Row
    pair_id: int
    digests: tuple[bytes, bytes]
    notes: list[Note]
    clips: tuple[Clip, Clip] | None = None
    fault: BadRow | None = None


@dataclass
class Counts:
    """What became of the records, of the whole set and not of one call alone.

    pairs: usable, of which already_encoded were in the folder before this call. ties: pairs without
    a winner, dropped. bad: bad rows by kind. notes: by kind of NOTES the prompts and media that it
    was done to, each once however many pairs it stands in. first: of each of these kinds where it
    is met first, in the order of the rows.
    """

    records: int = 0
    ties: int = 0
    pairs: int = 0
    already_encoded: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NOTES, 0))
    first: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._noted: set[bytes] = set()

    def add(self, item: Prepared | BadRow) -> BadRow | None:
        """Counts a row as it is in the end; returns the bad row that it is, or None."""
        fault = item if isinstance(item, BadRow) else item.fault
        if isinstance(item, Prepared):
            self._add_notes(item)
        if fault is None:
            self.pairs += 1
            self.already_encoded += item.clips is None
        else:
            self.bad[fault.kind] = self.bad.get(fault.kind, 0) + 1
            self.first.setdefault(fault.kind, str(fault))
        return fault

    def _add_notes(self, item: Prepared) -> None:
        keys = {"prompt": item.row.prompt.encode()}
        keys |= dict(zip(("chosen", "rejected"), item.digests, strict=True))
        fresh = {name for name, key in keys.items() if key not in self._noted}
        for note in item.notes:
            if note.field in fresh:
                self.notes[note.kind] += 1
                self.first.setdefault(note.kind, place(item.row, note))
                self._noted.add(keys[note.field])

    def record(self) -> bytes:
        """counts.json."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return (json.dumps(public, indent=1) + "\n").encode()

    def __str__(self) -> str:
        """A line of what became of the rows, and one of each kind that there is."""
        bad = ", ".join(f"{n} {kind}" for kind, n in sorted(self.bad.items()))
        before = f" ({self.already_encoded} already encoded)" if self.already_encoded else ""
        lines = [
            f"{self.records} rows: {self.pairs} pairs{before}, {self.ties} ties dropped, "
            f"{sum(self.bad.values())} bad rows{f' ({bad})' if bad else ''}"
        ]
        told = {NOTES[kind]: (kind, n) for kind, n in self.notes.items()}
        told["ties dropped"] = ("ties", self.ties)
        told |= {f"bad rows, {kind}": (kind, n) for kind, n in sorted(self.bad.items())}
        lines += [
            f"{what}: {n}; first: {self.first[kind]}" for what, (kind, n) in told.items() if n
        ]
        return "\n  ".join(map(printable, lines))


def content_id(prompt: str, digests: tuple[bytes, bytes]) -> int:
    """Stable id of a pair in [0, 2^63): blake2b of the prompt and of both media's digests."""
    text = prompt.encode()
    whole = len(text).to_bytes(8, "little") + text + b"".join(digests)
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little") >> 1


def prepare(row: Row, sampling: Sampling, folder: Path | None, sizes: Sizes) -> Prepared | BadRow:
    """Reads, identifies and decodes a row's media; a pair that `folder` holds is not decoded.

    sizes: of the clips that the model takes.
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
        named = _without_bytes(row)
        known = None if folder is None else stored_notes(pair_file(folder, pair_id))
        if known is not None:
            return Prepared(named, pair_id, digests, known)
        name = "chosen"
        clip_w = decode(chosen, sampling)
        name = "rejected"
        clip_l = decode(rejected, sampling)
    except (MediaError, OSError) as error:
        kind = error.kind if isinstance(error, MediaError) else "unreadable"
        path = getattr(row, name)
        label = f"{path.name} " if isinstance(path, Path) else ""
        return BadRow(kind, row.where, name, f"{label}{error}")
    notes = [
        *clip_notes("chosen", clip_w, sampling.fps),
        *clip_notes("rejected", clip_l, sampling.fps),
    ]
    fault = _fault(row, clip_w, clip_l, sizes)
    return Prepared(named, pair_id, digests, notes, None if fault else (clip_w, clip_l), fault)


def _fault(row: Row, chosen: Clip, rejected: Clip, sizes: Sizes) -> BadRow | None:
    """Clips that are of two shapes, or the same, or that the model does not take."""
    shape_w, shape_l = list(chosen.frames.shape[:3]), list(rejected.frames.shape[:3])
    if shape_w != shape_l:
        flags = "--num_frames" if shape_w[1:] == shape_l[1:] else "--height and --width"
        reason = (
            f"frames x height x width expected {'x'.join(map(str, shape_w))} as in chosen, "
            f"got {'x'.join(map(str, shape_l))}; pass {flags}"
        )
        return BadRow("shape_mismatch", row.where, "rejected", reason)
    if torch.equal(chosen.frames, rejected.frames):
        return BadRow("identical_frames", row.where, "rejected", "has the same frames as chosen")
    try:
        sizes.check(*shape_w)
    except ValueError as error:
        return BadRow("not_encodable", row.where, "chosen, rejected", str(error))
    return None


def _without_bytes(row: Row) -> Row:
    """Its media's would be kept until a batch is full."""
    media = {name: getattr(row, name) for name in ("chosen", "rejected")}
    return replace(row, **{name: b"" for name, value in media.items() if isinstance(value, bytes)})


def prepared(
    rows: Iterable[Row | BadRow],
    sampling: Sampling,
    folder: Path | None,
    num_workers: int,
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen): takes any
) -> Iterator[Prepared | BadRow]:
    """Every row prepared, in order, by `num_workers` threads (PyAV decodes without the GIL)."""

    def work(row: Row | BadRow) -> Prepared | BadRow:
        return row if isinstance(row, BadRow) else prepare(row, sampling, folder, sizes)

    seen: dict[int, str] = {}
    for item in map_ahead(work, rows, num_workers):
        if isinstance(item, BadRow) or item.fault is not None:
            yield item
        elif item.pair_id in seen:
            reason = f"prompt and media are those of {seen[item.pair_id]}"
            yield BadRow("duplicate", item.row.where, "row", reason)
        else:
            seen[item.pair_id] = item.row.where
            yield item


def stored_notes(path: Path) -> list[Note] | None:
    """What was done to the prompt and the media of a pair that is encoded; None: it is not."""
    found = written(path)
    try:
        notes = [] if found is None else [Note(*map(str, note)) for note in found.get("notes", ())]
    except TypeError:
        return None
    return None if found is None or {note.kind for note in notes} - set(NOTES) else notes


def finish(folder: Path | None, rows: Rows, counts: Counts, bad: list[BadRow]) -> str | None:
    """Writes the counts and the bad rows; returns why there is no pair, or None."""
    counts.records, counts.ties = rows.records, rows.ties
    if rows.first_tie is not None:
        counts.first["ties"] = rows.first_tie
    if folder is not None:
        names = ("where", "field", "kind", "reason")
        lines = [json.dumps({name: getattr(row, name) for name in names}) for row in bad]
        write_atomic(folder / "bad_rows.jsonl", "".join(f"{line}\n" for line in lines).encode())
        write_atomic(folder / "counts.json", counts.record())
    if counts.pairs:
        return None
    # Nothing is encoded yet: the repaired data may come here.
    if folder is not None and not (folder / "pairs").exists():
        (folder / "fingerprint.json").unlink(missing_ok=True)
    if not bad:
        return nothing(rows)
    rest = f"; the others are in {folder / 'bad_rows.jsonl'}" if folder and len(bad) > 1 else ""
    return f"{rows.name}: no usable pair, {len(bad)} bad rows; first: {bad[0]}{rest}"


def survey(
    data: str | Path,
    *,
    sampling: Sampling | None = None,
    num_workers: int = 2,
    ranked: str = "all",
    split: str = "train",
    ties: str = "drop",
    progress: bool = True,
) -> dict[str, Any]:
    """What `encode` would find in `data`, without a model: `fastpref encode --dry_run`.

    Returns the counts, the bad rows, why `encode` would end with no pair (refused, or None) and, of
    the usable pairs' media, the number per frame size and the least, median and greatest number of
    frames and of seconds. Raises like `encode`.
    """
    rows = Rows(data, ranked=ranked, split=split, ties=ties)
    counts = Counts()
    bad: list[BadRow] = []
    clips: list[Clip] = []
    with tqdm(total=rows.total, desc="dry run", unit="row", disable=not progress or None) as bar:
        for item in prepared(rows, sampling or Sampling(), None, num_workers):
            fault = counts.add(item)
            if fault is not None:
                bad.append(fault)
            else:
                clips += [replace(clip, frames=torch.empty(0)) for clip in item.clips]
            bar.update(rows.records - bar.n)
        bar.update(rows.records - bar.n)
    refused = finish(None, rows, counts, bad)
    sizes = Counter(f"{clip.source_height}x{clip.source_width}" for clip in clips)
    frames, seconds = [c.source_frames for c in clips], [c.seconds for c in clips]
    spread = {
        name: [min(of), statistics.median(of), max(of)] if of else None
        for name, of in (("frames", frames), ("seconds", seconds))
    }
    found = {"counts": counts, "bad_rows": bad, "refused": refused}
    return found | {"sizes": dict(sizes), **spread}
