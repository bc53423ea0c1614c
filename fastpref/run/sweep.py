"""A sweep: runs of several objectives and betas over the same pairs and draws, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .assemble import DATA
from .config import Config, belongs
from .parts import open_data, place


def configs(
    values: dict[str, Any], objectives: Sequence[str], betas: Sequence[float]
) -> list[Config]:
    """The runs, each in a folder of its own. An option that belongs to some objectives only is
    given to those.

    values: fields of a Config, of every run.

    Raises:
        ValueError: a value that the sweep sets itself, or that none of the objectives has.
    """
    for name in ("objective", "beta", "resume_from_checkpoint"):
        if values[name] is not None:
            raise ValueError(f"--{name} has no effect in a sweep: remove it")
    for name, value in values.items():
        if value is not None and not any(belongs(name, objective) for objective in objectives):
            raise ValueError(
                f"{name} has no effect with objectives {','.join(objectives)}: remove it"
            )
    runs, folder = [], Path(values["output_dir"])
    for objective in objectives:
        own = {k: v if belongs(k, objective) else None for k, v in values.items()}
        for beta in betas:
            where = str(folder / f"{objective}-beta{beta:g}")
            runs.append(Config(**own | {"objective": objective, "beta": beta, "output_dir": where}))
    return runs


def encode_once(runs: Sequence[Config], folder: Path) -> None:
    """Encodes their media into `folder`, and gives every run that set in their place."""
    first = runs[0]
    _, dtype = place(first.device, first.mixed_precision)
    data = open_data(first.data, folder, dtype=dtype, **first.only(*DATA)).folder
    for config in runs:
        if config.data != str(data):  # encoded now: its size is that of the set
            config.data = str(data)
            config.num_frames = config.height = config.width = config.fps = None


def table(runs: Sequence[Config], results: Sequence[dict[str, Any]]) -> str:
    """A line of the last metrics of each run."""
    head = f"{'objective':10}{'beta':>10}{'implicit acc':>14}{'margin':>12}{'chosen error':>19}"
    lines = [head]
    for config, metrics in zip(runs, results, strict=True):
        rise = metrics["errors/policy_w"] / metrics["errors/reference_w"] - 1
        lines.append(
            f"{config.objective:10}{config.beta:>10g}{metrics['implicit_acc']:>14.2f}"
            f"{metrics['rewards/margins']:>12.4g}{100 * rise:>17.1f} %"
        )
    return "\n".join(lines)
