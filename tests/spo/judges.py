"""Scorers by import path, for tests."""

import torch

from fastpref.demo import clips

calls = {"count": 0, "at": None, "then": None}


def judge(frames, prompts, t):
    """The demo's judge; at call number `at` it does what `then` says."""
    calls["count"] += 1
    if calls["count"] == calls["at"]:
        calls["then"]()
    scores = [20 * clips.judge(p, f)["score"] for p, f in zip(prompts, frames, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


def brightness(frames, prompts, t):
    """Of any clip; what differs, differs much."""
    return torch.stack([200 * clip.double().mean() / 255 for clip in frames])


def constant(frames, prompts, t):
    return [0.5] * len(frames)


def served(frames, prompts, t):
    """The same of what a server hands over: arrays."""
    return judge([torch.from_numpy(frame.copy()) for frame in frames], prompts, t).tolist()
