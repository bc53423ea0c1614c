"""`fastpref cache-reference`: the reference's errors of a run, computed ahead of it."""

from __future__ import annotations

import time
from pathlib import Path

from .. import models
from ..pairs.dataset import collate
from ..step import attention, cache, compiling, filling, reference
from ..step.graphs import recorded_pass
from . import belong
from .assemble import DATA, DRAWS, cache_folder, cached, noising
from .config import Config
from .folder import claim
from .parts import (
    load_model,
    make_process,
    open_data,
    pick_attention,
    place,
    predictor,
    preparer,
    weights_dtype,
)


def cache_reference(config: Config, rank: int = 0, world: int = 1) -> tuple[Path, int]:
    """Fills the reference cache of the run that `config` says; returns (folder, errors computed).

    A run fills what it needs itself: this is to be ahead of it, or on more devices. Killed and
    called again it goes on. Each rank of world fills its share, on its own device.

    Raises:
        ValueError: as `train`, a reference other than cached, or several ranks and no encoded set.
    """
    if config.reference != "cached":
        raise ValueError(
            f"cache-reference fills what reference cached reads, got reference {config.reference}: "
            "set reference: cached, here and in training"
        )
    out, own = Path(config.output_dir), Path(config.reference_cache or ".").resolve()
    encoded = (Path(config.data) / "index.parquet").exists()
    if not encoded and world > 1:
        raise ValueError(
            f"data {config.data}: several ranks need a set made by fastpref encode; run it first"
        )
    if not encoded or (config.reference_cache and own.is_relative_to(out.resolve())):
        claim(out)  # the run's folder, where its encoded set, or the cache, will be
    device, dtype = place(config.device, config.mixed_precision)
    family = models.family(config.family)
    dataset = open_data(config.data, out, dtype=dtype, **config.only(*DATA))
    process = make_process(family, config.model, **noising(config))
    kept = weights_dtype(config.tuning, dtype)
    model = load_model(family, config.model, device, kept)
    belong.warn_of_another_model(config.model, dataset)
    prepare = preparer(dataset, device, dtype, **config.only(*DRAWS))
    where = cache_folder(config.reference_cache, dataset)
    says = reference.base(model, predictor(family, device, dtype))

    def probe() -> None:
        batch, draws = prepare(0, collate([dataset[0]] * config.train_batch_size))
        reference.errors(says, process, batch, draws, config.pair_mode)

    if rank and config.attention == "auto" and device.type == "cuda":
        wait_for(where / "fingerprint.json")  # rank 0 picks for all
    backend = pick_attention(config.attention, model, probe, device, cache.recorded(where))
    if rank == 0:
        print(f"attention  {backend}")
    with attention.use(model, backend.name):
        if config.compile:
            compiling.compile_blocks(model, family.BLOCKS)
        errors, _ = cached(config, dataset, process, device, dtype, backend.name)
        says = recorded_pass(says, device) if config.cuda_graphs else says
        ahead = {"num_workers": config.num_workers}
        count = filling.fill(errors, says, process, prepare, rank=rank, world=world, **ahead)
    return where, count


def wait_for(path: Path, seconds: float = 600) -> None:
    """Until another rank has written `path`; ValueError: it has not."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ValueError(f"{path}: rank 0 has not written it in {seconds:g} s; look at its log")
        time.sleep(0.2)
