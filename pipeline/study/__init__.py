"""One run for all sizes against a run for each, at equal cost."""

from pipeline.study.run import study_command
