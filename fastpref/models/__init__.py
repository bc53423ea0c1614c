"""Model families: one module each with the nine names the rest of fastpref uses."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

NAMES = (
    *("LORA_TARGETS", "BLOCKS", "load", "process", "predict"),
    *("pipeline", "encode_media", "encode_text", "decode"),
)


def family(name: str) -> ModuleType:
    """The module of a family: a bare name from this package, a dotted one imported as it is.

    Raises:
        ValueError: no such module, or one without the nine names.
    """
    target = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if not target.startswith(error.name or ""):
            raise ValueError(f"family {name}: needs the package {error.name}; install it") from None
        found = [module.name for module in pkgutil.iter_modules(__path__)]
        known = ", ".join(name for name in found if name != "folder")
        raise ValueError(
            f"family: expected one of {known} or a module such as my_pkg.mine, got {name!r}"
        ) from None
    missing = [attribute for attribute in NAMES if not hasattr(module, attribute)]
    if missing:
        raise ValueError(f"family {name}: {module.__name__} lacks {', '.join(missing)}")
    return module
