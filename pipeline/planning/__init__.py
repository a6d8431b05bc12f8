"""What can be known of a run before it starts: mistakes, memory, traffic, time and disk."""

from __future__ import annotations

from pipeline.planning.checks import check_micro_batches, preflight
from pipeline.planning.forecast import PEAK_TFLOPS, SHARE, estimate

__all__ = ["PEAK_TFLOPS", "SHARE", "check_micro_batches", "estimate", "preflight"]
