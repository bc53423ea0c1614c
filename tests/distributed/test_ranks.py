"""What processes tell each other. The file is also what torchrun starts."""

from __future__ import annotations

import os
from pathlib import Path

import launch
import pytest

from fastpref import progress, ranks

pytestmark = pytest.mark.distributed


def fails(error: Exception) -> None:
    raise error


def last_save(error: Exception, **how) -> bool:
    """Whether a process makes one after rank 0's error in `by_main`; all say the same."""
    try:
        ranks.by_main(lambda: fails(error))
    except (ranks.Elsewhere, type(error)) as found:
        said = ranks.gathered(ranks.fail(found, **how))
        assert len(set(said)) == 1, said
        return said[0]
    raise AssertionError("all have it")


def main() -> None:
    with ranks.group(30):
        first = ranks.main()
        assert ranks.by_main(lambda: (first, b"0" * 100_000)) == (True, b"0" * 100_000)
        assert ranks.on_all(lambda: ranks.rank()) == ranks.gathered(ranks.rank()) == [0, 1, 2]
        assert ranks.of_main(ranks.rank()) == ([0, 1, 2] if first else [])

        # As the others were told, whatever is asked for later.
        assert last_save(OSError("full"))
        assert not last_save(ValueError("wrong"), saves=True)

        # Two at once: a save is of all or none.
        if ranks.rank() == 2:
            with pytest.raises(ranks.Elsewhere) as found:
                ranks.barrier()
            said = found.value.saves
        else:
            said = ranks.fail(OSError("full") if first else ValueError("wrong"), saves=first)
        assert ranks.gathered(said) == [False] * 3


def test_what_is_told_and_what_is_done_then():
    root = Path(__file__).parents[2]
    launch.run(3, __file__, PYTHONPATH=os.pathsep.join([str(root), str(root / "tests")]))


def test_an_environment_that_is_not_torchruns(monkeypatch):
    """Of one process a RANK says nothing; half of what several need is a line."""
    monkeypatch.setenv("RANK", "3")
    assert ranks.main() and progress.speaks()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, said in (("MASTER_ADDR", "MASTER_PORT not set"), ("MASTER_PORT", "RANK below 2")):
        monkeypatch.setenv(name, "29999")
        with pytest.raises(ValueError, match=said), ranks.group(1):
            pass


if __name__ == "__main__":
    main()
