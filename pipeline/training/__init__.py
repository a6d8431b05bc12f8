"""From one step to the next: what is trained (Task) and the loop that trains it (Trainer)."""

from pipeline.training.engine import Engine, check_ds_config, join_world
from pipeline.training.loop import Task, Trainer, begin_stage
from pipeline.training.validation import Translation
from pipeline.training.watchdog import Watchdog
from pipeline.training.whole_model import DistilledModel, distilled_task, full_model_task, save_model, save_trained
