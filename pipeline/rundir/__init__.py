"""What of a run is on disk and when it counts: paths, stamps of stages, files that are whole or absent, claims."""

from pipeline.rundir.claims import create_once, digest_of, publish_sealed, read_sealed, work_off
from pipeline.rundir.files import check_empty, difference, read_json, write_atomic
from pipeline.rundir.hashes import shared_hashes
from pipeline.rundir.run_dir import STAGES, RunDir
from pipeline.rundir.stage import Stage, StageConflict, left_out
