"""Good files of every kind, small: models, texts, spectra, statistics, plans, results, runs and records."""

import random
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import zygote
from zygote import Home, run


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


WORDS = words("rain fell on the roofs of an old town and nobody heard it until the river rose over the lower bridge")
MODEL = ["m", "t.txt"]
MODELS = [*MODEL, "gpt2", "mixtral", "qwen2", "small"]
TRAIN = "--max-steps 4 --batch-size 1 --max-length 16 --eval-steps 2 --save-steps 1 --learning-rate 1e-3"
PRETRAIN = (
    "--size 16/1/1/16 --vocab-size 280 --max-steps 6 --probes 4 --probe-items 1 --max-eval-samples 2 --batch-size 1 "
    "--max-length 16 --save-steps 2"
)
CALIBRATE = "--num-tokens 64 --max-length 16 --measure-losses 0"
EVALUATE = "--max-length 16 --num-windows 2"


@dataclass(frozen=True)
class Verb:
    """A command that writes, its output, what it reads; a run is resumed by --resume."""

    command: list[str]
    output: str
    needs: list[str]
    resumable: bool = False

    @property
    def old(self) -> dict[str, str]:
        """What lies at the output before: a copy of another result."""
        names = {"finetune": "run", "pretrain": "study"}
        return {self.output: names.get(self.command[0], "pivoted")} if "--overwrite" in self.command else {}


def finetune(model: object, out: str, *more: str) -> list[str]:
    """The command of a short fine-tuning."""
    return [*words(f"finetune {model} {out} --dataset t.txt {TRAIN}"), *more]


RECOVER = (
    "compress m out --keep 0.7 --statistics c.safetensors --recovery t.txt --num-tokens 1536 --recovery-max-steps 4 "
    "--recovery-save-steps 1"
)
VERBS = {
    "analyze": Verb(words("analyze m -o o.safetensors"), "o.safetensors", ["m"]),
    "scaled": Verb(
        words("analyze m -o o.safetensors --statistics c.safetensors"), "o.safetensors", ["m", "c.safetensors"]
    ),
    "calibrate": Verb(
        words(f"calibrate m -o o.safetensors --dataset self:1,t.txt:1 {CALIBRATE}"), "o.safetensors", MODEL
    ),
    "allocate": Verb(words("allocate s.safetensors --rank-reduction 0.4 -o o.json"), "o.json", ["s.safetensors"]),
    "compress": Verb(words("compress m out --rank-reduction 0.4"), "out", ["m"]),
    "workers": Verb(words("compress m out --rank-reduction 0.4 --workers 2"), "out", ["m"]),
    "overwrite": Verb(words("compress m out --rank-reduction 0.3 --overwrite"), "out", ["m"]),
    "recover": Verb(words(RECOVER), "out", [*MODEL, "c.safetensors"]),
    "best": Verb(words("compress m out --keep 0.8 --num-tokens 128 --max-length 32"), "out", ["m"]),
    "merge": Verb(words("merge small out --max-shard-size 30KB"), "out", ["small"]),
    "export": Verb(words("export pivoted out --format dense"), "out", ["pivoted"]),
    "finetune": Verb(finetune("small", "out"), "out", ["small", "t.txt"], resumable=True),
    "again": Verb(finetune("small", "out", "--overwrite", "--seed", "1"), "out", ["small", "t.txt"], resumable=True),
    "pretrain": Verb(words(f"pretrain out --dataset t.txt {PRETRAIN}"), "out", ["t.txt"], resumable=True),
    "evaluate": Verb(words(f"evaluate m --dataset t.txt {EVALUATE} -o o.json"), "o.json", MODEL),
    "merge-again": Verb(words("merge small out --overwrite"), "out", ["small"]),
    "pretrain-again": Verb(
        words(f"pretrain out --dataset t.txt {PRETRAIN} --seed 1 --overwrite"), "out", ["t.txt"], resumable=True
    ),
    "teach": Verb(
        words(f"finetune small out --distill m --dataset self {TRAIN}"), "out", ["m", "small"], resumable=True
    ),
    "gguf": Verb(words("analyze g.gguf -o o.safetensors --cache-dir cache"), "o.safetensors", ["g.gguf"]),
    "score": Verb(words("score m --task coin_flip --dataset generated --limit 2 -o o.json"), "o.json", ["m"]),
    "report": Verb(words("report small -o out"), "out", ["small"]),
}


def prepare(home: Home) -> None:
    """Make everything in `home.shared`, by the commands themselves."""
    at = home.shared
    child = zygote.start(lambda: _models(at), at, memory=1 << 40)  # torch may start threads: never in this process
    _ensure(child.end(120))
    for line in """
        analyze m -o s.safetensors
        calibrate m -o c.safetensors --dataset t.txt --num-tokens 128 --max-length 32 --measure-losses 0.5
        analyze m -o sk.safetensors --statistics c.safetensors
        allocate s.safetensors --rank-reduction 0.4 -o p.json
        allocate sk.safetensors --keep 0.7 -o pk.json
        compress m small --plan p.json
        compress m pivoted --rank-reduction 0.4 --storage pivoted
        compress m split --keep 0.7 --statistics c.safetensors --recovery none --mlp-pruning 0
        compress m neurons --keep 0.6 --statistics c.safetensors --recovery none --mlp-pruning 0.3
        evaluate small --dataset t.txt --max-length 16 --num-windows 2 --label one -o runs/one.ppl.json
        score m --task coin_flip --dataset generated --limit 2 --label s -o runs/s.score.json
    """.strip().splitlines():
        _ensure(run(line.split(), at, seconds=120))
    _ensure(run(finetune("small", "run"), at, seconds=120))
    _ensure(run(words(f"pretrain study --dataset t.txt {PRETRAIN}"), at, seconds=120))
    shutil.copytree(at / "study", at / "runs" / "study")
    for name in ("compression.json", "plan.json"):
        (at / "runs" / name).write_bytes((at / "small" / name).read_bytes())
    (at / "runs" / "finetune.json").write_bytes((at / "run" / "finetune.json").read_bytes())
    (at / "runs" / "s.safetensors").write_bytes((at / "s.safetensors").read_bytes())
    (at / "half").mkdir()
    _ensure(run(["compress", "../m", "out", "--rank-reduction", "0.4"], at / "half", setup=_stop_at_shard), -9)


def _ensure(answer: zygote.Answer, status: int = 0) -> None:
    if answer.status != status:
        sys.exit(f"the materials cannot be made: status {answer.status}\n{answer.out}{answer.err}")


def _models(at: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from toys import checkpoint

    draws = random.Random(0)
    lines = (" ".join(draws.choice(WORDS) for _ in range(12)) for _ in range(60))
    (at / "t.txt").write_text("\n".join(lines), "utf-8")
    checkpoint(at / "m", None)
    for family in ("gpt2", "mixtral", "qwen2"):  # another class of layers, fused experts, tied embeddings
        checkpoint(at / family, None, family)
    model = AutoModelForCausalLM.from_pretrained(at / "m")
    checkpoint(at / "sharded", None)
    (at / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(at / "sharded", max_shard_size="30KB")
    torch.save(dict(model.state_dict()), at / "reference.pt")
    save_file({"windows": torch.randint(5, 60, (12, 16))}, at / "windows.safetensors")
    _gguf(at / "g.gguf", model)


def _gguf(path: Path, model: object) -> None:
    import gguf

    c = model.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}".encode() for i in range(c.vocab_size)])
    w.add_token_scores([-float(i) for i in range(c.vocab_size)])
    w.add_token_types([1] * c.vocab_size)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _stop_at_shard() -> None:
    """Kill this process when it begins to write the result: the finished pieces stay."""
    import os

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.mkdir" and str(arguments[0]).endswith(".out.welore-partial"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
