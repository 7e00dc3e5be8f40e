"""Everything of ours that lies under some directories, each piece checked to be whole."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.emergence.claims import load_pretraining
from welore.emergence.trace import LINES, Trace
from welore.errors import WeLoreError
from welore.records import MODEL_FINGERPRINT, Record

Artefact = Spectra | Plan | Record | Trace
LOADERS: dict[str, Callable[[Path], Artefact]] = {
    "spectra*.safetensors": Spectra.load,
    "plan.json": Plan.load,
    "*.plan.json": Plan.load,
    "compression.json": Record.load,
    "*.ppl.json": Record.load,
    "finetune.json": Record.load,
    "*.score.json": Record.load,
    "pretrain.json": load_pretraining,
    "*.pretrain.json": load_pretraining,
    LINES: Trace.load,
}
SIZES = ("rank_reduction", "parameter_ratio", "bytes")
# kind of record -> part -> what the page reads from it
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "compression": {
        "inputs": ("model",),
        "settings": ("target", "strategy", "min_ratio"),
        "numbers": (*SIZES, "matrices", "lrcs", "threshold", "bytes_dense"),
    },
    "perplexity": {
        "inputs": ("model", "compression"),
        "settings": ("dataset", "max_length", "dtype"),
        "numbers": (*SIZES, "perplexity", "windows"),
    },
    "finetune": {
        "inputs": ("model", "label", MODEL_FINGERPRINT, "data_sha256", "split", "compression"),
        "settings": (
            *("method", "dataset", "task", "max_steps", "learning_rate", "batch_size", "gradient_accumulation_steps"),
            *("processes", "max_length", "seed", "dtype", "loss_on_prompt", "max_eval_samples"),
        ),
        "numbers": (
            *(*SIZES, "trains", "trainable_parameters", "total_parameters", "tokens", "peak_memory_bytes"),
            *("resumed_at", "train_loss", "evaluation"),
        ),
    },
    "accuracy": {
        "inputs": ("model", "label"),
        "settings": ("task",),
        "numbers": ("accuracy", "n", "ci95_low", "ci95_high", "majority_rate", "unparsable"),
    },
    "pretrain": {"inputs": ("label",), "settings": ("seed",)},
}
CURVES = {"train_loss": 2, "evaluation": 3}  # numbers that are lists of [step, value, ...], and how many stand in each
WORDS = ("trains",)  # and those that are text


def find_artefacts(directories: Sequence[str | Path]) -> dict[Path, Artefact]:
    """Resolved path -> artefact, in the order of the paths; what a killed run left in *.partial is passed over."""
    found: dict[Path, Artefact] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise WeLoreError(f"{directory} is not a directory: name directories that hold artefacts of welore")
        for path in sorted(directory.rglob("*")):
            load = next((load for pattern, load in LOADERS.items() if fnmatch(path.name, pattern)), None)
            killed = any(part.endswith(".partial") for part in path.relative_to(directory).parts)
            if load and not killed and path.is_file() and path.resolve() not in found:
                found[path.resolve()] = _read(path, load)
    if not found:
        where = ", ".join(map(str, directories)) or "no directory"
        raise WeLoreError(f"nothing to report under {where}: looked for {', '.join(LOADERS)}")
    return found


def _read(path: Path, load: Callable[[Path], Artefact]) -> Artefact:
    try:
        artefact = load(path)
        if isinstance(artefact, Record):
            _check(path, artefact)
        elif isinstance(artefact, Plan | Spectra) and not (
            artefact.allocations if isinstance(artefact, Plan) else artefact.values
        ):
            raise WeLoreError(f"{path} holds no matrix: make it again")
    except WeLoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # whatever is wrong inside a file, its owner must learn which file
        raise WeLoreError(f"{path} is broken ({error!r}): make it again") from error
    return artefact


def _check(path: Path, record: Record) -> None:
    """Raise WeLoreError unless the record holds what the page reads from one of its kind."""
    for part in ("inputs", "settings", "numbers", "versions", "machine"):
        content = getattr(record, part)
        needed = NEEDED.get(record.kind, {}).get(part, ())
        if not isinstance(content, dict) or not content.keys() >= set(needed):
            raise WeLoreError(f"{path}: its {part} must hold {', '.join(needed) or 'names'}: make it again")
        for name in needed if part == "numbers" else ():
            if not _fits(name, content[name]):
                raise WeLoreError(f"{path}: its {name} is {content[name]!r:.60}, not a number: make it again")


def _fits(name: str, value: Any) -> bool:
    """Whether a value can be what the page draws or prints under that name."""
    if name in CURVES:
        return isinstance(value, list) and all(
            isinstance(point, list) and len(point) == CURVES[name] and all(isinstance(v, int | float) for v in point)
            for point in value
        )
    return isinstance(value, str if name in WORDS else int | float) or (name, value) == ("perplexity", None)
