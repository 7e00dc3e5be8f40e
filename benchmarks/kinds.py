"""Texts of seven kinds for `benchmarks/arena.py --texts`, one file each; settings were chosen on none but Python.

python benchmarks/kinds.py OUT --guides DIRECTORY --npm DIRECTORY

Python: modules of its own library. C: headers of glibc (--headers, by default /usr/include). JavaScript: npm's own code
(--npm, the folder that holds its lib/). French, Spanish, German, Italian: Debian's reference guide, whose packages
debian-reference-fr, -es, -de and -it hold debian-reference.fr.txt.gz and so on (--guides, the folder they lie in).
60,000 characters of each; of the guides the longer paragraphs, without the tables. Prints what --texts takes.
"""

import argparse
import gzip
import inspect
from importlib import import_module
from pathlib import Path

from welore.io.atomic import atomic_write

CHARACTERS = 60000
MODULES = ("heapq", "textwrap", "csv", "shlex", "tarfile")
HEADERS = ("stdlib.h", "stdio.h", "regex.h", "obstack.h")
LANGUAGES = {"french": "fr", "spanish": "es", "german": "de", "italian": "it"}
CONTENTS, PARAGRAPH = 1500, 200  # lines of the table of contents; characters of the shortest paragraph that is taken


def main() -> None:
    """Write the files, each whole or not at all."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--guides", type=Path, required=True)
    arguments.add_argument("--npm", type=Path, required=True)
    arguments.add_argument("--headers", type=Path, default=Path("/usr/include"))
    given = arguments.parse_args()
    texts = {
        "python": "\n\n".join(inspect.getsource(import_module(name)) for name in MODULES),
        "c": "".join((given.headers / name).read_text(encoding="utf-8") for name in HEADERS),
        "javascript": "\n\n".join(
            path.read_text(encoding="utf-8") for path in sorted(given.npm.glob("lib/**/*.js"), key=str)
        ),
    }
    for name, language in LANGUAGES.items():
        texts[name] = guide(given.guides / f"debian-reference.{language}.txt.gz")
    for name, text in texts.items():
        with atomic_write(given.out / f"{name}.txt") as partial:
            partial.write_text(text[:CHARACTERS], encoding="utf-8")
    print(",".join(f"{name}={given.out / name}.txt" for name in texts))


def guide(path: Path) -> str:
    """The prose of a guide: paragraphs, a line each."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[CONTENTS:]
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    found = (" ".join(paragraph.split("\n")).strip() for paragraph in paragraphs)
    return "\n\n".join(p for p in found if len(p) > PARAGRAPH and "|" not in p and "+-" not in p)


if __name__ == "__main__":
    main()
