"""The verbs that measure a model: evaluate, score."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from welore.cli.ending import is_main_process
from welore.cli.from_config import Label, Model, RecordFile
from welore.cli.output import log, print_result, quiet_libraries
from welore.config import TOP_LOGPROBS, EvaluationConfig, RunConfig, ScoreConfig
from welore.errors import WeLoreError

if TYPE_CHECKING:
    from welore.records import Record


Against = Annotated[
    str | None,
    typer.Option(
        metavar="DENSE",
        help="Also measure the divergence from this model, or from a file that --save-logprobs wrote.",
        rich_help_panel="Text",
    ),
]
SaveLogprobs = Annotated[
    Path | None,
    typer.Option(help="File (.safetensors) to write: the model's predictions, for --against.", rich_help_panel="Text"),
]
TopLogprobs = Annotated[
    int, typer.Option(help="Likeliest tokens that this file holds of every prediction.", rich_help_panel="Text")
]
LmEval = Annotated[
    str | None, typer.Option(help="In place of a text: tasks of lm-eval, zero-shot,gsm8k.", rich_help_panel="lm-eval")
]
Limit = Annotated[
    int | None, typer.Option(help="Only the first questions of each of these tasks.", rich_help_panel="lm-eval")
]
TasksDir = Annotated[
    Path | None, typer.Option(help="Directory with the definitions (.yaml) of these tasks.", rich_help_panel="lm-eval")
]


def evaluate(
    model: Model,
    config: EvaluationConfig,
    run: RunConfig,
    as_json: bool,
    against: Against = None,
    save_logprobs: SaveLogprobs = None,
    top_logprobs: TopLogprobs = TOP_LOGPROBS,
    lm_eval: LmEval = None,
    limit: Limit = None,
    tasks_dir: TasksDir = None,
    label: Label = None,
    output: RecordFile = None,
) -> None:
    """Measure the perplexity of any checkpoint, or its results on tasks of lm-eval."""
    quiet_libraries()
    from welore.evaluation.lm_eval import evaluate_tasks
    from welore.evaluation.perplexity import evaluate
    from welore.io.claim import claimed

    if lm_eval is None and (limit, tasks_dir) != (None, None):
        raise WeLoreError("--limit and --tasks-dir go with --lm-eval; of a text, --num-windows are read")
    if lm_eval is not None and (against, save_logprobs) != (None, None):
        raise WeLoreError("--against and --save-logprobs go with --dataset: they are of predictions in a text")
    if lm_eval is not None:
        _require_no_text(config)
    with claimed(output, model, config, against, tasks_dir, overwrite=run.overwrite, leads=is_main_process()):
        if lm_eval is not None:
            names = [name.strip() for name in lm_eval.split(",") if name.strip()]
            size: dict[str, Any] = {"limit": limit, "batch_size": config.batch_size, "dtype": config.dtype}
            record = evaluate_tasks(model, names, tasks_dir=tasks_dir, label=label, **size, **run.options)
        else:
            saved = save_logprobs if is_main_process() else None
            how: dict[str, Any] = {"against": against, "save_logprobs": saved, "top_logprobs": top_logprobs}
            record = evaluate(model, config, label=label, **how, **run.options)
        if output is not None and is_main_process():
            record.save(output)
    line = _summary(record)
    print_result(record, as_json, line if output is None else f"{line} -> {output}")


def _require_no_text(config: EvaluationConfig) -> None:
    """Raise WeLoreError for an option of texts, which tasks do not read."""
    usual = EvaluationConfig()
    if config.device_map is not None:
        raise WeLoreError("--device-map goes with --dataset; for tasks, name a device that holds the model")
    if config.dataset != usual.dataset:
        raise WeLoreError("give --dataset or --lm-eval, not both: a text or tasks")
    if (config.max_length, config.num_windows, config.bos) != (usual.max_length, usual.num_windows, usual.bos):
        raise WeLoreError("--max-length, --num-windows and --bos go with --dataset; a task reads --limit questions")


def score(
    model: Model, config: ScoreConfig, run: RunConfig, as_json: bool, label: Label = None, output: RecordFile = None
) -> None:
    """Measure the accuracy on the evaluation part of a task."""
    quiet_libraries()
    from welore.evaluation.accuracy import score
    from welore.io.claim import claimed

    with claimed(output, model, config, overwrite=run.overwrite, leads=is_main_process()):
        record = score(model, config, label=label, **run.options)
        if output is not None and is_main_process():
            record.save(output)
    n = record.numbers
    if n["truncated"]:
        log(f"{n['truncated']} prompts were longer than the model's context and lost their beginning")
    line = (
        f"accuracy {n['accuracy']:.1%} on {config.task} (n = {n['n']}, 95 % interval {n['ci95_low']:.1%} to "
        f"{n['ci95_high']:.1%}; always the most frequent answer: {n['majority_rate']:.1%}; {n['unparsable']} without "
        f"an answer); ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%}, {n['bytes'] / 1e6:.1f} MB"
    )
    print_result(record, as_json, line if output is None else f"{line} -> {output}")


def _summary(record: "Record") -> str:
    """A line of a perplexity record; of a record of tasks a line for each."""
    n = record.numbers
    if record.kind == "lm_eval":
        return "\n".join(
            f"{name}: {', '.join(f'{m} {v:.4g}' for m, v in task['metrics'].items() if v is not None)} (n {task['n']})"
            for name, task in n["tasks"].items()
        )
    divergence = f"KL {n['kl_mean']:.4g}, top-1 {n['top1_agreement']:.1%}; " if "kl_mean" in n else ""
    return (
        f"perplexity {n['perplexity']:.4g} on {record.settings['dataset']} ({n['tokens']:,} tokens); {divergence}"
        f"ERR {n['rank_reduction']:.1%}, parameters {n['parameter_ratio']:.1%} of the targeted matrices, "
        f"{n['bytes'] / 1e6:.1f} MB"
    )
