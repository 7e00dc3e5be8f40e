"""Texts and records of local files, which anybody may have made: read as UTF-8, or refused in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from welore.errors import WeLoreError, first_line
from welore.io.fields import parse_json


def local_path(name: str | Path) -> Path:
    """The path of a name with "~" filled in; WeLoreError for one that no file can have."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, "~somebody" who is not here
        raise WeLoreError(f"{str(name)[:80]!r} cannot be the name of a file: {first_line(error)[:80]}") from error
    return path


def read_plain(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return well_formed(_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        raise WeLoreError(f"{path} is not UTF-8 text ({error})") from error


def read_json_value(path: Path) -> Any:
    """The value of a file in JSON."""
    return _json_value(_bytes(path), str(path))


def json_lines(path: Path) -> Iterator[Any]:
    """The value of every line of a .jsonl file that is not empty."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_value(line, f"{path}, line {number}")


def well_formed(text: str) -> str:
    """The text without a byte order mark, and with U+FFFD where half of a surrogate pair stands alone.

    JSON can hold such halves, of which scraped files are full; no tokenizer and no encoding takes them.
    """
    text = text.removeprefix("\ufeff")
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def require_file(path: Path) -> None:
    """Raise WeLoreError unless there is a file of that name."""
    if path.is_dir():
        raise WeLoreError(f"{path} is a directory: name a file")
    if not path.is_file():
        raise WeLoreError(f"{path} does not exist")


def _json_value(content: bytes, where: str) -> Any:
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise WeLoreError(f"{where} is not JSON in UTF-8 ({first_line(error)})") from error


def _bytes(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    require_file(path)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise WeLoreError(f"{path} cannot be read: {first_line(error)}") from error
