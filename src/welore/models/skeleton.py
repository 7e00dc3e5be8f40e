"""A model without its weights: configuration, context length, decoder blocks, its modules on the meta device."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.errors import WeLoreError, first_line
from welore.io.checkpoint import CONFIG, read_config
from welore.models.experts import unfuse

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Numbers of config.json of which transformers makes as many objects: end of the name -> as many as a model may have.
COUNTS = {r"(layers?|depth)$": 1024, r"(experts|labels)$": 8192}


def decoder_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the outermost list as long as the configuration of the text part says."""
    text = model.config.get_text_config(decoder=True)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers and "vision" not in name
    ]
    if not lists:
        raise WeLoreError(
            f"{type(model).__name__} has no list of {text.num_hidden_layers} decoder blocks: it is not supported"
        )
    others = {name: not isinstance(_config_around(model, name), type(text)) for name, _ in lists}
    return min(lists, key=lambda item: (others[item[0]], item[0].count(".")))


def _config_around(model: nn.Module, name: str) -> Any:
    """The configuration of the innermost module around this one that has one."""
    while name:
        name = name.rpartition(".")[0]
        if hasattr(module := model.get_submodule(name), "config"):
            return module.config
    return None


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
    config = config_of(directory, trust_remote_code=trust_remote_code)
    try:
        return dense_skeleton(config, auto_class(config), trust_remote_code=trust_remote_code)
    except Exception as error:  # as above: here a family uses what it has read
        raise WeLoreError(f"{name} is not a causal language model: {reason(error)}") from error


def auto_class(config: "PretrainedConfig") -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText for what only that one knows (Qwen2.5-VL, Mistral 3)."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text, images = (kind._model_mapping for kind in (AutoModelForCausalLM, AutoModelForImageTextToText))
    own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    with_images = type(config) in images and type(config) not in text and not own_code
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def require_sane_counts(config: Mapping[str, Any], path: Path) -> None:
    """Raise WeLoreError for so many layers, experts or labels that only to list them would take all memory."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            require_sane_counts(value, path)
        for name, most in COUNTS.items():
            if isinstance(value, int) and value > most and re.search(name, key):
                raise WeLoreError(f"{path}: {key} is {value}, a model may have at most {most}: it is damaged")


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
    """The dense model of a configuration on the meta device, its experts apart.

    kind: AutoModelForCausalLM, or a class of models.
    """
    plain = type(config).from_dict(config.to_dict())
    plain.name_or_path = config.name_or_path  # where a model's own code lies
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = kind.from_config(plain, **options) if hasattr(kind, "from_config") else kind._from_config(plain)
    unfuse(model)
    return model
