"""The layers that assemblies send a state through, and what several of them have in common."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.spans.spans import STACKS, Assembly, Span, teacher_assembly

Path = tuple[tuple[str, Span], ...]


def path_of(assembly: Assembly) -> Path:
    """The layers that a state goes through: encoder, then decoder; distinct prefixes of paths are layer calls."""
    return tuple((stack, span) for stack in STACKS for span in assembly.tiling(stack).spans)


def students_of(draws: Sequence[Assembly]) -> list[tuple[str, Span]]:
    """The layers that are computed for the students of draws over one pass of the teacher, each as often as it is: once
    for each distinct prefix of their paths that is not the teacher's. Where decoders look at different encoders they
    have none in common."""
    depths = {(draw.encoder.num_teacher_layers, draw.decoder.num_teacher_layers) for draw in draws}
    of_teacher = {prefix for depth in depths for prefix in _prefixes(path_of(teacher_assembly(*depth)))}
    distinct = dict.fromkeys(prefix for draw in draws for prefix in _prefixes(path_of(draw)))
    return [prefix[-1] for prefix in distinct if prefix not in of_teacher]


def _prefixes(path: Path) -> list[Path]:
    return [path[:end] for end in range(1, len(path) + 1)]
