"""A file in every compressed checkpoint, by which `trust_remote_code=True` loads it where nobody imported welore."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.io.checkpoint import BOOTSTRAP, own_auto_map
from welore.models.skeleton import auto_class, config_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_TEXT = '''"""Loads this checkpoint with trust_remote_code=True; it needs `pip install welore`.

After `import welore` from_pretrained knows the format by itself, and nothing of this directory is run.
"""

import transformers
import welore  # registers the format


class {config}(transformers.{config}):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return transformers.{config}.from_pretrained(*args, **kwargs)
'''
MODEL_TEXT = """

class {model}(transformers.{model}):
    pass
"""
MODULE = BOOTSTRAP.removesuffix(".py")


def add_bootstrap(source: Path, directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the compressed form of the model in `source`, with `auto_map`; writes the file for it.

    A model that comes with its own code keeps that alone.
    """
    if own_auto_map(content):
        return content
    auto_map = write_bootstrap(config_of(source), directory)
    return content | ({"auto_map": auto_map} if auto_map else {})


def write_bootstrap(config: "PretrainedConfig", directory: Path) -> dict[str, str]:
    """Write the file for a compressed model of this configuration; returns the `auto_map`, {} for own classes.

    Configuration and model are classes of their own, with the names of transformers' classes: those of transformers
    stay as they are. The configuration that is read is of transformers' class, so that every other AutoModel takes it.
    A model whose tensors have other names in files has no model class here: transformers renames them for its own
    classes only.
    """
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as mapping

    name, auto = type(config).__name__, auto_class(config)
    if getattr(transformers, name, None) is not type(config):
        return {}
    model: Any = auto._model_mapping.get(type(config), None)
    auto_map, text = {"AutoConfig": f"{MODULE}.{name}"}, CONFIG_TEXT.format(config=name)
    renamed = isinstance(model, type) and (mapping(model.__name__) or mapping(config.model_type))
    if isinstance(model, type) and config.get_text_config() is config and not renamed:
        auto_map[auto.__name__] = f"{MODULE}.{model.__name__}"
        text += MODEL_TEXT.format(model=model.__name__)
    (directory / BOOTSTRAP).write_text(text, encoding="utf-8")
    return auto_map
