"""What systems cost: how the measurement begins."""

from __future__ import annotations

import torch

from pipeline.evaluation import cost


def test_memory_that_decoding_has_left_is_given_back_before_free_memory_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "release_memory", lambda device: asked.append("release"))
    monkeypatch.setattr(cost, "free_memory", lambda device: asked.append("free") or 2**30)
    sample = cost.Sample([([1], 1)], [[1]], 1, ([1], [1]), 1)
    assert cost.costs({}, sample, torch.device("cpu")) == {}
    assert asked == ["release", "free"]
