"""A model without its weights: configuration, context length, decoder blocks, its modules on the meta device."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.errors import WeLoreError, first_line
from welore.io.checkpoint import CONFIG, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Numbers of config.json of which transformers makes as many objects: end of the name -> as many as a model may have.
COUNTS = {r"(layers?|depth)$": 1024, r"(experts|labels)$": 8192}


def decoder_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost list as long as the configuration says."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and "vision" not in name
    ]
    if not lists:
        raise WeLoreError(f"{type(model).__name__} has no list of {layers} decoder blocks: it is not supported")
    return min(lists, key=lambda item: item[0].count("."))


def config_of(directory: Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a model directory; WeLoreError if transformers cannot read it, or would run code for it."""
    from transformers import AutoConfig

    try:
        require_sane_counts(read_config(directory), directory / CONFIG)
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except WeLoreError:
        raise
    except Exception as error:  # a field of another type or value is any error of any family
        raise WeLoreError(f"{directory / CONFIG} cannot be read: {reason(error)}") from error


def skeleton_of(directory: Path, name: str, *, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The dense model of a directory's configuration on the meta device; name: what the user called it."""
    from transformers import AutoModelForCausalLM

    config = config_of(directory, trust_remote_code=trust_remote_code)
    try:
        return dense_skeleton(config, AutoModelForCausalLM, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: here a family uses what it has read
        raise WeLoreError(f"{name} is not a causal language model: {reason(error)}") from error


def require_sane_counts(config: Mapping[str, Any], path: Path) -> None:
    """Raise WeLoreError for so many layers, experts or labels that only to list them would take all memory."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            require_sane_counts(value, path)
        for name, most in COUNTS.items():
            if isinstance(value, int) and value > most and re.search(name, key):
                raise WeLoreError(
                    f"{path}: {key} is {value}, more than the {most} that a model may have: it is damaged"
                )


def reason(error: BaseException) -> str:
    """Why transformers cannot read a model, for a sentence; the same for every model that comes with its own code."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code, which is not run; read that code, then pass --trust-remote-code to run it"
    return f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)


def context_length(config: "PretrainedConfig") -> int | None:
    """How many tokens a model reads at once, None where its configuration does not say."""
    length: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length


def require_context_length(length: int, limit: int | None) -> None:
    """Raise WeLoreError if a model that reads `limit` tokens at once is to read more; None: it does not say."""
    if limit is not None and length > limit:
        raise WeLoreError(
            f"length is {length}: this model reads at most {limit} tokens at once, pass --max-length {limit}"
        )


def dense_skeleton(config: "PretrainedConfig", kind: Any, **options: Any) -> "PreTrainedModel":
    """The dense model of a configuration on the meta device; kind: AutoModelForCausalLM, or a class of models."""
    plain = type(config).from_dict(config.to_dict())
    plain.name_or_path = config.name_or_path  # where a model's own code lies
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return kind.from_config(plain, **options) if hasattr(kind, "from_config") else kind._from_config(plain)
