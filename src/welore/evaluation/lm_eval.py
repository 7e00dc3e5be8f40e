"""Tasks of EleutherAI's lm-eval: its engine, its numbers, a record of ours."""

import contextlib
import importlib.util
import io
import math
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from welore.config import DtypeName, RunOptions, require_at_least, require_choice
from welore.data.windows import require_known_tokens
from welore.errors import WeLoreError, did_you_mean, first_line
from welore.evaluation.accuracy import refuse_nan
from welore.io.context import RunContext
from welore.io.progress import silent
from welore.models.load import LoadedModel, evaluating, load_model, warn_if_slow
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A name of ours -> tasks of lm-eval: those by which papers on compression compare.
SETS = {"zero-shot": ["arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "boolq", "mathqa"]}


def evaluate_tasks(
    model: "str | Path | PreTrainedModel",
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    label: str | None = None,
    **options: Unpack[RunOptions],
) -> Record:
    """Evaluate a model on tasks of EleutherAI's lm-eval. Needs the extra `eval`.

    Args:
        model: hub id, directory, .gguf file or model in memory; the last one needs the option `tokenizer`.
        tasks: names of tasks, groups or tags of lm-eval; "zero-shot" stands for the tasks of SETS.
        tasks_dir: read only the tasks that the .yaml files of this directory define.
        limit: read only the first documents of each task.
        batch_size: requests answered at once.
        dtype: of the weights; "auto" is that of the checkpoint.
        label: a name for tables.
        **options: device, progress (lm-eval's own bars), cache_dir, revision, tokenizer.

    Returns:
        A record of kind "lm_eval". numbers["tasks"] holds the metrics of every task and group under lm-eval's names,
        n and the version of the task; beside it stand effective rank reduction, parameter ratio and bytes.

    Raises:
        WeLoreError: lm-eval is absent, a task is unknown, or the model or the data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise WeLoreError("tasks of lm-eval need the package lm-eval: pip install 'welore[eval]'")
    require_choice("dtype", dtype, DtypeName)
    require_at_least(1, batch_size=batch_size, limit=limit)
    tasks = list(dict.fromkeys(task for name in tasks for task in SETS.get(name, [name])))
    context = RunContext.create(**options)
    directory = None if tasks_dir is None else str(tasks_dir)
    manager = _task_manager(tasks, directory)
    loaded = load_model(model, context, dtype, label)
    net = loaded.model
    warn_if_slow(net.dtype, net.device)
    started = time.perf_counter()
    without_bars = contextlib.redirect_stderr(io.StringIO())
    with evaluating(net), without_bars if context.progress is silent else contextlib.nullcontext():
        results = _run(loaded, tasks, manager, limit, batch_size)
    numbers = {"tasks": _numbers(results), "seconds": time.perf_counter() - started}
    settings = {
        "tasks": tasks,
        "tasks_dir": directory,
        "limit": limit,
        "batch_size": batch_size,
        "lm_eval": metadata.version("lm_eval"),
    }
    return loaded.record("lm_eval", settings, numbers)


def _task_manager(tasks: Sequence[str], tasks_dir: str | None) -> Any:
    """lm-eval's registry of tasks: its own, or those of a directory; WeLoreError if a task is not in it."""
    if not tasks:
        raise WeLoreError("no task is named: --lm-eval takes names with commas between, such as boolq,piqa")
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise WeLoreError(f"{tasks_dir} is not a directory: --tasks-dir names one with task definitions (.yaml)")
    from lm_eval.tasks import TaskManager

    manager: Any = TaskManager(include_path=tasks_dir, include_defaults=tasks_dir is None)
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise WeLoreError(f"unknown lm-eval task {task!r}{did_you_mean(task, known)} ({len(known)} are known)")
    return manager


def _run(loaded: LoadedModel, tasks: Sequence[str], manager: Any, limit: int | None, batch_size: int) -> Any:
    """The results of lm-eval; WeLoreError if a data set is not there and the hub cannot be reached."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model: Any = loaded.model
    engine: Any = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    common = {"task_manager": manager, "log_samples": False, "bootstrap_iters": 0}

    def check(module: Any, arguments: Any, outputs: Any) -> None:
        refuse_nan(outputs.logits[:, -1])

    checks = [
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: require_known_tokens(model, ids[0])),
        model.register_forward_hook(check),
    ]
    try:
        return simple_evaluate(engine, tasks=list(tasks), limit=limit, **common)
    except OSError as error:
        raise WeLoreError(f"the data of {', '.join(tasks)} cannot be read: {first_line(error)}") from error
    finally:
        for hook in checks:
            hook.remove()


def _numbers(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics ("acc", or "exact_match (strict-match)" where a filter is named), n and version of every task."""
    tasks = {}
    for name, measured in results["results"].items():
        counts = results.get("n-samples", {}).get(name, {})
        metrics = {}
        for key, value in measured.items():
            metric, comma, way = key.partition(",")
            if comma and isinstance(value, int | float):
                title = metric if way == "none" else f"{metric} ({way})"
                metrics[title] = float(value) if math.isfinite(value) else None
        tasks[name] = {"metrics": metrics, "n": counts.get("effective"), "version": results["versions"].get(name)}
    return tasks
