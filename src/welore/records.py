"""One JSON file per result: what was read, the settings, the numbers, on which machine and versions."""

import dataclasses
import html
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

from welore.errors import WeLoreError
from welore.io.atomic import read_json, write_json
from welore.io.fields import refusing, typed

DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = [
    "welore",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
]

# Settings of version 0.1 -> their names today, in records of every kind.
RENAMED = {
    "accumulation": "gradient_accumulation_steps",
    "asked": "target",
    "calibration": "statistics",
    "data": "dataset",
    "eval_every": "eval_steps",
    "eval_items": "max_eval_samples",
    "heal": "recovery",
    "healing": "recovery",
    "length": "max_length",
    "lr": "learning_rate",
    "measure": "measure_losses",
    "neurons": "mlp_pruning",
    "params": "keep",
    "save_every": "save_steps",
    "steps": "max_steps",
    "task_data": "task_dataset",
    "tokens": "num_tokens",
    "vocabulary": "vocab_size",
    "warmup": "warmup_steps",
    "windows": "num_windows",
}
# Version 0.1 had one name for two digests: of the matrices that can be compressed, and of every parameter.
TARGETS_FINGERPRINT, MODEL_FINGERPRINT = "targets_fingerprint", "model_fingerprint"
FINGERPRINTS = {"compression": TARGETS_FINGERPRINT, "finetune": MODEL_FINGERPRINT, "pretrain": MODEL_FINGERPRINT}
# The numbers of each kind that its short form shows; of other kinds the first three.
HEADLINES = {
    "compression": ("parameter_ratio", "rank_reduction", "bytes"),
    "perplexity": ("perplexity", "parameter_ratio", "bytes"),
    "accuracy": ("accuracy", "n", "parameter_ratio"),
    "finetune": ("eval_perplexity", "trainable_parameters", "tokens"),
    "pretrain": ("parameters", "tokens", "rank_reduction"),
}


@dataclass(frozen=True)
class Record:
    """A result that can be checked and repeated.

    kind: "calibration", "compression", "perplexity", ...; inputs: what was read; settings: the fields of the verb's
    configuration; numbers: what was achieved or measured (fractions 0..1; units in the names).
    """

    kind: str
    inputs: dict[str, Any]
    settings: dict[str, Any]
    numbers: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    machine: dict[str, Any] = field(default_factory=lambda: _machine())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: str | Path) -> None:
        """Write the record to `path`, whole or not at all. JSON has no NaN and no infinity: they become null."""
        write_json(path, finite(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """The record at `path`, with today's names of settings; WeLoreError if the file is not one."""
        content = read_json(path)
        with refusing(f"{path} is not a record of welore", "it must hold kind, inputs, settings, numbers"):
            return cls.of(content)

    @classmethod
    def load_if_there(cls, path: Path) -> "Record | None":
        """The record at `path`; None if there is no such file."""
        return cls.load(path) if path.is_file() else None

    @classmethod
    def of(cls, content: Any) -> "Record":
        """The record in a JSON value; KeyError or WeLoreError if it is none. Fields of later versions are passed by."""
        content = {"versions": {}, "machine": {}, "created": ""} | typed(content, dict, "a record")
        kinds = get_type_hints(cls) | {"versions": dict[str, Any]}  # a field of a record is JSON, whatever is in it
        values = {name: typed(content[name], kind, name) for name, kind in kinds.items()}
        if values["kind"] != "calibration":  # plans compare with these as they are
            values["settings"] = _renamed(values["settings"])
            values["inputs"] = _renamed_inputs(values["kind"], values["inputs"])
        return cls(**values)

    def __repr__(self) -> str:
        scalars = {name: value for name, value in self.numbers.items() if isinstance(value, int | float)}
        names = [name for name in HEADLINES.get(self.kind, [*scalars][:3]) if name in scalars]
        return f"Record({self._title()}: {', '.join(f'{name} {_figure(scalars[name])}' for name in names)})"

    def _repr_html_(self) -> str:
        """A small table for notebooks: every single number."""
        scalars = {name: value for name, value in self.numbers.items() if isinstance(value, int | float | str)}
        cells = ((html.escape(name), html.escape(_figure(value))) for name, value in scalars.items())
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
        return f"<table><caption>{html.escape(self._title())}</caption>{rows}</table>"

    def _title(self) -> str:
        return f"{self.kind} of {self.inputs.get('label') or self.inputs.get('model')}"


def finite(value: Any) -> Any:
    """A JSON value with null for every number that is not finite: a result of hours is not lost for one of them."""
    if isinstance(value, Mapping):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _renamed(settings: Any) -> Any:
    """Settings, and settings inside them, under today's names."""
    if not isinstance(settings, Mapping):
        return settings
    return {RENAMED.get(name, name): _renamed(value) for name, value in settings.items()}


def _renamed_inputs(kind: str, inputs: Any) -> Any:
    """Inputs with the fingerprint's own name, and the settings of the compression under today's names."""
    if not isinstance(inputs, Mapping):
        return inputs
    fingerprint = FINGERPRINTS.get(kind, "fingerprint")
    names = {name: fingerprint if name == "fingerprint" else name for name in inputs}
    return {names[name]: _renamed(value) if name == "compression" else value for name, value in inputs.items()}


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")  # a result that needed no torch needs no GPU either
    if torch is not None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        name = getattr(torch.get_device_module(kind), "get_device_name", lambda: kind)()  # MPS has none
        machine |= {"gpu": name, "gpus": torch.accelerator.device_count()}
        machine |= {"cuda": torch.version.cuda} if kind == "cuda" else {}
        if version := DRIVER.is_file() and re.search(r"\d+\.[\d.]+", DRIVER.read_text(errors="replace")):
            machine["driver"] = version.group()
    return machine


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Identity:
    """Which weights an artefact was made from; two models with the same fingerprint have the same weights."""

    name: str
    fingerprint: str

    def __post_init__(self) -> None:
        # A path may hold half letters, which no file of ours can.
        object.__setattr__(self, "name", self.name.encode(errors="replace").decode())

    def check(self, other: "Identity", artefact: str) -> None:
        """Raise WeLoreError when an artefact (made from `self`) is about to be used on `other`."""
        if self.fingerprint != other.fingerprint:
            raise WeLoreError(
                f"the {artefact} was made for another model ({self.name}, fingerprint {self.fingerprint[:12]}), "
                f"not for {other.name} ({other.fingerprint[:12]}): make it again with this one"
            )
