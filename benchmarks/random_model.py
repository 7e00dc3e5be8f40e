"""Checkpoints of any shape without a download: random weights with a heavy-tailed spectrum, and a tokenizer.

    python benchmarks/random_model.py llama-3.2-1b /tmp/dense --layers 2

bfloat16, one shard per decoder block, written piece by piece, so that a model larger than the memory can be made. A
hollow one has headers and no numbers: enough for `estimate`, and no room on the disk.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from welore.io.atomic import write_json
from welore.io.checkpoint import INDEX
from welore.io.safetensors_stream import TensorInfo, TensorWriter
from welore.models.skeleton import dense_skeleton

# q and k get the heaviest tails, gate and v the lightest: some matrices of both shapes can lose much, others little.
TAILS = {"q_proj": 0.9, "k_proj": 0.9, "o_proj": 0.5, "up_proj": 0.5, "down_proj": 0.5}
OTHER_TAIL = 0.3
SIZE = 0.02  # of a weight before the tails
PIECE = 1 << 24  # numbers that are made at once
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny-mixture": {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
    "small-mixture": {
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 4096,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
}


def heavy_tailed(m: int, n: int, tail: float, seed: int) -> torch.Tensor:
    """W (m, n), float32: a Gaussian matrix whose rows and columns have log-normal lengths of width `tail`."""
    return torch.cat(list(pieces((m, n), tail, seed)))


def pieces(shape: tuple[int, ...], tail: float, seed: int) -> Iterator[torch.Tensor]:
    """The rows of such a matrix in blocks; of a vector all at once, ones."""
    if len(shape) < 2:
        yield torch.ones(shape)
        return
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 1, generator=generator).mul(tail).exp().mul(SIZE)
    columns = torch.randn(n, generator=generator).mul(tail).exp()
    for some in rows.split(max(1, PIECE // n)):
        yield torch.randn(len(some), n, generator=generator).mul_(some).mul_(columns)


def make_checkpoint(directory: Path, shape: dict[str, Any], *, hollow: bool = False) -> Path:
    """A model of a shape, sharded by decoder block, and its tokenizer; the directory again.

    shape: fields of its configuration; a Llama if they name no model_type.
    """
    directory.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    kind = CONFIG_MAPPING[shape.get("model_type", "llama")]
    config = kind(**special | {key: value for key, value in shape.items() if key != "model_type"}, dtype="bfloat16")
    model: Any = dense_skeleton(config, AutoModelForCausalLM)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    GenerationConfig(**special).save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name, parameter in model.named_parameters():
        number = int(name.split(".")[2]) + 2 if ".layers." in name else 1
        filename = f"model-{number:05}-of-{config.num_hidden_layers + 1:05}.safetensors"
        shards.setdefault(filename, {})[name] = TensorInfo(torch.bfloat16, tuple(parameter.shape))
    seed = 0
    for filename, tensors in shards.items():
        with TensorWriter(directory / filename, tensors) as writer:
            for name, (dtype, size) in tensors.items():
                seed += 1
                if hollow:
                    writer._missing.discard(name)  # a hole in the file
                    continue
                tail = TAILS.get(name.split(".")[-2], OTHER_TAIL)
                writer.write(name, (piece.to(dtype).flatten() for piece in pieces(size, tail, seed)))
    weight_map = {name: filename for filename, tensors in shards.items() for name in tensors}
    total = sum(2 * math.prod(info.shape) for tensors in shards.values() for info in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return directory


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="decoder blocks, in place of those of the shape")
    parser.add_argument("--hollow", action="store_true", help="write no numbers")
    arguments = parser.parse_args()
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    make_checkpoint(arguments.directory, SHAPES[arguments.shape] | layers, hollow=arguments.hollow)


if __name__ == "__main__":
    main()
