"""Typed, frozen settings of a run: one recipe, every field documented, every field marked by what changing it means.

identity     part of what the result is; another value makes another stage output
schedule     how long and how fast to train; another value continues a run only with --extend
operational  how the work is done (ranks, cadence, paths); changes invalidate nothing
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from data_prep.config import DataConfig, identity, operational, schedule
from pipeline.spans import PRESETS


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    num_steps: int = schedule(1000)
    """Optimizer steps."""
    learning_rate: float = schedule(1e-3)
    """Peak learning rate, before the factors that the model family gives to groups of parameters."""
    warmup_steps: int = schedule(100)
    """Steps of linear warm-up; linear decay to 2 % of the peak follows."""
    weight_decay: float = identity(0.0)
    """AdamW's decoupled weight decay."""
    beta1: float = identity(0.9)
    """Decay of AdamW's first moment."""
    beta2: float = identity(0.98)
    """Decay of AdamW's second moment."""
    max_grad_norm: float = identity(1.0)
    """Gradient norm above which gradients are scaled down, counted for each modular layer (the whole model for a
    teacher) by itself."""
    family_lr_factors: bool = identity(True)
    """Multiply learning rates by the family's factors for groups of parameters. Needed to train a T5 from scratch or at
    high rates; turn off to fine-tune a pretrained teacher at the field's usual rates."""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 0, f"num_steps must be 0 or more, not {self.num_steps}")
        _require(self.learning_rate > 0, f"learning_rate must be above 0, not {self.learning_rate}")
        _require(self.max_grad_norm > 0, f"max_grad_norm must be above 0, not {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch. It does not depend on the number of ranks."""

    tokens_per_micro_batch: int = identity(4096)
    """Largest padded size of a micro-batch: examples x (longest source + longest target), in tokens."""
    micro_batches_per_step: int = identity(8)
    """Micro-batches of one optimizer step over all ranks; the number of ranks must divide it."""

    def __post_init__(self) -> None:
        _require(
            self.tokens_per_micro_batch > 0,
            f"tokens_per_micro_batch must be above 0, not {self.tokens_per_micro_batch}",
        )
        _require(
            self.micro_batches_per_step > 0,
            f"micro_batches_per_step must be above 0, not {self.micro_batches_per_step}",
        )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Cadence of a training loop."""

    ds_config: str = operational("zero3")
    """Name of a file in ds_configs/ (or a path): how DeepSpeed spreads the model."""
    log_every_steps: int = operational(10)
    """Steps between two records in metrics.jsonl and TensorBoard."""
    validate_every_steps: int = operational(200)
    """Steps between two validation losses."""
    validation_examples: int = operational(256)
    """Examples of the validation part that a validation loss is computed on."""
    save_every_steps: int = operational(200)
    """Steps between two checkpoints."""
    keep_checkpoints: int = operational(2)
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        for name in ("log_every_steps", "validate_every_steps", "save_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Sizes of a T5 v1.1 teacher that is trained from scratch; unused when teacher.folder is given."""

    d_model: int = identity(96)
    """Width of the residual stream."""
    d_kv: int = identity(24)
    """Width of one attention head."""
    d_ff: int = identity(192)
    """Width of the gated feed-forward layer."""
    num_heads: int = identity(4)
    """Attention heads of a layer."""
    num_layers: int = identity(6)
    """Encoder layers."""
    num_decoder_layers: int = identity(6)
    """Decoder layers."""
    dropout: float = identity(0.0)
    """Dropout while the teacher trains."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The large model: trained from scratch, fine-tuned from a folder, or taken as it is."""

    folder: str = identity("")
    """Folder of a T5, Flan-T5 or mT5 model to start from; empty: train one of the sizes below from scratch."""
    architecture: ArchitectureConfig = dataclasses.field(default_factory=ArchitectureConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Training of the teacher; with a folder, num_steps = 0 takes the model as it is."""
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _require(
            bool(self.folder) or self.optim.num_steps > 0,
            "teacher.optim.num_steps is 0 and teacher.folder is empty: give one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objectives in the replacing phase."""

    hidden: float = identity(1.0)
    """Hidden-state MSE at the ends of the spans, divided by what the teacher's span changes."""
    logit: float = identity(1.0)
    """Kullback-Leibler divergence from the teacher's output distribution."""
    task: float = identity(1.0)
    """Cross entropy with the references."""
    temperature: float = identity(1.0)
    """Temperature of the logit distillation; the loss is multiplied by its square."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        _require(min(self.hidden, self.logit, self.task) >= 0, "loss weights must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Training of the modular layers over the frozen teacher."""

    granularities: tuple[int, ...] = identity((2, 3, 6))
    """Teacher layers that a modular layer stands for; each granularity covers both stacks."""
    init: str = identity("last")
    """Teacher layer of the span that a modular layer starts from: first or last."""
    local_steps: int = identity(400)
    """Steps of the local phase, where each modular layer learns its span from the teacher's own states; the steps after
    it are the replacing phase, where draws put modular layers into the teacher and the whole path is trained."""
    coarse_weight: float = identity(0.5)
    """Share of the replacing draws in which a stack takes one granularity throughout, chosen in proportion to its size;
    the rest is uniform over all tilings."""
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _require(len(self.granularities) > 0, "granularities must name at least one granularity, such as [2, 3, 6]")
        _require(min(self.granularities) >= 2, f"granularities start at 2, not {min(self.granularities)}")
        _require(self.init in ("first", "last"), f"init must be first or last, not {self.init!r}")
        _require(self.optim.num_steps > 0, "distill.optim.num_steps is 0: there would be no modular layers")
        _require(
            0 <= self.local_steps <= self.optim.num_steps,
            f"local_steps must lie in 0..{self.optim.num_steps} (optim.num_steps), not {self.local_steps}",
        )
        _require(0 <= self.coarse_weight <= 1, f"coarse_weight must lie in 0..1, not {self.coarse_weight}")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Shrink and fine-tune: a small model of kept teacher layers, trained directly, beside the coarsest assembly."""

    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Training of the small model; num_steps = 0 leaves this baseline out."""


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Which checkpoints to put together."""

    ratios: tuple[float, ...] = identity((1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0))
    """Ratios of layers; ratio r asks for round(layers / r) layers, encoder and decoder together."""
    presets: tuple[str, ...] = identity(PRESETS)
    """Ways to choose an assembly for a ratio: size-first, speed-first."""
    assemblies: tuple[str, ...] = identity(())
    """Further assemblies by their text form, such as e2x3-d6."""

    def __post_init__(self) -> None:
        for preset in self.presets:
            _require(preset in PRESETS, f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
        for ratio in self.ratios:
            _require(ratio >= 1, f"ratio {ratio} would make a model larger than the teacher: ratios start at 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scoring of all systems in one batch."""

    max_examples: int = identity(1000)
    """Test examples to score, from the start of the test part."""
    max_new_tokens: int = identity(128)
    """Longest output, in tokens."""
    num_beams: int = identity(1)
    """Beams; 1 is greedy."""
    tokens_per_batch: int = operational(8192)
    """Largest padded size of a decoding batch, in tokens."""
    latency_examples: int = operational(20)
    """Examples decoded one at a time to measure latency."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes `python -m pipeline run` starts on this machine."""

    num_ranks: int = operational(1)
    """Training processes (torchrun); on GPUs one for each."""
    num_mpi_ranks: int = operational(2)
    """MPI ranks that prepare data."""
    threads_per_rank: int = operational(1)
    """CPU threads of a process."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that describes a run."""

    name: str = operational("run")
    """Name in reports and job names."""
    run_dir: str = operational("")
    """Folder of the run; empty: runs/<name>."""
    seed: int = identity(0)
    """Seed of every random choice."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    baseline: BaselineConfig = dataclasses.field(default_factory=BaselineConfig)
    assemble: AssembleConfig = dataclasses.field(default_factory=AssembleConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        _require(
            not self.teacher.folder or bool(self.data.tokenizer),
            f"teacher.folder is {self.teacher.folder} but data.tokenizer is empty: give the teacher's folder there too",
        )

    @property
    def resolved_run_dir(self) -> str:
        return self.run_dir or f"runs/{self.name}"


def fields_of_kind(config: Any, kind: str, prefix: str = "") -> dict[str, Any]:
    """Values of all fields of a settings dataclass that are marked `kind`, by dotted name."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            values |= fields_of_kind(value, kind, f"{prefix}{each.name}.")
        elif each.metadata.get("kind") == kind:
            values[prefix + each.name] = list(value) if isinstance(value, tuple) else value
    return values
