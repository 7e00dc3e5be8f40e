"""BoolQ (Clark et al. 2019, arXiv 1905.10044): is it so, according to the passage?"""

from welore.evaluation.tasks.task import Hub, Row, Task


def _read(row: Row) -> tuple[str, str]:
    question = row.text("question").rstrip("?")
    return f"{row.text('passage')}\n{question}?", str(row.value("answer", bool))


TASK = Task(
    name="boolq",
    lead="Among True and False, the answer is",
    answers="(?i:true|false)",
    read=_read,
    train_share=None,
    files={"train": "*boolq_train.jsonl", "evaluation": "*boolq_dev.jsonl"},
    hub=Hub("google/boolq", None, "train", "validation"),
    normal=str.capitalize,
)
