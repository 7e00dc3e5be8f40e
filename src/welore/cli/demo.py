"""The demo: SmolLM2-135M, which comes as a package, compressed in several ways and compared on a built-in text."""

import hashlib
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Unpack

from welore.allocation.solver import allocate
from welore.allocation.spectra import Spectra
from welore.calibration.collect import calibrate
from welore.compression.analysis import analyze
from welore.compression.pipeline import compress
from welore.config import (
    AllocationConfig,
    CalibrationConfig,
    CompressionConfig,
    EvaluationConfig,
    FinetuneConfig,
    PresetName,
    RunOptions,
    as_record,
)
from welore.evaluation.perplexity import evaluate
from welore.io.atomic import read_json, write_json
from welore.io.checkpoint import PLAN, RECORD
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.source import CheckpointSource
from welore.records import Record
from welore.reporting.formatting import megabytes, percent, perplexity_text
from welore.reporting.page import report
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL, TUNED

# The paper's method destroys this small model quickly; a mild reduction shows what the allocation of ranks is worth.
RANK_REDUCTION = 0.09
KEEP = 0.8
PRESET: PresetName = "fast"  # little text and no recovery: the demo is short
CALIBRATION = CalibrationConfig(num_tokens=4096, measure_losses=0)  # as the preset
EVALUATION = EvaluationConfig("pydoc", max_length=512, num_windows=16)
# Fine-tuning holds out the first tenth of the text, in which the windows of the evaluation lie.
TUNING = FinetuneConfig(
    dataset="pydoc",
    max_steps=12,
    learning_rate=5e-4,
    batch_size=4,
    max_length=128,
    max_eval_samples=32,
    eval_steps=6,
    save_steps=0,
)
STATE = "demo.json"
LABELS = {  # in the order of the table; the names are those of directories
    "dense": "dense",
    "uniform-same-err": "uniform, same rank reduction",
    "uniform-same-parameters": "uniform, same parameters",
    "welore": "WeLore as published",
    "ours": "our method, same parameters",
    "ours-small": "our method, smaller",
    "welore-tuned": "WeLore as published, LRCs fine-tuned",
    "dense-tuned": "control: dense, same matrices fine-tuned",
}
HEADINGS = ("", "rank removed", "parameters", "weights", "perplexity", "to dense")


@dataclass(frozen=True, repr=False)
class DemoResults:
    """The measurements of the demo: a record for each row of the table, sentences, and the page with all figures."""

    records: list[Record]
    findings: list[str]
    page: Path

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the table, a row for each model, under HEADINGS."""
        base = self.records[0].numbers["perplexity"]
        return [
            [
                str(record.inputs["label"]),
                *map(percent, (record.numbers["rank_reduction"], record.numbers["parameter_ratio"])),
                megabytes(record.numbers["bytes"]),
                perplexity_text(record.numbers["perplexity"]),
                f"x {perplexity_text(record.numbers['perplexity'] / base)}",
            ]
            for record in self.records
        ]

    def __repr__(self) -> str:
        return f"DemoResults({len(self.records)} models, page={str(self.page)!r})"

    def _repr_html_(self) -> str:
        """The table and the sentences for notebooks."""
        rows = "".join(f"<tr><td>{'</td><td>'.join(map(html.escape, row))}</td></tr>" for row in self.rows)
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.findings)
        return f"<table><tr><th>{'</th><th>'.join(HEADINGS)}</th></tr>{rows}</table>{sentences}"


def demo(output_dir: str | Path = "demo", **options: Unpack[RunOptions]) -> DemoResults:
    """Compress the embedded model in several ways, evaluate each, and fine-tune one of them.

    A second call with the same directory takes seconds: it makes only what is missing or has other settings.

    Args:
        output_dir: directory for everything that the demo makes.
        **options: device, workers, progress, cache_dir.

    Returns:
        Records in the order of the table, three sentences, and the path of the report.

    Raises:
        WeLoreError: the package with the model, or an extra (`gguf`, `report`), is absent.
    """
    context = RunContext.create(**options)
    model = resolve_model(embedded_model(), cache_dir=context.cache_dir)
    fingerprint = CheckpointSource(model).identity.fingerprint
    steps = _Steps(Path(output_dir), model, [metadata.version("welore"), fingerprint], context)
    _publish(steps)
    _apply_best(steps)
    welore, plan = steps.paths["welore"], steps.paths["welore"] / PLAN
    steps.tune("welore-tuned", welore)
    run = steps.tune("dense-tuned", model, plan)
    records = [steps.evaluate(name) for name in LABELS]
    findings = _findings({name: r.numbers for name, r in zip(LABELS, records, strict=True)}, run.numbers)
    return DemoResults(records, findings, report([output_dir], Path(output_dir) / "report"))


class _Steps:
    """The pieces in a directory and their inputs, so that only what has changed is made again."""

    def __init__(self, directory: Path, model: Path, base: list[Any], context: RunContext) -> None:
        self.directory, self.model, self.base = directory, model, base
        self.options: dict[str, Any] = context.options | {"overwrite": True}
        self.keys: dict[str, str] = read_json(directory / STATE) if (directory / STATE).is_file() else {}
        self.paths = {"dense": model}

    def make(self, name: str, inputs: list[Any], function: Callable[[Path], Any]) -> Path:
        """The file or directory `name`, made by function(path) unless the same inputs have made it before."""
        path = self.paths[name] = self.directory / name
        key = hashlib.sha256(json.dumps([*self.base, *inputs]).encode()).hexdigest()
        if self.keys.get(name) != key or not path.exists():
            function(path)
            self.keys[name] = key
            write_json(self.directory / STATE, self.keys)
        return path

    def compress(self, name: str, inputs: list[Any], **method: Any) -> None:
        """Compress the model as `name`; inputs: what the method is made from."""
        self.make(name, inputs, lambda path: compress(self.model, path, **method, **self.options))

    def tune(self, name: str, start: Path, plan: Path | None = None) -> Record:
        """Fine-tune the paper's LRCs of the model in `start` as `name`; plan: of a dense model, which are meant."""
        inputs = [self.keys["welore"], as_record(TUNING), plan is None]
        path = self.make(
            name, inputs, lambda path: finetune(start, path, TUNING, plan=plan, label=LABELS[name], **self.options)
        )
        self.paths[name] = path / MODEL
        return Record.load(path / TUNED)

    def evaluate(self, name: str) -> Record:
        """The record of the perplexity of what was made as `name`."""
        inputs = [self.keys.get(name), as_record(EVALUATION), LABELS[name]]

        def measure(path: Path) -> None:
            evaluate(self.paths[name], EVALUATION, label=LABELS[name], **self.options).save(path)

        return Record.load(self.make(f"{name}.ppl.json", inputs, measure))


def _publish(steps: _Steps) -> None:
    """Plain SVD: ranks as the paper allocates them, and the same share of every rank at two sizes."""
    path = steps.make("spectra.safetensors", [], lambda path: analyze(steps.model, **steps.options).save(path))
    spectra = Spectra.load(path)
    welore = AllocationConfig(rank_reduction=RANK_REDUCTION)
    plan = allocate(spectra, welore)
    same_rank = AllocationConfig(rank_reduction=plan.rank_reduction, strategy="uniform", allow_growth=True)
    same_size = AllocationConfig(keep=plan.parameter_ratio, strategy="uniform")
    for name, config in {"welore": welore, "uniform-same-err": same_rank, "uniform-same-parameters": same_size}.items():
        steps.compress(name, [as_record(config)], plan=allocate(spectra, config))


def _apply_best(steps: _Steps) -> None:
    """Our method, from little text that the model itself writes, at the paper's size and at a smaller one."""
    text = [as_record(CALIBRATION)]
    path = steps.make(
        "statistics.safetensors", text, lambda path: calibrate(steps.model, CALIBRATION, path, **steps.options)
    )
    same_size = Record.load(steps.paths["welore"] / RECORD).numbers["parameter_ratio"]
    for name, keep in {"ours": same_size, "ours-small": KEEP}.items():
        config = CompressionConfig(keep=keep, preset=PRESET)
        steps.compress(name, [*text, as_record(config)], config=config, statistics=path)


def _findings(numbers: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any]) -> list[str]:
    """The table in sentences, made from its numbers."""
    value = {name: perplexity_text(n["perplexity"]) for name, n in numbers.items()}
    base = numbers["dense"]["perplexity"]
    ratio = {name: f"{perplexity_text(n['perplexity'] / base)} times" for name, n in numbers.items()}
    size, small = (percent(numbers[name]["parameter_ratio"]) for name in ("welore", "ours-small"))
    return [
        f"With {size} of the parameters of the decoder blocks, perplexity is {ratio['ours']} that of the dense model "
        f"with our method and {ratio['welore']} with WeLore as published; it is {ratio['uniform-same-parameters']} "
        "that of the dense model if every matrix loses the same share of its rank.",
        f"With {small} of them it is {ratio['ours-small']} that of the dense model with our method, which needed no "
        f"data but {CALIBRATION.tokens:,} tokens that the model itself wrote.",
        f"Fine-tuning only the low-rank factors of WeLore ({run['trainable_parameters'] / 1e6:.1f} of "
        f"{run['total_parameters'] / 1e6:.0f} million parameters, {run['tokens']:,} tokens) takes perplexity from "
        f"{value['welore']} to {value['welore-tuned']}; the same training of the same matrices takes the dense model "
        f"from {value['dense']} to {value['dense-tuned']}, so a part of the gain is the text.",
    ]
