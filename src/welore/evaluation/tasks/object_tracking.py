"""BIG-bench's tracking_shuffled_objects, three objects (Srivastava et al. 2022, arXiv 2206.04615)."""

from collections.abc import Mapping
from random import Random
from typing import Any

from welore.evaluation.tasks.task import Hub, Row, Task, chosen, options

OBJECTS = 3
PEOPLE = ("Ann", "Bill", "Cora")
STORIES = (  # (what they do, what they hold, how it changes hands, the question)
    ("are swapping books", "{} has {}", "swap books", "At the end of the day, {} has "),
    ("are playing a game with balls", "{} holds {}", "trade balls", "At the end of the game, {} holds "),
    ("are guests at an exchange of presents", "{} got {}", "exchange presents", "At the end of the party, {} has "),
)
THINGS = (
    ("the atlas", "the cookbook", "the novel", "the diary", "the dictionary", "the comic"),
    ("the red ball", "the blue ball", "the green ball", "the white ball", "the black ball", "the brown ball"),
    ("the red present", "the blue present", "the pink present", "the white present", "the gold present"),
)


def _read(row: Row) -> tuple[str, str]:
    if "target_scores" in row:
        question = row.text("input")
        choices, right = chosen(row)
    else:
        question = row.text("inputs")
        choices, scores = row.value("multiple_choice_targets", list), row.value("multiple_choice_scores", list)
        choices, right = chosen(Row({"scores": dict(zip(choices, scores, strict=True))}, row.where), "scores")
    return f"{question} ...\n{options(choices)}", "ABCDEFG"[right]


def _keep(row: Mapping[str, Any]) -> bool:
    """Whether a hub row has three objects; BIG-bench's set mixes three, five and seven."""
    choices = row.get("multiple_choice_targets")
    return choices is None or len(choices) == OBJECTS


def _generate(random: Random) -> dict[str, Any]:
    index = random.randrange(len(STORIES))
    doing, holding, swapping, asking = STORIES[index]
    things = random.sample(THINGS[index], OBJECTS)
    owner = list(range(OBJECTS))  # owner[person]: index of the thing
    start = "; ".join(holding.format(name, thing) for name, thing in zip(PEOPLE, things, strict=True))
    swaps = []
    for when in ("First", "Then", "Finally"):
        a, b = sorted(random.sample(range(OBJECTS), 2))
        owner[a], owner[b] = owner[b], owner[a]
        swaps.append(f"{when}, {PEOPLE[a]} and {PEOPLE[b]} {swapping}.")
    person = random.randrange(OBJECTS)
    text = f"Ann, Bill, and Cora {doing}. At the start, {start}. {' '.join(swaps)} {asking.format(PEOPLE[person])}"
    return {"input": text, "target_scores": {f"{thing}.": int(i == owner[person]) for i, thing in enumerate(things)}}


TASK = Task(
    name="object_tracking",
    lead="Among A through C, the answer is",
    answers="[A-C]",
    read=_read,
    train_share=0.8,
    files={"train": "*object_tracking*task.json", "evaluation": "*object_tracking*task.json"},
    hub=Hub("hails/bigbench", "tracking_shuffled_objects_zero_shot", "default", "default"),
    generate=_generate,
    generated_count=750,
    keep=_keep,
)
