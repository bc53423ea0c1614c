"""What is said of an exception by itself: out of memory, and a library's in one line."""

from __future__ import annotations

import importlib.metadata
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from fastpref.faults import MOST, told
from fastpref.run.config import Config
from fastpref.run.parsing import Parser


class Raises:
    """What libraries raise, from outside fastpref."""

    @staticmethod
    def card():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    @staticmethod
    def cudnn():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    @staticmethod
    def cpu():
        torch.empty(10**15)

    @staticmethod
    def overflow():
        torch.empty(2**62)

    @staticmethod
    def numpy():
        np.empty(10**16)

    @staticmethod
    def arrow():
        pa.allocate_buffer(10**16)

    @staticmethod
    def python():
        bytearray(10**17)


@pytest.mark.parametrize("name", [n for n in vars(Raises) if not n.startswith("_")])
def test_out_of_memory(name):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        getattr(Raises, name)()
    assert told(caught.value, "sample").startswith("out of memory (")
    assert "smaller --num_frames, --height and --width" in told(caught.value, "sample")
    assert "--pair_mode deferred" in told(caught.value, "train")


def raised(error: Exception) -> Exception:
    """As a library raises it."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def test_what_is_said_of_a_librarys_exception():
    """One line, of a length that can be read, with type and place, or a remedy."""
    lacking = ModuleNotFoundError("No module named 'no_such'", name="no_such.part")
    wrapped = RuntimeError("Failed to import diffusers (look up to see its traceback)")
    wrapped.__cause__ = raised(lacking)
    vague = ModuleNotFoundError("Could not import module 'T5EncoderModel'")
    vague.__cause__ = raised(lacking)
    for error in (lacking, wrapped, raised(wrapped), vague):
        assert told(error, "train") == "no_such is not installed: pip install no_such"
    with pytest.raises(ImportError) as caught:
        importlib.metadata.version("no-such")  # as diffusers asks for bitsandbytes
    assert told(caught.value, "train") == "no-such is not installed: pip install no-such"
    own = "\nT5 requires SentencePiece but it was not found:\n  pip install sentencepiece\n"
    assert told(ImportError(own), "train").startswith("T5 requires SentencePiece but it was not")
    said = told(raised(KeyError("rank")), "train")
    assert said.startswith("KeyError: 'rank'; FASTPREF_TRACEBACK=1 shows the rest; if fastpref is")
    assert told(raised(ValueError()), "train").startswith("ValueError; FASTPREF_TRACEBACK=1")
    assert told(raised(RecursionError("x")), "train").startswith("RecursionError: something is ne")
    long = told(raised(RuntimeError("what " + 10_000 * "0123456789 " + "then this")), "train")
    assert len(long) < MOST + 200 and "what 0123" in long and "then this; FASTPREF" in long
    with pytest.raises(AttributeError) as caught:
        Config.only(None, "beta")  # of ours, and meant by nobody
    assert re.search(
        r"AttributeError: .* \(fastpref/run/options.py:\d+\); ", told(caught.value, "")
    )
    with pytest.raises(ValueError) as caught:
        Parser().error("it was meant")
    assert told(caught.value, "train") == "it was meant"
