"""Every verb on a tiny model, on the GPU of this process: a simulated one, or the machine's own.

python tests/device_runs.py simulated|single|real DIRECTORY NAME...    # a line of JSON for every run; single: a
simulated one without float64

Nothing says `device` but what a user would say: "auto" has to find the GPU.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import welore
from welore.config import CalibrationConfig, CompressionConfig, EvaluationConfig, FinetuneConfig, ScoreConfig

WRITTEN: dict[str, Any] = {"num_tokens": 384, "max_length": 32}
TRAINING: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "max_length": 48, "eval_steps": 2, "max_eval_samples": 2}


def refuse(at: Path) -> None:
    """The simulated GPU refuses what a real one refuses."""
    numbers = torch.ones(32, 32, device="cuda")
    for mix in (lambda: numbers + torch.ones(32, 32), lambda: numbers @ torch.ones(32, 32), numbers.numpy):
        try:
            mix()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("a tensor of the GPU and one of the CPU went together")
    assert (numbers @ numbers).sum().item() == 32**3


def forward(at: Path) -> None:
    """The numbers are those of the CPU."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 66)[None]
    expected = AutoModelForCausalLM.from_pretrained(at / "dense")(ids).logits
    torch.testing.assert_close(on_gpu(at / "dense")(ids.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def calibrate(at: Path) -> None:
    welore.calibrate(at / "dense", CalibrationConfig(measure_losses=0.5, **WRITTEN), at / "statistics")


def calibrate_whole(at: Path) -> None:
    config = CalibrationConfig(whole_model=True, **WRITTEN)
    welore.calibrate(at / "dense", config, at / "whole", dataset=at / "text.txt")


def analyze(at: Path) -> None:
    spectra = welore.analyze(at / "dense", scaling="kfac", statistics=at / "statistics")
    spectra.save(at / "spectra")
    plan = welore.allocate(spectra, keep=0.7)
    assert abs(plan.parameter_ratio - 0.7) < 0.03


def compress(at: Path) -> None:
    result = welore.compress(at / "dense", at / "best", keep=0.8, calibration=CalibrationConfig(**WRITTEN))
    assert "failed" not in result.record.settings["recovery"], result.record.settings["recovery"]
    assert abs(result.parameter_ratio - 0.8) < 0.03


def compress_pruning_neurons(at: Path) -> None:
    config, calibration = CompressionConfig(keep=0.6, mlp_pruning=0.25), CalibrationConfig(**WRITTEN)
    result = welore.compress(at / "dense", at / "smaller", config, calibration=calibration)
    assert abs(result.parameter_ratio - 0.6) < 0.03


def compress_as_the_paper(at: Path) -> None:
    welore.compress(at / "dense", at / "paper", CompressionConfig(preset="paper", rank_reduction=0.4))


def compress_in_memory(at: Path) -> None:
    model = on_gpu(at / "dense")
    result = welore.compress(model, keep=0.7, statistics=at / "statistics", recovery=None)
    assert abs(result.parameter_ratio - 0.7) < 0.03
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())


def evaluate(at: Path) -> None:
    how = EvaluationConfig(dataset=at / "text.txt", max_length=64, num_windows=4)
    perplexity = welore.evaluate(at / "factored", how, against=at / "dense")
    assert 1 < perplexity.numbers["perplexity"] < 1e6


def score(at: Path) -> None:
    welore.score(at / "factored", ScoreConfig(task="coin_flip", dataset="generated", limit=4))


def finetune_lrc(at: Path) -> None:
    config = FinetuneConfig(method="lrc", dataset=at / "text.txt", **TRAINING)
    record = welore.finetune(at / "factored", at / "lrc", config)
    assert len(record.numbers["train_loss"]) > 0


def finetune_full(at: Path) -> None:
    config = FinetuneConfig(method="full", dataset=at / "text.txt", **TRAINING)
    welore.finetune(at / "factored", at / "full", config)


def finetune_lora(at: Path) -> None:
    config = FinetuneConfig(method="lora", dataset=at / "text.txt", **TRAINING)
    welore.finetune(at / "dense", at / "lora", config)


def finetune_streamed(at: Path) -> None:
    from transformers import TrainerCallback

    class Weights(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            places = {n.rsplit(".", 2)[1]: p.device.type for n, p in model.named_parameters() if ".layers." in n}
            assert places["base_layer"] == "cpu", places
            assert places["default"] == "cuda", places

    options: dict[str, Any] = {"gradient_checkpointing": True, "stream_weights": True}
    config = FinetuneConfig(method="updates", dataset=at / "text.txt", **TRAINING | options)
    welore.finetune(at / "factored", at / "streamed", config, callbacks=[Weights()])


def finetune_selective(at: Path) -> None:
    config = FinetuneConfig(dataset=at / "text.txt", selective_checkpointing=True, **TRAINING)
    welore.finetune(at / "factored", at / "selective", config)


def finetune_task(at: Path) -> None:
    config = FinetuneConfig(task="coin_flip", task_dataset="generated", **TRAINING | {"max_length": 400})
    welore.finetune(at / "factored", at / "task", config)


def distill(at: Path) -> None:
    config = FinetuneConfig(distill=at / "dense", dataset="self", **TRAINING)
    welore.finetune(at / "factored", at / "distilled", config)


def second_gpu(at: Path) -> None:
    """A GPU that is named is the one that computes, in training, too."""
    welore.calibrate(at / "dense", CalibrationConfig(**WRITTEN), at / "on_second", device="cuda:1")
    welore.evaluate(
        at / "factored", EvaluationConfig(max_length=64, num_windows=2), dataset=at / "text.txt", device="cuda:1"
    )
    config = FinetuneConfig(dataset=at / "text.txt", **TRAINING)
    welore.finetune(at / "factored", at / "tuned_on_second", config, device="cuda:1")


def pretrain(at: Path) -> None:
    size: dict[str, Any] = {"size": "32/2/4/56", "tokenizer": str(at / "dense"), "batch_size": 4, "max_length": 32}
    steps: dict[str, Any] = {"max_steps": 4, "probes": 4, "probe_items": 2, "max_eval_samples": 8}
    welore.pretrain(at / "trained", welore.PretrainConfig(**size, **steps), dataset=at / "text.txt")


def merge(at: Path) -> None:
    welore.merge(at / "factored", at / "merged")


def merge_in_memory(at: Path) -> None:
    model = on_gpu(at / "factored")
    welore.merge(model)
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())


def generate(at: Path) -> None:
    model = on_gpu(at / "factored")
    ids = torch.tensor([[5, 6, 7]], device=model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written.device.type == "cuda"


def on_gpu(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return torch.nn.Module.to(AutoModelForCausalLM.from_pretrained(directory), torch.device("cuda", 0))


RUNS: dict[str, Callable[[Path], None]] = {
    run.__name__: run
    for run in (
        refuse,
        forward,
        calibrate,
        calibrate_whole,
        analyze,
        compress,
        compress_pruning_neurons,
        compress_as_the_paper,
        compress_in_memory,
        merge,
        merge_in_memory,
        finetune_lrc,
        finetune_full,
        finetune_lora,
        finetune_streamed,
        finetune_selective,
        finetune_task,
        distill,
        second_gpu,
        pretrain,
        evaluate,
        score,
        generate,
    )
}


def prepare(at: Path) -> None:
    """The tiny models and the text that the runs read."""
    from toys import checkpoint

    checkpoint(at / "dense", None)
    checkpoint(at / "factored", 0.4)
    words = [f"{i} green bottles hang on wall number {i * i % 97}." for i in range(600)]
    (at / "text.txt").write_text("\n".join(words))


def main(kind: str, at: Path, names: list[str]) -> None:
    """Run them in order; a failure does not stop the next."""
    ledger = None
    if kind != "real":
        import simulated_gpu

        simulated_gpu.install(2, float64=kind == "simulated")
        ledger = simulated_gpu.ledger
    import_module("welore.training.finetune")
    gc.collect()
    gc.freeze()  # every training collects garbage, and objects of libraries are none
    for name in names:
        if ledger is not None:
            ledger.clear()
        started, error = time.perf_counter(), ""
        try:
            RUNS[name](at)
        except Exception:
            error = traceback.format_exc()
        seconds = time.perf_counter() - started
        counts = {} if ledger is None else vars(ledger)
        print(json.dumps({"name": name, "error": error, "seconds": seconds, **counts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
