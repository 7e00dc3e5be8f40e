"""A FinetuneConfig -> its settings without gaps, checked, and transformers' TrainingArguments."""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from welore.config import SELF, FinetuneConfig
from welore.data.rows import refuse_of_rows
from welore.data.text import dataset_name
from welore.data.windows import is_windows
from welore.errors import WeLoreError, choose, did_you_mean, first_line
from welore.models.load import fastest
from welore.training.methods import METHODS, refuse_options

# The paper's settings, section 4: of continual fine-tuning and of a task.
CONTINUAL = {"batch_size": 4, "max_length": 1024}
DOWNSTREAM = {"batch_size": 8, "max_length": 512}
STEPS, TASK_STEPS, EPOCHS = 10_000, 1_000, 3  # passes over rows at most, as many as the Trainer makes
WARM_UP_SHARE = 20  # one step in twenty: 500 of 10,000
DISTILLED = {"distill_weight": 1.0, "distill_temperature": 1.0}  # the teacher alone, at its own temperature
FSDP = "ACCELERATE_USE_FSDP"  # set by accelerate's launcher
RENAMED = {  # words of TrainingArguments and TRL -> settings
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "batch_size"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "nothing, or loss_on_prompt for the opposite"),
    **{"eval_strategy": "eval_steps", "save_strategy": "save_steps", "optim": "optimizer", "lr": "learning_rate"},
    **{"resume_from_checkpoint": "resume", "push_to_hub": "nothing, and upload OUTPUT_DIR/model afterwards"},
    **{"bf16": "dtype", "fp16": "dtype", "dataset_text_field": "text_column", "use_peft": "method lora"},
}
# Fields of TrainingArguments that a run would not obey: their work is done by settings of our own, or not at all.
IGNORED = ("num_train_epochs", "train_sampling_strategy", "data_seed", "fsdp", "deepspeed", "do_train", "do_eval")


def is_recorded(teacher: str | Path | None) -> bool:
    """Whether a teacher is no model but a file of windows with its predictions."""
    return teacher is not None and is_windows(teacher)


def resolve_defaults(config: FinetuneConfig, device: torch.device) -> FinetuneConfig:
    """The settings with the usual values in place of None and auto; WeLoreError for what cannot work together."""
    if is_recorded(config.distill):
        if config.task is not None or config.dataset not in (None, config.distill):
            raise WeLoreError(f"{config.distill} holds its own text: leave dataset and task out")
        if config.distill_temperature not in (None, 1):
            raise WeLoreError(f"distill_temperature is {config.distill_temperature}: recorded predictions have only 1")
        config = dataclasses.replace(config, dataset=config.distill)
    if config.dataset is None and config.task is None:
        raise WeLoreError("give dataset or task, one of them; task_dataset names the file of a task")
    if config.task is not None:
        refuse_of_rows(config, f"{config.task} holds out its own questions", ("eval_dataset", "eval_split"))
    elif is_windows(config.dataset) or (isinstance(config.dataset, str) and config.dataset == SELF):
        refuse_of_rows(config, f"{dataset_name(config.dataset)} is a text in windows of tokens")
    usual: dict[str, Any] = CONTINUAL if config.task is None else DOWNSTREAM
    usual = usual | (DISTILLED if config.distill is not None else {})
    values = {name: value for name, value in usual.items() if getattr(config, name) is None}
    if config.dtype == "auto":  # on a CPU float32, also where another one were faster
        values["dtype"] = fastest(device)["dtype"] if device.type == "cuda" else "float32"
    config = dataclasses.replace(config, **values)
    if config.dtype == "float16" and device.type == "cpu":
        raise WeLoreError("float16 is trained on a GPU only: use dtype float32 or bfloat16 on a CPU")
    if config.self_tokens is not None and config.self_tokens <= length_of(config):
        raise WeLoreError(f"self_tokens is {config.self_tokens}: two blocks of {config.max_length} tokens are needed")
    choose("optimizer", config.optimizer, {name.value: name for name in OptimizerNames})
    refuse_options(config.method, train_norms=config.train_norms, rank=config.rank)
    if config.stream_weights and not METHODS[config.method].streams:
        raise WeLoreError(f"method {config.method} reads the frozen weights at every step: leave stream_weights out")
    if METHODS[config.method].optimizer and config.optimizer != FinetuneConfig.optimizer:
        raise WeLoreError(f"method {config.method} is an optimizer itself: leave optimizer out")
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise WeLoreError(f"report_to {config.report_to} needs the package: pip install {config.report_to}")
    return config


def sequences_read(config: FinetuneConfig, processes: int) -> int:
    """How many sequences a run reads, in all its processes; at most, before its steps are resolved."""
    steps = config.max_steps or (STEPS if config.task is None else TASK_STEPS)
    return steps * cast(int, config.batch_size) * config.gradient_accumulation_steps * processes


def resolve_steps(config: FinetuneConfig, rows: int | None, processes: int) -> FinetuneConfig:
    """The settings with max_steps and warmup_steps; rows: sequences of one pass, None for a text."""
    step = cast(int, config.batch_size) * config.gradient_accumulation_steps * processes
    steps = sequences_read(config, processes) // step
    if rows is not None and config.max_steps is None:
        passes = math.ceil((config.num_train_epochs or EPOCHS) * rows / step)
        steps = passes if config.num_train_epochs else min(steps, passes)
    warmup = steps // WARM_UP_SHARE if config.warmup_steps is None else config.warmup_steps
    return dataclasses.replace(config, max_steps=steps, num_train_epochs=None, warmup_steps=warmup)


def length_of(config: FinetuneConfig) -> int:
    """Tokens of a sequence."""
    assert config.max_length
    return config.max_length


def check_launch(environment: Mapping[str, str], method: str, device: str, distill: Any = None) -> None:
    """Raise WeLoreError for a launch by accelerate (known by its variables) that this package does not support."""
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise WeLoreError("finetune does not run under DeepSpeed: use accelerate launch --use_fsdp, or torchrun (DDP)")
    if not is_on(environment, FSDP):
        return
    if environment.get("FSDP_VERSION", "1") != "2":
        raise WeLoreError("finetune runs under FSDP 2 only: pass --fsdp_version 2 to accelerate launch")
    if is_on(environment, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise WeLoreError("every process reads the checkpoint: pass --fsdp_cpu_ram_efficient_loading false as well")
    if distill is not None and not is_recorded(distill):
        raise WeLoreError("a teacher in memory does not run under FSDP: use torchrun, or a file of its predictions")
    if not METHODS[method].fsdp:
        names = ", ".join(name for name, entry in METHODS.items() if entry.fsdp)
        raise WeLoreError(f"method {method} does not run under FSDP, only {names} do: use torchrun, which is DDP")
    if device == "cpu":
        raise WeLoreError("accelerate has no FSDP on a CPU and would use DDP in silence: use torchrun, which is DDP")


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable of accelerate's launcher says yes."""
    return environment.get(name, "").lower() in ("1", "true")


def training_arguments(config: FinetuneConfig, output_dir: Path, device: torch.device) -> TrainingArguments:
    """The same settings in transformers' words. Under torchrun this joins the other processes."""
    usual: dict[str, Any] = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "logging_steps": 1,
        "save_total_limit": 2,
        "dataloader_pin_memory": device.type == "cuda",
    }
    if "lr_scheduler_type" in config.training_arguments:
        del usual["lr_scheduler_kwargs"]  # of our own schedule
    ours = _our_arguments(config, output_dir, device)
    for name in config.training_arguments:
        _require_field(name)
        if name in ours or name in IGNORED:
            raise WeLoreError(f"{name} is no training argument to give: fine-tuning sets it from its own settings")
    try:
        arguments = TrainingArguments(**ours, **(usual | dict(config.training_arguments)))
    except (ValueError, TypeError) as error:
        raise WeLoreError(f"a training argument cannot be used: {first_line(error)}") from error
    _use_device(arguments, device)
    return arguments


def _our_arguments(config: FinetuneConfig, output_dir: Path, device: torch.device) -> dict[str, Any]:
    fields, names = TrainingArguments.__dataclass_fields__, ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in fields)  # its newer name, or its older one
    on = config.gradient_checkpointing
    return {
        "output_dir": str(output_dir),
        "max_steps": config.max_steps or 1,  # known, with warmup_steps, as soon as the data is
        "learning_rate": config.learning_rate or 0.0,  # known as soon as the model is
        "warmup_steps": config.warmup_steps or 0,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "seed": config.seed,
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        "optim": config.optimizer,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        checkpointing: on,
        checkpointing + "_kwargs": {"use_reentrant": False} if on else None,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "eval_on_start": bool(config.eval_steps),
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "report_to": config.report_to,
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }


def _use_device(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on this device: alone, TrainingArguments takes the first GPU, or all of them by DataParallel."""
    if arguments.world_size == 1 and device.type == "cuda" and device.index is not None:
        arguments.distributed_state.device = device
        arguments._setup_devices = device  # the value of its property `device`
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: one process each, by torchrun


def training_argument(name: str, text: str) -> Any:
    """The value of a field of transformers' TrainingArguments from the text of a command line."""
    _require_field(name)
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False)  # type: ignore[arg-type]
    try:
        return getattr(parser.parse_args([f"--{name}={text}"]), name)
    except (argparse.ArgumentError, argparse.ArgumentTypeError, ValueError) as error:
        raise WeLoreError(f"--{name.replace('_', '-')} cannot be {text!r}: {first_line(error)}") from error


def _require_field(name: str) -> None:
    if name in RENAMED:
        raise WeLoreError(f"{name} is no training argument to give: give {RENAMED[name]}")
    if name not in TrainingArguments.__dataclass_fields__:
        hint = did_you_mean(name, [*FinetuneConfig.__dataclass_fields__, *TrainingArguments.__dataclass_fields__])
        raise WeLoreError(f"neither finetune nor transformers' TrainingArguments has an option {name!r}{hint}")
