"""`fastpref cache-reference`: the reference's errors of a run, computed ahead of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import models, ranks
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


def cache_reference(config: Config) -> tuple[Path, int]:
    """Fills the reference cache of the run that `config` says; returns (folder, errors computed).

    A run fills what it needs itself: this is to be ahead of it. Killed and called again it goes on.
    Each of several processes computes its share, on its own device.

    Raises:
        ValueError: as `train`, or a reference other than cached.
    """
    if config.reference != "cached":
        raise ValueError(
            f"cache-reference fills what reference cached reads, got reference {config.reference}: "
            "set reference: cached, here and in training"
        )
    ranks.check_same("the config", config.to_dict())
    out, own = Path(config.output_dir), Path(config.reference_cache or ".").resolve()
    encoded = (Path(config.data) / "index.parquet").exists()
    if not encoded or (config.reference_cache and own.is_relative_to(out.resolve())):
        ranks.by_main(partial(claim, out))  # where its encoded set, or the cache, will be
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

    earlier = cache.recorded(where)
    pick = partial(pick_attention, config.attention, model, probe, device, earlier)
    backend = ranks.by_main(pick)
    print(f"attention  {backend}")
    with attention.use(model, backend.name):
        if config.compile:
            compiling.compile_blocks(model, family.BLOCKS)
        errors, _ = cached(config, dataset, process, device, dtype, backend.name)
        says = recorded_pass(says, device) if config.cuda_graphs else says
        mine = {"rank": ranks.rank(), "world": ranks.world(), "num_workers": config.num_workers}
        count = filling.fill(errors, says, process, prepare, **mine)
    return where, sum(ranks.gathered(count))
