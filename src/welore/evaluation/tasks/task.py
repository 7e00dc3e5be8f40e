"""A task: it makes a prompt and an answer of a record, and reads the answer out of the text that a model writes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from welore.errors import WeLoreError, first_line
from welore.io.text_file import well_formed


@dataclass(frozen=True)
class Item:
    """One question. The prompt ends with the beginning of the answer sentence; `answer` is what completes it."""

    prompt: str
    answer: str

    @property
    def completion(self) -> str:
        """What a model has to write after the prompt: " B." """
        return f" {self.answer}."


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub. train == evaluation: one split, divided by position."""

    name: str
    subset: str | None
    train: str
    evaluation: str


@dataclass(frozen=True)
class Task:
    """A task: text in, answer out.

    lead: the answer sentence up to the answer. answers: pattern of a possible answer. read: record -> question and
    answer. train_share: the first share of the records is for training, the rest for evaluation; None where the
    two parts are separate files. files: part -> glob of the original file in a directory. normal: brings an
    answer into the form that is compared. generate: makes a record of the original format, for tasks that need
    no data. keep: whether a row of the hub's data set belongs to the task.
    """

    name: str
    lead: str
    answers: str
    read: Callable[["Row"], tuple[str, str]]
    train_share: float | None
    files: Mapping[str, str]
    hub: Hub
    normal: Callable[[str], str] = str
    generate: Callable[[Random], dict[str, Any]] | None = None
    generated_count: int = 0
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True

    def item(self, content: Mapping[str, Any], where: str) -> Item:
        """The question of one record; `where` (file and record) is named in errors."""
        try:
            question, answer = self.read(Row(content, where))
            answer = self.normal(answer)
        except WeLoreError:
            raise
        except (ValueError, TypeError, LookupError) as error:  # lists of different lengths, choices that are lists
            raise WeLoreError(f"{where}: it has not the form of {self.name} ({first_line(error)})") from error
        if self.extract(f" {answer}.") != answer:
            raise WeLoreError(f"{where}: {answer!r} is no possible answer of {self.name} ({self.answers})")
        return Item(f"Q: {question}\nA: {self.lead}", answer)

    def extract(self, output: str) -> str | None:
        """The answer in what was written after the prompt; None if it does not complete the answer sentence.

        Strict: the answer must come first and end the sentence or the line. " B." and " B" count; " A dog" and
        " the second one, B." do not.
        """
        match = re.match(rf"\s*({self.answers})\s*?(?:\.(?!\d)|\n|$)", output)
        return None if match is None else self.normal(match[1])


class Row:
    """A record and where it stands, so that a missing field is named with file and record."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        if not isinstance(content, Mapping):
            raise WeLoreError(f"{where}: it is a {type(content).__name__}, not a record with fields")
        self.content, self.where = content, where

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def value(self, name: str, *kinds: type) -> Any:
        """The field `name`; WeLoreError if it is missing or of another kind."""
        if name not in self.content:
            raise WeLoreError(f"{self.where}: field {name!r} is missing; it has {', '.join(map(str, self.content))}")
        value = self.content[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise WeLoreError(f"{self.where}: field {name!r} is {value!r}: it must be a {expected}")
        return value

    def text(self, name: str) -> str:
        """A text that is not empty."""
        text = well_formed(self.value(name, str)).strip()
        if not text:
            raise WeLoreError(f"{self.where}: field {name!r} is empty")
        return text

    def row(self, name: str) -> "Row":
        """A field that is a record itself."""
        return Row(self.value(name, dict), f"{self.where}, {name}")


def options(texts: list[str]) -> str:
    """Answer choices, one a line: "(A) first"."""
    return "\n".join(f"({label}) {text}" for label, text in zip("ABCDEFGHIJ", texts, strict=False))


def chosen(row: Row, name: str = "target_scores") -> tuple[list[str], int]:
    """BIG-bench's answer choices and the index of the right one: {"blue ball.": 0, "red ball.": 1}."""
    scores = row.value(name, dict)
    right = [index for index, score in enumerate(scores.values()) if score == 1]
    if len(right) != 1:
        raise WeLoreError(f"{row.where}: field {name!r} marks {len(right)} answers as right: it must be one")
    return [well_formed(str(text)).strip() for text in scores], right[0]
