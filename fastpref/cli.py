"""The `fastpref` command: thin wrappers; a user's mistake is one line and exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

USAGE = """usage: fastpref COMMAND [options]   (fastpref COMMAND --help)

  demo      make preference pairs with a tiny video model, train on them, print who wins
  train     train on your own pairs:   fastpref train --config FILE [--field value ...]
  encode    media and prompts to latents and embeddings, once
  cache-reference   what the reference says of every pair and draw, once: same flags as train
  sample    clips from a model, with or without an adapter
  eval      errors and implicit accuracy of an adapter on encoded pairs
  report    plots and one HTML page of a run
  doctor    what is installed and what was compiled
"""

OK, USER_ERROR, DIVERGED, INTERRUPTED = 0, 1, 2, 75


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 user error, 2 diverged, 75 interrupted but saved."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return OK
    name, *rest = arguments
    commands = {"demo": demo, "train": train, "encode": encode, "sample": sample}
    commands |= {"cache-reference": cache_reference}
    commands |= {"eval": evaluate, "report": report, "doctor": doctor}
    if name not in commands:
        print(f"fastpref: expected one of {', '.join(commands)}, got {name}", file=sys.stderr)
        return USER_ERROR
    from safetensors import SafetensorError
    from yaml import YAMLError

    from .guard import Diverged, Interrupted

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        commands[name](rest)
    except (ValueError, TypeError, OSError, YAMLError, SafetensorError) as error:
        if os.environ.get("FASTPREF_TRACEBACK"):  # for a bug report
            raise
        print(f"fastpref {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except Diverged as error:
        print(f"fastpref {name}: diverged: {error}", file=sys.stderr)
        return DIVERGED
    except Interrupted as error:
        print(f"fastpref {name}: interrupted: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"fastpref {name}: interrupted; run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    return OK


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and exit code 1, like every other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise ValueError(message)


def parser(name: str, what: str) -> Parser:
    return Parser(prog=f"fastpref {name}", description=what)


def demo(rest: list[str]) -> None:
    from .demo.run import main as run

    run(rest)


def train(rest: list[str]) -> None:
    from .assemble import alone
    from .config import parse
    from .train import train as run

    config = parse(rest)
    with alone(Path(config.output_dir)):
        result = run(config)
    speed = f"{result['seconds_per_pair']:.3g} s/pair"
    print(f"{result['artifact']}: step {result['global_step']}, {speed}")


def encode(rest: list[str]) -> None:
    from . import encode as module

    module.main(rest)


def cache_reference(rest: list[str]) -> None:
    """With torchrun each process fills its share, on the GPU of its local rank."""
    import torch

    from .assemble import cache_reference as run
    from .config import parse

    config = parse(rest, "fastpref cache-reference")
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if config.device is None and world > 1 and torch.cuda.is_available():
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    folder, count = run(config, rank, world)
    print(f"{folder}: {count} pairs computed, {config.draws_per_pair} draws each")


def model_options(name: str, what: str) -> Parser:
    options = parser(name, what)
    options.add_argument(
        "--family",
        required=True,
        help="wan, cogvideox, stable_diffusion, toy, or a module",
    )
    options.add_argument("--model", required=True, help="diffusers model folder")
    options.add_argument("--lora", help="adapter file, or the run's folder that holds it")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cpu")
    return options


def load(options: argparse.Namespace) -> tuple:
    """The family, its process and the model, with the adapter in it where one is named."""
    import torch

    from . import checkpoint, models
    from .assemble import device_of
    from .models.folder import scheduler_config

    device = device_of(options.device)
    family = models.family(options.family)
    model = family.load(options.model, torch.float32)
    if options.lora:
        checkpoint.load_lora(options.lora, model)
    process = family.process(scheduler_config(options.model))
    return family, process, model.to(device).eval()


def sample(rest: list[str]) -> None:
    options = model_options("sample", "Writes one clip per prompt as lossless mp4.")
    options.add_argument("--prompts", nargs="+", required=True)
    options.add_argument("--output_dir", required=True)
    for name, what in (("num_frames", "frames"), ("height", "pixels"), ("width", "pixels")):
        options.add_argument(f"--{name}", type=int, required=True, metavar=what.upper())
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--guidance_scale", type=float, default=1.0, help="1: none")
    options.add_argument("--fps", type=float, default=8)
    options = options.parse_args(rest)
    for name in ("num_frames", "height", "width", "fps", "steps"):
        if not 0 < getattr(options, name) < 10_000:
            raise ValueError(f"--{name}: expected 1 to 9999, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**62 or not abs(options.guidance_scale) < 1000:
        raise ValueError("expected --seed of 0 or more and a --guidance_scale below 1000")
    import torch

    from .media import write_clip
    from .validation import Prompts

    family, process, model = load(options)
    prompts = Prompts(
        family,
        process,
        options.model,
        options.prompts,
        torch.device(options.device),
        guidance_scale=options.guidance_scale,
    )
    seeds = [options.seed + i for i in range(len(options.prompts))]
    shape = prompts.shape(options.num_frames, options.height, options.width)
    clips = prompts.clips(model, shape, options.steps, seeds)
    for seed, prompt, clip in zip(seeds, options.prompts, clips, strict=True):
        path = Path(options.output_dir) / f"{seed:04d}.mp4"
        write_clip(path, clip, options.fps)
        print(f"{path}: {prompt}")


def evaluate(rest: list[str]) -> None:
    options = model_options(
        "eval", "Errors of an adapter and of its base on encoded pairs, same draws."
    )
    options.add_argument("--data", required=True, help="a set made by fastpref encode")
    options.add_argument("--draws_per_pair", type=int, default=8)
    options = options.parse_args(rest)
    if options.draws_per_pair < 1:
        raise ValueError(f"--draws_per_pair: expected 1 or more, got {options.draws_per_pair}")
    if not options.lora:
        raise ValueError("--lora is required: the run's folder, or its adapter file")
    from . import reference
    from .data import PairDataset
    from .evaluate import errors, relative_errors

    family, process, model = load(options)
    dataset = PairDataset(options.data)
    how = {"seed": options.seed, "draws_per_pair": options.draws_per_pair}
    policy = errors(model, family, process, dataset, **how)
    with reference.disabled(reference.adapter_layers(model)):
        base = errors(model, family, process, dataset, **how)
    margin = (policy - base)[:, 1] - (policy - base)[:, 0]
    winner, loser = relative_errors(policy, base)
    accuracy = ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()
    result = {
        "pairs": len(dataset),
        "implicit_acc": accuracy,
        "winner_error": winner,
        "loser_error": loser,
    }
    print(json.dumps(result))


def report(rest: list[str]) -> None:
    options = parser("report", "Curves and one HTML page of a training run, into its folder.")
    options.add_argument("run", help="output folder of fastpref train")
    from .report import run_report

    print(run_report(Path(options.parse_args(rest).run)))


def doctor(rest: list[str]) -> None:
    parser("doctor", "What is installed and what was compiled.").parse_args(rest)
    import importlib.metadata

    import torch

    import fastpref

    required = ("torch", "diffusers", "transformers", "peft", "safetensors", "av")
    for package in (*required, "xformers", "flash-attn"):
        try:
            print(f"{package:14}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:14}not installed")
    for key, value in fastpref.build_info().items():
        print(f"{key:14}{value}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'GPU':14}{', '.join(gpus) or 'none'}")
