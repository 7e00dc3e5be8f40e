"""The fine-tuning methods: which parameters of a model each trains. A new method is one entry of METHODS."""

import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from welore.allocation.plan import Plan
from welore.errors import WeLoreError, choose
from welore.io.context import finest_dtype
from welore.layers.expert_names import is_of_expert
from welore.layers.int8 import Int8Layer
from welore.layers.low_rank import LowRankLayer
from welore.models.experts import fused_experts, fused_tensors, unfuse, unfused
from welore.models.replace import compression_config
from welore.models.skeleton import decoder_blocks
from welore.models.targets import find_targets, in_blocks, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GAP = 200  # steps between projections: GaLore, section 5, and APOLLO
GALORE_SCALE = 0.25  # the update's factor: GaLore, section 5
RATE, ADAPTER_RATE = 5e-4, 3e-4  # learning rates over the scale of what is trained: benchmarks/learning_rates.py


@dataclass(frozen=True)
class Matrices:
    """Names of the targeted matrices: those that are factored or would be (LRCs), and the others.

    fused: parameters that hold matrices of all experts of a layer, which are N-LRCs.
    """

    lrc: Sequence[str]
    nlrc: Sequence[str]
    fused: Sequence[str] = ()


@dataclass(frozen=True)
class MarkedModel:
    """A model whose trained parameters have requires_grad; all other parameters are frozen.

    Attributes:
        model: The model to train; with adapters a peft model around the one that was given.
        description: Which parameters are trained, in words.
        training_arguments: The optimiser where the method needs its own, as fields of transformers' TrainingArguments.
        relative_rate: A good learning rate, over the scale.
    """

    model: Any
    description: str
    training_arguments: dict[str, Any] = field(default_factory=dict)
    relative_rate: float = RATE

    def learning_rate(self, relative: float | None = None) -> float:
        """A peak rate for AdamW, without the digits that depend on threads; relative: in place of `relative_rate`."""
        return float(f"{(relative or self.relative_rate) * self.scale:.9g}") or RATE

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, for any optimiser."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def base(self) -> Any:
        """The model without the adapters' wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "merge_and_unload") else self.model

    @property
    def scale(self) -> float:
        """The root mean square of the blocks' matrices that are trained: a good learning rate is in proportion to it.

        Of adapters: that of those below them, times sqrt(n), as their first factor (r, n) has numbers of size n^(-1/2).
        """
        base, squares, count = self.base, 0.0, 0.0
        ends = {id(end.weight) for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end}
        matrices = [(p, 1) for p in self.parameters if p.ndim > 1 and id(p) not in ends]
        if base is not self.model:
            matrices = [(m.base_layer.weight, m.in_features) for m in base.modules() if hasattr(m, "base_layer")]
        for matrix, inputs in matrices:
            for part in matrix.detach() if matrix.ndim > 2 else [matrix.detach()]:  # no copy of all experts
                norm = float(torch.linalg.vector_norm(part, dtype=finest_dtype(part.device)))
                squares += inputs * norm**2
                count += part.numel()
        return math.sqrt(squares / count) if count else 0.0

    def merged(self) -> Any:
        """The ordinary model: adapters, if there are any, are added to the weights they adapt."""
        return self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    mark: sets requires_grad; of a model, its matrices and a rank. default_rank: None for a method without one.
    fsdp: its parameters may be cut over processes. streams: frozen weights may stay on the host. packages: what it
    needs beyond the package, from the extra `extra`. optimizer: of transformers' Trainer, if the method is one itself;
    its state holds the classes `state_classes`. relative_rate: see MarkedModel.
    """

    mark: Callable[["PreTrainedModel", Matrices, int], MarkedModel]
    relative_rate: float = RATE
    supports_norms: bool = False
    default_rank: int | None = None
    fsdp: bool = False
    streams: bool = True
    packages: tuple[str, ...] = ()
    extra: str = ""
    optimizer: str | None = None
    state_classes: tuple[str, ...] = ()


def mark_trainable(
    model: "PreTrainedModel",
    method: str = "lrc",
    *,
    plan: Plan | str | Path | None = None,
    train_norms: bool = False,
    rank: int | None = None,
) -> MarkedModel:
    """Set requires_grad on the parameters that a method trains, and freeze the others.

    The model can then be trained by any loop, by transformers' Trainer or by trl's SFTTrainer. With lora, rslora,
    dora and updates train the `model` of the result, which has the adapters.

    Args:
        model: A model in memory, compressed or dense.
        method: lrc (the factors of the low-rank matrices; WeLore, section 3.3), nlrc (the targeted matrices that
            stayed dense), full, lora (arXiv 2106.09685), rslora (2312.03732), dora (2402.09353), updates (lora on the
            factors alone), galore (2403.03507) or apollo (2412.05270).
        plan: For a dense model, which of its matrices count as low-rank components: the control of the paper's
            comparison. If it has single experts, the fused experts of the model become linear layers, in place.
        train_norms: Train the norms, too (lrc, nlrc).
        rank: The rank of lora, rslora, dora and updates (8), or of galore and apollo (128).

    Returns:
        The model, a description of what is trained, and the arguments of the method's optimiser if it has its own.

    Raises:
        WeLoreError: The method is unknown, has nothing to train in this model, or lacks a package.
    """
    entry = choose("method", method, METHODS)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise WeLoreError("this model has adapters already: merge them first (merge_and_unload of peft)")
    if any(isinstance(module, Int8Layer) for module in model.modules()):
        raise WeLoreError(
            "the weights of this model are int8, which cannot be trained: fine-tune the model that it was made of, "
            "then `welore export --format int8` that"
        )
    refuse_options(method, train_norms=train_norms, rank=rank)
    plan = take_apart(model, plan)
    marked = entry.mark(model, find_matrices(model, plan), rank or entry.default_rank or 0)
    for module in model.modules() if train_norms else ():
        if "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
    norms = " and the norms" * train_norms
    return replace(marked, description=marked.description + norms, relative_rate=entry.relative_rate)


def optimizer_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trained parameters as groups for any optimiser: with weight decay, and without.

    Factors, norms and biases get none: decay pulls them to zero, where a factored matrix is lost. A learning rate is
    the optimiser's own.
    """
    factors = {id(p) for layer in model.modules() if isinstance(layer, LowRankLayer) for p in layer.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in factors]
    others = [p for p in trained if p.ndim < 2 or id(p) in factors]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def refuse_options(method: str, *, train_norms: bool, rank: int | None) -> None:
    """Raise WeLoreError for options that a method does not have, and for packages that it lacks."""
    entry = METHODS[method]
    if train_norms and not entry.supports_norms:
        names = " and ".join(name for name, other in METHODS.items() if other.supports_norms)
        raise WeLoreError(f"train_norms goes with {names}; {method} has a rule of its own")
    if rank is not None and entry.default_rank is None:
        names = ", ".join(name for name, other in METHODS.items() if other.default_rank)
        raise WeLoreError(f"rank goes with {names}; {method} has no rank")
    missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise WeLoreError(f"method {method} needs {', '.join(missing)}: pip install 'welore[{entry.extra}]'")


def take_apart(model: "PreTrainedModel", plan: Plan | str | Path | None) -> Plan | None:
    """Make linear layers of the fused experts of a model, in place, if matrices of experts are LRCs of the plan."""
    plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
    if plan is not None and any(map(is_of_expert, plan.lrc_layers)):
        unfuse(model)
    return plan


def find_matrices(model: "PreTrainedModel", plan: Plan | None = None) -> Matrices:
    """The targeted matrices of a compressed model by their form; of a dense one by what `plan` would make of them."""
    patterns = compression_config(model)
    include, exclude = patterns.get("include", ()), patterns.get("exclude", ())
    if plan is not None:
        include, exclude = plan.include, plan.exclude
    mixtures = {} if plan is None else fused_experts(model)
    apart = unfused(model) if mixtures else model
    targets = find_targets(apart, include, exclude)
    names = [target.name for target in targets]
    factored = {name for name in names if isinstance(apart.get_submodule(name), LowRankLayer)}
    if plan is not None:
        if factored:
            raise WeLoreError("a plan tells the matrices of a dense model apart; this model is compressed already")
        factored = plan.lrc_layers
        missing = factored - set(names)
        if missing:
            raise WeLoreError(f"the plan is for another model: it names {sorted(missing)[0]}, which this one has not")
        if not plan.neurons:  # else its shapes are those after pruning
            shapes = {target.name: target.shape for target in in_blocks(targets, plan.grids)}
            plan.check_shapes({a.name: shapes[a.name] for a in plan.allocations if a.name in shapes})
    nlrc = [name for name in names if name not in factored]
    fused = [
        f"{mixture}.{tensor.name}"
        for mixture, module in mixtures.items()
        for tensor in fused_tensors(module)
        if {f"{name}.weight" for name in nlrc}.issuperset(tensor.names(mixture, 0))
    ]
    inside = tuple(f"{mixture}." for mixture in mixtures)
    return Matrices([n for n in names if n in factored], [n for n in nlrc if not n.startswith(inside)], fused)


def _lrc(model: "PreTrainedModel", matrices: Matrices, rank: int) -> MarkedModel:
    if not matrices.lrc:
        raise WeLoreError(
            "method lrc has nothing to train: this model has no low-rank matrices; compress it first, or name by "
            "plan which of its matrices to train"
        )
    layers = [model.get_submodule(name) for name in matrices.lrc]
    _train_only(model, [part for layer in layers for part in (_parts(layer) or [layer])])
    dense = not isinstance(layers[0], LowRankLayer)
    return MarkedModel(model, "the dense matrices that the plan calls LRCs" if dense else "the factors of the LRCs")


def _nlrc(model: "PreTrainedModel", matrices: Matrices, rank: int) -> MarkedModel:
    """The control of the paper's figure 5."""
    if not (matrices.nlrc or matrices.fused):
        raise WeLoreError("method nlrc has nothing to train: every targeted matrix of this model is factored; use lrc")
    _train_only(model, [model.get_submodule(name) for name in matrices.nlrc])
    for name in matrices.fused:
        model.get_parameter(name).requires_grad_()
    return MarkedModel(model, "the dense targeted matrices (N-LRCs)")


def _full(model: "PreTrainedModel", matrices: Matrices, rank: int) -> MarkedModel:
    model.requires_grad_(True)
    return MarkedModel(model, "every parameter")


def _lora(model: "PreTrainedModel", matrices: Matrices, rank: int, kind: str = "LoRA", **switches: bool) -> MarkedModel:
    """Adapters on every linear layer of the blocks, of factors on each. kind: in words; switches: of peft."""
    adapted = _adapted(model, _linear_layers(model, (*matrices.lrc, *matrices.nlrc)), rank, **switches)
    return MarkedModel(adapted, f"{kind} adapters of rank {rank} on every linear layer of the blocks")


def _updates(model: "PreTrainedModel", matrices: Matrices, rank: int) -> MarkedModel:
    """LoRA adapters on the factors alone."""
    if not matrices.lrc:
        raise WeLoreError("method updates has nothing to train: this model has no low-rank matrices; compress it first")
    adapted = _adapted(model, _linear_layers(model, matrices.lrc), rank)
    return MarkedModel(adapted, f"LoRA adapters of rank {rank} on the factors")


def _linear_layers(model: "PreTrainedModel", names: Sequence[str]) -> list[str]:
    """The linear layers of matrices: the factors of a low-rank one, another itself."""
    layers: list[str] = []
    for name in names:
        layer = model.get_submodule(name)
        layers += [f"{name}.{child}" for child, _ in layer.named_children()] if _parts(layer) else [name]
    return layers


def _adapted(model: "PreTrainedModel", names: Sequence[str], rank: int, **switches: bool) -> Any:
    """The model in peft's wrapper, with adapters of a rank on these layers."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0} | switches
    kind, kinds = type(model).__name__, {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    task: Any = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    task = next((task for end, task in kinds.items() if kind.endswith(end)), task)
    config = LoraConfig(target_modules=[*names], task_type=task, **settings)
    with known_warnings():
        return get_peft_model(model, config)


def lora_targets(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """The `target_modules` for peft that mean the usual names in a compressed model.

    peft finds modules by the end of their name, and a low-rank `q_proj` is no linear layer: its factors are. Every
    adapter of peft takes them, and the list in its configuration is read by peft alone.

    Args:
        model: A model with low-rank layers; others work, too.
        names: Ends of names, such as "q_proj" or "mlp.up_proj"; None: those that peft adapts in this family by default.

    Returns:
        Names of linear layers: of a low-rank or split layer those inside it, of another one its own.

    Raises:
        WeLoreError: If no linear layer has one of the names, or peft has no default for the family.
    """
    if names is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        family = getattr(model.config, "model_type", "")
        if family not in DEFAULTS:
            raise WeLoreError(
                f"peft has no default targets for {family or 'this model'}: name them: lora_targets(model, ['q_proj'])"
            )
        names = DEFAULTS[family]
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = {end: [name for name in linear if f".{end}." in f".{name}."] for end in names}
    for end, layers in inside.items():
        if not layers:
            raise WeLoreError(f"no linear layer of this model is called {end!r}")
    return list(dict.fromkeys(name for layers in inside.values() for name in layers))


def _projected(model: "PreTrainedModel", matrices: Matrices, rank: int, kind: str, **options: float) -> MarkedModel:
    """The AdamW of GaLore or APOLLO, in which the gradients of the blocks are projected to a low rank."""
    model.requires_grad_(True)
    blocks, _ = decoder_blocks(model)
    settings = {"rank": rank, "update_proj_gap": GAP} | options
    optimizer = {
        "optim": METHODS[kind.lower()].optimizer,
        "optim_target_modules": rf"{re.escape(blocks)}\..*",
        "optim_args": ",".join(f"{name}={value}" for name, value in settings.items()),
    }
    return MarkedModel(model, f"every parameter, by {kind} of rank {rank} in the blocks", optimizer)


_ADAPTERS: dict[str, Any] = {"default_rank": 8, "packages": ("peft",), "extra": "train", "relative_rate": ADAPTER_RATE}
METHODS: dict[str, Method] = {
    "lrc": Method(_lrc, supports_norms=True, fsdp=True),
    "nlrc": Method(_nlrc, supports_norms=True, fsdp=True),
    "full": Method(_full, fsdp=True),
    "lora": Method(_lora, **_ADAPTERS),
    "rslora": Method(partial(_lora, kind="rsLoRA", use_rslora=True), **_ADAPTERS),
    "dora": Method(partial(_lora, kind="DoRA", use_dora=True), streams=False, **_ADAPTERS),  # it takes norms of weights
    "updates": Method(_updates, **_ADAPTERS),
    "galore": Method(
        partial(_projected, kind="GaLore", scale=GALORE_SCALE),
        default_rank=128,
        packages=("galore_torch", "bitsandbytes"),
        extra="galore",
        optimizer="galore_adamw",
        relative_rate=RATE / GALORE_SCALE,
        state_classes=("galore_torch.galore_projector.GaLoreProjector",),
    ),
    "apollo": Method(
        partial(_projected, kind="APOLLO"),
        default_rank=128,
        packages=("apollo_torch", "bitsandbytes"),
        extra="apollo",
        optimizer="apollo_adamw",
        state_classes=("apollo_torch.random_projector.GradientProjector",),
    ),
}


@contextmanager
def known_warnings() -> Iterator[None]:
    """Silence the warnings of the libraries of adapters and galore about each other's versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This implementation of AdamW is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


def state_classes(method: str) -> list[Any]:
    """The classes in a method's optimiser state besides tensors; torch reads them back only if they are named."""
    paths = [path.rpartition(".") for path in METHODS[method].state_classes]
    return [getattr(importlib.import_module(module), name) for module, _, name in paths]


def _train_only(model: "PreTrainedModel", layers: Sequence[nn.Module]) -> None:
    """Train the weights of these layers, and a head that predicts no tokens; biases and everything else are frozen."""
    model.requires_grad_(False)
    for name, head in model.named_children():
        if name != model.base_model_prefix and kind_of(head) and head is not model.get_output_embeddings():
            head.requires_grad_(True)  # of a classifier, which begins at random
    for layer in layers:
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.requires_grad_()


def _parts(layer: nn.Module) -> list[nn.Module]:
    return list(layer.children()) if isinstance(layer, LowRankLayer) else []
