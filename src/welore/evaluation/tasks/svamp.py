"""SVAMP (Patel et al. 2021, arXiv 2103.07191): arithmetic word problems of one or two steps."""

from welore.errors import WeLoreError
from welore.evaluation.tasks.task import Hub, Row, Task


def _read(row: Row) -> tuple[str, str]:
    body, question = row.text("Body"), row.text("Question")
    answer = str(row.value("Answer", int, float, str)).strip()
    try:
        float(answer)
    except ValueError as error:
        raise WeLoreError(f"{row.where}: field 'Answer' is {answer!r}: it must be a number") from error
    return f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {question}", answer


TASK = Task(
    name="svamp",
    lead="The answer (arabic numerals) is",
    answers=r"-?\d[\d,]*(?:\.\d+)?",
    read=_read,
    train_share=0.7,
    files={"train": "SVAMP.json", "evaluation": "SVAMP.json"},
    hub=Hub("ChilleD/SVAMP", None, "train", "test"),
    normal=lambda number: f"{float(number.replace(',', '')):.10g}",  # "1,200.0" -> "1200"
)
