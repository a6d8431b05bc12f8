"""Asks transformers about a tokenizer, in a process of its own: it takes longer to load than a small build lasts, and
only one rank needs it.

    python -m data_prep.served write SOURCE TARGET     # write_tokenizer, write_languages
    python -m data_prep.served compare FOLDER          # refuse_other_ids of the examples that stdin has, one a line
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
Example = tuple[str, str, str, list[int], int]
"""A text, its side ("source" or "target"), its language, its ids as the shards have them, the most that it may have."""


def write(source: Path, target: Path) -> None:
    """`write_tokenizer` and `write_languages` of data_prep.tokenizer. ValueError as they raise it."""
    _finish(_start("write", str(source), str(target)), "")


class Comparison:
    """Ids beside those of a folder's own AutoTokenizer, which is loaded while the ids are made."""

    def __init__(self, folder: Path) -> None:
        self._process = _start("compare", str(folder))

    def end(self, examples: Sequence[Example]) -> None:
        """ValueError with the first text whose ids differ."""
        _finish(self._process, "".join(json.dumps(example) + "\n" for example in examples))


def _start(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.served", *arguments],
        env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str], text: str) -> None:
    errors = process.communicate(text)[1]
    if process.returncode:
        raise ValueError((errors.strip().splitlines() or [f"transformers ended with status {process.returncode}"])[-1])


def main(arguments: list[str]) -> int:
    """The process that has transformers; one line on stderr where it refuses."""
    # It would load torch too, which takes as long again and which no tokenizer needs.
    cast(dict[str, Any], sys.modules)["torch"] = None
    from data_prep.tokenizer import refuse_other_ids, write_languages, write_tokenizer

    try:
        if arguments[0] == "write":
            write_tokenizer(Path(arguments[1]), Path(arguments[2]))
            write_languages(Path(arguments[2]))
        else:
            refuse_other_ids(Path(arguments[1]), [json.loads(line) for line in sys.stdin])
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
