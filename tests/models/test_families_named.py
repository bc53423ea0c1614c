"""Families by name: where their modules are looked for, and what is said of one that fails."""

import pkgutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from fastpref import models
from fastpref.models import CALLS, family, toy

MINE = "from fastpref.models.toy import *\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, not on the path, with a package for a family in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "my_pkg").mkdir()
    yield tmp_path / "my_pkg"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_a_family_in_the_current_folder(project):
    (project / "mine.py").write_text(MINE + "def later():\n    import my_pkg.other\n")
    (project / "other.py").touch()
    module = family("my_pkg.mine")
    assert module.predict is toy.predict
    module.later()


def test_the_installed_command_finds_a_family_in_the_current_folder(project):
    """A console script has its own folder on the path in place of the current one."""
    (project / "mine.py").write_text(MINE + "print(__name__)\nraise SystemExit\n")
    script = project / "fastpref"
    script.write_text("import sys\nfrom fastpref.cli import main\nsys.exit(main())\n")
    where = ["--output_dir", "run", "--model", "x", "--data", "x", "--beta", "1"]
    command = [sys.executable, str(script), "train", "--family", "my_pkg.mine", *where]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project.parent)
    assert (done.stdout, done.stderr) == ("my_pkg.mine\n", "")


@pytest.mark.parametrize("name", ["nothing", "my_pkg.nothing", "no.where", ".mine", "..", "./m.py"])
def test_a_family_that_is_nowhere(name, project):
    before = list(sys.path)
    (project / "mine.py").write_text(MINE)
    with pytest.raises(
        ValueError, match=r"^family: expected one of .*toy.* my_pkg.mine, "
    ) as error:
        family(name)
    assert str(error.value).endswith(
        f"got {name!r}, which is neither installed nor in {Path.cwd()}"
    )
    assert sys.path == before


@pytest.mark.parametrize(
    ("code", "line", "says"),
    [
        ("1 / 0", 2, "ZeroDivisionError: division by zero"),
        ("def f(:", 2, "SyntaxError: invalid syntax"),
        ("from json import nothing", 2, "ImportError: cannot import name 'nothing' from 'json'"),
        ("import my_pkg.bad_core", 2, "ImportError: "),
        ("\nraise ValueError('a\\nb')", 3, "ValueError: a\nb"),
    ],
)
def test_a_family_whose_code_fails(code, line, says, project):
    (project / "mine.py").write_text(MINE + code)
    (project / f"bad_core{EXTENSION_SUFFIXES[0]}").write_text("no library")
    with pytest.raises(ValueError) as error:
        family("my_pkg.mine")
    where = f"my_pkg.mine cannot be imported: {project / 'mine.py'}, line {line}: "
    assert str(error.value).startswith(f"family my_pkg.mine: {where}{says}")


def test_a_family_that_needs_a_package(project):
    """Also one whose name is the beginning of the family's."""
    for package in ("no_such_package", "my"):
        (project / f"{package}s.py").write_text(f"import {package}")
        with pytest.raises(ValueError, match=f"{package}s: needs the package {package}; install"):
            family(f"my_pkg.{package}s")


@pytest.mark.parametrize("function", CALLS)
def test_a_family_with_a_function_of_another_signature(function, project):
    (project / "mine.py").write_text(MINE + f"def {function}(): pass\n")
    expected = f"{function} must take ({', '.join(CALLS[function])}): too many positional arguments"
    with pytest.raises(ValueError) as error:
        family("my_pkg.mine")
    assert str(error.value) == f"family my_pkg.mine: {project / 'mine.py'}: {expected}"


def test_a_family_with_a_function_that_is_none(project):
    (project / "mine.py").write_text(MINE + "predict = 3\n")
    with pytest.raises(ValueError, match=r"predict must take \(model, .*\): 3 is not a callable"):
        family("my_pkg.mine")


def test_every_module_of_models_is_a_family_or_a_helper():
    there = {module.name for module in pkgutil.iter_modules(models.__path__)}
    with pytest.raises(ValueError) as error:
        models.family("zzz")
    named = str(error.value).partition("expected one of ")[2].partition(" or ")[0].split(", ")
    assert set(named) == there - set(models.HELPERS)
    for name in named:
        models.family(name)
