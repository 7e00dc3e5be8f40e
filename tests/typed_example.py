"""The public face, as its users call it; the type checker reads this file, nobody runs it."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import welore
from welore import (
    AllocationConfig,
    CalibrationConfig,
    CompressionConfig,
    EvaluationConfig,
    FinetuneConfig,
    PretrainConfig,
    RecoveryConfig,
    ScoreConfig,
)

MODEL = "HuggingFaceTB/SmolLM2-1.7B"


def compress_on_disk() -> tuple[float, float, int, Path | None]:
    result = welore.compress(MODEL, "small", keep=0.8)
    print(result.plan.threshold, result.record.numbers["seconds"])
    return result.parameter_ratio, result.rank_reduction, result.bytes, result.output_dir


def compress_as_published(device: str = "cuda:1") -> Path | None:
    config = CompressionConfig(keep=0.8, scaling="whitening", strategy="uniform", storage="factored")
    calibration = CalibrationConfig(dataset="wikitext2", num_tokens=262_144, max_length=2048)
    result = welore.compress(
        MODEL, "small", config, calibration=calibration, recovery=None, device=device, workers=2, overwrite=True
    )
    return result.output_dir


def compress_in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    welore.compress(model, tokenizer=tokenizer, keep=0.8, recovery=RecoveryConfig(), progress=False)
    logits: torch.Tensor = model(torch.tensor([[1, 2, 3]])).logits
    return logits


def step_by_step() -> welore.Plan:
    statistics = welore.calibrate(MODEL, CalibrationConfig(num_tokens=4096), "statistics.safetensors", dataset="c4")
    spectra = welore.analyze(MODEL, statistics=statistics, scaling="kfac", exclude=("lm_head",))
    spectra.save(Path("spectra.safetensors"))
    plan = welore.allocate(spectra, AllocationConfig(strategy="waterfill", rank_multiple=16), keep=0.8)
    plan.save(Path("plan.json"))
    welore.compress(MODEL, "small", plan=plan, statistics=statistics)
    ranks: dict[str, int] = plan.ranks
    print(ranks, welore.Spectra.load("spectra.safetensors").shapes, welore.Statistics.load("statistics.safetensors"))
    return welore.Plan.load("plan.json")


def measure(texts: list[str]) -> list[dict[str, object]]:
    perplexity = welore.evaluate("small", EvaluationConfig(max_length=1024, num_windows=16), dataset=texts)
    divergence = welore.evaluate("small", dataset=Dataset.from_dict({"text": texts}), against=MODEL)
    answers = welore.score("small", ScoreConfig(limit=100), task="boolq")
    harness = welore.evaluate_tasks("small", ["arc_easy", "hellaswag"], limit=100)
    return [record.numbers for record in (perplexity, divergence, answers, harness)]


def train() -> welore.Record:
    config = FinetuneConfig(method="lrc", max_steps=100, learning_rate=1e-4, save_steps=0)
    record = welore.finetune("small", "tuned", config, dataset="wikitext2", resume=True, label="a run")
    welore.pretrain("study", PretrainConfig(size="9m", max_steps=100), dataset="wikitext2")
    return record


def train_by_hand() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained("small")
    marked = welore.mark_trainable(model, "lrc", train_norms=True)
    torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    print(marked, AutoTokenizer.from_pretrained("small"))
    return model


def deliver() -> list[Path | None]:
    merged = welore.merge("small", "dense", max_shard_size="2GB")
    exported = welore.export("small", "exported", "dense")
    print(welore.info("small"))
    return [merged, exported, welore.report(["small", "tuned"], "page")]


def load_compressing() -> PreTrainedModel:
    settings = welore.WeLoreConfig(rank_reduction=0.5, scaling="none")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=settings)
    return model


def explain(error: welore.WeLoreError) -> str:
    return str(error)
