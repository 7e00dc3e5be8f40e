"""How vLLM serves compressed checkpoints as they are: a quantization method named "welore".

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). The interface of vLLM 0.32.
Every product is a linear layer of vLLM, with the kernel that vLLM takes for the device; see layers.stacked.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from welore.errors import WeLoreError
from welore.layers.block_grid import block_names
from welore.layers.int8 import SCALE, Int8Linear, dequantize, int8_product
from welore.layers.stacked import Part, StackedLinear
from welore.layers.storage_forms import FACTORED
from welore.models.key_names import of_layer
from welore.models.quantizer import METHOD, WeLoreConfig

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}  # vLLM's name of a matrix in a packed layer -> its number, if it is none
UNNAMED = ".embed_tokens"  # the embedding to which vLLM gives no name (llama)
MERGE = "serve what `welore merge` makes of it"


def register() -> None:
    """Make the method known to vLLM."""
    register_quantization_config(METHOD)(VllmConfig)
    # vLLM compiles a model once, for as many tokens as fit: only an operator can choose the kernel for few.
    if not hasattr(torch.ops.vllm, "welore_int8_product"):
        empty = lambda x, weight, *_: x.new_empty((*x.shape[:-1], len(weight)))  # noqa: E731
        direct_register_custom_op("welore_int8_product", int8_product, fake_impl=empty)


class VllmConfig(QuantizationConfig):
    """The `quantization_config` of a compressed checkpoint; WeLoreError for one that cannot be served."""

    def __init__(self, config: WeLoreConfig) -> None:
        super().__init__()
        if config.has_experts:
            raise WeLoreError(f"vLLM computes all experts of a layer at once, and some of these are low rank: {MERGE}")
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmConfig":
        """From the content of config.json."""
        return cls(WeLoreConfig.read(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that modules have in vLLM."""
        self.config = self.config.renamed(partial(of_layer, lambda key: hf_to_vllm_mapper.map_name(key) or key))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: ours for layers that hold a compressed matrix."""
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        if isinstance(layer, VocabParallelEmbedding) and prefix not in self.config.layers:
            ours = (n for n in self.config.int8 if n == prefix or (not prefix and n.endswith(UNNAMED)))
            return Int8EmbeddingMethod(name) if (name := next(ours, None)) else EmbeddingMethod()
        if {*self.config.layers, *self.config.int8}.isdisjoint(names):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise WeLoreError(f"vLLM does not compute {prefix} as a linear layer: {MERGE}")
        engine = get_current_vllm_config_or_none()
        if engine is not None and engine.lora_config is not None:
            raise WeLoreError(f"vLLM cannot add LoRA adapters to low-rank layers: {MERGE}")
        if self.online_quantization_config is not None:
            raise WeLoreError(f"vLLM cannot quantize low-rank layers: leave the quantization out, or {MERGE}")
        return StackedMethod(self.config, names)

    def get_name(self) -> Any:
        """The name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the factors."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []


class StackedMethod(LinearMethodBase):
    """The matrices that vLLM packs into one layer, as a StackedLinear; names: of them, in the checkpoint."""

    def __init__(self, config: WeLoreConfig, names: list[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Build the (uninitialised) layer, and an empty parameter where vLLM looks for a tensor of the checkpoint."""
        sizes = output_partition_sizes if len(self.names) > 1 else [sum(output_partition_sizes)]
        if layer.tp_size > 1 and len(sizes) < len(output_partition_sizes):
            raise WeLoreError(f"{self.names[0]} holds several matrices: take tensor_parallel_size=1")
        numbers = range(len(self.names))
        parts = [self._part(layer, number, (m, input_size)) for number, m in zip(numbers, sizes, strict=True)]

        def product(n: int, m: int, int8: bool) -> nn.Module:
            if int8:
                return Int8Product(n, m, params_dtype)
            return ReplicatedLinear(n, m, bias=False, params_dtype=params_dtype, return_bias=False)

        layer.stack = StackedLinear(parts, product)
        for key in set().union(*map(layer.stack.keys, self.names)):
            *modules, leaf = key.split(".")
            module = layer
            for name in modules:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = partial(self._fill, layer.stack, key)  # type: ignore[attr-defined]
            module.register_parameter(leaf, empty)

    def _part(self, layer: Any, number: int, shape: tuple[int, int]) -> Part:
        """A matrix, and the share of it that this device computes. shape: (rows here, n) of the dense one."""
        name, (rows, columns), config = self.names[number], (1, 1), self.config
        if isinstance(layer, ColumnParallelLinear):
            replicated = number and isinstance(layer, QKVParallelLinear)  # k and v
            rows = layer.tp_size // (layer.num_kv_head_replicas if replicated else 1)
        elif isinstance(layer, RowParallelLinear):
            columns = layer.tp_size
        dense = shape[0] * rows, shape[1]
        m, n = config.shapes.get(name, dense)
        if m != dense[0] and layer.has_bias:
            raise WeLoreError(f"{name} has lost neurons and has a bias, which vLLM makes for all neurons: {MERGE}")
        if m % rows or n % columns:
            raise WeLoreError(f"{name} of shape {(m, n)} cannot be divided over {layer.tp_size} devices: use fewer")
        grid, ranks = config.split.get(name), config.ranks or {}
        low_rank = {
            matrix: (config.forms.get(matrix, FACTORED), ranks[matrix])
            for matrix in (block_names(name, grid) if grid else [name])
            if matrix in ranks
        }
        own = _share(m, rows, layer.tp_rank * rows // layer.tp_size), _share(n, columns, layer.tp_rank % columns)
        return Part(name, (m, n), *own, grid, low_rank, frozenset(config.int8))

    def _fill(self, stack: StackedLinear, key: str, _: nn.Parameter, data: Tensor, shard: Any = None) -> None:
        """vLLM's loader of a tensor. shard: vLLM's name of the matrix in a packed layer."""
        shard = getattr(data, "shard_id", shard)
        if data.numel():  # or it is the tombstone
            stack.fill(f"{self.names[SHARDS.get(shard, shard)]}.{key}", data)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a checkpoint that has lost a tensor."""
        layer.stack.require_filled()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., n) -> (..., rows of all matrices)."""
        y: Tensor = layer.stack(x)
        return y if bias is None else y + bias


class Int8Product(nn.Module):
    """An Int8Linear that is no nn.Linear: of families that it runs by transformers' code, vLLM replaces each of those.

    n, m: of its weight (m, n). dtype: of the scales.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, n: int, m: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name, parameter in Int8Linear(n, m, dtype=dtype).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., n) -> (..., m)."""
        y: Tensor = torch.ops.vllm.welore_int8_product(x, self.weight, self.weight_scale)
        return y


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """An ordinary embedding or head; a head that shares the weight of an 8-bit embedding is one, too."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Give a head the weight of the embedding."""
        layer.quant_method = embed_tokens.quant_method
        for name, parameter in embed_tokens.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        return layer


class Int8EmbeddingMethod(QuantizeMethodBase):
    """An embedding or head that stays in 8 bits (layers.int8); name: of it, in the checkpoint."""

    def __init__(self, name: str) -> None:
        self.name, self.empty = name, {"weight", SCALE}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *_: Any,
        params_dtype: torch.dtype,
        weight_loader: Any,
        **__: Any,
    ) -> None:
        """Register the integers and the scales of the rows that this device holds."""
        m = sum(output_partition_sizes)
        for name, n, dtype in (("weight", input_size_per_partition, torch.int8), (SCALE, 1, params_dtype)):
            parameter = nn.Parameter(torch.empty(m, n, dtype=dtype), requires_grad=False)
            load = partial(self._load, name, weight_loader)
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": load})
            layer.register_parameter(name, parameter)

    def _load(self, name: str, load: Any, parameter: nn.Parameter, data: Tensor) -> None:
        if (name == "weight") != (data.dtype == torch.int8):
            raise WeLoreError(f"config.json says that {self.name} is int8, its {name} is {data.dtype}: it is damaged")
        self.empty.discard(name)
        load(parameter, data)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a checkpoint that has lost a tensor."""
        if self.empty:
            raise WeLoreError(f"the checkpoint has lost the tensor {self.name}.{min(self.empty)}: it cannot be loaded")

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """input_: (...), token ids -> (..., n)."""
        return dequantize(functional.embedding(input_, layer.weight), functional.embedding(input_, layer.weight_scale))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., n) -> (..., tokens)."""
        y: Tensor = torch.ops.vllm.welore_int8_product(x, layer.weight, layer.weight_scale, bias)
        return y


def _share(size: int, devices: int, rank: int) -> range:
    return range(rank * size // devices, (rank + 1) * size // devices)
