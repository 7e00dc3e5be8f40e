"""The output of the verbs: results on the standard output, all else on the standard error."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from welore.cli.ending import flush_output, is_main_process, printable

if TYPE_CHECKING:
    from welore.records import Record


def print_result(result: "Record | Mapping[str, Any]", as_json: bool, line: str) -> None:
    """Print one line, or the whole result as JSON, from the first process alone."""
    from welore.records import finite

    if is_main_process():
        content = result if isinstance(result, Mapping) else dataclasses.asdict(result)
        flush_output(f"{json.dumps(finite(content)) if as_json else printable(line)}\n")


def log(line: str) -> None:
    """Print something worth knowing to the standard error, from the first process alone."""
    if is_main_process():
        print(printable(line), file=sys.stderr)


def achieved(target: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """The target and what the numbers of a plan, or of a whole result, say was reached."""
    shares = f"{numbers['parameter_ratio']:.2%} of the targeted matrices"
    if "block_parameters" in numbers:
        blocks, model = (numbers[name] / numbers[f"{name}_dense"] for name in ("block_parameters", "parameters"))
        shares += f", {blocks:.2%} of all matrices of the blocks, {model:.2%} of the model"
    wanted = ", ".join(f"target {name} {value:g}" for name, value in target.items()) or "imported"
    return (
        f"{wanted}; achieved ERR {numbers['rank_reduction']:.2%}, parameters {shares}, "
        f"{numbers['lrcs']} of {numbers['matrices']} factored"
    )


def quiet_libraries() -> None:
    """Silence progress bars and warnings of the libraries: bars where nobody looks, kernels that nobody asked for.

    Call it before they are imported, which is when some of them speak.
    """
    for name in ("bitsandbytes", "hf-to-gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.stderr.isatty() and is_main_process():
        return
    for variable in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):  # read by each when it is imported
        os.environ[variable] = "1"
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_progress_bars()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
