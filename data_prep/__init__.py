"""Text to shards: the data stage of the distillation pipeline (CPU only, no torch)."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 an older Python gets here first
    raise SystemExit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
