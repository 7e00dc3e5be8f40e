"""4 - evaluate on the tasks of EleutherAI's lm-eval: its engine, its numbers, a record of ours."""

import contextlib
import difflib
import importlib.util
import io
import math
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.errors import WeLoreError, choose, first_line
from welore.models.load import DTYPES, made_ready, warn_if_slow
from welore.models.replace import sizes
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_tasks(
    model: "str | Path | PreTrainedModel",
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str | None = None,
    label: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    quiet: bool = True,
) -> Record:
    """Record of MODEL on stock tasks (or groups, tags) of lm-eval, beside its ERR, parameter ratio and bytes.

    tasks_dir: only the tasks defined there (yaml files), none of lm-eval's own. limit: only the first documents of each
    task. numbers["tasks"]: of every task, and group, its metrics as lm-eval names them, n and the version of the task.
    quiet: without lm-eval's progress bars. Needs the extra `eval`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise WeLoreError("tasks of lm-eval need the package lm-eval: pip install 'welore[eval]'")
    choose("dtype", dtype, DTYPES)
    for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise WeLoreError(f"{name} is {value}: it must be at least 1")
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise WeLoreError(f"{tasks_dir} is not a directory: --tasks-dir names one with task definitions (.yaml)")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = tasks_dir is not None
    known = TaskManager(include_path=str(tasks_dir) if own else None, include_defaults=not own)
    _refuse_unknown(tasks, known.all_tasks)
    ready = made_ready(
        model, tokenizer, dtype=dtype, device=device, cache_dir=cache_dir, revision=revision, label=label
    )
    warn_if_slow(ready.model.dtype, ready.model.device)
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        engine: Any = HFLM(pretrained=ready.model, tokenizer=ready.tokenizer, batch_size=batch_size)
        try:
            found = simple_evaluate(
                engine, tasks=list(tasks), limit=limit, task_manager=known, log_samples=False, bootstrap_iters=0
            )
        except OSError as error:  # a data set that is not there, or no way to the hub
            raise WeLoreError(f"the data of {', '.join(tasks)} cannot be read: {first_line(error)}") from error
    numbers = {"tasks": _numbers(found), "seconds": time.perf_counter() - started}
    settings = {
        "tasks": list(tasks),
        "tasks_dir": None if tasks_dir is None else str(tasks_dir),
        "limit": limit,
        "batch_size": batch_size,
        "dtype": str(ready.model.dtype).removeprefix("torch."),
        "device": str(ready.model.device),
        "lm_eval": metadata.version("lm_eval"),
    }
    return Record("lm_eval", ready.inputs, settings, numbers | sizes(ready.model))


def _refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise WeLoreError("no task is named: --lm-eval takes names with commas between, such as boolq,piqa")
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise WeLoreError(f"unknown lm-eval task {task!r}{hint} ({len(known)} are known)")


def _numbers(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics ("acc", or "exact_match (strict-match)" where a filter is named), n and version of every task."""
    tasks = {}
    for name, measured in found["results"].items():
        counts = found.get("n-samples", {}).get(name, {})
        metrics = {}
        for key, value in measured.items():
            metric, comma, way = key.partition(",")
            if comma and isinstance(value, int | float):
                title = metric if way == "none" else f"{metric} ({way})"
                metrics[title] = float(value) if math.isfinite(value) else None
        tasks[name] = {"metrics": metrics, "n": counts.get("effective"), "version": found["versions"].get(name)}
    return tasks
