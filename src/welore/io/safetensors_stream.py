"""Safetensors files, streamed: one tensor read at a time, one tensor written at a time.

The library maps a file that it reads. Here every tensor is copied out of a map of its own, so that no more of a file is
in memory than one tensor. The library writes whole files from memory; `TensorWriter` writes one tensor after the other,
byte-equal to safetensors.torch.save_file (a test says so).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from welore.errors import WeLoreError, first_line

PAIRS = "F4"  # the file counts numbers, torch pairs of them
# In the library's order of alignment, widest first: tensors are stored in this order, then by name.
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),  # torch 2.7
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    PAIRS: getattr(torch, "float4_e2m1fn_x2", None),  # torch 2.8
    "BOOL": torch.bool,
}
DTYPES: dict[str, torch.dtype] = {name: dtype for name, dtype in _DTYPES.items() if dtype is not None}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in which weights can be computed with
CHUNK = 4 << 20  # bytes moved at once when a tensor is copied


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorReader:
    """Reads tensors of one safetensors file, nothing of which stays open or in memory.

    entries: name -> dtype and shape. metadata: what the header says besides. WeLoreError if the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self.entries = {name: self._info(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """A fresh copy of the tensor."""
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def part(self, name: str, *index: int | slice) -> Tensor:
        """A fresh copy of a part of the tensor."""
        with self._open() as file:
            tensor: Tensor = file.get_slice(name)[index].clone()
        return tensor

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat pieces of about 4 MiB, in order."""
        info = self.entries[name]
        if not info.shape or info.bytes <= CHUNK or info.dtype == DTYPES.get(PAIRS):  # which the library cannot slice
            if info.bytes:
                yield self.read(name).flatten()
            return
        rows = max(1, CHUNK * info.shape[0] // info.bytes)
        for start in range(0, info.shape[0], rows):
            with self._open() as file:
                piece = file.get_slice(name)[start : start + rows].flatten()
            yield piece

    def _open(self) -> Any:
        try:
            return safe_open(self.path, "pt")
        except (SafetensorError, OSError) as error:
            reason = f"is cut off, or has a header that cannot be read ({first_line(error)})"
            raise WeLoreError(f"{self.path} {reason}: fetch it again") from error

    def _info(self, name: str, tensor: Any) -> TensorInfo:
        dtype = tensor.get_dtype()
        if dtype not in DTYPES:
            raise WeLoreError(f"{self.path}: the tensor {name} has dtype {dtype}, of which welore knows nothing")
        shape = tuple(tensor.get_shape())
        return TensorInfo(DTYPES[dtype], (*shape[:-1], shape[-1] // 2) if dtype == PAIRS else shape)


def readers_of(paths: Iterable[str | Path]) -> dict[str, TensorReader]:
    """Name of every tensor in the files -> the reader of its file; the last that holds it, as in transformers."""
    readers = [TensorReader(path) for path in paths]
    return {name: reader for reader in readers for name in reader.entries}


class TensorWriter:
    """Writes one safetensors file whose tensors arrive in any order. A context manager.

    tensors: name -> (dtype, shape), all of them, known beforehand: the header comes first. metadata: what it says.
    """

    def __init__(
        self, path: str | Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        alignment = {dtype: position for position, dtype in enumerate(DTYPES.values())}
        order = sorted(tensors, key=lambda name: (alignment[tensors[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
        self._entries: dict[str, tuple[TensorInfo, int]] = {}
        position = 0
        for name in order:
            info = tensors[name]
            stop = position + info.bytes
            kind, shape = NAMES[info.dtype], list(info.shape)
            shape = [*shape[:-1], 2 * shape[-1]] if kind == PAIRS else shape
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, stop]}
            self._entries[name] = info, position
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
        info, start = self._entries[name]
        self._file.seek(self._data + start)
        for chunk in chunks:
            assert chunk.dtype == info.dtype, f"{name}: {chunk.dtype} is not {info.dtype}"
            self._file.write(raw_bytes(chunk))
        assert self._file.tell() == self._data + start + info.bytes, f"{name}: wrong number of bytes"
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)[:3]}"


def raw_bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor as bytes, in order."""
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data


def check_permutation(name: str, order: Tensor) -> None:
    """Raise WeLoreError unless a tensor holds every position of its rows once."""
    if order.is_floating_point() or sorted(order.tolist()) != list(range(len(order))):
        raise WeLoreError(f"{name} is no permutation of its {len(order)} rows: the checkpoint is damaged")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise WeLoreError for a dtype of weights that are not numbers to compute with."""
    if dtype not in FLOATS:
        raise WeLoreError(f"{name} has dtype {dtype}, in which nothing can be multiplied: it is damaged")
