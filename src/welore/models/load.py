"""A checkpoint or a model in memory -> model and tokenizer, ready to run, and what a record says of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.config import ANYWHERE, AUTO
from welore.errors import WeLoreError
from welore.io.checkpoint import RECORD
from welore.io.context import RunContext
from welore.io.hub import require_all_loaded, resolve_model
from welore.models.quantizer import ExpertsApart  # from_pretrained then knows compressed checkpoints, too
from welore.models.replace import sizes
from welore.models.skeleton import auto_class, reason
from welore.models.source import CheckpointSource
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Instructions of x86 processors.
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model that can run; directory: None if it was in memory.

    inputs: of a record: its name, its label, and the settings by which it was compressed (or None).
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    inputs: dict[str, Any]
    directory: Path | None = None

    def record(self, kind: str, settings: dict[str, Any], numbers: dict[str, Any]) -> Record:
        """The record of an evaluation: dtype, device and sizes of the model are added."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        spread = getattr(self.model, "hf_device_map", None) or {"": self.model.device}
        devices = dict.fromkeys(at if at == "disk" else str(torch.device(at)) for at in spread.values())
        settings = settings | {"dtype": dtype, "device": ", ".join(devices)}
        return Record(kind, self.inputs, settings, numbers | sizes_in(self.directory, self.model))


def load_model(
    model: "str | Path | PreTrainedModel",
    context: RunContext,
    dtype: str = "auto",
    label: str | None = None,
    attention: str | None = None,
    device_map: str | None = None,
    apart: bool = False,
) -> LoadedModel:
    """Load MODEL (hub id, directory, .gguf file) on the context's device, or take a model in memory as it is.

    A model in memory stays on its device and in its dtype, and needs the context's tokenizer. dtype: a name; "auto" is
    that of the checkpoint. label: a name for tables. attention, device_map, apart: as in `load`.
    """
    if isinstance(model, nn.Module):
        if context.tokenizer is None:
            raise WeLoreError("a model in memory needs its tokenizer: pass it as tokenizer=...")
        name = model.config.name_or_path or "model in memory"
        return LoadedModel(model, context.tokenizer, {"model": name, "label": label, "compression": None})
    directory = resolve_model(model, cache_dir=context.cache_dir, revision=context.revision)
    kind = dtype if dtype == AUTO else getattr(torch, dtype)
    how: Any = {"attention": attention, "device_map": device_map, "apart": apart}
    how |= {"trust_remote_code": context.trust_remote_code}
    loaded, tokenizer = load(directory, kind, context.device, **how)
    record = Record.load_if_there(directory / RECORD)
    inputs = {"model": str(model), "label": label, "compression": record and record.settings}
    return LoadedModel(loaded, tokenizer, inputs, directory)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards, also after an error, every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def sizes_in(directory: Path | None, model: "PreTrainedModel") -> dict[str, Any]:
    """`sizes` of the model of a directory; what has left no trace in the model itself, only its record tells."""
    record = None if directory is None else Record.load_if_there(directory / RECORD)
    told = record and (record.settings.get("optimize_for") == ANYWHERE or record.settings.get("expert_pruning"))
    return sizes(model) | ({"parameter_ratio": record.numbers["parameter_ratio"]} if record and told else {})


def load(
    directory: Path,
    dtype: Any,
    device: str | torch.device,
    attention: str | None = None,
    *,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    apart: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a directory; WeLoreError rather than a tensor of random numbers.

    attention: one of transformers' implementations (sdpa, eager, flash_attention_2); None leaves the choice to it.
    device_map: "auto" spreads the model over all devices, the host's memory and the disk, in place of `device`. apart:
    whether the experts of a dense mixture come as single layers, whose matrices stay in the mapped file; together they
    would be copied into memory.
    """
    if device_map is not None and not find_spec("accelerate"):
        raise WeLoreError("device_map needs accelerate: pip install 'welore[eval]'")
    source = CheckpointSource(directory, trust_remote_code=trust_remote_code).require_complete()
    auto, apart = auto_class(source.config), apart and source.single_experts
    tokenizer = read_tokenizer(directory, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
    options |= {} if device_map is None else {"device_map": device_map}
    options |= {"quantization_config": ExpertsApart()} if apart else {}
    checks: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = auto.from_pretrained(directory, dtype=dtype, **options, **checks)
    except (WeLoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and quantizers of other libraries read files that nobody has checked
        raise WeLoreError(f"{directory} cannot be loaded: {reason(error)}") from error
    require_all_loaded(directory, report)
    if apart:
        del model.config.quantization_config
    if device_map is None:
        nn.Module.to(model, device)
    return model, tokenizer


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids: one of which the embedding lies on the disk fetches them from the host."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def multiplies(dtype: torch.dtype, device: str | torch.device) -> bool | None:
    """Whether a device has instructions for products in this dtype; None: not known."""
    if torch.device(device).type == "cuda" and dtype is torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type != "cpu" or dtype not in INSTRUCTIONS:
        return True
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    if can.get("architecture") != "x86_64":
        return None
    return any(can.get(name) for name in INSTRUCTIONS[dtype])


def fastest(device: str | torch.device) -> dict[str, Any]:
    """Settings of `finetune` with which a device trains fastest: dtype, and attention (None: transformers' choice)."""
    if not multiplies(torch.bfloat16, device):  # GPUs before Ampere, most processors
        return {"dtype": "float16" if torch.device(device).type == "cuda" else "float32", "attention": None}
    # On a CPU torch's flash kernel multiplies bfloat16 at the speed of float32 (docs/concepts/fine-tuning.md).
    return {"dtype": "bfloat16", "attention": "eager" if torch.device(device).type == "cpu" else None}


def warn_if_slow(dtype: torch.dtype, device: str | torch.device) -> None:
    """Say that products in this dtype will crawl, where it is known that they will."""
    if multiplies(dtype, device) is False:
        name = str(dtype).removeprefix("torch.")
        LOG.warning("this processor has no instructions for %s: --dtype float32 is several times faster", name)


def read_tokenizer(
    model: str | Path, cache_dir: str | Path | None = None, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory or hub model, of which no other file is read; WeLoreError if it has none."""
    from transformers import AutoTokenizer

    no_tokenizer = f"{model} has no tokenizer that can be read: copy the original model's tokenizer.json there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # of damaged files the readers of several libraries make any error
        why = f" ({reason(error)})"
        raise WeLoreError(no_tokenizer.replace(":", f"{why}:", 1)) from error
    # Some classes make an empty one when the files are missing.
    if not isinstance(tokenizer.model_max_length, int | float) or not tokenizer.vocab_size:
        raise WeLoreError(no_tokenizer)
    return tokenizer
