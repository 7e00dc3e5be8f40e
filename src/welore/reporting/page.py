"""The verb `report`: every artefact under some directories -> one self-contained HTML page and its figures as PNG."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from welore.allocation.plan import Plan
from welore.allocation.spectra import Spectra
from welore.errors import WeLoreError
from welore.io.atomic import atomic_directory, atomic_write
from welore.records import MODEL_FINGERPRINT, Record
from welore.reporting import figures, tables
from welore.reporting.discover import LOADERS, ROWS, Content, find_artefacts, load_sections, machine_text
from welore.reporting.formatting import last_name, megabytes, percent, perplexity_text
from welore.reporting.module_types import summarise
from welore.reporting.style import INSTALL, Picture, picture
from welore.reporting.training_figures import FIGURE_1, FIGURE_5, fine_tuning

LOG = logging.getLogger(__name__)
PAPER = {1: FIGURE_1, 5: FIGURE_5}  # figures of the paper: the methods that they compare
Draw = Callable[[Any, str], Picture]  # (figure, name)


def report(directories: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Make one HTML page, and its figures as PNG files, from every artefact under some directories.

    Args:
        directories: Searched at any depth for spectra*.safetensors, plan.json, *.plan.json, compression.json,
            *.ppl.json, finetune.json, *.score.json, and the files of installed sections (pre-trainings).
        output_dir: Gets report.html and the figures. Nothing is written before everything is read and drawn. An
            artefact that is damaged or of a later version is left out: a warning and the page say which.

    Returns:
        The path of the page.

    Raises:
        WeLoreError: There is nothing that can be reported, or the extra `report` is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401 - missing packages are reported before the work
    except ImportError as error:
        raise WeLoreError(INSTALL) from error

    sections = load_sections()
    artefacts, left_out = find_artefacts(directories, LOADERS | {k: v for s in sections for k, v in s.loaders.items()})
    for sentence in left_out:
        LOG.warning("left out: %s", sentence)
    content, pictures = _content(artefacts, {kind for section in sections for kind in section.kinds})
    templates: dict[str, str] = {}
    content |= {"sections": {}, "left_out": left_out}
    for section in sections:
        part = section.build(artefacts)
        if part is not None:
            name = f"section {len(templates)}"
            templates[name], content["sections"][name] = section.template, part[0]
            pictures += part[1]
    jinja = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(__package__, "."), jinja2.DictLoader(templates)]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (percent, megabytes, perplexity_text, last_name, tables.target_text)
    jinja.filters |= {function.__name__: function for function in filters}
    html = jinja.get_template("page.html.jinja").render(content)

    out = Path(output_dir)
    new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    with atomic_directory(out) if new else nullcontext(out) as directory:
        files = [(drawing.file, drawing.png) for drawing in pictures]
        # Half a letter may stand in a path. The page comes last: in a directory that was there it marks the end.
        for name, data in [*files, ("report.html", html.encode(errors="replace"))]:
            with atomic_write(directory / name) as partial:
                partial.write_bytes(data)
    return out / "report.html"


def _content(artefacts: Mapping[Path, Any], shown_elsewhere: set[str]) -> Content:
    """The variables of the page's template, and every picture."""
    spectra = [a for a in artefacts.values() if isinstance(a, Spectra)]
    plans = {path: a for path, a in artefacts.items() if isinstance(a, Plan)}
    records = {path: a for path, a in artefacts.items() if isinstance(a, Record)}
    compressions = _compressions(records)
    originals = {p.model.name for p in plans.values()} | {r.inputs["model"] for r in compressions.values()}
    texts = tables.results((r for r in records.values() if r.kind == "perplexity"), originals)
    pictures: list[Picture] = []

    def draw(figure: Any, name: str) -> Picture:
        pictures.append(picture(figure, name))
        return pictures[-1]

    names = _names([*plans, *compressions])
    sections = _plan_sections(plans, names, spectra, draw)
    drawn = {section["plan"].model.fingerprint for section in sections if section["spectra"]}
    alone = {s.model.fingerprint: s for s in spectra if s.model.fingerprint not in drawn}
    finite = any(r.perplexity is not None for group in texts.values() for r in group)
    content = {
        "texts": texts,
        "overview": draw(figures.perplexities(texts), "perplexity") if finite else None,
        "tunings": [
            (comparison.table, _tuning_pictures(comparison, number, draw))
            for number, comparison in enumerate(tables.comparisons(records.values()), 1)
        ],
        "tasks": tables.task_tables(records.values()),
        "plans": _plans_table(plans, compressions, names),
        "left_dense": [(names[path], r.numbers) for path, r in compressions.items()],
        "plan_sections": sections,
        "alone": [
            (s, draw(figures.normalised_spectra(s, title=last_name(s.model.name)), f"spectra-{i}"))
            for i, s in enumerate(alone.values(), 1)
        ],
        "others": [
            (f"{path.parent.name}/{path.name}", r.kind)
            for path, r in records.items()
            if r.kind not in ROWS and r.kind not in shown_elsewhere
        ],
        "machines": list(dict.fromkeys(machine_text(r) for r in records.values())),
    }
    return content, pictures


def _compressions(records: Mapping[Path, Record]) -> dict[Path, Record]:
    """The records of compressions, each once: a fine-tuned model has a copy of that of its initial checkpoint."""
    first: dict[Path, Record] = {}
    for path in sorted(records, key=lambda path: len(path.parts)):
        if records[path].kind == "compression" and records[path] not in first.values():
            first[path] = records[path]
    return {path: r for path, r in records.items() if path in first}


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """Path of a plan or record -> the name of its directory (X for X.plan.json), with parents where two are equal."""
    ending = ".plan.json"
    owner = {p: p.with_name(p.name.removesuffix(ending)) if p.name.endswith(ending) else p.parent for p in paths}
    owners = set(owner.values())

    def shorten(path: Path) -> str:
        endings = (path.parts[-n:] for n in range(1, len(path.parts)))
        return "/".join(next((e for e in endings if sum(o.parts[-len(e) :] == e for o in owners) == 1), path.parts))

    return {path: shorten(directory) for path, directory in owner.items()}


def _plans_table(
    plans: Mapping[Path, Plan], compressions: Mapping[Path, Record], names: Mapping[Path, str]
) -> tables.Table:
    """A row per checkpoint, from its record, and one per plan that was not carried out."""
    rows = [tables.plan_row(names[path], r.inputs["model"], r.settings, r.numbers) for path, r in compressions.items()]
    directories = {path.parent for path in compressions}
    listed = [plan for path, plan in plans.items() if path.parent in directories]
    for path, plan in plans.items():
        if plan not in listed:
            listed.append(plan)
            settings = {"target": plan.target, "strategy": plan.strategy, "min_ratio": plan.min_ratio}
            rows.append(tables.plan_row(names[path], plan.model.name, settings, plan.numbers()))
    return tables.Table("", tables.PLAN_HEADINGS, rows, text_columns=3)


def _plan_sections(
    plans: Mapping[Path, Plan], names: Mapping[Path, str], spectra: Sequence[Spectra], draw: Draw
) -> list[dict[str, Any]]:
    """Name, plan, sums by module type, and pictures of every plan; spectra: of a `welore` plan whose spectra exist."""
    sections: dict[str, dict[str, Any]] = {}  # by the beginning of the names of their files
    for path, plan in plans.items():
        if any(section["plan"] == plan for section in sections.values()):
            continue  # a compressed checkpoint has a copy of its plan
        slug = re.sub(r"[^\w.-]+", "-", names[path]).strip("-.")[:100] or "plan"
        if slug in sections:
            slug += f"-{len(sections) + 1}"
        sizes = f"ERR {percent(plan.rank_reduction)}, parameters {percent(plan.parameter_ratio)}"
        title = f"{names[path]}: {plan.strategy}, {sizes}"
        section = sections[slug] = {"name": names[path], "plan": plan, "types": summarise(plan), "spectra": None}
        own = [s for s in spectra if s.model.fingerprint == plan.model.fingerprint]
        if own and plan.strategy == "welore":
            section["spectra"] = draw(figures.normalised_spectra(own[0], plan, title=title), f"{slug}-spectra")
        section["reduction"] = draw(figures.reduction_heatmap(plan, title=title), f"{slug}-reduction")
        section["parameters"] = draw(figures.parameters_by_module(plan, title=title), f"{slug}-parameters")
    return list(sections.values())


def _tuning_pictures(comparison: tables.Comparison, number: int, draw: Draw) -> list[tuple[Picture, str]]:
    """Pictures and captions: all runs, and those of the paper's figures on each compressed model.

    A figure of the paper needs two methods to compare.
    """
    best = comparison.best
    groups = {"": best}
    models = dict.fromkeys(r.inputs[MODEL_FINGERPRINT] for r in best if r.numbers["rank_reduction"] > 0)
    for number_in_paper, methods in PAPER.items():
        of_methods = [r for r in best if r.settings["method"] in methods]
        of_models = [[r for r in of_methods if r.inputs[MODEL_FINGERPRINT] == model] for model in models]
        comparable = [runs for runs in of_models if len({r.settings["method"] for r in runs}) > 1]
        for i, runs in enumerate(comparable):
            if len(runs) < len(best):
                groups[f"-figure-{number_in_paper}" + (f"-{i + 1}" if i else "")] = runs
    pictures = []
    for name, runs in groups.items():
        try:
            figure = fine_tuning(runs, title=comparison.caption)
        except WeLoreError:  # their curves cannot be compared
            continue
        pictures.append((draw(figure, f"fine-tuning-{number}{name}"), _figure_of_the_paper(runs)))
    return pictures


def _figure_of_the_paper(runs: Sequence[Record]) -> str:
    methods, models = {r.settings["method"] for r in runs}, {r.inputs[MODEL_FINGERPRINT] for r in runs}
    if len(models) == 1 and len(methods) == len(runs) > 1:
        return next((f"As Figure {n} of the paper." for n, shown in PAPER.items() if methods <= set(shown)), "")
    return ""
