"""Perplexity of every method at equal parameters: one record per cell, which a killed run finds again.

python benchmarks/quality.py [--rows plain-uniform welore ...] [--params 0.9 0.8 ...] [--seeds 0 1 2]
                             [--wikitext FILE] [--calibrate-on FILE] [--heal-on FILE:1,FILE:1,...] [--work DIRECTORY]
                             [--learn FILE:1,FILE:1,...] [--model MODEL --name NAME] [--self-tokens 65536]
                             [--kinds stories=FILE,french=FILE,...]

Texts: WikiText-2 raw test (from the hub, or --wikitext FILE) and the language reference of Python; 16 windows of 512
tokens of each. Calibrated rows read 32k tokens, in bfloat16 where the processor has it, and measure losses on all: half
of the part of the reference that is not evaluated, half of --calibrate-on (FILE, or the training part of WikiText-2);
ours-more reads 128k and measures on a quarter. Data-free rows read what the model writes, 64k as by default, and heal
on it, unless they are only cut; ours-web heals on 64k tokens of --heal-on, texts of neither of the two kinds that are
tested. Controls are the dense model, all of it trained on the same blocks in the same order (on 256k tokens of its own
where what is compared reads 64k of them), the text itself its labels. ours-raw takes 771k tokens of raw text,
--learn and a part of the reference, and reads each once: a teacher, tuned on 459k, is cut by 128k of them and heals on
the other 312k, on which its control is the teacher, tuned on, at two rates. Those 128k are of all that it learned; in
ours-raw-tested of the two kinds that are tested, as in the other calibrated rows: of the first text of --learn, and of
the reference. Where WikiText-2's raw training part cannot be fetched, benchmarks/respell.py makes text of its kind from
articles of Wikipedia. Rows that say so leave long matrices whole (--no-split) and keep all neurons, as all did once.
All are laid out for size (--for size), but for the row anywhere, whose widths are multiples of 16, so that its
parameters are those of the other rows within half a hundredth. Learning rates were chosen on other texts. With --work,
what is finished there is taken as it is, and what was killed goes on where it was; its seconds are then those of the
last part.
--kinds evaluates on texts of other kinds instead of those two; their records have a folder of their own, quality-kinds.
Only rows with a calibration depend on the seed. Records: docs/benchmarks/quality/ROW-PARAMS-SEED.json, of another model
than the embedded one docs/benchmarks/quality-NAME/ROW-PARAMS-SEED.json.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from welore.compression.recovery import recovery_text
from welore.config import RecoveryConfig
from welore.data.mixture import draw, mixed, parse_mixture
from welore.data.text import TextOptions
from welore.data.windows import write_windows
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.load import fastest, read_tokenizer
from welore.models.skeleton import config_of
from welore.records import Record
from welore.training.run_dir import RUN, TUNED, WRITTEN

OUT, EMBEDDED = Path(__file__).parents[1] / "docs" / "benchmarks" / "quality", "SmolLM2-135M-Instruct"
LENGTH, WINDOWS = 512, 16
TOKENS = {"mix": 32768, "whole": 32768, "more": 131072, "raw": 131072, "tested": 131072, "self": 65536}
MEASURED = {"mix": 1, "whole": 1, "more": 0.25}  # share of them on which losses are measured, else none
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
FAST = fastest("cpu")
DTYPE, ATTENTION = FAST["dtype"], FAST["attention"] or "sdpa"
HEALING = (
    f"--batch-size 2 --max-length {LENGTH} --dtype {DTYPE} --attention {ATTENTION} --eval-steps 64 --max-eval-samples 8"
)
AS_HEALED = (65536, 58)  # tokens and steps of `welore compress --heal`
RAW = {"first": 896, "rest": 609}  # windows that are learned first, and healed on
READ = {"raw": "first", "tested": "tested"}  # what calibrations read of the raw text: see Bench.raw


@dataclass(frozen=True)
class Tuning:
    """A full fine-tuning: a text of the benchmark, its tokens, a tenth of which is held out, steps and learning rate.

    of: the control that is tuned on, instead of the dense model; part: of RAW, where the text is raw.
    """

    text: str
    tokens: int
    steps: int
    rate: float
    of: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: its name in print, the flags of `welore compress`, and what it is calibrated on."""

    label: str
    flags: str = ""  # {raw} and {web} stand for the texts
    calibration: str | None = None  # a kind of TOKENS, or None
    tuned: Tuning | None = None
    of: str | None = None  # the control that is compressed instead of the dense model
    controls: tuple[str, ...] = ()  # of CONTROLS


OURS_RAW = Row(
    "dense model tuned on 459k tokens of raw text, then preset best, recovered on 312k others",
    f"--recovery {{rest}} --num-tokens {RAW['rest'] * LENGTH}",
    "raw",
    of="dense-tuned-first",
    controls=("dense-tuned-first", "dense-tuned-on", "dense-tuned-on-fast"),
)
ROWS = {
    "plain-uniform": Row("plain SVD, uniform", "--scaling none --strategy uniform --storage factored"),
    "welore": Row("WeLore as published (`--preset paper`)", "--paper"),
    "plain-waterfill": Row("plain SVD, water-filling", "--scaling none --strategy waterfill --storage factored"),
    "asvd": Row("ASVD, uniform", "--scaling asvd --strategy uniform --storage factored", "mix"),
    "svd-llm": Row("whitening, uniform (SVD-LLM)", "--scaling whitening --strategy uniform --storage factored", "mix"),
    "input-waterfill": Row("whitening, water-filling", "--scaling whitening --storage factored", "mix"),
    "kfac-factored": Row(
        "K-FAC, water-filling, factored", "--scaling kfac --storage factored --no-split --mlp-pruning 0", "whole"
    ),
    "ours-whole": Row(
        "K-FAC, water-filling, smaller storage form", "--recovery none --no-split --mlp-pruning 0", "whole"
    ),
    "ours-more": Row("preset best, statistics of 128k tokens of text, no recovery", "--recovery none", "more"),
    "ours-self": Row("preset best, no data, no recovery", "--recovery none", "self"),
    "ours-default": Row("preset best, no data", "", "self"),
    "anywhere": Row("narrower MLPs alone (`--for anywhere`), no data", "--for anywhere --rank-multiple 16", "self"),
    "ours-web": Row(
        "preset best, recovered on 64k tokens of web pages",
        "--recovery {web}",
        "self",
        controls=("dense-tuned-web",),
    ),
    "ours-raw": OURS_RAW,
    "ours-raw-tested": replace(
        OURS_RAW,
        label="the same tuned model, statistics of the two tested kinds, recovered on the same 312k",
        calibration="tested",
    ),
}
CONTROLS = {  # the dense model, all of it tuned in the same way, at the best of 1e-5, 3e-5 and 1e-4, and one at another
    "dense-tuned": Row("dense, tuned on the same 256k tokens", tuned=Tuning("self", 262144, 256, 1e-5)),
    "dense-tuned-web": Row("dense, tuned on the same 64k tokens of web pages", tuned=Tuning("web", *AS_HEALED, 1e-4)),
    "dense-tuned-first": Row(
        "dense, tuned on the same 459k tokens of raw text",
        tuned=Tuning("raw", RAW["first"] * LENGTH, 403, 1e-4, part="first"),
    ),
    "dense-tuned-on": Row(
        "dense, tuned on the 459k and then on the same 312k, at 3e-5",
        tuned=Tuning("raw", RAW["rest"] * LENGTH, 274, 3e-5, of="dense-tuned-first", part="rest"),
    ),
    "dense-tuned-on-fast": Row(
        "dense, tuned on the 459k and then on the same 312k, at 1e-4 (worse on held-out text)",
        tuned=Tuning("raw", RAW["rest"] * LENGTH, 274, 1e-4, of="dense-tuned-first", part="rest"),
    ),
}


def main() -> None:
    """Every cell that was asked for and is not there yet."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="*", default=list(ROWS), choices=[*ROWS, *CONTROLS])
    arguments.add_argument("--params", nargs="*", type=float, default=list(RATIOS))
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments.add_argument("--wikitext", default="wikitext2")
    arguments.add_argument("--calibrate-on", default="wikitext2")
    arguments.add_argument("--heal-on", default="c4")
    arguments.add_argument("--learn", default="wikitext2:7,c4:10.5")
    arguments.add_argument("--kinds", default="", help="texts to evaluate on instead: stories=FILE,french=FILE")
    arguments.add_argument("--work", type=Path, default=None, help="where calibrations are kept between calls")
    arguments.add_argument("--self-tokens", type=int, default=TOKENS["self"])
    arguments.add_argument("--model", default=None)
    arguments.add_argument("--name", default=EMBEDDED)
    given = arguments.parse_args()
    if (given.model is None) != (given.name == EMBEDDED):
        arguments.error("--model and --name go together")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, given.work or Path(scratch))
        bench.cell("dense", Row("dense"), 1.0, 0)
        rows = [row for row in given.rows if row in ROWS]
        controls = [row for row in given.rows if row in CONTROLS]
        for name in [*controls, *(name for row in rows for name in ROWS[row].controls)]:
            for seed in given.seeds:
                bench.cell(name, CONTROLS[name], 1.0, seed)
        for ratio in given.params:
            for name in rows:
                for seed in given.seeds if ROWS[name].calibration else [0]:
                    bench.cell(name, ROWS[name], ratio, seed)


class Bench:
    """The model, the texts, and the calibrations that several rows share."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.work, self.name = work / given.name, given.name
        self.work.mkdir(parents=True, exist_ok=True)
        parts = [OUT.name, *([given.name] if given.model else []), *(["kinds"] if given.kinds else [])]
        self.out = OUT.with_name("-".join(parts))
        self.model = resolve_model(given.model or embedded_model())
        self.texts = {"wikitext2": given.wikitext, "pydoc": "pydoc"}
        if given.kinds:
            self.texts = dict(text.split("=", 1) for text in given.kinds.split(","))
        self.sources = {"self": "self", "web": given.heal_on}
        self.sources["mix"] = self.sources["whole"] = self.sources["more"] = f"{given.calibrate_on}:1,pydoc:1"
        self.sources["raw"] = f"{given.learn},pydoc:1"
        self.tokens = TOKENS | {"self": given.self_tokens}

    def cell(self, name: str, row: Row, ratio: float, seed: int) -> None:
        """Measure one cell, unless its record is there."""
        path = self.out / f"{name}-{ratio:g}-{seed}.json"
        if path.is_file():
            return
        settings: dict[str, Any] = {"keep": ratio, "seed": seed, "flags": row.flags, "statistics": row.calibration}
        numbers: dict[str, Any] = {}
        made = self.work / f"{name}-{ratio:g}-{seed}-small"
        small = made if ratio < 1 else self.model
        if ratio < 1:
            about, numbers = self.compressed(row, small, ratio, seed)
            settings |= about
        if row.tuned:
            small, cost = self.tuned(row.tuned, f"{name}-{ratio:g}-{seed}", seed)
            numbers |= {f"tuning_{key}": value for key, value in cost.items()}
            how = f"--method full --max-steps {row.tuned.steps} {HEALING}"
            settings |= {"tuned": how, "learning_rate": row.tuned.rate, "text": named(self.sources[row.tuned.text])}
        for kind, source in self.texts.items():
            windows = ("--max-length", LENGTH, "--num-windows", WINDOWS, "--dtype", "float32")
            found, _ = welore("evaluate", small, "--dataset", source, *windows)
            numbers[f"perplexity_{kind}"] = found["numbers"]["perplexity"]
            numbers.setdefault("bytes", found["numbers"]["bytes"])
        inputs = {"row": name, "label": row.label, "model": self.name}
        if self.texts.keys() != {"wikitext2", "pydoc"}:
            settings["texts"] = {kind: named(source) for kind, source in self.texts.items()}
        Record("quality", inputs, settings | {"max_length": LENGTH, "num_windows": WINDOWS}, numbers).save(path)
        shutil.rmtree(made, ignore_errors=True)
        print(name, ratio, seed, " / ".join(f"{numbers[f'perplexity_{kind}']:.4g}" for kind in self.texts), flush=True)

    def compressed(self, row: Row, out: Path, ratio: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the row's model of this size: what it was made with, and what came of it."""
        settings: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        flags = row.flags.format(**self.sources, rest=self.raw("rest", seed) if row.of else None).split()
        model = self.control(row.of, seed) if row.of else self.model
        if row.calibration:
            statistics = self.calibration(row.calibration, seed, model)
            flags += ["--statistics", str(statistics)]
            spent = json.loads(statistics.with_suffix(".json").read_text())
            settings = {"num_tokens": self.tokens[row.calibration]}
            if row.of:
                text = ",".join(self.tested()) if row.calibration == "tested" else self.sources["raw"]
                settings |= {"of": row.of, "text": named(text)}
            numbers = {f"calibration_{key}": value for key, value in spent.items()}
        if row.of:
            spent = Record.load(self.out / f"{row.of}-1-{seed}.json").numbers
            numbers |= {key: spent[key] for key in ("tuning_seconds", "tuning_peak_memory_bytes")}
        made, cost = welore(
            "compress", model, out, "--keep", ratio, "--for", "size", "--seed", seed, "--overwrite", *flags
        )
        keys = ("rank_reduction", "parameter_ratio", "bytes", "lrcs", "largest_excess")
        numbers |= {key: made["numbers"][key] for key in keys} | cost
        settings |= {
            key: made["settings"][key] for key in ("strategy", "scaling", "storage", "min_ratio", "mlp_pruning")
        }
        if made["settings"]["recovery"]:
            healing = made["settings"]["recovery"]
            settings["recovery"] = healing | {"text": named(self.sources["raw"] if row.of else healing["text"])}
            kinds = ("healed", "healing_tokens", "healing_seconds", "held_out_loss")
            numbers |= {key: made["numbers"][key] for key in kinds}
        return settings, numbers

    def tuned(self, tuning: Tuning, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The dense model, fine-tuned on a text that is the same for every row with this seed; and what that took."""
        text, run = self.work / f"{tuning.text}-text-{tuning.tokens}-{seed}" / WRITTEN, self.work / name
        flags: list[Any] = ["--method", "full", *HEALING.split()]
        if tuning.part:
            text = self.raw(tuning.part, seed)
        elif tuning.text != "self" and not text.is_file():
            config = RecoveryConfig(dataset=self.sources[tuning.text], num_tokens=tuning.tokens)
            windows = recovery_text(config, config_of(self.model), read_tokenizer(self.model), seed, TextOptions())
            write_windows(text, windows)
        flags += ["--dataset", text] if text.is_file() else ["--dataset", "self", "--self-tokens", tuning.tokens]
        flags += ["--max-steps", tuning.steps, "--learning-rate", tuning.rate, "--seed", seed]
        flags += ["--save-steps", 64, "--resume" if (run / RUN).is_file() else "--overwrite"]
        model = self.control(tuning.of, seed) if tuning.of else self.model
        if not (run / TUNED).is_file():
            welore("finetune", model, run, *flags)
        if not text.is_file():
            text.parent.mkdir(exist_ok=True)
            shutil.copyfile(run / WRITTEN, text)
        keys = ("tokens", "trainable_parameters", "tokens_per_second", "train_loss", "evaluation", "seconds")
        numbers = Record.load(run / TUNED).numbers  # without a speed where only the saving was left to do
        return run / "model", {key: numbers[key] for key in (*keys, "peak_memory_bytes") if key in numbers}

    def raw(self, part: str, seed: int) -> Path:
        """A part of the raw text: a file of windows in random order.

        Those of `first` and of `rest` are in no other; `tested` are those of `first` that are of the kinds of the test.
        """
        at = self.work / f"raw-text-{seed}"
        if not (at / f"{part}.safetensors").is_file():
            tokens = sum(RAW.values()) * LENGTH
            _, found = draw(self.sources["raw"], tokens, read_tokenizer(self.model), LENGTH, seed=seed)
            windows, names = mixed(found, seed)
            first, rest = windows.split(list(RAW.values()))
            prose, reference = (first[[n == kind for n in names[: len(first)]]] for kind in self.tested())
            tested = torch.cat([prose[: self.tokens["tested"] // LENGTH - len(reference)], reference])
            for name, chosen in {"first": first, "rest": rest, "tested": tested}.items():
                write_windows(at / f"{name}.safetensors", chosen)
        return at / f"{part}.safetensors"

    def tested(self) -> tuple[str, str]:
        """The raw texts that are of the kinds of the test: as WikiText-2, and the reference."""
        first, *_, last = parse_mixture(self.sources["raw"])
        return first, last

    def control(self, name: str, seed: int) -> Path:
        """A control's model: made again if it is no longer there."""
        tuning = CONTROLS[name].tuned
        assert tuning
        return self.tuned(tuning, f"{name}-1-{seed}", seed)[0]

    def calibration(self, kind: str, seed: int, model: Path) -> Path:
        """The statistics for a seed, made once; what that took lies beside them."""
        path = self.work / f"{kind}-{seed}.safetensors"
        if not path.is_file():
            text = self.raw(READ[kind], seed) if kind in READ else self.sources[kind]
            how: tuple[Any, ...] = ("--dataset", text, "--num-tokens", self.tokens[kind])
            how = (*how, "--max-length", LENGTH, "--seed", seed)
            # Its own text is read as compress does it.
            how = (*how, "--measure-losses", MEASURED.get(kind, 0), *(() if kind == "self" else ("--dtype", DTYPE)))
            how = (*how, *(("--no-split",) if kind == "whole" else ()))
            _, cost = welore("calibrate", model, *how, "-o", path)
            path.with_suffix(".json").write_text(json.dumps(cost))
        return path


def named(texts: str) -> str:
    """A mixture of texts as a record names it, without the folders of its files."""
    return re.sub(r"[^,:]*/", "", texts)


def welore(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a verb in a process of its own: its --json, and the seconds and the peak memory that it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "welore", *map(str, arguments), "--json"]
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(command, stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"failed: {' '.join(map(str, arguments))}")
        out.seek(0)
        found = json.load(out)
    return found, {"seconds": time.perf_counter() - started, "peak_memory_bytes": used.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
