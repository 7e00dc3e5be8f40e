"""What a command made of a model, against what transformers reads from the same files: run in a child of its own."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READERS = ("analyze", "evaluate", "compress", "calibrate", "finetune", "merge", "export", "score")


def compare(command: Sequence[str]) -> None:
    """Exit with a sentence if a result is not that of the model as transformers reads it."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    verb, source = command[0], command[1]
    if verb not in READERS or source.endswith(".gguf"):
        return
    if "--distill" in command:
        read(command[command.index("--distill") + 1])
    if "--against" in command:
        read(command[command.index("--against") + 1])
    before, low = read(source)
    if verb == "analyze" and "--statistics" not in command and "--reference-values" not in command:
        _spectra(before)
    elif verb in ("compress", "merge", "export"):
        plain = verb != "compress" or not {"--statistics", "--plan", "--reference-checkpoint", "--keep"} & set(command)
        _same(before, low, *read("out"), plain)
    elif verb == "finetune":
        read("out/model" if Path("out").is_dir() else "run/model")
        if source == "small" and "--method" not in command:
            _frozen(source)


def read(name: str) -> tuple[dict[str, Any], set[str]]:
    """Every tensor of a model as transformers reads it, low-rank matrices multiplied out, and the names of these."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, said = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file makes of it
        sys.exit(f"transformers does not read {name}: {error!r:.200}")
    lost = [*said["missing_keys"], *said["mismatched_keys"]]
    if lost:
        sys.exit(f"transformers misses {lost[0]!s:.100} of {name}")
    tensors, low = dict(model.state_dict()), set()
    for path, module in model.named_modules():
        if type(module).__module__.startswith("welore") and hasattr(module, "in_features"):
            with torch.no_grad():
                rows = module(torch.eye(module.in_features)) - module(torch.zeros(1, module.in_features))
            tensors[f"{path}.weight"] = rows.T
            low.add(f"{path}.weight")
    return tensors, low


def _same(before: dict[str, Any], rounded: set[str], after: dict[str, Any], low: set[str], plain: bool) -> None:
    """rounded: names of products that the result stores as one matrix in its own dtype."""
    import torch

    for name, tensor in before.items():
        if name not in after or after[name].shape != tensor.shape or not tensor.isfinite().all():
            continue
        error, limit = (after[name] - tensor).norm(), (1e-2 if name in rounded else 1e-5) * tensor.norm()
        if name in low and len(set(tensor.shape)) == 1:  # a Conv1D stores its transpose
            error = min(error, (after[name].T - tensor).norm())
        if name in low and plain:  # no rank-r matrix is nearer than the truncated decomposition
            r = int(torch.linalg.matrix_rank(after[name], rtol=1e-4))
            limit = 1.02 * torch.linalg.svdvals(tensor)[r:].norm() + 1e-2 * tensor.norm()
        elif name in low:
            limit = tensor.norm()
        if not error <= limit:
            sys.exit(f"{name} of the result is another tensor: error {error:.3g}, at most {limit:.3g}")


def _spectra(before: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    for name, values in load_file("o.safetensors").items():
        if f"{name}.weight" in before:
            right = torch.linalg.svdvals(before[f"{name}.weight"].double())
            if len(right) != len(values) or not torch.allclose(
                values, right, rtol=1e-4, atol=1e-5 * float(right.max())
            ):
                sys.exit(f"the spectrum of {name} is that of another matrix")


def _frozen(source: str) -> None:
    """Whatever is no factor must be the same bits in the tuned model."""
    import torch
    from safetensors.torch import load_file

    def stored(directory: str) -> dict[str, Any]:
        return {name: t for file in Path(directory).glob("model*.safetensors") for name, t in load_file(file).items()}

    before, after = stored(source), stored("out/model" if Path("out").is_dir() else "run/model")
    for name in sorted(before.keys() & after.keys()):
        trained = name.endswith((".A.weight", ".B.weight"))
        if not trained and before[name].numel() and not _equal_bits(torch, before[name], after[name]):
            sys.exit(f"{name} was frozen, but is {after[name].dtype} or other numbers (before {before[name].dtype})")


def _equal_bits(torch: Any, a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
