"""Preference optimisation of video diffusion models on compiled kernels: the public names."""

import importlib

_PLACES = {
    "loss.native": ("build_info",),
    "loss.objectives": ("DMPO", "DPO", "DPOCM", "IPO", "SDPO", "SPO", "Hinge", "objective"),
    "loss.functional": (
        "Draws",
        "PairLoss",
        "Target",
        "add_noise",
        "loss_from_errors",
        "pair_cross",
        "pair_error",
        "preference_loss",
        "unit_seed",
    ),
    "process": ("Diffusion", "FlowMatching"),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}
_MODULES = {
    "oracle": "loss.oracle",
    "objectives": "loss.objectives",
    "functional": "loss.functional",
    "process": "process",
}

__all__ = [*_HOME, *_MODULES]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import a public name where it is first used, so that `import fastpref` costs nothing."""
    if name in _MODULES:
        return importlib.import_module(f"fastpref.{_MODULES[name]}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"fastpref.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
