from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from welore.errors import WeLoreError
from welore.io.safetensors_stream import CHUNK, DTYPES, TensorReader, TensorWriter


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"t.{name}": (torch.randn(7, 5) * 3).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"empty": torch.empty(0), "scalar": torch.tensor(2.5), "äöü": torch.ones(3)}


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str]) -> None:
    with TensorWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name in order:
            flat = tensors[name].reshape(-1)
            writer.write(name, flat.split(4))


def test_file_is_byte_equal_to_the_library_whatever_the_order_of_writing(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write(tmp_path / "ours", tensors, sorted(tensors, reverse=True))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "library")
    with TensorReader(tmp_path / "library") as reader:
        assert set(reader.entries) == set(tensors)
        for name, tensor in load_file(tmp_path / "library").items():
            found = reader.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(
                found.view(torch.uint8) if found.ndim else found, tensor.view(torch.uint8) if found.ndim else tensor
            )


def test_chunks_put_together_are_the_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(CHUNK // 4 + 1000, dtype=torch.float32)
    save_file({"long": tensor}, tmp_path / "f")
    with TensorReader(tmp_path / "f") as reader:
        pieces = list(reader.chunks("long"))
        assert len(pieces) == 2
        assert torch.equal(torch.cat(pieces), tensor)


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
        TensorWriter(tmp_path / "f", {"t": (torch.float32, (2,))}),
    ):
        pass
