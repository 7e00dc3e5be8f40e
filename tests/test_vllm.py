"""The writer vllm, with a module in place of vLLM that has its documented interface and checks what it is given."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import welore
from conftest import build
from toys import ALPHABET, calibrate, characters, checkpoint
from welore.config import SELF, CalibrationConfig
from welore.data.mixture import seed_of
from welore.data.self_generated import Texts, uniform_numbers
from welore.data.vllm_writer import write_with_vllm
from welore.errors import WeLoreError
from welore.io.parallel import Processes

END, LENGTH = 1, 12
CHAT = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"


@dataclass
class SamplingParams:
    """As vllm.SamplingParams, those of its fields that a writer may want."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class Engine:
    """As vllm.LLM; it writes the letter after the last one of the prompt, and ends a text after three."""

    model: str
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    seed: int = 0
    max_model_len: int | None = None
    generation_config: str = "auto"
    rounds: list[list[tuple[list[int], SamplingParams]]] = field(default_factory=list)

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[Any]:
        assert len(prompts) == len(sampling_params)
        self.rounds.append([(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)])
        outputs = []
        for prompt, how in self.rounds[-1]:
            assert len(prompt) < self.max_model_len
            assert len(prompt) + how.max_tokens <= self.max_model_len
            letter = 10 + prompt[-1] % 20
            tokens = [letter, letter, letter, *how.stop_token_ids[:1]][: how.max_tokens]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))]))
        return outputs


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that are made while the module in place of vLLM is there."""
    made: list[Engine] = []

    def engine(model: str, **how: Any) -> Engine:
        made.append(Engine(model, **how))
        return made[-1]

    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = engine, SamplingParams
    module.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def write(windows: int = 3, vocabulary: int = len(ALPHABET) + 2, chat: bool = False, **settings: Any) -> torch.Tensor:
    model, tokenizer = build("llama", vocab_size=vocabulary), characters()
    model.generation_config.eos_token_id = END
    if chat:
        tokenizer.chat_template, settings["first"] = CHAT, "chat"
    config = CalibrationConfig(num_tokens=windows * LENGTH, max_length=LENGTH, **settings)
    return write_with_vllm(Path("model"), model.config, Texts.of(model, tokenizer, config), config)


def test_texts_follow_one_another_until_a_window_is_full(engines: list[Engine]) -> None:
    found = write()
    assert found.shape == (3, LENGTH)
    assert found.dtype == torch.int64
    assert (found[:, [4, 9]] == END).all()
    tokenizer, uniform = characters(), uniform_numbers(CalibrationConfig(num_tokens=3 * LENGTH, max_length=LENGTH))
    texts = Texts.of(build("llama", vocab_size=98), tokenizer, CalibrationConfig())
    for row, numbers in zip(found, uniform, strict=True):  # an opening is chosen by the number of its position
        assert [int(row[at]) for at in (0, 5, 10)] == [texts.begin(float(numbers[at]))[0] for at in (0, 5, 10)]
    (engine,) = engines
    assert [len(requests) for requests in engine.rounds] == [3, 3, 3]
    for requests, begun in zip(engine.rounds, (1, 6, 11), strict=True):
        assert [prompt for prompt, _ in requests] == found[:, :begun].tolist()
        assert {how.max_tokens for _, how in requests} == {LENGTH - begun}


def test_the_engine_gets_the_settings_and_a_seed_of_its_own_for_every_text(engines: list[Engine]) -> None:
    write(temperature=0.7, top_k=5, top_p=0.9, seed=4)
    (engine,) = engines
    assert (engine.model, engine.seed, engine.max_model_len) == ("model", 4, LENGTH)
    assert (engine.generation_config, engine.tensor_parallel_size) == ("vllm", 1)
    params = [how for requests in engine.rounds for _, how in requests]
    assert {(how.temperature, how.top_k, how.top_p, how.detokenize) for how in params} == {(0.7, 5, 0.9, False)}
    assert all(how.stop_token_ids == [END] and how.allowed_token_ids is None for how in params)
    assert len({how.seed for how in params}) == len(params)


def test_rows_of_the_output_layer_that_stand_for_no_token_are_not_allowed(engines: list[Engine]) -> None:
    write(vocabulary=128)
    assert engines[0].rounds[0][0][1].allowed_token_ids == list(range(len(ALPHABET) + 2))


def test_a_chat_ends_with_its_second_turn(engines: list[Engine]) -> None:
    found = characters().decode(write(1, chat=True)[0])
    assert found.startswith("[user]")
    assert found.count("</s>") == 1  # the user's turn; the answer fills the window
    assert "[user]" not in found[1:]


@pytest.mark.parametrize(("devices", "expected"), [(0, 1), (2, 2), (3, 2), (8, 4)])
def test_the_model_is_cut_over_as_many_devices_as_its_heads_allow(
    devices: int, expected: int, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    write()  # 4 heads
    assert engines[0].tensor_parallel_size == expected


def test_calibrate_reads_what_it_wrote(tmp_path: Path, engines: list[Engine]) -> None:
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    how: dict[str, Any] = {"num_tokens": 4 * LENGTH, "max_length": LENGTH, "measure_losses": 0}
    found = calibrate(directory, SELF, tmp_path / "c.safetensors", writer="vllm", **how)
    assert found.record.settings["writer"] == "vllm"
    assert engines[0].model == str(directory)
    assert engines[0].seed == seed_of(0, SELF)
    windows = found.generated_text()
    assert windows is not None
    assert (windows[:, 4] == END).all()


def test_vllm_is_imported_only_if_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    how: dict[str, Any] = {"num_tokens": 4 * LENGTH, "max_length": LENGTH, "measure_losses": 0}
    calibrate(directory, SELF, tmp_path / "c.safetensors", **how)
    with pytest.raises(WeLoreError, match=r"^the writer vllm needs vLLM, on Linux: pip install 'welore\[vllm\]'$"):
        calibrate(directory, SELF, tmp_path / "d.safetensors", writer="vllm", **how)


def test_trouble_of_the_engine_is_one_sentence(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **how: Any) -> Any:
        raise ValueError("no such architecture\nmore")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(WeLoreError, match="^vLLM cannot write with model: no such architecture$"):
        write()


def test_an_engine_without_an_answer_is_no_endless_loop(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(outputs=[SimpleNamespace(token_ids=())])
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, params, use_tqdm: [nothing] * len(prompts))
    with pytest.raises(WeLoreError, match="vLLM gave no token"):
        write()


def test_ways_that_cannot_work_are_refused(tmp_path: Path, engines: list[Engine]) -> None:
    with pytest.raises(WeLoreError, match="unknown writer 'vlm'; did you mean 'vllm'"):
        CalibrationConfig(writer="vlm")  # type: ignore[arg-type]
    config = CalibrationConfig(num_tokens=24, max_length=LENGTH, writer="vllm")
    model = build("llama", vocab_size=len(ALPHABET) + 2)
    with pytest.raises(WeLoreError, match="the writer vllm reads a checkpoint"):
        welore.calibrate(model, config, tmp_path / "c", tokenizer=characters())
    directory = checkpoint(tmp_path / "model", rank_reduction=None)
    with pytest.raises(WeLoreError, match="takes all devices from one process"):
        welore.calibrate(directory, config, tmp_path / "c", processes=Processes(0, 2))
    assert not engines
