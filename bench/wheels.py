"""What another machine lacks of fastpref's needs: `bash bench/device.sh --wheels NAMES`

NAMES is a file with the packages it has, as pip lists them or as words. Prints NAME==VERSION of all
else that fastpref and its tests need, and what those need in turn, as installed here. Without
NAMES: what this interpreter lacks, without versions, as it cannot know them.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

TESTS = ("pytest",)  # of all that tests of a GPU import, the project's needs apart


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lacking(needs: list[str], there: set[str] | None) -> dict[str, str]:
    """Name and version, empty if it is not installed here, of each need that is not `there`."""
    found: dict[str, str] = {}
    open_ = [(Requirement(need), ("",)) for need in needs]
    while open_:
        need, extras = open_.pop()
        name = plain(need.name)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
        if not wanted or name in found or (there is not None and name in there):
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
            continue
        if there is None:  # it is here, and so is what it needs
            continue
        found[name] = package.version
        open_ += [(Requirement(each), ("", *need.extras)) for each in package.requires or ()]
    return found


def main(arguments: list[str]) -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    needs, there = [*project["project"]["dependencies"], *TESTS], None
    if arguments:
        try:
            text = Path(arguments[0]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(
                f"--wheels {arguments[0]}: expected a list of packages ({error})"
            ) from None
        there = set(map(plain, re.findall(r"[A-Za-z][\w.-]*\w", text)))
    for name, version in sorted(lacking(needs, there).items()):
        print(f"{name}=={version}" if version else name)


if __name__ == "__main__":
    main(sys.argv[1:])
