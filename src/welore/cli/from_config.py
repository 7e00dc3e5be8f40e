"""Settings classes -> command-line options: names, types, defaults, help and panels come from config.py."""

import dataclasses
import inspect
import keyword
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from welore.config import AUTO, BREAK_EVEN, MinRatio, Pruning
from welore.errors import WeLoreError, did_you_mean

Verb = Callable[..., None]

Model = Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.", show_default=False)]
OutputDir = Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False, dir_okay=False)]
RecordFile = Annotated[Path | None, typer.Option("--output", "-o", help="Record to write (JSON).", dir_okay=False)]
StatisticsFile = Annotated[Path | None, typer.Option(help="File made by `welore calibrate`.")]
Label = Annotated[str | None, typer.Option(help="A name for tables and figures.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint in OUTPUT_DIR.")]


def expand(function: Verb) -> Verb:
    """A verb whose parameters that are settings classes have become one option per field.

    An option that two classes share is there once, and both get its value. An option that is not given has the class's
    own default. `--config` and `--json` are added to every verb.
    """
    parameters: list[inspect.Parameter] = []
    classes: dict[str, Any] = {}
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if dataclasses.is_dataclass(parameter.annotation):
            classes[name] = parameter.annotation
            options |= {key: o for key, o in _options(parameter.annotation).items() if key not in options}
        elif parameter.default is not inspect.Parameter.empty:
            options[name] = parameter
        elif name != "as_json":
            parameters.append(parameter)
    options = {"config_file": CONFIG} | options | {"as_json": AS_JSON}
    order = [*parameters, *(options[name] for name in sorted(options, key=lambda name: _is_common(options[name])))]
    wanted = inspect.signature(function).parameters

    def run(**values: Any) -> None:
        output = values.get("output") or values.get("output_dir")
        if output is not None and values.get("config_file") is not None:
            from welore.io.claim import require_unread

            require_unread(output, values["config_file"])
        given = {name: _given(kind, values) for name, kind in classes.items()}
        function(**{name: given.get(name, values.get(name)) for name in wanted})

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in order])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in order}
    return run


def _options(kind: Any) -> dict[str, inspect.Parameter]:
    """Destination -> parameter of every field of a settings class that the command line offers."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        key: _option(field, key, hints[field.name])
        for field in dataclasses.fields(kind)
        if (key := _key(field)) is not None
    }


def _key(field: "dataclasses.Field[Any]") -> str | None:
    """The option's destination: the field's name, or its flag's; None for a field that has no option."""
    flag = field.metadata.get("flag", field.name)
    if flag is None:
        return None
    return f"{flag}_" if keyword.iskeyword(flag) else str(flag).replace("-", "_")


def _option(field: "dataclasses.Field[Any]", key: str, hint: Any) -> inspect.Parameter:
    text, default = str(field.metadata["help"]), field.default
    kind, more = _as_typer(hint)
    flag = "--" + key.removesuffix("_").replace("_", "-")
    if kind is bool and default is not False:
        flag += "/--no-" + key.replace("_", "-")
    if "shown" in field.metadata:
        text += f" [default: {field.metadata['shown']}]"
    if "shown" in field.metadata or default is dataclasses.MISSING or get_origin(kind) is list:
        default = None
    described = typer.Option(
        flag, help=text, rich_help_panel=field.metadata["panel"], show_default=default not in (None, False), **more
    )
    annotation: Any = Annotated[kind | None if default is None else kind, described]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _as_typer(hint: Any) -> tuple[Any, dict[str, Any]]:
    """The type by which typer reads a value, and what else it has to know."""
    if hint in (MinRatio | None, Pruning | None):
        words = ("min-ratio", 0.5, BREAK_EVEN) if hint == MinRatio | None else ("mlp-pruning", 0.3, AUTO)
        return Any, {"parser": lambda text: _fraction(text, *words), "metavar": f"FLOAT|{words[2]}"}
    union = get_origin(hint) in (Union, types.UnionType)
    members = [m for m in get_args(hint) if m is not type(None)] if union else [hint]
    if len(members) == 1:
        (kind,) = members
        if get_origin(kind) is tuple:
            return list[str], {}
        if kind in (str, int, float, bool, Path) or get_origin(kind) is Literal:
            return kind, {}
    return str, {}  # a dataset, a path or a name


def _given(kind: Any, values: Mapping[str, Any]) -> Any:
    """An instance of the settings class from the values of its options."""
    fields = {field.name: key for field in dataclasses.fields(kind) if (key := _key(field)) is not None}
    chosen = {name: values[key] for name, key in fields.items() if values.get(key) is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def _fraction(text: str, option: str, example: float, word: str) -> Any:
    """A fraction, or the word for one, as the library takes it."""
    try:
        return text if text == word else float(text)
    except ValueError as error:
        raise WeLoreError(f"{option} is {text!r}: it is a fraction such as {example}, or {word}") from error


def _is_common(parameter: inspect.Parameter) -> bool:
    """Whether an option belongs to every verb: shown last."""
    panel = next((getattr(m, "rich_help_panel", None) for m in typing.get_args(parameter.annotation)[1:]), None)
    return panel in (COMMON, "Run")


# --- --config and --json --------------------------------------------------------------------------------------------

COMMON = "Everywhere"
OTHERS = "welore.others"  # what a file gives to a verb that takes options of other programs, too


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of all options; WeLoreError for a name that no option has."""
    if path is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WeLoreError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise WeLoreError(f"{path} must map option names to values, such as keep: 0.8")
    flags = {flag: p.name for p in context.command.params for flag in p.opts if p.name and p.name != "config_file"}
    names = {flag.strip("-").replace("-", "_"): destination for flag, destination in flags.items()}
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    others = {name: values.pop(name) for name in [*values] if name not in names}
    for name in () if context.allow_extra_args else others:
        raise WeLoreError(f"{path}: {context.info_name} has no option {name!r}{did_you_mean(name, names)}")
    context.meta[OTHERS] = others
    lists = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    given = {names[name]: value for name, value in values.items()}
    for name, value in given.items():  # one of several, or several texts
        if isinstance(value, str if name in lists else list) and all(isinstance(part, str) for part in value):
            given[name] = [value] if name in lists else ",".join(value)
    context.default_map = dict(context.default_map or {}) | given
    return path


CONFIG = inspect.Parameter(
    "config_file",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of options, such as `keep: 0.8`; the command line overrides it.",
            callback=_read_config,
            is_eager=True,
            exists=True,
            dir_okay=False,
            rich_help_panel=COMMON,
        ),
    ],
)
AS_JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.", rich_help_panel=COMMON)],
)
