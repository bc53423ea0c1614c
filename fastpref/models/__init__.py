"""Model families: one module each with the nine names the rest of fastpref uses."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType

# What a family's functions are called with, by position.
CALLS = {
    "load": ("path", "dtype"),
    "process": ("scheduler_config",),
    "predict": ("model", "noisy", "t", "cond"),
    "pipeline": ("path", "dtype"),
    "encode_media": ("pipe", "frames"),
    "encode_text": ("pipe", "prompts"),
    "decode": ("pipe", "latents"),
}
# Modules here that are no families.
HELPERS = ("encoders", "folder", "names", "published", "weights")
NAMES = ("LORA_TARGETS", "BLOCKS", *CALLS)


def family(name: str) -> ModuleType:
    """The module of a family: a bare name from this package, a dotted one imported as it is.

    Raises:
        ValueError: no such module, one that fails, or one without the nine names as `CALLS` has
            them.
    """
    module = load_module(name)
    missing = [attribute for attribute in NAMES if not hasattr(module, attribute)]
    if missing:
        raise ValueError(f"family {name}: {module.__name__} lacks {', '.join(missing)}")
    for function, arguments in CALLS.items():
        try:
            inspect.signature(getattr(module, function)).bind(*arguments)
        except TypeError as error:
            raise ValueError(
                f"family {name}: {module.__file__}: {function} must take ({', '.join(arguments)}): "
                f"{error}"
            ) from None
    return module


def load_module(name: str) -> ModuleType:
    """The module of a family, whatever it has; ValueError where it cannot be imported."""
    target = name if "." in name else f"{__name__}.{name}"
    try:
        if target.startswith("."):  # relative, to nothing
            raise ModuleNotFoundError(name=target)
        return search(target)
    except ModuleNotFoundError as error:
        if not within(error.name, target):
            raise ValueError(f"family {name}: needs the package {error.name}; install it") from None
        known = ", ".join(m.name for m in pkgutil.iter_modules(__path__) if m.name not in HELPERS)
        raise ValueError(
            f"family: expected one of {known} or a module such as my_pkg.mine, got {name!r}, which "
            f"is neither installed nor in {Path.cwd()}"
        ) from None
    except Exception as error:  # whatever its code raises
        raise ValueError(f"family {name}: {target} cannot be imported: {origin(error)}") from error


def origin(error: Exception) -> str:
    """Where a user's code failed and how: `FILE, line N: TYPE: what it says`."""
    if isinstance(error, SyntaxError):
        file, line, said = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        last = [f for f in frames if not f.filename.startswith("<frozen importlib")][-1]
        file, line, said = last.filename, last.lineno, error
    return f"{file}, line {line}: {type(error).__name__}: {said}"


def search(target: str) -> ModuleType:
    """Imports a module, at last from the current folder: `python -m` has it on its path, an
    installed command does not.
    """
    here = str(Path.cwd())
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if here in sys.path or not within(error.name, target):
            raise
    sys.path.append(here)  # it stays there: the module may import its neighbours later
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError:
        sys.path.remove(here)
        raise


def within(name: str | None, target: str) -> bool:
    """Whether a module's name is `target` or that of a package that it is in."""
    return f"{target}.".startswith(f"{name}.")
