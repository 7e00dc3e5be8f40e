"""Statistics of SmolLM2 in bfloat16 against those in float32: the plans, and the losses of the factors that they give.

The same text and seed in both; beside them float32 with the labels of another seed, which tells how much of a
difference is chance. All losses are those of K-FAC, by the moments of float32: what a plan of equal ranks loses with
directions that other moments have chosen, over the least. Matrices of every few blocks count, for the time. Two columns
say how long the pass took on the processor, and whether it ran whole.
"""

import argparse
import time
from pathlib import Path

import welore
from welore.calibration.collect import calibrate
from welore.calibration.scaling import DAMPING_OUTPUTS, KFAC, damped, metric, regularized
from welore.calibration.statistics import Statistics
from welore.config import CalibrationConfig
from welore.data.mixture import draw
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.linalg.svd import factorise
from welore.models.embedded import embedded_model
from welore.models.load import read_tokenizer
from welore.models.source import TensorSource, open_source
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
TEXT, TOKENS, LENGTH, KEEP = "pydoc", 8192, 512, 0.8
BLOCKS = tuple(f"layers.{index}.*" for index in (0, 7, 14, 21, 29))
RUNS = {
    "float32": {"dtype": "float32", "whole_model": False},
    "bfloat16": {"dtype": "bfloat16", "whole_model": False},
    "bfloat16, whole": {"dtype": "bfloat16", "whole_model": True},
    "float32, other labels": {"dtype": "float32", "whole_model": False, "seed": 1},
}


def loss(source: TensorSource, reference: Statistics, chosen_by: Statistics, ranks: dict[str, int]) -> float:
    """K-FAC's loss by one statistic of the factors, at these ranks, that another one chooses."""
    total = 0.0
    for target in source.targets:
        if target.name in ranks:
            W = source.read(target)
            factors = factorise(W, ranks[target.name], metric=metric(KFAC, chosen_by, target))
            error = W.double() - factors.A.double() @ factors.B.double()
            G, H = reference.outputs(target.name), reference.inputs(target.name)
            assert G is not None
            assert H is not None
            G, H = damped(G.double(), DAMPING_OUTPUTS), regularized(H.double(), reference.shrinkage)
            total += float((G @ error * (error @ H)).sum())
    return total


def main() -> None:
    """Measure, write docs/benchmarks/precision.json, print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=TEXT, help="name or file of the text")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    model = resolve_model(embedded_model())
    source = open_source(model, RunContext.create(device="cpu"), include=BLOCKS)
    ids = draw(args.text, args.tokens, read_tokenizer(model), LENGTH, seed=0)[1][0].windows
    reference, least, ranks, numbers = None, 0.0, {}, {}
    for name, how in RUNS.items():
        config = CalibrationConfig(include=BLOCKS, measure_losses=0, **how)  # type: ignore[arg-type]
        started = time.process_time()
        statistics = calibrate(model, config, dataset=ids, device="cpu")
        seconds = time.process_time() - started
        spectra = welore.analyze(model, statistics=statistics, include=BLOCKS, split=False, device="cpu")
        plan = welore.allocate(spectra, keep=KEEP)
        if reference is None:
            reference, ranks = statistics, dict(plan.ranks)
            least = loss(source, reference, statistics, ranks)
        moved = sum(abs(plan.ranks.get(matrix, 0) - rank) for matrix, rank in ranks.items() if matrix in plan.ranks)
        numbers[name] = {
            "loss_over_least": loss(source, reference, statistics, ranks) / least,
            "ranks_moved": moved / sum(ranks.values()),
            "factored_as_well": len(ranks.keys() & plan.ranks.keys()) / len(ranks),
            "processor_seconds": seconds,
            "sampled_label_nll": statistics.record.numbers["sampled_label_nll"],
        }
        print(name, numbers[name])
    settings = {"text": args.text, "tokens": args.tokens, "keep": KEEP, "include": list(BLOCKS)}
    Record("precision", {"model": model.name}, settings, numbers).save(HERE / "precision.json")


if __name__ == "__main__":
    main()
