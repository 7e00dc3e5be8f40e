"""How transformers' from_pretrained and save_pretrained know compressed models.

A quantization config and a quantizer named "welore" are registered when transformers loads its quantizers
(welore/__init__.py sees to that). Only hooks that exist from transformers 5.19 on are used.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import welore
from welore.config import NONE, CompressionConfig, require_at_least
from welore.errors import WeLoreError, choose
from welore.io.checkpoint import check_finite
from welore.io.fields import LARGEST, refusing, typed
from welore.io.safetensors_stream import FLOATS, TensorInfo, TensorReader, check_dtype, check_permutation, readers_of
from welore.layers.block_grid import Grid, block_names, layer_of, read_grids, split_layers
from welore.layers.expert_names import is_of_expert
from welore.layers.int8 import KERNEL_STEP, SCALE, Int8Layer
from welore.layers.low_rank import CompressedLayer
from welore.layers.storage_forms import FACTORED, FORMS
from welore.models.experts import unfuse, unmerged
from welore.models.int8 import quantize_layers
from welore.models.replace import build_layer, has_module, share_layer, submodule_names
from welore.models.saving import remember_companions
from welore.models.targets import shared_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "welore"
# 1: A and B alone, 2: other forms, 3: blocks, 4: smaller MLPs, 5: int8, 6: single experts; the least is written, for
# older readers
VERSION = 6


@register_quantization_config(METHOD)
class WeLoreConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint, or how to compress a dense one while it is loaded.

    Args:
        ranks: Module name in the causal LM -> rank of its matrix; in every saved checkpoint.
        forms: Module name -> storage form, where that is not A and B (layers.storage_forms.FORMS).
        grids: Module name -> blocks down and across of the matrices that were factored block by block; a layer of
            which a block NAME.INDEX has a rank is a SplitLinear.
        shapes: Module name -> (m, n) of the layers that are smaller than the architecture says, because neurons were
            taken out.
        int8: Names of the layers, also factors and blocks, whose weight is stored in 8 bits (layers.int8).
        include: Patterns of the modules that were, or are to be, targeted.
        exclude: Patterns of the modules that were, or are to be, left dense.
        version: Format of the checkpoint.
        quant_method: "welore".
        params: The name of `keep` in version 0.1.
        **settings: Without ranks, fields of CompressionConfig. `from_pretrained(dense,
            quantization_config=WeLoreConfig(keep=0.8))` does what `welore.compress(model, keep=0.8, tokenizer=...)`
            does, with the tokenizer of the model's directory.

    Raises:
        WeLoreError: For a later format, an unknown form or an unknown setting.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] | None = None,
        forms: Mapping[str, str] | None = None,
        grids: Mapping[str, Sequence[int]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        int8: Sequence[str] = (),
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        version: int = 1,
        quant_method: str = METHOD,
        params: float | None = None,
        **settings: Any,
    ) -> None:
        if typed(version, int, "version") > VERSION:
            raise WeLoreError(f"this checkpoint has format {version}, this welore reads up to {VERSION}: upgrade it")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers lists only its own
        self.ranks: dict[str, int] | None = typed(ranks, Mapping[str, int] | None, "ranks")
        require_at_least(1, **{f"the rank of {name}": rank for name, rank in (self.ranks or {}).items()})
        for form in typed(forms or {}, Mapping[str, str], "forms").values():
            choose("form", form, FORMS)
        self.forms = {name: form for name, form in (forms or {}).items() if form != FACTORED}
        self.grids: dict[str, Grid] = read_grids(grids or {})
        self.shapes = read_grids(shapes or {}, "shapes", LARGEST)
        self.int8 = list(typed(int8, tuple[str, ...], "int8"))
        used = (6, self.has_experts), (5, self.int8), (4, self.shapes), (3, self.grids), (2, self.forms), (1, True)
        self.version = next(number for number, feature in used if feature)
        self.include, self.exclude = (list(typed(p, tuple[str, ...], "a pattern")) for p in (include, exclude))
        fields, hints = {f.name: f for f in dataclasses.fields(CompressionConfig)}, get_type_hints(CompressionConfig)
        settings |= {} if params is None else {"keep": params}
        for name in settings:
            choose("setting", name, fields)
            typed(settings[name], hints[name], name)
        self.compression = CompressionConfig(include=tuple(include), exclude=tuple(exclude), **settings)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "WeLoreConfig":
        """The config that config.json holds; WeLoreError if it is damaged."""
        with refusing("the quantization_config of config.json is damaged", "fetch the checkpoint again"):
            return cls(**content)

    @classmethod
    def of(cls, plan: Any) -> "WeLoreConfig":
        """The config of a model that was compressed by `plan`."""
        return cls(plan.ranks, plan.forms, plan.grids, plan.shapes, include=plan.include, exclude=plan.exclude)

    @property
    def split(self) -> dict[str, Grid]:
        """Layer -> grid of those that are stored in blocks."""
        return split_layers(self.grids, self.ranks or {})

    @property
    def layers(self) -> list[str]:
        """The layers that are not as the architecture says."""
        return list(dict.fromkeys([layer_of(name, self.grids) for name in self.ranks or {}] + list(self.shapes)))

    @property
    def has_experts(self) -> bool:
        """Whether single experts of a mixture are named, so that they are linear layers of their own."""
        return any(map(is_of_expert, (*self.layers, *self.int8)))

    def within(self, model: nn.Module) -> "WeLoreConfig":
        """The same under the names that modules have in `model`, which may be a bare AutoModel."""
        return self.renamed(submodule_names(model))

    def renamed(self, rename: Callable[[str], str]) -> "WeLoreConfig":
        """The same under other names of layers and blocks."""
        fields: list[Any] = [
            {rename(name): value for name, value in field.items()}
            for field in (self.ranks or {}, self.forms, self.grids, self.shapes)
        ]
        renamed = WeLoreConfig(*fields, include=self.include, exclude=self.exclude)
        return renamed.quantized([rename(name) for name in self.int8])

    def quantized(self, layers: Sequence[str]) -> "WeLoreConfig":
        """The same with the weights of these layers in 8 bits."""
        fields = self.ranks, self.forms, self.grids, self.shapes, layers
        return WeLoreConfig(*fields, include=self.include, exclude=self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        content: dict[str, Any] = {"quant_method": METHOD, "version": self.version, "ranks": self.ranks}
        for name in ("forms", "grids", "shapes", "int8", "include", "exclude"):
            if getattr(self, name):
                content[name] = getattr(self, name)
        return content


class ExpertsApart(WeLoreConfig):
    """How a dense mixture is loaded with its experts apart: their matrices stay in the mapped file."""

    def __init__(self) -> None:
        super().__init__({})

    @property
    def has_experts(self) -> bool:
        """Always."""
        return True


@register_quantizer(METHOD)
class WeLoreQuantizer(HfQuantizer):
    """Builds low-rank layers before weights are loaded, or factors dense ones after; then steps aside."""

    quantization_config: WeLoreConfig
    requires_calibration = False
    _loaded: "PreTrainedModel | None" = None

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if config.ranks is None:
            return
        if checkpoint_files:
            remember_companions(config, Path(checkpoint_files[0]).parent)
            files = [path for path in checkpoint_files if str(path).endswith(".safetensors")]
            check_factors(config, readers_of(files), model)
        build_layers(model, config)
        self._loaded = model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        config = self.quantization_config
        step_aside(model)
        for module in model.modules():
            if isinstance(module, Int8Layer):
                module.weight_scale.requires_grad_(False)
                if module.weight.data_ptr() % KERNEL_STEP:  # in a mapped file: torch's kernel would crash
                    module.weight.data = module.weight.data.clone()
        for first, others in shared_layers(model).items():
            for other in others:
                if isinstance(model.get_submodule(first), CompressedLayer):
                    share_layer(model, first, other)  # the buffers, too
        if config.ranks is None:
            del model.config.quantization_config
            welore.compress(model, config=config.compression, tokenizer=_tokenizer(model, config.compression))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Leave the matrices of experts apart that are linear layers; transformers 5.19 names no model."""
        model = model or self._loaded
        return weight_conversions if model is None else unmerged(weight_conversions, model)

    def is_serializable(self) -> bool:
        """Compressed models save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True


def build_layers(model: "PreTrainedModel", config: WeLoreConfig) -> None:
    """Put the (uninitialised) layers that a compression describes in the places of dense ones."""
    if config.has_experts:
        unfuse(model)
    shared, config = shared_layers(model), config.within(model)
    for layer in config.layers:
        build_layer(model, layer, config, shared.get(layer, ()))
    quantize_layers(model, [name for name in config.int8 if has_module(model, name)])  # a bare one has no head


def _tokenizer(model: "PreTrainedModel", config: CompressionConfig) -> Any:
    """The tokenizer of the model that is loaded, where compressing it needs a text; None elsewhere."""
    from welore.models.load import read_tokenizer

    best = config.preset is None and config.keep is not None and config.strategy is None and config.scaling is None
    if config.scaling == NONE or not (best or config.preset in ("best", "fast") or config.scaling):
        return None
    name = model.config.name_or_path or "the model"
    try:
        return read_tokenizer(Path(name))
    except WeLoreError as error:
        raise WeLoreError(
            f"to compress {name} while it is loaded a text is needed, and its tokenizer cannot be read: add one, or "
            "ask for the plain method by scaling='none' or preset='paper'"
        ) from error


def step_aside(model: "PreTrainedModel") -> None:
    """Make a loaded model an ordinary one: `.half()`, Trainer and save_pretrained refuse or misread a quantizer.

    `config.quantization_config` stays, so that saving writes it.
    """
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    setattr(model, "is_quantized", False)  # noqa: B010 - not declared by transformers
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_is_quantized", False):
            config._is_quantized = False  # type: ignore[union-attr]


def check_factors(config: WeLoreConfig, readers: Mapping[str, TensorReader], model: "PreTrainedModel") -> None:
    """Raise WeLoreError unless every factor is in the files as the configuration says: another one would load as noise.

    model: that is loaded. Files of a bare AutoModel leave the first component of names out, and it has no head.
    """
    prefix = f"{model.base_model_prefix}."

    def stored(key: str) -> str:
        return key if key in readers else key.removeprefix(prefix)

    def info(key: str) -> TensorInfo:
        if stored(key) not in readers:
            raise WeLoreError(f"the checkpoint has lost the tensor {key}: it cannot be loaded")
        return readers[stored(key)].entries[stored(key)]

    numbers = [f"{name}.weight" for layer, grid in config.split.items() for name in block_names(layer, grid)]
    for name, rank in (config.ranks or {}).items():
        form = FORMS[config.forms.get(name, FACTORED)]
        parts = {part: info(f"{name}.{part}").shape for part in form.parts}
        if not form.check(parts, rank):
            raise WeLoreError(f"config.json gives {name} rank {rank}, its tensors are {parts}: it is damaged")
        for part in form.indices:
            key = stored(f"{name}.{part}")
            check_permutation(key, readers[key].read(key))
        numbers += [f"{name}.{part}" for part in form.numbers]
    for name in (n for n in config.int8 if n.startswith(prefix) or hasattr(model, n.split(".")[0])):
        weight, scale = info(f"{name}.weight"), info(f"{name}.{SCALE}")
        if weight.dtype != torch.int8 or scale.dtype not in FLOATS or scale.shape != (*weight.shape[:1], 1):
            raise WeLoreError(f"config.json says that {name} is int8, its tensors are {weight}, {scale}: it is damaged")
        key = stored(f"{name}.{SCALE}")
        check_finite(key, readers[key].read(key))
    integers = {f"{name}.weight" for name in config.int8}
    numbers = [key for key in numbers if key not in integers]
    tombstones = [f"{name}.weight" for name in config.ranks or {}]
    for key in (*numbers, *(key for key in tombstones if stored(key) in readers)):
        check_dtype(key, info(key).dtype)
