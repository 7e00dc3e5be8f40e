"""A tokenizer of characters and small models that can read it, for the tests of training and answering."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import welore
from conftest import build, compress
from welore.calibration.statistics import Statistics
from welore.config import CalibrationConfig, FinetuneConfig
from welore.records import Record
from welore.training.finetune import finetune

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def characters(*, opens: bool = False) -> PreTrainedTokenizerFast:
    """Every printable character is a token; 0 is padding, 1 the end. opens: token 0 comes in front of every text."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {c: i for i, c in enumerate(ALPHABET, start=2)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    if opens:
        letters.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")


def checkpoint(
    out: Path, rank_reduction: float | None = 0.4, family: str = "llama", storage: str = "factored", **changes: Any
) -> Path:
    """Directory of a small model (compressed unless rank_reduction is None) and its tokenizer.

    storage: or "split", long matrices in two blocks; there are some if intermediate_size is 64 or more.
    """
    model = build(family, **{"vocab_size": len(ALPHABET) + 2, "max_position_embeddings": 512} | changes)
    model.generation_config.eos_token_id = 1
    if rank_reduction is not None:
        how: dict[str, Any] = {"storage": "pivoted", "split": True} if storage == "split" else {"storage": storage}
        compress(model, rank_reduction=rank_reduction, min_ratio=0.3, **how)
    model.save_pretrained(out)
    characters().save_pretrained(out)
    return out


def calibrate(model: Any, dataset: Any, output: Any = None, *, tokenizer: Any = None, **settings: Any) -> Statistics:
    """`welore.calibrate` with the fields of its settings as keywords."""
    return welore.calibrate(model, CalibrationConfig(**settings), output, dataset=dataset, tokenizer=tokenizer)


def finetuned(model: Any, out: Path, method: str = "lrc", **settings: Any) -> Record:
    """welore.finetune, with fields of its config and options side by side; on the CPU."""
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    config = FinetuneConfig(method=method, **{name: value for name, value in settings.items() if name in fields})  # type: ignore[arg-type]
    options = {name: value for name, value in settings.items() if name not in fields}
    return finetune(model, out, config, **{"device": "cpu"} | options)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def trace(directory: Path, checkpoints: int = 6, layers: int = 3, seed: int = 0) -> Path:
    """A trace as `pretrain` writes it, of random numbers; q, k, gate and o grow lower in rank with time."""
    from welore.emergence.trace import COMPARED, OTHER, SAME, Writer, key

    draws = np.random.default_rng(seed)
    shapes = {"q": (12, 12), "k": (12, 12), "v": (12, 12), "o": (12, 12)}
    kinds = {f"self_attn.{kind}_proj": shape for kind, shape in shapes.items()}
    kinds |= {"mlp.gate_proj": (20, 12), "mlp.up_proj": (20, 12), "mlp.down_proj": (12, 20)}
    named = {f"model.layers.{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}
    writer = Writer(directory, {"name": f"toy, seed {seed}", "fingerprint": "0" * 8}, named)
    for at in range(checkpoints):
        arrays: dict[str, Any] = {}
        for name, (m, n) in named.items():
            values = np.sort(draws.random(min(m, n)))[::-1]
            arrays[key(name, "gradient")], arrays[key(name, "gradient_energy")] = values, (values**2).sum()
            low = name.rpartition(".")[2] in ("q_proj", "k_proj", "gate_proj", "o_proj")
            decay = np.exp(-np.arange(min(m, n)) * (at if low else 0.1 * draws.random()) / 4)
            arrays[key(name, "weight")], arrays[key(name, "change")] = values * decay, values * at
            for field in COMPARED:
                arrays[key(name, field, OTHER)] = 0.2 + 0.6 * draws.random(at + 1)
                arrays[key(name, field, SAME)] = np.append(0.3 + 0.6 * draws.random(at), 1.0)
        loss = 5.0 - at / checkpoints
        rate = 1e-3 * (1 - abs(at - 1) / checkpoints)
        line = {"step": 10 * at, "tokens": 640 * at, "learning_rate": rate, "held_out_loss": loss}
        writer.append(line, arrays)
    return directory
