"""The six tasks of the paper, one file each: text in, answer out; no tensors.

A new task is one file with a TASK and one entry here; docs/reference/tasks.md shows a record of each. Training and
evaluation items are disjoint: `items` cuts them apart, and nothing else reads them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from welore.errors import WeLoreError, first_line
from welore.evaluation.tasks import boolq, coin_flip, commonsense_qa, object_tracking, strategy_qa, svamp
from welore.evaluation.tasks.task import Item, Task
from welore.io.text_file import json_lines, local_path, read_json_value

__all__ = ["GENERATED", "TASKS", "Item", "Part", "Task", "items", "majority_rate"]

Part = Literal["train", "evaluation"]
GENERATED = "generated"  # in place of a file: records made by our own code

MODULES = (commonsense_qa, svamp, boolq, coin_flip, object_tracking, strategy_qa)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in MODULES}


def items(
    task: Task, part: Part, data: str | Path | None = None, seed: int = 0, cache_dir: str | Path | None = None
) -> list[Item]:
    """The training or the evaluation items of a task, in their order.

    data: an original file, a directory that holds it, "generated" (coin_flip and object_tracking; from `seed`), or
    None for the hub's data set. Where one file holds everything, the first share is for training and the rest for
    evaluation; a generated item belongs to the part that a hash of its text says, whatever the seed.
    Raises WeLoreError for missing files and fields (file, record, field), and where nothing is left.
    """
    if data is None:
        questions = _hub_items(task, part, cache_dir)
    elif str(data) == GENERATED:
        questions = _generated(task, part, seed)
    else:
        questions = _file_items(task, part, local_path(data))
    if not questions:
        raise WeLoreError(f"{data or task.hub.name} holds no {part} items of {task.name}")
    return questions


def majority_rate(questions: Sequence[Item]) -> float:
    """Share of the most frequent answer: the accuracy of a model that always gives it."""
    return max(Counter(item.answer for item in questions).values()) / len(questions)


def _divide(task: Task, part: Part, questions: Sequence[Item]) -> list[Item]:
    """The part by position. A question that stands in both (StrategyQA has one) is left out of training."""
    assert task.train_share is not None
    border = int(len(questions) * task.train_share)
    evaluation = list(questions[border:])
    if part == "evaluation":
        return evaluation
    prompts = {item.prompt for item in evaluation}
    return [item for item in questions[:border] if item.prompt not in prompts]


def _file_items(task: Task, part: Part, path: Path) -> list[Item]:
    name, wanted = path.name.lower(), ("train",) if part == "train" else ("dev", "valid")
    if path.is_dir():
        paths = sorted(path.glob(task.files[part]))
        if len(paths) != 1:
            count = f"{len(paths)} files" if paths else "no file"
            raise WeLoreError(f"{path} holds {count} {task.files[part]}: name the {part} file of {task.name} itself")
        path = paths[0]
    elif task.train_share is None and (
        not any(word in name for word in wanted) or (part == "evaluation" and "train" in name)
    ):  # parts that are files of their own are never mixed up
        raise WeLoreError(
            f"{path.name} is not known to be the {part} part of {task.name}: the file's name must hold "
            f"{' or '.join(map(repr, wanted))} (training items are never scored)"
        )
    questions = [task.item(record, f"{path}, record {number}") for number, record in enumerate(_records(path), start=1)]
    return questions if task.train_share is None else _divide(task, part, questions)


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a .jsonl file, or of a .json file that is a list or has "examples"."""
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    content = read_json_value(path)
    records = content.get("examples") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise WeLoreError(f"{path} is neither a list of records nor has a list under 'examples'")
    yield from records


def _generated(task: Task, part: Part, seed: int) -> list[Item]:
    """As many items as the original part has, all different, in an order that depends on the seed alone."""
    if task.generate is None or task.train_share is None:
        able = ", ".join(name for name, other in TASKS.items() if other.generate)
        raise WeLoreError(f"{task.name} cannot be generated, only {able}: give a FILE, or none for the hub")
    random = Random(seed)
    border = round(task.generated_count * task.train_share)
    count = border if part == "train" else task.generated_count - border
    questions: dict[str, Item] = {}
    while len(questions) < count:
        item = task.item(task.generate(random), "generated record")
        fraction = int.from_bytes(hashlib.sha256(item.prompt.encode()).digest()[:8]) / 2**64  # 0..1, of the text alone
        if (fraction < task.train_share) == (part == "train"):
            questions.setdefault(item.prompt, item)
    return list(questions.values())


def _hub_items(task: Task, part: Part, cache_dir: str | Path | None) -> list[Item]:
    from datasets import load_dataset

    hub = task.hub
    split = hub.train if part == "train" else hub.evaluation
    try:
        rows = load_dataset(hub.name, hub.subset, split=split, cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # datasets reads files of any kind
        how = f"the original file{' or generated' if task.generate else ''}"
        raise WeLoreError(
            f"the data set {hub.name} cannot be fetched ({first_line(error)}): connect once, or give {how} "
            "as the task's data set (score --dataset, finetune --task-dataset)"
        ) from error
    return hub_items(task, part, list(rows))


def hub_items(task: Task, part: Part, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """The items of a hub data set's rows; a split that serves both parts is divided by position."""
    questions = [
        task.item(row, f"{task.hub.name}, record {number}")
        for number, row in enumerate(rows, start=1)
        if task.keep(row)
    ]
    return _divide(task, part, questions) if task.hub.train == task.hub.evaluation else questions
