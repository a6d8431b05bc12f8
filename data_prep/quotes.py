"""What quotes mean in a table of text: a program put cells in quotes, or they are characters of the texts.

A CSV file is the former by definition. TSV files are written both ways, so a look at the whole file decides: a program
puts quotes around what needs them and doubles those inside; people do neither.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

QUOTES = ("auto", "cells", "text")
_MOST_LINES = 1000  # of one row; more is a quote that nothing closes


@dataclass
class _Findings:
    """What both readings of a file would find."""

    width: int = 0
    num_quotes: int = 0
    is_header_quoted: bool = False
    are_lines_rows: str = ""
    """Empty where every line is a row of the header's width, else the first line that is not."""
    are_cells_closed: str = ""
    """Empty where quotes surround whole cells and double inside them, else the first place where they do not."""
    cells: Counter[str] = field(default_factory=Counter)
    """Cells in quotes by what they hold: "several" lines or cells, "doubled" quotes, a "comma", or "plain" text."""
    first: dict[str, str] = field(default_factory=dict)
    has_bare_comma: bool = False


def settle(lines: Iterable[str], delimiter: str, name: str) -> tuple[str, str]:
    """("cells" or "text", a warning or nothing) for the lines of a file.

    Raises:
        ValueError: a TSV file that could be either, or that is neither.
    """
    found = _look(lines, delimiter)
    if not found.num_quotes:
        return "cells", ""
    several = found.first.get("several")
    if delimiter == ",":
        is_odd = several and not found.are_lines_rows and not found.cells["doubled"]
        warning = (
            f"{name}:{several}: a cell in quotes goes on over lines that are rows by themselves; if quotes are text"
        )
        return "cells", f'{warning} here, set data.quotes to "text"' if is_odd else ""
    if found.are_lines_rows and found.are_cells_closed:
        raise ValueError(
            f"{name}:{found.are_lines_rows}: not a row of {found.width} cells, nor with cells in quotes (line "
            f"{found.are_cells_closed}); check the quoting"
        )
    if found.are_lines_rows or found.are_cells_closed:
        return ("text" if found.are_cells_closed else "cells"), ""
    needless = found.cells["plain"] + (found.cells["comma"] if found.has_bare_comma else 0)
    if found.is_header_quoted or (found.cells["doubled"] and not needless and not several):
        return "cells", ""
    if needless and not found.cells["doubled"]:
        return "text", ""
    raise ValueError(
        f"{name}:{several or min(found.first.values(), key=int)}: quotes that may be text or stand around cells: set "
        f'data.quotes to "text" or to "cells" (as a program writes them)'
    )


def _look(lines: Iterable[str], delimiter: str) -> _Findings:
    found = _Findings()
    cell = rf'"(?:[^"]|"")*"|[^"{delimiter}\r\n]*'
    row = re.compile(rf"(?:{cell})(?:{delimiter}(?:{cell}))*\r?\n?")
    cells = re.compile(rf"(?:^|{delimiter})({cell})")
    pending, begun = "", 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")
            found.width = line.count(delimiter) + 1
        elif line.strip() and line.count(delimiter) + 1 != found.width:
            found.are_lines_rows = found.are_lines_rows or str(number)
        found.num_quotes += line.count('"')
        if found.are_cells_closed:
            continue
        begun = begun or number
        pending += line
        if pending.count('"') % 2 and number - begun < _MOST_LINES:
            continue
        if '"' in pending:
            _look_at_row(found, pending, begun, row, cells)
        found.has_bare_comma |= "," in re.sub(r'"[^"]*"', "", pending)
        pending, begun = "", 0
    if pending:
        found.are_cells_closed = found.are_cells_closed or str(begun)
    return found


def _look_at_row(found: _Findings, text: str, number: int, row: re.Pattern[str], cells: re.Pattern[str]) -> None:
    given = [] if row.fullmatch(text) is None else cells.findall(text)
    if number == 1:
        found.width = len(given) or found.width
        found.is_header_quoted = bool(given) and all(each.startswith('"') for each in given)
    if len(given) != found.width:
        found.are_cells_closed = str(number)
        return
    for each in given if number > 1 else []:
        inner = each[1:-1]
        if not each.startswith('"') or not inner:
            continue
        several = "\n" in inner or "\r" in inner or "\t" in inner
        kind = "several" if several else "doubled" if '"' in inner else "comma" if "," in inner else "plain"
        found.cells[kind] += 1
        found.first.setdefault(kind, str(number))
