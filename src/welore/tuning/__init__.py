"""Fine-tuning, on transformers' Trainer: the verb `finetune` and what it is made of.

The verb is imported when it is first used: the figures of this room do without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from welore.tuning.finetuning import finetune

__all__ = ["finetune"]


def __getattr__(name: str) -> Any:
    if name != "finetune":
        raise AttributeError(f"module 'welore.tuning' has no attribute {name!r}")
    from welore.tuning.finetuning import finetune

    return finetune
