"""Every setting of the package, in one place: its type, its default, its help text and its check.

A verb takes one of these frozen dataclasses. The command line, `--config file.yaml` and the records are made from
their fields. Registries (STRATEGIES, SCALINGS, METHODS, ...) have exactly the names of the closed sets below.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args

from welore.errors import WeLoreError, choose, did_you_mean

StrategyName = Literal["welore", "uniform", "owl", "energy", "waterfill"]
ScalingName = Literal["none", "asvd", "whitening", "kfac"]
StorageName = Literal["factored", "pivoted", "auto"]
PresetName = Literal["best", "fast", "paper"]
Goal = Literal["auto", "cpu", "gpu", "size", "anywhere"]
MethodName = Literal["lrc", "nlrc", "full", "lora", "rslora", "dora", "updates", "galore", "apollo"]
TrainableName = Literal["auto", "factors", "updates"]
TaskName = Literal["commonsense_qa", "svamp", "boolq", "coin_flip", "object_tracking", "strategy_qa"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
BosName = Literal["auto", "window", "text", "never"]
OpeningName = Literal["vocabulary", "word", "nothing", "chat"]
WriterName = Literal["transformers", "vllm"]
DeviceMapName = Literal["auto"]
TrackerName = Literal["none", "tensorboard", "trackio", "wandb"]
WeightsName = Literal["auto", "int8"]
ExportFormat = Literal["dense", "int8", "gguf", "onnx"]
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
Settings = TypeVar("Settings")
MinRatio = float | Literal["break-even"]
Pruning = float | Literal["auto"]

NONE, ASVD, WHITENING, KFAC = "none", "asvd", "whitening", "kfac"
INPUT = "input"
PLAIN = (NONE, ASVD)  # scalings whose values are not losses in a unit that all matrices share
BREAK_EVEN: Literal["break-even"] = "break-even"
AUTO: Literal["auto"] = "auto"
CPU: Literal["cpu"] = "cpu"
GPU: Literal["gpu"] = "gpu"
SIZE: Literal["size"] = "size"
ANYWHERE: Literal["anywhere"] = "anywhere"
SELF = "self"  # a dataset: text that the model (of a fine-tuning, its teacher) writes
SHARD_SIZE = "5GB"
NUM_TOKENS, MAX_LENGTH = 65_536, 512  # of calibration
TOP_LOGPROBS = 1024  # likeliest tokens that are saved of every prediction
LARGEST = (1 << 31) - 1  # of all counts
LEAST_PROBES = 4  # of a pre-training, to describe its course
TARGETS = "rank_reduction", "keep", "threshold"
RATES, DURATIONS = ("learning_rate", "relative_learning_rate"), ("max_steps", "num_train_epochs")
CHECKPOINTING = "gradient_checkpointing", "selective_checkpointing"
# Of each of these options one may be given.
ALTERNATIVES = TARGETS, RATES, DURATIONS, CHECKPOINTING, ("dataset", "lm_eval"), ("preset", "paper")
BOS = "Begin every window with BOS (window), only a text (text), nothing (never); auto: as the tokenizer's family does."
DEVICE_MAP = "Spread a model larger than one device over all of them, the host's memory and the disk: auto."

# A text: a name, a hub id, a file, several of them with weights ("wikitext2:1,my.txt:2"), a list of strings, a
# datasets.Dataset, or windows of token ids (count, length).
Dataset = Any


def option(default: Any, help: str, *, panel: str = "Options", **more: Any) -> Any:
    """A field of a settings class.

    help: one sentence in the imperative, for the command line and the reference. panel: where `--help` shows it.
    more: `flag`, its name on the command line if that is not the field's; `shown`, a default that depends on others.
    """
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(**factory, metadata={"help": help, "panel": panel} | more)


# --- what travels through every verb --------------------------------------------------------------------------------


class RunOptions(TypedDict, total=False):
    """Keyword arguments of every verb: the fields of RunConfig, and what only Python can give.

    progress may be a function (items with costs, label, total) -> items. tokenizer: of a model in memory. processes:
    those that share the work (io.parallel.Processes).
    """

    device: str
    workers: int | None
    cache_dir: str | Path | None
    revision: str | None
    trust_remote_code: bool
    overwrite: bool
    progress: bool | Callable[..., Any] | None
    tokenizer: Any
    processes: Any


@dataclass(frozen=True)
class RunConfig:
    """Where a verb computes and what it may replace."""

    device: str = option("auto", "Where to compute: auto (a GPU if there is one), cpu, cuda:1, mps.", panel="Run")
    workers: int | None = option(
        None,
        "Matrices in work at once, fewer where memory is short.",
        panel="Run",
        shown="one per core on a CPU, two on a GPU",
    )
    cache_dir: str | Path | None = option(None, "Where downloads and converted .gguf files are kept.", panel="Run")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", panel="Run")
    trust_remote_code: bool = option(False, "Run the Python code that comes with a model.", panel="Run")
    overwrite: bool = option(False, "Replace an existing result.", panel="Run")
    progress: bool | None = option(None, "Show progress.", panel="Run", shown="where the output is a terminal")

    def __post_init__(self) -> None:
        require_at_least(1, workers=self.workers)

    @property
    def options(self) -> RunOptions:
        """The same as keyword arguments of a verb."""
        return cast(RunOptions, dict(vars(self)))


# --- compression ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllocationConfig:
    """How large the result is, and how ranks are shared out among the matrices."""

    keep: float | None = option(None, "Target: share of the parameters to keep, 0 to 1.", panel="Target")
    rank_reduction: float | None = option(None, "Target: effective rank reduction (ERR), 0 to 1.", panel="Target")
    threshold: float | None = option(None, "Target: the threshold on normalised singular values.", panel="Target")
    strategy: StrategyName | None = option(
        None,
        "How to compare singular values of different matrices.",
        panel="Method",
        shown="waterfill; welore if plain",
    )
    storage: StorageName | None = option(
        None, "How to store low-rank matrices.", panel="Method", shown="auto, the smaller; factored if plain"
    )
    min_ratio: MinRatio | None = option(
        None,
        "Factor a matrix only if it loses more than this share of its rank; break-even: if that makes it smaller.",
        panel="Method",
        shown="the strategy's own",
    )
    allow_growth: bool = option(False, "Also factor matrices that become larger by it.", panel="Method")
    optimize_for: Goal = option(
        AUTO,
        "Where the result runs fast (cpu, gpu: fewer and larger products), or size; anywhere: narrower MLPs alone, an "
        "ordinary checkpoint without welore; auto: where compress computes, for presets best and fast, else size.",
        panel="Target",
        flag="for",
    )
    rank_multiple: int | None = option(
        None,
        "Make ranks and MLP widths multiples of this.",
        panel="Method",
        shown="16 for a cpu, 64 for a gpu, 1 for size, up to 256 for anywhere",
    )

    def __post_init__(self) -> None:
        for name in TARGETS:
            value = getattr(self, name)
            # With allow_growth factors may outgrow the matrix, at most twice.
            if value is not None and (isinstance(value, bool) or not 0 <= value <= (2 if name == "keep" else 1)):
                raise WeLoreError(f"{name} is {value}: it is a fraction between 0 and 1 (0.3 means 30 per cent)")
        if self.min_ratio is not None and self.min_ratio != BREAK_EVEN and not 0 <= float(self.min_ratio) < 1:
            raise WeLoreError(f"min_ratio is {self.min_ratio}: it is a fraction from 0 to below 1, or {BREAK_EVEN!r}")
        require_at_least(1, rank_multiple=self.rank_multiple)
        require_choice("goal", self.optimize_for, Goal)

    @property
    def target(self) -> tuple[str, float]:
        """Name and value of the one target; WeLoreError for none or several."""
        targets = {name: getattr(self, name) for name in TARGETS}
        given = [(name, float(value)) for name, value in targets.items() if value is not None]
        if len(given) != 1:
            raise WeLoreError("give exactly one target: keep, rank_reduction or threshold")
        return given[0]


@dataclass(frozen=True)
class AnalysisConfig:
    """Which matrices are decomposed, and in which norm."""

    scaling: ScalingName | None = option(
        None,
        "Decompose the weights (none), or weights scaled by statistics.",
        panel="Method",
        shown="kfac with statistics, else none",
    )
    split: bool | None = option(
        None, "Cut matrices at least twice as long as wide block by block.", panel="Method", shown="with scaling kfac"
    )
    include: tuple[str, ...] = option((), "Target only modules that match: q_proj, 'layers.*.mlp'.", panel="Targets")
    exclude: tuple[str, ...] = option((), "Leave modules that match dense.", panel="Targets")


@dataclass(frozen=True)
class CompressionConfig(AnalysisConfig, AllocationConfig):
    """The method of `compress`. A field that is None follows the preset, or the scaling without one."""

    preset: PresetName | None = option(
        None,
        "best: the lowest loss for the size; fast: the same from few tokens, no recovery; paper: WeLore as published.",
        panel="Target",
        shown="best for a size alone",
    )
    mlp_pruning: Pruning | None = option(
        None,
        "Share of the MLP neurons to take out before factorisation; auto: those that cost less than they store.",
        panel="Method",
        shown="auto for presets best and fast, else 0",
    )
    expert_pruning: float = option(0.0, "Share of each layer's experts to take out before all else.", panel="Method")
    weights: WeightsName = option(
        AUTO, "Store the weights of the result in 8 bits (int8), or in the model's dtype (auto).", panel="Method"
    )
    max_shard_size: str = option(SHARD_SIZE, "Largest size of one weight file.", panel="Run")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("weights", self.weights, WeightsName)
        if self.scaling is not None:
            object.__setattr__(self, "scaling", current_name(self.scaling))
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise WeLoreError(f"max_shard_size is {self.max_shard_size!r}: write it like '500MB' or '5GB'")
        if self.mlp_pruning not in (None, AUTO) and not 0 <= float(self.mlp_pruning or 0) < 1:
            raise WeLoreError(
                f"mlp_pruning is {self.mlp_pruning}: it is the share that is taken out, from 0 to below 1, or {AUTO!r}"
            )
        if not 0 <= self.expert_pruning < 1:
            raise WeLoreError(f"expert_pruning is {self.expert_pruning}: it is the share taken out, from 0 to below 1")


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the statistics are taken from, and how."""

    dataset: Dataset = option(
        SELF,
        "self (the model writes), a name, hub id or file, or several with weights: wikitext2:1,my.txt:2.",
        panel="Calibration",
    )
    dataset_split: str | None = option(None, "Split of a hub data set.", panel="Calibration", shown="train")
    text_column: str = option("text", "Column or field of the text.", panel="Calibration")
    bos: BosName = option("auto", BOS, panel="Calibration")
    num_tokens: int | None = option(
        None,
        "Tokens to read, rounded up to whole windows.",
        panel="Calibration",
        shown=f"{NUM_TOKENS}; preset fast 4096",
    )
    max_length: int | None = option(
        None, "Tokens of a window.", panel="Calibration", shown="512, or what the model reads"
    )
    seed: int = option(0, "Random seed.", panel="Calibration")
    batch_size: int = option(4, "Windows in work at once.", panel="Calibration")
    dtype: DtypeName = option(AUTO, "Dtype of products; auto: bfloat16 where the device has it.", panel="Calibration")
    measure_losses: float = option(
        0.25, "Share of the windows on which the loss of every cut is measured; 0: none.", panel="Calibration"
    )
    split: bool = option(True, "Measure losses block by block, as compress cuts.", panel="Calibration")
    temperature: float = option(1.0, "Sampling temperature of self-written text.", panel="Self-written text")
    top_k: int = option(0, "Sample from the k likeliest tokens; 0: from all.", panel="Self-written text")
    top_p: float = option(1.0, "Sample from the likeliest tokens up to this probability.", panel="Self-written text")
    first: OpeningName = option("vocabulary", "Beginning of a self-written text.", panel="Self-written text")
    writer: WriterName = option(
        "transformers",
        "Engine of self-written text; vllm: for a model that no single device holds.",
        panel="Self-written text",
    )
    whole_model: bool | None = option(
        None,
        "Run the model whole, not block by block.",
        panel="Calibration",
        shown="where it is small and memory large",
    )
    include: tuple[str, ...] = option((), "Target only modules that match: q_proj, 'layers.*.mlp'.", panel="Targets")
    exclude: tuple[str, ...] = option((), "Leave modules that match out.", panel="Targets")

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DtypeName)
        require_choice("writer", self.writer, WriterName)
        require_at_least(1, num_tokens=self.num_tokens, batch_size=self.batch_size)
        require_at_least(2, max_length=self.max_length)
        if not 0 <= self.measure_losses <= 1:
            raise WeLoreError(f"measure_losses is {self.measure_losses:g}: it is a share of the windows, 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise WeLoreError(f"temperature is {self.temperature}: it must be above 0 (1 is the model's own)")
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise WeLoreError(f"top_k is {self.top_k}: it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise WeLoreError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    @property
    def tokens(self) -> int:
        """How many tokens are read, before they are rounded."""
        return self.num_tokens or NUM_TOKENS


@dataclass(frozen=True)
class RecoveryConfig:
    """The short training of the factors, from the dense model as teacher, that ends `compress`."""

    dataset: Dataset = option(
        SELF,
        "Text for the recovery training: self (what the model wrote), texts as for calibration, or none.",
        panel="Recovery",
        flag=None,
    )
    num_tokens: int | None = option(
        None, "Tokens to read of a text that people wrote.", panel="Recovery", flag=None, shown="as for calibration"
    )
    trainable: TrainableName = option(
        AUTO,
        "Train the factors, low-rank updates of them, or (auto) the factors if they fit into memory; without factors, "
        "the matrices.",
        panel="Recovery",
        flag="recovery-trainable",
    )
    rank: int = option(8, "Rank of the updates.", panel="Recovery", flag="recovery-rank")
    host_memory: float = option(
        6e9, "Bytes on a CPU above which auto takes the way that needs least memory.", panel="Recovery", flag=None
    )
    max_steps: int = option(64, "Steps at most on self-written text.", panel="Recovery", flag="recovery-max-steps")
    steps_per_share: float = option(
        160.0, "Steps at most on self-written text, over the share of parameters removed.", panel="Recovery", flag=None
    )
    batch_size: int = option(2, "Windows of a step.", panel="Recovery", flag="recovery-batch-size")
    learning_rate: float | None = option(
        None, "Peak learning rate.", panel="Recovery", flag="recovery-learning-rate", shown="from the factors' size"
    )
    relative_learning_rate: float = option(
        1 / 1500,
        "Automatic learning rate over the root mean square of the factors, times the share of parameters removed.",
        panel="Recovery",
        flag=None,
    )
    fallbacks: tuple[float, ...] = option(
        (1.0, 0.25, 0.0625), "Shares of the learning rate to try until one does no harm.", panel="Recovery", flag=None
    )
    largest_share: float = option(
        0.2, "Largest share removed up to which longer runs have a larger rate.", panel="Recovery", flag=None
    )
    teacher_weight: float = option(0.5, "The teacher's share of the loss on a given text.", panel="Recovery", flag=None)
    tolerance: float = option(
        0.05, "Largest growth of the held-out loss, as a share of the loss of compression.", panel="Recovery", flag=None
    )
    warmup_steps: int = option(8, "Steps up to the peak.", panel="Recovery", flag="recovery-warmup-steps")
    save_steps: int = option(16, "Steps between checkpoints.", panel="Recovery", flag="recovery-save-steps")
    max_eval_samples: int = option(16, "Windows held out at most.", panel="Recovery", flag="recovery-max-eval-samples")

    def __post_init__(self) -> None:
        require_choice("trainable", self.trainable, TrainableName)
        counts = ("num_tokens", "rank", "max_steps", "batch_size", "save_steps", "max_eval_samples")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        require_at_least(0, warmup_steps=self.warmup_steps)
        require_number("above 0", learning_rate=self.learning_rate, relative_learning_rate=self.relative_learning_rate)
        require_number("above 0", steps_per_share=self.steps_per_share, host_memory=self.host_memory)
        require_number("above 0", **{f"fallbacks[{at}]": share for at, share in enumerate(self.fallbacks)})
        require_number("at least 0", tolerance=self.tolerance, largest_share=self.largest_share)
        if not self.fallbacks or not 0 < self.teacher_weight <= 1:
            raise WeLoreError(
                f"fallbacks is {self.fallbacks}, teacher_weight {self.teacher_weight}: give one share or more, and a "
                "weight above 0, at most 1"
            )


# --- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationConfig:
    """The text on which the perplexity of a model is measured."""

    dataset: Dataset = option("wikitext2", "A name, hub id or file (.txt, .jsonl, .parquet).", panel="Text")
    max_length: int = option(2048, "Tokens of a window.", panel="Text")
    num_windows: int | None = option(None, "Only the first windows.", panel="Text", shown="the whole text")
    batch_size: int = option(1, "Windows read at once; does not change the result.", panel="Text")
    dtype: DtypeName = option("auto", "Data type of the weights; auto is that of the checkpoint.", panel="Text")
    dataset_split: str | None = option(None, "Split of a hub data set.", panel="Text", shown="test")
    text_column: str = option("text", "Column or field of the text.", panel="Text")
    bos: BosName = option("auto", BOS, panel="Text")
    device_map: DeviceMapName | None = option(None, DEVICE_MAP, panel="Run", shown="one device")

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DtypeName)
        require_choice("device_map", self.device_map or AUTO, DeviceMapName)
        require_at_least(1, batch_size=self.batch_size, num_windows=self.num_windows)
        require_at_least(2, max_length=self.max_length)


@dataclass(frozen=True)
class ScoreConfig:
    """Which questions of a task a model answers."""

    task: TaskName | None = option(None, "The task.", panel="Task")
    dataset: str | Path | None = option(
        None, "The task's original file, or 'generated'.", panel="Task", shown="the hub's data set"
    )
    limit: int | None = option(None, "Only the first questions.", panel="Task")
    batch_size: int = option(8, "Questions answered at once.", panel="Task")
    dtype: DtypeName = option("auto", "Data type of the weights; auto is that of the checkpoint.", panel="Task")
    seed: int = option(0, "Random seed of generated questions.", panel="Task")
    device_map: DeviceMapName | None = option(None, DEVICE_MAP, panel="Run", shown="one device")

    def __post_init__(self) -> None:
        require_choice("device_map", self.device_map or AUTO, DeviceMapName)
        if self.task is not None:
            require_choice("task", self.task, TaskName)
        require_choice("dtype", self.dtype, DtypeName)
        require_at_least(1, batch_size=self.batch_size, limit=self.limit)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run. Fields that transformers' TrainingArguments has, too, have its names."""

    method: MethodName = option("lrc", "Parameters to train.", panel="Method")
    dataset: Dataset | None = option(
        None,
        "A text, conversations, or prompts with completions: hub id or file; self: the teacher writes it; a "
        ".safetensors file of windows.",
        panel="Data",
    )
    dataset_split: str | None = option(None, "Split of a hub data set.", panel="Data", shown="train")
    eval_dataset: Dataset | None = option(
        None, "Held-out rows of the same columns: hub id or file.", panel="Data", shown="of the data set"
    )
    eval_split: str | None = option(
        None, "Split of a hub data set to hold out.", panel="Data", shown="validation; without it the last tenth"
    )
    text_column: str | None = option(None, "Column or field of the text.", panel="Data", shown="text")
    messages_column: str | None = option(None, "Column of conversations.", panel="Data", shown="messages")
    prompt_column: str | None = option(None, "Column of prompts.", panel="Data", shown="prompt")
    completion_column: str | None = option(None, "Column of completions.", panel="Data", shown="completion")
    bos: BosName = option("auto", BOS, panel="Data")
    packing: bool = option(
        False, "Put several rows into a sequence; each sees itself alone. A text is packed in any case.", panel="Data"
    )
    task: TaskName | None = option(None, "A task to learn in place of a text.", panel="Data")
    task_dataset: str | Path | None = option(
        None, "The task's original file, or 'generated'.", panel="Data", shown="the hub's data set"
    )
    max_steps: int | None = option(
        None, "Optimiser steps.", panel="Training", shown="10000, 3 passes over rows at most; 1000 for a task"
    )
    num_train_epochs: float | None = option(None, "Passes over rows, in place of max_steps.", panel="Training")
    learning_rate: float | None = option(
        None, "Peak learning rate; a cosine brings it down to a tenth.", panel="Training", shown="by size of weights"
    )
    relative_learning_rate: float | None = option(
        None, "Peak learning rate over the rms of the weights.", panel="Training", shown="5e-4; adapters 3e-4"
    )
    warmup_steps: int | None = option(None, "Steps up to the peak.", panel="Training", shown="one in twenty")
    batch_size: int | None = option(None, "Sequences of a process.", panel="Training", shown="4; 8 for a task")
    gradient_accumulation_steps: int = option(1, "Batches added up to one step.", panel="Training")
    max_length: int | None = option(None, "Tokens of a sequence.", panel="Data", shown="1024; 512 for a task")
    seed: int = option(0, "Random seed.", panel="Training")
    dtype: DtypeName = option("auto", "Data type of the computation; what is trained stays float32.", panel="Training")
    save_dtype: DtypeName | None = option(
        None, "Data type of the result.", panel="Output", shown="of every tensor its own"
    )
    attention: str | None = option(
        None, "sdpa, eager, flash_attention_2, ...", panel="Training", shown="what transformers chooses"
    )
    train_norms: bool = option(False, "Train the norms, too (lrc, nlrc).", panel="Method")
    loss_on_prompt: bool = option(False, "Learn prompts and the users' turns, too.", panel="Data")
    rank: int | None = option(None, "Rank of adapters, or of galore and apollo.", panel="Method", shown="8; 128")
    optimizer: str = option("adamw_torch_fused", "Any optimiser of transformers' Trainer.", panel="Training")
    weight_decay: float = option(0.0, "Weight decay of dense matrices; factors have none.", panel="Training")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: not at all.", panel="Training")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.", panel="Memory")
    selective_checkpointing: bool = option(False, "Keep attention and wide products, recompute others.", panel="Memory")
    stream_weights: bool = option(
        False, "Keep frozen weights on the host; copy each to the device when it multiplies.", panel="Memory"
    )
    whole_logits: bool = option(False, "Compute the loss from all logits at once: more memory.", panel="Memory")
    eval_steps: int = option(500, "Steps between evaluations on held-out data; 0: never.", panel="Output")
    max_eval_samples: int = option(64, "Held-out sequences to evaluate on.", panel="Output")
    save_steps: int = option(500, "Steps between checkpoints; 0: none.", panel="Output")
    distill: str | Path | None = option(
        None,
        "A teacher to imitate: the dense model from which MODEL was made, or a file of windows with its predictions.",
        panel="Distillation",
    )
    distill_weight: float | None = option(
        None, "The teacher's share of the loss; the rest is the text's.", panel="Distillation", shown="1"
    )
    distill_temperature: float | None = option(
        None, "Temperature of both distributions.", panel="Distillation", shown="1"
    )
    self_tokens: int | None = option(
        None, "Tokens that the teacher writes for --dataset self.", panel="Distillation", shown="all that are read"
    )
    report_to: TrackerName = option("none", "Experiment tracker.", panel="Output")
    training_arguments: Mapping[str, Any] = option(
        dict, "Any other field of transformers' TrainingArguments.", panel="Training", flag=None
    )

    def __post_init__(self) -> None:
        require_choice("method", self.method, MethodName)
        require_choice("dtype", self.dtype, DtypeName)
        if self.save_dtype is not None:
            choose("dtype", self.save_dtype, dict.fromkeys(choices(DtypeName)[1:]))
        require_choice("tracker", self.report_to, TrackerName)
        if self.max_steps == -1:  # of the Trainer: as num_train_epochs says
            object.__setattr__(self, "max_steps", None)
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "max_eval_samples", "rank", "self_tokens")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        require_at_least(2, max_length=self.max_length)
        require_at_least(0, warmup_steps=self.warmup_steps, eval_steps=self.eval_steps, save_steps=self.save_steps)
        require_number("at least 0", weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm)
        for one, other in (RATES, DURATIONS):
            require_number("above 0", **{name: getattr(self, name) for name in (one, other)})
            if getattr(self, one) and getattr(self, other):
                raise WeLoreError(f"give {one} or {other}, not both")
        if not (isinstance(self.seed, Integral) and 0 <= self.seed < 1 << 32):
            raise WeLoreError(f"seed is {self.seed}: it must be a whole number from 0 to {(1 << 32) - 1}")
        if self.max_steps and self.warmup_steps and self.warmup_steps >= self.max_steps:
            raise WeLoreError(f"warmup_steps is {self.warmup_steps}: it must be less than the {self.max_steps} steps")
        if self.selective_checkpointing and self.gradient_checkpointing:
            raise WeLoreError("give gradient_checkpointing or selective_checkpointing, not both")
        self._check_distillation()
        if self.task is not None:
            require_choice("task", self.task, TaskName)
            if self.dataset is not None:
                raise WeLoreError("give dataset or task, one of them; task_dataset names the file of a task")
        elif self.task_dataset is not None:
            raise WeLoreError("task_dataset goes with task: dataset names a file of your own")

    def _check_distillation(self) -> None:
        own_text = isinstance(self.dataset, str) and self.dataset == SELF
        if self.distill is None:
            if self.distill_weight is not None or self.distill_temperature is not None:
                raise WeLoreError("distill_weight and distill_temperature go with distill, the teacher")
            if own_text:
                raise WeLoreError(f"dataset {SELF} is text that the teacher writes: name the teacher by distill")
        if self.distill_weight is not None and not 0 < self.distill_weight <= 1:
            raise WeLoreError(f"distill_weight is {self.distill_weight}: it is a share of the loss, above 0, at most 1")
        if self.distill_temperature is not None and not 0 < self.distill_temperature < float("inf"):
            raise WeLoreError(
                f"distill_temperature is {self.distill_temperature}: it must be above 0 (1 is the teacher's own)"
            )
        if own_text and self.num_train_epochs and self.self_tokens is None:
            raise WeLoreError("num_train_epochs passes over the teacher's text so often: give self_tokens, its length")
        if self.self_tokens is not None and not own_text:
            raise WeLoreError(f"self_tokens goes with dataset {SELF}, text that the teacher writes")


@dataclass(frozen=True)
class PretrainConfig:
    """A small Llama that is trained from nothing, and what is recorded on the way."""

    size: str = option("9m", "A name (2m, 9m, ...), or hidden/layers/heads/intermediate.", panel="Model")
    dataset: Dataset | None = option(None, "A text to train on.", panel="Data")
    dataset_split: str | None = option(None, "Split of a hub data set.", panel="Data", shown="train")
    text_column: str = option("text", "Column or field of the text.", panel="Data")
    bos: BosName = option("auto", BOS, panel="Data")
    tokenizer: str | None = option(
        None, "Hub model or directory to take the tokenizer from.", panel="Model", shown="a BPE of the text"
    )
    vocab_size: int = option(32_000, "Tokens of the BPE.", panel="Model")
    max_steps: int = option(25_000, "Optimiser steps.", panel="Training")
    learning_rate: float = option(1e-3, "Peak learning rate; a cosine brings it down to a tenth.", panel="Training")
    warmup_steps: int | None = option(None, "Steps up to the peak.", panel="Training", shown="one in twenty")
    batch_size: int = option(32, "Sequences of a process.", panel="Training")
    gradient_accumulation_steps: int = option(1, "Batches added up to one step.", panel="Training")
    max_length: int = option(256, "Tokens of a sequence.", panel="Data")
    seed: int = option(0, "Random seed.", panel="Training")
    dtype: DtypeName = option("auto", "Data type of the computation.", panel="Training")
    optimizer: str = option("adamw_torch_fused", "Any optimiser of transformers' Trainer.", panel="Training")
    weight_decay: float = option(0.0, "Weight decay of dense matrices; factors have none.", panel="Training")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0: not at all.", panel="Training")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.", panel="Training")
    probes: int = option(30, "Steps at which gradients and weights are recorded.", panel="Study")
    probe_items: int = option(32, "Sequences of each of the two batches of a probe.", panel="Study")
    max_eval_samples: int = option(128, "Held-out sequences to evaluate on.", panel="Study")
    save_steps: int = option(500, "Steps between checkpoints; 0: none.", panel="Training")
    report_to: TrackerName = option("none", "Experiment tracker.", panel="Training")

    def __post_init__(self) -> None:
        counts = ("vocab_size", "max_steps", "probes", "probe_items", "max_eval_samples")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        if self.probes < LEAST_PROBES or self.probes > self.max_steps:
            raise WeLoreError(
                f"probes is {self.probes}: give at least {LEAST_PROBES}, and no more than the {self.max_steps} steps "
                "of the run"
            )
        if self.probe_items < 1 or 2 * self.probe_items > self.max_eval_samples:
            raise WeLoreError(
                f"probe_items is {self.probe_items}, max_eval_samples {self.max_eval_samples}: the two batches of the "
                "probe, a sequence or more each, are part of the held-out sequences"
            )
        self.training()  # its checks

    def training(self) -> FinetuneConfig:
        """The settings of the training; fields of the same name are the same."""
        names = {f.name for f in dataclasses.fields(FinetuneConfig)} & {f.name for f in dataclasses.fields(self)}
        shared = {name: getattr(self, name) for name in names}
        return FinetuneConfig(method="full", eval_steps=self.max_steps, **shared)


# --- checks and records ---------------------------------------------------------------------------------------------


def settings_of(kind: type[Settings], given: Settings | None, **fields: Any) -> Settings:
    """The settings that are given, or the defaults, with fields that are not None; WeLoreError for a dict."""
    if given is not None and not isinstance(given, kind):
        raise WeLoreError(f"{type(given).__name__} is no settings: give welore.{kind.__name__}(...)")
    changes: Any = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(cast(Any, given if given is not None else kind()), **changes)


def require_at_least(minimum: int, **values: Any) -> None:
    """Raise WeLoreError for the first count below the minimum or beyond all sense; None is passed over."""
    for name, value in values.items():
        count, number = isinstance(value, Integral), isinstance(value, Real)
        if value is not None and not (count and minimum <= value <= LARGEST):
            too_low = number and not value >= minimum
            limits = f"at least {minimum}" if too_low else f"a whole number from {minimum} to {LARGEST}"
            raise WeLoreError(f"{name} is {value}: it must be {limits}")


def require_number(kind: Literal["above 0", "at least 0"], **values: Any) -> None:
    """Raise WeLoreError for the first value that is no finite number of that kind; None is passed over."""
    for name, value in values.items():
        number = isinstance(value, Real)
        if value is not None and not (number and (value > 0 or kind == "at least 0") and 0 <= value < float("inf")):
            raise WeLoreError(f"{name} is {value}: it must be a number, {kind}")


def require_options(names: Iterable[str]) -> None:
    """Raise WeLoreError for a keyword that no verb has; it names the settings classes that have such a field."""
    for name in names:
        if name not in RunOptions.__annotations__:
            kinds = [kind for kind in globals().values() if name in getattr(kind, "__dataclass_fields__", ())]
            classes = " or ".join(f"{kind.__name__}({name}=...)" for kind in kinds)
            hint = f": pass {classes}" if kinds else did_you_mean(name, RunOptions.__annotations__)
            raise WeLoreError(f"{name} is no keyword of this function{hint}")


def require_choice(kind: str, name: str, literal: Any) -> None:
    """Raise WeLoreError for a name that is not in the closed set; it names the nearest one and the whole set."""
    choose(kind, name, dict.fromkeys(choices(literal)))


def as_record(config: Any) -> dict[str, Any]:
    """The fields of a settings class as a record stores them: plain JSON values.

    A dataset that is no name becomes its type's name; what was read stands in the record's inputs with its digest.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("dataset", "eval_dataset"):
        if not isinstance(values.get(name), str | Path | Mapping | None):
            values[name] = type(values[name]).__name__
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple) and len(value) <= 64:
        return [_plain(v) for v in value]
    return type(value).__name__


def current_name(name: str) -> str:
    """The present name of a target or scaling that a file of version 0.1 gives."""
    return {"params": "keep", INPUT: WHITENING}.get(name, name)


def choices(literal: Any) -> tuple[str, ...]:
    """The names of a closed set."""
    return get_args(literal)
