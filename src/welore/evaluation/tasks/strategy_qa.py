"""StrategyQA (Geva et al. 2021, arXiv 2101.02235) in its BIG-bench form: yes or no, by several implicit steps."""

from welore.evaluation.tasks.task import Hub, Row, Task, chosen


def _read(row: Row) -> tuple[str, str]:
    if "target_scores" in row:
        choices, right = chosen(row)
        return row.text("input"), choices[right]
    return row.text("question"), "yes" if row.value("answer", bool) else "no"


TASK = Task(
    name="strategy_qa",
    lead="The answer is",
    answers="(?i:yes|no)",
    read=_read,
    train_share=0.7,
    files={"train": "*StrategyQA*task.json", "evaluation": "*StrategyQA*task.json"},
    hub=Hub("ChilleD/StrategyQA", None, "train", "test"),
    normal=str.lower,
)
