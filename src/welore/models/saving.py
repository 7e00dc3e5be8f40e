"""save_pretrained of a compressed model writes more than weights: code for trust_remote_code, plan, record and card."""

from functools import cache, wraps
from pathlib import Path
from typing import Any

from welore.io.atomic import atomic_write
from welore.io.checkpoint import CARD, PLAN, RECORD, own_auto_map
from welore.models.card import read_card, write_card
from welore.models.remote_code import write_bootstrap

TEMPLATE = "model card of a 🤗 transformers model"  # begins the card that push_to_hub makes where the hub has none


def remember_companions(config: Any, directory: Path | None = None) -> None:
    """Let a compressed model write a card and our code when it is saved, and plan and record of `directory`.

    config: its `config.quantization_config`, which carries their texts wherever the model goes, but not into its file.
    """
    _teach_transformers()
    paths = [] if directory is None else [directory / name for name in (PLAN, RECORD, CARD)]
    texts = {path.name: path.read_text("utf-8", "replace") for path in paths if path.is_file()}
    config.companions = texts


def forget_compression(config: Any) -> None:
    """Take from the configuration of a model what says that it is compressed."""
    del config.quantization_config
    if not own_auto_map(vars(config)):
        vars(config).pop("auto_map", None)


@cache
def _teach_transformers() -> None:
    """Add a step to PreTrainedModel's methods that save and upload: transformers calls nobody for other files."""
    from transformers import PreTrainedModel

    saved, uploaded = PreTrainedModel.save_pretrained, PreTrainedModel._upload_modified_files

    @wraps(saved)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **options: Any) -> Any:
        directory, leads = Path(save_directory), options.get("is_main_process", args[0] if args else True)
        companions = _companions(self) if leads and not directory.is_file() else None
        if companions is not None:
            directory.mkdir(parents=True, exist_ok=True)
            if not own_auto_map(vars(self.config)):
                self.config.auto_map = write_bootstrap(self.config, directory)
        result = saved(self, save_directory, *args, **options)
        if companions is not None:
            _write(companions, directory)
        return result

    @wraps(uploaded)
    def upload(self: Any, working_dir: Any, *args: Any, **options: Any) -> Any:
        directory, companions = Path(working_dir), _companions(self)
        if companions is not None and (not read_card(directory) or TEMPLATE in read_card(directory)):
            _write(companions, directory)
        return uploaded(self, working_dir, *args, **options)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
    PreTrainedModel._upload_modified_files = upload  # type: ignore[method-assign]


def _companions(model: Any) -> dict[str, str] | None:
    """The texts for a compressed model; None for another one, and where only an adapter is saved."""
    adapter = getattr(model, "_hf_peft_config_loaded", False)
    return None if adapter else getattr(getattr(model.config, "quantization_config", None), "companions", None)


def _write(companions: dict[str, str], directory: Path) -> None:
    for name, text in companions.items():
        if name != CARD:
            with atomic_write(directory / name) as partial:
                partial.write_text(text, encoding="utf-8")
    write_card(directory, "", companions.get(CARD, ""))
