"""Encode: media and prompts to latents and embeddings, one safetensors file per pair, resumable."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import models, ranks
from ..files import locked, mark
from ..loss import oracle
from ..models.encoders import Sizes
from ..models.folder import check_path
from ..progress import printable
from .encoded import (
    check,
    claim,
    embeddings,
    fingerprint,
    indexed,
    stored,
    write_index,
    write_tensors,
)
from .media import Sampling
from .notes import Note
from .parts import PARTS, load, loaded, text_progress
from .prepare import Counts, Prepared, finish, prepared
from .rows import BadRow, Row, Rows
from .shards import pair_file, read_fingerprint, stored_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POSTERIORS = ("mode", "sample")
MOST_WORKERS = 256
Worked = tuple[bool, Prepared | BadRow]  # whether a row was encoded now, what became of it
FIRST = 32  # pairs: if the model takes none of them, sizes are wrong, not rows


@torch.no_grad()
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
    ties: str = "drop",
    posterior: str = "mode",
    seed: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Encodes the pairs of `data` (`rows.Rows`, `media.Sampling`) into `output_dir`; returns it.

    Written: pairs/XX/ID.safetensors (`latents_w`, `latents_l`, `cond.NAME`), empty.safetensors
    (the empty prompt), bad_rows.jsonl, counts.json (`prepare.Counts`, also printed),
    fingerprint.json and, last, index.parquet.
    Each of several processes encodes its share of the rows; rank 0 writes all but the pairs. Called
    again after an interruption, by as many or not, it goes on and encodes nothing twice. With the
    same `batch_size` it ends with the same bytes as an unbroken call of one process, as far as the
    text encoder's rows do not depend on their neighbours in a batch of one shape.

    Args:
        family: `toy`, or an importable module; model: its diffusers folder.
        dtype: of the encoders and of what is stored: float32, bfloat16 or float16.
        num_workers: threads that read and decode beside the encoding; 0: none.
        batch_size: prompts per call of the text encoder, filled up with empty ones.
        posterior: of the VAE: its mode, or a sample mean + std eps in which eps depends on `seed`
            (0 unless given), the pair's id and the member alone (`posterior_normals`).

    Raises:
        ValueError: no usable pair (all ties, all rows bad, none), sizes that the model does not
            take (those asked for, or of the first FIRST pairs), an `output_dir` encoded otherwise
            or holding something else, an option out of range or without effect, a sample of a
            family without a posterior.
    """
    check_options(num_workers, batch_size, dtype)
    sampling = Sampling(num_frames=num_frames, height=height, width=width, fps=fps)
    module = models.family(family) if isinstance(family, str) else family
    seed = posterior_seed(module, posterior, seed)
    check_path(model)  # not every family reads it
    folder = Path(output_dir)
    rows = Rows(data, ranked=ranked, split=split, ties=ties)
    pipe = module.pipeline(model, DTYPES[dtype])
    sizes = getattr(pipe, "sizes", Sizes())
    sizes.check(num_frames, height, width)
    now = fingerprint(module, model, rows, sampling, dtype, seed)
    ranks.check_same("what is encoded, and how,", now | {"batch_size": batch_size})
    check(folder, now, rows.root)  # before anything is written there
    pipe = placed(pipe, device)
    progress = progress and ranks.main()
    counts = Counts()

    def worked(some: Iterable[Row | BadRow], what: str) -> Iterator[Worked]:
        items = unmixed(prepared(some, sampling, folder, num_workers, sizes), folder)
        with tqdm(total=rows.total, desc=what, unit="row", disable=not progress or None) as bar:
            for waiting in in_batches(items, batch_size):
                new = [is_new(item) for item in waiting]
                # In a log the text encoder's first batch alone.
                loud = progress and not (bar.disable and loaded(pipe, "text"))
                load(pipe, PARTS if any(new) else (), progress)
                how = {"seed": seed, "batch_size": batch_size, "progress": loud}
                done = encode_pairs(module, pipe, waiting, folder, DTYPES[dtype], **how)
                yield from zip(new, done, strict=True)
                bar.update(rows.records - bar.n)
                if counts.pairs or counts.bad:  # not yet where several encode their shares
                    known = {"pairs": counts.pairs, "bad": sum(counts.bad.values())}
                    bar.set_postfix(known, ties=rows.ties, refresh=False)

    def whole(before: set[int]) -> str | None:
        """Over all rows; why there is no pair, or None. before: pairs that are encoded by now."""
        what = "encode" if ranks.world() == 1 else "index"
        index, bad = indexed(worthwhile(worked(rows, what)), counts, rows.keep_ties)
        counts.already_encoded -= len(before)
        refused = finish(folder, rows, counts, bad)
        if not refused:
            encode_empty(module, pipe, folder, DTYPES[dtype], batch_size, progress)
            write_index(folder, index)
        return refused

    with locked(mark(folder, "encode")) if ranks.main() else nullcontext():
        ranks.by_main(partial(claim, folder, now, rows.root))
        # Several share the rows; then rank 0 finds the files of all as after an interruption.
        mine = worked(islice(rows, ranks.rank(), None, ranks.world()), "encode")
        every = ranks.of_main(new_pairs(worthwhile(mine))) if ranks.world() > 1 else []
        refused = ranks.by_main(partial(whole, set().union(*every)))
    if progress:
        print(counts if refused else f"{printable(str(folder))}: {counts}")
    if refused:
        raise ValueError(refused)
    return folder


def placed(pipe: Any, device: str | torch.device | None) -> Any:
    """On the device that is asked for, of several processes each on its own GPU."""
    own = None if str(device) == "cpu" else ranks.local_device()
    device = own or device or ("cuda" if torch.cuda.is_available() else "cpu")
    return pipe.to(device) if hasattr(pipe, "to") else pipe


def new_pairs(items: Iterator[Worked]) -> set[int]:
    """The ids of those that were encoded just now."""
    return {item.pair_id for new, item in items if new and item.fault is None}


def in_batches(items: Iterable[Prepared | BadRow], size: int) -> Iterator[list[Prepared | BadRow]]:
    """All, in order: as many at once as hold `size` new ones, or one where nothing waits."""
    waiting: list[Prepared | BadRow] = []  # from the first pair on that waits for its batch
    new = 0  # pairs among them
    for item in items:
        waiting.append(item)
        new += is_new(item)
        if new in (0, size):
            yield waiting
            waiting, new = [], 0
    yield waiting


def worthwhile(items: Iterator[Worked]) -> Iterator[Worked]:
    """`items` as they are. ValueError: the first FIRST have sizes that the model does not take."""
    bad: list[BadRow] = []
    for new, item in items:
        yield new, item
        fault = item if isinstance(item, BadRow) else item.fault
        if fault is None:
            break
        bad.append(fault)
        if len(bad) == FIRST:
            refuse_sizes(bad)
    yield from items


def encode_empty(
    module: ModuleType,
    pipe: Any,
    folder: Path,
    dtype: torch.dtype,
    batch_size: int,
    progress: bool,
) -> None:
    """empty.safetensors, the empty prompt's embeddings, unless it is there."""
    path = folder / "empty.safetensors"
    if stored_shapes(path) is None:
        load(pipe, ["text"], progress)
        with text_progress(pipe, "the empty prompt", progress):
            cond = embeddings(module.encode_text(pipe, [""] * batch_size)[0])
        write_tensors(folder, path, stored(cond, dtype))


def unmixed(items: Iterable[Prepared | BadRow], folder: Path) -> Iterator[Prepared | BadRow]:
    """`items` as they are. ValueError: one is to be encoded, and the set's others were by an older
    fastpref, which read media otherwise.
    """
    older = "digests" not in read_fingerprint(folder)
    for item in items:
        if older and is_new(item):
            raise ValueError(
                f"output_dir {folder}: is not finished, by an older fastpref that read media "
                "otherwise; delete it, or choose another output_dir"
            )
        yield item


def is_new(item: Prepared | BadRow) -> bool:
    """Whether it is a pair to be encoded."""
    return isinstance(item, Prepared) and item.clips is not None


def refuse_sizes(bad: list[BadRow]) -> None:
    """ValueError: all of these rows have sizes that the model does not take."""
    if all(row.kind == "not_encodable" for row in bad):
        raise ValueError(f"the model takes none of the first {len(bad)} pairs; first: {bad[0]}")


def check_options(num_workers: int, batch_size: int, dtype: str) -> None:
    """ValueError: one is out of range."""
    check_workers(num_workers)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}")


def check_workers(num_workers: int) -> None:
    """ValueError: not a number of threads to start."""
    if not 0 <= num_workers <= MOST_WORKERS:
        raise ValueError(f"num_workers: expected 0 to {MOST_WORKERS}, got {num_workers}")


def posterior_seed(module: ModuleType, posterior: str, seed: int | None) -> int | None:
    """The seed of the posterior's samples, None for its mode; ValueError: see `encode`."""
    if posterior not in POSTERIORS:
        raise ValueError(f"posterior: expected {' or '.join(POSTERIORS)}, got {posterior}")
    if posterior == "mode":
        if seed is not None:
            raise ValueError(
                "seed has no effect with posterior mode; remove it, or pass posterior sample"
            )
        return None
    try:
        inspect.signature(module.encode_media).bind("pipe", "frames", "normal")
    except TypeError:
        raise ValueError(
            f"posterior sample: family {module.__name__} has none to sample (its encode_media "
            "takes no third argument, normal); use --posterior mode"
        ) from None
    seed = 0 if seed is None else seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2^63, got {seed}")
    return seed


def posterior_normals(seed: int, pair_id: int, index: int, shape: Sequence[int]) -> Tensor:
    """eps of a pair's winner (index 0) or loser (1), float32, elements in the latents' order.

    Made on the CPU, so that the device that encodes does not matter.
    """
    ids = torch.tensor([pair_id]), torch.tensor([index])
    return oracle.normal(seed, *ids, math.prod(shape), domain=oracle.POSTERIOR).view(*shape)


def encode_pairs(
    module: ModuleType,
    pipe: Any,
    items: list[Prepared | BadRow],
    folder: Path,
    dtype: torch.dtype,
    *,
    seed: int | None,
    batch_size: int,
    progress: bool,
) -> Iterator[Prepared | BadRow]:
    """Encodes and writes what is new of `items`; gives all, in order, with what was noted.

    seed: of `posterior_seed`.
    A ValueError of the family (a size its VAE cannot take) makes a bad row, not the end.
    """
    prompts = list(dict.fromkeys(item.row.prompt for item in items if is_new(item)))
    # Filled up, so that the encoder's batch has one shape whatever an interruption left to encode.
    filled = prompts + [""] * (batch_size - len(prompts)) if prompts else []
    texts: dict[str, dict[str, Tensor]] = {}
    cut: dict[str, str] = {}
    if filled:
        with text_progress(pipe, f"{len(prompts)} prompts", progress):
            texts = dict(zip(filled, module.encode_text(pipe, filled), strict=True))
        if hasattr(pipe, "cut"):
            cut = dict(zip(prompts, pipe.cut(prompts), strict=True))
    modes: dict[bytes, Tensor] = {}  # ranked candidates stand in several pairs

    def latents(item: Prepared, index: int) -> Tensor:
        digest, frames = item.digests[index], item.clips[index].frames
        if seed is not None:  # the pair's own, so not kept for other pairs
            normal = partial(posterior_normals, seed, item.pair_id, index)
            return module.encode_media(pipe, frames, normal)
        if digest not in modes:
            modes[digest] = module.encode_media(pipe, frames)
        return modes[digest]

    for item in items:
        if not is_new(item):
            yield item
            continue
        where, prompt = item.row.where, item.row.prompt
        if cut.get(prompt):
            item.notes.insert(0, Note("cut_prompts", "prompt", cut[prompt]))
        try:
            tensors = {"latents_w": latents(item, 0), "latents_l": latents(item, 1)}
        except ValueError as error:
            yield replace(
                item, fault=BadRow("not_encodable", where, "chosen, rejected", str(error))
            )
            continue
        tensors = stored(tensors | embeddings(texts[prompt]), dtype)
        fault = unusable(tensors, where, str(dtype).removeprefix("torch."))
        if fault is None:
            write_tensors(folder, pair_file(folder, item.pair_id), tensors, item.notes)
        yield replace(item, fault=fault)


def unusable(tensors: dict[str, Tensor], where: str, dtype: str) -> BadRow | None:
    """Latents or embeddings that are not finite as stored, latents that are the same."""
    wrong = [name for name, value in tensors.items() if not value.isfinite().all()]
    if wrong:
        field = {"latents_w": "chosen", "latents_l": "rejected"}.get(wrong[0], "prompt")
        reason = f"{wrong[0]} encoded as NaN or infinity in {dtype}; check the model or --dtype"
        return BadRow("not_finite", where, field, reason)
    if torch.equal(tensors["latents_w"], tensors["latents_l"]):
        reason = f"has the same latents as chosen in {dtype}, of other frames"
        return BadRow("identical_latents", where, "rejected", reason)
    return None
