"""The fine-tuning methods: each marks what is trained in a model, and says so."""

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from welore.allocation.plan import Plan
from welore.errors import WeLoreError
from welore.layers.low_rank import LowRankLayer
from welore.models.skeleton import decoder_blocks
from welore.models.targets import find_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_RANK, GALORE_RANK = 8, 128
GALORE_GAP, GALORE_SCALE = 200, 0.25  # steps between projections, and the update's factor: GaLore, section 5


@dataclass(frozen=True)
class Matrices:
    """Names of the targeted matrices: those that are factored or would be (LRCs), and the others."""

    lrc: Sequence[str]
    nlrc: Sequence[str]


@dataclass(frozen=True)
class Marked:
    """A model whose trained parameters have requires_grad, all others not.

    trains: what is trained, in words. training: the optimiser, as arguments of transformers' TrainingArguments.
    """

    model: Any
    trains: str
    training: dict[str, Any] = field(default_factory=dict)


def matrices(model: "PreTrainedModel", plan: Plan | None = None) -> Matrices:
    """The targeted matrices of a compressed model by their form; of a dense one by what `plan` would make of them.

    The dense model with a plan is the control of the paper's comparison: the same matrices, not yet damaged.
    """
    config: Any = getattr(model.config, "quantization_config", None)
    about = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
    include, exclude = about.get("include", ()), about.get("exclude", ())
    if plan is not None:
        include, exclude = plan.include, plan.exclude
    names = [target.name for target in find_targets(model, include, exclude)]
    factored = {name for name in names if isinstance(model.get_submodule(name), LowRankLayer)}
    if plan is not None:
        if factored:
            raise WeLoreError("a plan tells the matrices of a dense model apart; this model is compressed already")
        factored = plan.lrc_layers
        lost = factored - set(names)
        if lost:
            raise WeLoreError(f"the plan is for another model: it names {sorted(lost)[0]}, which this one has not")
    return Matrices([n for n in names if n in factored], [n for n in names if n not in factored])


def lrc(model: "PreTrainedModel", found: Matrices, train_norms: bool, rank: int | None) -> Marked:
    """Train the factors (A, B or P, C) of the low-rank matrices; everything else is frozen (WeLore, section 3.3)."""
    if not found.lrc:
        raise WeLoreError(
            "method lrc has nothing to train: this model has no low-rank matrices; compress it first, or name by "
            "--plan which of its matrices to train"
        )
    _freeze(model)
    for name in found.lrc:
        module = model.get_submodule(name)
        for linear in module.children() if isinstance(module, LowRankLayer) else (module,):
            _weight(linear).requires_grad_()
    low = isinstance(model.get_submodule(found.lrc[0]), LowRankLayer)
    trains = "the factors of the LRCs" if low else "the dense matrices that the plan calls LRCs"
    return Marked(model, trains + _norms(model, train_norms))


def nlrc(model: "PreTrainedModel", found: Matrices, train_norms: bool, rank: int | None) -> Marked:
    """Train the targeted matrices that stayed dense: the control of the paper's Figure 5."""
    if not found.nlrc:
        raise WeLoreError("method nlrc has nothing to train: every targeted matrix of this model is factored; use lrc")
    _freeze(model)
    for name in found.nlrc:
        _weight(model.get_submodule(name)).requires_grad_()
    return Marked(model, "the dense targeted matrices (N-LRCs)" + _norms(model, train_norms))


def full(model: "PreTrainedModel", found: Matrices, train_norms: bool, rank: int | None) -> Marked:
    """Train every parameter."""
    model.requires_grad_(True)
    return Marked(model, "every parameter")


def lora(model: "PreTrainedModel", found: Matrices, train_norms: bool, rank: int | None) -> Marked:
    """Train LoRA adapters (arXiv 2106.09685; peft) on every linear layer of the blocks, of factors on each.

    They are merged into the weights at the end: the result is a checkpoint like any other.
    """
    _need("lora", "train", "peft")
    from peft import LoraConfig, get_peft_model

    rank = LORA_RANK if rank is None else rank
    names = []
    for name in (*found.lrc, *found.nlrc):
        module = model.get_submodule(name)
        names += (
            [f"{name}.{child}" for child, _ in module.named_children()] if isinstance(module, LowRankLayer) else [name]
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    with known_warnings():
        adapted = get_peft_model(model, config)
    return Marked(adapted, f"LoRA adapters of rank {rank} on every linear layer of the blocks")


def galore(model: "PreTrainedModel", found: Matrices, train_norms: bool, rank: int | None) -> Marked:
    """Train every parameter with GaLore's AdamW (arXiv 2403.03507): gradients of the blocks projected to low rank."""
    _need("galore", "galore", "galore_torch", "bitsandbytes")
    rank = GALORE_RANK if rank is None else rank
    model.requires_grad_(True)
    blocks, _ = decoder_blocks(model)
    training = {
        "optim": "galore_adamw",
        "optim_target_modules": rf"{re.escape(blocks)}\..*",
        "optim_args": f"rank={rank},update_proj_gap={GALORE_GAP},scale={GALORE_SCALE}",
    }
    return Marked(model, f"every parameter, by GaLore of rank {rank} in the blocks", training)


METHODS: dict[str, Callable[["PreTrainedModel", Matrices, bool, int | None], Marked]] = {
    "lrc": lrc,
    "nlrc": nlrc,
    "full": full,
    "lora": lora,
    "galore": galore,
}
WITH_NORMS = ("lrc", "nlrc")  # methods to which --train-norms adds something
WITH_RANK = ("lora", "galore")  # methods that have a rank


@contextmanager
def known_warnings() -> Iterator[None]:
    """Silence what the libraries of lora and galore say about each other's versions; none of it is the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This implementation of AdamW is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def _norms(model: nn.Module, train_norms: bool) -> str:
    if not train_norms:
        return ""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
    return " and the norms"


def _weight(module: nn.Module) -> nn.Parameter:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight


def _need(method: str, extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise WeLoreError(f"method {method} needs {', '.join(missing)}: pip install 'welore[{extra}]'")
