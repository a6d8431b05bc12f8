"""Typed, frozen settings of a run: one recipe, every field documented, every field marked by what changing it means.

identity     part of what the result is; another value makes another stage output
schedule     how long and how fast to train; another value continues a run only with --extend
operational  how the work is done (ranks, cadence, paths); changes invalidate nothing
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from data_prep.config import DataConfig, Settings, identity, operational, schedule
from pipeline.config.search import SearchConfig
from pipeline.spans import PRESETS, Stacks

SEARCHED = "searched"
SAMPLED, COARSEST, PURE, CROSSED = "sampled", "coarsest", "pure", "crossed"
BLEU_TOKENIZERS = ("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200", "spm", "none")
QUANTIZATIONS = (
    "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32",
)  # fmt: skip
"""Of weights, by CTranslate2's names."""
SAMPLERS = (
    "stratified",
    "uniform",
    "sandwich",
    "theseus-constant",
    "theseus-linear",
    "coarse-to-fine",
    "fine-to-coarse",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """AdamW and its schedule."""

    num_steps: int = schedule(1000, low=0)
    """Optimizer steps."""
    learning_rate: float = schedule(1e-3, above=0)
    """Peak learning rate. family_lr_factors multiplies it for some groups of parameters."""
    warmup_steps: int = schedule(100, low=0)
    """Steps in which the learning rate rises to its peak. After them it falls in a straight line to 2 % of it."""
    weight_decay: float = identity(0.0, low=0)
    """AdamW's decoupled weight decay."""
    beta1: float = identity(0.9, low=0, below=1)
    """Decay of AdamW's first moment."""
    beta2: float = identity(0.98, low=0, below=1)
    """Decay of AdamW's second moment."""
    max_grad_norm: float = identity(1.0, above=0)
    """Largest gradient norm; gradients with a larger one are scaled down to it. Each modular layer has a norm of its
    own, a teacher one for the whole model."""
    family_lr_factors: bool = identity(True)
    """Multiply the learning rate of each group of parameters by a factor that suits the model family. Needed to train
    a T5 from scratch or at high rates. Turn it off to fine-tune a pretrained teacher at usual rates."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Settings):
    """The batch of one optimizer step. It does not depend on the number of ranks (training processes)."""

    tokens_per_micro_batch: int = identity(4096, low=1)
    """Most tokens of a micro-batch, padding included: examples x (longest source + longest target)."""
    micro_batches_per_step: int = identity(8, low=1)
    """Micro-batches of one optimizer step, all ranks together. The number of ranks must divide it."""

    def shared_by(self, num_ranks: int) -> str:
        """For messages: what makes a step as large and can be shared by so many ranks."""
        count = -(-self.micro_batches_per_step // num_ranks) * num_ranks
        tokens = max(1, self.tokens_per_micro_batch * self.micro_batches_per_step // count)
        return f"{count} micro-batches of {tokens} tokens make a step as large"


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Settings):
    """How training is run, logged, validated and saved."""

    ds_config: str = operational("auto")
    """DeepSpeed configuration: the name of a file in ds_configs/, a path, or auto. auto takes the one that sends least
    between ranks of those that fit into memory."""
    recompute_activations: bool = operational(False)
    """Save memory: keep only the input of each layer, and compute the rest again in the backward pass (activation
    checkpointing)."""
    log_every_steps: int = operational(10, low=1)
    """Steps between two records in metrics.jsonl and TensorBoard."""
    validate_every_steps: int = operational(1000, low=0)
    """Steps between two validation losses. 0: by the clock alone."""
    validate_every_s: float = operational(600.0, low=0)
    """Seconds after which a step is followed by a validation, too. 0: by steps alone."""
    validation_examples: int = operational(256, low=1)
    """Examples of the validation part that a validation loss is computed on."""
    validation_bleu_examples: int = operational(0, low=0)
    """Examples of the validation part that are decoded at every validation, for a BLEU of the teacher, the finest, a 2x
    and the coarsest assembly. 0: none. Each token of an output costs a forward pass."""
    save_every_steps: int = operational(1000, low=0)
    """Steps between two checkpoints. 0: by the clock alone."""
    save_every_s: float = operational(600.0, low=0)
    """Seconds after which a step is followed by a checkpoint, too. 0: by steps alone."""
    keep_checkpoints: int = operational(2, low=1)
    """How many of the newest checkpoints to keep."""
    keep_every_steps: int = operational(0, low=0)
    """Also keep the checkpoint of every so many steps. 0: keep none for that."""
    keep_best: bool = operational(True)
    """Also keep the checkpoint with the lowest mean validation loss. Only steps that are saved and validated count."""
    save_beside: bool = operational(True)
    """Write checkpoints while training goes on, from a copy in host memory. false makes no copy, and training waits."""
    stop_before_end_s: float = operational(120.0, low=0)
    """Seconds before the end of a SLURM job's time at which training saves and asks for another start, but at most half
    of the job's time. Choose more than two steps, a validation and a save take."""
    hang_timeout_s: float = operational(600.0, low=1)
    """Seconds without progress, or of waiting for others at the start, after which a rank takes the run for hung. It
    then says where every rank is, and exits. Choose more than any forward pass, backward pass or save takes."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig(Settings):
    """Sizes of a T5 v1.1 teacher that is trained from scratch; unused when teacher.folder is given."""

    d_model: int = identity(96, low=1)
    """Width of the residual stream."""
    d_kv: int = identity(24, low=1)
    """Width of one attention head."""
    d_ff: int = identity(192, low=1)
    """Width of the gated feed-forward layer."""
    num_heads: int = identity(4, low=1)
    """Attention heads of a layer."""
    num_layers: int = identity(6, low=1)
    """Encoder layers."""
    num_decoder_layers: int = identity(6, low=1)
    """Decoder layers."""
    dropout: float = identity(0.0, low=0, below=1)
    """Dropout while the teacher trains."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings):
    """The large model: trained from scratch, fine-tuned from a folder, or taken as it is."""

    folder: str = identity("")
    """Folder of a model to start from (T5, mT5, BART, NLLB and others), or hub:owner/name[@revision], which
    `python -m pipeline fetch` downloads. Empty: train a model from scratch, with the sizes of teacher.architecture."""
    architecture: ArchitectureConfig = dataclasses.field(default_factory=ArchitectureConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Training of the teacher; with a folder, num_steps = 0 takes the model as it is."""
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            bool(self.folder) or self.optim.num_steps > 0,
            "teacher.optim.num_steps is 0 and teacher.folder is empty: give one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings):
    """What modular layers learn from. Each loss has a weight: a number, or points [[step, weight], ...] with straight
    lines between them. The local phase takes the hidden-state loss, with weight 1, and the attention losses."""

    hidden: float | tuple[tuple[int, float], ...] = identity(1.0)
    """Weight of the hidden-state loss, which compares the states of student and teacher behind each modular layer."""
    hidden_mode: str = identity("span", choices=("span", "mse", "cosine"))
    """How states are compared: span (squared error over what the teacher's span changes), mse (squared error) or
    cosine (1 - cosine of student and teacher, token by token)."""
    logit: float | tuple[tuple[int, float], ...] = identity(1.0)
    """Weight of the logit loss: Kullback-Leibler divergence between the outputs of teacher and student."""
    logit_direction: str = identity("forward", choices=("forward", "reverse"))
    """forward: KL(teacher || student); reverse: KL(student || teacher)."""
    task: float | tuple[tuple[int, float], ...] = identity(1.0)
    """Weight of the task loss: cross entropy with the references."""
    attention_self: float | tuple[tuple[int, float], ...] = identity(0.0)
    """Weight of the self-attention loss, in both stacks: Kullback-Leibler divergence from the last teacher layer of the
    span."""
    attention_cross: float | tuple[tuple[int, float], ...] = identity(0.0)
    """Weight of the same loss for cross-attention."""
    temperature: float = identity(1.0, above=0)
    """Temperature of the logit loss, which is multiplied by its square."""
    fused: bool = operational(True)
    """Compute losses with the fused kernels of pipeline/kernels. false takes their definitions in plain PyTorch, which
    give the same but for rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "logit", "task", "attention_self", "attention_cross"):
            weight = getattr(self, name)
            points = ((0, weight),) if isinstance(weight, (int, float)) else weight
            _require(len(points) > 0, f"{name} has no points: give a number or [[step, weight], ...]")
            _require(min(value for _, value in points) >= 0, f"{name} has a weight below 0: {weight}")
            steps = [step for step, _ in points]
            _require(steps == sorted(set(steps)), f"the steps of {name} must rise: {steps}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """Training of the modular layers over the frozen teacher."""

    granularities: tuple[int, ...] = identity((2, 3, 6), low=2)
    """How many teacher layers a modular layer stands for. For each granularity, modular layers are made for both stacks
    (encoder and decoder)."""
    encoder_granularities: tuple[int, ...] | None = identity(None, low=2)
    """The encoder's own granularities, instead of those above; [] leaves the encoder whole."""
    decoder_granularities: tuple[int, ...] | None = identity(None, low=2)
    """The decoder's own granularities, instead of those above; [] leaves the decoder whole."""
    init: str = identity("first", choices=("first", "middle", "last", "average"))
    """What a modular layer starts as: a copy of the first, middle or last layer of its span (the teacher layers that it
    stands for), or the average of them. Of two middle layers it is the earlier one."""
    local_steps: int = identity(250, low=0)
    """Steps of the local phase, where each modular layer learns its span from the teacher's own states. The steps after
    it are the replacing phase, where modular layers replace their spans in the teacher and are trained together. 0
    leaves the local phase out, as many as optim.num_steps the replacing phase."""
    sampler: str = identity("stratified", choices=SAMPLERS)
    """How the replacing phase samples, for each micro-batch, an assembly (which modular layers replace which spans):
    stratified (a stack takes one granularity throughout, or any tiling, that is any choice of spans: see
    coarse_weight),
    uniform (every tiling is as likely as any other),
    sandwich (the coarsest assembly in every other micro-batch, uniform in the rest),
    theseus-constant, theseus-linear (as in BERT-of-Theseus: each span is replaced with chance replace_rate, which jumps
    to 1 at the end of the ramp, or rises to 1 over it),
    coarse-to-fine, fine-to-coarse (stratified over some granularities: the coarsest or the finest at first, one more
    in each equal part of the ramp, all of them after it)."""
    draws: tuple[str, ...] = identity((SAMPLED, CROSSED, COARSEST), before=(SAMPLED,))
    """Assemblies that share a micro-batch of the replacing phase and one pass of the teacher. The loss is their mean.
    Choose from sampled (as `sampler` says; several of these are sampled independently), coarsest (the assembly with the
    fewest layers), pure (every granularity throughout, an assembly each), pure-3 (granularity 3 throughout), crossed
    (as pure, but each decoder below an encoder of another granularity or the teacher's own, drawn anew each time). What
    is always among them becomes good; each costs its own layers forward and backward."""
    coarse_weight: float = identity(0.5, low=0, high=1)
    """For the samplers stratified, coarse-to-fine and fine-to-coarse: share of the draws in which a stack takes one
    granularity throughout, chosen in proportion to its size. The others are uniform over all tilings."""
    replace_rate: float = identity(0.5, above=0, high=1)
    """For the theseus samplers: chance that a span is replaced at the start of the replacing phase."""
    ramp: float = identity(0.5, low=0, high=1)
    """For the theseus samplers, and for coarse-to-fine and fine-to-coarse: share of the replacing phase after which
    every span is replaced, or every granularity is admitted."""
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    compile_layers: bool = operational(False)
    """Compile the layers by torch.compile at the start, in minutes. Where that cannot be (ZeRO-3, recomputed
    activations, no compiler) they run as they are, and the log says why. Attention losses always take them so."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.all_granularities) > 0, "granularities must name at least one granularity, such as [2, 3, 6]")
        known = (SAMPLED, COARSEST, CROSSED, PURE, *(f"{PURE}-{each}" for each in sorted(self.all_granularities)))
        _require(len(self.draws) > 0, f"distill.draws names none: give one or more of {', '.join(known)}")
        for each in self.draws:
            _require(each in known, f"distill.draws has {each!r}: choose from {', '.join(known)}")
        _require(self.optim.num_steps > 0, "distill.optim.num_steps is 0: there would be no modular layers")
        _require(
            self.local_steps <= self.optim.num_steps,
            f"distill.local_steps is {self.local_steps}: choose at most distill.optim.num_steps, "
            f"which is {self.optim.num_steps}",
        )

    def granularities_of(self, stack: str) -> tuple[int, ...]:
        """Granularities of "encoder" or "decoder"; none for a stack that is left whole."""
        own = {"encoder": self.encoder_granularities, "decoder": self.decoder_granularities}[stack]
        return self.granularities if own is None else own

    def stacks(self, num_layers: tuple[int, int]) -> Stacks:
        """The stacks of a teacher with so many (encoder, decoder) layers, and the spans that get a modular layer."""
        return Stacks.of(num_layers, self.by_stack)

    @property
    def by_stack(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Granularities of (encoder, decoder)."""
        return self.granularities_of("encoder"), self.granularities_of("decoder")

    @property
    def all_granularities(self) -> tuple[int, ...]:
        """Granularities of either stack, each once."""
        return tuple(dict.fromkeys(sum(self.by_stack, ())))


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(Settings):
    """Small models trained one by one on the same data, for comparison. Each has as many layers as an assembly."""

    methods: tuple[str, ...] = identity(("finetune",), choices=("finetune", "logit", "theseus"))
    """finetune (keep some of the teacher's layers, train with the task loss), logit (the same with the logit loss, too,
    weights as in distill.losses), theseus (BERT-of-Theseus: one granularity, task loss only)."""
    ratios: tuple[float, ...] = identity((), above=1)
    """Ratios of layers at which each method makes a model, by the preset size-first. Empty: that of the coarsest."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Training of each small model; num_steps = 0 leaves the baselines out."""


@dataclass(frozen=True, kw_only=True)
class RecoverConfig(Settings):
    """A short fine-tuning of one assembly (python -m pipeline recover), published only if it is not worse for it."""

    assembly: str = identity("")
    """The assembly to tune, in its text form, such as e2x3-d6."""
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(num_steps=300, learning_rate=1e-4, warmup_steps=30)
    )
    """Training of all its layers on the references, with the batch of distill."""
    validation_examples: int = identity(500, low=1)
    """Validation examples whose BLEU and loss decide; they are decoded as evaluate says."""


@dataclass(frozen=True, kw_only=True)
class AssembleConfig(Settings):
    """Which checkpoints to put together."""

    ratios: tuple[float, ...] = identity((1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0), low=1)
    """How many times fewer layers than the teacher. Ratio r asks for round(layers / r), both stacks together."""
    presets: tuple[str, ...] = identity(PRESETS, choices=(*PRESETS, SEARCHED))
    """Ways to choose an assembly for a ratio: size-first (shorten both stacks alike), speed-first (shorten the decoder
    first), searched (what the section search finds)."""
    assemblies: tuple[str, ...] = identity(())
    """Further assemblies by their text form, such as e2x3-d6: encoder of 3 layers for 2 teacher layers each, decoder of
    one layer for 6."""
    ctranslate2: tuple[str, ...] = identity((), before=(), choices=QUANTIZATIONS)
    """Quantizations, such as int8, in which the teacher and every assembly are also written as models of CTranslate2;
    each is scored and timed beside its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Scoring of all systems in one batch."""

    test: tuple[str, ...] = identity((), before=())
    """Files to score on in place of data.test, read in the same way. A run that is done is not trained again."""
    max_examples: int = identity(1000, low=1)
    """How many examples to score, taken evenly from the test part."""
    max_new_tokens: int = identity(128, low=1)
    """Longest output, in tokens."""
    num_beams: int = identity(1, low=1)
    """Beams of beam search; 1 is greedy decoding."""
    dtype: str = identity("checkpoint", choices=("checkpoint", "tf32", "bfloat16"), before="checkpoint")
    """What systems are decoded and timed in: checkpoint (the type they are saved in: fp32 of assemblies), tf32 (the
    same, products rounded as NVIDIA GPUs of 2020 and later do it fast; elsewhere as checkpoint) or bfloat16."""
    folders: tuple[str, ...] = identity(())
    """Folders of other encoder-decoder models for the same table and sources, with prefix: FOLDER or NAME=FOLDER."""
    bleu_tokenizer: str = identity("auto", before="13a", choices=BLEU_TOKENIZERS)
    """What BLEU takes for words, by sacreBLEU's name: 13a (cut at spaces and signs), zh, ja-mecab, ko-mecab, char and
    others. auto goes by the records' language, or by the script of the references; where the packages of ja-mecab and
    ko-mecab are missing, it takes char for Japanese and 13a for Korean."""
    metricx: str = identity("", before="")
    """Folder of a MetricX-24 model with the tokenizer of mT5, which judges every output; empty: none."""
    same_source: str = identity("examples", before="examples", choices=("examples", "references"))
    """What test records are that have the same source: examples of their own, or further references of the first."""
    tokens_per_batch: int = operational(8192, low=1)
    """Largest padded size of a decoding batch, in tokens."""
    latency_examples: int = operational(20, low=1)
    """Examples decoded one at a time to measure latency."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Settings):
    """How many processes `python -m pipeline run` starts on this machine."""

    num_ranks: int = operational(1, low=1)
    """Training processes that torchrun starts; one for each GPU."""
    num_mpi_ranks: int = operational(2, low=1)
    """MPI ranks that prepare data."""
    threads_per_rank: int = operational(1, low=1)
    """CPU threads of a process."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that describes a run."""

    name: str = operational("run")
    """Name in reports and job names."""
    run_dir: str = operational("")
    """Folder of the run; empty: runs/<name>."""
    seed: int = identity(0, low=0)
    """Seed of every random choice."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    baseline: BaselineConfig = dataclasses.field(default_factory=BaselineConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    recover: RecoverConfig = dataclasses.field(default_factory=RecoverConfig)
    assemble: AssembleConfig = dataclasses.field(default_factory=AssembleConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            not self.teacher.folder or bool(self.data.tokenizer),
            f"teacher.folder is {self.teacher.folder} but data.tokenizer is empty: give the teacher's folder there too",
        )

    @property
    def resolved_run_dir(self) -> str:
        return self.run_dir or f"runs/{self.name}"
