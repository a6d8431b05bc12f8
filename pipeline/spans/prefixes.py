"""Common prefixes of paths of layers: what many assemblies have in common needs to be computed once.

A path is the layers that a state goes through in order, such as the spans of an encoder tiling. Paths that begin alike
form a tree: one node for each distinct prefix, so one layer call a node serves every path through it. Only the standard
library is used, and nothing is known of what a layer or a state is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Layer = TypeVar("Layer", bound=Hashable)
State = TypeVar("State")


@dataclass
class _Node(Generic[Layer]):
    """The end of one prefix."""

    path: tuple[Layer, ...] = ()
    children: dict[Layer, _Node[Layer]] = field(default_factory=dict)
    is_end: bool = False


def count_prefixes(paths: Iterable[Sequence[Layer]]) -> int:
    """Distinct non-empty prefixes of these paths: the layer calls that serve all of them."""
    return len({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)})


def count_layers(paths: Iterable[Sequence[Layer]]) -> int:
    """Layers of all distinct paths: the layer calls without sharing."""
    return sum(len(path) for path in {tuple(path) for path in paths})


def walk(
    paths: Iterable[Sequence[Layer]], start: State, call: Callable[[State, Layer], State]
) -> Iterator[tuple[tuple[Layer, ...], State]]:
    """Take a state along every path, calling each layer once for each distinct prefix.

    Depth first, branches in the order in which the paths first show them; a path that is a prefix of another comes
    before it. A state is let go as soon as the last branch has left it, so at most one state a branching is held.

    Args:
        start: the state before the first layer.
        call: the state after a layer, from the state before it and the layer; must not change what it is given.

    Yields:
        (path, state at its end), each distinct path once.
    """
    root = _tree(paths)
    if root.is_end:
        yield root.path, start
    pending = [(start, layer, node) for layer, node in reversed(root.children.items())]
    del start
    while pending:
        before, layer, node = pending.pop()
        state = call(before, layer)
        del before
        pending += [(state, child_layer, child) for child_layer, child in reversed(node.children.items())]
        if node.is_end:
            yield node.path, state
        del state


def _tree(paths: Iterable[Sequence[Layer]]) -> _Node[Layer]:
    root: _Node[Layer] = _Node()
    for path in paths:
        node = root
        for layer in path:
            node = node.children.setdefault(layer, _Node((*node.path, layer)))
        node.is_end = True
    return root
