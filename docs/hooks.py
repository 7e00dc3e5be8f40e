"""Pages that are made at every build: both references, the notebook, and the pages of files at the root.

The command-line reference walks the commands of the Typer app. The API reference lists welore.__all__ and leaves the
docstrings to mkdocstrings. Neither imports torch.
"""

import ast
import dataclasses
import inspect
import json
import re
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import welore
import welore.cli.main
import welore.config

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/welore/welore/blob/main/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not written by hand."""
    pages = {
        "reference/cli.md": command_line(),
        "reference/api.md": api(),
        "notebooks/quickstart.md": notebook(ROOT / "docs" / "notebooks" / "quickstart.ipynb"),
        "contributing.md": root_page("CONTRIBUTING.md"),
        "changelog.md": root_page("CHANGELOG.md"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


# --- command line ---------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, panel by panel."""
    app: Any = typer.main.get_command(welore.cli.main.app)
    intro = (
        "# Command line\n\nEvery command answers bad input with one sentence and exit status 2. "
        "`welore COMMAND --help` shows the same text as this page.\n\n"
        "| exit status | meaning |\n|---|---|\n"
        "| 0 | The result is there. |\n"
        "| 1 | welore has a bug. The sentence names the file with the traceback. |\n"
        "| 2 | The input is wrong, or the disk or the memory is full. |\n"
        "| 3 | `compress` wrote its result, but the recovery failed. The record says why. |\n"
        "| 130, 143 | Ctrl-C or SIGTERM stopped the command. Finished work stays. |\n"
    )
    return "\n".join([intro, *(_command(name, command) for name, command in app.commands.items())])


def _command(name: str, command: Any) -> str:
    lines = [f"## welore {name}", "", inspect.cleandoc(command.help or ""), ""]
    example = re.search(r"`(.*)`", command.epilog or "")
    if example:
        lines += ["```bash", example[1], "```", ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    panels: dict[str, list[Any]] = {"Arguments": arguments} if arguments else {}
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden:
            panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    for panel, parameters in panels.items():
        lines += [f"**{panel}**", "", "| name | values | default | |", "|---|---|---|---|"]
        lines += [_row(parameter) for parameter in parameters]
        lines.append("")
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = (parameter.metavar or parameter.name).upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    text = parameter.help or ""
    default = parameter.default
    shown = re.search(r"\[default: (.*?)\]", text)
    if shown:
        text, default = text.replace(shown[0], ""), shown[1]
    elif isinstance(parameter.show_default, str):
        default = parameter.show_default
    elif isinstance(default, Enum):
        default = default.value
    elif default is None or default == () or default == [] or callable(default) or parameter.required:
        default = ""
    elif isinstance(default, bool):
        default = "on" if default else ""
    return f"| `{names}` | {_cell(_values(parameter))} | {_cell(str(default))} | {_cell(text.strip())} |"


def _values(parameter: Any) -> str:
    """What an option takes: choices, or the name of its type."""
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar:
        return str(parameter.metavar).replace("|", " or ")
    descriptor = getattr(parameter, "type_descriptor", None)
    kind = descriptor.annotation if descriptor is not None else parameter.type
    choices = getattr(getattr(parameter, "type", None), "choices", None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = [member.value for member in kind]
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            choices = get_args(part)
    if choices:
        return ", ".join(f"`{getattr(choice, 'value', choice)}`" for choice in choices)
    names = {"str": "text", "int": "integer", "float": "number", "Path": "path"}
    named = [getattr(part, "__name__", str(part)) for part in (get_args(kind) or (kind,)) if part is not type(None)]
    return " or ".join(names.get(name.removesuffix("ParamType"), name) for name in named)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- Python ---------------------------------------------------------------------------------------------------------


def api() -> str:
    """Functions and classes by mkdocstrings, settings classes as tables of their fields."""
    modules = public_names()
    settings = [name for name in modules if name.endswith("Config") and name != "WeLoreConfig"]
    functions = [name for name in modules if name[0].islower()]
    classes = [name for name in modules if name not in (*settings, *functions)]
    lines = [
        "# Python",
        "",
        "Import these names from `welore`. Importing `welore` loads neither torch nor transformers; they are loaded",
        "when a function is first used.",
        "",
        "## Functions",
        "",
        *(f"::: {modules[name]}.{name}\n" for name in functions),
        "## Options of every function",
        "",
        "Functions that work on a model take these keyword arguments. In Python only, `progress` may be a function,",
        "`tokenizer` is that of a model in memory, and `processes` are those that share the work.",
        "",
        *_fields(welore.config.RunConfig),
        "",
        "## Settings",
        "",
        "Frozen dataclasses. The command line has an option for every field. A default in italics depends on others.",
        "",
    ]
    for name in settings:
        kind = getattr(welore, name)
        lines += [f"### {name}", "", inspect.cleandoc(kind.__doc__ or ""), "", *_fields(kind), ""]
    lines += ["## Classes", "", *(f"::: {modules[name]}.{name}\n" for name in classes)]
    return "\n".join(lines)


def _fields(kind: Any) -> list[str]:
    """A table of the fields of a settings class: name, type, default and help text."""
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if "shown" in field.metadata:
            default = f"*{field.metadata['shown']}*"
        elif field.default is dataclasses.MISSING:
            default = ""
        else:
            default = f"`{field.default!r}`"
        text = _cell(str(field.metadata.get("help", "")))
        lines.append(f"| `{field.name}` | {_cell(_type(field))} | {_cell(default)} | {text} |")
    return lines


def _type(field: "dataclasses.Field[Any]") -> str:
    """The type of a field in words: choices, "dataset", or the names of its types without None."""
    if field.name == "dataset":
        return "dataset"
    names: list[str] = []
    for part in get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,):
        if get_origin(part) is Literal:
            names += [repr(choice) for choice in get_args(part)]
        elif part is not type(None):
            names.append(getattr(part, "__name__", str(part)))
    return ", ".join(names)


def public_names() -> dict[str, str]:
    """Public name -> the module that defines it, from the import statements of welore/__init__.py."""
    tree = ast.parse((ROOT / "src" / "welore" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules = {alias.name: node.module for node in imports for alias in node.names}
    return {name: modules[name] for name in welore.__all__}


# --- files at the root, and the notebook ----------------------------------------------------------------------------


def root_page(name: str) -> str:
    """A file of the repository's root as a page; its relative links lead to the repository or to the site's pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/([^)]+\.md(?:#[^)]*)?)\)", r"](\1)", text)
    return re.sub(
        r"\]\((?!http|#)((?:src|tests|recipes|benchmarks|research|\.ci)/?[^)]*)\)", rf"]({REPOSITORY}\1)", text
    )


def notebook(path: Path) -> str:
    """A notebook's cells as a page."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    link = f"[Open the notebook]({REPOSITORY}docs/notebooks/quickstart.ipynb)"
    return "\n\n".join([*parts, link, ""])
