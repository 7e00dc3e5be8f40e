"""The finished pieces of an unfinished run: one file for each. A run that was killed continues from them.

A file (safetensors) takes its name when it is complete, so that none is ever torn; one that cannot be read is made
again. Its name is known beforehand, so that nobody has to look through a directory of thousands.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from welore.errors import WeLoreError
from welore.io.atomic import atomic_write, read_json, write_json
from welore.io.safetensors_stream import TensorInfo, TensorReader, TensorWriter

KEY_FILE = "about.json"


class Workspace:
    """A directory of named groups of tensors, valid for one `key` (the weights, and how they are treated)."""

    def __init__(self, directory: str | Path, key: str) -> None:
        self.directory, self.key = Path(directory), key

    def open(self) -> None:
        """Make the directory, or keep it if an earlier run with the same key left it; otherwise start anew.

        Raises WeLoreError if something else lies there.
        """
        others = [p for p in self.directory.glob("*") if p.suffix != ".partial"]
        if others and not (self.directory / KEY_FILE).is_file():
            raise WeLoreError(f"{self.directory} is needed for unfinished work, but holds {others[0].name}: move it")
        try:
            known = read_json(self.directory / KEY_FILE) == {"key": self.key}
        except WeLoreError:
            known = False
        if not known:
            self.remove()
            write_json(self.directory / KEY_FILE, {"key": self.key})

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Delete the directory if no work lies in it yet."""
        if all(path.name == KEY_FILE for path in self.directory.glob("*")):
            self.remove()

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group of tensors, whole or not at all."""
        infos = {part: TensorInfo(tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
        with atomic_write(self._file(name)) as partial, TensorWriter(partial, infos) as writer:
            for part, tensor in tensors.items():
                writer.write(part, [tensor.reshape(-1)])

    def fetch(self, name: str) -> dict[str, Tensor] | None:
        """A group of tensors; None if it is missing, or its file cannot be read."""
        path = self._file(name)
        if not path.is_file():
            return None
        try:
            reader = TensorReader(path)
        except WeLoreError:
            path.unlink()
            return None
        return {part: reader.read(part) for part in reader.entries}

    def holds(self, name: str) -> bool:
        """Whether there is such a group, perhaps a damaged one."""
        return self._file(name).is_file()

    def drop(self, name: str) -> None:
        """Delete a group that is no longer needed."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def file_states(paths: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of the files among these paths, for the key of a workspace: no change goes unseen."""
    files = [path for path in map(Path, paths) if path.is_file()]
    return [(path.name, (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
