"""The model card (README.md) of a result: what it is, its sizes, how it was made and how it is loaded."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from welore.config import AUTO
from welore.errors import WeLoreError
from welore.io.atomic import atomic_write
from welore.io.checkpoint import CARD, RECORD, read_config
from welore.io.fields import typed
from welore.records import Record

OURS = "welore"  # tag of every card that is written here
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINES = {"ForCausalLM": "text-generation", "ForConditionalGeneration": "image-text-to-text"}
SITE = "https://welore.github.io/welore"
LOADING = """## Load

```bash
pip install welore
```

```python
import welore  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

Without the import, `from_pretrained(DIRECTORY, trust_remote_code=True)` runs `modeling_welore.py`, which imports it.
With neither, loading stops: transformers says "Unknown quantization type, got welore".

## Serve

```bash
lm_eval --model hf --model_args pretrained=DIRECTORY,trust_remote_code=True --tasks TASKS
welore merge DIRECTORY DENSE  # an ordinary checkpoint of the dense size, for any engine
```

Which engines run it as it is: [Serve and export](SITE/how-to/serve-and-export/).
""".replace("SITE", SITE)


def write_card(directory: Path, base: str, origin: str = "", *, relation: str = "quantized", made: str = "") -> None:
    """Write the card of a finished checkpoint, from its config.json and its record.

    base: what the user called the model from which it was made. origin: the text of that model's own card, of which the
    licence is taken; if that is a card of ours, also its base model. relation: the hub's word for what was done; it has
    none for low rank. made: sentences on what was done after the compression, or instead of it.
    """
    from huggingface_hub import ModelCardData

    config, before = read_config(directory), _metadata(origin)
    quantization = config.get("quantization_config") or {}
    record = Record.load_if_there(directory / RECORD)
    if not base and record is not None:
        base = str(record.inputs.get("model") or "")
    own = base if HUB_ID.fullmatch(base) and not os.path.lexists(base) else None
    first = before.get("base_model") if OURS in (before.get("tags") or ()) else own
    architecture = str((config.get("architectures") or [""])[0])
    data = ModelCardData(
        base_model=first,
        base_model_relation=relation if first else None,
        library_name="transformers",
        license=before.get("license") or config.get("license"),
        license_name=before.get("license_name"),
        license_link=before.get("license_link"),
        pipeline_tag=next((tag for end, tag in PIPELINES.items() if architecture.endswith(end)), None),
        tags=[OURS, *(["low-rank", "compression"] if quantization else [])],
        ignore_metadata_errors=True,
    )
    name = PurePath(str(first or base).replace("\\", "/")).name or "Model"
    parts = [f"---\n{data}\n---", f"# {name}, {'compressed' if quantization or record else 'made'} by welore"]
    if quantization:
        parts.append(f"Matrices of this model are stored in low rank, W ≈ A B, by [welore]({SITE}/).")
    parts += [made] if made else []
    if record is not None:
        parts += [_sizes(record, directory), _results(record), _making(record, name if first is None else str(first))]
    if quantization:
        parts += [_ranks(quantization), LOADING]
    with atomic_write(directory / CARD) as partial:
        partial.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")


def read_card(directory: Path) -> str:
    """The text of a directory's card, "" without one."""
    path = directory / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _metadata(card: str) -> Mapping[str, Any]:
    """The metadata of a card, in the lines before its text; {} if there are none that can be read."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        content = typed(yaml.safe_load(block[1]) if block else {}, Mapping, "metadata")
    except (yaml.YAMLError, WeLoreError):  # of somebody else, and only for a licence
        return {}
    return {str(key): value for key, value in content.items()}


def _sizes(record: Record, directory: Path) -> str:
    """Parameters and bytes of the complete model and of the matrices that were to be compressed."""
    numbers = record.numbers
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    rows = {
        "parameters of the model": ("parameters_dense", numbers.get("parameters")),
        "bytes of the weights": ("bytes_dense", size),
        "parameters of the targeted matrices": ("targeted_parameters_dense", numbers.get("targeted_parameters")),
    }
    lines = ["| | dense | this model | share |", "|---|---|---|---|"]
    for title, (dense, now) in rows.items():
        if (before := numbers.get(dense)) and now:
            lines.append(f"| {title} | {before:,} | {now:,} | {now / before:.1%} |")
    err = numbers.get("rank_reduction")
    lines += [] if err is None else [f"| effective rank reduction (ERR) | 0 | {err:.1%} | |"]
    return "\n".join(lines)


def _results(record: Record) -> str:
    """The losses that the recovery measured, if there was one."""
    losses = record.numbers.get("held_out_loss") or {}
    names = {"dense": "dense model", "cut": "before the recovery", "healed": "this model, when it was compressed"}
    rows = [f"| {names[key]} | {loss:.3f} |" for key, loss in losses.items() if key in names and loss is not None]
    return "\n".join(["| | loss per token, text held out of the recovery |", "|---|---|", *rows]) if rows else ""


def _ranks(quantization: Mapping[str, Any]) -> str:
    """Ranks by kind of matrix."""
    kinds: dict[str, list[int]] = {}
    for name, rank in (quantization.get("ranks") or {}).items():
        kinds.setdefault(re.sub(r"\.\d+$", "", re.split(r"\.\d+\.", name, maxsplit=1)[-1]), []).append(rank)
    rows = [f"| {k} | {len(r)} | {min(r)} | {sum(r) / len(r):.0f} | {max(r)} |" for k, r in sorted(kinds.items())]
    head = ["## Ranks", "", "| matrix | in low rank | least | mean | largest |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _making(record: Record, base: str) -> str:
    """The command and the Python of a compression; "" for one that has no target, such as an import."""
    settings = record.settings
    target: Mapping[str, Any] = settings.get("target") or {}
    if not target:
        return ""
    method = ("preset", "optimize_for") if settings.get("preset") else ("strategy", "scaling", "optimize_for")
    names = [name for name in (*method, "weights") if settings.get(name, AUTO) not in (None, AUTO)]
    names += ["expert_pruning"] * bool(settings.get("expert_pruning"))
    chosen = dict(target) | {name: settings[name] for name in names}
    flags = [f"--{'for' if key == 'optimize_for' else key.replace('_', '-')} {value}" for key, value in chosen.items()]
    recovery = settings.get("recovery")
    flags.append(f"--recovery {recovery.get('text', 'self') if recovery else 'none'}")
    fields = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
    last = "" if recovery else ", recovery=None"
    version = record.versions.get("welore", "")
    return f"""## How it was made

By welore {version}. `compression.json` holds every setting, `plan.json` every rank.

```bash
welore compress {base} OUT {" ".join(flags)}
```

```python
welore.compress({base!r}, "OUT", welore.CompressionConfig({fields}){last})
```"""
