"""Scorers by name: functions of modules and folders of models, and what is made of their scores."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scoring import HOW, PROMPTS, TIMES, clips
from tiny_clip import clip_folder

from fastpref.spo import scorers
from fastpref.spo.preference_model import StepAwarePreferenceModel

FUNCTIONS = """
import torch

def sizes(frames, prompts, t):
    return [float(clip.float().mean()) + len(p) for clip, p in zip(frames, prompts)] + t.numpy()

class Held:
    @staticmethod
    def zeros(frames, prompts, t):
        return torch.zeros(len(frames), dtype=torch.float16, requires_grad=True)

def short(frames, prompts, t):
    return [0.0]

def column(frames, prompts, t):
    return torch.zeros(len(frames), 1)

def words(frames, prompts, t):
    return ["good"] * len(frames)

def none(frames, prompts, t):
    pass

def nan(frames, prompts, t):
    return [0.0, float("nan"), float("inf"), 0.0, 0.0]

def fails(frames, prompts, t):
    return 1 / 0

def leaves(frames, prompts, t):
    raise SystemExit(3)

def gradless(frames, prompts, t):
    torch.set_grad_enabled(False)
    return [0.0] * len(frames)

def memory(frames, prompts, t):
    raise torch.OutOfMemoryError("CUDA out of memory")

def two(frames, prompts):
    pass

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[str]:
    """A module in the current folder, as users have it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores.py").write_text(FUNCTIONS)
    (tmp_path / "my_broken.py").write_text("import torch\n\ndef f(:\n")
    (tmp_path / "my_failing.py").write_text("\n\nraise RuntimeError('no weights')\n")
    (tmp_path / "my_leaving.py").write_text("import sys\n\nsys.exit('no card')\n")
    (tmp_path / "my_gradless.py").write_text(
        f"import torch\ntorch.set_grad_enabled(False)\n{FUNCTIONS}"
    )
    (tmp_path / "my_lacking.py").write_text("import package_that_is_not_there\n")
    path = list(sys.path)
    yield "my_scores"
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_a_function_by_its_name(module):
    frames = clips()
    scores = scorers.open_scorer(f"{module}:sizes", **HOW)(frames, PROMPTS, TIMES)
    means = torch.tensor([float(c.float().mean()) for c in frames], dtype=torch.float64)
    lengths = torch.tensor([float(len(p)) for p in PROMPTS], dtype=torch.float64)
    assert scores.dtype == torch.float64 and torch.equal(scores, means + lengths + TIMES)
    scores = scorers.open_scorer(f"{module}:Held.zeros", **HOW)(frames, PROMPTS, TIMES)
    assert scores.dtype == torch.float64 and not scores.requires_grad
    assert torch.equal(scores, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_absent:f", "no module my_absent is installed or in"),
        ("absent_pkg.inner:f", "no module absent_pkg.inner is installed or in"),
        ("my_broken:f", r"cannot be imported: .*my_broken.py, line 3: SyntaxError: invalid syntax"),
        ("my_failing:f", r"cannot be imported: .*my_failing.py, line 3: RuntimeError: no weights"),
        ("my_leaving:f", r"cannot be imported: .*my_leaving.py, line 3: SystemExit: no card"),
        (
            "my_lacking:f",
            r"my_lacking.py, line 1: ModuleNotFoundError: .*package_that_is_not_there",
        ),
        ("my_scores:absent", "AttributeError: module 'my_scores' has no attribute 'absent'"),
        ("my_scores:number", "expected a function of .frames, prompts, t.: 3 is not a callable"),
        ("my_scores:two", "expected a function of .frames, prompts, t.: too many positional"),
        ("my_scores:", "cannot be imported"),
        (":f", "cannot be imported"),
    ],
)
def test_a_function_that_cannot_be_had(module, name, said):
    with pytest.raises(ValueError, match=said) as caught:
        scorers.open_scorer(name, **HOW)
    assert str(caught.value).startswith(f"scorer {name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", r"expected 5 numbers, one per clip, got \[1\]"),
        ("column", r"expected 5 numbers, one per clip, got \[5, 1\]"),
        ("words", r"expected 5 numbers, one per clip, got \['good'"),
        ("none", "expected 5 numbers, one per clip, got None"),
        ("nan", r"'schnee, größer': expected a finite score, got nan \(2 of 5 are not finite\)"),
        ("fails", r"failed: .*my_scores.py, line \d+: ZeroDivisionError: division by zero"),
        ("leaves", r"failed: .*my_scores.py, line \d+: SystemExit: 3"),
    ],
)
def test_what_is_no_scores_is_told(module, name, said):
    score = scorers.open_scorer(f"{module}:{name}", **HOW)
    with pytest.raises(ValueError, match=said) as caught:
        score(clips(), PROMPTS, TIMES)
    assert str(caught.value).startswith(f"scorer {module}:{name}: ")


@pytest.mark.parametrize("name", ["my_scores:gradless", "my_gradless:sizes"])
def test_gradients_stay_on_whatever_a_scorer_does(name, module):
    scorers.open_scorer(name, **HOW)(clips(), PROMPTS, TIMES)
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # for the tests after this one
    assert on


def test_memory_that_runs_out_stays_what_it_is(module):
    """`fastpref` has a line of its own for that."""
    with pytest.raises(torch.OutOfMemoryError):
        scorers.open_scorer(f"{module}:memory", **HOW)(clips(), PROMPTS, TIMES)


def test_the_folder_of_a_clip_or_of_a_trained_model(tmp_path):
    """A trained one scores by t, a plain one does not; the same as the model itself."""
    model = StepAwarePreferenceModel.from_pretrained(clip_folder())
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.pooled.parameters():
            value.copy_(torch.randn(value.shape, generator=random))
    model.save_pretrained(tmp_path / "a:b")  # no function: a folder
    frames, zero = clips(), torch.zeros(5, dtype=torch.float64)
    plain = scorers.open_scorer(str(clip_folder()), **HOW)
    trained = scorers.open_scorer(str(tmp_path / "a:b"), **HOW)
    assert torch.equal(plain(frames, PROMPTS, TIMES), plain(frames, PROMPTS, zero))
    found = trained(frames, PROMPTS, TIMES)
    assert torch.equal(found, model(frames, PROMPTS, TIMES).detach())
    assert found.dtype == torch.float64 and not found.requires_grad
    assert not torch.equal(found, trained(frames, PROMPTS, zero))
    half = scorers.open_scorer(str(clip_folder()), device="cpu", dtype=torch.bfloat16)
    assert not torch.equal(half(frames, PROMPTS, zero), plain(frames, PROMPTS, zero))


@pytest.mark.parametrize("name", ["absent", "/absent/folder", "my_scores.py", "a/b/c", "-", "a b"])
def test_a_name_of_nothing(name):
    """Nothing is asked of a hub whose names it cannot be."""
    said = "no such folder; expected one, a hub id .owner/name., package.module:function or http:"
    with pytest.raises(ValueError, match=said) as caught:
        scorers.open_scorer(name, **HOW)
    assert str(caught.value).startswith(f"scorer {name}: ")


def test_numbers_of_any_kind_become_float64():
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    given = [[1, 2.0], (1, 2), np.float32([1, 2]), torch.tensor([1, 2]), want]
    given += [[torch.tensor(1.0), np.int64(2)], want.half().requires_grad_()]
    for scores in given:
        found = scorers._numbers("x", scores, ["a", "b"])
        assert torch.equal(found, want) and found.dtype == torch.float64
