"""The default job of an older commit beside today's, started at the same moment: processor time, and quality.

    python benchmarks/against_commit.py --seeds 0 1 2 --text validation.txt --work /tmp/against

Both compress SmolLM2 with one thread each, in processes of their own, so that both see the same machine. Counted is the
time of user and system of a whole tree of processes. Seconds of the clock say nothing where the machine is shared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import welore
from welore.config import EvaluationConfig
from welore.io.atomic import read_json, write_json
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.records import Record

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "docs" / "benchmarks"
COMMIT = "b806731"
SIZE_OPTION = {"before": "--params", "now": "--keep"}  # the older command line has another name for it
SHARE = "0.8"
MAX_LENGTH = 512  # tokens of a window of the validation text


def unpack(commit: str, directory: Path) -> Path:
    """The tree of a commit in a directory."""
    if not directory.exists():
        directory.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(directory)], input=archive, check=True)
    return directory


def start(tree: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process that runs `welore` of a tree with one thread."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | one | {"PYTHONPATH": str(tree / "src")}
    return subprocess.Popen([sys.executable, "-m", "welore", *arguments], env=environment)


def side_by_side(seed: int, model: Path, work: Path, trees: dict[str, Path], tokens: int | None) -> dict[str, float]:
    """Processor seconds of the job of each tree; both began at the same moment."""
    directory = work / f"seed-{seed}"
    finished = directory / "seconds.json"
    if finished.exists():
        known: dict[str, float] = read_json(finished)
        return known
    directory.mkdir(parents=True, exist_ok=True)
    processes = {}
    for name, tree in trees.items():
        size = [SIZE_OPTION[name], SHARE, "--workers", "1", "--device", "cpu", "--seed", str(seed), "--overwrite"]
        length = [] if tokens is None else ["--num-tokens", str(tokens)]
        processes[name] = start(tree, ["compress", str(model), str(directory / name), *size, *length])
    seconds = {}
    for name, process in processes.items():
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"the job of {name} failed"
        seconds[name] = used.ru_utime + used.ru_stime
    write_json(finished, seconds)
    return seconds


def perplexities(directory: Path, texts: list[str], windows: int) -> dict[str, dict[str, float]]:
    """Text -> perplexity of both results, measured by today's code."""
    how = EvaluationConfig(max_length=MAX_LENGTH, num_windows=windows)
    measured: dict[str, dict[str, float]] = {}
    for text in texts:
        records = {name: welore.evaluate(directory / name, how, dataset=text, device="cpu") for name in SIZE_OPTION}
        measured[Path(text).name] = {name: record.numbers["perplexity"] for name, record in records.items()}
    return measured


def main() -> None:
    """Run both for every seed, write docs/benchmarks/against_commit.json, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, help="of the text, in place of the default")
    parser.add_argument("--text", action="append", default=[], help="a text on which both results are measured")
    parser.add_argument("--windows", type=int, default=64, help="windows of it")
    parser.add_argument("--work", type=Path, help="keep the results here, so that a killed measurement goes on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        trees = {"before": unpack(COMMIT, work / COMMIT), "now": ROOT}
        model = resolve_model(embedded_model())
        seeds: dict[str, Any] = {}
        for seed in arguments.seeds:
            seconds = side_by_side(seed, model, work, trees, arguments.tokens)
            ratio = seconds["now"] / seconds["before"]
            measured = perplexities(work / f"seed-{seed}", arguments.text, arguments.windows)
            seeds[str(seed)] = {"processor_seconds": seconds, "now_over_before": ratio, "perplexity": measured}
            print(
                f"seed {seed}: {seconds['before']:,.0f} s before, {seconds['now']:,.0f} s now ({ratio:.2f}); {measured}"
            )
    numbers = {"seeds": seeds, "now_over_before": statistics.mean(run["now_over_before"] for run in seeds.values())}
    settings = {"keep": float(SHARE), "tokens": arguments.tokens, "threads": 1, "windows": arguments.windows}
    inputs = {"model": embedded_model().stem, "commit": COMMIT, "texts": [Path(text).name for text in arguments.text]}
    Record("against_commit", inputs, settings, numbers).save(HERE / "against_commit.json")


if __name__ == "__main__":
    main()
