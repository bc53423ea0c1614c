"""Fixtures shared by the tests: the devices at hand, the golden cases, a folder of pairs."""

import json
import os
from pathlib import Path

# Tiny models: a second thread gains nothing, and on a busy machine OpenMP's waiting costs 50 times
# the work. Before torch is imported, so that the processes started by tests have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device at hand."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def golden() -> list[dict]:
    """Cases with known losses and derivatives, float64, exact to 1e-12."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs of clips, as users have them."""
    from commands import write_pairs

    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def encoded_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoded set of six pairs, so that a file's runs share it and its cache."""
    from commands import encoded, write_pairs

    folder = tmp_path_factory.mktemp("data")
    return encoded(write_pairs(folder / "media", count=6), folder / "encoded").folder
