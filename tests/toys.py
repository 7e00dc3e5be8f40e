"""A tokenizer of characters and small models that can read it, for the tests of training and answering."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import welore
from conftest import build

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def characters() -> PreTrainedTokenizerFast:
    """Every printable character is a token; 0 is padding, 1 the end."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {c: i for i, c in enumerate(ALPHABET, start=2)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")


def checkpoint(
    out: Path, rank_reduction: float | None = 0.4, family: str = "llama", storage: str = "factored", **changes: Any
) -> Path:
    """Directory of a small model (compressed unless rank_reduction is None) and its tokenizer."""
    model = build(family, vocab_size=len(ALPHABET) + 2, max_position_embeddings=512, **changes)
    model.generation_config.eos_token_id = 1
    if rank_reduction is not None:
        welore.compress(model, rank_reduction=rank_reduction, min_ratio=0.3, storage=storage)
    model.save_pretrained(out)
    characters().save_pretrained(out)
    return out


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}
