"""Which activations a training step keeps for its backward pass."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from welore.errors import WeLoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Position of the factor whose last dimension is summed over.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
ATTENTION = "scaled_dot_product"  # in the names of torch's attention kernels


def keep_wide_products(model: "PreTrainedModel") -> None:
    """Make every decoder block keep attention and wide matrix products, and compute everything else again.

    A product is wide if it sums over at least as many numbers as the model has hidden features: those cost most to
    repeat for each number that they would save. Element-wise work is repeated (norms, activations, rotations), and of
    a low-rank matrix A (B x) the cheap half: B x is kept, A times it is repeated. Losses and gradients are the same
    numbers. Raises WeLoreError for a model without checkpointing.
    """
    anything: Any = model
    if not anything.supports_gradient_checkpointing:
        raise WeLoreError(f"{type(model).__name__} has no checkpointing of activations: leave it out")
    config: Any = model.config.get_text_config(decoder=True)
    keep = partial(_policy, config.hidden_size)
    # renamed between the oldest and the newest transformers that are supported
    enable = getattr(model, "activation_checkpointing_enable", None) or anything.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep)})


def _policy(width: int, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether torch keeps the result of one operation."""
    name = operation._schema.name
    wide = name in PRODUCTS and args[PRODUCTS[name]].shape[-1] >= width
    return CheckpointPolicy.MUST_SAVE if wide or ATTENTION in name else CheckpointPolicy.PREFER_RECOMPUTE
