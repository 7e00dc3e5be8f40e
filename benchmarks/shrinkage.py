"""How far the moments of two different inputs should be shrunk: quality at equal size and statistics.

python benchmarks/shrinkage.py [MODEL] [--shares 0 0.1 0.2 0.3] [--keep 0.8 0.6] [--seeds 0] [--self-tokens 65536]
                               [--texts wikitext2=FILE,c4=FILE] [--windows 8] [--length 512] [--work DIR] [--out DIR]

Preset best for size, only cut, with statistics of --self-tokens that the model writes; rows of one seed have the same
statistics and differ in Statistics.shrinkage alone. Choose it on texts that nothing else is measured on. The evaluation
and the other options are those of benchmarks/arena.py. Records: OUT/TOKENS-KEEP-SHARE-SEED.json, by default in
docs/benchmarks/shrinkage/NAME; benchmarks/tables.py makes the table.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import arena
from welore.calibration.statistics import Statistics
from welore.compression.pipeline import compress
from welore.config import CompressionConfig
from welore.models.embedded import embedded_model


def main() -> None:
    """Every row that was asked for and is not there yet."""
    arguments = arena.parser(__doc__)
    arguments.add_argument("--shares", nargs="*", type=float, default=[0.0, 0.1, 0.2, 0.3])
    given = arguments.parse_args()
    given.out = given.out or arena.HERE / "shrinkage" / arena.model_name(given.model or embedded_model())
    with tempfile.TemporaryDirectory() as scratch:
        bench = arena.Bench(given, given.work or Path(scratch))
        for seed in given.seeds:
            for keep in given.keep:
                for share in given.shares:
                    row(bench, given.self_tokens, keep, share, seed)


def row(bench: arena.Bench, tokens: int, keep: float, share: float, seed: int) -> None:
    """Cut the model with one shrinkage and measure it, unless its record is there."""
    path = bench.out / f"{tokens}-{keep:g}-{share:g}-{seed}.json"
    if path.is_file():
        return
    bench.measure_dense()
    small = bench.work / f"{path.stem}-small"
    statistics = dataclasses.replace(Statistics.load(bench.calibration("self", seed)), shrinkage=share)
    config = CompressionConfig(keep=keep, preset="best", optimize_for="size")
    options: dict[str, Any] = {"recovery": None, "overwrite": True, "progress": False, "device": "cpu"}
    made = compress(bench.model, small, config, statistics=statistics, **options).record
    keys = ("rank_reduction", "parameter_ratio", "bytes", "lrcs")
    numbers = {key: made.numbers[key] for key in keys} | {"neurons_removed": made.settings["mlp_pruning"]}
    settings = {"keep": keep, "seed": seed, "num_tokens": tokens, "shrinkage": share}
    bench.measure(path, arena.Method(f"shrinkage {share:g}"), settings, numbers, small)
    shutil.rmtree(small, ignore_errors=True)


if __name__ == "__main__":
    main()
