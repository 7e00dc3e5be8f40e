"""StrategyQA (Geva et al. 2021, arXiv 2101.02235) in its BIG-bench form: yes or no, by several implicit steps.

A record of the original file (task.json, under "examples"); the hub's rows hold `question` and a true or false
`answer`:

    {"input": "Could a penguin have watched the building of the Suez canal from its nest?",
     "target_scores": {"Yes": 0, "No": 1}, "target": "No. Penguins nest in the southern hemisphere ..."}

Training: the first 70 % of the file. Evaluation: the rest. (The hub has a train and a test split.)
"""

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
