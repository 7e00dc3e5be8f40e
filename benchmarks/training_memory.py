"""The memory of a training step of models of 7 to 8 billion parameters, as `finetune --dry-run` tells it: a record.

Nothing of that size is trained or loaded: the formula reads configurations. Compressed models have the same share of
the ranks of every matrix, 80 % of the parameters. Steps of 4 x 1024 tokens in bfloat16, activations computed again.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from random_model import SHAPES
from welore.config import FinetuneConfig
from welore.models.quantizer import WeLoreConfig
from welore.models.skeleton import dense_skeleton
from welore.models.targets import find_targets
from welore.records import Record
from welore.training.memory import estimate_step

HERE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
KEEP = 0.8
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": {"model_type": "llama"} | SHAPES["llama-2-7b"],
    "Llama-3-8B": {"model_type": "llama"} | SHAPES["llama-3-8b"],
    "Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
STEP: dict[str, Any] = {"batch_size": 4, "max_length": 1024, "dtype": "bfloat16", "gradient_checkpointing": True}
EIGHT: dict[str, Any] = {"optimizer": "adamw_8bit"}
COMPRESSED: dict[str, dict[str, Any]] = {
    "lrc": {"method": "lrc"},
    "lrc, adamw_8bit": {"method": "lrc"} | EIGHT,
    "updates": {"method": "updates"},
    "updates, streamed weights": {"method": "updates", "stream_weights": True},
}
DENSE: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full, adamw_8bit": {"method": "full"} | EIGHT,
    "galore": {"method": "galore"},
    "lora": {"method": "lora"},
}


def main() -> None:
    """Write docs/benchmarks/training_memory.json."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    numbers: dict[str, Any] = {}
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            for kind, rows in (("dense", DENSE), ("compressed", COMPRESSED)):
                path = write_config(Path(directory) / kind, shape, compressed=kind == "compressed")
                for row, own in rows.items():
                    memory = estimate_step(path, FinetuneConfig(**STEP, **own), device="cpu").to_dict()
                    numbers.setdefault(kind, {}).setdefault(row, {})[name] = memory
    record = Record("training_memory", {"models": list(MODELS)}, STEP | {"keep": KEEP}, numbers)
    record.save(HERE / "training_memory.json")


def write_config(path: Path, shape: dict[str, Any], *, compressed: bool) -> Path:
    """A directory with a config.json alone: of the dense model, or one with the same share of all ranks."""
    config = AutoConfig.for_model(**shape)
    config.save_pretrained(path)
    if compressed:
        targets = find_targets(dense_skeleton(config, AutoModelForCausalLM))
        ranks = {t.name: int(KEEP * math.prod(t.shape) / sum(t.shape)) for t in targets}
        content = json.loads((path / "config.json").read_text())
        content["quantization_config"] = WeLoreConfig(ranks).to_dict()
        (path / "config.json").write_text(json.dumps(content))
    return path


if __name__ == "__main__":
    main()
