"""Whole runs at true size with random weights: `python -m bench.true_size --family wan`

Makes a published architecture as the diffusers folder that users have (transformer or UNet, VAE,
text encoders, tokenizers, scheduler), then runs what they run, each stage in a process of its own:
`fastpref encode` of two tiny pairs with the true VAE, `fastpref train` for three steps, the same on
to five, two steps of `fastpref spo` by a scorer that likes light clips, and the adapter of `train`
loaded into the family's pipeline, which samples with and without it. Every number of the adapter's
file must be in the pipeline, and clips must be finite and change.

Of each stage the seconds and the most memory that its process held (the host's; pages of files that
it mapped among it). The text encoder is small (two layers of the true width and a small vocabulary)
or, with --text_encoder true, as published: UMT5-XXL takes 11 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from bench import timing
from bench.random_weights import PROMPTS, SIZES, Size, make, write_media

RUN = {
    "objective": "dpo", "beta": 500, "mixed_precision": "bf16", "lora_rank": 16,
    "learning_rate": 1e-3, "checkpointing_steps": 3, "logging_steps": 1, "report_to": "none",
}  # fmt: skip
ONLINE = {
    "scorer": "bench.true_size:brightness", "threshold": 0.0, "win_rate_prompts": 0,
    "sampling_steps": 4, "first_step": 1, "candidates": 2, "prompts_per_round": 1,
    "max_train_steps": 2,
}  # fmt: skip
FIRST, LAST = 3, 5  # steps of the first command and in the end


def brightness(frames: list[torch.Tensor], prompts: list[str], t: torch.Tensor) -> list[float]:
    return [clip.double().mean().item() for clip in frames]


def load(size: Size, model: Path, run: Path, device: str) -> None:
    """The adapter of `run` in the family's pipeline; RuntimeError: not all of it, no finite clip,
    or the same clip as without it.
    """
    import diffusers
    from safetensors.torch import load_file

    kind = getattr(diffusers, size.pipeline)
    pipe = kind.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    frames, height, width = (int(n) for n in size.clip.split("x"))
    options = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "np"}
    if frames > 1:
        options["num_frames"] = frames

    def clip() -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        out = pipe(PROMPTS[0], generator=random, **options)
        return torch.as_tensor(out.frames if frames > 1 else out.images)

    base = clip()
    pipe.load_lora_weights(run)
    wanted = load_file(run / "pytorch_lora_weights.safetensors")
    there = {
        f"{size.part}.{name.replace('.default_0.', '.')}": value
        for name, value in getattr(pipe, size.part).named_parameters()
        if ".lora_" in name
    }
    if there.keys() != wanted.keys():
        odd = sorted(there.keys() ^ wanted.keys())
        raise RuntimeError(f"adapter: expected {len(wanted)} tensors, {odd[:3]} are not in both")
    lost = [n for n, v in there.items() if not torch.equal(v.cpu(), wanted[n].to(v.dtype))]
    if lost:
        raise RuntimeError(f"adapter: {len(lost)} tensors have other values, {lost[0]} the first")
    tuned = clip()
    if not (base.isfinite().all() and tuned.isfinite().all()):
        raise RuntimeError("the pipeline's clip is not finite")
    moved = (tuned - base).abs().max().item()
    if not moved:
        raise RuntimeError("the adapter changes nothing in the pipeline")
    print(f"{len(wanted)} adapter tensors in {size.pipeline}; the clip moved by {moved:.2g} of 1")


def run(name: str, command: list[str]) -> dict[str, object]:
    """Seconds and peak memory of a stage's process; SystemExit: it failed."""
    print(f"\n---- {name}: {' '.join(command[1:])}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return {
        "stage": name,
        "seconds": round(seconds, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
    }


def stages(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """All of them, one after the other; a row each."""
    size = SIZES[args.family]
    model, encoded, out = (folder / name for name in ("model", "encoded", "run"))
    here, device = [sys.executable, "-m", "bench.true_size"], str(args.device)
    own = ["--family", args.family, "--text_encoder", args.text_encoder, "--device", device]
    own += ["--folder", str(folder)]
    fastpref = [sys.executable, "-c", "import sys; from fastpref.cli import main; sys.exit(main())"]
    family = ["--family", size.architecture.family, "--model", str(model), "--device", device]
    frames, height, width = size.clip.split("x")
    clip = ["--num_frames", frames, "--height", height, "--width", width]
    few = ["--dtype", "bfloat16", "--batch_size", str(len(PROMPTS))]  # no more text than there is
    flags, online = (
        [part for key, value in values.items() for part in (f"--{key}", str(value))]
        for values in (
            RUN,
            {k: v for k, v in RUN.items() if k not in ("objective", "beta")} | ONLINE,
        )
    )

    def train(steps: int) -> list[str]:
        data = ["--data", str(encoded), "--output_dir", str(out)]
        return [*fastpref, "train", *family, *data, *flags, "--max_train_steps", str(steps)]

    media = ["--data", str(folder / "media"), "--output_dir", str(encoded)]
    sampled = ["--data", str(folder / "media"), "--output_dir", str(folder / "spo")]
    commands = {
        "make": [*here, *own, "--stage", "make"],
        "encode": [*fastpref, "encode", *family, *media, *clip, *few],
        f"train, {FIRST} steps": train(FIRST),
        f"resume, to {LAST}": train(LAST),
        "spo, 2 steps": [*fastpref, "spo", *family, *sampled, *clip, *online],
        "load": [*here, *own, "--stage", "load"],
    }
    rows = []
    for name, command in commands.items():
        row = run(name, command)
        if name == "make":
            weights = list(model.rglob("*.safetensors"))
            row["disk_gb"] = round(sum(f.stat().st_size for f in weights) / 1e9, 2)
        written = (folder / "spo" if name.startswith("spo") else out) / "result.json"
        if written.exists() and name != "load":
            result = json.loads(written.read_text())
            row["s_per_pair"] = round(result["seconds_per_pair"], 2)
            row["margin_noise"] = result["margin_noise"]
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--family", choices=list(SIZES), required=True)
    encoders = "default: small, two layers of the true width"
    parser.add_argument("--text_encoder", choices=("small", "true"), default="small", help=encoders)
    kept = "where all is made, and kept; default: a temporary one"
    parser.add_argument("--folder", type=Path, help=kept)
    alone = "this stage alone, in this process; used by the command itself"
    parser.add_argument("--stage", choices=("make", "load"), help=alone)
    args = parser.parse_args(arguments)
    size = SIZES[args.family]
    if args.stage:
        if args.folder is None:
            parser.error("--stage needs --folder")
        if args.stage == "make":
            make(size, args.folder / "model", args.text_encoder)
            write_media(size, args.folder / "media")
        else:
            load(size, args.folder / "model", args.folder / "run", str(args.device))
        return
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"--folder {args.folder}: expected a new or an empty one")
    facts = timing.environment(args.device)  # of what is about to run
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        rows = stages(args, Path(folder))
    what = {"bench": "true_size", "family": args.family, "text_encoder": args.text_encoder}
    what |= {"clip": size.clip, "pairs": len(PROMPTS)}
    rows = [{**what, **row, **facts} for row in rows]
    print(
        f"\n{args.family}, random weights, {rows[0]['disk_gb']} GB on disk, text encoder"
        f" {args.text_encoder}, {len(PROMPTS)} pairs of {size.clip}\n{facts['device']},"
        f" {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n"
        f"{'stage':<16} {'seconds':>8} {'peak GB':>8} {'s/pair':>7}"
    )
    for row in rows:
        pair = row.get("s_per_pair", "-")
        print(f"{row['stage']:<16} {row['seconds']:8.1f} {row['peak_gb']:8.2f} {pair:>7}")
    timing.append(args.output, rows)


if __name__ == "__main__":
    main()
