"""Every method at equal stored parameters, on any model: one record per cell, which a killed run finds again.

python benchmarks/arena.py [MODEL] [--methods plain-uniform svd-llm ...] [--keep 0.9 0.8 0.6] [--seeds 0]
                           [--tokens 32768] [--self-tokens 65536] [--calibrate-on FILE:1,pydoc:1]
                           [--texts wikitext2=FILE,pydoc=pydoc] [--windows 16] [--length 512] [--work DIR] [--out DIR]

MODEL: a hub id, a directory or a .gguf file; by default the embedded model. All methods that need a text read the same
--tokens of --calibrate-on, and measure losses on all of them; ours-more reads four times as many and measures on a
quarter. Data-free methods read nothing, or --self-tokens that the model writes. By default --calibrate-on is half the
training part of WikiText-2, half the part of Python's reference that is not evaluated.

--texts: all models are evaluated on the first --windows of each, in float32: perplexity, and from the dense model the
KL divergence (nats per token) and the share of tokens on which both rank the same one first.

Methods that say so leave long matrices whole (--no-split) and keep all neurons. All are laid out for size, but the
narrower MLPs, whose widths are multiples of 16. Only methods with a calibration depend on the seed. Seconds and peak
memory are those of a process that did nothing else. With --work, calibrations that are there are taken as they are, and
a compression that was killed goes on where it was; its seconds are then those of the last part.

Records: OUT/METHOD-KEEP-SEED.json, by default in docs/benchmarks/arena/NAME. Those of docs/benchmarks/quality have the
default settings, those of quality-kinds other --texts; most are older than the divergences. benchmarks/tables.py makes
the tables.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from welore.cli.output import quiet_libraries
from welore.config import EvaluationConfig
from welore.evaluation.perplexity import evaluate
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.load import LoadedModel, load_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
TEXTS = "wikitext2=wikitext2,pydoc=pydoc"
MULTIPLE = 16  # of the widths of narrower MLPs
MEASURED = {"mix": 1, "whole": 1, "more": 0.25}  # share of a text on which losses are measured, else none


@dataclass(frozen=True)
class Method:
    """One line of the table: its name in print, flags of `welore compress`, and the statistics that it reads.

    statistics: a key of Bench.tokens. score: the narrower MLPs of benchmarks/baselines.py, by this score.
    """

    label: str
    flags: str = ""
    statistics: str | None = None
    score: str | None = None


def low_rank(label: str, scaling: str, strategy: str, statistics: str | None = None) -> Method:
    """Ranks by a strategy, factors in a norm: two factors of a matrix, no blocks, all neurons, no recovery."""
    return Method(label, f"--scaling {scaling} --strategy {strategy} --storage factored --no-split", statistics)


NARROW = f"--for anywhere --rank-multiple {MULTIPLE}"
METHODS = {
    "plain-uniform": low_rank("plain SVD, uniform", "none", "uniform"),
    "welore": Method("WeLore as published (`--preset paper`)", "--paper"),
    "plain-waterfill": low_rank("plain SVD, water-filling", "none", "waterfill"),
    "asvd": low_rank("ASVD, uniform", "asvd", "uniform", "mix"),
    "asvd-welore": low_rank("ASVD, one threshold", "asvd", "welore", "mix"),
    "asvd-waterfill": low_rank("ASVD, water-filling", "asvd", "waterfill", "mix"),
    "svd-llm": low_rank("whitening, uniform (SVD-LLM)", "whitening", "uniform", "mix"),
    "input-welore": low_rank("whitening, one threshold", "whitening", "welore", "mix"),
    "input-waterfill": low_rank("whitening, water-filling", "whitening", "waterfill", "mix"),
    "kfac-uniform": low_rank("K-FAC, uniform", "kfac", "uniform", "whole"),
    "kfac-welore": low_rank("K-FAC, one threshold", "kfac", "welore", "whole"),
    "kfac-factored": low_rank("K-FAC, water-filling, factored", "kfac", "waterfill", "whole"),
    "ours-whole": Method(
        "K-FAC, water-filling, smaller storage form", "--recovery none --no-split --mlp-pruning 0", "whole"
    ),
    "ours-split": Method("the same, long matrices in blocks", "--recovery none --mlp-pruning 0", "mix"),
    "ours-text": Method("preset best, statistics of the same text, no recovery", "--recovery none", "mix"),
    "ours-more": Method("preset best, statistics of 128k tokens of text, no recovery", "--recovery none", "more"),
    "ours-self": Method("preset best, no data, no recovery", "--recovery none", "self"),
    "ours-default": Method("preset best, no data", "", "self"),
    "anywhere": Method("narrower MLPs alone (`--for anywhere`), no data", NARROW, "self"),
    "anywhere-text": Method("narrower MLPs, Optimal Brain Surgeon", f"{NARROW} --recovery none", "mix"),
    "magnitude": Method("narrower MLPs, least magnitude of weights", score="magnitude"),
    "max-abs": Method("narrower MLPs, least maximum absolute weight", score="max-abs"),
}


def main() -> None:
    """Every cell that was asked for and is not there yet."""
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, given.work or Path(scratch))
        for keep in given.keep:
            for name in given.methods:
                for seed in given.seeds if METHODS[name].statistics else [0]:
                    bench.cell(name, METHODS[name], keep, seed)


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of cells."""
    arguments = bare_parser(about)
    arguments.add_argument("--keep", nargs="*", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments.add_argument("--tokens", type=int, default=32768)
    arguments.add_argument("--self-tokens", type=int, default=65536)
    arguments.add_argument("--calibrate-on", default="wikitext2:1,pydoc:1")
    arguments.add_argument("--texts", default=TEXTS)
    arguments.add_argument("--windows", type=int, default=16)
    arguments.add_argument("--length", type=int, default=512, help="tokens of a window")
    return arguments


def bare_parser(about: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark of rows or cells: the model, and where work and records are."""
    arguments = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default=None)
    arguments.add_argument("--work", type=Path, help="where what rows share, and unfinished work, stay between calls")
    arguments.add_argument("--out", type=Path, help="where the records are")
    return arguments


class Bench:
    """The model, the texts, and the calibrations that several methods share."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        quiet_libraries()
        model = given.model or embedded_model()
        self.model, self.length, self.windows = resolve_model(model), given.length, given.windows
        self.name = model_name(model)
        self.work, self.out = work / self.name, given.out or HERE / "arena" / self.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.texts = dict(text.split("=", 1) for text in given.texts.split(","))
        self.sources = {"self": "self"} | dict.fromkeys(MEASURED, given.calibrate_on)
        self.tokens = dict.fromkeys(MEASURED, given.tokens) | {"self": given.self_tokens, "more": 4 * given.tokens}

    @cached_property
    def dense(self) -> LoadedModel:
        """The dense model in float32, once for all cells."""
        return load_model(self.model, RunContext.create(), "float32")

    def cell(self, name: str, method: Method, keep: float, seed: int) -> None:
        """Measure one cell, unless its record is there, and the dense model before the first."""
        path, small = self.out / f"{name}-{keep:g}-{seed}.json", self.work / f"{name}-{keep:g}-{seed}-small"
        self.measure_dense()
        if not path.is_file():
            settings, numbers = self.make(method, small, keep, seed)
            self.measure(path, method, {"keep": keep, "seed": seed} | settings, numbers, small)
            shutil.rmtree(small, ignore_errors=True)

    def make(self, method: Method, out: Path, keep: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the method's model of this size: what it was made with, and what came of it."""
        if method.score:
            made, cost = run(Path(__file__).with_name("baselines.py"), self.model, out, method.score, keep, MULTIPLE)
            return {"score": method.score, "statistics": None}, made | cost
        settings: dict[str, Any] = {"flags": method.flags, "statistics": method.statistics}
        numbers: dict[str, Any] = {}
        flags = method.flags.split()
        if method.statistics:
            statistics = self.calibration(method.statistics, seed)
            flags += ["--statistics", str(statistics)]
            spent = json.loads(statistics.with_suffix(".json").read_text())
            settings |= {"num_tokens": self.tokens[method.statistics]}
            settings |= {"calibration_text": named(self.sources[method.statistics])}
            numbers |= {f"calibration_{key}": value for key, value in spent.items()}
        more, cost = self.compress(self.model, out, keep, seed, flags)
        return settings | more, numbers | cost

    def compress(
        self, model: Path, out: Path, keep: float, seed: int, flags: list[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`welore compress`: what it was made with, and what came of it."""
        made, cost = welore(
            "compress", model, out, "--keep", keep, "--for", "size", "--seed", seed, "--overwrite", *flags
        )
        keys = ("rank_reduction", "parameter_ratio", "bytes", "lrcs", "largest_excess")
        numbers = {key: made["numbers"][key] for key in keys} | cost
        keys = ("strategy", "scaling", "storage", "min_ratio", "mlp_pruning")
        settings = {key: made["settings"][key] for key in keys}
        if made["settings"]["recovery"]:
            training = made["settings"]["recovery"]
            settings["recovery"] = training | {"text": named(training["text"])}
            kinds = ("healed", "healing_tokens", "healing_seconds", "held_out_loss")
            numbers |= {key: made["numbers"][key] for key in kinds}
        return settings, numbers

    def measure_dense(self) -> None:
        """The record of the dense model, unless it is there."""
        if not (self.out / "dense-1-0.json").is_file():
            self.measure(self.out / "dense-1-0.json", Method("dense"), {"keep": 1.0, "seed": 0}, {}, self.model)

    def measure(
        self, path: Path, method: Method, settings: dict[str, Any], numbers: dict[str, Any], small: Path
    ) -> None:
        """Evaluate a model on every text, and save the record of its cell."""
        for kind, source in self.texts.items():
            config = EvaluationConfig(source, max_length=self.length, num_windows=self.windows, dtype="float32")
            against = None if small == self.model else self.dense.model
            options: Any = {"progress": False, "tokenizer": self.dense.tokenizer}
            measured = evaluate(small, config, against=against, **options).numbers
            for key in ("perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement"):
                numbers |= {f"{key}_{kind}": measured[key]} if key in measured else {}
            numbers.setdefault("bytes", measured["bytes"])
        settings |= {"texts": {kind: named(source) for kind, source in self.texts.items()}}
        settings |= {"max_length": self.length, "num_windows": self.windows}
        inputs = {"row": path.stem.rpartition("-")[0].rpartition("-")[0], "label": method.label, "model": self.name}
        Record("quality", inputs, settings, numbers).save(path)
        print(path.stem, " / ".join(f"{numbers[f'perplexity_{kind}']:.4g}" for kind in self.texts), flush=True)

    def calibration(self, kind: str, seed: int) -> Path:
        """The statistics for a seed, made once; what that took lies beside them."""
        return self.calibrated(self.model, kind, seed, self.sources[kind])

    def calibrated(self, model: Path, kind: str, seed: int, text: str | Path) -> Path:
        """Those of a model and a text."""
        path = self.work / f"{kind}-{self.tokens[kind]}-{seed}.safetensors"
        if not path.is_file():
            how: tuple[Any, ...] = ("--dataset", text, "--num-tokens", self.tokens[kind])
            how = (*how, "--max-length", self.length, "--seed", seed)
            how = (*how, "--measure-losses", MEASURED.get(kind, 0))
            how = (*how, *(("--no-split",) if kind == "whole" else ()))
            _, cost = welore("calibrate", model, *how, "-o", path)
            path.with_suffix(".json").write_text(json.dumps(cost))
        return path


def model_name(model: str | Path) -> str:
    """The last part of a hub id or a path, without the ending of a .gguf file."""
    return re.sub(r"(\.\w+)?\.gguf$", "", Path(model).name)


def named(texts: str) -> str:
    """A mixture of texts as a record names it, without the folders of its files."""
    return re.sub(r"[^,:]*/", "", texts)


def welore(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a verb in a process of its own: its --json, and the seconds and the peak memory that it took."""
    return run("-m", "welore", *arguments, "--json")


def run(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run Python in a process of its own: the JSON that it prints, and the seconds and the peak memory that it took."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"failed: {' '.join(map(str, arguments))}")
        out.seek(0)
        printed = json.load(out)
    return printed, {"seconds": time.perf_counter() - started, "peak_memory_bytes": used.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
