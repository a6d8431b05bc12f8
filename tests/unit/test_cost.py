"""What systems cost: how the measurement begins."""

from __future__ import annotations

import weakref

import pytest
import torch

from pipeline.evaluation import cost


def test_memory_that_decoding_has_left_is_given_back_before_free_memory_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "release_memory", lambda device: asked.append("release"))
    monkeypatch.setattr(cost, "free_memory", lambda device: asked.append("free") or 2**30)
    sample = cost.Sample([([1], 1)], [[1]], 1, ([1], [1]), 1)
    assert cost.costs({}, sample, torch.device("cpu")) == {}
    assert asked == ["release", "free"]


class Model:
    """Passes while no more than this many are loaded."""

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most = name, most


@pytest.mark.parametrize(("of_b", "may_fail", "error"), [(1, (), torch.OutOfMemoryError), (0, ("b",), RuntimeError)])
def test_systems_that_do_not_fit_together_are_measured_one_by_one(of_b, may_fail, error, monkeypatch, tmp_path):
    """Each passed alone before all were loaded. Of one that may fail, and does each time, nothing is known."""
    most: dict[str, int] = {"a": 3, "b": of_b, "c": 3}
    alive: weakref.WeakSet[Model] = weakref.WeakSet()

    def load(folder, *_):
        alive.add(model := Model(folder.name, most[folder.name]))
        return (model, None)

    def seconds(model, *_):
        if len(alive) > model.most:
            raise error("no memory")
        return 0.01

    monkeypatch.setattr(cost, "load", load)
    monkeypatch.setattr(cost, "_memory_and_flops", lambda *_: {"layer_flops": 1.0})
    monkeypatch.setattr(cost, "_seconds", seconds)
    monkeypatch.setattr(cost, "_possible", lambda model, count: count)
    sample = cost.Sample([([1], 2)] * 4, [[1]], 2, ([1], [1]), 1)
    found = cost.costs({name: tmp_path / name for name in most}, sample, torch.device("cpu"), may_fail=may_fail)
    assert found.keys() == most.keys() - set(may_fail)
    assert all(of["latency_ms"] == 10.0 and of["tokens_per_s"] == 200.0 for of in found.values())
