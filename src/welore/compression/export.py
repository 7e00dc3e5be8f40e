"""export: a compressed model in a format that other programs read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from welore.compression.merge import merge
from welore.config import RunOptions
from welore.errors import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORTS: dict[str, Callable[..., Any]] = {"dense": merge}  # format -> a function (model, output_dir, **options)


def export(
    model: "str | Path | PreTrainedModel", output_dir: str | Path, format: str = "dense", **options: Unpack[RunOptions]
) -> Path:
    """Write a compressed model in another format.

    Args:
        model: Hub id, directory or a model in memory.
        output_dir: The directory to write.
        format: One of EXPORTS. dense: a plain checkpoint, W = A B, as `merge` makes it.
        **options: Where downloads lie and what may be replaced (config.RunOptions).

    Returns:
        The directory.

    Raises:
        WeLoreError: If the format is unknown, or the model is not a compressed one.
    """
    choose("format", format, EXPORTS)(model, output_dir, **options)
    return Path(output_dir)
