"""Trials for `--for anywhere` on SmolLM2, how its recovery trains and whether heads may go: a record.

    python benchmarks/anywhere.py STATISTICS --texts c4=FILE emma=FILE --work DIR [--keep 0.8] [--num-windows 3]
                                  [--recovery 2.6e-5:33 2.6e-4:58 ...] [--trainable factors|updates]
                                  [--heads 0 1 2 --statistics-of-o FILE]

STATISTICS: of 65,536 tokens of the model's own text (`welore calibrate MODEL --dataset self --max-length 512
--measure-losses 0 -o STATISTICS`). Widths are multiples of 16, as in benchmarks/quality.py. --recovery RATE:STEPS
trains the cut model once for each; no smaller rate takes the place of one that does harm. --heads compares models at
equal parameters, as they are cut: (0) neurons alone, (1) a key group of every layer with its heads, (2) a head of every
key group; o is refitted as down is. Trials are added to docs/benchmarks/anywhere.json. The texts are for validation.
"""

import argparse
import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import welore
from welore.calibration.scaling import DAMPING_INPUTS, damped
from welore.calibration.statistics import Statistics
from welore.config import CompressionConfig, EvaluationConfig, RecoveryConfig
from welore.io.checkpoint import PLAN, RECORD
from welore.io.hub import resolve_model
from welore.linalg.brain_surgeon import refit
from welore.models.embedded import embedded_model
from welore.models.load import read_tokenizer
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
MULTIPLE, LENGTH = 16, 512
HEADS = ("neurons alone", "a key group of every layer", "a head of every key group")
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@dataclass(frozen=True)
class Trials:
    """The model, its statistics, and the texts on which the results are compared."""

    model: Path
    statistics: Statistics
    statistics_of_o: Statistics
    work: Path
    texts: dict[str, str]
    windows: int

    def cut(self, keep: float) -> Path:
        """A directory of the model without neurons, made once."""
        out = self.work / f"cut-{keep:.6f}"
        if not (out / RECORD).is_file():
            config = CompressionConfig(keep=keep, optimize_for="anywhere", rank_multiple=MULTIPLE)
            welore.compress(self.model, out, config, statistics=self.statistics, recovery=None, overwrite=True, **QUIET)
        return out

    def recovered(self, keep: float, trainable: Any, rate: float, steps: int) -> dict[str, Any]:
        """Perplexities and losses after a recovery of so many steps."""
        out = self.work / f"{trainable}-{keep}-{rate}-{steps}"
        recovery = RecoveryConfig(
            trainable=trainable, learning_rate=rate, max_steps=steps, fallbacks=(1.0,), tolerance=1e9
        )
        if not (out / RECORD).is_file():
            how: dict[str, Any] = {"plan": self.cut(keep) / PLAN, "statistics": self.statistics, "recovery": recovery}
            welore.compress(self.model, out, **how, **QUIET)
        numbers = Record.load(out / RECORD).numbers
        own = {name: numbers[name] for name in ("held_out_loss", "healing_tokens", "healing_seconds")}
        return own | self.perplexities(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))

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
            small = fewer_heads(small, self.statistics_of_o, lost["kv"])
        names = set(self.statistics.shapes)
        left = sum(m.weight.numel() for name, m in small.named_modules() if name in names)
        tokens = max(self.statistics_of_o.counts.values())
        return {"parameter_ratio": left / targeted, "tokens_of_o": tokens} | self.perplexities(small)


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
        H, G, W = damped(H, DAMPING_INPUTS).double(), G.double(), tensors[f"{name}.weight"].double()
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
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True, help="where models that are cut stay between calls")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--num-windows", type=int, default=3)
    parser.add_argument("--recovery", nargs="*", default=[], metavar="RATE:STEPS")
    parser.add_argument("--trainable", choices=["factors", "updates"], default="factors", help="factors: all matrices")
    parser.add_argument("--statistics-of-o", type=Path, help="others for the last matrix of attention")
    parser.add_argument("--heads", nargs="*", type=int, default=[], choices=range(len(HEADS)))
    given = parser.parse_args()
    texts = dict(text.split("=", 1) for text in given.texts)
    model = resolve_model(embedded_model())
    own, of_o = (Statistics.load(path) for path in (given.statistics, given.statistics_of_o or given.statistics))
    trials = Trials(model, own, of_o, given.work, texts, given.num_windows)
    given.work.mkdir(parents=True, exist_ok=True)
    out = HERE / "anywhere.json"
    rows: dict[str, Any] = Record.load(out).numbers["rows"] if out.is_file() else {}
    trained = {"factors": "matrices"}.get(given.trainable, given.trainable)
    todo: dict[str, Any] = {}
    if given.recovery:
        load = AutoModelForCausalLM.from_pretrained
        todo["dense"] = lambda: trials.perplexities(load(model, dtype=torch.float32))
        todo["cut"] = lambda: trials.perplexities(load(trials.cut(given.keep), dtype=torch.float32))
    for rate, steps in (text.split(":") for text in given.recovery):
        todo[f"{trained} at {rate}, {steps} steps"] = lambda rate=rate, steps=steps: trials.recovered(
            given.keep, given.trainable, float(rate), int(steps)
        )
    for kind in given.heads:
        todo[HEADS[kind]] = lambda kind=kind: trials.without_heads(given.keep, kind)
    for name, trial in todo.items():
        key = f"keep {given.keep:g}, {given.num_windows} windows: {name}"
        if key in rows:
            continue
        rows[key] = trial()
        print(key, rows[key], flush=True)
        settings = {
            "max_length": LENGTH,
            "num_tokens": own.record.settings["num_tokens"],
            "width_multiple": MULTIPLE,
            "texts": list(texts),
        }
        Record("anywhere", {"model": "SmolLM2-135M-Instruct"}, settings, {"rows": rows}).save(out)


if __name__ == "__main__":
    main()
