import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from toys import characters
from welore.config import FinetuneConfig
from welore.data import packing as batches
from welore.data import text as text_module
from welore.data.packing import DatasetSplit, blocks_of_text
from welore.data.text import TextOptions
from welore.errors import WeLoreError
from welore.training.data import IGNORED, collate, questions_of_task, reading_order

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def questions_of_svamp(path: Path, length: int = 200, tokenizer: Any = None, **settings: Any) -> DatasetSplit:
    config = FinetuneConfig(task="svamp", task_dataset=path, max_length=length, **settings)
    return questions_of_task(config, tokenizer or characters())


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def svamp(directory: Path, count: int) -> Path:
    records = [{"Body": f"Ann has {n} pears", "Question": "How many?", "Answer": n} for n in range(count)]
    (directory / "SVAMP.json").write_text(json.dumps(records))
    return directory / "SVAMP.json"


def test_blocks_are_full_and_the_first_tenth_is_held_out(text: str) -> None:
    found = blocks_of_text(text, characters(), 32, tokens=0, eval_items=3)
    blocks = [sequence["input_ids"] for sequence in [*found.evaluation, *found.train]]
    count = len(TEXT) // 32
    assert {len(block) for block in blocks} == {32}
    assert found.counts == {
        "train_blocks": count - count // 10,
        "held_out_blocks": count // 10,
        "tokens_unused": len(TEXT) % 32,
    }
    assert len(found.evaluation) == 3  # of those held out, as many as asked for
    assert characters().decode(found.evaluation[0]["input_ids"]) == TEXT[:32]
    assert characters().decode(found.train[0]["input_ids"]) == TEXT[count // 10 * 32 :][:32]
    assert "the first 5 of 56 blocks are held out" in found.split


def test_written_windows_lose_their_first_tenth_and_enough_are_written() -> None:
    windows = torch.arange(60, dtype=torch.int32).view(20, 3)
    found = batches.blocks_of_windows(windows, "own text", eval_items=1)
    assert torch.equal(found.evaluation[0]["input_ids"], torch.tensor([0, 1, 2]))
    assert torch.equal(torch.stack([block["labels"] for block in found.train]), windows[2:].long())
    assert (found.counts["train_blocks"], found.counts["held_out_blocks"], len(found.evaluation)) == (18, 2, 1)
    assert found.split == "own text: the first 2 of 20 blocks are held out"
    for wanted in range(1, 200):
        written = batches.blocks_to_write(wanted)
        left = [n - max(1, n // 10) for n in (written - 1, written)]
        assert left[0] < wanted <= left[1]


def test_named_data_sets_train_on_their_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def rows(name: str, config: str, split: str, limit: int | None, cache_dir: Any) -> list[str]:
        asked.append((name, split, limit))
        return [f"{split} document {n}" for n in range(8)]

    monkeypatch.setattr(text_module, "hub_rows", rows)
    found = blocks_of_text("c4", characters(), 16, tokens=900, eval_items=2)
    assert asked == [("allenai/c4", "train", 4), ("allenai/c4", "validation", 1100)]
    assert "first 4 documents of train" in found.split
    stream = torch.cat([sequence["input_ids"] for sequence in found.train])
    assert characters().decode(stream).startswith("train document 0</s>train document 1</s>")
    blocks_of_text("wikitext2", characters(), 16, tokens=900, eval_items=2)
    assert [split for _, split, _ in asked[2:]] == ["train", "validation"]  # never the test part


def test_documents_are_packed_with_an_end_between_them_and_read_no_further_than_needed() -> None:
    read: list[int] = []

    class Rows:
        def __iter__(self) -> Iterator[dict[str, str]]:
            for n in range(10_000):
                read.append(n)
                yield {"text": f"document {n:04}"}

    for dataset in (Rows(), [f"document {n:04}" for n in range(10_000)]):
        found = blocks_of_text(dataset, characters(), 14, tokens=14 * 90, eval_items=2)
        assert found.counts["train_blocks"] >= 90
        assert found.counts["train_blocks"] + found.counts["held_out_blocks"] < 200
        assert found.train.tokens.dtype == torch.int32  # type: ignore[attr-defined]
        first = characters().decode(found.evaluation[0]["input_ids"])
        assert first == "document 0000</s>"
        assert found.train[0]["input_ids"].dtype == torch.int64
        assert len(found.train[3:5]) == 2
    assert len(read) < 200
    same = blocks_of_text([f"document {n:04}" for n in range(10_000)], characters(), 14, tokens=14 * 90, eval_items=2)
    assert same.sha256 == found.sha256


def test_every_block_begins_with_bos_if_the_tokenizer_opens_texts() -> None:
    documents = ["abcdefg", "hijklmno"]

    def packed(bos: Any, tokenizer: Any) -> list[str]:
        return tokenizer.batch_decode(batches.pack(tokenizer, documents, 6, bos=bos)[0])

    for bos in ("auto", "window"):
        opened = ["<pad>abcde", "<pad>fg</s><pad>h", "<pad>ijklm"]
        assert packed(bos, characters(opens=True)) == opened
    assert packed("text", characters(opens=True)) == ["<pad>abcde", "fg</s><pad>hi", "jklmno"]
    plain = ["abcdef", "g</s>hijk"]
    assert packed("never", characters(opens=True)) == plain
    assert [packed(bos, characters()) for bos in ("auto", "text", "never")] == [plain] * 3
    digests = {
        (bos, opens): blocks_of_text(
            ["abc" * 99], characters(opens=opens), 8, tokens=0, eval_items=1, options=TextOptions(bos=bos)
        ).sha256
        for bos in ("auto", "text")
        for opens in (True, False)
    }
    assert len({digests.pop(("auto", True)), *digests.values()}) == 2  # other blocks are other data


def test_text_for_a_vocabulary_is_that_of_the_training_part(text: str) -> None:
    assert batches.training_texts(text, 100) == [TEXT[len(TEXT) // 10 :]]
    assert batches.training_texts(["a" * 500, "b" * 500, "c" * 500], 100) == ["a" * 400 + "\n\n" + "b" * 500]


@pytest.mark.parametrize(
    ("length", "message"), [(1, "at least 2 tokens"), (1800, "gives 1 blocks of 1800 tokens"), (1801, "gives 0 blocks")]
)
def test_a_text_too_short_to_train_and_evaluate_on_is_refused(text: str, length: int, message: str) -> None:
    with pytest.raises(WeLoreError, match=message):
        blocks_of_text(text, characters(), length, tokens=0, eval_items=1)


def test_loss_is_on_answer_and_end_only(tmp_path: Path) -> None:
    found = questions_of_svamp(svamp(tmp_path, 20))
    first = found.train[3]
    labels = first["labels"][first["labels"] != IGNORED]
    assert characters().decode(labels) == " 3.</s>"
    assert characters().decode(first["input_ids"]).endswith("A: The answer (arabic numerals) is 3.</s>")
    whole = questions_of_svamp(tmp_path, loss_on_prompt=True)
    assert torch.equal(whole.train[3]["labels"], whole.train[3]["input_ids"])


def test_what_is_held_out_of_a_task_comes_from_its_training_part(tmp_path: Path) -> None:
    found = questions_of_svamp(svamp(tmp_path, 100))  # 70 are for training
    texts = [characters().decode(s["input_ids"]) for s in [*found.train, *found.evaluation]]
    assert (len(found.train), len(found.evaluation)) == (63, 7)
    assert all(f"Ann has {n} pears" in text for n, text in enumerate(texts))


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    found = questions_of_svamp(svamp(tmp_path, 20), 20)
    assert found.counts["items_cut"] == found.counts["train_items"] + found.counts["held_out_items"] == 14
    assert characters().decode(found.train[3]["input_ids"]) == "bic numerals) is 3.</s>"
    with pytest.raises(WeLoreError, match="max_length is 5: an answer of svamp alone"):
        questions_of_svamp(tmp_path, 5)
    opened = questions_of_svamp(tmp_path, 20, tokenizer=characters(opens=True)).train[3]
    assert characters().decode(opened["input_ids"]) == "<pad>ic numerals) is 3.</s>"
    assert (opened["labels"] != IGNORED).sum() == 4


def test_batches_are_padded_on_the_right_to_their_longest() -> None:
    short, long = ({"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1)} for n in (2, 3))
    batch = collate([short, long], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [1, 2, 3]]
    assert batch["labels"].tolist() == [[1, 2, IGNORED], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(collate([long, long])) == {"input_ids", "labels"}


def test_order_depends_on_the_seed_alone_and_repeats_nothing_early() -> None:
    order = reading_order(10, 25, seed=3)
    assert order == reading_order(10, 25, seed=3)
    assert order != reading_order(10, 25, seed=4)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:5] == reading_order(10, 5, seed=3)
