"""Output appears whole or not at all: everything is written under a hidden name of ours and then renamed."""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from welore.errors import WeLoreError, first_line
from welore.io.fields import parse_json


def hidden(path: Path, role: str) -> Path:
    """A name of ours beside `path`, `.NAME.welore-ROLE`: no file of a user is taken for one."""
    return path.with_name(f".{path.name}.welore-{role}")


def work_directory(path: Path) -> Path:
    """Where unfinished work on an output lies: `PATH.work`, visible."""
    return path.with_name(path.name + ".work")


def resolved(path: str | Path) -> Path:
    """The path without links: of a link its target is written and replaced, in every verb."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, TypeError) as error:  # a circle of links, or settings in the place of a path
        raise WeLoreError(f"{str(path)[:80]} leads nowhere: {first_line(error)}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Empty new file beside `path`; it takes that name when the block ends well, and is removed when not.

    Of a symbolic link the target is replaced. WeLoreError where nothing can be written, also for a full disk.
    """
    path = resolved(path)
    require_kind(path, directory=False)
    _make_directory(path.parent)
    partial = hidden(path, "partial")
    with storage_errors(path):
        remove(partial)
        try:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # follows no link
            mode = stat.S_IMODE(partial.stat().st_mode)  # by the umask; libraries make files of mode 600
            yield partial
            _settle(partial, mode)
            partial.replace(path)
            _sync(path.parent)
        finally:
            remove(partial)


def require_kind(path: Path, *, directory: bool) -> None:
    """Raise if something lies at `path` that cannot be replaced by a directory, or by a file."""
    if not os.path.lexists(path):
        return
    if directory:
        if os.path.ismount(path):
            raise WeLoreError(f"{path} is a mount point, which cannot be renamed: name a directory in it")
    elif path.is_dir():
        raise WeLoreError(f"{path} is a directory: name a file to write")
    if not path.is_dir() and not path.is_file():
        raise WeLoreError(f"{path} is a pipe, a device or a socket: name an ordinary file or directory")


def require_writable(path: str | Path) -> None:
    """Raise unless the directory of `path` is there or can be made: asked before the work whose result goes there."""
    parent = Path(path).absolute().parent
    nearest = next(directory for directory in (parent, *parent.parents) if directory.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
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


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """Empty hidden directory beside `path`; takes that name when the block ends well, and is removed when not.

    Leftovers of a killed run are removed first. At `path` there is never half of anything.
    Raises WeLoreError as `require_free` does, and where nothing can be written.
    """
    path = resolved(path)  # "." has no name to put a suffix to
    tidy(path)
    require_free(path, overwrite=overwrite, marker=marker)
    _make_directory(path.parent)
    partial = hidden(path, "partial")
    with storage_errors(path):
        partial.mkdir()
        try:
            yield partial
            settle_directory(partial)
            replace_directory(partial, path)
        finally:
            remove(partial)


def replace_directory(new: Path, path: Path) -> None:
    """Give the directory `new` the name `path`; what has that name now leaves it at once, and is deleted after.

    A process that is killed in between leaves the old one under a hidden name, from which `tidy` brings it back.
    """
    replaced = hidden(path, "replaced")
    try:
        if path.exists():
            path.replace(replaced)
        new.replace(path)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.replace(path)
        raise
    _sync(path.parent)
    remove(replaced)


def tidy(path: Path) -> None:
    """Clear what a killed command left at `path`: an old result gets its name back, the rest is deleted.

    Unfinished work is put aside just before the result takes its name; if it did not, the work comes back.
    """
    partial, replaced, work = hidden(path, "partial"), hidden(path, "replaced"), work_directory(path).resolve()
    retired = hidden(work, "retired")
    with storage_errors(path):
        if retired.exists() and partial.exists() and not work.exists():
            retired.replace(work)
        if replaced.exists() and not path.exists():
            replaced.replace(path)
        for leftover in (retired, replaced, partial):
            remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all that it holds; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle_directory(directory: Path) -> None:
    """Put all files of a directory on the disk, with the modes that the umask gives."""
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for file in directory.rglob("*"):
        if file.is_file() and not file.is_symlink():
            _settle(file, mode)


def _settle(file: Path, mode: int) -> None:
    """Put a file on the disk before it is renamed, with the mode that the umask gives."""
    file.chmod(mode)
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeLoreError(f"{path} cannot be made a directory: {error.strerror}") from error


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Make one sentence of a full disk, a directory that has gone and the like, met while `path` is written."""
    try:
        yield
    except Exception as error:  # of safetensors' own no more is known; what is none of the disk's goes on
        reason, file = storage_reason(error), getattr(error, "filename", None)
        elsewhere = isinstance(file, str) and path.parent not in Path(file).parents
        if reason is None or elsewhere or isinstance(error, WeLoreError):
            raise
        at = f" ({file})" if isinstance(file, str) else ""
        raise WeLoreError(f"{path} cannot be written: {reason}{at}; what was finished before stays") from error


def storage_reason(error: BaseException) -> str | None:
    """The words of the operating system, also inside an error of safetensors or torch; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    inside = re.search(r"(?:os error |code: )(\d+)", str(error))
    if type(error).__name__ == "SafetensorError" and inside:
        return os.strerror(int(inside[1]))
    return "torch could not write a file (is the disk full?)" if "inline_container.cc" in str(error) else None


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all. NaN and infinities are refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; WeLoreError if it is missing or broken."""
    path = Path(path)
    if not path.is_file():
        raise WeLoreError(f"{path} does not exist")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeLoreError(f"{path} is not JSON ({error})") from error
