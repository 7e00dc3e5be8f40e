"""Names of tensors: in the files of a checkpoint, and in the model that transformers makes of them.

Both are the same for most architectures. Decoders inside a multimodal model have other names in the files, and a class
for the text alone has others than the class for all of it. Files and config.json keep the names of the files.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from welore.models.experts import conversions, fused_names, unmerged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rename = Callable[[str], str]


def of_layer(rename: Rename, layer: str) -> str:
    """The name of a layer, or of a block of one, by that of its weight."""
    return rename(f"{layer}.weight").removesuffix(".weight")


def loaded_name(model: "PreTrainedModel") -> Rename:
    """Name in the files -> name in a model, as `from_pretrained` reads it. Factors and blocks lie with their layer.

    model: dense, or its factors are not asked for. A tensor that transformers converts keeps its name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping: Any = unmerged(get_model_conversion_mapping(model), model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state: Any = dict(model.state_dict()) | dict.fromkeys(fused_names(model), True)

    def name_of(key: str) -> str:
        parts = key.split(".")
        for end in range(len(parts), max(len(parts) - 4, 0), -1):  # LAYER.BLOCK.FACTOR.weight
            own = key if end == len(parts) else ".".join([*parts[:end], "weight"])
            name, converted = rename_source_key(own, renamings, converters, model.base_model_prefix, state)
            if converted is not None:
                break
            if name in state:
                return name if end == len(parts) else ".".join([name.removesuffix(".weight"), *parts[end:]])
        return key

    return name_of


def saved_name(model: "PreTrainedModel") -> Rename:
    """Name in a model -> name in the files that `save_pretrained` writes."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = [entry for entry in reversed(conversions(model)) if isinstance(entry, WeightRenaming)]
    back: Any = [entry.reverse_transform() for entry in mapping]
    return lambda name: rename_source_key(name, back, [])[0]
