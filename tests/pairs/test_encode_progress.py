"""What encoding says of itself: what loads, and how far the text encoders are."""

import io
import re
import sys

import pytest
from families import tiny, write_media
from tqdm import tqdm

from fastpref.pairs.encode import encode


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("name", "layers"), [("wan", 2), ("sdxl", 6)])
def test_encoding_says_what_loads_and_how_far_the_text_is(
    name, layers, tmp_path, monkeypatch, capsys
):
    """Without a terminal a line of the text encoders, and not again; on one a bar of
    their layers at each call, and on request nothing.
    """
    case, bars = tiny(name), {}

    class Bar(tqdm):
        def close(self) -> None:
            if not self.disable:
                bars[self.desc.removesuffix(": ")] = (self.n, self.total)
            super().close()

    for module in ("encode", "parts"):
        monkeypatch.setattr(f"fastpref.pairs.{module}.tqdm", Bar)
    media = write_media(case.family, tmp_path / "media")

    def said(part: str, **options) -> list[str]:
        encode(case.family.name, case.path, media, tmp_path / part, batch_size=3, **options)
        return capsys.readouterr().out.splitlines()

    assert said("quiet", progress=False) == []
    loads = ["loading the VAE", "loading the text encoder"]
    texts = [f"text encoder, {what}" for what in ("3 prompts", "1 prompts", "the empty prompt")]
    first, *_ = lines = said("lines")
    assert re.fullmatch(r"loading the VAE \.\.\. \d+\.\d s", first)
    assert [line.partition(" ... ")[0] for line in lines[:-1]] == [*loads, texts[0], texts[2]]
    bars.clear()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert [line.partition(" ... ")[0] for line in said("bar")[:-1]] == loads
    assert bars.pop("encode") == (4, 4)
    assert bars == dict.fromkeys(texts, (layers, layers))
