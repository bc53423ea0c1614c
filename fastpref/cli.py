"""The `fastpref` command, in one file: thin wrappers; a mistake is one line and exit code 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fastpref

from . import ranks
from .faults import ended, interrupt, leaving, on_signals
from .progress import printable

if TYPE_CHECKING:
    from .run.parsing import Parser

USAGE = """usage: fastpref COMMAND [options]   (fastpref COMMAND --help, fastpref --version)

  demo      make preference pairs with a tiny video model, train on them, print who wins
  train     train on your own pairs:   fastpref train --config FILE [--field value ...]
  encode    media and prompts to latents and embeddings, once
  cache-reference   what the reference says of every pair and draw, once: same flags as train
  sweep     several objectives and betas on the same pairs and draws: same flags as train
  spm       a step-aware preference model from pairs and a CLIP, to score what spo samples
  spo       train on the model's own steps: fastpref spo --config FILE [--field value ...]
  sample    clips from a model, with or without an adapter
  eval      errors and implicit accuracy of a tuned model on encoded pairs
  export    an adapter file for diffusers or ComfyUI, from a run's or any other tool's
  report    plots and one HTML page of a run
  doctor    what is installed; with --family what a run of train would need of a card
"""

FAMILY = "wan, cogvideox, stable_diffusion, toy, or a module"
ALONE = ("sample", "eval", "export", "report", "doctor")  # in one process
DAY = 86_400.0  # seconds
EVAL_SEED = 1_000_003  # of noise and times that no training with a seed of its own has seen


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 user error, 2 diverged, 75 interrupted but saved."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["help"]
    return ended(name, lambda: command(name, rest))


def command(name: str, rest: list[str]) -> None:
    commands = {"demo": demo, "train": train, "encode": encode, "sample": sample}
    commands |= {"spm": spm, "spo": spo, "cache-reference": cache_reference, "sweep": sweep}
    commands |= {"eval": evaluate, "export": export, "report": report, "doctor": doctor}
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"fastpref {fastpref.__version__}")
    elif name not in commands:
        raise ValueError(f"expected one of {', '.join(commands)}")
    elif ranks.world() > 1 and name in ALONE:
        raise ValueError("runs in one process: start it without torchrun")
    else:
        # The import of torch takes seconds, and may swallow a KeyboardInterrupt.
        on_signals(leaving(name))
        import torch  # noqa: F401

        on_signals(interrupt)
        if (code := ranks.ended_for_good()) is not None:
            raise SystemExit(code)
        commands[name](rest)


def parser(name: str, what: str) -> Parser:
    from .run.parsing import Parser

    return Parser(prog=f"fastpref {name}", description=what)


def demo(rest: list[str]) -> None:
    from .demo.run import main as run

    run(rest)


def train(rest: list[str]) -> None:
    from .run.folder import alone
    from .run.parsing import parse
    from .run.train import train as run

    config = parse(rest)
    with ranks.group(config.timeout), alone(Path(config.output_dir)):
        result = run(config)
    speed = f"{result['seconds_per_pair']:.3g} s/pair"
    print(printable(f"{result['artifact']}: step {result['global_step']}, {speed}"))


def spm(rest: list[str]) -> None:
    from .run.folder import alone
    from .run.parsing import parse
    from .spo.spm import train as run
    from .spo.spm_config import SPMConfig

    config = parse(rest, "fastpref spm", SPMConfig)
    with ranks.group(config.timeout), alone(Path(config.output_dir), "spm"):
        result = run(config)
    speed = f"{result['seconds_per_pair']:.3g} s/pair"
    print(printable(f"{result['artifact']}: step {result['global_step']}, {speed}"))


def spo(rest: list[str]) -> None:
    from .run.folder import alone
    from .run.parsing import parse
    from .spo.config import SPOConfig
    from .spo.loop import spo as run

    config = parse(rest, "fastpref spo", SPOConfig)
    with ranks.group(config.timeout), alone(Path(config.output_dir), "spo"):
        result = run(config)
    print(printable(f"{result['artifact']}: step {result['global_step']}"))
    if spent := result.get("online"):
        rows, decodes = (spent[f"online/{name}_per_pair"] for name in ("network_rows", "decodes"))
        print(
            f"{spent['pairs']} pairs kept of {spent['judged']} judged; to sample one took "
            f"{rows:.1f} rows of the network and {decodes:.1f} decodes, all of them "
            f"{spent['seconds']:.0f} s"
        )


def encode(rest: list[str]) -> None:
    from . import models
    from .pairs.encode import DTYPES, POSTERIORS
    from .pairs.encode import encode as run
    from .run import belong
    from .run.parts import place

    options = parser("encode", "Media and prompts to latents and embeddings, one file per pair.")
    add = options.add_argument
    add("--data", required=True, help="folder with metadata, metadata file, or HF dataset")
    add("--family", help=FAMILY)
    add("--model", help="diffusers model folder or hub id")
    add("--output_dir", help="the encoded set; the same command run again goes on")
    add("--num_frames", type=int, help="frames per clip; default: all of them")
    add("--height", type=int, help="frames are scaled and cropped in the middle to this size")
    add("--width", type=int)
    add("--fps", type=float, help="take frames at this rate; default: num_frames evenly")
    add("--dtype", default="float32", choices=DTYPES, help="of encoders and latents; float32")
    add("--num_workers", type=int, default=2, help="decoding threads; default: 2")
    add("--batch_size", type=int, default=8, help="prompts per call of the text encoder; 8")
    add("--ranked", default="all", choices=("all", "best_worst"), help="pairs of ranked candidates")
    add("--split", default="train", help="of a Hugging Face dataset")
    add("--ties", default="drop", choices=("drop", "keep"), help="keep: for fastpref spm")
    add("--posterior", default="mode", choices=POSTERIORS, help="of the VAE: mode, or keyed sample")
    add("--seed", type=int, help="of --posterior sample; default: 0")
    add("--device", help="default: cuda where there is one")
    add("--dry_run", action="store_true", help="count, measure and list bad rows without a model")
    found = vars(options.parse_args(rest))
    if found.pop("dry_run"):
        return survey(found)
    missing = [f"--{n}" for n in ("family", "model", "output_dir") if found[n] is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} required (except with --dry_run)")
    place(found["device"])
    belong.check(models.family(found["family"]), found["model"])
    with ranks.group(DAY):  # for the longest share, and while rank 0 goes over all rows
        run(**found)


def survey(options: dict) -> None:
    """`fastpref encode --dry_run`."""
    from . import models
    from .models.encoders import check_size
    from .pairs.encode import check_workers
    from .pairs.media import Sampling
    from .pairs.prepare import survey as run

    check_workers(options["num_workers"])
    names = ("num_frames", "height", "width", "fps")
    sampling = Sampling(**{name: options[name] for name in names})
    if options["family"] and options["model"]:
        size = (options[name] for name in names[:3])
        check_size(models.family(options["family"]), options["model"], *size)
    shared = {name: options[name] for name in ("num_workers", "ranked", "split", "ties")}
    found = run(options["data"], sampling=sampling, **shared)
    for row in found["bad_rows"]:
        print(printable(str(row)))
    print(found["counts"])
    if found["refused"]:
        raise ValueError(found["refused"])
    for name in ("frames", "seconds"):
        low, middle, high = found[name]
        print(f"{name}: {low:g} to {high:g}, median {middle:g}")
    print("sizes: " + ", ".join(f"{n} of {size}" for size, n in found["sizes"].items()))


def cache_reference(rest: list[str]) -> None:
    from .run.caching import cache_reference as run
    from .run.parsing import parse

    config = parse(rest, "fastpref cache-reference")
    with ranks.group(max(DAY, config.timeout)):  # for the longest share
        folder, count = run(config)
    print(printable(f"{folder}: {count} errors computed"))


def sweep(rest: list[str]) -> None:
    """Trains every objective at every beta into a folder of its own; one encoding, one cache.

    An option that belongs to some objectives only (alpha, clip, importance_steps, ...) is given to
    those. Killed and started again it goes on.
    """
    from .run.config import OFFLINE
    from .run.folder import alone
    from .run.parsing import betas, config_values, names
    from .run.sweep import configs, encode_once, table
    from .run.train import train as run

    options = parser("sweep", sweep.__doc__)
    options.add_argument("--objectives", required=True, help=f"with commas, of {','.join(OFFLINE)}")
    options.add_argument("--betas", required=True, help="with commas")
    mine, rest = options.parse_known_args(rest)
    objectives = names("--objectives", mine.objectives, OFFLINE)
    strengths = betas("--betas", mine.betas)
    values = config_values(rest, "fastpref sweep", objective=None)
    runs = configs(values, objectives, strengths)
    folder = Path(values["output_dir"])
    with ranks.group(runs[0].timeout), alone(folder, "sweep"):
        encode_once(runs, folder)
        results = []
        for config in runs:
            print(printable(f"--- {config.output_dir}"))
            with alone(Path(config.output_dir)):
                results.append(run(config)["metrics"])
    print(table(runs, results))


def model_options(name: str, what: str, seed: int | None = None) -> Parser:
    options = parser(name, what)
    options.add_argument("--family", required=True, help=FAMILY)
    options.add_argument("--model", required=True, help="diffusers model folder")
    options.add_argument("--lora", help="adapter file, or the run's folder that holds it")
    if seed is not None:
        tuned = "folder of a run with tuning full, in place of --lora"
        options.add_argument("--tuned", help=tuned)
        options.add_argument("--seed", type=int, default=seed, help=f"default: {seed}")
        options.add_argument("--device", help="default: cuda where there is one")
    return options


def sample(rest: list[str]) -> None:
    options = model_options("sample", "Writes one clip per prompt as lossless mp4.", seed=0)
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
    count, size = len(options.prompts), (options.num_frames, options.height, options.width)
    from . import models
    from .look.sample import check_memory
    from .look.validation import Prompts
    from .models.encoders import check_size
    from .pairs.media import write_clip
    from .run import tuned
    from .run.folder import claim
    from .run.guard import within_memory
    from .run.parts import place

    check_memory(count, *size)
    folder = Path(options.output_dir)
    claim(folder, "sample")  # clips overwrite those of an earlier sample, never a user's own
    device, _ = place(options.device)
    family = models.family(options.family)
    check_size(family, options.model, *size)
    model, tune, _ = tuned.opened(family, options.model, device, options.lora, options.tuned)
    if tune is not None:
        tune()
    scale = options.guidance_scale
    seeds = [options.seed + i for i in range(count)]
    what = "x".join(map(str, size)) + f" x {count}: lower --num_frames, --height or --width, or "
    with within_memory(f"{what}sample fewer --prompts at once"):
        prompts = Prompts(family, options.model, options.prompts, device, guidance_scale=scale)
        clips = prompts.clips(model, prompts.shape(*size), options.steps, seeds)
    for seed, prompt, clip in zip(seeds, options.prompts, clips, strict=True):
        path = folder / f"{seed:04d}.mp4"
        write_clip(path, clip, options.fps)
        print(printable(f"{path}: {prompt}"))


def evaluate(rest: list[str]) -> None:
    what = "Errors of a tuned model on encoded pairs, relative to its base's: -0.05 is 5 % below."
    options = model_options("eval", what, seed=EVAL_SEED)
    options.add_argument("--data", required=True, help="a set made by fastpref encode")
    options.add_argument("--draws_per_pair", type=int, default=8)
    options = options.parse_args(rest)
    if options.draws_per_pair < 1:
        raise ValueError(f"--draws_per_pair: expected 1 or more, got {options.draws_per_pair}")
    if not options.lora and not options.tuned:
        raise ValueError("--lora is required: the run's folder, or its adapter file; or --tuned")
    from . import models
    from .look.evaluate import against_base
    from .run import tuned
    from .run.parts import make_process, place

    device, _ = place(options.device)
    family = models.family(options.family)
    given = (options.model, device, options.lora, options.tuned, options.data)
    model, tune, dataset = tuned.opened(family, *given)
    process = make_process(family, options.model)
    how = {"seed": options.seed, "draws_per_pair": options.draws_per_pair, "tune": tune}
    print(json.dumps(against_base(model, family, process, dataset, **how)))


def export(rest: list[str]) -> None:
    """An adapter in another key form, at the same strength; of the model its config is read."""
    from .run import adapters, artifact

    options = model_options("export", export.__doc__)
    options.add_argument("--format", required=True, choices=adapters.FORMATS)
    options.add_argument("--output", required=True, help="a new .safetensors file")
    print(printable(str(artifact.convert(**vars(options.parse_args(rest))))))


def report(rest: list[str]) -> None:
    options = parser("report", "Curves and one HTML page of a training run, into its folder.")
    options.add_argument("run", help="output folder of fastpref train")
    from .look.report import run_report

    print(printable(str(run_report(Path(options.parse_args(rest).run)))))


def doctor(rest: list[str]) -> None:
    """Without flags what is installed; with --family what a run of `fastpref train` would need."""
    options = parser("doctor", doctor.__doc__)
    options.add_argument("--shape", help="FRAMESxHEIGHTxWIDTH; default: the data's, or the model's")
    options.add_argument("--card", help="h100-80, h200, or memory in GiB; default: the one here")
    mine, flags = options.parse_known_args(rest)
    if rest:
        forecast(mine.shape, mine.card, flags)
        return
    import importlib.metadata

    import torch

    required = ("torch", "diffusers", "transformers", "peft", "safetensors", "av")
    for package in (*required, "xformers", "flash-attn"):
        try:
            print(f"{package:14}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:14}not installed")
    for key, value in fastpref.build_info().items():
        if value is not None and value != "":
            print(f"{key:14}{value}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'GPU':14}{', '.join(gpus) or 'none'}")


def forecast(shape: str | None, card: str | None, flags: list[str]) -> None:
    """`fastpref doctor --family ...`: the choices of a run, and the flags of the best that fits."""
    from .run.fitting import card_for, needs
    from .run.parsing import config_values

    open_ = dict.fromkeys(("pair_mode", "checkpointing", "compile", "mixed_precision"))
    required = ("family", "model", "data", "output_dir")
    absent = [word for name in required for word in (f"--{name}", "")]
    values = config_values([*absent, *flags], "fastpref doctor", **open_)
    if not values["family"]:
        raise ValueError("--family: needed to say what a run would need")
    print(needs(values, shape, card_for(card, values["device"])))
