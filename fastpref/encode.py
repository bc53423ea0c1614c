"""Encode: media and prompts to latents and embeddings, one safetensors file per pair, resumable."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import models
from .data import pair_file
from .files import identity, write_atomic
from .media import Clip, MediaError, Sampling, decode, load
from .rows import BadRow, Row, Rows, nothing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Counts:
    """What became of the records: dropped ties, bad rows by kind, pairs written now or before."""

    records: int = 0
    ties: int = 0
    pairs: int = 0
    already_encoded: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        bad = ", ".join(f"{n} {kind}" for kind, n in sorted(self.bad.items()))
        before = f" ({self.already_encoded} already encoded)" if self.already_encoded else ""
        return (
            f"{self.records} rows: {self.pairs} pairs{before}, {self.ties} ties dropped, "
            f"{self.bad.total()} bad rows{f' ({bad})' if bad else ''}"
        )


@dataclass
class Prepared:
    """A row with its pair id and, unless the pair is encoded already, both clips."""

    row: Row
    pair_id: int
    clips: tuple[Clip, Clip] | None


def content_id(prompt: str, chosen: bytes, rejected: bytes) -> int:
    """Stable id of a pair in [0, 2^63): blake2b of the prompt and of both media's digests."""
    text = prompt.encode()
    digest = hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=8)
    for media in (chosen, rejected):
        digest.update(hashlib.blake2b(media).digest())
    return int.from_bytes(digest.digest(), "little") >> 1


def prepare(row: Row, sampling: Sampling, folder: Path | None) -> Prepared | BadRow:
    """Reads, identifies and decodes a row's media; a pair that `folder` holds is not decoded."""
    name = "chosen"
    try:
        chosen = load(row.chosen)
        name = "rejected"
        rejected = load(row.rejected)
        if chosen == rejected:
            return BadRow("identical", row.where, name, "is the same file as chosen")
        pair_id = content_id(row.prompt, chosen, rejected)
        if folder is not None and stored_shapes(pair_file(folder, pair_id)) is not None:
            return Prepared(row, pair_id, None)
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
    return Prepared(row, pair_id, (clip_w, clip_l))


def prepared(
    rows: Rows, sampling: Sampling, folder: Path | None, num_workers: int
) -> Iterator[Prepared | BadRow]:
    """Every row prepared, in order, by `num_workers` threads (PyAV decodes without the GIL)."""
    seen: dict[int, str] = {}

    def once(item: Prepared | BadRow) -> Prepared | BadRow:
        if isinstance(item, Prepared):
            if item.pair_id in seen:
                reason = f"prompt and media are those of {seen[item.pair_id]}"
                return BadRow("duplicate", item.row.where, "row", reason)
            seen[item.pair_id] = item.row.where
        return item

    if num_workers == 0:
        for row in rows:
            yield once(row if isinstance(row, BadRow) else prepare(row, sampling, folder))
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastpref-decode")
    try:
        ahead: deque[Any] = deque()
        for row in rows:
            ready = isinstance(row, BadRow)
            ahead.append(row if ready else pool.submit(prepare, row, sampling, folder))
            if len(ahead) > 2 * num_workers:
                item = ahead.popleft()
                yield once(item if isinstance(item, BadRow) else item.result())
        for item in ahead:
            yield once(item if isinstance(item, BadRow) else item.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def encode(
    family: str | ModuleType,
    model: str | Path,
    data: str | Path,
    output_dir: str | Path,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    *,
    dtype: str = "float32",
    num_workers: int = 2,
    batch_size: int = 8,
    ranked: str = "all",
    split: str = "train",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Encodes the pairs of `data` (`rows.Rows`, `media.Sampling`) into `output_dir`; returns it.

    Written: pairs/XX/ID.safetensors (`latents_w`, `latents_l`, `cond.NAME`), empty.safetensors
    (the empty prompt), bad_rows.jsonl, counts.json, fingerprint.json and, last, index.parquet.
    Called again after an interruption it goes on and encodes nothing twice.

    Args:
        family: `toy`, or an importable module; model: its diffusers folder.
        dtype: of the encoders and of what is stored: float32, bfloat16 or float16.
        num_workers: threads that read and decode beside the encoding; 0: none.
        batch_size: prompts per call of the text encoder.

    Raises:
        ValueError: no usable pair (all ties, all rows bad, none), or a folder encoded otherwise.
    """
    sampling = Sampling(num_frames=num_frames, height=height, width=width, fps=fps)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")
    module = models.family(family) if isinstance(family, str) else family
    folder = Path(output_dir)
    rows = Rows(data, ranked=ranked, split=split)
    claim(folder, fingerprint(module, model, rows, sampling, dtype))
    pipe = module.pipeline(model, DTYPES[dtype])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if hasattr(pipe, "to"):
        pipe = pipe.to(device)
    counts, waiting = Counts(), []
    index: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    bar = tqdm(total=rows.total, desc="encode", unit="row", disable=not progress or None)
    for item in prepared(rows, sampling, folder, num_workers):
        bar.update(rows.records - bar.n)
        if isinstance(item, BadRow):
            bad.append(item)
        elif item.clips is None:
            counts.already_encoded += 1
            index.append(entry(item))
        else:
            waiting.append(item)
        if len(waiting) == batch_size:
            encode_pairs(module, pipe, waiting, folder, index, bad)
            waiting = []
        bar.set_postfix(pairs=len(index), bad=len(bad), ties=rows.ties, refresh=False)
    encode_pairs(module, pipe, waiting, folder, index, bad)
    bar.update(rows.records - bar.n)
    bar.close()
    finish(folder, rows, len(index), bad, counts)
    write_tensors(folder / "empty.safetensors", embeddings(module.encode_text(pipe, [""])[0]))
    write_index(folder, index)
    if progress:
        print(f"{folder}: {counts}")
    return folder


@torch.no_grad()
def encode_pairs(
    module: ModuleType,
    pipe: Any,
    items: list[Prepared],
    folder: Path,
    index: list[dict[str, Any]],
    bad: list[BadRow],
) -> None:
    """Encodes and writes some pairs; a ValueError of the family makes a row bad, not the run."""
    prompts = list(dict.fromkeys(item.row.prompt for item in items))
    texts = dict(zip(prompts, module.encode_text(pipe, prompts), strict=True)) if prompts else {}
    for item in items:
        try:
            latents_w, latents_l = (module.encode_media(pipe, clip.frames) for clip in item.clips)
        except ValueError as error:
            bad.append(BadRow("not_encodable", item.row.where, "chosen, rejected", str(error)))
            continue
        tensors = {"latents_w": latents_w, "latents_l": latents_l}
        tensors |= embeddings(texts[item.row.prompt])
        write_tensors(pair_file(folder, item.pair_id), tensors)
        index.append(entry(item))


def entry(item: Prepared) -> dict[str, Any]:
    """A pair's line of the index: everything but the media."""
    names = [f.name for f in fields(Row) if f.name not in ("chosen", "rejected")]
    return {"pair_id": item.pair_id} | {name: getattr(item.row, name) for name in names}


def embeddings(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt's embeddings under the names they are stored by."""
    return {f"cond.{name}": value for name, value in cond.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def stored_shapes(path: Path) -> str | None:
    """The shapes of a pair's tensors in one line, from the file's header; None: no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    except (OSError, SafetensorError):
        return None
    return " ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def fingerprint(
    module: ModuleType, model: str | Path, rows: Rows, sampling: Sampling, dtype: str
) -> dict[str, Any]:
    """What decides an encoded set's content, as compared by `claim`."""
    return {
        "family": module.__name__,
        "model": identity(Path(model)) if Path(model).exists() else str(model),
        **asdict(sampling),
        "dtype": dtype,
        "ranked": rows.ranked if rows.layout == "candidates" else None,
        "data": identity(rows.path) if rows.path else rows.name,
    }


def claim(folder: Path, now: dict[str, Any]) -> None:
    """Makes `folder` this encoding's own; ValueError names what differs if it is another's."""
    path = folder / "fingerprint.json"
    if not path.exists():
        write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differs = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differs:
        listed = ", ".join(f"{k} (there {before.get(k)}, here {now.get(k)})" for k in differs)
        raise ValueError(
            f"output_dir {folder}: encoded with another {listed}; "
            "choose another output_dir, or the same values"
        )


def finish(folder: Path | None, rows: Rows, pairs: int, bad: list[BadRow], counts: Counts) -> None:
    """Completes the counts and writes them with the bad rows; ValueError where no pair is left."""
    counts.records, counts.ties, counts.pairs = rows.records, rows.ties, pairs
    counts.bad.update(row.kind for row in bad)
    if folder is not None:
        names = ("where", "field", "kind", "reason")
        lines = [json.dumps({name: getattr(row, name) for name in names}) for row in bad]
        write_atomic(folder / "bad_rows.jsonl", "".join(f"{line}\n" for line in lines).encode())
        write_atomic(folder / "counts.json", (json.dumps(asdict(counts), indent=1) + "\n").encode())
    if not pairs:
        if not bad:
            raise ValueError(nothing(rows))
        rest = f"; the others are in {folder / 'bad_rows.jsonl'}" if folder and len(bad) > 1 else ""
        raise ValueError(f"{rows.name}: no usable pair, {len(bad)} bad rows; first: {bad[0]}{rest}")


def write_index(folder: Path, index: list[dict[str, Any]]) -> None:
    """index.parquet, one row per pair, by id; an encoded set is complete with it.

    Neither the order of the rows nor what an interruption left to encode changes it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = sorted(index, key=lambda line: line["pair_id"])
    columns = {name: [line[name] for line in index] for name in index[0]}
    columns["shapes"] = [stored_shapes(pair_file(folder, i)) for i in columns["pair_id"]]
    numbers = {"pair_id": pa.int64(), "weight": pa.float64()}
    numbers |= {"score_chosen": pa.float64(), "score_rejected": pa.float64()}
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in columns])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    write_atomic(folder / "index.parquet", sink.getvalue().to_pybytes())


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
    counts, pairs = Counts(), 0
    bad: list[BadRow] = []
    sizes: Counter[str] = Counter()
    frames, seconds = [], []
    bar = tqdm(total=rows.total, desc="dry run", unit="row", disable=not progress or None)
    for item in prepared(rows, sampling or Sampling(), None, num_workers):
        bar.update(rows.records - bar.n)
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        pairs += 1
        for clip in item.clips:
            sizes[f"{clip.source_height}x{clip.source_width}"] += 1
            frames.append(clip.source_frames)
            seconds.append(clip.seconds)
    bar.update(rows.records - bar.n)
    bar.close()
    finish(None, rows, pairs, bad, counts)
    spread = {
        name: [min(of), statistics.median(of), max(of)]
        for name, of in (("frames", frames), ("seconds", seconds))
    }
    return {"counts": counts, "bad_rows": bad, "sizes": dict(sizes), **spread}


def main(arguments: list[str]) -> None:
    """`fastpref encode`; a mistake is a ValueError of one line."""
    parser = argparse.ArgumentParser(prog="fastpref encode", description=__doc__)

    def fail(message: str) -> None:
        raise ValueError(message)

    parser.error = fail  # type: ignore[method-assign]
    add = parser.add_argument
    add("--data", required=True, help="folder with metadata, metadata file, or HF dataset")
    add("--family", help="toy, or a module with the nine names")
    add("--model", help="diffusers model folder")
    add("--output_dir", help="the encoded set; the same command run again goes on")
    add("--num_frames", type=int, help="frames per clip; default: all of them")
    add("--height", type=int, help="frames are scaled and cropped in the middle to this size")
    add("--width", type=int)
    add("--fps", type=float, help="take frames at this rate; default: num_frames evenly")
    add("--dtype", default="float32", choices=DTYPES)
    add("--num_workers", type=int, default=2, help="decoding threads")
    add("--batch_size", type=int, default=8, help="prompts per call of the text encoder")
    add("--ranked", default="all", choices=("all", "best_worst"), help="pairs of ranked candidates")
    add("--split", default="train", help="of a Hugging Face dataset")
    add("--device", help="default: cuda where there is one")
    add("--dry_run", action="store_true", help="count, measure and list bad rows without a model")
    options = vars(parser.parse_args(arguments))
    if not options.pop("dry_run"):
        missing = [f"--{n}" for n in ("family", "model", "output_dir") if options[n] is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} required (except with --dry_run)")
        encode(**options)
        return
    names = ("num_frames", "height", "width", "fps")
    sampling = Sampling(**{name: options[name] for name in names})
    shared = {name: options[name] for name in ("num_workers", "ranked", "split")}
    found = survey(options["data"], sampling=sampling, **shared)
    for row in found["bad_rows"]:
        print(row)
    print(found["counts"])
    for name in ("frames", "seconds"):
        low, middle, high = found[name]
        print(f"{name}: {low:g} to {high:g}, median {middle:g}")
    print("sizes: " + ", ".join(f"{n} of {size}" for size, n in found["sizes"].items()))
