"""Every artefact under some directories, each read and checked."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.io.fields import ERRORS, typed
from welore.records import MODEL_FINGERPRINT, Record
from welore.reporting.style import Picture
from welore.reporting.tables import PLAN_HEADINGS, Table, comparisons, plan_row, results, task_table
from welore.reporting.training_figures import curves

Loader = Callable[[Path], Any]
Content = tuple[dict[str, Any], list[Picture]]
ENTRY_POINTS = "welore.report"
LOADERS: dict[str, Loader] = {
    "spectra*.safetensors": Spectra.load,
    "plan.json": Plan.load,
    "*.plan.json": Plan.load,
}
RECORDS = ("compression.json", "finetune.json", ".ppl.json", ".score.json")  # so called they must be some


@dataclass(frozen=True)
class Section:
    """A part that another package adds to the page, by an entry point of the group `welore.report`.

    build: artefacts by path -> `content` for the template, and every picture in it; None if there is none. template:
    text of a jinja template, which may import from "macros.html.jinja". loaders: pattern of file names -> function that
    reads such a file, and raises WeLoreError if it is broken. kinds: kinds of records that the section shows.
    """

    build: Callable[[Mapping[Path, Any]], Content | None]
    template: str
    loaders: Mapping[str, Loader] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()


def load_sections() -> list[Section]:
    """The sections of all installed packages, in the order of their names."""
    return [entry.load() for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)]


def find_artefacts(
    directories: Sequence[str | Path], loaders: Mapping[str, Loader]
) -> tuple[dict[Path, Any], list[str]]:
    """Resolved path -> artefact, in the order of the paths; and why others are left out, a sentence for each.

    Files of an interrupted run are skipped. WeLoreError if no artefact is left.
    """
    artefacts: dict[Path, Any] = {}
    left_out: list[str] = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise WeLoreError(f"{directory} is not a directory: name directories that hold artefacts of welore")
        for path in sorted(directory.rglob("*")):
            other = _record if path.suffix == ".json" else None
            load = next((load for pattern, load in loaders.items() if fnmatch(path.name, pattern)), other)
            partial = any(re.search(r"\.(partial|welore-\w+)$", part) for part in path.relative_to(directory).parts)
            if load and not partial and path.is_file() and path.resolve() not in artefacts:
                try:
                    if (artefact := _read(path, load)) is not None:
                        artefacts[path.resolve()] = artefact
                except WeLoreError as error:
                    left_out.append(str(error))
    if not artefacts:
        names = ", ".join(map(str, directories)) or "no directory"
        reason = left_out[0] if left_out else f"looked for {', '.join(loaders)} and records"
        raise WeLoreError(f"nothing to report under {names}: {reason}")
    return artefacts, left_out


def machine_text(record: Record) -> str:
    """The machine and the versions that a record was made with."""
    machine, versions = record.machine, record.versions
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB" if "memory_bytes" in machine else ""
    if "gpu" in machine:
        memory += f", {machine.get('gpus', 1)} x {machine['gpu']} (driver {machine.get('driver', 'unknown')})"
    computer = f"{machine.get('system')}, {machine.get('processor')}, {machine.get('cores')} cores{memory}"
    return f"{computer}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


# Kind of record -> the rows and curves that the page makes of one.
ROWS: dict[str, Callable[[Record], Any]] = {
    "compression": lambda record: (
        Table("", PLAN_HEADINGS, [plan_row("", record.inputs["model"], record.settings, record.numbers)]),
        typed(record.numbers.get("left_dense_in_blocks", 0), int, "left_dense_in_blocks"),
        typed(record.numbers.get("left_dense_names", ()), tuple[str, ...], "left_dense_names"),
    ),
    "perplexity": lambda record: [result.size for group in results([record]).values() for result in group],
    "finetune": lambda record: (
        comparisons([record])[0].table,
        curves(record),
        typed([record.settings["method"], record.inputs[MODEL_FINGERPRINT]], tuple[str, str], "method and fingerprint"),
    ),
    "accuracy": lambda record: task_table([record]),
}


def _record(path: Path) -> Record | None:
    """A record, whatever the file is called; None for the files of other programs."""
    with path.open("rb") as file:
        begins = re.match(rb'{\s*"kind": "[\w-]+",\s*"inputs": ', file.read(200))
    return Record.load(path) if begins or path.name.endswith(RECORDS) else None


def _read(path: Path, load: Loader) -> Any:
    """The artefact; WeLoreError with the name of the file if the page could not be made from it."""
    try:
        artefact = load(path)
        if isinstance(artefact, Spectra) and not artefact.values:
            raise WeLoreError(f"{path} holds no matrix: make it again")
        if isinstance(artefact, Record):
            machine_text(artefact)
            ROWS.get(artefact.kind, str)(artefact)
    except WeLoreError as error:
        raise error if str(path) in str(error) else WeLoreError(f"{path} is broken ({error}): make it again") from error
    except (*ERRORS, OSError) as error:
        raise WeLoreError(f"{path} is broken ({error!r}): make it again") from error
    return artefact
