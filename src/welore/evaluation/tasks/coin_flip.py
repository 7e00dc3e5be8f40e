"""Coin flip (Wei et al. 2022, arXiv 2201.11903): is a coin still heads up after some people flip it?"""

from random import Random
from typing import Any

from welore.evaluation.tasks.task import Hub, Row, Task

# fmt: off
NAMES = (
    "Ada", "Ben", "Cleo", "Dario", "Edith", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mona",
    "Nils", "Olga", "Pablo", "Quinn", "Rosa", "Said", "Tilda", "Umar", "Vera", "Wim", "Xenia", "Yusuf", "Zoe",
    "Anton", "Bella", "Carl", "Dora", "Emil", "Fiona", "Gino", "Hanna", "Igor", "Jana", "Kofi", "Lena", "Marco",
    "Nadia", "Otto", "Petra",
)
# fmt: on
PEOPLE = 4


def _read(row: Row) -> tuple[str, str]:
    names = ("question", "answer") if "question" in row else ("inputs", "targets")
    question, answer = (row.text(name) for name in names)
    question = question.removeprefix("Q: ").removesuffix("A:").strip()
    return question, answer.lower().rstrip(".")


def _generate(random: Random) -> dict[str, Any]:
    flips = [random.random() < 0.5 for _ in range(PEOPLE)]
    acts = [
        f"{name} {'flips' if flip else 'does not flip'} the coin."
        for name, flip in zip(random.sample(NAMES, PEOPLE), flips, strict=True)
    ]
    question = (
        f'A coin is heads up. {" ".join(acts)} Is the coin still heads up? Note that "flip" here means "reverse".'
    )
    return {"question": question, "answer": "no" if sum(flips) % 2 else "yes"}


TASK = Task(
    name="coin_flip",
    lead="The answer is",
    answers="(?i:yes|no)",
    read=_read,
    train_share=0.7,
    files={"train": "coin_flip.json", "evaluation": "coin_flip.json"},
    hub=Hub("skrishna/coin_flip", None, "train", "test"),
    normal=str.lower,
    generate=_generate,
    generated_count=500,
)
