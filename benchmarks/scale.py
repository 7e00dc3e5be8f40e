"""Does the cost of `compress` grow as it should up to 7B shapes, and does its memory stay bounded? A record and a plot.

Memory: a few layers of a checkpoint with the shapes of Llama-2-7B (bf16, sharded, random weights with a heavy-tailed
spectrum) go through `compress` in a process of its own that measures itself, above what the imports take. With
--mixture only this, for the shapes of Qwen3-30B-A3B, into a record of its own.
Time: every kind of matrix of 135M, 1B and 7B models, one thread, ours against two torch.svd (which the reference needs)
and against the flop floor, one after the other in one process; the fastest of a few runs, for the machine is shared.
A torch.svd that would take longer than a minute is extrapolated from the next smaller model by k^2 * max(m, n), and
marked so.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from threadpoolctl import threadpool_limits

from floor import operations, speeds
from footprint import measured
from random_model import SHAPES as RANDOM
from random_model import heavy_tailed, make_checkpoint
from welore.layers.expert_names import is_of_expert
from welore.linalg.svd import decompose
from welore.models.source import CheckpointSource
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DENSE, MIXTURE = "llama-2-7b", "qwen3-30b-a3b"
ATTENTION = "self_attn"  # excluded, so that only experts are in work
RANK_REDUCTION, KEPT = 0.5, 0.2  # of the model; share of the full rank at which single matrices are factored
PATIENCE_SECONDS = 60.0
SHAPES = {
    "135M": {"square": (576, 576), "k, v": (192, 576), "MLP": (1536, 576)},
    "1B": {"square": (2048, 2048), "MLP": (8192, 2048)},
    "7B": {"square": (4096, 4096), "MLP": (11008, 4096)},
}


def compress_checkpoint(shape: str, layers: int, **changes: Any) -> dict[str, Any]:
    """Peak memory and seconds of `compress` with one worker, by shape and for all layers of a model.

    changes: to the shape.
    """
    with tempfile.TemporaryDirectory() as temporary:
        dense = make_checkpoint(Path(temporary) / "dense", RANDOM[shape] | {"num_hidden_layers": layers} | changes)
        dense_bytes = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
        targets = CheckpointSource(dense).targets
        shapes = {target.shape: target.cost for target in targets}
        values = 8 * sum(min(target.shape) for target in targets)
        expert = 4 * max([math.prod(t.shape) for t in targets if is_of_expert(t.name)], default=0)
        found = measured(dense, RANK_REDUCTION, 1)
        alone = measured(dense, RANK_REDUCTION, 1, ATTENTION) if expert else {}
    numbers, steps = found["numbers"], found["steps"]
    largest = 4 * max(map(math.prod, shapes))  # bytes in float32
    seconds: dict[str, dict[str, float]] = {}
    for (m, n), cost in shapes.items():
        for label in ("singular values", "factors"):
            taken = [s for spent, s in steps[label] if spent == cost]
            if taken:
                seconds.setdefault(label, {})[f"{m}x{n}"] = statistics.mean(taken)
    in_steps = sum(s for taken in steps.values() for _, s in taken)
    processor = sum(stage["processor_seconds"] for stage in numbers["stages"].values())
    all_layers = RANDOM[shape]["num_hidden_layers"]
    experts = {key: alone[key] for key in ("anonymous_peak_bytes", "resident_peak_bytes") if expert}
    experts |= {f"{key}_over_their_largest_matrix": size / expert for key, size in experts.items()}
    return {
        "layers": layers,
        "experts_alone": experts,
        "all_layers": all_layers,
        "anonymous_peak_bytes": found["anonymous_peak_bytes"],
        "anonymous_peak_bytes_by_stage": found["anonymous_peak_bytes_by_stage"],
        "resident_baseline_bytes": found["resident_baseline_bytes"],
        "resident_peak_bytes": found["resident_peak_bytes"],
        "resident_peak_over_largest_matrix": found["resident_peak_bytes"] / largest,
        "singular_values_bytes_extrapolated": values / layers * all_layers,
        "limits_bytes": {"one_gigabyte": 1e9, "six_largest_matrices": 6.0 * largest},
        "checkpoint_bytes": dense_bytes,
        "seconds_per_matrix": seconds,
        "seconds": numbers["seconds"],
        "seconds_in_progress_steps": in_steps,
        "processor_seconds": processor,
        "processor_hours_extrapolated": processor / layers * all_layers / 3600,
        **{name: numbers[name] for name in ("matrices", "lrcs", "rank_reduction", "parameter_ratio")},
        **{name: numbers[name] for name in ("largest_excess", "repaired_in_float64")},
    }


@dataclass(frozen=True)
class Cost:
    """Seconds of one matrix with one thread; svd: of two torch.svd."""

    model: str
    kind: str
    shape: tuple[int, int]
    values: float
    factors: float
    svd: float
    svd_extrapolated: bool
    floor: float

    @property
    def ours(self) -> float:
        """Seconds of values and factors."""
        return self.values + self.factors

    def plotted(self, label: str) -> float:
        """The seconds of one of the three curves."""
        return dict(zip(COLOURS, (self.svd, self.ours, self.floor), strict=True))[label]

    def numbers(self) -> dict[str, Any]:
        """The entry in the record."""
        return {
            "model": self.model,
            "kind": self.kind,
            "shape": list(self.shape),
            "rank": round(KEPT * min(self.shape)),
            "seconds": {"values": self.values, "factors": self.factors, "two_torch_svd": self.svd, "floor": self.floor},
            "two_torch_svd_extrapolated": self.svd_extrapolated,
            "two_torch_svd_over_ours": self.svd / self.ours,
            "ours_over_floor": self.ours / self.floor,
        }


def growth() -> list[Cost]:
    """The costs of all shapes, small to large."""
    speed = speeds()
    costs: list[Cost] = []
    for model, shapes in SHAPES.items():
        for kind, shape in shapes.items():
            same = [c for c in costs if c.kind == kind]
            costs.append(cost_of(model, kind, shape, same[-1] if same else None, speed))
    return costs


def cost_of(model: str, kind: str, shape: tuple[int, int], smaller: Cost | None, speed: tuple[float, float]) -> Cost:
    """The fastest of interleaved runs; smaller: the same kind of matrix of the next smaller model."""
    W = heavy_tailed(*shape, tail=0.9, seed=1)
    rank = round(KEPT * min(shape))
    scaled = 0.0 if smaller is None else smaller.svd * svd_work(shape) / svd_work(smaller.shape)
    patient = scaled / 2 < PATIENCE_SECONDS
    values: list[float] = []
    factors: list[float] = []
    svd: list[float] = []
    for _ in range(9 if min(shape) < 1000 else 3 if min(shape) < 3000 else 2):
        if patient and not (svd and svd[0] > PATIENCE_SECONDS):
            svd.append(2 * seconds_of(lambda: torch.svd(W)))
        started = time.perf_counter()
        decomposition = decompose(W)
        decomposition.values()
        values.append(time.perf_counter() - started)
        factors.append(seconds_of(partial(decomposition.factors, W, rank)))
    two = min(svd) if patient else scaled
    floor = sum(count / fast for count, fast in zip(operations(shape, rank), speed, strict=True))
    return Cost(model, kind, shape, min(values), min(factors), two, not patient, floor)


def svd_work(shape: tuple[int, int]) -> float:
    """What the time of a dense SVD is proportional to."""
    return float(min(shape) ** 2 * max(shape))


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


COLOURS = {"two torch.svd": "#d55e00", "ours: values and factors": "#0072b2", "flop floor of ours": "#888888"}
STYLES = {"square": ("o", "-"), "MLP": ("^", "--"), "k, v": ("s", ":")}


def draw(costs: list[Cost], path: Path) -> None:
    """Seconds against the number of parameters of the matrix, both logarithmic."""
    fig = Figure(figsize=(8.2, 5.6), layout="constrained", dpi=130)
    ax = fig.subplots()
    for label, colour in COLOURS.items():
        for kind, (marker, line) in STYLES.items():
            points = [(math.prod(c.shape), c.plotted(label), c) for c in costs if c.kind == kind]
            ax.plot([x for x, _, _ in points], [y for _, y, _ in points], line, color=colour, lw=1.4)
            for x, y, c in points:
                hollow = label == "two torch.svd" and c.svd_extrapolated
                ax.plot(x, y, marker, color=colour, ms=7, mfc="white" if hollow else colour)
    for c in costs:
        name: dict[str, Any] = {"text": f"{c.model}\n{c.shape[0]} × {c.shape[1]}", "fontsize": 7.5, "color": "#444444"}
        if c.kind == "MLP":  # under its lowest point, the others above their highest: nothing is hit there
            ax.annotate(**name, xy=(math.prod(c.shape), c.floor), xytext=(4, -24), textcoords="offset points")
        else:
            above: dict[str, Any] = {"xytext": (-4, 6), "textcoords": "offset points", "ha": "right"}
            ax.annotate(**name, xy=(math.prod(c.shape), c.svd), **above)
    ax.set(xscale="log", yscale="log", xlabel="parameters of the matrix, m n", ylabel="seconds, one thread")
    ax.set_title("One matrix of a 135M, 1B and 7B model: singular values, then factors at r = 0.2 k", fontsize=11)
    ax.margins(x=0.14, y=0.12)
    ax.grid(which="major", color="#dddddd", lw=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    entries = [Line2D([], [], color=colour, lw=2, label=label) for label, colour in COLOURS.items()]
    names = {"square": "square (q, o)", "MLP": "MLP", "k, v": "k, v (grouped heads)"}
    entries += [Line2D([], [], color="#444444", marker=m, ls=s, label=names[k]) for k, (m, s) in STYLES.items()]
    if any(c.svd_extrapolated for c in costs):
        entries.append(Line2D([], [], color="#d55e00", marker="o", ls="", mfc="white", label="extrapolated from 1B"))
    ax.legend(handles=entries, fontsize=9, frameon=False, loc="lower right")
    fig.savefig(path)


def exponent(costs: list[Cost]) -> float:
    """Of the growth of our cost with the side of a square matrix, over all models; the operations grow with 3."""
    squares = [c for c in costs if c.kind == "square"]
    first, last = squares[0], squares[-1]
    return math.log(last.ours / first.ours) / math.log(last.shape[0] / first.shape[0])


def summary(shape: str, numbers: dict[str, Any]) -> str:
    """One line of what `compress_checkpoint` found."""
    peak, ratio = numbers["resident_peak_bytes"], numbers["resident_peak_over_largest_matrix"]
    return (
        f"{shape}, {numbers['layers']} layers: peak resident set {peak / 1e6:.0f} MB above the imports ({ratio:.1f} x "
        f"the largest matrix in float32); for all {numbers['all_layers']} layers "
        f"{numbers['processor_hours_extrapolated']:.1f} h of one core, and "
        f"{numbers['singular_values_bytes_extrapolated'] / 1e6:.0f} MB of singular values while the plan is made"
    )


def main() -> None:
    """Measure, draw docs/benchmarks/scale.png, write docs/benchmarks/scale.json, print one line; 1 if over a limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="layers of the checkpoint")
    parser.add_argument("--mixture", action="store_true", help="the memory of a mixture of experts, and nothing else")
    arguments = parser.parse_args()
    shape, layers = MIXTURE if arguments.mixture else DENSE, arguments.layers
    torch.set_num_threads(1)
    settings = {"threads": 1, "workers": 1, "layers": layers, "rank_reduction": RANK_REDUCTION}
    if arguments.mixture:
        numbers, name = compress_checkpoint(shape, layers), "scale_mixture"
        line = summary(shape, numbers)
    else:
        with threadpool_limits(1):
            costs = growth()
        draw(costs, HERE / "scale.png")
        numbers, name = compress_checkpoint(shape, layers, vocab_size=1000), "scale"
        numbers |= {"growth": [c.numbers() for c in costs], "growth_exponent_of_square_matrices": exponent(costs)}
        settings["kept"] = KEPT
        faster = f"{costs[-1].svd / costs[-1].ours:.1f}x" + " (extrapolated)" * costs[-1].svd_extrapolated
        line = (
            f"{summary(shape, numbers)}; one 11008 x 4096: {faster} faster than two torch.svd; cost of square matrices "
        )
        line += f"grows with k^{exponent(costs):.2f}"
    inputs = {"model": f"{shape} shapes, random heavy-tailed weights"}
    Record("scale", inputs, settings, numbers).save(HERE / f"{name}.json")
    print(line)
    if numbers["resident_peak_bytes"] > min(numbers["limits_bytes"].values()):
        raise SystemExit("the peak is above the limit")


if __name__ == "__main__":
    main()
