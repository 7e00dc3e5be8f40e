"""Articles of Wikipedia in the spelling of WikiText: its raw training part for those who cannot fetch it.

python benchmarks/respell.py ARTICLES.jsonl OUT.txt

ARTICLES: records with "title" and "text", a paragraph a line. WikiText spells as Moses does, words and punctuation
apart, hyphens as @-@ and, in numbers, commas and points as @,@ and @.@; titles stand between equals signs. Which
lines are headings is guessed: up to HEADING characters that end in a full stop and hold no verb of VERBS.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sacremoses import MosesTokenizer

from welore.io.atomic import atomic_write

HEADING, VERBS = 80, re.compile(r"\b(is|was|are|were)\b")
NUMBER = re.compile(r"(?<=\d)([.,])(?=\d)")
MOSES = MosesTokenizer("en")


def main() -> None:
    """Write OUT, whole or not at all."""
    articles, out = map(Path, sys.argv[1:])
    with articles.open(encoding="utf-8") as file:
        text = "\n".join(line for record in file for line in article(**json.loads(record)))
    with atomic_write(out) as partial:
        partial.write_text(text, encoding="utf-8")


def article(title: str, text: str, **_: object) -> Iterator[str]:
    """Its lines."""
    yield from (f" = {spelled(title)} = ", " ")
    for line in filter(None, map(str.strip, text.split("\n"))):
        if len(line) < HEADING and line.endswith(".") and len(line.split()) < 8 and not VERBS.search(line):
            yield from (" ", f" = = {spelled(line[:-1])} = = ", " ")
        else:
            yield f" {spelled(line)} "
    yield from (" ", " ")


def spelled(text: str) -> str:
    """In the spelling of WikiText."""
    return NUMBER.sub(r" @\1@ ", MOSES.tokenize(text, aggressive_dash_splits=True, escape=False, return_str=True))


if __name__ == "__main__":
    main()
