"""The six tasks by several fine-tuning methods, on the dense model and on compressed ones: one record per row.

python benchmarks/tasks.py [MODEL] [--models dense ours-0.8 paper] [--tasks svamp ...] [--methods full lora galore lrc]
                           [--rates 1e-4 ...] [--seeds 0] [--best] [--steps 150] [--batch-size 8] [--limit 150]
                           [--data DIR] [--work DIR] [--out DIR]

A row is a model, a task, a method, a learning rate and a seed. MODEL: a hub id, a directory or a .gguf file; by default
the embedded model. ours-0.8 is preset best at 80 % of the parameters, with statistics and recovery on --tokens that the
model writes; paper is WeLore as published at the rank reduction --paper-err. On the dense model lrc trains the matrices
that are factored in `paper`: a control. Every model is also scored before it is trained (method `before`).

--data: a directory with the tasks' original files, or "generated" (coin_flip and object_tracking only). If only BoolQ's
evaluation file is there, its first 70 % are for training and the rest for evaluation.

First look for learning rates, then train the best with other seeds and score these models:

    python benchmarks/tasks.py --data DIR --limit 0
    python benchmarks/tasks.py --data DIR --best

--limit: questions of the evaluation part that are asked, 0: none. --best: of each model, task and method only the
learning rate with the lowest held-out loss in the records that are there, with seeds 1 and 2. The held-out part is the
last tenth of the training items. Products are in bfloat16 where the processor multiplies it, attention is eager.

A row is a process of its own, with one thread. Tokens per second are of processor time, and memory is the peak of the
process in training. Rows that are there are not made again, a row that was killed begins anew, and several calls at
once share the rows. Records: OUT/MODEL-TASK-METHOD-RATE-SEED.json, by default in docs/benchmarks/tasks;
benchmarks/tables.py makes the tables.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback

import arena
from tables import BEFORE, best_rate, task_rows
from welore.cli.output import quiet_libraries
from welore.config import FinetuneConfig, MethodName, RunConfig, ScoreConfig, choices
from welore.errors import DivergedError
from welore.evaluation.accuracy import score
from welore.evaluation.tasks import TASKS
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.load import fastest, load_model
from welore.records import Record
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL
from welore.training.trainer import peak_memory

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DENSE, PAPER = "dense", "paper"
MODELS: dict[str, tuple[str, str]] = {  # name -> in print, flags of `welore compress`
    DENSE: ("the dense model", ""),
    "ours-0.8": ("preset best, 80 % of the parameters", "--keep 0.8 --for size --num-tokens {tokens}"),
    PAPER: ("WeLore as published, ERR {paper_err}", "--preset paper --rank-reduction {paper_err}"),
}
RATES = {  # three of each method, a decade apart at most; other methods take those of full
    "full": (3e-5, 1e-4, 3e-4),
    "lrc": (1e-4, 3e-4, 1e-3),
    "nlrc": (1e-4, 3e-4, 1e-3),
    "galore": (1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "dora": (3e-4, 1e-3, 3e-3),
    "updates": (3e-4, 1e-3, 3e-3),
    "rslora": (1e-4, 3e-4, 1e-3),
}
ORDER = ("coin_flip", "svamp", "strategy_qa", "commonsense_qa", "object_tracking", "boolq")  # the short ones first
TRAIN_SHARE = 0.7  # of BoolQ's evaluation file where there is no other
FAST = fastest("cpu")


def main() -> None:
    """Every row that was asked for and is not there yet; `--job` is what a process of its own does."""
    arguments = parser()
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(done(json.loads(sys.argv[2]))))
        return
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(given, given.work or Path(scratch))
        for task, model in ((task, model) for task in given.tasks for model in given.models):
            if given.limit:
                bench.row(model, task, BEFORE)
            for method, rate, seed in bench.asked(model, task):
                bench.row(model, task, method, rate, seed)


def parser() -> argparse.ArgumentParser:
    """The options."""
    arguments = arena.bare_parser(__doc__)
    arguments.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    arguments.add_argument("--tasks", nargs="*", default=list(ORDER), choices=list(TASKS))
    arguments.add_argument(
        "--methods", nargs="*", default=["full", "lora", "galore", "lrc"], choices=choices(MethodName)
    )
    arguments.add_argument("--rates", nargs="*", type=float, help="in place of three of each method's own")
    arguments.add_argument("--seeds", nargs="*", type=int, help="0; with --best 1 and 2")
    arguments.add_argument("--best", action="store_true", help="the best rate alone")
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--max-length", type=int, default=256)
    arguments.add_argument("--eval-items", type=int, default=48, help="held-out items")
    arguments.add_argument("--limit", type=int, default=150, help="questions")
    arguments.add_argument("--tokens", type=int, default=16384, help="of the statistics and the recovery of ours")
    arguments.add_argument("--paper-err", type=float, default=0.1)
    arguments.add_argument("--data", default="generated")
    return arguments


class Bench:
    """The models and the data of all rows."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        quiet_libraries()
        model = given.model or embedded_model()
        self.given, self.dense = given, resolve_model(model)
        self.work, self.out = work.resolve(), given.out or HERE / "tasks"
        self.work.mkdir(parents=True, exist_ok=True)
        self.inputs = {"model": arena.model_name(model)}
        self.own = {"tokens": given.tokens, "paper_err": f"{given.paper_err:g}"}

    def asked(self, model: str, task: str) -> Iterator[tuple[str, float, int]]:
        """The method, learning rate and seed of the rows of a model and a task."""
        for method in self.given.methods:
            rates = self.given.rates or RATES.get(method, RATES["full"])
            if self.given.best:
                best = best_rate(task_rows(self.out), model, task, method)
                rates = () if best is None else (best,)
            for rate in rates:
                for seed in self.given.seeds or ((1, 2) if self.given.best else (0,)):
                    yield method, rate, seed

    def row(self, model: str, task: str, method: str, rate: float | None = None, seed: int = 0) -> None:
        """Measure a row, unless its record is there or another call is at work on it."""
        name = f"{model}-{task}-{method}" + ("" if rate is None else f"-{rate:g}-{seed}")
        path, settings = self.out / f"{name}.json", self.settings(model, task, method, rate, seed)
        try:
            with FileLock(self.work / f"{name}.lock").acquire(blocking=False):
                if path.is_file():
                    refuse_other(path, settings)
                else:
                    self.measure(path, settings)
        except Timeout:
            print(f"{name}: another call is at work on it", flush=True)

    def settings(self, model: str, task: str, method: str, rate: float | None, seed: int) -> dict[str, Any]:
        """What a record says of its row."""
        given = self.given
        settings = {
            **{"row": model, "task": task, "method": method, **FAST},
            **{"task_dataset": Path(self.data(task)).name, "limit": given.limit},
            "compression": MODELS[model][1].format(**self.own),
        }
        if method == BEFORE:
            return settings
        return settings | {
            **{"learning_rate": rate, "seed": seed, "max_steps": given.steps, "batch_size": given.batch_size},
            **{"max_length": given.max_length, "eval_steps": given.steps, "max_eval_samples": given.eval_items},
            **{"save_steps": 0, "control": model == DENSE and method in ("lrc", "nlrc")},
        }

    def measure(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Train and score in a process of its own, and save the record."""
        model, data = self.model(settings["row"]), self.data(settings["task"])
        fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
        training = {key: value for key, value in settings.items() if key in fields} | {"task_dataset": data}
        job = {
            "model": str(model),
            "plan": str(self.model(PAPER) / "plan.json") if settings.get("control") else None,
            "training": None if settings["method"] == BEFORE else training,
            "score": {"task": settings["task"], "dataset": data, "limit": settings["limit"]},
            "work": str(self.work),
        }
        numbers, cost = arena.run(Path(__file__), "--job", json.dumps(job))
        compression = Record.load_if_there(model / "compression.json")
        if compression is not None:
            numbers |= {key: compression.numbers[key] for key in ("rank_reduction", "parameter_ratio", "bytes")}
        label = MODELS[settings["row"]][0].format(**self.own)
        numbers["seconds"] = cost["seconds"]
        Record("task", self.inputs | {"label": label}, dict(settings), numbers).save(path)
        told = {key: numbers.get(key) for key in ("eval_loss", "accuracy", "majority_rate", "tokens_per_second")}
        print(path.stem, told, f"{cost['seconds']:.0f} s", flush=True)

    def model(self, name: str) -> Path:
        """The directory of a model, made once."""
        if name == DENSE:
            return self.dense
        flags = MODELS[name][1].format(**self.own)
        path = self.work / f"{self.inputs['model']}{flags.replace(' ', '')}"
        with FileLock(f"{path}.lock"):
            if not path.is_dir():
                arena.welore("compress", self.dense, path, "--workers", 1, *flags.split())
        return path

    def data(self, task: str) -> str:
        """The data of a task: a directory, or "generated"."""
        directory = Path(self.given.data)
        if task != "boolq" or not directory.is_dir() or any(directory.glob(TASKS[task].files["train"])):
            return str(self.given.data)
        cut = self.work / "first-70-percent-of-dev"
        with FileLock(f"{cut}.lock"):
            if not cut.is_dir():
                (file,) = directory.glob(TASKS[task].files["evaluation"])
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                border = int(TRAIN_SHARE * len(lines))
                with tempfile.TemporaryDirectory(dir=self.work) as unfinished:
                    parts = {"boolq_train.jsonl": lines[:border], "boolq_dev.jsonl": lines[border:]}
                    for name, part in parts.items():
                        (Path(unfinished) / name).write_text("".join(part), encoding="utf-8")
                    shutil.copytree(unfinished, cut)
        return str(cut)


def refuse_other(path: Path, settings: Mapping[str, Any]) -> None:
    """End with a sentence if the record of a row has other settings than those that are asked for."""
    before = Record.load(path).settings
    for key in (key for key in settings if key != "limit" and settings[key] != before.get(key)):
        raise SystemExit(f"{path} has {key} {before.get(key)!r}, now it is {settings[key]!r}: give another --out")


class Clock(TrainerCallback):
    """Adds up the processor seconds of steps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.seconds -= time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends."""
        self.seconds += time.process_time()


def done(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model, unless there is nothing to train, and score it: the numbers of a row."""
    quiet_libraries()
    torch.set_num_threads(1)
    context = RunContext.create(device="cpu", progress=False)
    numbers: dict[str, Any] = {"imports_bytes": peak_memory(context.device)["peak_memory_bytes"]}
    model, training = Path(job["model"]), job["training"]
    with tempfile.TemporaryDirectory(dir=job["work"]) as directory:
        if training is not None:
            clock, out = Clock(), Path(directory) / "run"
            config, options = FinetuneConfig(**training), RunConfig(device="cpu", progress=False).options
            try:
                run = finetune(model, out, config, plan=job["plan"], callbacks=[clock], **options)
            except DivergedError as error:
                return numbers | {"diverged": str(error), "eval_loss": None}
            model = out / MODEL
            keys = ("eval_loss", "tokens", "trainable_parameters", "total_parameters", "peak_memory_bytes", "items_cut")
            numbers |= {key: run.numbers[key] for key in (*keys, "train_loss", "parameter_ratio")}
            numbers |= {"eval_loss_before": run.numbers["evaluation"][0][1]}
            numbers |= {"tokens_per_second": run.numbers["tokens"] / clock.seconds}
        if job["score"]["limit"]:
            loaded = load_model(model, context, FAST["dtype"], attention=FAST["attention"])
            asked = ScoreConfig(**job["score"], batch_size=16)
            scored = score(loaded.model, asked, tokenizer=loaded.tokenizer, device="cpu", progress=False)
            keys = ("accuracy", "ci95_low", "ci95_high", "majority_rate", "n", "unparsable")
            numbers |= {key: scored.numbers[key] for key in keys}
    return numbers


if __name__ == "__main__":
    main()
