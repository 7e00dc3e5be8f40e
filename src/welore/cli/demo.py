"""The embedded default: the whole pipeline on SmolLM2-135M, which comes as a package, on text that is always there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from welore.allocation.plan import Plan
from welore.allocation.solver import allocate
from welore.allocation.spectra import Spectra
from welore.compression.analysis import analyze
from welore.compression.pipeline import compress
from welore.config import AllocationConfig, EvaluationConfig, FinetuneConfig
from welore.evaluation.perplexity import evaluate
from welore.io.atomic import read_json
from welore.io.checkpoint import PLAN, RECORD
from welore.io.hub import resolve_model
from welore.io.progress import Progress, counted, silent
from welore.models.embedded import PACKAGE, embedded_model
from welore.models.source import CheckpointSource
from welore.records import Record
from welore.reporting.page import report
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL
from welore.training.run_dir import TUNED as FINETUNED

# Plain truncation destroys this small model quickly; a mild reduction shows what the allocation is worth.
RANK_REDUCTION = 0.09
DATA, LENGTH, WINDOWS = "pydoc", 512, 16
# The windows lie in the first tenth of the text, which fine-tuning holds out: what is measured was not trained on.
TUNING: dict[str, Any] = {
    **{"dataset": DATA, "max_steps": 12, "learning_rate": 5e-4, "batch_size": 4, "max_length": 128},
    "max_eval_samples": 32,
}


TUNED, CONTROL = "welore-tuned", "dense-tuned"
TUNED_FROM = {"welore": (TUNED, CONTROL)}  # what begins from a checkpoint, or from its plan


@dataclass(frozen=True)
class Results:
    """What the demo found: perplexities in the order of the table, sentences about them, and the report's page."""

    records: list[Record]
    findings: list[str]
    page: Path


def demo(
    out: str | Path = "demo",
    *,
    cache_dir: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Results:
    """Analyze, allocate, compress, load back, evaluate, fine-tune and report, in `out`; what is there is reused."""
    out = Path(out)
    model = embedded_model()
    tell(f"model: {model.name} (from the package {PACKAGE}); converted to safetensors once and kept")
    for _ in counted(progress, [model], "read the .gguf file"):
        directory = resolve_model(model, cache_dir=cache_dir)
    spectra = _analyzed(directory, out / "spectra.safetensors", progress)
    tell(f"singular values of {len(spectra.values)} matrices: {out / 'spectra.safetensors'}")

    records = [_evaluated(directory, out / "dense.ppl.json", "dense", progress)]
    for name, label, plan in plans(spectra):
        tell(f"{label}: ERR {plan.rank_reduction:.1%}, parameters {plan.parameter_ratio:.1%}")
        _compressed(directory, out / name, plan, TUNED_FROM.get(name, ()), progress)
        records.append(_evaluated(out / name, out / f"{name}.ppl.json", label, progress))
    runs = []
    for name, label, model, plan_file in (
        (TUNED, "WeLore, then LRC-only fine-tuning", out / "welore", None),
        (CONTROL, "control: dense, the same matrices tuned", directory, out / "welore" / PLAN),
    ):
        tell(f"{label}: {TUNING['max_steps']} steps of {TUNING['batch_size']} x {TUNING['max_length']} tokens")
        runs.append(_tuned(model, out / name, label, plan_file, progress))
        records.append(_evaluated(out / name / MODEL, out / f"{name}.ppl.json", label, progress))
    return Results(records, findings(records, runs), report([out], out / "report"))


def plans(spectra: Spectra) -> list[tuple[str, str, Plan]]:
    """Directory, label and plan of WeLore, and of uniform at the same ERR and at the same parameters."""
    welore = allocate(spectra, rank_reduction=RANK_REDUCTION)
    same_rank = allocate(
        spectra, AllocationConfig(strategy="uniform", rank_reduction=welore.rank_reduction, allow_growth=True)
    )
    same_size = allocate(spectra, AllocationConfig(strategy="uniform", keep=welore.parameter_ratio))
    return [
        ("welore", "WeLore", welore),
        ("uniform-same-err", "uniform, same ERR", same_rank),
        ("uniform-same-parameters", "uniform, same parameters", same_size),
    ]


def findings(records: Sequence[Record], runs: Sequence[Record]) -> list[str]:
    """What the table and the fine-tuning runs say, in words, from their numbers."""
    dense, ours, same_rank, same_size, tuned, control = (record.numbers for record in records)
    base, run = dense["perplexity"], runs[0].numbers
    return [
        f"WeLore removes {ours['rank_reduction']:.1%} of the rank and {1 - ours['parameter_ratio']:.1%} of the "
        f"parameters; perplexity rises {ours['perplexity'] / base:.2f}-fold.",
        f"Uniform at the same rank reduction: {same_rank['perplexity'] / base:.3g}-fold, with "
        f"{same_rank['parameter_ratio']:.0%} of the parameters: two thin factors of a hardly reduced matrix are "
        "larger than the matrix.",
        f"Uniform at the same parameters: {same_size['perplexity'] / base:.3g}-fold.",
        f"Fine-tuning the factors alone ({run['trainable_parameters'] / 1e6:.1f} of "
        f"{run['total_parameters'] / 1e6:.0f} million parameters, {run['tokens']:,} tokens): perplexity "
        f"{ours['perplexity']:.4g} -> {tuned['perplexity']:.4g}. The same matrices of the dense model, tuned as long: "
        f"{base:.4g} -> {control['perplexity']:.4g}; what a dense model gains is the text, not repair.",
        "Plain SVD leaves a model this small little room: this is the paper's method without calibration.",
    ]


def _analyzed(directory: Path, path: Path, progress: Progress) -> Spectra:
    if path.is_file():
        spectra = Spectra.load(path)
        with CheckpointSource(directory) as checkpoint:
            if spectra.model.fingerprint == checkpoint.identity.fingerprint:
                return spectra
    spectra = analyze(directory, progress=progress)
    spectra.save(path)
    return spectra


def _compressed(directory: Path, out: Path, plan: Plan, tuned: Sequence[str], progress: Progress) -> None:
    """Compress, unless `out` was made by the same plan; what was measured of an older one, or tuned, is removed."""
    if (out / RECORD).is_file():
        plan.save(out.with_suffix(".plan.json"))
        same = read_json(out / PLAN) == read_json(out.with_suffix(".plan.json"))
        out.with_suffix(".plan.json").unlink()
        if same:
            return
    out.with_suffix(".ppl.json").unlink(missing_ok=True)
    for name in tuned:
        (out.with_name(name) / FINETUNED).unlink(missing_ok=True)
    compress(directory, out, plan=plan, overwrite=True, progress=progress)


def _tuned(model: Path, out: Path, label: str, plan: Path | None, progress: Progress) -> Record:
    """The run in `out` if it is the same one, else a new one; measurements of an older result are removed."""
    if (out / FINETUNED).is_file():
        record = Record.load(out / FINETUNED)
        if record.inputs["model"] == str(model) and record.settings.items() >= TUNING.items():
            return record
    out.with_name(f"{out.name}.ppl.json").unlink(missing_ok=True)
    config = FinetuneConfig(eval_steps=6, save_steps=0, **TUNING)
    return finetune(model, out, config, plan=plan, label=label, overwrite=True, progress=progress)


def _evaluated(model: Path, path: Path, label: str, progress: Progress) -> Record:
    if path.is_file():
        record = Record.load(path)
        made_with = (
            record.inputs["model"],
            *(record.settings[name] for name in ("dataset", "max_length", "num_windows")),
        )
        if made_with == (str(model), DATA, LENGTH, WINDOWS):
            return record
    record = evaluate(model, EvaluationConfig(DATA, LENGTH, WINDOWS), label=label, progress=progress)
    record.save(path)
    return record
