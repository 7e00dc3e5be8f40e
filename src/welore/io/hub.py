"""MODEL (hub id, local directory or .gguf file) -> a local directory."""

import hashlib
import os
from pathlib import Path

import torch
from filelock import FileLock

from welore.errors import WeLoreError, first_line
from welore.io.atomic import atomic_directory

HUB_FILES = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*"]


def resolve_model(model: str | Path, *, cache_dir: str | Path | None = None, revision: str | None = None) -> Path:
    """The local directory of MODEL: itself, or the hub's snapshot, or the converted .gguf file.

    Raises WeLoreError with what to do when a file is missing or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _converted_gguf(path, cache_dir)
    if path.is_dir():
        return path
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise WeLoreError(f"{model} is neither a model directory, a .gguf file nor a hub id")
    return _snapshot(str(model), cache_dir, revision)


def _snapshot(name: str, cache_dir: str | Path | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES)
    except HFValidationError as error:
        raise WeLoreError(f"{name!r} is neither a local directory nor a hub id ({first_line(error)})") from error
    except LocalEntryNotFoundError as error:
        raise WeLoreError(
            f"{name} is not in the local cache and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set): "
            "connect once, or name a local directory or another --cache-dir"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise WeLoreError(f"{name} cannot be fetched from the hub: {first_line(error)}") from error
    return Path(snapshot)


def _converted_gguf(path: Path, cache_dir: str | Path | None) -> Path:
    """Directory with the dequantized (float32, exact) form of a .gguf file, made once and kept in the cache."""
    if not path.is_file():
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with atomic_directory(directory) as partial:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, OSError) as error:
            raise WeLoreError(f"{path} cannot be read: {first_line(error)}") from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
