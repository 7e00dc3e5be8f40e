"""What every stage of the default job takes, `welore compress MODEL OUT --keep 0.8`, on a random model of any shape.

    python benchmarks/default_job.py --shape llama-3.2-1b --tokens 8192 --work /tmp/job
    python benchmarks/default_job.py --shape llama-3.2-1b --layers 2 --tokens 512 --kill-at-random 0

The job runs in a process of its own, which samples its resident memory ten times a second, above that after a tiny job
of the same kind (the imports, and what libraries set up once), and the size of the unfinished work. Beside the figures
stand those that `welore.estimate` computes for the same job, and for 7B to 70B models on a card. With --work a killed
measurement goes on where it was, as the job does. --kill-at-random kills the job at random moments, and compares what
becomes of it with the result of a job that nobody disturbed.
"""

import argparse
import gc
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from footprint import Watch, status
from random_model import SHAPES, make_checkpoint
from welore.cli.output import quiet_libraries
from welore.compression.estimate import measured_rates
from welore.compression.needs import Machine, Needs
from welore.compression.pipeline import compress, make_job
from welore.config import NUM_TOKENS, CalibrationConfig, CompressionConfig
from welore.io.atomic import read_json, work_directory, write_json
from welore.io.checkpoint import RECORD
from welore.io.context import RunContext
from welore.models.source import open_source
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
INTERVAL = 0.1  # seconds between two samples
READY = "ready"
DENSE, SETTINGS, RUNS = "dense", "settings.json", "runs"
LIMITS = {"resident_peak_bytes": 4e9, "work_over_checkpoint": 2.5}  # of the shape with a billion parameters
# Cards on which larger models are to be compressed, and what one of 2023 multiplies in a second (without TF32).
CARDS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"bytes": 24e9},
    "llama-3-8b": {"bytes": 24e9},
    "llama-3-70b": {"bytes": 80e9},
}
CARD_RATES = {"float64": 40e12, "float32": 40e12, "bfloat16": 400e12}
SHORT = 1024  # tokens of the tiny job: two windows, as few as a recovery needs


def job(model: Path, out: Path, settings: dict[str, Any], **changes: Any) -> Record:
    """The default job; changes: to the settings."""
    settings = settings | changes
    names = ("num_tokens", "seed", "whole_model")
    text = CalibrationConfig(**{name: settings[name] for name in names})
    options = {name: settings[name] for name in ("device", "workers")}
    progress = settings.get("progress", False)
    config = CompressionConfig(keep=settings["keep"], optimize_for=settings["optimize_for"])
    return compress(model, out, config, calibration=text, progress=progress, **options).record


def measure(directory: Path, name: str) -> None:
    """Run in a process of its own: the job, and directory/runs/NAME-N.json, which tells of it up to a kill."""
    quiet_libraries()
    settings = read_json(directory / SETTINGS)
    torch.set_num_threads(settings["threads"])
    import_module("welore.training.finetune")
    gc.collect()
    gc.freeze()  # what libraries keep is no garbage of the job, which is collected before every training
    with tempfile.TemporaryDirectory() as tiny:
        model = make_checkpoint(Path(tiny) / DENSE, SHAPES["tiny"])
        job(
            model, Path(tiny) / "small", settings, num_tokens=SHORT, optimize_for="size"
        )  # for it is too small for speed
    gc.collect()
    runs = directory / RUNS
    file = runs / f"{name}-{len(list(runs.glob(f'{name}-*.json')))}.json"
    out = directory / name
    largest: Counter[str] = Counter()

    def tell(stages: dict[str, Any], **more: Any) -> None:
        nonlocal largest
        largest = max(largest, unfinished(out), key=lambda sizes: sizes.total())
        peaks = {"resident_baseline_bytes": watch.resident, "resident_peak_bytes": status("VmHWM")[0] - watch.resident}
        write_json(file, {"stages": stages, "work_bytes_by_kind": dict(largest)} | peaks | more)

    watch = Watch(INTERVAL, tell)
    print(READY, flush=True)
    with watch:
        record = job(directory / DENSE, out, settings, progress=watch.progress)
    kept = ("parameter_ratio", "bytes", "healed", "seconds")
    finished = {name: record.numbers[name] for name in kept if name in record.numbers}
    more = {"recovery": record.settings["recovery"], "record_of_the_job": record.numbers["stages"]}
    tell(watch.stages, finished=finished | more)


def unfinished(out: Path) -> Counter[str]:
    """Bytes of the unfinished work by kind of file: the last word of its name."""
    sizes: Counter[str] = Counter()
    for file in work_directory(out).rglob("*"):
        try:
            if file.is_file():
                sizes[file.name.removesuffix(".safetensors").rpartition(".")[2]] += file.stat().st_size
        except OSError:  # it has just been deleted
            continue
    return sizes


def started(directory: Path, name: str) -> subprocess.Popen[str]:
    """The process of `measure`, which has just begun with the job itself."""
    command = [sys.executable, __file__, "--measure", str(directory), name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline().strip()
    assert line == READY, f"the job did not begin: {line}"
    return process


def finish(directory: Path, name: str) -> dict[str, Any]:
    """Run the job until it is done; what all of its runs together took."""
    if not (directory / name).exists():
        assert started(directory, name).wait() == 0, "the job failed"
    return summed([read_json(file) for file in sorted((directory / RUNS).glob(f"{name}-*.json"))])


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of several, of which all but the last were killed: seconds are added, of peaks the largest counts."""
    stages: dict[str, dict[str, float]] = {}
    for run in runs:
        for label, stage in run["stages"].items():
            total = stages.setdefault(label, {})
            for name, value in stage.items():
                total[name] = total.get(name, 0) + value if "seconds" in name else max(total.get(name, 0), value)
    work = max((run["work_bytes_by_kind"] for run in runs), key=lambda sizes: sum(sizes.values()))
    peaks = {name: max(run[name] for run in runs) for name in ("resident_baseline_bytes", "resident_peak_bytes")}
    seconds = sum(stage["processor_seconds"] for stage in stages.values())
    shown = {"runs": len(runs), "processor_seconds": seconds, "stages": stages}
    return shown | peaks | {"work_bytes": sum(work.values()), "work_bytes_by_kind": work} | runs[-1]["finished"]


def kill_at_random(directory: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kills of the job at random moments, each followed by the same command; and whether its result is the same."""
    whole = read_json(directory / RUNS / "small-0.json")["stages"]
    duration = sum(stage["seconds"] for stage in whole.values())
    chance = random.Random(seed)
    killed_in = []
    for number in range(kills):
        process = started(directory, "killed")
        time.sleep(chance.uniform(0, 2 * duration / kills))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was done before
            break
        file = directory / RUNS / f"killed-{number}.json"
        killed_in.append(list(read_json(file)["stages"])[-1] if file.exists() else "start")
    done = finish(directory, "killed")
    unequal = different(directory / "small", directory / "killed")
    return {"seed": seed, "killed_in": killed_in, "runs": done["runs"], "unequal_files": unequal}


def different(one: Path, other: Path) -> list[str]:
    """Files of two results that are not the same, byte for byte; of the record, which tells the time, its settings."""
    names = {file.relative_to(at) for at in (one, other) for file in at.rglob("*") if file.is_file()}
    unequal = [str(name) for name in names - {Path(RECORD)} if content(one / name) != content(other / name)]
    records = [Record.load(at / RECORD) for at in (one, other)]
    return sorted(unequal) + [RECORD] * (records[0].settings != records[1].settings)


def content(file: Path) -> bytes | None:
    """The bytes of a file, None without one."""
    return file.read_bytes() if file.is_file() else None


def estimated(model: Path, settings: dict[str, Any], machine: Machine | None = None, rates: Any = None) -> Any:
    """Stage -> what the formulas of the package say of it; machine: in place of this one."""
    context = RunContext.create(device="cpu", workers=settings["workers"])
    text = CalibrationConfig(num_tokens=settings["num_tokens"], whole_model=settings["whole_model"])
    config = CompressionConfig(keep=settings["keep"], optimize_for=settings["optimize_for"])
    job = make_job(open_source(model, context), config, text, "auto", None, None, context)
    stages = Needs(job, machine).stages(rates or measured_rates(context.device))
    return {stage.name: {key: value for key, value in vars(stage).items() if key != "name"} for stage in stages}


def extrapolated(settings: dict[str, Any]) -> dict[str, Any]:
    """Shape -> needs of the default job on a card of CARDS, with the tokens that it reads by default."""
    columns = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, card in CARDS.items():
            model = make_checkpoint(Path(directory) / name, SHAPES[name], hollow=True)
            machine = Machine(torch.device("cuda"), int(card["bytes"]), "bfloat16")
            usual = settings | {"num_tokens": NUM_TOKENS, "workers": 2, "optimize_for": "gpu"}
            stages = estimated(model, usual, machine, CARD_RATES)
            columns[name] = {"card": card, "stages": stages}
            shutil.rmtree(model)
    return columns


def entire(settings: dict[str, Any]) -> dict[str, Any]:
    """Needs of the job for all layers and experts of its shape, on this machine, with the tokens of the default."""
    with tempfile.TemporaryDirectory() as directory:
        model = make_checkpoint(Path(directory) / DENSE, SHAPES[settings["shape"]], hollow=True)
        return dict(estimated(model, settings | {"num_tokens": NUM_TOKENS}))


def shape_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The shape that was asked for."""
    shape: dict[str, Any] = SHAPES[arguments.shape]
    changes = {"num_hidden_layers": arguments.layers, "num_experts": arguments.experts}
    return shape | {name: count for name, count in changes.items() if count}


def prepare(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The model and the settings in a directory of the work; those of an earlier call must be the same."""
    names = (
        "shape",
        "layers",
        "experts",
        "num_tokens",
        "keep",
        "optimize_for",
        "seed",
        "device",
        "workers",
        "threads",
        "whole_model",
    )
    settings = {name: vars(arguments)[name] for name in names}
    if (directory / SETTINGS).exists():
        assert read_json(directory / SETTINGS) == settings, f"{directory} holds a job with other settings"
        return settings
    shutil.rmtree(directory / DENSE, ignore_errors=True)
    make_checkpoint(directory / DENSE, shape_of(arguments))
    (directory / RUNS).mkdir(exist_ok=True)
    write_json(directory / SETTINGS, settings)
    return settings


def table(numbers: dict[str, Any]) -> str:
    """The stages as text."""
    lines = [f"{'stage':24}{'processor':>12}{'resident':>12}{'anonymous':>12}"]
    for label, stage in numbers["stages"].items():
        sizes = (f"{stage[name] / 1e6:,.0f} MB" for name in ("resident_peak_bytes", "anonymous_peak_bytes"))
        lines.append(f"{label:24}{stage['processor_seconds']:>10,.0f} s" + "".join(f"{size:>12}" for size in sizes))
    return "\n".join(lines)


def run(directory: Path, arguments: argparse.Namespace) -> None:
    """Measure, write the record, print."""
    settings = prepare(directory, arguments)
    numbers = finish(directory, "small")
    checkpoint = sum(file.stat().st_size for file in (directory / DENSE).glob("*.safetensors"))
    numbers |= {"checkpoint_bytes": checkpoint, "work_over_checkpoint": numbers["work_bytes"] / checkpoint}
    numbers |= {"estimated": estimated(directory / DENSE, settings), "extrapolated": extrapolated(settings)}
    if arguments.layers or arguments.experts:
        all_of_it, measured = SHAPES[arguments.shape], shape_of(arguments)
        counts = [name for name in ("num_hidden_layers", "num_experts") if name in measured]
        numbers["entire_over_measured"] = math.prod(all_of_it[name] / measured[name] for name in counts)
        numbers["entire"] = entire(settings)
    if arguments.kill_at_random is not None:
        numbers["kills"] = kill_at_random(directory, arguments.kill_at_random, arguments.kills)
    inputs = {"model": f"{arguments.shape} shape, random heavy-tailed weights"}
    Record("default_job", inputs, settings | {"limits": LIMITS}, numbers).save(arguments.record)
    print(table(numbers))
    print(
        f"peak {numbers['resident_peak_bytes'] / 1e6:,.0f} MB above the imports; unfinished work at most "
        f"{numbers['work_bytes'] / 1e6:,.0f} MB, {numbers['work_over_checkpoint']:.2f} of the checkpoint; "
        f"{numbers['processor_seconds']:,.0f} s of processor time; {numbers.get('kills', '')}"
    )
    if numbers.get("kills", {}).get("unequal_files"):
        raise SystemExit("a job that was killed and went on has another result")


def main() -> None:
    """Measure the job in a directory, write the record, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="decoder blocks, in place of those of the shape")
    parser.add_argument("--experts", type=int, help="experts of a layer, in place of those of the shape")
    parser.add_argument("--tokens", type=int, default=8192, dest="num_tokens", help="that the model writes and reads")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--for", default="auto", dest="optimize_for", help="where the result will run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--by-block", action="store_const", const=False, dest="whole_model", help="statistics by block")
    parser.add_argument("--work", type=Path, help="keep model and work here, so that a killed measurement goes on")
    parser.add_argument("--record", type=Path, default=HERE / "default_job.json", help="the file to write")
    parser.add_argument("--kill-at-random", type=int, metavar="SEED", help="then kill a second job at random moments")
    parser.add_argument("--kills", type=int, default=6, help="how often")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)  # in the process of the job
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], str(arguments.measure[1]))
    elif arguments.work:
        run(arguments.work, arguments)
    else:
        with tempfile.TemporaryDirectory() as directory:
            run(Path(directory), arguments)


if __name__ == "__main__":
    main()
