"""Writing at the cost of its arithmetic: the cache, the attention, batches by memory, finished batches, processes."""

import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from conftest import build
from toys import ALPHABET, characters, checkpoint
from welore.calibration.collect import _Job, _own_text, draw_text
from welore.calibration.statistics import GENERATED
from welore.config import SELF, CalibrationConfig
from welore.data import self_generated
from welore.data.decoding import GroupedAttention, ReservedLayer, reserve
from welore.data.mixture import seed_of
from welore.data.self_generated import generate_text, window_bytes, windows_at_once
from welore.errors import WeLoreError
from welore.io.context import RunContext
from welore.io.parallel import Processes
from welore.io.resume import Workspace
from welore.models import copies
from welore.models.copies import generation_copy
from welore.models.load import load_model
from welore.models.source import open_source

CPU, GB = torch.device("cpu"), 1 << 30


def writer(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return build(family, vocab_size=len(ALPHABET) + 2, **changes)


def size(windows: int, length: int = 10) -> CalibrationConfig:
    return CalibrationConfig(num_tokens=windows * length, max_length=length)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_keys_and_values_of_earlier_tokens_stay_where_they_are() -> None:
    model, ids = writer(), torch.tensor([[5], [7]])
    with torch.inference_mode():
        cache = reserve(model(ids, use_cache=True).past_key_values, 6)
        assert all(type(layer) is ReservedLayer for layer in cache.layers)
        begin = [layer.keys.data_ptr() for layer in cache.layers]
        for _ in range(5):
            last = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        assert [layer.keys.data_ptr() for layer in cache.layers] == begin
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(last, model(ids.expand(2, 6)).logits[:, -1])


def test_layers_that_forget_keep_their_own_cache() -> None:
    model, ids = writer("gemma3_text", layer_types=["sliding_attention", "full_attention"]), torch.tensor([[5]])
    with torch.inference_mode():
        short, long = (reserve(model(ids, use_cache=True).past_key_values, length) for length in (16, 17))
    assert [type(layer) is ReservedLayer for layer in short.layers] == [True, True]
    assert [type(layer) is ReservedLayer for layer in long.layers] == [False, True]


class Recorder(TorchFunctionMode):
    """The shapes of the queries that arrive at torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share_keys_are_rows_of_one_product(dtype: torch.dtype) -> None:
    query, key, value = (random(2, heads, rows, 8, dtype=dtype) for heads, rows in ((6, 1), (2, 5), (2, 5)))
    expected = scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    with Recorder() as seen, GroupedAttention():
        found = scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert seen.shapes == [(2, 2, 3, 8)]
    torch.testing.assert_close(found, expected)


def test_other_attention_is_left_alone() -> None:
    query, key = random(2, 6, 1, 8), random(2, 2, 5, 8)
    mask = torch.tensor([[True, False, True, True, False]])
    several, alone = random(2, 6, 5, 8), random(2, 6, 5, 8)
    with Recorder() as seen, GroupedAttention():
        masked = scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
        causal = scaled_dot_product_attention(several, key, key, is_causal=True, enable_gqa=True)
        scaled_dot_product_attention(query, alone, alone)
    assert seen.shapes == [(2, 6, 1, 8), (2, 6, 5, 8), (2, 6, 1, 8)]
    torch.testing.assert_close(masked, scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True))
    expected = scaled_dot_product_attention(several, key, key, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal, expected)


def test_a_model_that_writes_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder() as seen:
        generate_text(writer(), characters(), size(3, 4))
    assert seen.shapes == 3 * 2 * [(3, 2, 2, 8)]  # steps, layers; 4 heads share 2 keys


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_window_is_that_of_its_keys_values_and_logits() -> None:
    config = writer().config  # 2 layers, 2 key heads of 8, 98 tokens
    assert window_bytes(config, 10, 2) == 2 * 2 * 16 * 10 * 2 + 98 * 6
    assert window_bytes(build("gpt2").config, 10, 4) == 2 * 2 * 32 * 10 * 4 + 96 * 8


@pytest.mark.parametrize(("free", "expected"), [(100, 32), (20, 16), (10, 8), (1, 1), (0, 1), (None, 32)])
def test_as_many_windows_are_written_at_once_as_memory_holds(free: int | None, expected: int) -> None:
    config = writer().config
    bytes_free = None if free is None else int(free * window_bytes(config, 10, 4) / self_generated.USABLE) + 1
    assert windows_at_once(config, torch.float32, bytes_free, 10, 32) == expected


def test_a_cpu_without_memory_for_a_copy_writes_with_the_weights_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "multiplies", lambda dtype, device: False)
    model = writer().to(torch.bfloat16)
    weight = model.lm_head.weight
    assert generation_copy(model, CPU).dtype is torch.float32
    monkeypatch.setattr(copies, "free_memory", lambda device: 1000)
    written = generation_copy(model, CPU)
    assert written.dtype is torch.bfloat16
    assert written.lm_head.weight.data_ptr() == weight.data_ptr()


def test_a_device_that_cannot_hold_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "free_memory", lambda device: 1000)
    with pytest.raises(WeLoreError, match=r"takes 0.0 GB and meta has 0.0 GB free, so it cannot write a text there"):
        generation_copy(writer(), torch.device("meta"))


# --- a run that is killed; several processes --------------------------------------------------------------------------


def killed_after(steps: int) -> Any:
    def progress(items: Any, label: str, total: float) -> Any:
        for done, (item, _) in enumerate(items):
            if done == steps:
                raise KeyboardInterrupt
            yield item

    return progress


def test_finished_batches_of_a_killed_run_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, workspace, steps = writer(), Workspace(tmp_path / "work", "key"), []
    expected = generate_text(model, characters(), size(7), batch_size=3)
    workspace.open()
    with pytest.raises(KeyboardInterrupt):
        generate_text(model, characters(), size(7), batch_size=3, progress=killed_after(14), workspace=workspace)

    def counting(items: Any, label: str, total: float) -> Any:
        steps.append(total)
        return (item for item, _ in items)

    # There is more memory now; in half precision a word can depend on the batch, so the batches stay as they were.
    found = generate_text(model, characters(), size(7), batch_size=7, progress=counting, workspace=workspace)
    assert torch.equal(found, expected)
    assert steps == [20]  # batches of 3 and 1 windows, 10 tokens each


def test_a_text_in_one_batch_is_stored_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", "key")
    workspace.open()
    generate_text(writer(), characters(), size(3), workspace=workspace)
    assert not list((tmp_path / "work").glob("*.safetensors"))  # by who asked for it


class Together(Processes):
    """One of several processes; what the others give is known."""

    def gather(self, item: Any) -> list[Any]:
        Together.given[self.rank] = item
        return [Together.given.get(rank, item.new_zeros(0, item.shape[1])) for rank in range(self.size)]

    given: dict[int, Any] = {}  # noqa: RUF012


def test_processes_write_a_share_each_and_all_get_the_text_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate_text(writer(), characters(), size(5))
    asked: list[int] = []
    usual = self_generated.windows_at_once
    monkeypatch.setattr(
        self_generated,
        "windows_at_once",
        lambda *given: asked.append(given[-1]) or usual(*given),  # type: ignore[func-returns-value]
    )
    with pytest.raises(RuntimeError):  # the share of the first process is not there yet
        generate_text(writer(), characters(), size(5), processes=Together(1, 2))
    found = generate_text(writer(), characters(), size(5), processes=Together(0, 2))
    assert torch.equal(found, expected)
    assert asked == [2, 3]


def test_all_processes_of_compress_write_its_text(tmp_path: Path) -> None:
    context, config = RunContext.create(device="cpu"), size(5)
    directory, workspace = checkpoint(tmp_path / "model", None), Workspace(tmp_path / "work", "key")
    workspace.open()
    loaded = load_model(directory, context)
    text = draw_text(config, loaded.model, loaded.tokenizer, context)
    expected = generate_text(
        generation_copy(loaded.model, CPU), loaded.tokenizer, replace(config, seed=seed_of(0, SELF))
    )
    for rank in (1, 0):
        Together.given = {} if rank else {1: expected[1::2]}
        shared = replace(context, processes=Together(rank, 2), workspace=workspace)
        with pytest.raises(RuntimeError) if rank else nullcontext():  # as above
            job = _Job(open_source(directory, context), loaded.model, text.config, shared, workspace)
            _own_text(job, loaded.tokenizer, text.own)
        torch.testing.assert_close(Together.given[rank], expected[rank::2])
    written = workspace.fetch(GENERATED)
    assert written is not None
    assert torch.equal(written[GENERATED].long(), expected)


GATHER = "from welore.io.parallel import join_processes as j; p = j(); print(p.gather((p.rank, 'item')))"


@pytest.mark.slow
def test_every_process_of_a_launcher_gets_the_items_of_all() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", GATHER], capture_output=True, text=True, timeout=400)
    # Both may write into one line.
    assert done.stdout.replace("\n", "") == 2 * "[(0, 'item'), (1, 'item')]", done.stderr
