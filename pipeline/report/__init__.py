"""What is published of a run, as a table, a page, pictures, comparisons and a choice."""

from pipeline.report.choose import choose_command
from pipeline.report.compare import compare_command, scored
from pipeline.report.data import read_jsonl
from pipeline.report.stage import report
