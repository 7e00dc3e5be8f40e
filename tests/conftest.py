"""Offline, small and real: tiny random models of every family, and the embedded SmolLM2."""

import dataclasses
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: as many workers as cores, a thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads that spin make every other process of the machine wait

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import welore
from welore.cli.main import main
from welore.config import AllocationConfig, CalibrationConfig, CompressionConfig
from welore.errors import WeLoreError

# The files that take longest, longest first: with `-n 2 --dist loadfile` neither worker is left alone at the end.
LONGEST = (
    "test_benchmarks",
    "test_tuning",
    "test_healing",
    "test_devices",
    "test_cli",
    "test_calibration",
    "test_hub",
    "test_recipes",
    "test_embedded",
    "test_campaigns",
    "test_checkpoint",
    "test_adapters",
    "test_blockwise",
    "test_emergence",
    "test_docs",
    "test_contract",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_configure() -> None:
    os.fsync = lambda descriptor: None  # no test cuts the power, and the disk would take a third of the time


seen_modules: set[str] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Objects of imported libraries are no garbage; the collector would look at a million of them again and again."""
    if seen_modules != sys.modules.keys():
        seen_modules.update(sys.modules)
        gc.collect()
        gc.freeze()
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 16},
    "qwen2": COMMON | {"tie_word_embeddings": True},
    "qwen3": COMMON | {"head_dim": 8},
    "gemma2": COMMON | GEMMA,
    "gemma3_text": COMMON | GEMMA,
    "phi3": COMMON | {"original_max_position_embeddings": 64},
    "olmo2": COMMON,
    "gpt2": GPT2,
    "gpt_neox": COMMON,
    "opt": COMMON | {"ffn_dim": 56, "word_embed_proj_dim": 24},
    "starcoder2": COMMON,
    "stablelm": COMMON | {"use_qkv_bias": True},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A small random causal LM whose matrices have decaying spectra, so that there is something to prune."""
    config = CONFIG_MAPPING[family](**((FAMILIES | MIXTURES).get(family, COMMON) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and min(parameter.shape) > 4:
                U, S, V = torch.linalg.svd(parameter, full_matrices=False)
                decay = torch.exp(-torch.arange(len(S)) / (2 + 8 * torch.rand(())))
                parameter.copy_(U @ torch.diag(S[0] * decay * 4) @ V)
            elif parameter.ndim == 3:  # the matrices of all experts
                U, S, V = torch.linalg.svd(parameter, full_matrices=False)
                decay = torch.exp(-torch.arange(S.shape[1]) / (2 + 8 * torch.rand(len(S), 1)))
                parameter.copy_(U @ torch.diag_embed(S[:, :1] * decay * 4) @ V)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def allocate(spectra: welore.Spectra, **settings: Any) -> welore.Plan:
    """`welore.allocate` with the fields of its config as keywords."""
    return welore.allocate(spectra, AllocationConfig(**settings))


def compress(model: Any, output_dir: Path | str | None = None, **settings: Any) -> welore.Record:
    """`welore.compress` with the fields of its configs as keywords; the record."""
    names = {field.name for field in dataclasses.fields(CompressionConfig)}
    config = CompressionConfig(**{name: settings.pop(name) for name in list(settings) if name in names})
    text = {name: settings.pop(name) for name in ("num_tokens", "seed") if name in settings}
    if text:
        settings["calibration"] = CalibrationConfig(**text)
    return welore.compress(model, output_dir, config, **settings).record


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Builds and saves a small model; the directory."""

    def save(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
        directory = tmp_path / f"{family}-{dtype}"
        build(family, dtype, **changes).save_pretrained(directory, max_shard_size=shard)
        return directory

    return save


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30]])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """For the small models: the word "w5" is token 5, and no token is added."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the embedded model, converted once per machine."""
    from welore.io.hub import resolve_model
    from welore.models.embedded import embedded_model

    try:
        model = embedded_model()
    except WeLoreError as error:
        pytest.skip(str(error))
    return resolve_model(model)


@pytest.fixture(scope="session")
def smollm2_spectra(smollm2: Path) -> welore.Spectra:
    return welore.analyze(smollm2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The small real data that lie beside the repository on developers' machines."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: this test reads real data that the project does not contain")
    return SHARED


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits.float()


# --- the command line ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit status and what it wrote to the two streams."""

    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The `welore` command, run in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["welore", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return Answer(int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that fork: a child computes with one thread, and another number of threads sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(directory: Path) -> dict[Path, bytes]:
    """Every file below a directory, hidden ones too, and its content."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def done(answer: Answer) -> str:
    """The one line that a command prints when all is well."""
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.count("\n") == 1
    return answer.out


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused; its sentence. Not a file below tmp_path may appear, change or vanish."""

    def run(*arguments: object) -> str:
        before, directories = everything(tmp_path), set(tmp_path.rglob("*"))
        answer = command(*arguments)
        assert (answer.status, answer.out) == (2, "")
        assert re.fullmatch(r"welore: .+\n", answer.err), answer.err
        assert everything(tmp_path) == before
        assert set(tmp_path.rglob("*")) == directories
        return answer.err

    return run
