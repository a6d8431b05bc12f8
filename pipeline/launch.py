"""torchrun, with its long report of a failed worker cut to one line: python -m pipeline.launch [torchrun options] ...

What went wrong is said by the worker itself; the launcher only adds which one it was.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from data_prep.processes import collect_garbage, run_as_process

SECONDS_TO_SAVE = 120
"""That ranks have from a signal on before they are killed."""


def launch(arguments: list[str]) -> int:
    """Run torchrun; the exit code of the worker that failed first, 128 and the signal that ended all, or 0."""
    collect_garbage()
    logging.disable(logging.ERROR)  # torchrun's own account of what the worker has said and we say below
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))  # by which SLURM tells of an end, too
    try:
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        print(f"rank {rank} (process {failure.pid}) ended first, with {how}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        print(f"ended by {error.sigval.name}, and the ranks with it", file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    run_as_process(lambda: sys.exit(launch(sys.argv[1:])))
