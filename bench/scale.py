"""The loader at 1e7 pairs and 1024 ranks, simulated: `python -m bench.scale`; and many GPUs on
paper, predicted from what one was measured at: `python -m bench.scale --paper`

An index of as many rows is made on disk in the real format, without pair files: all that one rank
does runs but for the reads of those. In a process of its own it opens the set, finds its first
batch in the middle of an epoch as a resumed run does, and goes through an epoch of its batches.
Then, rank by rank, an epoch's batches of all of them are counted: is each pair there once?
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import paper, timing
from fastpref.pairs.dataset import Pair, PairDataset, batches
from fastpref.pairs.encoded import write_table, write_tensors
from fastpref.pairs.order import batches_per_epoch, every, planned

FRAMES = (81, 81, 49, 33)  # of the clips: pairs of three shapes


def make(folder: Path, pairs: int) -> Path:
    """An encoded set of so many rows, as `fastpref encode` indexes them; no pair has a file."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    said = {"family": "fastpref.models.wan", "model": "made", "digests": "blake2b"}
    (folder / "fingerprint.json").write_text(json.dumps(said))
    write_tensors(folder, folder / "empty.safetensors", {"cond.text": torch.zeros(1)})
    random = np.random.default_rng(0)
    ids = np.unique(random.integers(2**63, size=pairs + pairs // 1000))[:pairs]
    digests = pa.py_buffer(random.bytes(16 * pairs).hex().encode())
    places = pa.py_buffer(np.arange(0, 32 * pairs + 1, 32, dtype=np.int32))
    shapes = [
        f"cond.text:512x4096 latents_l:16x{(f + 3) // 4}x60x104 latents_w:16x{(f + 3) // 4}x60x104"
        for f in FRAMES
    ]
    table = {
        "pair_id": ids,
        "prompt": [f"a clip of what prompt number {i // 4} asks for" for i in range(pairs)],
        "weight": np.ones(pairs),
        "where": [f"metadata.jsonl line {i + 1}" for i in range(pairs)],
        "shapes": pa.array(shapes).take(pa.array(random.integers(len(FRAMES), size=pairs))),
        "digest": pa.StringArray.from_buffers(pairs, places, digests),
    }
    write_table(folder, pa.table(table))
    return folder


class Unread(PairDataset):
    """A set whose pairs are not read."""

    def __getitem__(self, i: int) -> Pair:
        nothing = torch.empty(0)
        return Pair(nothing, nothing, {}, self.weights[i], self.pair_ids[i], self.prompts[i])


def memory(what: str = "VmRSS") -> float:
    """GB that this process holds; VmHWM: has held at most (getrusage's is also the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9


def rank(folder: Path, size: int, share: int, shares: int) -> dict[str, float]:
    """What one rank of a run takes: seconds (wall and its own) and GB."""
    before = memory()
    begin, own = time.perf_counter(), time.process_time()
    dataset = Unread(folder)
    taken = {"open_s": time.perf_counter() - begin, "open_cpu_s": time.process_time() - own}
    per_epoch = batches_per_epoch(dataset.shapes, size)
    begin = time.perf_counter()
    middle = batches(dataset, size, 0, per_epoch // 2, share=share, shares=shares)
    next(middle)
    taken["first_batch_s"] = time.perf_counter() - begin
    middle.close()
    stream = batches(dataset, size, 0, share=share, shares=shares)
    count, held = (per_epoch - share + shares - 1) // shares, []
    begin = time.perf_counter()
    for number, (epoch, _) in zip(range(count), stream, strict=False):
        assert epoch == 0
        if number % max(1, count // 10) == 0:
            held.append(memory())
    taken["batch_us"] = (time.perf_counter() - begin) / count * 1e6
    next(stream)  # the next epoch's order
    held.append(memory())
    taken |= {"imports_gb": before, "peak_gb": memory("VmHWM"), "start_gb": held[0]}
    taken["end_gb"] = held[-1]
    return {name: round(value, 4) for name, value in taken.items()}


def coverage(dataset: PairDataset, size: int, shares: int) -> dict[str, int]:
    """Of an epoch's batches of all ranks: pairs that are in one, in none, in more. The plan, which
    each rank finds for itself and which is the same for all, is made once.
    """
    plan = list(planned(dataset.shapes, size, 0, 0))
    times = np.zeros(len(dataset), np.int32)
    for share in range(shares):
        rows = np.concatenate([part.ravel() for part in every(plan, share, shares)])
        np.add.at(times, rows, 1)
    once, never = int((times == 1).sum()), int((times == 0).sum())
    return {"once": once, "in_no_batch": never, "more": len(times) - once - never}


def measure(folder: Path, pairs: int, size: int, shares: int, share: int) -> dict[str, object]:
    """A row: the set made, one rank in a process of its own, and every rank's batches."""
    make(folder, pairs)
    here = [sys.executable, "-m", "bench.scale", "--rank", str(folder), str(size), str(share)]
    done = subprocess.run([*here, str(shares)], check=True, capture_output=True, text=True)
    row: dict[str, object] = {"bench": "scale", "pairs": pairs, "ranks": shares, "batch": size}
    row["index_gb"] = round((folder / "index.parquet").stat().st_size / 1e9, 4)
    row |= json.loads(done.stdout.splitlines()[-1])
    begin = time.perf_counter()
    row |= coverage(PairDataset(folder), size, shares)
    return row | {"coverage_s": round(time.perf_counter() - begin, 1)}


def show(row: dict[str, object]) -> None:
    print(f"{row['pairs']:,} pairs, {row['ranks']} ranks, batches of {row['batch']}; one rank:")
    lines = {
        "open the set": f"{row['open_s']:.1f} s ({row['open_cpu_s']:.1f} s of its own)",
        "first batch, from the middle of an epoch": f"{row['first_batch_s']:.2f} s",
        "next own batch, without its reads": f"{row['batch_us']:.0f} us",
        "memory, of imports alone": f"{row['imports_gb']:.2f} GB",
        "memory, an epoch's begin and end": f"{row['start_gb']:.2f}, {row['end_gb']:.2f} GB",
        "memory, peak": f"{row['peak_gb']:.2f} GB",
        "all ranks, an epoch: pairs once": f"{row['once']:,}",
        "in no batch, in more than one": f"{row['in_no_batch']}, {row['more']}",
    }
    for name, value in lines.items():
        print(f"  {name:<42} {value}")


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--pairs", type=float, default=1e7)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="pairs; default: 1")
    parser.add_argument("--paper", action="store_true", help="the tables of bench/SCALE.md")
    parser.add_argument("--rank", nargs=4, help="FOLDER BATCH RANK RANKS: what one rank measures")
    args = parser.parse_args(arguments)
    if args.paper:
        return print(paper.table())
    if args.rank:
        folder, *numbers = args.rank
        return print(json.dumps(rank(Path(folder), *map(int, numbers))))
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), int(args.pairs), args.batch, args.ranks, args.ranks // 2)
    show(row)
    timing.append(args.output, [row | timing.environment(torch.device("cpu"))])


if __name__ == "__main__":
    main()
