import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from toys import characters
from welore.data.text import TextOptions, open_text, read_text
from welore.data.windows import evaluation_text, stack, windows, write_windows
from welore.errors import WeLoreError

# What guessing readers spoil: dates, numbers, line ends of Unicode inside a record, empty records.
TEXTS = ["Emma Woodhouse,\nhandsome", "2020-01-01", "12", "one\u2028record", "", "größer"]


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_text_is_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("\n\n".join(TEXTS), encoding="utf-8")
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    assert read_text(str(plain)) == "\n\n".join(TEXTS)
    for name in ("a.jsonl", "a.parquet"):
        assert read_text(str(write(tmp_path / name, records))) == "\n\n".join(TEXTS)


def test_empty_lines_of_jsonl_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n  \n')
    assert read_text(str(tmp_path / "a.jsonl")) == "a\n\nb"


def test_byte_order_marks_and_halves_of_a_pair_are_no_text(tmp_path: Path) -> None:
    """Scraped files are full of both; a tokenizer takes no half of a surrogate pair."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(str(tmp_path / "a.txt")) == "a\nb"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.jsonl").write_bytes(
            mark + b'{"text": "\\ufeffa\\ud83d\\ude00b"}\n{"text": "c\\ud83dd\\u0000"}\n'
        )
        assert read_text(str(tmp_path / "a.jsonl")) == "a\U0001f600b\n\nc\ufffdd\0"
    assert read_text(["\ufeffa", "\ud83d"]) == "a\n\n\ufffd"
    assert list(open_text([{"text": "\ude00"}]).training(9)) == ["\ufffd"]


@pytest.mark.parametrize("bad", [{"story": "b"}, {"text": None}, {"text": 3}, {"text": ["b"]}, ["b"], "b", None])
def test_record_without_text_is_named(tmp_path: Path, bad: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, bad, {"text": "c"}])
    with pytest.raises(WeLoreError, match=r"a\.jsonl, record 2: field 'text' is missing or not a text"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("records", "number"), [([{"text": "a"}, {"text": None}], 2), ([{"story": "a"}], 1), ([{"text": 3}], 1)]
)
def test_row_without_text_is_named(tmp_path: Path, records: list[Any], number: int) -> None:
    path = write(tmp_path / "a.parquet", records)
    with pytest.raises(WeLoreError, match=rf"a\.parquet, record {number}: field 'text' is missing or not a text"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not JSON in UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as parquet"),
        ("a.txt", b"\xff\xfeh\x00i\x00", r"a\.txt is not UTF-8 text"),
        ("a.csv", b"text\na\n", r"a\.csv is not one of the file kinds \.txt, \.jsonl, \.parquet"),
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b" \n\n", r"a\.txt holds no text"),
        ("a.jsonl", b"", r"a\.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl holds no text"),
        ("a.txt", b"\xef\xbb\xbf", r"a\.txt holds no text"),
        ("a.jsonl", b'\n{"n": ' + b"1" * 5000 + b"}", r"a\.jsonl, line 2 is not JSON in UTF-8 \(it has a number of"),
        ("a.jsonl", b"[" * 10**6, r"a\.jsonl, line 1 is not JSON in UTF-8 \(its brackets are nested"),
    ],
)
def test_file_that_gives_no_text_is_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeLoreError, match=sentence) as caught:
        read_text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_parquet_without_rows_holds_no_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(WeLoreError, match=r"a\.parquet holds no text"):
        read_text(str(tmp_path / "a.parquet"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        with pytest.raises(WeLoreError, match=f"{name} does not exist"):
            read_text(str(tmp_path / name))


def test_a_directory_and_a_name_that_no_file_can_have_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(WeLoreError, match=r"a\.txt is a directory: name a file"):
        read_text(tmp_path / "a.txt")
    for name in ("~nobody-of-that-name/a.txt", "a" * 5000, "a\0b", "a" * 300 + ".txt"):
        with pytest.raises(WeLoreError) as caught:
            read_text(name)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 400 + len(name) % 5000


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(WeLoreError, match=r"unknown data set 'wikitext'; did you mean 'wikitext2'\? \(c4, pydoc, wiki"):
        read_text("wikitext")


# --- data sets of the hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "where"), [("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4")])
def test_offline_the_hub_is_one_sentence_that_says_what_to_do(name: str, where: str, tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(
        WeLoreError, match=f"{where} cannot be fetched .*connect once, or give a local .*pydoc"
    ) as caught:
        read_text(name, TextOptions(cache_dir=tmp_path))
    assert "\n" not in str(caught.value)


def test_wikitext2_is_the_raw_test_part_joined_by_two_newlines(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n"]

    def load(name: str, subset: str, *, split: str, cache_dir: str | None) -> datasets.Dataset:
        assert (name, subset, split, cache_dir) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "cache")
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("wikitext2", TextOptions(cache_dir=Path("cache"))) == "\n\n".join(rows)


def test_c4_is_the_first_1100_validation_documents_joined_by_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"Document {i}." for i in range(1200)]

    def load(name: str, subset: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, subset, split, streaming) == ("allenai/c4", "en", "validation", True)
        return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = read_text("c4")
    assert text.startswith("Document 0. Document 1. ")
    assert text.endswith(" Document 1099.")
    assert text.count("Document") == 1100


def test_any_data_set_of_the_hub_is_streamed_with_its_config_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"story": ["one", "two"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    stories = TextOptions(column="story")
    assert read_text("owner/tales", stories) == "one\n\ntwo"
    assert read_text("owner/tales:long", TextOptions("validation", "story")) == "one\n\ntwo"
    assert list(open_text("owner/tales:long", stories).training(100)) == ["one", "two"]
    assert asked == [
        ("owner/tales", None, "test", True),
        ("owner/tales", "long", "validation", True),
        ("owner/tales", "long", "train", True),
    ]
    with pytest.raises(WeLoreError, match="owner/tales, record 1: field 'text' is missing or not a text"):
        read_text("owner/tales")


def test_offline_any_data_set_of_the_hub_is_one_sentence() -> None:
    with pytest.raises(WeLoreError, match=r"the data set owner/tales cannot be fetched .*connect once") as caught:
        read_text("owner/tales:long")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["self", "none"])
def test_reserved_names_are_no_text(name: str) -> None:
    with pytest.raises(WeLoreError, match=f"{name} is no text that can be read here"):
        read_text(name)


def test_a_list_of_strings_and_a_dataset_are_texts() -> None:
    assert read_text(TEXTS) == "\n\n".join(TEXTS)
    assert read_text(datasets.Dataset.from_dict({"text": TEXTS})) == "\n\n".join(TEXTS)
    with pytest.raises(WeLoreError, match="list of 1 texts holds no text"):
        read_text([" "])
    with pytest.raises(WeLoreError, match=r"Dataset of 1 texts, record 1: field 'text' is missing"):
        read_text(datasets.Dataset.from_dict({"story": ["a"]}))
    with pytest.raises(WeLoreError, match=r"a dataset is a name, a hub id, .* not int"):
        read_text(7)


def test_pydoc_is_the_whole_language_reference() -> None:
    from pydoc_data.topics import topics

    text = read_text("pydoc")
    assert len(text) > 400_000
    assert all(topic in text for topic in topics.values())
    assert text.index(topics["assert"]) < text.index(topics["with"])


# --- windows ------------------------------------------------------------------------------------------------------


def words(count: int) -> tuple[str, list[int]]:
    ids = [(7 * i + 3) % 96 for i in range(count)]
    return " ".join(f"w{i}" for i in ids), ids


@pytest.mark.parametrize(("count", "length", "lengths"), [(12, 4, [4, 4, 4]), (11, 4, [4, 4, 3]), (3, 100, [3])])
def test_windows_do_not_overlap_and_cover_the_whole_text(
    tokenizer: PreTrainedTokenizerFast, count: int, length: int, lengths: list[int]
) -> None:
    text, ids = words(count)
    found = windows(tokenizer, text, length)
    assert [len(window) for window in found] == lengths
    assert torch.cat(found).tolist() == ids


def test_rest_of_one_token_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    text, ids = words(9)
    assert [window.tolist() for window in windows(tokenizer, text, 4)] == [ids[:4], ids[4:8]]


def test_limit_takes_the_first_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    text, ids = words(11)
    assert [window.tolist() for window in windows(tokenizer, text, 4, limit=2)] == [ids[:4], ids[4:8]]
    assert len(windows(tokenizer, text, 4, limit=99)) == 3


@pytest.mark.parametrize("length", [1, 0, -4])
def test_window_too_short_to_predict_is_refused(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    with pytest.raises(WeLoreError, match=f"length is {length}: a window needs at least 2 tokens"):
        windows(tokenizer, "w1 w2 w3", length)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_windows_at_all_is_refused(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    with pytest.raises(WeLoreError, match=f"windows is {limit}: it must be at least 1"):
        windows(tokenizer, "w1 w2 w3", 2, limit)


def test_every_window_begins_with_bos_if_the_tokenizer_opens_texts() -> None:
    def cut(bos: Any, tokenizer: Any) -> list[str]:
        return [tokenizer.decode(window) for window in windows(tokenizer, "abcdefg", 4, bos=bos)]

    opening, plain = characters(opens=True), characters()
    assert cut("auto", opening) == cut("window", opening) == ["<pad>abc", "<pad>def", "<pad>g"]
    assert cut("text", opening) == ["<pad>abc", "defg"]
    assert cut("never", opening) == cut("auto", plain) == cut("text", plain) == ["abcd", "efg"]
    with pytest.raises(WeLoreError, match="this tokenizer has no BOS token: take 'auto' or 'never'"):
        cut("window", plain)
    plain.bos_token = "<pad>"
    assert cut("window", plain) == cut("window", opening)
    with pytest.raises(WeLoreError, match="unknown bos 'windows'; did you mean 'window'"):
        cut("windows", plain)


def test_text_of_one_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeLoreError, match="shorter than two tokens"):
        windows(tokenizer, "w1", 4)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_batches_hold_equally_long_windows_in_order(batch_size: int) -> None:
    found = list(torch.arange(23).split(5))
    batches = stack(found, batch_size)
    assert all(len(batch) <= batch_size for batch in batches)
    assert [row.tolist() for batch in batches for row in batch] == [window.tolist() for window in found]
    assert len(batches) == -(-4 // batch_size) + 1  # four full windows, and the shorter one on its own


def test_given_windows_are_evaluated_as_they_are(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ids = torch.arange(12).view(3, 4)
    write_windows(tmp_path / "w.safetensors", ids)
    for dataset in (ids, tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")):
        text, digest = evaluation_text(dataset, TextOptions())
        assert torch.equal(torch.stack(windows(tokenizer, text, 2048)), ids)
        assert torch.equal(torch.stack(windows(tokenizer, text, 2048, 2)), ids[:2])
        assert digest == evaluation_text(ids, TextOptions())[1]
    with pytest.raises(WeLoreError, match=r"the dataset is a tensor of shape \(4,\): give token ids"):
        evaluation_text(ids[0], TextOptions())
    for wrong in (ids.float(), ids[:, :1], ids > 3):  # no number of a token, nothing to predict
        save_file({"windows": wrong.contiguous()}, tmp_path / "wrong.safetensors")
        for dataset in (wrong, tmp_path / "wrong.safetensors"):
            with pytest.raises(WeLoreError, match="is a tensor of shape .*: give token ids"):
                evaluation_text(dataset, TextOptions())
