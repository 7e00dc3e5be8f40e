"""7 - report: every artefact under some directories -> one self-contained HTML page and its figures as PNG."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.emergence.claims import claims_table
from welore.emergence.downstream_checks import closed, verdicts
from welore.emergence.figures import FIGURES, settling
from welore.emergence.trace import Trace
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.records import MODEL_FINGERPRINT, Record
from welore.reporting import figures
from welore.reporting.discover import NEEDED, Artefact, find_artefacts
from welore.reporting.formatting import megabytes, percent, perplexity_text
from welore.reporting.module_types import KindSummary, summarise
from welore.reporting.style import INSTALL
from welore.reporting.tables import Comparison, Table, comparisons, last_name, results, task_tables
from welore.reporting.training_figures import FIGURE_1, FIGURE_5, fine_tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure in both forms: `svg` stands in the page, `png` is written to `file`."""

    file: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class PlanRow:
    """One line of the table of plans; numbers has `bytes` and `bytes_dense` once a checkpoint was written."""

    name: str
    model: str
    settings: Mapping[str, Any]
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class PlanSection:
    """One plan, what it does by module kind, and its figures (spectra: of a `welore` plan, where they were found)."""

    name: str
    plan: Plan
    kinds: list[KindSummary]
    spectra: Picture | None
    reduction: Picture
    parameters: Picture


@dataclass(frozen=True)
class Study:
    """Pre-trainings: what they say of the paper's claims, all of them in one figure, and the figures of each trace.

    closing: what cutting and fine-tuning their results says.
    """

    claims: Table | None
    closing: Table | None
    settling: Picture | None
    traces: dict[str, list[tuple[Picture, str]]]

    @property
    def pictures(self) -> list[Picture]:
        """All of them."""
        of_traces = [picture for pictures in self.traces.values() for picture, _ in pictures]
        return of_traces if self.settling is None else [self.settling, *of_traces]


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning runs that may be compared: their table, and figures with what is to be said of each."""

    table: Table
    pictures: list[tuple[Picture, str]]


def report(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Write `out/report.html` and its figures from every artefact under the directories; the page's path.

    Reads spectra*.safetensors, plan.json, *.plan.json, compression.json, *.ppl.json, finetune.json, *.score.json,
    pretrain.json, *.pretrain.json and the traces of pre-trainings, at any depth. Nothing is written before everything
    is read and drawn, and the page is written last. Raises WeLoreError if there is nothing to report, if an artefact
    is broken, or if the extra `report` is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401 - asked for before the work, not after it
    except ImportError as error:
        raise WeLoreError(INSTALL) from error

    content, pictures = _content(find_artefacts(directories))
    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    jinja.filters |= {
        "percent": percent,
        "megabytes": megabytes,
        "perplexity": perplexity_text,
        "last_name": last_name,
        "asked": _asked,
    }
    template = resources.files("welore.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = jinja.from_string(template).render(content)

    page = Path(out) / "report.html"
    for picture in pictures:
        with atomic_write(page.with_name(picture.file)) as partial:
            partial.write_bytes(picture.png)
    with atomic_write(page) as partial:
        partial.write_text(html, encoding="utf-8")
    return page


# --- plans and their figures -----------------------------------------------------------------------------------


def _content(found: Mapping[Path, Artefact]) -> tuple[dict[str, Any], list[Picture]]:
    """What the template is given, and every picture in it."""
    spectra = [a for a in found.values() if isinstance(a, Spectra)]
    plans = {path: a for path, a in found.items() if isinstance(a, Plan)}
    records = {path: a for path, a in found.items() if isinstance(a, Record)}
    made = _compressions(records)
    originals = {p.model.name for p in plans.values()} | {r.inputs["model"] for r in made.values()}
    texts = results((r for r in records.values() if r.kind == "perplexity"), originals)

    overview = None
    if any(r.perplexity is not None for group in texts.values() for r in group):
        overview = _picture(figures.perplexities(texts), "perplexity")
    names = _names([*plans, *made])
    sections = _sections(plans, names, spectra)
    drawn = {s.plan.model.fingerprint for s in sections if s.spectra}
    alone = {s.model.fingerprint: s for s in spectra if s.model.fingerprint not in drawn}
    alone_pictures = [
        (s, _picture(figures.normalised_spectra(s, title=last_name(s.model.name)), f"spectra-{i}"))
        for i, s in enumerate(alone.values(), 1)
    ]
    tunings = [_tuning(comparison, i) for i, comparison in enumerate(comparisons(records.values()), 1)]
    study = _study([a for a in found.values() if isinstance(a, Trace)], records)
    content = {
        "texts": texts,
        "study": study,
        "tunings": tunings,
        "tasks": task_tables(records.values()),
        "overview": overview,
        "rows": _plan_rows(plans, made, names),
        "sections": sections,
        "alone": alone_pictures,
        "others": [(f"{path.parent.name}/{path.name}", r.kind) for path, r in records.items() if r.kind not in NEEDED],
        "machines": list(dict.fromkeys(_where(r) for r in records.values())),
    }
    of_tunings = [picture for tuning in tunings for picture, _ in tuning.pictures]
    of_plans = [picture for s in sections for picture in (s.spectra, s.reduction, s.parameters)]
    others = (*of_tunings, *(p for _, p in alone_pictures), *of_plans, *study.pictures)
    return content, [p for p in (overview, *others) if p is not None]


def _study(traces: Sequence[Trace], records: Mapping[Path, Record]) -> Study:
    """Everything about pre-trainings; empty where there is none."""
    runs = [record for record in records.values() if record.kind == "pretrain"]
    drawn: dict[str, list[tuple[Picture, str]]] = {}
    for number, trace in enumerate(traces, 1):
        name = str(trace.about["name"])
        drawn[name if name not in drawn else f"{name} ({number})"] = [
            (_picture(draw(trace, title=name), f"study-{number}-{figure}"), caption)
            for figure, (draw, caption) in FIGURES.items()
        ]
    if not runs:
        return Study(None, None, None, drawn)
    closings = closed(records)
    return Study(
        claims_table(runs), verdicts(closings) if closings else None, _picture(settling(runs), "study-settling"), drawn
    )


def _compressions(records: Mapping[Path, Record]) -> dict[Path, Record]:
    """The records of compressions, each once: a tuned model has a copy of that of the checkpoint it came from."""
    found: dict[Path, Record] = {}
    for path in sorted(records, key=lambda path: len(path.parts)):
        if records[path].kind == "compression" and records[path] not in found.values():
            found[path] = records[path]
    return {path: r for path, r in records.items() if path in found}


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """Path of a plan or record -> the name of its directory (X for X.plan.json), lengthened where two are alike."""
    ending = ".plan.json"
    owner = {p: p.with_name(p.name.removesuffix(ending)) if p.name.endswith(ending) else p.parent for p in paths}
    owners = set(owner.values())

    def short(path: Path) -> str:
        endings = (path.parts[-n:] for n in range(1, len(path.parts)))
        return "/".join(next((e for e in endings if sum(o.parts[-len(e) :] == e for o in owners) == 1), path.parts))

    return {path: short(directory) for path, directory in owner.items()}


def _plan_rows(plans: Mapping[Path, Plan], made: Mapping[Path, Record], names: Mapping[Path, str]) -> list[PlanRow]:
    """A line per checkpoint, from its record, and one per plan that was not carried out."""
    rows = [PlanRow(names[path], r.inputs["model"], r.settings, r.numbers) for path, r in made.items()]
    directories = {path.parent for path in made}
    done = [plan for path, plan in plans.items() if path.parent in directories]
    for path, plan in plans.items():
        if plan not in done:
            done.append(plan)
            settings = {"target": plan.target, "strategy": plan.strategy, "min_ratio": plan.min_ratio}
            rows.append(PlanRow(names[path], plan.model.name, settings, plan.numbers()))
    return rows


def _sections(plans: Mapping[Path, Plan], names: Mapping[Path, str], spectra: Sequence[Spectra]) -> list[PlanSection]:
    sections: list[PlanSection] = []
    for path, plan in plans.items():
        if any(section.plan == plan for section in sections):
            continue  # compress copies the plan beside the weights
        slug = re.sub(r"[^\w.-]+", "-", names[path]).strip("-.") or "plan"
        if any(section.reduction.file == f"{slug}-reduction.png" for section in sections):
            slug += f"-{len(sections) + 1}"
        sizes = f"ERR {percent(plan.rank_reduction)}, parameters {percent(plan.parameter_ratio)}"
        title = f"{names[path]}: {plan.strategy}, {sizes}"
        own = next((s for s in spectra if s.model.fingerprint == plan.model.fingerprint), None)
        section = PlanSection(
            name=names[path],
            plan=plan,
            kinds=summarise(plan),
            spectra=_picture(figures.normalised_spectra(own, plan, title=title), f"{slug}-spectra")
            if own and plan.strategy == "welore"
            else None,
            reduction=_picture(figures.reduction_heatmap(plan, title=title), f"{slug}-reduction"),
            parameters=_picture(figures.parameters_by_module(plan, title=title), f"{slug}-parameters"),
        )
        sections.append(section)
    return sections


def _tuning(comparison: Comparison, number: int) -> Tuning:
    """The table of a comparison, and its figures: all runs, and those of the paper's figures where they are there."""
    groups = {"": comparison.best}
    for name, methods in {"figure-1": FIGURE_1, "figure-5": FIGURE_5}.items():
        for i, runs in enumerate(_of_methods(comparison.best, methods)):
            if len(runs) < len(comparison.best):
                groups[f"-{name}" + (f"-{i + 1}" if i else "")] = runs
    title = comparison.caption
    pictures = [
        (_picture(fine_tuning(runs, title=title), f"fine-tuning-{number}{name}"), _figure_of_the_paper(runs))
        for name, runs in groups.items()
    ]
    return Tuning(comparison.table, pictures)


def _of_methods(runs: Sequence[Record], methods: Sequence[str]) -> list[list[Record]]:
    """The runs of these methods on each compressed model, where there are two methods to compare."""
    beginnings = dict.fromkeys(r.inputs[MODEL_FINGERPRINT] for r in runs if r.numbers["rank_reduction"] > 0)
    groups = [
        [r for r in runs if r.inputs[MODEL_FINGERPRINT] == beginning and r.settings["method"] in methods]
        for beginning in beginnings
    ]
    return [group for group in groups if len({r.settings["method"] for r in group}) > 1]


def _figure_of_the_paper(runs: Sequence[Record]) -> str:
    methods, beginnings = {r.settings["method"] for r in runs}, {r.inputs[MODEL_FINGERPRINT] for r in runs}
    if len(beginnings) == 1 and len(methods) == len(runs) > 1:
        if methods <= set(FIGURE_1):
            return "As Figure 1 of the paper."
        if methods <= set(FIGURE_5):
            return "As Figure 5 of the paper."
    return ""


def _asked(target: Mapping[str, float]) -> str:
    short = {"rank_reduction": "ERR", "params": "parameters", "keep": "parameters"}
    return ", ".join(
        f"{short[name]} {percent(value)}" if name in short else f"{name} {value:.4g}" for name, value in target.items()
    )


def _where(record: Record) -> str:
    machine, versions = record.machine, record.versions
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB" if "memory_bytes" in machine else ""
    computer = f"{machine.get('system')}, {machine.get('processor')}, {machine.get('cores')} cores{memory}"
    return f"{computer}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _picture(figure: "Figure", name: str) -> Picture:
    import matplotlib

    svg, png = StringIO(), BytesIO()
    # the salt makes the ids, which are drawn at random otherwise, the same in every run
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.set_layout_engine("none")  # the layout is found; finding it again takes most of the time
        figure.savefig(png, format="png", dpi=150)
    return Picture(f"{name}.png", _inlined(svg.getvalue(), name), png.getvalue())


def _inlined(svg: str, name: str) -> str:
    """An SVG file as an element of a page: ids that are its own, no outside addresses, hundredths of a point."""
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    return re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
