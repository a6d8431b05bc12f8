"""The same T5 fine-tuned by Hugging Face's Trainer with ZeRO-3: the baseline of the step benchmark on GPUs.

Shapes: S source tokens, T target tokens.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from pipeline.bench.step_model import random_batch, t5
from pipeline.footprint.sharding import read_ds_config
from pipeline.training.engine import join_world

NUM_WARM_UP = 3


class RandomExamples(Dataset[dict[str, torch.Tensor]]):
    """Random ids without padding."""

    def __init__(self, num_examples: int, shape_ST: tuple[int, int], vocab_size: int) -> None:
        self.num_examples, self.shape_ST, self.vocab_size = num_examples, shape_ST, vocab_size

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = random_batch(index, (1, *self.shape_ST), self.vocab_size, torch.device("cpu"))
        source_S = batch.source_BS[0]
        return {"input_ids": source_S, "attention_mask": torch.ones_like(source_S), "labels": batch.labels_BT[0]}


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started_s = _now_s()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now_s() - self._started_s)


def _now_s() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer(
    folder: str, steps: int, num_layers: int, d_model: int, d_ff: int, shape_BST: tuple[int, int, int]
) -> dict[str, Any]:
    """Median seconds of a step in bf16, where torch's fused AdamW trains every parameter."""
    world = join_world()
    num, *shape_ST = shape_BST
    config = t5(num_layers, d_model, d_ff)
    ds_config = read_ds_config("zero3") | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"),
        per_device_train_batch_size=num,
        max_steps=steps + NUM_WARM_UP,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        bf16=True,
        deepspeed=ds_config,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=world.device.type == "cpu",
    )
    clock = Clock()
    examples = RandomExamples(num * (steps + NUM_WARM_UP) * world.size, (shape_ST[0], shape_ST[1]), config.vocab_size)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    Trainer(model, args=arguments, train_dataset=examples, callbacks=[clock]).train()
    world.close()
    return {"seconds": statistics.median(clock.seconds[NUM_WARM_UP:])}
