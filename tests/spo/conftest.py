"""The prompts of short online runs on the demo's base, and one that nothing has stopped."""

import pytest
from online import options

from fastpref.demo import clips
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join(clips.PAIR_PROMPTS[:8]) + "\n")
    return path


@pytest.fixture(scope="session")
def whole(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, spo(SPOConfig(**options(prompts, folder)))
