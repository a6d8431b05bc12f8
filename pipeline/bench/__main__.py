"""python -m pipeline.bench NAME [options]: measure ours and the named baselines in one run."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

# name -> module with add_arguments(parser) and main(arguments); a new benchmark is a new line
BENCHES = {
    "data": "pipeline.bench.data",
    "checkpoint": "pipeline.bench.checkpoint",
    "engines": "pipeline.bench.engines",
    "evaluate": "pipeline.bench.evaluate",
    "families": "pipeline.bench.families",
    "full-size": "pipeline.bench.full_size",
    "gpu-day": "pipeline.bench.gpu_day",
    "kernels": "pipeline.bench.kernels",
    "search": "pipeline.bench.search",
    "switch": "pipeline.bench.switch",
    "step": "pipeline.bench.step",
    "tokens": "pipeline.bench.tokens",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    names = parser.add_subparsers(dest="name", required=True)
    modules = {name: import_module(path) for name, path in BENCHES.items()}
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(names.add_parser(name, description=summary, help=summary))
    arguments = parser.parse_args(argv)
    try:
        modules[arguments.name].main(arguments)
    except (ValueError, FileNotFoundError) as error:
        if arguments.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
