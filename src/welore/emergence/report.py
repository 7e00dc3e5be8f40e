"""The study's section of the page that `welore report` makes."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from welore.emergence.claims import claims_table, load_pretraining
from welore.emergence.figures import FIGURES, settling
from welore.emergence.trace import LINES, Trace
from welore.records import Record
from welore.reporting.discover import Content, Section
from welore.reporting.style import Picture, picture


def build(artefacts: Mapping[Path, Any]) -> Content | None:
    """Tables of claims, and the figures of every trace; None without a pre-training."""
    traces = [artefact for artefact in artefacts.values() if isinstance(artefact, Trace)]
    runs = [record for record in artefacts.values() if isinstance(record, Record) and record.kind == "pretrain"]
    if not traces and not runs:
        return None
    drawn: dict[str, list[tuple[Picture, str]]] = {}
    for number, trace in enumerate(traces, 1):
        name = str(trace.header["name"])
        drawn[name if name not in drawn else f"{name} ({number})"] = [
            (picture(draw(trace, title=name), f"study-{number}-{figure}"), caption)
            for figure, (draw, caption) in FIGURES.items()
        ]
    content: dict[str, Any] = {
        "claims": claims_table(runs) if runs else None,
        "settling": picture(settling(runs), "study-settling") if runs else None,
        "traces": drawn,
    }
    pictures = [drawing for pair in drawn.values() for drawing, _ in pair]
    return content, ([content["settling"]] if runs else []) + pictures


SECTION = Section(
    build,
    template=resources.files(__package__).joinpath("study.html.jinja").read_text(encoding="utf-8"),
    loaders={"pretrain.json": load_pretraining, "*.pretrain.json": load_pretraining, LINES: Trace.load},
    kinds=("pretrain",),
)
