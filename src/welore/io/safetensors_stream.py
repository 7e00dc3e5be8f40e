"""Safetensors files, streamed: one tensor read at a time, one tensor written at a time.

The safetensors library maps a whole file on reading and wants a whole file in memory on writing; with this
module both are bounded by one tensor. The format is eight bytes of header length, a JSON header, the raw data.
Files are byte-equal to those of safetensors.torch.save_file (a test says so).
"""

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from welore.errors import WeLoreError

# In the library's order of alignment, widest first: tensors are stored in this order, then by name.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 4 << 20  # bytes moved at once when a tensor is copied
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; start and stop are byte offsets in the file."""

    info: TensorInfo
    start: int
    stop: int


class TensorReader:
    """Reads tensors of one safetensors file without mapping it, nothing kept. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries, self.metadata = _read_header(self.path)
        self._lock = threading.Lock()
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115, PTH123 - closed by __exit__

    def read(self, name: str) -> Tensor:
        """A fresh copy of the tensor."""
        entry = self.entries[name]
        return self._numbers(entry.info.dtype, entry.start, entry.stop).reshape(entry.info.shape)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat pieces of at most 4 MiB, in order."""
        entry = self.entries[name]
        for start in range(entry.start, entry.stop, CHUNK):
            yield self._numbers(entry.info.dtype, start, min(start + CHUNK, entry.stop))

    def _numbers(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        buffer = torch.empty(stop - start, dtype=torch.uint8)  # a bytearray would be filled with zeros first
        view, done = buffer.numpy().data, 0
        with self._lock:  # the position in the file is shared by all threads
            self._file.seek(start)
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise WeLoreError(f"{self.path} ends before its last tensor: it is cut off, fetch it again")
                done += count
        return buffer.view(dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorWriter:
    """Writes one safetensors file whose tensors arrive in any order. A context manager.

    tensors: name -> (dtype, shape), all of them, known beforehand: the header comes first. metadata: what it says.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        alignment = {dtype: position for position, dtype in enumerate(DTYPES.values())}
        order = sorted(tensors, key=lambda name: (alignment[tensors[name][0]], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
        self.entries: dict[str, Entry] = {}
        position = 0
        for name in order:
            dtype, shape = tensors[name]
            info = TensorInfo(dtype, tuple(shape))
            stop = position + info.bytes
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
            self.entries[name] = Entry(info, position, stop)
            position = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._missing = set(tensors)
        self._file = open(self.path, "wb")  # noqa: SIM115, PTH123 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + position)

    def write(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Put a tensor in its place, given as flat pieces in order."""
        entry = self.entries[name]
        self._file.seek(self._data + entry.start)
        for chunk in chunks:
            assert chunk.dtype == entry.info.dtype, f"{name}: {chunk.dtype} is not {entry.info.dtype}"
            self._file.write(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
        assert self._file.tell() == self._data + entry.stop, f"{name}: wrong number of bytes"
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)[:3]}"


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise WeLoreError(f"{path} is not a safetensors file, or is cut off: fetch it again")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            entries = {
                name: Entry(
                    TensorInfo(DTYPES[fields["dtype"]], tuple(fields["shape"])),
                    *(8 + length + offset for offset in fields["data_offsets"]),
                )
                for name, fields in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeLoreError(f"{path} has a header that cannot be read ({error!r})") from error
    for name, entry in entries.items():
        if entry.stop - entry.start != entry.info.bytes or entry.stop > size:
            raise WeLoreError(f"{path} is cut off or damaged at tensor {name}: fetch it again")
    return entries, metadata
