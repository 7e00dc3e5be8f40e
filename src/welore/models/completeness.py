"""Whether a checkpoint is whole: every tensor that its configuration asks for, as transformers itself would read it."""

import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from welore.errors import WeLoreError
from welore.io.atomic import read_json
from welore.io.checkpoint import CONFIG, CheckpointReader
from welore.io.fields import typed
from welore.io.hub import require_all_loaded
from welore.io.safetensors_stream import FLOATS
from welore.models.quantizer import METHOD, WeLoreConfig, check_factors
from welore.models.replace import has_module
from welore.models.skeleton import decoder_blocks, reason
from welore.models.targets import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "length_penalty", "max_length", "num_beams")
SWITCHES = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits")
MASK = 1 << 30  # numbers of a buffer that a configuration may ask for, such as a mask of its context


def require_complete(directory: Path, skeleton: "PreTrainedModel", quantization: Any, files: CheckpointReader) -> None:
    """Raise WeLoreError unless `from_pretrained` fills every tensor of a model from the files, and reads all of them.

    transformers loads the model on the meta device: names are converted, shapes compared, and no weight is read. A
    model that another library has quantized is left to it. skeleton: the dense model. quantization: of config.json.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != METHOD:
        return
    _require_room(directory, skeleton, sum(math.prod(info.shape) for info in files.entries.values()))
    _require_generation_config(directory)
    int8: set[str] = set()
    config = type(skeleton.config).from_dict(skeleton.config.to_dict())
    if quantization is not None:
        config.quantization_config = quantization
        compressed = WeLoreConfig.read(quantization)
        check_factors(compressed, files.readers, skeleton)
        int8 = {f"{name}.weight" for name in compressed.int8}
    state = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in files.entries.items()}
    kind: Any = type(skeleton)
    try:
        with _no_report():
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except WeLoreError:
        raise
    except Exception as error:  # a family reads a configuration that nobody has checked
        raise WeLoreError(f"{directory} cannot be loaded: {reason(error)}") from error
    require_all_loaded(directory, report)
    for name, tensor in skeleton.state_dict().items():
        names = name, name.removeprefix(f"{skeleton.base_model_prefix}.")
        stored = next((files.entries[key] for key in names if key in files.entries and not int8 & {*names}), None)
        if tensor.is_floating_point() and stored is not None and stored.dtype not in FLOATS:
            raise WeLoreError(f"{name} has dtype {stored.dtype}, {CONFIG} does not say how: give the unquantized model")
    _require_all_read(directory, model, report["unexpected_keys"], files)


def _require_room(directory: Path, skeleton: "PreTrainedModel", numbers: int) -> None:
    """Raise WeLoreError for a tensor larger than all that the files hold, before anything of its size is made."""
    for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()):
        if tensor.numel() > max(numbers, MASK):
            shape = tuple(tensor.shape)
            raise WeLoreError(f"{directory / CONFIG} asks for {name} of shape {shape}, files hold {numbers} numbers")


def _require_generation_config(directory: Path) -> None:
    from transformers import GenerationConfig

    path = directory / GENERATION
    if not path.is_file():
        return
    content = typed(read_json(path), Mapping, str(path))
    kinds: dict[str, Any] = dict.fromkeys(TOKENS, int | tuple[int, ...] | None)
    kinds |= dict.fromkeys(NUMBERS, float | None) | dict.fromkeys(SWITCHES, bool | None)
    for name, kind in kinds.items():
        typed(content.get(name), kind, f"{name} of {path}")
    try:
        GenerationConfig.from_pretrained(directory)
    except Exception as error:  # as above
        raise WeLoreError(f"{path} cannot be read: {reason(error)}") from error


def _require_all_read(directory: Path, model: "PreTrainedModel", unread: set[str], files: CheckpointReader) -> None:
    """Raise WeLoreError for decoder blocks that config.json does not count, and adapters, factors, biases unread."""
    blocks, modules = decoder_blocks(model)
    own = re.escape(blocks.removeprefix(f"{model.base_model_prefix}."))
    count = len(modules) + (getattr(model.config, "num_nextn_predict_layers", None) or 0)  # which are never loaded
    for key in sorted(unread):
        block = re.match(rf"(?:{re.escape(model.base_model_prefix)}\.)?{own}\.(\d+)\.", key)
        if block and int(block[1]) >= count:
            raise WeLoreError(
                f"{directory} holds {key}, but {CONFIG} says {len(modules)} layers: it is another model's"
            )
        layer = key.removesuffix(".bias")
        layers = [name for name in (layer, f"{model.base_model_prefix}.{layer}") if has_module(model, name)]
        bias = layer != key and any(kind_of(model.get_submodule(name)) for name in layers)
        bias = bias and (key not in files.entries or bool(files.read(key).any()))
        if ".lora_" in key or (block and (bias or re.search(r"\.[ABCP]\.weight$", key))):
            raise WeLoreError(f"{directory} holds {key}, a part that no layer of {CONFIG} has: it is another model's")


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing what it misses: the caller says it in one sentence. Other threads may print."""
    thread, logger = threading.get_ident(), logging.getLogger("transformers.modeling_utils")

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)
