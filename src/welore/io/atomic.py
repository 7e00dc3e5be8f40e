"""Output appears whole or not at all: everything is written under another name and then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from welore.errors import WeLoreError
from welore.io.fields import parse_json


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Temporary name beside `path`; renamed to it when the block ends well, removed when it does not."""
    path = Path(path)
    if path.is_dir():
        raise WeLoreError(f"{path} is a directory: name a file to write")
    _make_directory(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Raise unless the directory of `path` is there or can be made: asked before the work whose result goes there."""
    parent = Path(path).absolute().parent
    nearest = next(directory for directory in (parent, *parent.parents) if directory.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "may not be written to" if nearest.is_dir() else "is a file, not a directory"
        raise WeLoreError(f"{path} cannot be written: {nearest} {reason}")


def require_free(path: str | Path, *, overwrite: bool, marker: str = "config.json") -> None:
    """Raise unless a directory may be written at `path`: nothing is there, it is empty, or it may be replaced.

    Only a directory that holds `marker` is ever replaced, so that `--overwrite` cannot delete somebody's home.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not overwrite:
        raise WeLoreError(f"{path} exists already: choose another directory, or pass --overwrite to replace it")
    if path.exists() and not (path / marker).is_file():
        raise WeLoreError(f"{path} has no {marker}, so it is not a result of ours: --overwrite will not delete it")


def require_outside(path: str | Path, source: Path) -> None:
    """Raise when writing the directory `path` would replace the directory that is read, or one around it."""
    path, source = Path(path).resolve(), source.resolve()
    if path == source or path in source.parents:
        raise WeLoreError(f"{path} is or holds the model itself: choose another directory")


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """Empty directory `PATH.partial`; takes the name `path` when the block ends well, and is removed when not.

    Leftovers of a killed run at `PATH.partial` are removed first. A result that is replaced leaves its name at once,
    as `PATH.replaced`, and is deleted after: at `path` there is never half of anything.
    Raises WeLoreError as `require_free` does.
    """
    path = Path(path).resolve()  # "." has no name to put a suffix to; of a symbolic link the target is replaced
    require_free(path, overwrite=overwrite, marker=marker)
    partial, replaced = (path.with_name(path.name + suffix) for suffix in (".partial", ".replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    _make_directory(partial)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.replace(replaced)
    partial.replace(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeLoreError(f"{path} cannot be made a directory: {error.strerror}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all. NaN and infinities are refused."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; WeLoreError if it is missing or broken."""
    path = Path(path)
    if not path.is_file():
        raise WeLoreError(f"{path} does not exist")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeLoreError(f"{path} is not JSON ({error})") from error
