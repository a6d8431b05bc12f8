"""Asks transformers about a tokenizer, in a process of its own: it takes longer to load than a small build lasts, and
only one rank needs it. It loads while that rank goes on.

    python -m data_prep.served     # requests on stdin, answers on stdout, a line of JSON each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
Example = tuple[str, str, str, list[int], int]
"""A text, its side ("source" or "target"), its language, its ids as the shards have them, the most that it may have."""


class Served:
    """The process, from its first use to the end of a `with`. It ends with its parent, too, whose death closes the pipe
    that it reads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by __exit__

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def start(self) -> subprocess.Popen[str]:
        """Have transformers loaded by the time that it is asked."""
        if self._process is None:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_prep.served"],
                env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        return self._process

    def write(self, source: Path, target: Path) -> None:
        """`write_tokenizer` and `write_languages` of data_prep.tokenizer. ValueError as they raise it."""
        self._ask("write", str(source), str(target))

    def compare(self, folder: Path, examples: Sequence[Example]) -> None:
        """`refuse_other_ids` of a folder's own AutoTokenizer: ValueError with the first text whose ids differ."""
        self._ask("compare", str(folder), examples)

    def _ask(self, *request: Any) -> None:
        process = self.start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # what it died of is told below
        answer = process.stdout.readline()
        if not answer:
            status = process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise ValueError((said or [f"transformers ended with status {status}"])[-1])
        if refusal := json.loads(answer):
            raise ValueError(refusal)


def main() -> None:
    """The process that has transformers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # It would load torch too, which takes as long again and which no tokenizer needs.
    cast(dict[str, Any], sys.modules)["torch"] = None
    from data_prep.tokenizer import refuse_other_ids, write_languages, write_tokenizer

    def write(source: str, target: str) -> None:
        write_tokenizer(Path(source), Path(target))
        write_languages(Path(target))

    def compare(folder: str, examples: list[Example]) -> None:
        refuse_other_ids(Path(folder), examples)

    known: dict[str, Callable[..., None]] = {"write": write, "compare": compare}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            known[name](*arguments)
            refusal = ""
        except (ValueError, OSError) as error:
            refusal = " ".join(str(error).split())
        print(json.dumps(refusal), file=answers, flush=True)


if __name__ == "__main__":
    main()
