"""Trials for `--for anywhere` on SmolLM2, how its recovery trains and whether heads may go: a record.

    python benchmarks/anywhere.py OWN --texts c4=FILE emma=FILE --work DIR [--statistics-windows 16] [--keep 0.8]
                                  [--num-windows 3] [--recovery 2.6e-5:14 2.6e-4:14 ...] [--heads 0 1 2]

OWN: the `written.safetensors` of `welore finetune MODEL DIR --dataset self`, text that the model wrote. The statistics
are of its last windows, so that the held-out ones, its first, are unseen. Widths are multiples of 16, as in
benchmarks/arena.py. --recovery RATE:STEPS trains all matrices of the cut model on OWN, once for each. --heads compares
models at equal parameters, as they are cut: (0) neurons alone, (1) a key group of every layer with its heads, (2) a
head of every key group; o is refitted as down is.
Trials are added to docs/benchmarks/anywhere.json. The texts are for validation.
"""

import argparse
import copy
import itertools
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import welore
from arena import MULTIPLE
from welore.calibration.scaling import regularized
from welore.calibration.statistics import Statistics
from welore.config import CalibrationConfig, CompressionConfig, EvaluationConfig, FinetuneConfig
from welore.data.windows import given_windows, write_windows
from welore.io.checkpoint import PLAN, RECORD
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.linalg.brain_surgeon import refit
from welore.models.embedded import embedded_model
from welore.models.load import fastest, read_tokenizer
from welore.records import Record
from welore.training.finetune import finetune
from welore.training.run_dir import MODEL, RUN, TUNED
from welore.training.teacher import recorded_predictions

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
LENGTH, BATCH = 512, 2  # as in a recovery
HEADS = ("neurons alone", "a key group of every layer", "a head of every key group")
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@dataclass(frozen=True)
class Trials:
    """The model, windows that it wrote, and the texts on which the results are compared.

    calibrated: how many of the windows the statistics are of; windows: of each text.
    """

    model: Path
    own: Tensor
    calibrated: int
    work: Path
    texts: dict[str, str]
    windows: int

    @cached_property
    def statistics(self) -> Statistics:
        """Those of the last windows, made once: a recovery holds the first ones out."""
        out = self.work / f"statistics-{self.calibrated}.safetensors"
        if not out.is_file():
            welore.calibrate(
                self.model, CalibrationConfig(measure_losses=0), out, dataset=self.own[-self.calibrated :], **QUIET
            )
        return Statistics.load(out)

    def cut(self, keep: float) -> Path:
        """A directory of the model without neurons, made once."""
        out = self.work / f"cut-{self.calibrated}-{keep:.6f}"
        if not (out / RECORD).is_file():
            config = CompressionConfig(keep=keep, optimize_for="anywhere", rank_multiple=MULTIPLE)
            welore.compress(self.model, out, config, statistics=self.statistics, recovery=None, **QUIET)
        return out

    def recovered(self, keep: float, rate: float, steps: int) -> dict[str, Any]:
        """Perplexities and losses after a recovery of so many steps, as `compress` trains."""
        text, run = self.work / f"own-{steps}.safetensors", self.work / f"run-{self.calibrated}-{keep}-{rate}-{steps}"
        if not text.is_file():
            windows = self.own[: -(-steps * BATCH * 10 // 9)]
            write_windows(text, windows, recorded_predictions(self.model, windows, RunContext.create(**QUIET)))
        config = FinetuneConfig(
            method="nlrc",
            distill=str(text),
            distill_weight=1.0,
            learning_rate=rate,
            max_steps=steps,
            warmup_steps=min(8, steps // 4),
            batch_size=BATCH,
            max_length=LENGTH,
            eval_steps=steps,
            **fastest("cpu"),
        )
        if not (run / TUNED).is_file():
            cut = self.cut(keep)
            finetune(cut, run, config, plan=cut / PLAN, resume=(run / RUN).is_file(), **QUIET)
        numbers = Record.load(run / TUNED).numbers
        own = {"cut": numbers["evaluation"][0][1], "recovered": numbers["evaluation"][-1][1]}
        own["dense"] = numbers["teacher_eval_loss"]
        model = AutoModelForCausalLM.from_pretrained(run / MODEL, dtype=torch.float32)
        return {"held_out_loss": own, "seconds": numbers["seconds"]} | self.perplexities(model)

    def perplexities(self, model: Any) -> dict[str, float]:
        """Perplexity of a model in memory on every text."""
        config = EvaluationConfig(max_length=LENGTH, num_windows=self.windows)
        options = QUIET | {"tokenizer": read_tokenizer(self.model)}
        records = {
            name: welore.evaluate(model, replace(config, dataset=text), **options) for name, text in self.texts.items()
        }
        return {f"perplexity_{name}": record.numbers["perplexity"] for name, record in records.items()}

    def without_heads(self, keep: float, kind: int) -> dict[str, Any]:
        """Perplexities of a cut model, of whose share some numbers are heads; kind: an index of HEADS."""
        dense = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        targeted = sum(m * n for m, n in self.statistics.shapes.values())
        lost = {"qo": dense.config.num_key_value_heads, "kv": 0} if kind == 2 else {"qo": 0, "kv": 0}
        if kind == 1:
            lost = {"qo": dense.config.num_attention_heads // dense.config.num_key_value_heads, "kv": 1}
        numbers = sum(lost.values()) * 2 * dense.config.hidden_size * dense.config.head_dim
        share = numbers * dense.config.num_hidden_layers / targeted
        small = AutoModelForCausalLM.from_pretrained(self.cut(keep + share), dtype=torch.float32)
        if kind:
            small = fewer_heads(small, self.statistics, lost["kv"])
        names = set(self.statistics.shapes)
        left = sum(m.weight.numel() for name, m in small.named_modules() if name in names)
        return {"parameter_ratio": left / targeted} | self.perplexities(small)


def fewer_heads(model: Any, statistics: Statistics, groups: int) -> Any:
    """A model of the same class without a key group of every layer (groups is 1), or without a head of every group.

    Every layer loses the heads whose columns of o cost least by Optimal Brain Surgeon, the others refitted.
    """
    config, size = copy.deepcopy(model.config), model.config.head_dim
    keys = config.num_key_value_heads
    each = config.num_attention_heads // keys
    tensors = dict(model.state_dict())
    for name in (name for name in statistics.shared if name.endswith("o_proj")):
        H, G = statistics.inputs(name), statistics.outputs(name)
        assert H is not None
        assert G is not None
        H, G, W = regularized(H, statistics.shrinkage).double(), G.double(), tensors[f"{name}.weight"].double()
        if groups:
            choices = [list(range(g * each, (g + 1) * each)) for g in range(keys)]
        else:
            choices = [
                [g * each + h for g, h in enumerate(heads)] for heads in itertools.product(range(each), repeat=keys)
            ]
        gone = min(choices, key=lambda heads: removal_cost(W, G, H, of_heads(heads, size)))
        heads = of_heads([h for h in range(keys * each) if h not in gone], size)
        key_groups = of_heads([g for g in range(keys) if not groups or g * each not in gone], size)
        rows = {"q_proj": heads, "k_proj": key_groups, "v_proj": key_groups}
        for layer, chosen in rows.items():
            key = f"{name.removesuffix('o_proj')}{layer}.weight"
            tensors[key] = tensors[key][chosen]
        tensors[f"{name}.weight"] = refit(W, H, heads).float()
    config.num_key_value_heads = keys - groups
    config.num_attention_heads = (keys - groups) * each if groups else keys * (each - 1)
    small = AutoModelForCausalLM.from_config(config)
    small.load_state_dict(tensors)
    return small.eval()


def of_heads(heads: Any, size: int) -> Tensor:
    """The columns (count,) of heads of this size."""
    return torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads])


def removal_cost(W: Tensor, G: Tensor, H: Tensor, columns: Tensor) -> float:
    """The loss of taking columns of W (m, n) out and refitting the others: tr(G W_c S W_c^T), S^-1 = (H^-1)_cc."""
    S = torch.linalg.inv(torch.linalg.inv(H)[columns][:, columns])
    return float(((W[:, columns].T @ G @ W[:, columns]) * S).sum())


def main() -> None:
    """Run the trials that were asked for, and add them to the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True, help="where statistics and models stay between calls")
    parser.add_argument("--statistics-windows", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--num-windows", type=int, default=3)
    parser.add_argument("--recovery", nargs="*", default=[], metavar="RATE:STEPS")
    parser.add_argument("--heads", nargs="*", type=int, default=[], choices=range(len(HEADS)))
    given = parser.parse_args()
    model, load = resolve_model(embedded_model()), partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    own, texts = given_windows(given.own), dict(text.split("=", 1) for text in given.texts)
    trials = Trials(model, own, given.statistics_windows, given.work, texts, given.num_windows)
    given.work.mkdir(parents=True, exist_ok=True)
    out = HERE / "anywhere.json"
    rows: dict[str, Any] = Record.load(out).numbers["rows"] if out.is_file() else {}
    todo: dict[str, Any] = {}
    if given.recovery:
        todo["dense"] = lambda: trials.perplexities(load(model))
        todo["cut"] = lambda: trials.perplexities(load(trials.cut(given.keep)))
    for trial in given.recovery:
        rate, steps = trial.split(":")
        todo[f"{steps} steps at {rate}"] = partial(trials.recovered, given.keep, float(rate), int(steps))
    for kind in given.heads:
        todo[HEADS[kind]] = partial(trials.without_heads, given.keep, kind)
    for name, run in todo.items():
        key = f"keep {given.keep:g}: {name}"
        if key in rows:
            continue
        rows[key] = run()
        print(key, rows[key], flush=True)
        settings = {"max_length": LENGTH, "num_windows": given.num_windows, "width_multiple": MULTIPLE}
        settings |= {"texts": list(texts), "statistics_windows": given.statistics_windows}
        Record("anywhere", {"model": "SmolLM2-135M-Instruct"}, settings, {"rows": rows}).save(out)


if __name__ == "__main__":
    main()
