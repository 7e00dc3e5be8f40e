"""The settings of a fine-tuning run: what can work, and how transformers' Trainer calls them."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from welore.data.mixture import SELF
from welore.errors import WeLoreError, choose
from welore.evaluation.tasks import TASKS
from welore.training.methods import METHODS, WITH_NORMS, WITH_RANK
from welore.training.run_dir import CHECKPOINTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAMW = "adamw_torch_fused"
TRACKERS = {"none": None, "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
# The paper's settings, section 4: of continual fine-tuning and of a task.
CONTINUAL = {"steps": 10_000, "batch_size": 4, "length": 1024}
DOWNSTREAM = {"steps": 1_000, "batch_size": 8, "length": 512}
WARM_UP_SHARE = 20  # one step in twenty: 500 of 10,000
DISTILLED = {"distill_weight": 1.0, "distill_temperature": 1.0}  # the teacher alone, at its own temperature

FSDP = "ACCELERATE_USE_FSDP"  # set by accelerate's launcher
IN_PARTS = ("lrc", "nlrc", "full")  # methods whose parameters may be cut over the processes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from the model and the material themselves. Written to run.json."""

    method: str
    data: str | None
    task: str | None
    task_data: str | None
    steps: int
    lr: float
    warmup: int
    batch_size: int
    accumulation: int
    length: int
    seed: int
    dtype: str
    save_dtype: str | None
    attention: str | None
    train_norms: bool
    loss_on_prompt: bool
    rank: int | None
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    selective_checkpointing: bool
    whole_logits: bool
    eval_every: int
    eval_items: int
    distill: str | None
    distill_weight: float | None
    distill_temperature: float | None
    self_tokens: int | None


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


def settled(asked: Mapping[str, Any], device: str) -> Settings:
    """The settings that were asked for, and the usual ones in place of None; on a GPU dtype "auto" is bfloat16."""
    usual: dict[str, Any] = dict(CONTINUAL if asked["task"] is None else DOWNSTREAM)
    found = usual | {name: value for name, value in asked.items() if value is not None or name not in usual}
    if found["warmup"] is None:
        found["warmup"] = found["steps"] // WARM_UP_SHARE
    if found["dtype"] == "auto":
        found["dtype"] = "bfloat16" if device.startswith("cuda") else "float32"
    if found["distill"] is not None:
        found |= {name: value for name, value in DISTILLED.items() if found[name] is None}
    names = {name: None if found[name] is None else str(found[name]) for name in ("task_data", "distill")}
    return Settings(**found | names)


def check(settings: Settings, save_every: int, report_to: str) -> None:
    """Raise WeLoreError for settings that cannot work, whatever the model."""
    choose("method", settings.method, METHODS)
    choose("dtype", settings.dtype, DTYPES)
    choose("dtype", settings.save_dtype or settings.dtype, DTYPES)
    choose("optimizer", settings.optimizer, {name.value: name for name in OptimizerNames})
    package = choose("tracker", report_to, TRACKERS)
    if package is not None and importlib.util.find_spec(package) is None:
        raise WeLoreError(f"--report-to {report_to} needs the package {package}: pip install {package}")
    if (settings.data is None) == (settings.task is None):
        raise WeLoreError(
            "give --dataset TEXT or --task NAME, one of them (the file of a task is named by --task-dataset)"
        )
    if settings.task is not None:
        choose("task", settings.task, TASKS)
    elif settings.task_data is not None or settings.loss_on_prompt:
        raise WeLoreError("--task-dataset and --loss-on-prompt go with --task: a text has no answers")
    if settings.train_norms and settings.method not in WITH_NORMS:
        raise WeLoreError(
            f"--train-norms goes with {' and '.join(WITH_NORMS)}; {settings.method} has a rule of its own"
        )
    if settings.rank is not None and settings.method not in WITH_RANK:
        raise WeLoreError(f"--rank goes with {' and '.join(WITH_RANK)}; {settings.method} has no rank")
    if settings.method == "galore" and settings.optimizer != ADAMW:
        raise WeLoreError("method galore is an optimizer itself: leave --optimizer out")
    if settings.selective_checkpointing and settings.gradient_checkpointing:
        raise WeLoreError("give --gradient-checkpointing or --selective-checkpointing, not both: which is to be kept?")
    _check_distillation(settings)
    positive = {name: getattr(settings, name) for name in ("steps", "batch_size", "accumulation", "eval_items")}
    for name, value in (positive | {"rank": 1 if settings.rank is None else settings.rank}).items():
        if value < 1:
            raise WeLoreError(f"{name} is {value}: it must be at least 1")
    for name, value in {"eval_every": settings.eval_every, "save_every": save_every}.items():
        if value < 0:
            raise WeLoreError(f"{name} is {value}: it is a number of steps, or 0 for never")
    if not settings.lr > 0 or settings.max_grad_norm < 0 or settings.weight_decay < 0:
        raise WeLoreError(
            f"lr is {settings.lr}, max_grad_norm {settings.max_grad_norm}, weight_decay {settings.weight_decay}: none "
            "of them can be negative, nor lr 0"
        )
    if not 0 <= settings.warmup < settings.steps:
        raise WeLoreError(f"warmup is {settings.warmup}: it must be less than the {settings.steps} steps of the run")


def check_launch(environment: Mapping[str, str], method: str, device: str, distill: str | Path | None = None) -> None:
    """Raise WeLoreError for what accelerate's launcher asks (by its variables) and this package cannot do."""
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise WeLoreError("finetune does not run under DeepSpeed: use accelerate launch --use_fsdp, or torchrun (DDP)")
    if not is_on(environment, FSDP):
        return
    if environment.get("FSDP_VERSION", "1") != "2":
        raise WeLoreError("finetune runs under FSDP 2 only: pass --fsdp_version 2 to accelerate launch")
    if is_on(environment, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise WeLoreError(
            "every process reads the checkpoint itself: pass --fsdp_cpu_ram_efficient_loading false as well"
        )
    if distill is not None:
        raise WeLoreError("--distill does not run under FSDP: use torchrun, which is DDP")
    if method not in IN_PARTS:
        raise WeLoreError(
            f"method {method} does not run under FSDP, only {', '.join(IN_PARTS)} do: use torchrun, which is DDP"
        )
    if device == "cpu":
        raise WeLoreError(
            "accelerate has no FSDP on a CPU and would use DDP without a word: use torchrun, which is DDP"
        )


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable of accelerate's launcher says yes."""
    return environment.get(name, "").lower() in ("1", "true")


def _check_distillation(settings: Settings) -> None:
    weight, temperature, tokens = settings.distill_weight, settings.distill_temperature, settings.self_tokens
    if settings.distill is None:
        if weight is not None or temperature is not None:
            raise WeLoreError("--distill-weight and --distill-temperature go with --distill TEACHER")
        if settings.data == SELF:
            raise WeLoreError(f"--dataset {SELF} is text that the teacher writes: name the teacher, --distill TEACHER")
    else:
        assert weight is not None
        assert temperature is not None
        if not 0 < weight <= 1:
            raise WeLoreError(f"distill_weight is {weight}: it is the teacher's share of the loss, above 0, at most 1")
        if not 0 < temperature < float("inf"):
            raise WeLoreError(f"distill_temperature is {temperature}: it must be above 0 (1 is the teacher's own)")
    if tokens is not None and settings.data != SELF:
        raise WeLoreError(f"--self-tokens goes with --dataset {SELF}, text that the teacher writes")
    if tokens is not None and tokens <= settings.length:
        raise WeLoreError(
            f"self_tokens is {tokens}: two blocks of {settings.length} tokens are needed, one of them to evaluate on"
        )


def arguments(settings: Settings, out: Path, save_every: int, report_to: str, device: str) -> TrainingArguments:
    """The same settings in transformers' words. Under torchrun this joins the other processes."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    on = settings.gradient_checkpointing
    how: dict[str, Any] = {checkpointing: on, checkpointing + "_kwargs": {"use_reentrant": False} if on else None}
    found = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        seed=settings.seed,
        bf16=settings.dtype == "bfloat16",
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every or None,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **how,
    )
    found._n_gpu = min(found.n_gpu, 1)  # several GPUs: one process each, by torchrun
    return found
