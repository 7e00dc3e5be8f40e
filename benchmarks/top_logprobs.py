"""How much of a divergence the k likeliest tokens tell: docs/benchmarks/top_logprobs.json.

    python benchmarks/top_logprobs.py DENSE NAME=MODEL ... --text FILE [--num-windows 4]

The models are what `welore compress` or a quantizer made of DENSE. Windows of 512 tokens, float32. A model that is
compared replaces its row of the record.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from welore.data.text import read_text
from welore.data.windows import windows
from welore.evaluation.divergence import logit_pieces
from welore.evaluation.logprobs import Predictions
from welore.io.context import RunContext
from welore.models.load import LoadedModel, evaluating, load_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
LENGTH, SIZES = 512, (16, 64, 128, 256, 1024)


@torch.inference_mode()
def compared(dense: LoadedModel, small: LoadedModel, pieces: list[torch.Tensor]) -> dict[str, Any]:
    """Mean divergence of the whole vocabulary, and by every k the share of it that is missed and the rest of p."""
    sums: dict[int, list[float]] = {k: [0.0, 0.0] for k in (0, *SIZES)}
    with evaluating(dense.model), evaluating(small.model):
        for window in pieces:
            both = (logit_pieces(loaded.model, window[None]) for loaded in (dense, small))
            for (reference, _), (own, _) in zip(*both, strict=True):
                for k, sum_of in sums.items():
                    predictions = Predictions.of(reference, k or reference.shape[-1])
                    sum_of[0] += float(predictions.divergence(own).double().sum())
                    sum_of[1] += float(predictions.rest.exp().double().sum())
    tokens, (exact, _) = sum(len(window) - 1 for window in pieces), sums.pop(0)
    by_k = {str(k): {"missed": 1 - kl / exact, "rest": rest / tokens} for k, (kl, rest) in sums.items()}
    return {"kl": exact / tokens, "tokens": tokens, "by_k": by_k}


def main() -> None:
    """Compare the models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--num-windows", type=int, default=4)
    given = parser.parse_args()
    context, out = RunContext.create(device="cpu", progress=False), HERE / "top_logprobs.json"
    dense = load_model(given.dense, context, "float32")
    pieces = windows(dense.tokenizer, read_text(given.text), LENGTH, given.num_windows)
    rows: dict[str, Any] = Record.load(out).numbers if out.is_file() else {}
    for name, _, model in (text.partition("=") for text in given.models):
        rows[name] = compared(dense, load_model(model, context, "float32"), pieces)
        print(name, rows[name], flush=True)
    settings = {"max_length": LENGTH, "num_windows": given.num_windows, "text": Path(given.text).name}
    Record("top_logprobs", {"model": "SmolLM2-135M-Instruct"}, settings, rows).save(out)


if __name__ == "__main__":
    main()
