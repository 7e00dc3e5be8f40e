"""What is finished of an unfinished run: one file per matrix. A run that was killed continues from them.

A file (safetensors) carries the digest of its tensors, so that torn or damaged ones are found and made again; its name
is known beforehand, so that nobody has to look through a directory of thousands. Numbers go from memory to disk and
back as they are, without the interpreter's lock: other threads work on.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from welore.errors import WeLoreError
from welore.io.atomic import atomic_write, read_json, write_json
from welore.io.safetensors_stream import TensorReader, TensorWriter

ABOUT = "about.json"
DIGEST = "digest"  # its name in a file's metadata


class Workspace:
    """A directory of named groups of tensors, valid for one `key` (the weights, and how they are treated)."""

    def __init__(self, directory: str | Path, key: str) -> None:
        self.directory, self.key = Path(directory), key

    def open(self) -> None:
        """Make the directory, or keep it if an earlier run with the same key left it; otherwise start anew.

        Raises WeLoreError if something else lies there.
        """
        strange = [p for p in self.directory.glob("*") if p.suffix != ".partial"]
        if strange and not (self.directory / ABOUT).is_file():
            raise WeLoreError(f"{self.directory} is needed for unfinished work, but holds {strange[0].name}: move it")
        try:
            known = read_json(self.directory / ABOUT) == {"key": self.key}
        except WeLoreError:
            known = False
        if not known:
            self.remove()
            write_json(self.directory / ABOUT, {"key": self.key})

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Delete the directory if no work lies in it yet."""
        if all(path.name == ABOUT for path in self.directory.glob("*")):
            self.remove()

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group of tensors, whole or not at all."""
        kinds = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
        about = {DIGEST: _digest(tensors)}
        with atomic_write(self._file(name)) as partial, TensorWriter(partial, kinds, about) as writer:
            for part, tensor in tensors.items():
                writer.write(part, [tensor.reshape(-1)])

    def fetch(self, name: str) -> dict[str, Tensor] | None:
        """A group of tensors; None if it is missing or damaged."""
        path = self._file(name)
        if not path.is_file():
            return None
        with contextlib.suppress(WeLoreError), TensorReader(path) as reader:
            found = {part: reader.read(part) for part in reader.entries}
            if reader.metadata.get(DIGEST) == _digest(found):
                return found
        path.unlink()
        return None

    def holds(self, name: str) -> bool:
        """Whether there is such a group, perhaps a damaged one."""
        return self._file(name).is_file()

    def drop(self, name: str) -> None:
        """Delete a group that is no longer needed."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and numbers."""
    found = hashlib.sha256()
    for part, tensor in sorted(tensors.items()):
        found.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
