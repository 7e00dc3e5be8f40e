"""Mistakes that a user can put right, and the sentence that says how."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class WeLoreError(ValueError):
    """A mistake that the user can mend; its text says what came, what is possible and what to do."""


class DivergedError(WeLoreError):
    """Raised when the loss of a training is NaN or infinite; a lower learning rate may help."""


class DamagedWeightsError(WeLoreError):
    """Raised for weights that hold NaN or Inf: work on them is of no use once they are mended."""


def choose(kind: str, name: str, table: Mapping[str, Value]) -> Value:
    """Entry `name` of a registry; an unknown name is answered with the nearest one and the whole list."""
    if name in table:
        return table[name]
    raise WeLoreError(f"unknown {kind} {name!r}{did_you_mean(name, table)} ({', '.join(sorted(table))})")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest name as the end of a sentence; empty if none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, for a sentence of ours; the first two where one ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
