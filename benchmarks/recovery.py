"""Recovery on text that people wrote, and the dense model tuned on the same text: one record per cell.

python benchmarks/recovery.py [MODEL] [--rows ours-web ...] [--heal-on FILE:1,FILE:1,...] [--learn FILE:1,FILE:1,...]
                              and the options of benchmarks/arena.py: --keep, --seeds, --texts, --work ...

ours-web: preset best without data (statistics of --self-tokens that the model wrote), recovered on 64k tokens of
--heal-on, texts of neither of the kinds that are tested. Controls are the dense model, all of it trained on the same
blocks in the same order (on 256k tokens of its own where the rows of benchmarks/arena.py read 64k of them), the text
itself its labels. ours-raw takes 771k tokens of raw text, --learn and a part of the reference, and reads each once: a
teacher, tuned on 459k, is cut by 128k of them and heals on the other 312k, on which its control is the teacher, tuned
on, at two rates. Those 128k are of all that it learned; in ours-raw-tested of the two kinds that are tested: of the
first text of --learn, and of the reference. Where WikiText-2's raw training part cannot be fetched,
benchmarks/respell.py makes text of its kind from articles of Wikipedia. Learning rates were chosen on other texts.

Records: docs/benchmarks/quality/ROW-KEEP-SEED.json, beside those of benchmarks/arena.py.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import arena
from arena import HERE, Method, named, welore
from welore.compression.recovery import recovery_text
from welore.config import RecoveryConfig
from welore.data.mixture import draw, mixed, parse_mixture
from welore.data.text import TextOptions
from welore.data.windows import write_windows
from welore.models.load import fastest, read_tokenizer
from welore.models.skeleton import config_of
from welore.records import Record
from welore.training.run_dir import RUN, TUNED, WRITTEN

FAST = fastest("cpu")
DTYPE, ATTENTION = FAST["dtype"], FAST["attention"] or "sdpa"
LENGTH, CALIBRATION = 512, 131072  # tokens of a window; of the statistics of raw text
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
    """A method of benchmarks/arena.py, and the dense models beside it.

    method: its flags may hold {raw}, {rest} and {web}, the texts. of: the control that is compressed instead of the
    dense model. controls: of CONTROLS.
    """

    method: Method
    controls: tuple[str, ...]
    of: str | None = None


OURS_RAW = Row(
    Method(
        "dense model tuned on 459k tokens of raw text, then preset best, recovered on 312k others",
        f"--recovery {{rest}} --num-tokens {RAW['rest'] * LENGTH}",
        "raw",
    ),
    ("dense-tuned-first", "dense-tuned-on", "dense-tuned-on-fast"),
    "dense-tuned-first",
)
TESTED = "the same tuned model, statistics of the two tested kinds, recovered on the same 312k"
ROWS = {
    "ours-web": Row(
        Method("preset best, recovered on 64k tokens of web pages", "--recovery {web}", "self"), ("dense-tuned-web",)
    ),
    "ours-raw": OURS_RAW,
    "ours-raw-tested": replace(OURS_RAW, method=replace(OURS_RAW.method, label=TESTED, statistics="tested")),
}
# The dense model, all of it tuned in the same way, at the best of 1e-5, 3e-5 and 1e-4, and one at another rate.
CONTROLS = {
    "dense-tuned": ("dense, tuned on the same 256k tokens", Tuning("self", 262144, 256, 1e-5)),
    "dense-tuned-web": ("dense, tuned on the same 64k tokens of web pages", Tuning("web", *AS_HEALED, 1e-4)),
    "dense-tuned-first": (
        "dense, tuned on the same 459k tokens of raw text",
        Tuning("raw", RAW["first"] * LENGTH, 403, 1e-4, part="first"),
    ),
    "dense-tuned-on": (
        "dense, tuned on the 459k and then on the same 312k, at 3e-5",
        Tuning("raw", RAW["rest"] * LENGTH, 274, 3e-5, of="dense-tuned-first", part="rest"),
    ),
    "dense-tuned-on-fast": (
        "dense, tuned on the 459k and then on the same 312k, at 1e-4 (worse on held-out text)",
        Tuning("raw", RAW["rest"] * LENGTH, 274, 1e-4, of="dense-tuned-first", part="rest"),
    ),
}


def main() -> None:
    """Every cell that was asked for and is not there yet."""
    arguments = arena.parser(__doc__)
    arguments.add_argument("--rows", nargs="*", default=list(ROWS), choices=[*ROWS, *CONTROLS])
    arguments.add_argument("--heal-on", default="c4")
    arguments.add_argument("--learn", default="wikitext2:7,c4:10.5")
    arguments.set_defaults(out=HERE / "quality")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, given.work or Path(scratch))
        rows = [row for row in given.rows if row in ROWS]
        controls = [row for row in given.rows if row in CONTROLS]
        for name in [*controls, *(name for row in rows for name in ROWS[row].controls)]:
            for seed in given.seeds:
                bench.control_cell(name, seed)
        for keep in given.keep:
            for name in rows:
                for seed in given.seeds:
                    bench.cell(name, ROWS[name], keep, seed)


class Bench:
    """The model and the texts of benchmarks/arena.py, with those that are learned."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.arena = arena.Bench(given, work)
        self.work, self.model = self.arena.work, self.arena.model
        self.sources = self.arena.sources | {"web": given.heal_on, "raw": f"{given.learn},pydoc:1"}
        self.arena.tokens |= dict.fromkeys(READ, CALIBRATION)

    def cell(self, name: str, row: Row, keep: float, seed: int) -> None:
        """Measure a compressed model, unless its record is there."""
        path, small = self.arena.out / f"{name}-{keep:g}-{seed}.json", self.work / f"{name}-{keep:g}-{seed}-small"
        if path.is_file():
            return
        kind = row.method.statistics
        assert kind
        model = self.control(row.of, seed) if row.of else self.model
        flags = row.method.flags.format(**self.sources, rest=self.raw("rest", seed) if row.of else None).split()
        text = self.raw(READ[kind], seed) if kind in READ else self.sources[kind]
        statistics = self.arena.calibrated(model, kind, seed, text)
        made, cost = self.arena.compress(model, small, keep, seed, [*flags, "--statistics", str(statistics)])
        settings: dict[str, Any] = {"keep": keep, "seed": seed, "flags": row.method.flags, "statistics": kind}
        settings |= {"num_tokens": self.arena.tokens[kind]} | made
        spent = json.loads(statistics.with_suffix(".json").read_text())
        numbers = cost | {f"calibration_{key}": value for key, value in spent.items()}
        if row.of:
            read = ",".join(self.tested()) if kind == "tested" else self.sources["raw"]
            settings |= {"of": row.of, "text": named(read)}
            settings["recovery"] = settings["recovery"] | {"text": named(self.sources["raw"])}
            spent = Record.load(self.arena.out / f"{row.of}-1-{seed}.json").numbers
            numbers |= {key: spent[key] for key in ("tuning_seconds", "tuning_peak_memory_bytes")}
        self.arena.measure(path, row.method, settings, numbers, small)
        shutil.rmtree(small, ignore_errors=True)

    def control_cell(self, name: str, seed: int) -> None:
        """Measure a tuned dense model, unless its record is there."""
        path, (label, tuning) = self.arena.out / f"{name}-1-{seed}.json", CONTROLS[name]
        if path.is_file():
            return
        small, cost = self.tuned(tuning, path.stem, seed)
        how = f"--method full --max-steps {tuning.steps} {HEALING}"
        settings = {"keep": 1.0, "seed": seed, "flags": "", "statistics": None, "tuned": how}
        settings |= {"learning_rate": tuning.rate, "text": named(self.sources[tuning.text])}
        numbers = {f"tuning_{key}": value for key, value in cost.items()}
        self.arena.measure(path, Method(label), settings, numbers, small)

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
            tested = torch.cat([prose[: CALIBRATION // LENGTH - len(reference)], reference])
            for name, chosen in {"first": first, "rest": rest, "tested": tested}.items():
                write_windows(at / f"{name}.safetensors", chosen)
        return at / f"{part}.safetensors"

    def tested(self) -> tuple[str, str]:
        """The raw texts that are of the kinds of the test: as WikiText-2, and the reference."""
        first, *_, last = parse_mixture(self.sources["raw"])
        return first, last

    def control(self, name: str, seed: int) -> Path:
        """A control's model: made again if it is no longer there."""
        return self.tuned(CONTROLS[name][1], f"{name}-1-{seed}", seed)[0]


if __name__ == "__main__":
    main()
