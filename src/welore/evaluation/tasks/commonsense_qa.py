"""CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937): five choices, common knowledge."""

from typing import Any

from welore.errors import WeLoreError
from welore.evaluation.tasks.task import Hub, Row, Task, options

LABELS = "ABCDE"


def _read(row: Row) -> tuple[str, str]:
    if isinstance(row.content.get("question"), dict):
        question = row.row("question")
        stem = question.text("stem")
        choices = [Row(c, f"{row.where}, choices") for c in question.value("choices", list)]
        labelled: list[tuple[Any, Any]] = [(choice.text("label"), choice.text("text")) for choice in choices]
    else:
        stem = row.text("question")
        columns = row.row("choices")
        labelled = list(zip(columns.value("label", list), columns.value("text", list), strict=True))
    if "".join(str(label) for label, _ in labelled) != LABELS:
        raise WeLoreError(f"{row.where}: the choices are labelled {[label for label, _ in labelled]}, not A to E")
    return f"{stem}\n{options([str(text) for _, text in labelled])}", row.text("answerKey")


TASK = Task(
    name="commonsense_qa",
    lead="Among A through E, the answer is",
    answers="[A-E]",
    read=_read,
    train_share=None,
    files={"train": "*train_rand_split.jsonl", "evaluation": "*dev_rand_split.jsonl"},
    hub=Hub("tau/commonsense_qa", None, "train", "validation"),
)
