"""A model without its weights: configuration, context length, decoder blocks, its modules on the meta device."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.errors import WeLoreError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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


def config_of(directory: Path) -> "PretrainedConfig":
    """The configuration of a model directory; WeLoreError if transformers does not know the architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise WeLoreError(f"{directory}: {first_line(error)}") from error


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


def dense_skeleton(config: "PretrainedConfig", kind: Any) -> "PreTrainedModel":
    """The dense model of a configuration on the meta device; kind: AutoModelForCausalLM, or a class of models."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(plain)
