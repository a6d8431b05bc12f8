"""What can be known of a run before it starts: mistakes, memory, traffic, time and disk."""

from pipeline.planning.checks import check_micro_batches, preflight
from pipeline.planning.forecast import PEAK_TFLOPS, SHARE, baseline_flops, distill_flops, estimate
from pipeline.planning.planned import Planned
from pipeline.planning.preview import preview_of
from pipeline.planning.ranks import ranks_here
