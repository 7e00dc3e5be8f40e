"""The untrained Llama: its size by name, a tokenizer made from the text, random weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from welore.errors import WeLoreError, choose
from welore.io.atomic import atomic_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEGIN, END = "<s>", "</s>"
BYTES = 256  # the smallest vocabulary of a byte-level BPE, without BEGIN and END
CONTEXT = 1024  # the least number of positions


@dataclass(frozen=True)
class Size:
    """Hidden size, blocks, attention heads and width of the MLP."""

    hidden: int
    layers: int
    heads: int
    intermediate: int


# GaLore's configurations (arXiv 2403.03507, appendix), named after their parameters with a vocabulary of 32,000;
# 2m is ours, for a processor, with a vocabulary of 4,096.
SIZES = {
    "2m": Size(128, 6, 4, 352),
    "9m": Size(128, 4, 4, 352),
    "20m": Size(256, 4, 4, 688),
    "60m": Size(512, 8, 8, 1376),
    "130m": Size(768, 12, 12, 2048),
    "350m": Size(1024, 24, 16, 2736),
    "1b": Size(2048, 24, 32, 5461),
    "7b": Size(4096, 32, 32, 11008),
}


def size_of(text: str) -> Size:
    """A size by its name, or "HIDDEN/LAYERS/HEADS/INTERMEDIATE"."""
    if "/" not in text:
        return choose("size", text, SIZES)
    parts = text.split("/")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise WeLoreError(f"size is {text!r}: give a name ({', '.join(SIZES)}) or HIDDEN/LAYERS/HEADS/INTERMEDIATE")
    size = Size(*map(int, parts))
    if size.hidden % (2 * size.heads):
        raise WeLoreError(f"size is {text!r}: {size.heads} heads must divide the hidden size into even parts")
    return size


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most vocab_size tokens, made from the texts; the same texts give the same tokenizer."""
    if vocab_size < BYTES + 2:
        raise WeLoreError(f"vocab_size is {vocab_size}: bytes and the two ends take {BYTES + 2}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Lines, because the threads share out whole texts, and one long text would keep one of them busy.
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)


def init_model(size: Size, tokenizer: "PreTrainedTokenizerBase", max_length: int, seed: int) -> LlamaForCausalLM:
    """A Llama with weights from N(0, 0.02), as in the paper: RMSNorm 1e-6, head not tied to the embeddings."""
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(CONTEXT, max_length),
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write both to the directory, whole or not at all; an existing one is replaced."""
    with atomic_directory(directory, overwrite=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
