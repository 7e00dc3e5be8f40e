"""The finished pieces of an unfinished run: one file for each. A run that was killed continues from them.

A file (safetensors) takes its name when it is complete, so that none is ever torn; one that cannot be read is made
again. Its name is known beforehand, so that nobody has to look through a directory of thousands.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from torch import Tensor

from welore.errors import DamagedWeightsError, WeLoreError
from welore.io.atomic import atomic_directory, atomic_write, hidden, read_json, remove, resolved, write_json
from welore.io.parallel import ALONE, Processes
from welore.io.safetensors_stream import TensorInfo, TensorReader, TensorWriter, raw_bytes

KEY_FILE = "about.json"
CHECKSUM = "crc32"


class Workspace:
    """A directory of named groups of tensors, valid for one `key` (the weights, and how they are treated).

    key: None if no later run can know that it may continue there; then nothing stays.
    """

    def __init__(self, directory: str | Path, key: str | None) -> None:
        self.directory, self.key, self.once = resolved(directory), key or uuid4().hex, key is None
        self._retired = hidden(self.directory, "retired")

    @contextmanager
    def session(self, processes: Processes = ALONE) -> Iterator[None]:
        """Open for the processes of a job, and deleted when the block ends well.

        A mistake of the user, or an interruption, leaves what is finished, unless the weights themselves are damaged.
        """
        if processes.is_main:
            self.open()
        processes.wait()
        try:
            yield
        except BaseException as error:
            if processes.is_main:
                if self._retired.exists() and not self.directory.exists():
                    self._retired.replace(self.directory)  # the result did not get its name
                empty = all(path.name == KEY_FILE for path in self.directory.glob("*")) and isinstance(error, Exception)
                useless = empty or self.once or isinstance(error, DamagedWeightsError)
                if useless and processes.size == 1:  # others still write there
                    self.remove()
                if self.directory.exists():
                    error.add_note(f"the finished work lies in {self.directory}: the same command goes on there")
            raise
        processes.wait()
        if processes.is_main:
            self.remove()

    def open(self) -> None:
        """Make the directory, or keep it if an earlier run with the same key left it; otherwise start anew.

        Raises WeLoreError if something else lies there.
        """
        remove(self._retired)
        try:
            known = read_json(self.directory / KEY_FILE)
        except WeLoreError:
            known = None
        if not (isinstance(known, dict) and known.keys() == {"key"}):  # no run of ours left it
            others = list(self.directory.glob("*")) if self.directory.is_dir() else []
            if others or (self.directory.exists() and not self.directory.is_dir()):
                what = f"holds {others[0].name}" if others else "is a file"
                raise WeLoreError(f"{self.directory} is needed for unfinished work, but {what}: move it")
        if known != {"key": self.key}:
            with atomic_directory(self.directory, overwrite=True, marker=KEY_FILE) as unfinished:
                write_json(unfinished / KEY_FILE, {"key": self.key})

    def abandon(self) -> None:
        """Let the next run start anew, for what this one stored is damaged; other threads may still write here."""
        write_json(self.directory / KEY_FILE, {"key": None})

    def retire(self) -> None:
        """Put the work aside under a hidden name: the result is about to take its own name."""
        remove(self._retired)
        if self.directory.exists():
            self.directory.replace(self._retired)

    def remove(self) -> None:
        """Delete everything; of a process that is killed meanwhile a hidden directory stays, no half of the work."""
        self.retire()
        remove(self._retired)

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group of tensors, whole or not at all."""
        infos = {part: TensorInfo(tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
        said = {CHECKSUM: _checksum(tensors)}
        with atomic_write(self._file(name)) as partial, TensorWriter(partial, infos, said) as writer:
            for part, tensor in tensors.items():
                writer.write(part, [tensor.reshape(-1)])

    def fetch(self, name: str) -> dict[str, Tensor] | None:
        """A group of tensors; None if it is missing, or its file is damaged."""
        path = self._file(name)
        if not path.is_file():
            return None
        with suppress(WeLoreError, SafetensorError):
            reader = TensorReader(path)
            tensors = {part: reader.read(part) for part in reader.entries}
            if reader.metadata.get(CHECKSUM) == _checksum(tensors):
                return tensors
        path.unlink()
        return None

    def remember(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A group of tensors, made and kept if it is missing or damaged."""
        stored = self.fetch(name)
        if stored is None:
            stored = make()
            self.store(name, stored)
        return stored

    def mapped(self, name: str) -> dict[str, Tensor]:
        """A group that this run has stored, left in its file: what is read of it is in memory as long as it is held."""
        with safe_open(self._file(name), "pt") as file:
            return {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118

    def holds(self, name: str) -> bool:
        """Whether there is such a group, perhaps a damaged one."""
        return self._file(name).is_file()

    def drop(self, name: str) -> None:
        """Delete a group that is no longer needed."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """A number that tells whether names, shapes and values are those that were stored."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(raw_bytes(tensor), total)
    return str(total)


def restart_key(*parts: Any) -> str:
    """The key of a workspace: versions of the packages that compute, and JSON values on which its content depends."""
    return json.dumps([[version(name) for name in ("welore", "torch", "transformers")], *parts])


def file_states(paths: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of the files among these paths, for the key of a workspace: no change goes unseen."""
    files = [path for path in map(Path, paths) if path.is_file()]
    return [(path.name, (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
