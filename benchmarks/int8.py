"""Perplexity and bytes of weights in 8 bits, for a dense and a compressed model: docs/benchmarks/int8.json.

    python benchmarks/int8.py DENSE SMALL --texts wikitext2=FILE other=FILE [--rows ...] [--num-windows 16]

DENSE is a directory in bfloat16, SMALL what `welore compress` made of it. Products are in float32, so that the stored
weights alone differ. Rows that run here replace those of the record.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import welore
from welore.config import EvaluationConfig
from welore.io.context import RunContext
from welore.models.int8 import with_int8
from welore.models.load import load_model
from welore.models.quantizer import WeLoreConfig
from welore.models.sink import open_sink
from welore.models.source import CheckpointSource
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def dense_int8(directory: Path, out: Path) -> None:
    """Write a dense model with its weights in 8 bits, as `export --format int8` writes a compressed one."""
    source = CheckpointSource(directory)
    outputs = [source.copied(name) for name in source.names()]
    config = with_int8(WeLoreConfig({}), source.empty_skeleton(), outputs)
    with open_sink(source, out) as sink:
        sink.write(outputs, config, RunContext.create(progress=False).progress)


def compressed_int8(directory: Path, out: Path) -> None:
    """Write a compressed model with its weights in 8 bits."""
    welore.export(directory, out, "int8", progress=False)


WRITERS = {"dense": dense_int8, "compressed": compressed_int8}
BITS = ("16 bits", "int8")
ROWS = tuple(f"{model}, {bits}" for model in WRITERS for bits in BITS)


def measured(row: str, directory: Path, texts: dict[str, str], windows: int) -> dict[str, Any]:
    """Bytes of the weight files, and the perplexity on every text."""
    model, bits = row.split(", ")
    with tempfile.TemporaryDirectory() as temporary:
        if bits == "int8":
            WRITERS[model](directory, Path(temporary) / "int8")
            directory = Path(temporary) / "int8"
        numbers: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors"))}
        context = RunContext.create(device="cpu", progress=False)
        loaded = load_model(directory, context, "float32")
    config = EvaluationConfig(max_length=512, num_windows=windows, batch_size=1)
    options: Any = {"tokenizer": loaded.tokenizer, "device": "cpu", "progress": False}
    for name, file in texts.items():
        record = welore.evaluate(loaded.model, replace(config, dataset=file), **options)
        numbers[f"perplexity_{name}"] = record.numbers["perplexity"]
    return numbers


def main() -> None:
    """Measure the rows and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--num-windows", type=int, default=16)
    arguments = parser.parse_args()
    texts = dict(text.split("=", 1) for text in arguments.texts)
    out = HERE / "int8.json"
    rows: dict[str, Any] = Record.load(out).numbers["rows"] if out.is_file() else {}
    for row in arguments.rows:
        rows[row] = measured(row, getattr(arguments, row.split(", ")[0]), texts, arguments.num_windows)
        print(row, rows[row], flush=True)
    made = Record.load(arguments.compressed / "compression.json")
    made.settings.pop("statistics")  # which name a directory
    settings = {"max_length": 512, "num_windows": arguments.num_windows, "texts": list(texts)}
    ordered = {row: rows[row] for row in ROWS if row in rows}
    numbers = {"parameter_ratio": made.numbers["parameter_ratio"], "rows": ordered}
    Record("int8", {"model": "SmolLM2-135M-Instruct", "compression": made.settings}, settings, numbers).save(out)


if __name__ == "__main__":
    main()
