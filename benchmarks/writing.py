"""Processor time of the text that SmolLM2 writes, against a loop over transformers' own cache; and its likelihood.

Ours writes as many windows as the default job, as `calibrate` does, but shorter ones. After each of its steps the other
loop takes one: 32 windows in float32, a DynamicCache, a token drawn from the cumulated probabilities. Both pay for the
same state of the machine, so their ratio holds on one that is shared. One thread.

The text is then read by the model in float32: its mean log-likelihood beside the one that the model expects of its own
words, and the divergence of the distribution that wrote from it.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from welore.config import MAX_LENGTH, NUM_TOKENS, CalibrationConfig
from welore.data.self_generated import generate_text, uniform_numbers
from welore.io.context import RunContext
from welore.io.hub import resolve_model
from welore.models.copies import generation_copy
from welore.models.embedded import embedded_model
from welore.models.load import load_model
from welore.records import Record

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
WINDOWS, LENGTH, OTHER_WINDOWS, WINDOWS_READ = NUM_TOKENS // MAX_LENGTH, 128, 32, 8


@torch.inference_mode()
def other_loop(model: Any, uniform: Tensor, vocabulary: int) -> Iterator[None]:
    """Windows in float32 with transformers' own cache, one token of all windows at a time."""
    cache, last = None, (uniform[:, :1] * vocabulary).long()
    for numbers in uniform.T[1:]:
        out = model(last, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cumulated = out.logits[:, -1].softmax(-1).cumsum(-1, dtype=torch.float64)
        last = torch.searchsorted(cumulated, numbers[:, None].contiguous(), right=True).clamp_(max=vocabulary - 1)
        yield


class InTurns:
    """A progress that counts the processor time of every step, and lets the other loop take one after it."""

    def __init__(self, other: Iterator[None]) -> None:
        self.other, self.ours_seconds, self.other_seconds = other, 0.0, 0.0

    def __call__(self, items: Iterable[tuple[Any, float]], label: str, total: float) -> Iterator[Any]:
        """The items of our own loop."""
        for item, _ in items:
            started = time.process_time()
            yield item
            ended = time.process_time()
            next(self.other, None)
            self.ours_seconds += ended - started
            self.other_seconds += time.process_time() - ended


@torch.inference_mode()
def likelihood(model: Any, writer: Any, windows: Tensor) -> dict[str, float]:
    """Means over the tokens of windows, in nats: see the top of this file."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for window in windows:
        p, q = (net(window[None]).logits[0, :-1].float().log_softmax(-1) for net in (model, writer))
        own = p.gather(-1, window[1:, None]).sum()
        sums += torch.stack([own, (p.exp() * p).sum(), (q.exp() * (q - p)).sum()]).double()
        count += len(p)
    names = ("log_likelihood", "expected_log_likelihood", "divergence")
    return dict(zip(names, (sums / count).tolist(), strict=True))


def main() -> None:
    """Measure, write docs/benchmarks/writing.json, print one line."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    loaded = load_model(resolve_model(embedded_model()), RunContext.create(device="cpu"), dtype="float32")
    model, writer = loaded.model.eval(), generation_copy(loaded.model, cpu)
    config = CalibrationConfig(num_tokens=WINDOWS * LENGTH, max_length=LENGTH)
    uniform = uniform_numbers(config)
    turns = InTurns(other_loop(model, uniform[:OTHER_WINDOWS], model.config.vocab_size))
    windows = generate_text(writer, loaded.tokenizer, config, progress=turns)
    ours, others = turns.ours_seconds / windows.numel(), turns.other_seconds / uniform[:OTHER_WINDOWS].numel()
    numbers: dict[str, Any] = {"windows": len(windows), "milliseconds_per_token": {"ours": 1e3 * ours}}
    numbers["milliseconds_per_token"]["transformers"] = 1e3 * others
    numbers |= {"ours_over_transformers": ours / others} | likelihood(model, writer, windows[:WINDOWS_READ])
    settings = {
        "threads": 1,
        "num_tokens": windows.numel(),
        "max_length": LENGTH,
        "dtype": str(writer.dtype).removeprefix("torch."),
    }
    settings |= {"windows_of_transformers": OTHER_WINDOWS, "windows_read": WINDOWS_READ}
    Record("writing", {"model": embedded_model().stem}, settings, numbers).save(HERE / "writing.json")
    print(
        f"a token takes {1e3 * ours:.2f} ms of one core in {settings['dtype']}, {ours / others:.2f} of the other loop; "
        f"log-likelihood {numbers['log_likelihood']:.2f}, expected {numbers['expected_log_likelihood']:.2f}, "
        f"divergence {numbers['divergence']:.4f}"
    )


if __name__ == "__main__":
    main()
