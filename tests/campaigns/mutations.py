"""Damaged inputs for every reader: each must be refused in one sentence, or be read as transformers reads it.

    python tests/campaigns/mutations.py --seed 0 --budget 600 --only config,header

Classes: refused (status 2, one sentence), accepted; and the failures TRACEBACK (a bug's sentence, too), NOISY (more
than a sentence), HANG, OOM, OUTSIDE (a file beyond the case's directory), NETWORK, EXECUTED (code of an input ran),
DEBRIS (a refusal left something), WRONG (accepted though no reader may, or with another result than transformers').
"""

import copy
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import materials
import zygote
from compare import compare
from kills import once
from materials import CALIBRATE, EVALUATE, MODEL, MODELS, PRETRAIN, finetune, words
from zygote import Outcome, campaign, digest, judge, last_line

JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 1.5, -0.0, 1e308, 1e-300, 10**9, 2**31, 2**63, 10**30, -(10**18)),
    *("x", "", "1", "nan", "../../x", "/etc/passwd", "..", "\0", "\ud800", "%s%n", "x" * 5000, "$\\frac{", "\x1b[31m"),
    *([], {}, [[]], [None], [0], [-1, -1], [1, 2, 3], {"a": 1}, {"": []}, float("nan"), float("inf"), float("-inf")),
]
NAN, INF = float("nan"), float("inf")


@dataclass
class Mutation:
    """A command over a damaged input, what was done to it, and whether no reader may accept it."""

    command: list[object]
    how: str
    forbidden: bool = False


Mutator = Callable[[Path, random.Random], Mutation]


# --- damage to text and JSON ----------------------------------------------------------------------------------------


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside a JSON value; of a list to the first six."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    return [path, *(spot for key, inner in items for spot in spots(inner, (*path, key)))]


def mutate(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one value replaced, removed or moved a little, and what was done."""
    value = copy.deepcopy(value)
    *path, key = rng.choice(spots(value)[1:] or [("root",)])
    if key == "root":
        return rng.choice(JUNK), "root"
    parent = value
    for step in path:
        parent = parent[step]
    old, how = parent[key], rng.choice(["junk"] * 5 + ["delete", "near", "near", "wrap", "deep"])
    if how == "delete":
        del parent[key]
    elif how == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), old * 10**6, [old]])
    elif how == "wrap":
        parent[key] = {str(i): v for i, v in enumerate(old)} if isinstance(old, list) else [old]
    elif how == "deep":
        parent[key] = json.loads("[" * 400 + "]" * 400)
    else:
        parent[key] = rng.choice(JUNK)
    return (
        value,
        f"{'.'.join(map(str, [*path, key]))} {how}: {old!r:.40} -> {parent[key] if how != 'delete' else ''!r:.40}",
    )


def encode(value: Any) -> bytes:
    """JSON, with whatever Python can hold."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def garble(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes that are no good text, or another one, and what was done."""
    at = rng.randrange(len(data) or 1)
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        flipped[rng.randrange(len(data))] = rng.randrange(256)
    ways = {
        "truncate": data[:at],
        "flip": bytes(flipped),
        "nul": data[:at] + b"\0" + data[at:],
        "not UTF-8": data[:at] + b"\xff\xfe" + data[at:],
        "empty": b"",
        "spaces": b" \n",
        "byte order mark": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode("utf-8", "replace").encode("utf-16"),
        "nested": b"[" * 100_000,
        "nested objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "5,000 digits": b'{"a":' + b"1" * 5000 + b"}",
        "array": b"[1,2]",
        "number": b"12",
        "string": b'"x"',
        "doubled key": data.replace(b"{", b'{"format":7,"model_type":"x",', 1),
    }
    how = rng.choice(list(ways))
    return ways[how], how


def damage_json(path: Path, rng: random.Random) -> str:
    """Mutate a JSON file in its place; what was done."""
    data = path.read_bytes()
    if rng.random() < 0.15:
        data, how = garble(data, rng)
    else:
        value, how = mutate(json.loads(data), rng)
        data = encode(value)
    path.write_bytes(data)
    return f"{path.name} {how}"


# --- damage to safetensors and other binary files -------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(path: Path, header: Any, body: bytes, size: int | None = None) -> None:
    """Write a safetensors file, right or wrong; size: another length of the header than its own."""
    text = header if isinstance(header, bytes) else encode(header)
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def damage_tensors(path: Path, rng: random.Random) -> tuple[str, bool]:
    """Mutate a safetensors file in its place; what was done, and whether no reader may accept it."""
    header, body = parts(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry: dict[str, Any] = header[name]
    (first, last), shape = entry["data_offsets"], entry["shape"]
    text, forbidden = None, False
    how = rng.choice(
        [*FIELDS, "cut", "tail", "size", "move", "entry", "text", "metadata", "drop", "rename", *["value"] * 3]
    )
    if how in FIELDS:
        entry[how] = rng.choice(FIELDS[how](first, last, shape))
    elif how in ("cut", "tail"):
        body, forbidden = body[: rng.randrange(len(body))] if how == "cut" else body + b"x" * 100, True
    elif how == "move":
        how, body = move(header, body, name, rng)
        forbidden = last > first  # an empty tensor overlaps nothing
    elif how == "entry":
        header[name] = rng.choice(JUNK)
    elif how == "text":
        text, more = garble(encode(header), rng)
        how = f"header {more}"
    elif how == "metadata":
        how += damage_metadata(header, rng)
    elif how == "drop":
        del header[name]
    elif how == "rename":
        header[name + rng.choice([".x", "\0", "/../x", "\n", "\ud800"])] = header.pop(name)
    elif how == "value":
        value, form = rng.choice([NAN, INF, -INF, -1.0, 1e30]), {"F32": "<f", "F64": "<d"}.get(entry["dtype"])
        if form and last > first:
            start = rng.randrange(first, last, struct.calcsize(form))
            body = body[:start] + struct.pack(form, value) + body[start + struct.calcsize(form) :]
            forbidden = not -INF < value < INF
        how = f"value {value}"
    size = rng.choice([0, 1, 7, 2**63, 2**64 - 1, 10**8 + 1, len(body) * 2]) if how == "size" else None
    join(path, text if text is not None else header, body, size)
    return f"{path.name} {how} of {name} {header.get(name, '')!r:.90}", forbidden or size is not None


FIELDS: dict[str, Callable[[int, int, list[int]], list[Any]]] = {
    "data_offsets": lambda a, b, _: [
        *([b, a], [a + 1, b + 1], [a], "x", None, [str(a), str(b)], [-8, b - a - 8], [a, None]),
        *([2**62, 2**62 + b - a], [float(a), float(b)], {"0": a}),
    ],
    "dtype": lambda *_: ["F64", "F16", "I32", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "U16", "X9", "", None, 3, []],
    "shape": lambda _, __, s: [
        *(s[::-1], [*s, 1], [1, *s], [], [*s, 2**40], [2**40, 2**40], [0, *s], None, "x", [10**30, 1], {"0": 1}),
        *([str(n) for n in s], [float(n) for n in s], [-n for n in s]),
    ],
}


def move(header: dict[str, Any], body: bytes, name: str, rng: random.Random) -> tuple[str, bytes]:
    """Let a tensor lie over another one, or leave a gap behind it."""
    first, last = header[name]["data_offsets"]
    others = [entry for key, entry in header.items() if key not in ("__metadata__", name)]
    if rng.random() < 0.5 and others:
        start = rng.choice(others)["data_offsets"][0]
        header[name]["data_offsets"] = [start, start + last - first]
        return "overlap", body
    for other in others:
        if other["data_offsets"][0] >= last:
            other["data_offsets"] = [offset + 8 for offset in other["data_offsets"]]
    return "gap", body[:last] + bytes(8) + body[last:]


def damage_metadata(header: dict[str, Any], rng: random.Random) -> str:
    """Mutate the metadata of a safetensors header, inside its JSON texts, too."""
    texts = header.get("__metadata__") or {}
    if not texts or rng.random() < 0.2:
        header["__metadata__"] = rng.choice(JUNK)
        return f" {header['__metadata__']!r:.40}"
    key = rng.choice(list(texts))
    try:
        value, how = mutate(json.loads(texts[key]), rng)
        texts[key] = json.dumps(value)
    except ValueError:
        texts[key] = rng.choice(["", "x", "[]", "{}", "null", "-1", "NaN", "[" * 5000, "1" * 5000, "\0", 5, None, []])
        how = f"{texts[key]!r:.30}"
    return f" {key}.{how}"


def damage_bytes(path: Path, rng: random.Random) -> str:
    """Truncate, flip or replace the bytes of any file."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["truncate", "truncate", "flip", "flip head", "empty", "magic", "directory"])
    if how == "directory":
        path.unlink()
        path.mkdir()
        return f"{path.name} {how}"
    if how == "truncate":
        del data[rng.randrange(len(data)) :]
    elif how.startswith("flip"):
        for _ in range(5):
            data[rng.randrange(len(data) if how == "flip" else min(3000, len(data)))] = rng.randrange(256)
    else:
        data[:4] = b"" if how == "empty" else b"XXXX"
        del data[0 if how == "empty" else len(data) :]
    path.write_bytes(bytes(data))
    return f"{path.name} {how}"


SOURCES = ["m", "m", "gpt2", "mixtral", "qwen2"]
BLIND = ("info", "pretrain")  # verbs that need not see what is wrong with weights


# --- kinds of cases -------------------------------------------------------------------------------------------------


def reading(model: str, rng: random.Random) -> list[str]:
    """A verb that reads a model, as its source, its teacher or its dense model."""
    text = rng.choice(["t.txt", "self"])
    return rng.choice(
        [
            *[words(f"compress {model} out --rank-reduction 0.4")] * 3,
            words(f"analyze {model} -o o.safetensors"),
            words(f"evaluate {model} --dataset t.txt {EVALUATE}"),
            words(f"evaluate small --against {model} --dataset t.txt {EVALUATE}"),
            words(f"calibrate {model} -o o.safetensors --dataset {text} {CALIBRATE}"),
            words(f"score {model} --task coin_flip --dataset generated --limit 1"),
            words(f"pretrain out --tokenizer {model} --dataset t.txt {PRETRAIN}"),
            finetune(model, "out", "--method", rng.choice(["lrc", "full", "lora"])),
            finetune("small", "out", "--distill", model),
            words(f"info {model}"),
        ]
    )


def reading_result(model: str, rng: random.Random) -> list[object]:
    """A verb that reads a compressed model."""
    return rng.choice(
        [
            ["merge", model, "out"],
            ["merge", model, "out"],
            words(f"export {model} out --format dense"),
            words(f"evaluate {model} --dataset t.txt {EVALUATE}"),
            finetune(model, "out"),
            ["info", model],
        ]
    )


def config(at: Path, rng: random.Random) -> Mutation:
    model = rng.choice(SOURCES)
    return Mutation(reading(model, rng), damage_json(at / model / "config.json", rng))


def generation(at: Path, rng: random.Random) -> Mutation:
    return Mutation(reading("m", rng), damage_json(at / "m" / "generation_config.json", rng))


def tokenizer(at: Path, rng: random.Random) -> Mutation:
    path = at / "m" / rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    if path.name == "tokenizer.json" or rng.random() < 0.6:
        how = damage_json(path, rng)
    else:
        change = rng.choice(
            [
                {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
                *(
                    {"tokenizer_class": "NoSuch"},
                    {"tokenizer_class": 5},
                    {"model_max_length": -1},
                    {"pad_token": "<no>"},
                ),
                *({"chat_template": "{{ 1/0 }}"}, {"added_tokens_decoder": {"9999999": {"content": "z"}}}),
                *({"bos_token": None, "eos_token": None}, {"extra_special_tokens": 5}, {"eos_token": "<new>"}),
            ]
        )
        path.write_bytes(encode(json.loads(path.read_bytes()) | change))
        how = f"tokenizer_config.json {change}"
    (at / "m" / "evil.py").write_text(f"open({str(at / 'EXECUTED')!r}, 'w')\nclass Evil: pass\n")
    return Mutation(reading("m", rng), how)


def header(at: Path, rng: random.Random) -> Mutation:
    model = rng.choice(SOURCES)
    how, forbidden = damage_tensors(at / model / "model.safetensors", rng)
    command = reading(model, rng)
    return Mutation(command, how, forbidden and not (command[0] in BLIND or how.startswith("model.safetensors value")))


def index(at: Path, rng: random.Random) -> Mutation:
    path = at / "sharded" / "model.safetensors.index.json"
    content = json.loads(path.read_bytes())
    shards = sorted(set(content["weight_map"].values()))
    way = rng.random()
    if way < 0.4:
        name = rng.choice(list(content["weight_map"]))
        wrong = [
            *("../m/model.safetensors", "/etc/passwd", "/dev/zero", "/dev/stdin", "..", ".", ""),
            *("config.json", "missing", path.name, f"./{shards[0]}", 5, None, ["x"], {"a": 1}),
            *("x\0y", "a" * 300, "\ud800", shards[-1]),
        ]
        content["weight_map"][name] = rng.choice(wrong)
        path.write_bytes(encode(content))
        how = f"{name} -> {content['weight_map'][name]!r:.60}"
    elif way < 0.6:
        shard = at / "sharded" / rng.choice(shards)
        shard.unlink()
        how = rng.choice(["missing", "loop", "fifo", "directory", "empty"])
        if how == "loop":
            shard.symlink_to(shard.name)
        elif how == "fifo":
            os.mkfifo(shard)
        elif how == "directory":
            shard.mkdir()
        elif how == "empty":
            shard.write_bytes(b"")
        return Mutation(command := reading("sharded", rng), f"{shard.name} is {how}", command[0] not in BLIND)
    elif way < 0.8:
        how, _ = damage_tensors(at / "sharded" / rng.choice(shards), rng)
    else:
        how = damage_json(path, rng)
    return Mutation(reading("sharded", rng), how)


def layout(at: Path, rng: random.Random) -> Mutation:
    """Files beside the weights, other sets of weights, other settings, a link or a directory between."""
    import torch
    from safetensors.torch import load_file, save_file

    model = at / rng.choice([*SOURCES, "small"])
    settings = json.loads((model / "config.json").read_bytes())
    other = {name: t * 0.5 for name, t in load_file(model / "model.safetensors").items()}
    changes: dict[str, dict[str, Any]] = {
        "more layers": {"num_hidden_layers": 3},
        "fewer layers": {"num_hidden_layers": 1},
        "tied": {"tie_word_embeddings": True},
        "untied": {"tie_word_embeddings": False},
        "architecture": {"architectures": rng.choice([None, [], ["LlamaModel"], ["NoSuch"], ["GPT2LMHeadModel"]])},
        "code": {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, "model_type": "evil"},
    }
    beside = ["index", "model-00001-of-00001", "model.fp16", "consolidated", "bin", "only bin"]
    how = rng.choice([*changes, *beside, "adapter", "adapter alone", "subfolder", "link"])
    if how in changes:
        (model / "config.json").write_bytes(encode(settings | changes[how]))
        (model / "evil.py").write_text(f"open({str(at / 'EXECUTED')!r}, 'w')\nclass Evil: pass\n")
    elif how.endswith("bin"):
        torch.save(other, model / "pytorch_model.bin")
        if how == "only bin":
            (model / "model.safetensors").unlink()
    elif how in beside:
        file = "model-00001-of-00001" if how == "index" else how
        save_file(other, model / f"{file}.safetensors", {"format": "pt"})
        if how == "index":
            listed = dict.fromkeys(other, f"{file}.safetensors")
            (model / "model.safetensors.index.json").write_bytes(encode({"metadata": {}, "weight_map": listed}))
    elif how.startswith("adapter"):
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        (model / "adapter_config.json").write_bytes(encode(content))
        if how == "adapter":
            key = "base_model.model.model.layers.0.self_attn.q_proj"
            factors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
            save_file(factors, model / "adapter_model.safetensors", {"format": "pt"})
    else:
        model.rename(at / "elsewhere")
        if how == "link":
            model.symlink_to("elsewhere")
        else:
            model.mkdir()
            (at / "elsewhere").rename(model / "checkpoint-4")
    forbidden = how in ("adapter", "adapter alone", "more layers", "fewer layers")
    verb = reading_result("small", rng) if model.name == "small" else reading(model.name, rng)
    return Mutation(verb, how, forbidden and verb[0] not in BLIND)


def tensors(at: Path, rng: random.Random) -> Mutation:
    """Well-formed weights with other names or dtypes, or too many, or too few."""
    import torch
    from safetensors.torch import load_file, save_file

    model = at / rng.choice([*SOURCES, "small"])
    good = load_file(model / "model.safetensors")
    name = rng.choice([name for name in good if good[name].numel()])
    dtypes = ["float16", "bfloat16", "float64", "int8", "float8_e4m3fn", "float8_e8m0fnu", "complex64", "bool"]
    dtype = getattr(torch, rng.choice(dtypes))
    half = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "extra": lambda: good | {"model.rotary.inv_freq": torch.ones(8)},
        "extra layer": lambda: good | {"model.layers.2.self_attn.q_proj.weight": torch.ones(32, 32)},
        "extra of a dtype": lambda: good | {"scales": torch.ones(8).to(dtype)},
        "prefix": lambda: {f"module.{key}": t for key, t in good.items()},
        "no prefix": lambda: {key.removeprefix("model."): t for key, t in good.items()},
        "dtype": lambda: good | {name: good[name].to(dtype)},
        "dtypes": lambda: {key: t if rng.random() < 0.2 else t.to(half) for key, t in good.items()},
        "lost": lambda: {key: t for key, t in good.items() if key != name},
        "twice": lambda: good | {f"model.{name}": good[name] * 2},
        "transposed": lambda: good | {name: good[name].T.contiguous() if good[name].ndim == 2 else good[name][:-1]},
    }
    how = rng.choice(list(ways))
    save_file(ways[how](), model / "model.safetensors", {"format": "pt"})
    verb = reading_result("small", rng) if model.name == "small" else reading(model.name, rng)
    detail = {"dtypes": half, "dtype": dtype, "extra of a dtype": dtype}.get(how, "")
    return Mutation(verb, f"{how} {detail} {name}", how == "lost" and verb[0] not in BLIND)


def spectra(at: Path, rng: random.Random) -> Mutation:
    path = at / rng.choice(["s.safetensors", "sk.safetensors"])
    if rng.random() < 0.4:
        head, body = parts(path)
        name = rng.choice([key for key in head if key != "__metadata__"])
        first, last = head[name]["data_offsets"]
        n = (last - first) // 8
        ways = {
            "ascending": [float(i + 1) for i in range(n)],
            "negative": [-1.0 - i for i in range(n)],
            "NaN": [NAN] * n,
            "infinite": [INF] * n,
            "first infinite": [INF, *[1.0] * (n - 1)],
            "zero": [0.0] * n,
            "huge": [1e308] * n,
            "tiny": [5e-324] * n,
        }
        how = rng.choice(list(ways))
        join(path, head, body[:first] + struct.pack(f"<{n}d", *ways[how]) + body[last:])
        measured = name.endswith(".losses")  # these may ascend
        forbidden = how in ("negative", "NaN", "infinite", "first infinite") or (how == "ascending" and not measured)
        how = f"{how} {name}"
    else:
        how, forbidden = damage_tensors(path, rng)
    target = rng.choice(
        [
            *("--rank-reduction 0.3", "--keep 0.7", "--threshold 0.2"),
            *("--keep 0.7 --strategy waterfill", "--rank-reduction 0.3 --strategy energy"),
            "--rank-reduction 0.3 --strategy owl",
        ]
    )
    return Mutation(["allocate", path.name, *target.split(), "-o", "o.json"], how, forbidden)


def statistics(at: Path, rng: random.Random) -> Mutation:
    how, forbidden = damage_tensors(at / "c.safetensors", rng)
    command = rng.choice(
        [
            words("analyze m --scaling kfac --statistics c.safetensors -o o.safetensors"),
            words("analyze m --scaling asvd --statistics c.safetensors -o o.safetensors"),
            words("analyze m --scaling whitening --statistics c.safetensors -o o.safetensors"),
            words("compress m out --keep 0.7 --statistics c.safetensors --recovery none"),
        ]
    )
    return Mutation(command, how, forbidden and " value " not in how)  # not every tensor is needed by each


def plan(at: Path, rng: random.Random) -> Mutation:
    path, forbidden = at / rng.choice(["p.json", "pk.json"]), False
    content = json.loads(path.read_bytes())
    way = rng.choice(["twice", "drop", "shuffle", "matrix", "matrix", "json", "json"])
    if way == "json":
        how = damage_json(path, rng)
    else:
        matrix = rng.choice(content["matrices"])
        if way == "twice":
            content["matrices"].append(dict(matrix))
            forbidden = True
        elif way == "drop":
            content["matrices"].remove(matrix)
        elif way == "shuffle":
            rng.shuffle(content["matrices"])
        else:
            changed, how = mutate(matrix, rng)
            content["matrices"][content["matrices"].index(matrix)] = changed
            way = f"{matrix.get('name')} {how}"
        path.write_bytes(encode(content))
        how = way
    more = ["--statistics", "c.safetensors"] if path.name == "pk.json" else []
    verb = rng.choice([["compress", "m", "out"], ["compress", "m", "out"], finetune("m", "out", "--method", "lrc")])
    return Mutation([*verb, "--plan", path.name, *(more if verb[0] == "compress" else [])], how, forbidden)


def compressed(at: Path, rng: random.Random) -> Mutation:
    name = rng.choice(["small", "pivoted", "split", "neurons"])
    model, forbidden = at / name, False
    way = rng.choice(
        ["quantization", "quantization", "quantization", "config", "tensors", "tensors", "drop", "order", "json"]
    )
    if way == "quantization":
        content = json.loads((model / "config.json").read_bytes())
        content["quantization_config"], how = mutate(content["quantization_config"], rng)
        (model / "config.json").write_bytes(encode(content))
        how = f"quantization_config {how}"
    elif way == "config":
        how = damage_json(model / "config.json", rng)
    elif way == "json":
        how = damage_json(model / rng.choice(["compression.json", "plan.json"]), rng)
    else:
        path = model / "model.safetensors"
        head, body = parts(path)
        orders = [key for key in head if key.endswith(".order")]
        if way == "order" and orders:
            key = rng.choice(orders)
            first, last = head[key]["data_offsets"]
            form, width = {"I32": ("i", 4), "I64": ("q", 8)}[head[key]["dtype"]]
            n = (last - first) // width
            wrong = rng.choice([[0] * n, [-1 - i for i in range(n)], [2**31 - 1] * n, list(range(1, n + 1))])
            join(path, head, body[:first] + struct.pack(f"<{n}{form}", *wrong) + body[last:])
            how, forbidden = f"order {wrong!r:.30}", True
        elif way == "drop":
            key = rng.choice([key for key in head if key != "__metadata__"])
            first, last = head.pop(key)["data_offsets"]
            for other in head.values():
                if other.get("data_offsets", [0])[0] >= last:
                    other["data_offsets"] = [offset - last + first for offset in other["data_offsets"]]
            join(path, head, body[:first] + body[last:])
            how, forbidden = f"lost {key}", True
        else:
            how, forbidden = damage_tensors(path, rng)
            forbidden = forbidden and " value " not in how
    command = reading_result(name, rng)
    return Mutation(command, f"{name}: {how}", forbidden and command[0] not in BLIND)


def report(at: Path, rng: random.Random) -> Mutation:
    files = [p for p in sorted((at / "runs").rglob("*")) if p.suffix in (".json", ".jsonl", ".safetensors")]
    path = rng.choice(files)
    for other in files:  # a page with everything takes ten times as long
        if other.parent != path.parent or (path.parent.name == "runs" and other != path):
            other.unlink()
    if path.suffix == ".safetensors":
        how, _ = damage_tensors(path, rng)
    elif path.suffix == ".jsonl":
        data, how = garble(path.read_bytes(), rng)
        path.write_bytes(data)
    elif rng.random() < 0.4:
        content = json.loads(path.read_bytes())
        label = rng.choice(
            [
                *("<script>alert(1)</script>", '"><svg onload=alert(1)>', "$x_{$", "$\\frac{$"),
                *("{{7*7}}", "\0", "_^", "\ud800", "x\ny", "", "x" * 3000, "../../../tmp/evil", "\\"),
                *("$$", "\x1b[31m", 5, None),
            ]
        )
        if isinstance(content, dict):
            content["inputs"] = {**(content.get("inputs") or {}), "label": label, "model": label}
        how = f"label {label!r:.40}"
        path.write_bytes(encode(content))
    else:
        how = damage_json(path, rng)
    return Mutation(words("report runs -o out"), f"{path.name} {how}")


def resumed(at: Path, rng: random.Random) -> Mutation:
    (at / "run" / "finetune.json").unlink()
    files = [p for p in sorted((at / "run").rglob("*")) if p.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin")]
    path = rng.choice([p for p in files if p.parent.name != "model"])
    if path.suffix == ".json":
        how = damage_json(path, rng)
    elif path.suffix == ".safetensors":
        how, _ = damage_tensors(path, rng)
    else:
        how = evil(path, at) if rng.random() < 0.4 else damage_bytes(path, rng)
    return Mutation(finetune("small", "run", "--resume"), f"{path.relative_to(at / 'run')}: {how}")


def unfinished(at: Path, rng: random.Random) -> Mutation:
    (at / "half" / "out.work").rename(at / "out.work")
    path = rng.choice([p for p in sorted((at / "out.work").rglob("*")) if p.is_file()])
    how = damage_json(path, rng) if path.suffix == ".json" else damage_tensors(path, rng)[0]
    return Mutation(words("compress m out --rank-reduction 0.4"), f"out.work: {how}")


TASKS: dict[str, Any] = {
    "boolq": {"question": "is it so", "passage": "It is so.", "answer": True, "title": "t"},
    "svamp": {
        "ID": "1",
        "Body": "Two and two.",
        "Question": "How many?",
        "Equation": "(2+2)",
        "Answer": 4.0,
        "Type": "A",
    },
    "commonsense_qa": {
        "id": "1",
        "question": {"stem": "who", "choices": [{"label": x, "text": x * 2} for x in "ABCDE"]},
        "answerKey": "A",
    },
    "coin_flip": {"question": "A coin is heads up. x flips. Is it still heads up?", "answer": "yes"},
    "object_tracking": {"input": "Alice, Bob and Eve ...", "target_scores": {"red ball.": 0, "blue ball.": 1, "x.": 0}},
    "strategy_qa": {"input": "Is it?", "target": "Yes. It is.", "target_scores": {"Yes": 1, "No": 0}},
}


def task(at: Path, rng: random.Random) -> Mutation:
    name = rng.choice(list(TASKS))
    rows, how = [copy.deepcopy(TASKS[name]) for _ in range(10)], "good"
    if rng.random() < 0.7:
        rows, how = mutate(rows, rng)
    lines = name in ("boolq", "commonsense_qa") and isinstance(rows, list)
    wrapped = rows if name == "svamp" or not isinstance(rows, list) else {"examples": rows}
    data = b"\n".join(map(encode, rows)) if lines else encode(wrapped)
    if rng.random() < 0.3 and data:
        data, how = garble(data, rng)
    file = at / f"task{rng.choice(['.json', '.jsonl']) if rng.random() < 0.3 else '.jsonl' if lines else '.json'}"
    file.write_bytes(data)
    verb = words(f"score m --task {name} --dataset {file.name} --limit 1")
    train = words(f"finetune small out --task {name} --task-dataset {file.name} --max-steps 1 --max-length 64")
    return Mutation(rng.choice([verb, verb, train]), f"{name} {how}")


def text(at: Path, rng: random.Random) -> Mutation:
    kind = rng.choice(["jsonl"] * 4 + ["txt"] * 2 + ["parquet", "safetensors"])
    path, good = at / f"x.{kind}", b"\n".join(encode({"text": "rain fell on the roofs of it " * 3}) for _ in range(20))
    lines = [
        *(b"", b"\n\n", good[:-3], b'{"text": "\\ud800 lone surrogate and more words"}'),
        *(b'{"text": ""}', b'{"text": null}', b'{"text": 5}', b'{"text": ["a"]}'),
        *(b'{"txt": "a"}', b"[1]", b"5", b"null", b"\xff\xfe" + good, good + b"\0"),
        *(b'{"text": "a\\u0000b nul inside and more"}', b"[" * 100_000),
        *(b'{"a":' * 3000 + b"1" + b"}" * 3000, b'{"text": NaN}'),
        *(b'{"text": ' + b"1" * 5000 + b"}", b"\xef\xbb\xbf" + good),
        *(good.replace(b"roofs", b"ro\xfffs"), good * 2, good + b"\r\n" + good),
        b'{"text": "' + "\u00e9\u4e2d\U0001f600".encode() * 30 + b'"}',
        b'{"text": "</s><pad>"}',
    ]
    texts = [
        *(b"", b" \n\t", b"\xff\xfe\0", bytes(1000), b"a"),
        *("\u00e9\u4e2d\U0001f600".encode() * 50, b"\xef\xbb\xbf" + b"hello " * 60),
        *(b"\r" * 1000, b"</s>" * 100, "\u202e\u200b".encode() * 100, b"x" * 300_000),
        *("a text of some length".encode("utf-16"), b"\xed\xa0\x80" * 30),
    ]
    if kind in ("jsonl", "txt"):
        path.write_bytes(data := rng.choice(lines if kind == "jsonl" else texts))
        how = f"{data!r:.60}"
    elif kind == "safetensors":
        path.write_bytes((at / "windows.safetensors").read_bytes())
        how, _ = damage_tensors(path, rng)
    else:
        import pyarrow
        import pyarrow.parquet

        how = rng.choice(["good", "txt", "nulls", "ints"])
        columns = {"txt": {"txt": ["a"]}, "nulls": {"text": ["a" * 90, None]}, "ints": {"text": [1, 2]}}
        pyarrow.parquet.write_table(pyarrow.table(columns.get(how, {"text": ["hello " * 40]})), path)
        how += " " + (damage_bytes(path, rng) if rng.random() < 0.6 else "")
    train = finetune("small", "out", "--distill", "m") if kind == "safetensors" else finetune("small", "out")
    commands = [
        words(f"evaluate m {EVALUATE}"),
        words(f"calibrate m -o o.safetensors {CALIBRATE}"),
        [x for x in train if x not in ("--dataset", "t.txt")],
        words(f"compress m out --keep 0.7 --statistics c.safetensors --recovery {path.name} --num-tokens 64"),
        words(f"pretrain out {PRETRAIN}"),
    ]
    command = rng.choice(commands[2:3] if kind == "safetensors" else commands)
    return Mutation(command if "--recovery" in command else [*command, "--dataset", path.name], f"{kind} {how}")


def settings(at: Path, rng: random.Random) -> Mutation:
    good = {
        "compress": {"rank_reduction": 0.4, "storage": "factored", "include": ["q_proj"], "max_shard_size": "1MB"},
        "evaluate": {"dataset": "t.txt", "max_length": 16, "num_windows": 2},
        "calibrate": {"dataset": "t.txt", "num_tokens": 64, "max_length": 16, "measure_losses": 0},
        "finetune": {"dataset": "t.txt", "max_steps": 1, "max_length": 16, "eval_steps": 0, "save_steps": 0},
    }
    verb = rng.choice(list(good))
    if rng.random() < 0.3:
        data, how = garble(encode(good[verb]), rng)
        if rng.random() < 0.5:
            how = rng.choice(
                [
                    *("!!python/object/apply:os.system ['touch EXECUTED']", "a: &a [*a, *a]", "a: b: c"),
                    *("? [x] : y", "\t- x", "&x {<<: *x}", "2001-01-01: 1", "- 1\n- 2"),
                    *("rank_reduction: .nan", "a: 1\na: 2", "%YAML 9", "---\n---"),
                ]
            )
            data = how.encode()
    else:
        value, how = mutate(good[verb], rng)
        data = encode(value)
    (at / "c.yaml").write_bytes(data)
    command = {
        "compress": ["compress", "m", "out"],
        "evaluate": ["evaluate", "m"],
        "finetune": ["finetune", "small", "out"],
    }
    return Mutation([*command.get(verb, words("calibrate m -o o.safetensors")), "--config", "c.yaml"], how)


def evil(path: Path, at: Path) -> str:
    """A pickle that would run a command."""
    import torch

    torch.save({"a": _Evil(at / "EXECUTED")}, path)
    return f"{path.name} evil"


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def reference(at: Path, rng: random.Random) -> Mutation:
    import torch

    path = at / "reference.pt"
    tensors = torch.load(path, weights_only=True)
    key = rng.choice(list(tensors))
    good = tensors[key]
    changes: dict[str, Any] = {
        "NaN": good * NAN,
        "shape": good.flatten(),
        "rows": good[:-1],
        "scalar": torch.tensor(1.0),
        "complex": good.to(torch.complex64),
        "sparse": good.to_sparse(),
        "int8": good.to(torch.int8),
        "meta": good.to("meta"),
        "text": "x",
        "none": None,
    }
    how = rng.choice([*changes, "missing", "evil", "keys", "number", "list", "bytes", "bytes", "module"])
    if how in changes:
        torch.save(tensors | {key: changes[how]}, path)
    elif how == "missing":
        torch.save({name: t for name, t in tensors.items() if name != key}, path)
    elif how == "evil":
        evil(path, at)
    elif how == "bytes":
        how = damage_bytes(path, rng)
    else:
        others = {
            "keys": {5: good, None: 1, (1, 2): "x", "": good},
            "number": 5,
            "list": [1],
            "module": torch.nn.Linear(2, 2),
        }
        torch.save(others[how], path)
    command = rng.choice(
        [
            words("analyze m --reference-values reference.pt -o o.safetensors"),
            words("compress m out --reference-checkpoint reference.pt"),
        ]
    )
    return Mutation(command, f"{how} {key}")


def gguf(at: Path, rng: random.Random) -> Mutation:
    how = damage_bytes(at / "g.gguf", rng)
    return Mutation([*reading("g.gguf", rng), "--cache-dir", "cache"], how)


MORE = ["score m --task coin_flip --dataset generated --limit 1", "info small", "report small -o out"]
VALUES = words("""
    -1 0 1 2 0.5 nan inf -inf 1e400 1e308 1e-320 99999999999999999999 2147483648 x .. ../x / /dev/null m
    small ~ ~nosuch/x m/config.json t.txt self none self:0 self:-1 t.txt:nan t.txt:inf t.txt:1e400
    t.txt,t.txt , : a:b:c * [ [] ** layers.* \u00e9\u4e2d $(id) ' <b> 0x10 1_000 1,000 \u00bd cuda meta mps
    cuda:99 cpu:7 5XB 1KB 0GB -5GB 1B float32 int8 fp8 galore full lora lrc nlrc kfac asvd whitening welore
    owl energy waterfill uniform pivoted auto break-even 16/1/1/16 1/1/1/1 16/1/3/16 0/0/0/0 99999/1/1/1
    s.safetensors c.safetensors p.json sgd adafactor eager flash_attention_2 sdpa tensorboard best fast
    paper true null {} o.json out
""")


def options(at: Path, rng: random.Random) -> Mutation:
    command = rng.choice([*(verb.command for verb in materials.VERBS.values()), *map(words, MORE)])
    names = [name for name in option_names(command[0]) if name not in ("--help", "--device")]
    more: list[object] = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        more += [rng.choice(names), rng.choice([*VALUES, "", " ", "a\nb", "x" * 300, "\ud800"])]
    return Mutation([*command, *more], " ".join(map(repr, more)))


def option_names(verb: str) -> list[str]:
    """Every option of a verb."""
    import typer.main

    from welore.cli.main import app

    group: Any = typer.main.get_command(app)
    return sorted(
        {name for option in group.commands[verb].params for name in (*option.opts, *option.secondary_opts)} - {"model"}
    )


# --- what came of it ------------------------------------------------------------------------------------------------

NEEDS: dict[Mutator, list[str]] = {
    config: MODELS,
    generation: [*MODEL, "small"],
    tokenizer: [*MODEL, "small"],
    header: MODELS,
    index: ["sharded", "m", "small", "t.txt"],
    layout: MODELS,
    tensors: MODELS,
    spectra: ["s.safetensors", "sk.safetensors"],
    statistics: ["m", "c.safetensors"],
    plan: [*MODEL, "p.json", "pk.json", "c.safetensors"],
    compressed: ["small", "pivoted", "split", "neurons", "t.txt"],
    report: ["runs"],
    resumed: ["small", "run", "t.txt"],
    unfinished: ["m", "half"],
    task: ["m", "small"],
    text: ["m", "small", "t.txt", "c.safetensors", "windows.safetensors"],
    settings: [*MODEL, "small"],
    reference: ["m", "reference.pt"],
    gguf: ["g.gguf", "small", "t.txt"],
    options: [*MODEL, "small", "pivoted", "s.safetensors", "c.safetensors", "p.json", "g.gguf"],
}


# A run over damaged unfinished work must give the same bytes as the run of this verb.
RESUMED: dict[Mutator, str] = {unfinished: "compress"}


def case(mutator: Mutator) -> zygote.Case:
    """A case of a kind: damage, run, judge."""

    def one(_: Path, rng: random.Random) -> Outcome:
        good = once(RESUMED[mutator]).result if mutator in RESUMED else None
        at = zygote.home.fresh(*NEEDS[mutator])
        mutation = mutator(at, rng)
        before = {path.name for path in at.iterdir()}
        answer = zygote.run(mutation.command, at)
        kind, note = judge(answer), last_line(answer.err)
        new = {p.name for p in at.iterdir() if p.suffix != ".work"} - before - {"cache"}  # finished work may stay
        if (at / "out" / "run.json").is_file() and "checkpoints are kept" in answer.err:
            new -= {"out"}  # a training that diverged
        if (at / "EXECUTED").exists():
            kind = "EXECUTED"
        elif kind == "OUTSIDE" or kind == "NETWORK":
            note = answer.notes[0]
        elif kind == "refused" and new:
            kind, note = "DEBRIS", f"{sorted(new)}; {note}"
        elif kind == "accepted":
            kind, note = wrong(mutation, mutator, at, answer)
            if good is not None and digest(at / mutation.command[2]) != good:
                kind, note = "WRONG", "the result differs from that of an undisturbed run"
        return Outcome(kind, mutation.command, f"[{mutation.how!r:.300}] {note}")

    return one


def wrong(mutation: Mutation, mutator: Mutator, at: Path, answer: zygote.Answer) -> tuple[str, str]:
    """Class of a case that was accepted."""
    if mutation.forbidden:
        return "WRONG", f"accepted: {answer.out.strip():.120}"
    page = at / "out" / "report.html"
    if page.is_file() and any(x in page.read_text("utf-8") for x in ("<script>alert", "<svg onload", ">49<")):
        return "WRONG", "the label is part of the page's code"
    unread = mutator is generation and mutation.command[0] in ("analyze", "calibrate", "evaluate", "info")
    if mutator is not options and not unread:
        compared = zygote.run(lambda: compare(mutation.command), at)
        if compared.status != 0:
            return "WRONG", last_line(compared.err)
    return "accepted", ""


CASES = {mutator.__name__: case(mutator) for mutator in NEEDS}

if __name__ == "__main__":
    sys.exit(campaign(CASES, materials.prepare, __doc__))
