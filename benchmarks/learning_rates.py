"""Which learning rate is good, from the model alone: methods at rates in proportion to the size of the weights.

python benchmarks/learning_rates.py [MODEL] [--models dense ours-0.8] [--methods full lrc lora]
                                    [--relative 0.0005 0.0015 0.005] [--steps 40] [--batch-size 2] [--max-length 128]
                                    [--dataset pydoc] [--tokens 16384] [--work DIR] [--out DIR]

A rate is a relative one times the `scale` of what a method trains (welore.mark_trainable(...).scale), which is close to
the root mean square of the numbers that are trained. All rows of a model read the same tokens; the held-out loss of the
text is measured before and after. ours-0.8 is the default at 80 % of the parameters, with statistics and recovery on
--tokens that the model writes. Rows that are there are not made again. Records: OUT/MODEL-METHOD-RELATIVE.json, by
default in docs/benchmarks/learning_rates/NAME; benchmarks/tables.py makes the table.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import arena
from welore.cli.output import quiet_libraries
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.load import fastest, load_model
from welore.records import Record
from welore.training.methods import mark_trainable

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DENSE, OURS = "dense", "ours-0.8"
CASES = {DENSE: ("full", "lora"), OURS: ("full", "lrc", "lora")}  # factors are in the compressed model alone
HELD_OUT = 32  # sequences


def main() -> None:
    """Every row that was asked for and is not there yet."""
    arguments = arena.bare_parser(__doc__)
    arguments.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--methods", nargs="*", default=["full", "lrc", "lora"])
    arguments.add_argument("--relative", nargs="*", type=float, default=[0.0005, 0.0015, 0.005])
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--max-length", type=int, default=128)
    arguments.add_argument("--dataset", default="pydoc")
    arguments.add_argument("--tokens", type=int, default=16384)
    given = arguments.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        for case in given.models:
            for method in (method for method in CASES[case] if method in given.methods):
                for relative in given.relative:
                    row(given, given.work or Path(scratch), case, method, relative)


def row(given: argparse.Namespace, work: Path, case: str, method: str, relative: float) -> None:
    """Train at one rate, unless the record is there, and save the record."""
    name = arena.model_name(given.model or embedded_model())
    path = (given.out or HERE / "learning_rates" / name) / f"{case}-{method}-{relative:g}.json"
    if path.is_file():
        return
    model, run = compressed(given, work / name, case), work / name / path.stem
    loaded = load_model(model, RunContext.create(device="cpu", progress=False), "float32")
    scale = mark_trainable(loaded.model, method).scale
    settings = {
        **{"method": method, "learning_rate": float(f"{relative * scale:.3g}"), "dataset": arena.named(given.dataset)},
        **{"max_steps": given.steps, "batch_size": given.batch_size, "max_length": given.max_length},
        **{"max_eval_samples": HELD_OUT, "eval_steps": given.steps, "save_steps": 0, **fastest("cpu")},
    }
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
    flags[flags.index("--dataset") + 1] = given.dataset
    numbers, _ = arena.welore("finetune", model, run, *flags, "--overwrite")
    shutil.rmtree(run)
    kept = ("evaluation", "eval_loss", "tokens", "trainable_parameters")
    found = {key: numbers["numbers"][key] for key in kept} | {"scale": scale, "relative": relative}
    Record("learning_rate", {"model": name, "row": case}, settings | {"tokens": given.tokens}, found).save(path)
    print(path.stem, settings["learning_rate"], found["evaluation"][0][1], found["eval_loss"], flush=True)


def compressed(given: argparse.Namespace, work: Path, case: str) -> Path:
    """The directory of a model, made once."""
    dense, path = resolve_model(given.model or embedded_model()), work / case
    if case == DENSE:
        return dense
    if not path.is_dir():
        arena.welore("compress", dense, path, "--keep", 0.8, "--for", "size", "--num-tokens", given.tokens)
    return path


if __name__ == "__main__":
    main()
