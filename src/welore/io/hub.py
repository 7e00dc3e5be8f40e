"""MODEL (hub id, local directory or .gguf file) -> a local directory."""

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_directory
from welore.io.checkpoint import CARD, SINGLE, SMALL_FILES, weight_names

MOST_LAYERS = 1024


def resolve_model(model: str | Path, *, cache_dir: str | Path | None = None, revision: str | None = None) -> Path:
    """The local directory of MODEL: itself, or the hub's snapshot, or the converted .gguf file.

    Raises WeLoreError with what to do when a file is missing or the hub cannot be reached.
    """
    path = Path(os.path.expanduser(model))  # noqa: PTH111 - that of Path raises for a user who is not there
    if path.suffix == ".gguf":
        return _converted_gguf(path, cache_dir)
    if os.path.isdir(path):  # noqa: PTH112 - nor does a name that is too long for a file
        return path
    if os.path.lexists(path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise WeLoreError(f"{model} is neither a model directory, a .gguf file nor a hub id")
    return _snapshot(str(model), cache_dir, revision)


def _snapshot(name: str, cache_dir: str | Path | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetch = partial(snapshot_download, name, revision=revision, cache_dir=cache_dir)
        snapshot = Path(fetch(allow_patterns=[SINGLE, CARD, *SMALL_FILES]))
        if (names := weight_names(snapshot)) != [SINGLE]:  # those of an index
            fetch(allow_patterns=names)
    except HFValidationError as error:
        raise WeLoreError(f"{name!r} is neither a local directory nor a hub id ({first_line(error)})") from error
    except LocalEntryNotFoundError as error:
        raise WeLoreError(
            f"{name} is not in the local cache and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set): "
            "connect once, or name a local directory or another --cache-dir"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise WeLoreError(f"{name} cannot be fetched from the hub: {first_line(error)}") from error
    return snapshot


def _converted_gguf(path: Path, cache_dir: str | Path | None) -> Path:
    """Directory with the dequantized (float32, exact) form of a .gguf file, made once and kept in the cache."""
    if not os.path.isfile(path):  # noqa: PTH113 - as above
        raise WeLoreError(f"{path} does not exist")
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "welore")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    directory = root / "gguf" / f"{path.stem}-{content[:16]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):  # two commands at once would convert into each other's files
        if not directory.is_dir():
            _convert_gguf(path, directory)
    return directory


def _convert_gguf(path: Path, directory: Path) -> None:
    try:
        import gguf  # noqa: F401 - transformers needs it and says so less clearly
    except ImportError as error:
        raise WeLoreError("a .gguf file needs the extra packages of `pip install 'welore[gguf]'`") from error
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto: Any = AutoModelForCausalLM
    exact = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with atomic_directory(directory) as unfinished:
        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            _require_sizes(path, config, auto)
            model, report = auto.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                **exact,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (WeLoreError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a damaged file the readers of two libraries make any error
            raise WeLoreError(f"{path} cannot be read: {first_line(error)}") from error
        require_all_loaded(path, report)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _require_sizes(path: Path, config: Any, auto: Any) -> None:
    """Raise WeLoreError for a header that asks for more layers or numbers than the file can hold."""
    layers, bits = config.num_hidden_layers, 8 * path.stat().st_size  # a number takes more than a bit
    with torch.device("meta"):
        largest = 0 if layers > MOST_LAYERS else max(p.numel() for p in auto.from_config(config).parameters())
    if layers > MOST_LAYERS or largest > bits:
        raise WeLoreError(f"{path} cannot be read: its header asks for a larger model than the file holds")


def require_all_loaded(path: Path, report: Mapping[str, Any]) -> None:
    """Raise WeLoreError if transformers made up a tensor that it did not find; report: its output_loading_info."""
    missing, others = sorted(report["missing_keys"]), sorted(key for key, *_ in report["mismatched_keys"])
    if missing or others:
        lack = f"lacks {missing[0]}" if missing else f"has {others[0]} in another shape than its configuration says"
        raise WeLoreError(f"{path} {lack}: that would be random numbers, fetch it again")
