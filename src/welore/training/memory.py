"""The memory of a training step, from shapes alone: what `finetune --dry-run` prints.

docs/how-to/fine-tune-7b.md states the formula. It is an upper bound: measured steps of SmolLM2 took 85 to 98 % of it.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from torch import nn

from welore.config import FinetuneConfig, RunOptions, settings_of
from welore.io.checkpoint import read_config
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.layers.expert_names import EXPERT, is_of_expert
from welore.layers.low_rank import LowRankLayer
from welore.models.quantizer import METHOD, WeLoreConfig, build_layers
from welore.models.skeleton import context_length, decoder_blocks, require_context_length, skeleton_of
from welore.models.targets import kind_of
from welore.training.methods import METHODS, MarkedModel, mark_trainable
from welore.training.objective import chunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT = 4  # bytes of a number that is trained, of its gradient, and of each of Adam's two moments
LOGIT, LOGIT_IN_PIECES = 12, 20  # bytes of a logit, with its probability and gradient; of pieces also their input
REPEATING = "llama4_text"  # the type of text whose layers repeat every token for each expert
MOMENTS = {"8bit": 2, "4bit": 1}  # bytes of both for a number, by the end of the optimiser's name; else 8


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device that trains, an upper bound, without what torch itself takes.

    trained, parameters: numbers. weights: with those of a teacher in memory, and a copy of trained ones in the dtype of
    the products. logits: of one piece.
    """

    trained: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def to_dict(self) -> dict[str, Any]:
        """All fields and the total as JSON values."""
        return dataclasses.asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        parts = {name: value for name, value in self.to_dict().items() if name not in ("trained", "parameters")}
        lines = [f"{self.trained:,} of {self.parameters:,} parameters trained; memory of a step at most:"]
        return "\n".join([*lines, *(f"  {name:12}{size / 1e9:10,.2f} GB" for name, size in parts.items())])


def estimate_step(
    model: str | Path, config: FinetuneConfig | None = None, *, plan: Any = None, **options: Unpack[RunOptions]
) -> StepMemory:
    """Predict the memory of a step of `finetune` with the same arguments; reads a configuration, and no weights.

    Args:
        model: Hub id, directory or .gguf file; its config.json is enough.
        config: The settings; a text need not be named.
        plan: For a dense model, which of its matrices count as low-rank components.
        **options: Where it would compute (config.RunOptions).

    Returns:
        Bytes by what holds them; `str` of it is a table.

    Raises:
        WeLoreError: If the settings cannot work, or the model cannot be read.
    """
    from welore.training.arguments import is_recorded, resolve_defaults  # the Trainer: seconds of imports

    context, config = RunContext.create(**options), settings_of(FinetuneConfig, config)
    if config.dataset is None and config.task is None:
        config = dataclasses.replace(config, dataset="pydoc")  # any text: none is read
    config = resolve_defaults(config, context.device)
    marked = mark_trainable(
        _skeleton(model, context), config.method, plan=plan, train_norms=config.train_norms, rank=config.rank
    )
    require_context_length(cast(int, config.max_length), context_length(marked.base.config))
    teacher = 0
    if config.distill is not None and not is_recorded(config.distill):
        teacher = sum(p.numel() for p in _skeleton(config.distill, context).parameters())
    return step_memory(marked, config, teacher=teacher)


def _skeleton(model: str | Path, context: RunContext) -> "PreTrainedModel":
    """The model of a directory's configuration on the meta device, dense or compressed."""
    directory = resolve_model(model, cache_dir=context.cache_dir, revision=context.revision)
    skeleton: Any = skeleton_of(directory, str(model), trust_remote_code=context.trust_remote_code)
    quantization = read_config(directory).get("quantization_config") or {}
    if quantization.get("quant_method") == METHOD:
        skeleton.config.quantization_config = WeLoreConfig.read(quantization)
        build_layers(skeleton, skeleton.config.quantization_config)
    return skeleton


def step_memory(marked: MarkedModel, config: FinetuneConfig, *, teacher: int = 0) -> StepMemory:
    """That of a model with its method's marks; config: without gaps; teacher: numbers of one in memory."""
    model, item = marked.base, itemsize(config)
    blocks, text = decoder_blocks(model)[1], model.config.get_text_config(decoder=True)
    named = list(marked.model.named_parameters())
    trained, frozen = (sum(p.numel() for _, p in named if p.requires_grad is on) for on in (True, False))
    if config.stream_weights:  # the device holds one at a time
        layers = [m.weight.numel() for m in blocks.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
        frozen -= sum(layers) - max(layers, default=0)
    method = METHODS[config.method]
    rank = (config.rank or method.default_rank) if method.optimizer else None  # of projected gradients
    projected = {id(p) for p in blocks.parameters() if p.ndim == 2}
    states = sum(_state_bytes(p, config, rank if id(p) in projected else None) for _, p in named if p.requires_grad)
    width, wide = _widths(blocks, text)
    tokens = cast(int, config.batch_size) * cast(int, config.max_length)
    logits = (tokens * LOGIT if config.whole_logits else chunk_of(text.vocab_size) * LOGIT_IN_PIECES) * text.vocab_size
    head: Any = model.get_output_embeddings()
    once = FLOAT + item * (item < FLOAT)  # bytes of a number that is trained, with its copy for the products
    logits += once * head.weight.numel() * head.weight.requires_grad  # another gradient, while both are added up
    return StepMemory(
        trained=trained,
        parameters=sum(p.numel() for p in model.parameters()),
        weights=float(item * (frozen + teacher) + once * trained),
        gradients=float(FLOAT * trained),
        optimizer=float(states),
        activations=activation_bytes(config, text, width, wide),
        logits=float(logits),
    )


def activation_bytes(config: FinetuneConfig, text: Any, width: int, wide: int = 0) -> float:
    """Bytes of what a step's forward pass keeps for the backward pass.

    text: configuration of the decoder. width: numbers for each token that enter or leave a matrix of the blocks; wide:
    results of products over at least the hidden size, which selective checkpointing keeps.
    """
    tokens, layers = cast(int, config.batch_size) * cast(int, config.max_length), text.num_hidden_layers
    size = 1.5 * (item := itemsize(config)) * tokens * width
    if text.model_type == REPEATING:
        size += item * tokens * len(text.moe_layers) * text.num_local_experts * text.hidden_size
    if config.attention == "eager":
        size += 4 * item * tokens * cast(int, config.max_length) * layers * text.num_attention_heads
    if config.gradient_checkpointing:
        return size / layers + item * tokens * layers * text.hidden_size
    if config.selective_checkpointing:
        lasting = wide + 2 * layers * text.hidden_size  # attention, and inputs of blocks
        return size / layers + 2 * item * tokens * lasting  # twice, as what lasts leaves gaps between what does not
    return size


def itemsize(config: FinetuneConfig) -> int:
    """Bytes of a number in the products."""
    return 4 if config.dtype == "float32" else 2


def met(sizes: Mapping[str, int], text: Any, *, every: bool = False) -> int:
    """The sum over the matrices that a token meets, by name: of the largest experts that it may choose, or of every."""
    mixtures: dict[str, Counter[str]] = defaultdict(Counter)
    for name, size in sizes.items():
        expert = EXPERT.search(name)
        mixtures[name[: expert.start()] if expert else name][expert.group() if expert else name] += size
    each = None if every else getattr(text, "num_experts_per_tok", None)
    return sum(size for experts in mixtures.values() for _, size in experts.most_common(each))


def _widths(blocks: nn.ModuleList, text: Any) -> tuple[int, int]:
    """For each token: numbers that enter or leave matrices, and results of products over the hidden size or more."""
    low_rank = {name: module for name, module in blocks.named_modules() if isinstance(module, LowRankLayer)}
    factors = {id(part) for layer in low_rank.values() for part in layer.modules()}
    width = {name: layer.in_features + layer.rank + layer.out_features for name, layer in low_rank.items()}
    wide = {}
    for name, module in blocks.named_modules():
        kind = kind_of(module)
        if kind and not isinstance(module, LowRankLayer) and ".lora_" not in name:  # which reads what its matrix reads
            m, n = kind.shape(module)
            width[name] = (m + n) * (id(module) not in factors)
            wide[name] = m * (n >= text.hidden_size)
    every = text.model_type == REPEATING and not any(map(is_of_expert, low_rank))  # they are together in its own class
    return met(width, text, every=every), met(wide, text, every=every)


def _state_bytes(parameter: nn.Parameter, config: FinetuneConfig, rank: int | None) -> float:
    """Of the optimiser for one parameter; rank: of GaLore and APOLLO, which keep moments of a projection, and that."""
    if rank is not None:
        short, long = sorted(parameter.shape)
        return float(FLOAT * rank * (2 * long + short))
    moments = next((size for end, size in MOMENTS.items() if config.optimizer.endswith(end)), 2 * FLOAT)
    return float(moments * parameter.numel())
