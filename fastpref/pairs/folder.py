"""Folder: the file of a data folder that a row's name means, and no file outside of it."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from .media import MediaError


class Folder:
    """A data folder (`root`, without links) whose files are found by the names rows give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> Path:
        """The file; MediaError: `outside` of the folder, or `missing_file`.

        The name as it is goes first; then that of which it is another composition (NFC, NFD: macOS
        and Linux write accents differently).
        """
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            reason = f"{name!r} must be relative to the data folder, without '..'"
            raise MediaError("outside", reason)
        try:
            full = (self.root / path).resolve()
            if not full.is_relative_to(self.root):
                if self._in_hub_cache(self.root / path, full):
                    return self.root / path  # full's own name is a digest
                reason = f"{name!r} is a link that leaves the data folder; copy the file into it"
                raise MediaError("outside", reason)
            if full.is_file():
                return full
            alike = self._alike(name)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            alike = []  # no name that a file can have
        same = [other for other in alike if nfc(other) == nfc(str(path))]
        if len(same) == 1:
            return self.find(same[0])
        said = f"{name!r:.300} is not a file in {self.root}"
        if alike:
            known = "one of " * (len(alike) > 1) + " and ".join(map(ascii, sorted(alike)[:4]))
            said = f"{said}; expected {known}, almost the same name"
        raise MediaError("missing_file", said)

    def _alike(self, name: str) -> list[str]:
        """The files whose names differ in case, composition, slashes or outer spaces alone."""
        found = [""]
        for part in Path(name.replace("\\", "/")).parts:
            found = [
                os.path.join(folder, known)
                for folder in found
                for known in self._listed(self.root / folder).get(folded(part), ())
            ]
        return [other for other in found if other and (self.root / other).is_file()]

    def _listed(self, folder: Path) -> dict[str, list[str]]:
        """Names in a folder of this one by what they are folded to, listed once."""
        folder = folder.resolve()
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            if folder.is_dir() and folder.is_relative_to(self.root):
                for known in os.listdir(folder):
                    names.setdefault(folded(known), []).append(known)
            self._names[folder] = names
        return self._names[folder]

    def _in_hub_cache(self, link: Path, full: Path) -> bool:
        """Whether a link of a Hugging Face cache leads at once into its own repository's blobs:
        models--OWNER--NAME/snapshots/COMMIT/... -> models--OWNER--NAME/blobs/DIGEST.
        """
        above = [self.root, *self.root.parents]
        snapshots = next(
            (folder.parent for folder in above if folder.parent.name == "snapshots"), None
        )
        if snapshots is None or not snapshots.parent.name.startswith(("models--", "datasets--")):
            return False
        folder = link.parent.resolve()
        if not (folder.is_relative_to(self.root) and link.is_symlink() and full.is_file()):
            return False
        at_once = Path(os.path.normpath(folder / os.readlink(link)))
        return at_once == full and full.parent == snapshots.parent / "blobs"


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A file name without what is easily lost: composition, case, outer spaces."""
    return unicodedata.normalize("NFKC", name).casefold().strip()
