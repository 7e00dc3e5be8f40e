from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from welore.errors import WeLoreError
from welore.io.safetensors_stream import CHUNK, DTYPES, TensorInfo, TensorReader, TensorWriter


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    numbers = torch.randn(8, 8) * 3
    tensors = {
        f"t.{name}": numbers.to(dtype) if dtype.itemsize > 1 or name == "BOOL" else numbers.to(torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
    }
    strided = torch.ones(1, 4)[:, :1].T
    return tensors | {"empty": torch.empty(0), "strided": strided, "scalar": torch.tensor(2.5), "äöü": torch.ones(3)}


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str]) -> None:
    with TensorWriter(path, {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name in order:
            writer.write(name, [tensors[name]] if tensors[name].numel() < 2 else tensors[name].reshape(-1).split(4))


def test_file_is_byte_equal_to_the_library_whatever_the_order_of_writing(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write(tmp_path / "ours", tensors, sorted(tensors, reverse=True))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library")
    reader = TensorReader(tmp_path / "library")
    assert set(reader.entries) == set(tensors)
    for name, tensor in load_file(tmp_path / "library").items():
        found = reader.read(name)
        assert reader.entries[name] == (found.dtype, tuple(found.shape)) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(
            found.view(torch.uint8) if found.ndim else found, tensor.view(torch.uint8) if found.ndim else tensor
        )


@pytest.mark.parametrize("shape", [(CHUNK // 4 + 1000,), (1025, 1024), (2, CHUNK // 8 + 1000), (3, 2), ()])
def test_chunks_put_together_are_the_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, dtype=torch.float32)
    save_file({"long": tensor, "empty": torch.empty(0)}, tmp_path / "f")
    reader = TensorReader(tmp_path / "f")
    pieces = list(reader.chunks("long"))
    assert len(pieces) == (1 if tensor.numel() < 10 else 2)
    assert torch.equal(torch.cat(pieces), tensor.flatten())
    assert list(reader.chunks("empty")) == []


def test_tensors_do_not_change_with_their_file(tmp_path: Path) -> None:
    save_file({"t": torch.ones(2000)}, tmp_path / "f")
    tensor = TensorReader(tmp_path / "f").read("t")
    with (tmp_path / "f").open("r+b") as file:
        file.seek(-400, 2)
        file.write(b"0" * 400)
    assert torch.equal(tensor, torch.ones(2000))


def test_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    header = b'{"odd":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"000")
    with pytest.raises(WeLoreError, match="the tensor odd has dtype F6_E2M3"):
        TensorReader(tmp_path / "f")


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    save_file({"t": torch.ones(40, 40)}, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(content[:keep])
    with pytest.raises(WeLoreError, match=r"cut off|cannot be read"):
        TensorReader(tmp_path / "f")


def test_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((8).to_bytes(8, "little") + b"{not it}" + b"0" * 16)
    with pytest.raises(WeLoreError, match="header that cannot be read"):
        TensorReader(tmp_path / "f")


def test_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written"),
        TensorWriter(tmp_path / "f", {"t": TensorInfo(torch.float32, (2,))}),
    ):
        pass
