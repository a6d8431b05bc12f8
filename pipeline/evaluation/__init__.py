"""All systems of a run decoded, scored and timed in one batch that any number of workers share."""

from pipeline.evaluation.cost import Sample, costs
from pipeline.evaluation.metricx import check_metricx
from pipeline.evaluation.peers import read_peers
from pipeline.evaluation.slices import decode_in_memory
from pipeline.evaluation.stage import evaluate
from pipeline.evaluation.subject import folder_hashes
