"""A checkpoint or a model in memory -> model and tokenizer, ready to run, and what a record says of them."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

import welore.models.quantizer  # noqa: F401 - from_pretrained must know compressed checkpoints
from welore.errors import WeLoreError, choose, first_line
from welore.io.checkpoint import RECORD, weight_files
from welore.io.hub import resolve_model
from welore.models.skeleton import config_of
from welore.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
INSTRUCTIONS = {  # of x86 processors
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A model that can run; inputs: its name, its label, and the settings by which it was compressed (or None)."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    inputs: dict[str, Any]


def made_ready(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    dtype: str,
    device: str | None,
    cache_dir: str | Path | None,
    revision: str | None,
    label: str | None,
) -> Ready:
    """Load MODEL (hub id, directory, .gguf file), or take a model in memory, which needs its tokenizer."""
    torch_dtype = choose("dtype", dtype, DTYPES)
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise WeLoreError("a model in memory needs its tokenizer: pass it as tokenizer=...")
        name = model.config.name_or_path or "model in memory"
        return Ready(model, tokenizer, {"model": name, "label": label, "compression": None})
    directory = resolve_model(model, cache_dir=cache_dir, revision=revision)
    loaded, tokenizer = load(directory, torch_dtype, device)
    return Ready(loaded, tokenizer, {"model": str(model), "label": label, "compression": compression_of(directory)})


def compression_of(directory: Path) -> dict[str, Any] | None:
    """The settings in the compression record of a directory, None without one."""
    return Record.load(directory / RECORD).settings if (directory / RECORD).is_file() else None


def load(
    directory: Path, dtype: Any, device: str | None, attention: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a directory; WeLoreError rather than a tensor of random numbers. device None: a GPU.

    attention: one of transformers' implementations (sdpa, eager, flash_attention_2); None leaves the choice to it.
    """
    from transformers import AutoModelForCausalLM

    weight_files(directory)
    config_of(directory)
    tokenizer = read_tokenizer(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (ValueError, ImportError, OSError, SafetensorError) as error:
        raise WeLoreError(f"{directory} cannot be loaded: {first_line(error)}") from error
    model, about = loaded
    random = sorted({*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])})
    if random:
        raise WeLoreError(f"{directory} lacks {random[0]}, or has it in another shape: it would be random numbers")
    nn.Module.to(model, device or default_device())
    return model, tokenizer


def default_device() -> str:
    """Where a model goes if nobody says: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies(dtype: torch.dtype, device: str | torch.device | None) -> bool | None:
    """Whether a device (None: a GPU if there is one) has instructions for products in this dtype; None: not known."""
    if torch.device(device or default_device()).type != "cpu" or dtype not in INSTRUCTIONS:
        return True
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has none
    if can.get("architecture") != "x86_64":
        return None
    return any(can.get(name) for name in INSTRUCTIONS[dtype])


def fastest(device: str | torch.device | None) -> dict[str, Any]:
    """Settings of `finetune` with which a device trains fastest: dtype, and attention (None: transformers' choice).

    bfloat16 where it is known to be multiplied. On a CPU not with torch's flash kernel, which multiplies it at the
    speed of float32 (docs/method.md).
    """
    if not multiplies(torch.bfloat16, device):
        return {"dtype": "float32", "attention": None}
    on_cpu = torch.device(device or default_device()).type == "cpu"
    return {"dtype": "bfloat16", "attention": "eager" if on_cpu else None}


def warn_if_slow(dtype: torch.dtype, device: str | torch.device | None) -> None:
    """Say that products in this dtype will crawl, where it is known that they will."""
    if multiplies(dtype, device) is False:
        name = str(dtype).removeprefix("torch.")
        LOG.warning("this processor has no instructions for %s: --dtype float32 is several times faster", name)


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory; WeLoreError if it has none."""
    from transformers import AutoTokenizer

    no_tokenizer = f"{directory} has no tokenizer that can be read: copy the original model's tokenizer.json there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise WeLoreError(no_tokenizer) from error
    if not tokenizer.vocab_size:  # some classes make an empty one when the files are missing
        raise WeLoreError(no_tokenizer)
    return tokenizer
