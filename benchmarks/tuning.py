"""Speed and memory of fine-tuning: LRC-only against full, SmolLM2 at ERR 50 %, batches of 4 x 256: a record.

Every measurement is a process of its own, because a peak of memory cannot be undone; configurations are interleaved,
and what counts is the median over the rounds of the ratio within a round. One thread, and seconds are seconds of
processor time: on an idle machine they are those of the clock, and on a busy one they hardly change. Ranks are
multiples of 16 (`--rank-multiple`), so that there are few shapes to compile products for.

Two baselines: `full`, everything trained in float32 with our engine, and `full, whole logits`, the same as the stock
Trainer does it. Two measures of memory: the peak resident set of the process, and its part above what the imports
take, which is what a GPU's allocator would count. The bound counts multiplications: full fine-tuning takes
6 (P + H) per token and parameter, LRC-only 4 (P + H) + 2 P_lrc, as frozen matrices have no gradient of weights;
P: blocks, H: head.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import welore
from welore.config import CompressionConfig
from welore.models.embedded import embedded_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
SETTINGS = {
    "dataset": "pydoc",
    "batch_size": 4,
    "max_length": 256,
    "eval_steps": 0,
    "save_steps": 0,
    "learning_rate": 1e-4,
}
RANK_REDUCTION, RANK_MULTIPLE, BASE, STOCK = 0.5, 16, "full", "full, whole logits"
SELECTIVE, EVERYTHING = {"selective_checkpointing": True}, {"gradient_checkpointing": True}
BFLOAT16, EAGER = {"dtype": "bfloat16"}, {"attention": "eager"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    BASE: {"method": "full"},
    STOCK: {"method": "full", "whole_logits": True},
    "full, bfloat16": {"method": "full"} | BFLOAT16,
    "lrc": {"method": "lrc"},
    "lrc, selective": {"method": "lrc"} | SELECTIVE,
    "lrc, checkpointing": {"method": "lrc"} | EVERYTHING,
    "lrc, bfloat16": {"method": "lrc"} | BFLOAT16,
    "lrc, bfloat16, selective": {"method": "lrc"} | BFLOAT16 | SELECTIVE,
    "lrc, bfloat16, checkpointing": {"method": "lrc"} | BFLOAT16 | EVERYTHING,
    "lrc, bfloat16, eager": {"method": "lrc"} | BFLOAT16 | EAGER,
    "lrc, bfloat16, eager, selective": {"method": "lrc"} | BFLOAT16 | EAGER | SELECTIVE,
}
CHILD = """
import json, os, sys, time
import transformers.models.llama.modeling_llama
from transformers import TrainerCallback
from welore.config import FinetuneConfig
from welore.training.finetune import finetune
from welore.training.trainer import FinetuneTrainer

WARM_UP = 2  # steps that are not timed: memory is allocated and caches are filled then
spent = []  # of every step, processor seconds by part


def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def timed(part):
    method = getattr(FinetuneTrainer, part)

    def run(*args, **kwargs):
        started = time.process_time()
        result = method(*args, **kwargs)
        spent[-1][part] += time.process_time() - started
        return result

    setattr(FinetuneTrainer, part, run)


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        spent.append({"step": -time.process_time(), "compute_loss": 0.0, "training_step": 0.0})

    def on_step_end(self, args, state, control, **kwargs):
        spent[-1]["step"] += time.process_time()


timed("compute_loss")
timed("training_step")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark becomes what is used now
resident = memory("VmRSS")
model, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
numbers = finetune(model, out, FinetuneConfig(**settings), device="cpu", callbacks=[Clock()]).numbers
steps = spent[WARM_UP:]
mean = {part: sum(step[part] for step in steps) / len(steps) for part in steps[0]}
names = ("trainable_parameters", "total_parameters", "train_loss")
print(json.dumps({name: numbers[name] for name in names} | {
    "tokens_per_second": numbers["tokens"] / len(spent) / mean["step"],
    "seconds_forward": mean["compute_loss"],
    "seconds_backward": mean["training_step"] - mean["compute_loss"],
    "seconds_optimizer": mean["step"] - mean["training_step"],
    "peak_memory_bytes": memory("VmHWM"),
    "imports_bytes": resident,
    "load": os.getloadavg()[0],
}))
"""


def measured(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a child process found when it fine-tuned by these settings."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", CHILD, str(model), str(Path(directory) / "run"), json.dumps(settings)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["above_imports_bytes"] = found["peak_memory_bytes"] - found["imports_bytes"]
    return found


def ratio(rounds: Sequence[dict[str, Any]], name: str, base: str, key: str) -> float:
    """Median over the rounds of one configuration's number over the base's."""
    return statistics.median(found[name][key] / found[base][key] for found in rounds)


def summary(rounds: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A configuration by its medians, and against the two baselines."""
    keys = {"speed": "tokens_per_second", "process": "peak_memory_bytes", "above_imports": "above_imports_bytes"}
    medians = {key: statistics.median(found[name][key] for found in rounds) for key in keys.values()}
    bases = {"to_full": BASE, "to_stock": STOCK}
    ratios = {what: {k: ratio(rounds, name, base, v) for k, v in keys.items()} for what, base in bases.items()}
    return medians | ratios | {"last_loss": rounds[0][name]["train_loss"][-1][1]}


def flop_bound(found: dict[str, Any]) -> float:
    """Throughput of LRC-only over full if only multiplications counted; total: blocks and (tied) head."""
    total, factors = found["total_parameters"], found["trainable_parameters"]
    return float(6 * total / (4 * total + 2 * factors))


def record_of(rounds: Sequence[dict[str, Any]], settings: dict[str, Any], plan: dict[str, Any]) -> Record:
    """Everything measured so far, and its summary."""
    lrc, bound = rounds[0]["lrc"], flop_bound(rounds[0]["lrc"])
    numbers = {
        "flop_bound": bound,
        "lrc_of_the_bound": ratio(rounds, "lrc", BASE, "tokens_per_second") / bound,
        "rank_reduction": plan["rank_reduction"],
        "parameter_ratio": plan["parameter_ratio"],
        "lrc_parameters": lrc["trainable_parameters"],
        "total_parameters": lrc["total_parameters"],
        "configurations": {name: summary(rounds, name) for name in CONFIGURATIONS},
        "rounds": list(rounds),
    }
    about = {
        "rank_reduction": RANK_REDUCTION,
        "rank_multiple": RANK_MULTIPLE,
        "rounds": len(rounds),
        "threads": 1,
        "seconds": "processor time",
    }
    return Record("tuning", {"model": embedded_model().stem}, settings | about, numbers)


def main() -> None:
    """Measure, write docs/benchmarks/tuning.json after every round, print a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="two of them are not timed")
    asked = parser.parse_args()
    settings = SETTINGS | {"max_steps": asked.steps, "warmup_steps": 0, "dtype": "float32"}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / "small"
        config = CompressionConfig(rank_reduction=RANK_REDUCTION, rank_multiple=RANK_MULTIPLE)
        plan = welore.compress(embedded_model(), small, config).record.numbers
        for number in range(asked.rounds):
            rounds.append({name: measured(small, settings | own) for name, own in CONFIGURATIONS.items()})
            record = record_of(rounds, settings, plan)
            record.save(HERE / "tuning.json")
            print(f"round {number + 1} of {asked.rounds}: load average {rounds[-1][BASE]['load']:.1f}", file=sys.stderr)
    n = record.numbers
    print(f"LRC-only over full, float32: {n['lrc_of_the_bound']:.2f} of the flop bound {n['flop_bound']:.2f}")
    for name, own in n["configurations"].items():
        full, stock = own["to_full"], own["to_stock"]
        print(
            f"{name}: {own['tokens_per_second']:.0f} tokens/s, {own['peak_memory_bytes'] / 1e9:.2f} GB; to full: speed "
            f"{full['speed']:.2f}, process {full['process']:.2f}, above imports {full['above_imports']:.2f}; to full, "
            f"whole logits: process {stock['process']:.2f}, above imports {stock['above_imports']:.2f}"
        )


if __name__ == "__main__":
    main()
