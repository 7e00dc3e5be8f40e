"""An output belongs to one command, from the checks before its work to the end, and is nothing that it reads."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from welore.errors import WeLoreError
from welore.io.atomic import (
    hidden,
    read_json,
    remove,
    require_free,
    require_kind,
    require_writable,
    resolved,
    storage_errors,
    tidy,
)


@contextmanager
def claimed(
    path: str | Path | None, *reads: Any, overwrite: bool = False, marker: str | None = None, leads: bool = True
) -> Iterator[None]:
    """Keep an output for this command; what a killed one left of ours is cleared first.

    path: the file or directory; None claims nothing. reads: paths, and settings that may hold some. marker: the file
    by which a directory is known that may be replaced (None: the output is a file). leads: whether this process is the
    one of its job that writes; the others claim nothing.

    Raises WeLoreError, before any work: nothing can be written there, it is or holds something that is read, it exists
    and may not be replaced, or another command is at work there.
    """
    if path is None or not leads:
        yield
        return
    path = resolved(path)
    require_kind(path, directory=marker is not None)
    require_unread(path, *reads)
    require_writable(path)
    with _locked(path):
        tidy(path)
        remove(hidden(path, "memory"))  # which is in use until the command ends
        if marker is not None:
            require_free(path, overwrite=overwrite, marker=marker)
        elif not overwrite and path.exists() and path.stat().st_size and not _is_ours(path):
            raise WeLoreError(f"{path} is there, and no file of ours: choose another name, or delete it first")
        yield


def require_unread(output: str | Path, *reads: Any) -> None:
    """Raise if writing `output` would replace something that is read, or a file of a model that is read."""
    output = resolved(output)
    for given in (path for value in reads for path in _existing(value)):
        source = given.resolve()
        if source == output or output in source.parents:
            raise WeLoreError(f"{output} is or holds {given}, which is read: name another output")
        if output.is_file() and source.is_dir() and (output.name in RECORDS or not _is_ours(output)):
            links = (entry.resolve() for entry in source.iterdir())  # a snapshot of the hub has nothing else
            if source in output.parents or output in links:
                raise WeLoreError(f"{output} is a file of {given}, which is read: name another output")


def _existing(value: Any) -> Iterator[Path]:
    """The paths of files and directories in a setting: a path, a mixture of texts, or an object with such fields."""
    if isinstance(value, str | Path):
        text = str(value)
        parts = [part.strip() for part in text.split(",")] if len(text) < 10_000 else []
        names = dict.fromkeys([text, *parts, *(part.rpartition(":")[0] for part in parts)])
        for name in filter(None, names):
            with suppress(OSError, ValueError, RuntimeError):  # a text is often no path at all
                if Path(name).expanduser().exists():
                    yield Path(name).expanduser()
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _existing(getattr(value, field.name))
    elif isinstance(value, Mapping):  # texts with their weights
        for name in value:
            yield from _existing(name)


def _is_ours(path: Path) -> bool:
    """Whether a file is a measurement or an artefact of ours, which may be made again."""
    from welore.io.safetensors_stream import TensorReader  # needs torch

    with suppress(WeLoreError):
        return TensorReader(path).metadata.get("format", "").startswith("welore.")
    with suppress(WeLoreError), path.open("rb") as file:
        content = read_json(path) if file.read(1) == b"{" else {}
        return "welore." in str(content.get("format")) or {"kind", "inputs", "numbers"} <= content.keys()
    return False


RECORDS = {"plan.json", "compression.json", "finetune.json", "pretrain.json"}  # they belong to the model


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that the system takes back from a killed process; a second command is refused at once."""
    made = [directory for directory in path.parents if not directory.exists()]
    lock = FileLock(hidden(path, "lock"), blocking=False)
    try:
        try:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout as error:
            if not Path(lock.lock_file).exists():
                raise WeLoreError(f"{path} cannot be written: no file can be made beside it") from error
            raise WeLoreError(f"another command is writing {path}: wait for its end, or name another output") from error
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it sees that it has gone
            lock.release()
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
