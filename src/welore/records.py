"""One JSON file per result: what was read, how it was set, what came out, on which machine and versions."""

import dataclasses
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from welore.errors import WeLoreError
from welore.io.atomic import read_json, write_json

PACKAGES = ("welore", "torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Record:
    """A result that can be checked and repeated.

    kind: "analysis", "compression", "perplexity", ...; inputs: what was read; settings: what was asked;
    numbers: what was achieved or measured (fractions 0..1; units in the names).
    """

    kind: str
    inputs: dict[str, Any]
    settings: dict[str, Any]
    numbers: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    machine: dict[str, Any] = field(default_factory=lambda: _machine())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def save(self, path: str | Path) -> None:
        """Write the record to `path`, whole or not at all."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """The record at `path`; WeLoreError if the file is not one."""
        content = read_json(path)
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise WeLoreError(f"{path} is not a record of welore: it must hold {', '.join(sorted(names))}")
        return cls(**content)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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

    def check(self, other: "Identity", what: str) -> None:
        """Raise WeLoreError when `what` (made from `self`) is about to be used on `other`."""
        if self.fingerprint != other.fingerprint:
            raise WeLoreError(
                f"the {what} was made for another model ({self.name}, fingerprint {self.fingerprint[:12]}), "
                f"not for {other.name} ({other.fingerprint[:12]}): make it again with this one"
            )
