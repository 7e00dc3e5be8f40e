"""Where matrices come from, one at a time: a checkpoint directory on disk, or a model in memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from welore.errors import WeLoreError, first_line
from welore.io.atomic import read_json
from welore.io.checkpoint import INDEX, check_finite, weight_files
from welore.io.hub import resolve_model
from welore.io.safetensors_stream import Entry, TensorReader
from welore.models.skeleton import config_of, dense_skeleton
from welore.models.targets import Target, find_targets
from welore.records import Identity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# --- a model in memory ---------------------------------------------------------------------------------------------


class ModelSource:
    """The matrices of a model in memory."""

    def __init__(self, model: "PreTrainedModel", include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        _refuse_quantized(model.config)
        self.model = model
        self.name = model.config.name_or_path or type(model).__name__
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.targets = find_targets(model, include, exclude)

    @cached_property
    def identity(self) -> Identity:
        """Name and fingerprint of the weights."""
        return Identity(self.name, _fingerprint((t, self._stored(t).reshape(-1)) for t in self.targets))

    @property
    def state(self) -> str:
        """The fingerprint: weights in memory have no files to look at."""
        return self.identity.fingerprint

    @property
    def skeleton(self) -> "PreTrainedModel":
        """The tree of modules: the model itself."""
        return self.model

    def read(self, target: Target) -> Tensor:
        """W (m, n) of a layer or of a block of it, a view."""
        W = self._stored(target)
        return (W.T if target.transposed else W)[target.rows, target.columns]

    def _stored(self, target: Target) -> Tensor:
        weight = self.model.get_submodule(target.layer).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise WeLoreError(f"{target.name} is not in memory (offloaded?): load the model on one device")
        return weight.detach()


# --- a checkpoint on disk ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorOverrides:
    """Tensors in place of those of a checkpoint's files, made when they are read; entries: their dtypes and shapes."""

    entries: Mapping[str, Entry]
    read: Callable[[str], Tensor]

    def chunks(self, key: str) -> Iterator[Tensor]:
        """The tensor as one flat piece."""
        yield self.read(key).flatten()


class CheckpointSource:
    """A directory with config.json and safetensors, read one tensor at a time. A context manager.

    name: what the user called it. targets: empty for a compressed checkpoint's factored layers (use `skeleton`).
    """

    def __init__(
        self,
        directory: Path,
        name: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self.directory, self.name = Path(directory), name or str(directory)
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._readers: dict[str, TensorReader | TensorOverrides] = {}
        with ExitStack() as stack:  # closes what is open already if a later file is refused
            for path in weight_files(self.directory):
                reader = stack.enter_context(TensorReader(path))
                self._readers |= dict.fromkeys(reader.entries, reader)
            self._check_index()
            self._stack = stack.pop_all()

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration; WeLoreError if transformers does not know the architecture."""
        return config_of(self.directory)

    @cached_property
    def skeleton(self) -> "PreTrainedModel":
        """The dense model on the meta device: every module and shape, no memory."""
        from transformers import AutoModelForCausalLM

        try:
            return dense_skeleton(self.config, AutoModelForCausalLM)
        except ValueError as error:
            raise WeLoreError(f"{self.name} is not a causal language model: {first_line(error)}") from error

    @cached_property
    def targets(self) -> list[Target]:
        """The targeted matrices that lie in the files under their own name; the others stay as they are."""
        _refuse_quantized(self.config)
        found = []
        for target in find_targets(self.skeleton, self.include, self.exclude):
            key = self.key(target.name + ".weight")
            if key is None:
                continue  # stored under another name or fused: counted by `census` as left dense
            m, n = target.shape
            stored = (n, m) if target.transposed else (m, n)
            if self.entry(key).shape != stored:
                raise WeLoreError(f"{key} has shape {self.entry(key).shape}, config.json says {stored}")
            found.append(target)
        if not found:
            raise WeLoreError(f"{self.name}: none of the model's linear layers is stored under its own name")
        return found

    @cached_property
    def identity(self) -> Identity:
        """Name and fingerprint of the weights."""
        return Identity(self.name, _fingerprint((t, self._beginning(t)) for t in self.targets))

    @property
    def state(self) -> str:
        """The fingerprint with the files' sizes and times: any change of a file is another state."""
        files = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in weight_files(self.directory)]
        return f"{self.identity.fingerprint} {files}"

    @cached_property
    def prefix(self) -> str:
        """What the files leave out at the start of every name ("transformer." in old GPT-2 files), mostly ""."""
        prefix = getattr(self.skeleton, "base_model_prefix", "") + "."
        names = [name for name, _ in self.skeleton.named_parameters() if name.startswith(prefix)]
        stripped = any(name.removeprefix(prefix) in self._readers for name in names)
        return prefix if stripped and not any(name in self._readers for name in names) else ""

    @cached_property
    def whole(self) -> "CheckpointSource":
        """The checkpoint as it lies in the files."""
        return self

    def with_others(self, skeleton: "PreTrainedModel", others: TensorOverrides) -> "CheckpointSource":
        """A view in which some layers have another size, as in `skeleton`, and other tensors; its identity is the same.

        It lives as long as this one is open.
        """
        view = copy(self)
        view._readers = self._readers | dict.fromkeys(others.entries, others)
        vars(view).pop("targets", None)
        vars(view).update(skeleton=skeleton, identity=self.identity, prefix=self.prefix, whole=self)
        return view

    def keys(self) -> Iterator[str]:
        """All tensors of the checkpoint, under the names in the files."""
        return iter(self._readers)

    def entry(self, key: str) -> Entry:
        """Dtype and shape of a tensor, from the header."""
        return self._readers[key].entries[key]

    def key(self, parameter: str) -> str | None:
        """The name in the files of a parameter of the model, None where it has none of its own."""
        key = parameter.removeprefix(self.prefix)
        return key if key in self._readers else None

    def tensor(self, key: str) -> Tensor:
        """One whole tensor."""
        return self._readers[key].read(key)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """One tensor in flat pieces, each checked to be finite."""
        for chunk in self._readers[key].chunks(key):
            check_finite(key, chunk)
            yield chunk

    def read(self, target: Target) -> Tensor:
        """W (m, n) in its own dtype; WeLoreError if it holds NaN or Inf."""
        key = self._key(target)
        W = self.tensor(key)
        check_finite(key, W)
        return (W.T if target.transposed else W)[target.rows, target.columns]

    def dtype(self, target: Target) -> torch.dtype:
        """The dtype in which a matrix is stored."""
        return self.entry(self._key(target)).dtype

    def _beginning(self, target: Target) -> Tensor:
        key = self._key(target)
        return next(self._readers[key].chunks(key))

    def _key(self, target: Target) -> str:
        key = self.key(target.layer + ".weight")
        assert key is not None
        return key

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if index.is_file():
            missing = set(read_json(index)["weight_map"]) - set(self._readers)
            if missing:
                raise WeLoreError(f"{self.name}: tensor {sorted(missing)[0]} of {INDEX} is in none of its files")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


TensorSource = ModelSource | CheckpointSource  # where matrices come from: a model in memory or a directory


def _fingerprint(beginnings: Iterable[tuple[Target, Tensor]]) -> str:
    """SHA-256 over name, shape and the first 1024 numbers of every targeted matrix, as float32."""
    digest = hashlib.sha256()
    for target, flat in beginnings:
        digest.update(f"{target.name} {target.shape}".encode())
        digest.update(flat[:1024].to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _refuse_quantized(config: "PretrainedConfig") -> None:
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    how = "merge it first (`welore merge`)" if method == "welore" else "give the unquantized model"
    raise WeLoreError(f"this model is compressed already ({method}): {how}")


@contextmanager
def open_source(
    model: "str | Path | PreTrainedModel",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Iterator[TensorSource]:
    """The weights of a model in memory, or of anything that `resolve_model` finds."""
    if isinstance(model, nn.Module):
        yield ModelSource(model, include, exclude)
        return
    with CheckpointSource(
        resolve_model(model, cache_dir=cache_dir, revision=revision), str(model), include, exclude
    ) as found:
        yield found
