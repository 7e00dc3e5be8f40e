"""Fine-tuning on data of one's own: formats, tokens of the loss, held-out parts, refusals; and inside TRL."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import welore
from conftest import Command
from toys import characters, checkpoint, finetuned, weights
from welore.config import FinetuneConfig
from welore.data import examples
from welore.data.examples import examples_of_rows
from welore.data.packing import IGNORED, DatasetSplit
from welore.data.rows import Rows, open_rows
from welore.errors import WeLoreError
from welore.training.arguments import resolve_steps
from welore.training.data import reading_order

needs_trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is absent: pip install trl")

TURN = "[{{ m.role }}]{{ m.content }}[end]"
ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}{{ m.content }}[end]"
    "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
LAST_ONLY = "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}" + ASK
SHORT: dict[str, Any] = {
    **{"max_steps": 4, "batch_size": 2, "max_length": 200, "learning_rate": 5e-3, "warmup_steps": 1},
    **{"eval_steps": 2, "max_eval_samples": 4, "save_steps": 0},
}


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of a user and the assistant by turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


CHATS = [{"messages": turns(f"Is {n} even?", "yn"[n % 2], "Why?", f"{n} is {n}.")} for n in range(20)]
PAIRS = [{"prompt": f"After {n} comes", "completion": f" {n + 1}."} for n in range(20)]


def chatting(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    tokenizer = characters()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed model that chats."""
    out = checkpoint(tmp_path_factory.mktemp("models") / "compressed")
    chatting(MARKED).save_pretrained(out)
    return out


def read(dataset: Any, cache: Path | None = None, tokenizer: Any = None, **settings: Any) -> DatasetSplit:
    config = FinetuneConfig(dataset=dataset, **{"max_length": 400} | settings)
    rows = open_rows(config, 100, cache)
    assert isinstance(rows, Rows)
    return examples_of_rows(rows, tokenizer or chatting(), config)


def expected(*pieces: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Tokens and labels of pieces of text, made character by character: (text, whether it is learned)."""
    vocabulary = characters().get_vocab()
    ids = [(vocabulary[c], learned) for text, learned in pieces for c in (["</s>"] if text == "</s>" else text)]
    return [i for i, _ in ids], [i if learned else IGNORED for i, learned in ids]


def chat_tokens(number: int, tokenizer: Any = None) -> tuple[list[int], list[int]]:
    ask, answer, why, because = (message["content"] for message in CHATS[number]["messages"])
    return expected(
        (f"[user]{ask}[end][assistant]", False),
        (f"{answer}[end]", True),
        (f"[user]{why}[end][assistant]", False),
        (f"{because}[end]", True),
    )


def pair_tokens(number: int) -> tuple[list[int], list[int]]:
    row = PAIRS[number]
    return expected((row["prompt"], False), (row["completion"], True), ("</s>", True))


def tokens_of(split: DatasetSplit) -> list[tuple[list[int], list[int]]]:
    examples = [*split.train, *split.evaluation]
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in examples]


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join(",".join(f'"{value}"' for value in line) + "\n" for line in lines))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


# --- the tokens that are learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "list", "iterator", "Dataset", "streamed"])
def test_in_a_conversation_the_assistants_turns_alone_are_learned(template: str, kind: str, tmp_path: Path) -> None:
    table = Dataset.from_list(CHATS)
    in_memory: dict[str, Callable[[], Any]] = {
        "list": lambda: CHATS,
        "iterator": lambda: iter(CHATS),
        "Dataset": lambda: table,
        "streamed": table.to_iterable_dataset,
    }
    dataset = in_memory[kind]() if kind in in_memory else written(CHATS, tmp_path / f"chats.{kind}")
    split = read(dataset, tmp_path / "cache", chatting(template))
    assert tokens_of(split) == [chat_tokens(n) for n in range(20)]
    assert split.counts == {"train_items": 18, "held_out_items": 2, "items_cut": 0, "items_dropped": 0}
    assert split.train.lengths.tolist() == [len(chat_tokens(n)[0]) for n in range(18)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "list"])
def test_of_a_pair_the_completion_and_the_end_are_learned(kind: str, tmp_path: Path) -> None:
    dataset = PAIRS if kind == "list" else written(PAIRS, tmp_path / f"pairs.{kind}")
    assert tokens_of(read(dataset, tmp_path / "cache")) == [pair_tokens(n) for n in range(20)]
    everything = tokens_of(read(dataset, tmp_path / "cache", loss_on_prompt=True))
    assert everything == [(pair_tokens(n)[0],) * 2 for n in range(20)]


def test_a_pair_may_be_of_messages_and_an_instruction_gets_the_usual_prompt() -> None:
    pairs = [{"prompt": turns("Hi"), "completion": [{"role": "assistant", "content": "Ho"}]}] * 2
    assert tokens_of(read(pairs))[0] == expected(("[user]Hi[end][assistant]", False), ("Ho[end]", True))
    tasks = [
        {"instruction": "Add.", "input": "1 {2}", "output": "3"},
        {"instruction": "Go.", "input": "", "output": "!"},
    ]
    with_input, without = tokens_of(read(tasks))
    begin = "Below is an instruction that describes a task"
    end = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    more = ", paired with an input that provides further context. "
    asked = f"{begin}{more}{end}Add.\n\n### Input:\n1 {{2}}\n\n### Response:\n"
    assert with_input == expected((asked, False), ("3", True), ("</s>", True))
    assert without == expected((f"{begin}. {end}Go.\n\n### Response:\n", False), ("!", True), ("</s>", True))


TOOLS = "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
CALL = "{% for c in m.tool_calls or () %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
CALLING = TOOLS + PLAIN.replace("[end]", CALL + "[end]")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "list", "Dataset"])
def test_a_tool_call_has_its_own_arguments_and_no_others(kind: str, tmp_path: Path) -> None:
    def row(name: str, argument: str, value: str) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": {argument: value}}}]
        return {
            "messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": calls}],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {argument: {"type": "string"}}}}],
        }

    rows = [row("weather", "city", "Rome"), row("count", "sum", "2+2")] * 2
    table = Dataset.from_list(rows)
    assert None in table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"].values()  # Arrow's own
    data = {"list": rows, "Dataset": table}.get(kind) or written(rows, tmp_path / f"calls.{kind}")
    tokenizer = chatting(CALLING)
    texts = [tokenizer.decode(ids) for ids, _ in tokens_of(read(data, tmp_path, tokenizer))]
    for text, given in zip(texts, rows, strict=True):
        function = given["messages"][1]["tool_calls"][0]["function"]
        learned = f"[user]Go[end][assistant]{function['name']}{json.dumps(function['arguments'])}[end]"
        assert text == f"[tools]{json.dumps(given['tools'])}{learned}"


def test_tools_may_be_json_as_in_trl() -> None:
    rows = [row | {"tools": '[{"name": "x"}]'} for row in CHATS]
    tokenizer = chatting(CALLING)
    assert tokens_of(read(rows, None, tokenizer)) == tokens_of(
        read([row | {"tools": [{"name": "x"}]} for row in CHATS], None, tokenizer)
    )


# Contents of PLAIN are written as they are; others take texts alone, lists alone (as of text and images), or both.
PART = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
CONTENTS = {
    "any": PLAIN,
    "texts": PLAIN.replace("m.content", "'' + m.content"),
    "lists": PLAIN.replace("{{ m.content }}", PART),
    "both": PLAIN.replace(
        "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}PART{% endif %}"
    ).replace("PART", PART),
}


@pytest.mark.parametrize("template", CONTENTS.values(), ids=CONTENTS)
def test_contents_may_be_texts_or_lists_of_texts_whatever_the_template_reads(template: str) -> None:
    def listed(message: dict[str, str]) -> dict[str, Any]:
        halves = message["content"][:2], message["content"][2:]
        return message | {"content": [{"type": "text", "text": half} for half in halves]}

    in_lists = [{"messages": [listed(message) for message in row["messages"]]} for row in CHATS]
    for rows in (CHATS, in_lists):
        assert tokens_of(read(rows, None, chatting(template))) == [chat_tokens(n) for n in range(20)]


def test_an_end_behind_every_conversation_is_learned_in_the_last_turn_alone() -> None:
    closed = (
        "{% for m in messages %}"
        + TURN
        + "{% endfor %}{% if add_generation_prompt %}[assistant]{% else %}</s>{% endif %}"
    )
    ids, labels = zip(*(chat_tokens(n) for n in range(20)), strict=True)
    tokens = tokens_of(read(CHATS, None, chatting(closed)))
    assert tokens == [([*row, 1], [*learned, 1]) for row, learned in zip(ids, labels, strict=True)]


def test_a_template_that_ends_no_answer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    read(CHATS, tokenizer=chatting(PLAIN.replace("[end]", "</s>")))
    read(PAIRS)
    assert not caplog.records
    read(CHATS, tokenizer=chatting(PLAIN))
    (record,) = caplog.records
    assert "no answer has a special token that ends it" in record.getMessage()


@pytest.mark.parametrize(("special", "warnings"), [(True, 0), (False, 1)])
def test_an_end_of_turn_without_a_name_is_an_end(
    special: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The base models of Llama-3 have <|eot_id|>, which their eos_token is not."""
    tokenizer = chatting(PLAIN.replace("[end]", "<|eot_id|>"))
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=special)])
    read(CHATS, tokenizer=tokenizer)
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("name", ["bos_token", "unk_token"])
def test_a_beginning_or_an_unknown_word_is_no_end(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chatting("<pad>" + PLAIN)
    setattr(tokenizer, name, "<pad>")
    read(CHATS, tokenizer=tokenizer, loss_on_prompt=True)
    assert len(caplog.records) == 1


def test_columns_may_have_other_names_which_decide_the_shape() -> None:
    rows = [{"q": row["prompt"], "a": row["completion"], "messages": turns("a", "b"), "text": "t"} for row in PAIRS]
    found = read(rows, prompt_column="q", completion_column="a")
    assert tokens_of(found) == [pair_tokens(n) for n in range(20)]
    assert found.split == "the last 2 of 20 training items are held out (completion)"
    assert tokens_of(read(rows))[0] == expected(("[user]a[end][assistant]", False), ("b[end]", True))
    assert open_rows(FinetuneConfig(dataset=rows, text_column="text"), 9) is rows  # a text: packed elsewhere


def test_what_is_too_long_is_cut_or_dropped_and_counted() -> None:
    long = [{"prompt": "p" * 50, "completion": "c"}, {"prompt": "p", "completion": "c" * 50}, *PAIRS[:10]]
    split = read(long, max_length=30)
    assert split.counts == {"train_items": 10, "held_out_items": 1, "items_cut": 1, "items_dropped": 1}
    assert tokens_of(split)[0] == expected(("p" * 28, False), ("c", True), ("</s>", True))
    chats = [{"messages": turns("a", "b", "c", "d" * 50)}, {"messages": turns("a" * 50, "b")}, *CHATS[:10]]
    split = read(chats, max_length=45)
    assert split.counts["items_dropped"] == 1
    pieces = (("[user]a[end][assistant]", False), ("b[end]", True), ("[user]c[end][ass", False))
    assert tokens_of(split)[0] == expected(*pieces)


def test_the_order_of_keys_and_rows_of_other_columns_change_nothing_but_other_rows_do() -> None:
    same = read([{"id": n} | row for n, row in enumerate(PAIRS)])
    assert same.sha256 == read(PAIRS).sha256 != read(PAIRS[::-1]).sha256
    assert same.sha256 != read(PAIRS, loss_on_prompt=True).sha256


def test_what_is_cached_belongs_to_a_template_a_length_and_a_loss(tmp_path: Path) -> None:
    file, cache = written(CHATS, tmp_path / "chats.jsonl"), tmp_path / "cache"
    first = read(file, cache)
    others = [
        read(file, cache, chatting(PLAIN.replace("[end]", "[e]"))),
        read(file, cache, max_length=60),
        read(file, cache, loss_on_prompt=True),
    ]
    assert len({first.sha256, *(other.sha256 for other in others)}) == 4
    again = read(file, cache, learning_rate=1.0)
    assert again.sha256 == first.sha256
    assert again.train.table.cache_files == first.train.table.cache_files  # nothing is encoded twice


@pytest.mark.parametrize("changed", ["welore", "transformers"])
def test_what_an_older_version_cached_is_encoded_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = written(CHATS, tmp_path / "chats.jsonl"), tmp_path / "cache"
    before = read(file, cache)
    if changed == "welore":
        later = tmp_path / "examples.py"
        later.write_text(Path(examples.__file__).read_text() + "# mended\n")
        monkeypatch.setattr(examples, "__file__", str(later))
    else:
        monkeypatch.setattr(examples.transformers, "__version__", "6.0.0")
    assert read(file, cache).train.table.cache_files != before.train.table.cache_files


# --- held-out parts, the hub -----------------------------------------------------------------------------------------


def test_held_out_is_the_own_validation_part_or_another_data_set(tmp_path: Path) -> None:
    parts = DatasetDict(train=Dataset.from_list(PAIRS[:15]), validation=Dataset.from_list(PAIRS[15:]))
    for dataset, settings in (
        (parts, {}),
        (PAIRS[:15], {"eval_dataset": str(written(PAIRS[15:], tmp_path / "held_out.jsonl"))}),
        (DatasetDict(train=parts["train"], other=parts["validation"]), {"eval_split": "other"}),
    ):
        split = read(dataset, tmp_path / "cache", **settings)
        assert tokens_of(split) == [pair_tokens(n) for n in range(20)]
        assert (len(split.train), split.split) == (15, "the data set's own: 15 items, 5 held out (completion)")
        assert len(read(dataset, tmp_path / "cache", max_eval_samples=2, **settings).evaluation) == 2


@pytest.mark.parametrize("kind", ["streamed", "numpy"])
def test_splits_may_be_streamed_and_tables_have_a_format(kind: str) -> None:
    parts = {"train": Dataset.from_list(CHATS[:12]), "validation": Dataset.from_list(CHATS[12:])}
    formatted = {name: table.with_format("numpy") for name, table in parts.items()}
    streamed = IterableDatasetDict({name: table.to_iterable_dataset() for name, table in parts.items()})
    split = read(streamed if kind == "streamed" else DatasetDict(formatted))
    assert (len(split.train), len(split.evaluation)) == (12, 8)
    assert tokens_of(split) == [chat_tokens(n) for n in range(20)]


def test_a_dict_of_texts_is_read_as_its_split() -> None:
    texts = Dataset.from_list([{"text": "one two three"}] * 4)
    for table in (texts, texts.to_iterable_dataset()):
        kind = DatasetDict if table is texts else IterableDatasetDict
        rows = open_rows(FinetuneConfig(dataset=kind(test=table), dataset_split="test"), 100)
        assert [row["text"] for row in rows] == ["one two three"] * 4
    upper = DatasetDict(test=texts.with_transform(lambda batch: {"text": [*map(str.upper, batch["text"])]}))
    rows = open_rows(FinetuneConfig(dataset=upper, dataset_split="test"), 100)
    assert [row["text"] for row in rows] == ["ONE TWO THREE"] * 4


def test_splits_that_are_not_there_and_other_columns_to_hold_out_are_refused() -> None:
    chats = DatasetDict(train=Dataset.from_list(CHATS))
    with pytest.raises(WeLoreError, match=r"unknown split 'test' \(train\)"):
        read(chats, eval_split="test")
    with pytest.raises(WeLoreError, match=r"unknown split 'train' \(test\)"):
        read(DatasetDict(test=chats["train"]))
    with pytest.raises(WeLoreError, match="held-out rows have the columns prompt, completion: needed are messages"):
        read(chats, eval_dataset=PAIRS)


def test_a_data_set_of_the_hub_is_looked_at_first_and_a_text_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, *, split: str, streaming: bool = False, cache_dir: Any = None) -> Any:
        asked.append((path, name, split, streaming))
        rows = Dataset.from_list([{"text": "a"}] if path == "owner/text" else PAIRS)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name: ["train", "validation"])
    assert len(read("owner/pairs:one").train) == 20
    repository = ("owner/pairs", "one")
    assert asked == [
        (*repository, "train", True),
        (*repository, "train", False),
        (*repository, "validation", False),
    ]
    asked.clear()
    assert len(read("owner/pairs", dataset_split="train[:20]").train) == 18
    assert asked == [("owner/pairs", None, "train", True), ("owner/pairs", None, "train[:20]", False)]
    assert open_rows(FinetuneConfig(dataset="owner/text"), 9) == "owner/text"


def test_no_more_of_a_stream_is_read_than_the_run_needs() -> None:
    read_rows: list[int] = []

    class Endless:
        def __iter__(self) -> Iterator[dict[str, str]]:
            while True:
                read_rows.append(1)
                yield PAIRS[len(read_rows) % 20]

    assert len(read(Endless()).train) == 90
    assert len(read_rows) <= 102


# --- what is refused -------------------------------------------------------------------------------------------------

NO_ANSWER = [{"messages": turns("a", "b")}, {"messages": turns("a")}]
REFUSED: list[tuple[Any, str | None, str]] = [
    ([{"a": "x", "b": "y"}], PLAIN, "has the columns a, b: needed are text, messages, prompt and completion, or"),
    (NO_ANSWER, PLAIN, "record 2: no message has the role assistant"),
    (CHATS, None, "this tokenizer has no chat template"),
    (
        [{"messages": turns("a", "b")}, {"messages": turns("a", " ")}],
        PLAIN,
        "record 2: a message of the assistant has no",
    ),
    ([{"messages": [{"role": "user"}, *turns("a", "b")]}] * 2, PLAIN, "record 1: a message of the user has no content"),
    ([{"prompt": "a", "completion": " "}] * 2, PLAIN, "record 1: the completion is empty"),
    ([{"prompt": "a", "completion": None}] * 2, PLAIN, "record 1: needed are texts, or lists of messages"),
    (CHATS, LAST_ONLY, "record 1: the chat template writes the beginning of a conversation differently"),
    (CHATS, "{{ raise_exception('no such role') }}", "record 1: the chat template refuses .*no such role"),
    (PAIRS[:1], PLAIN, "has 1 training item: two are needed"),
    ([{"prompt": "a", "completion": "b" * 400}] * 3, PLAIN, "has 0 training items.* 3 have answers longer than"),
]


@pytest.mark.parametrize(("rows", "template", "message"), REFUSED)
def test_data_that_cannot_be_learned_are_refused_in_one_sentence(rows: Any, template: str | None, message: str) -> None:
    with pytest.raises(WeLoreError, match=message) as caught:
        read(rows, tokenizer=chatting(template))
    assert "\n" not in str(caught.value)


def test_rows_in_memory_have_no_splits() -> None:
    """The held-out rows would be those of training, in silence."""
    for dataset in (CHATS, datasets.Dataset.from_list(CHATS)):
        for name in ("eval_split", "dataset_split"):
            with pytest.raises(WeLoreError, match="has no splits, but rows: leave split test out"):
                read(dataset, **{name: "test"})
    with pytest.raises(WeLoreError, match="has no splits"):
        read(CHATS, eval_dataset=CHATS, eval_split="train")


def test_a_greeting_is_not_learned_where_a_template_does_not_mark_it() -> None:
    greeted = [{"messages": [{"role": "assistant", "content": "Hi!"}, *row["messages"]]} for row in CHATS]
    hello, _ = expected(("[assistant]Hi![end]", False))
    ids, labels = zip(*(chat_tokens(n) for n in range(20)), strict=True)
    found = tokens_of(read(greeted))
    assert found == [(hello + i, [-100] * len(hello) + t) for i, t in zip(ids, labels, strict=True)]


def test_damaged_files_and_missing_parts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"messages": ')
    with pytest.raises(WeLoreError, match=r"broken.json cannot be read \("):
        read(str(tmp_path / "broken.json"), tmp_path / "cache")
    with pytest.raises(WeLoreError, match="nowhere.json does not exist"):
        read("nowhere.json")
    with pytest.raises(
        WeLoreError, match="the held-out rows have the columns prompt: needed are prompt and completion"
    ):
        read(PAIRS, eval_dataset=[{"prompt": "a"}])
    upper = Dataset.from_list(PAIRS).with_transform(lambda rows: {name: [*map(str.upper, rows[name])] for name in rows})
    with pytest.raises(WeLoreError, match="rows with a transform are read without it: apply it by map"):
        read(upper)
    with pytest.raises(WeLoreError, match="has no held-out rows"):
        read(PAIRS, eval_dataset=Dataset.from_list(PAIRS).select([]))
    with pytest.raises(WeLoreError, match="the data set owner/chats cannot be read .*: connect once, or give a local"):
        read("owner/chats", tmp_path / "cache")


def test_the_command_line_says_it_in_one_sentence_and_names_what_was_cut(
    command: Command, model: Path, tmp_path: Path
) -> None:
    quick = ("--max-steps", 2, "--batch-size", 1, "--max-eval-samples", 2, "--device", "cpu", "--cache-dir", tmp_path)
    chats = written(NO_ANSWER, tmp_path / "no.jsonl")
    answer = command("finetune", model, tmp_path / "no", "--dataset", chats, "--max-length", 90, *quick)
    assert (answer.status, (tmp_path / "no").exists()) == (2, False)
    assert answer.err.strip().splitlines()[-1].endswith("no message has the role assistant, there is nothing to learn")
    long = [*CHATS, {"messages": turns("a", "b" * 99)}, {"messages": turns("a" * 99, "b")}]
    arguments = (
        "--dataset",
        written(long, tmp_path / "a.jsonl"),
        "--eval-dataset",
        written(CHATS, tmp_path / "b.jsonl"),
    )
    answer = command("finetune", model, tmp_path / "run", *arguments, "--max-length", 90, *quick)
    assert (answer.status, "held-out perplexity" in answer.out) == (0, True)
    assert "1 items were longer than 90 tokens" in answer.err
    assert "1 without an answer left were dropped" in answer.err
    numbers = welore.Record.load(tmp_path / "run" / "finetune.json").numbers
    assert (numbers["train_items"], numbers["held_out_items"]) == (21, 2)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_on_conversations_that_stops_goes_on_to_the_same_losses_and_weights(model: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise InterruptedError

    settings = SHORT | {"save_steps": 2, "dataset": str(written(CHATS, tmp_path / "a.jsonl")), "cache_dir": tmp_path}
    once = finetuned(model, tmp_path / "once", **settings).numbers
    with pytest.raises(InterruptedError):
        finetuned(model, tmp_path / "twice", callbacks=[Stop()], **settings)
    twice = finetuned(model, tmp_path / "twice", resume=True, **settings).numbers
    assert twice["resumed_at"] == 2
    assert twice["train_loss"] == once["train_loss"]
    assert twice["evaluation"] == once["evaluation"]
    order = reading_order(18, 8, seed=0)
    assert twice["tokens"] == once["tokens"] == sum(len(chat_tokens(n)[0]) for n in order)


def test_a_run_on_other_rows_says_so_and_not_that_its_steps_differ(model: Path, tmp_path: Path) -> None:
    passes = SHORT | {"max_steps": None, "warmup_steps": None, "num_train_epochs": 1}
    finetuned(model, tmp_path / "run", dataset=CHATS, **passes)
    (tmp_path / "run/finetune.json").unlink()
    with pytest.raises(WeLoreError, match="its data_sha256 is"):
        finetuned(model, tmp_path / "run", dataset=CHATS[:-4], resume=True, **passes)


@pytest.mark.parametrize(("passes", "steps"), [(0.5, 5), (2, 18), (None, 27)])
def test_passes_over_rows_set_the_steps_and_the_last_of_them_is_evaluated(
    passes: float | None, steps: int, model: Path, tmp_path: Path
) -> None:
    settings = SHORT | {"max_steps": None, "warmup_steps": None, "num_train_epochs": passes, "eval_steps": 500}
    record = finetuned(model, tmp_path / "run", dataset=iter(CHATS), **settings)
    assert (record.settings["max_steps"], record.settings["warmup_steps"]) == (steps, steps // 20)
    assert record.numbers["epochs"] == steps * 2 / 18
    assert [step for step, _ in record.numbers["train_loss"]] == list(range(1, steps + 1))
    assert [step for step, *_ in record.numbers["evaluation"]] == [0, steps]
    assert record.numbers["eval_loss"] == record.numbers["evaluation"][-1][1] != record.numbers["evaluation"][0][1]
    assert record.numbers["tokens"] == sum(len(chat_tokens(n)[0]) for n in reading_order(18, steps * 2, seed=0))


def test_the_perplexity_of_the_record_is_that_of_the_result(model: Path, tmp_path: Path) -> None:
    """Where a callback stops the run, and where the best model is not the last one."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == 3

    stopped = finetuned(model, tmp_path / "stopped", dataset=CHATS, callbacks=[Stop()], **SHORT | {"eval_steps": 500})
    assert [step for step, *_ in stopped.numbers["evaluation"]] == [0, 3]
    assert stopped.numbers["epochs"] == 3 * 2 / 18
    held_out = {"eval_dataset": [{"messages": turns("~~~~~", "@@@@@")}] * 4}
    often = SHORT | held_out | {"max_steps": 12, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.05}
    best = finetuned(
        model, tmp_path / "best", dataset=CHATS, training_arguments={"load_best_model_at_end": True}, **often
    )
    losses = [loss for _, loss, _ in best.numbers["evaluation"]]
    assert best.numbers["eval_loss"] == losses[-1] == pytest.approx(min(losses[1:-1])) != losses[-2]
    again = finetuned(tmp_path / "best/model", tmp_path / "again", dataset=CHATS, **SHORT | held_out)
    assert again.numbers["evaluation"][0][1] == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({}, None, 10_000),
        ({}, 18, 4),  # 54 sequences by 16
        ({}, 1_000_000, 10_000),
        ({"num_train_epochs": 1}, 1_000_000, 62_500),
        ({"num_train_epochs": 1, "max_steps": -1}, 160, 10),  # as a TRL file says it
        ({"max_steps": 7}, 18, 7),
        ({"task": "svamp"}, None, 1_000),
        ({"task": "svamp", "num_train_epochs": 3}, 700, 132),  # 2,100 by 16
    ],
)
def test_steps_follow_from_the_rows(settings: dict[str, Any], rows: int | None, steps: int) -> None:
    config = FinetuneConfig(batch_size=2, gradient_accumulation_steps=4, **settings)
    assert resolve_steps(config, rows, processes=2).max_steps == steps


def test_groups_decay_dense_matrices_alone(model: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(model)
    marked = welore.mark_trainable(net, "lrc", train_norms=True)
    (only,) = welore.optimizer_groups(net, weight_decay=0.1)
    assert only["weight_decay"] == 0
    assert {id(p) for p in only["params"]} == {id(p) for p in marked.parameters}
    marked = welore.mark_trainable(net, "nlrc", train_norms=True)
    decayed, others = welore.optimizer_groups(net, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(marked.parameters)


@pytest.mark.parametrize(("method", "decays"), [("lrc", False), ("nlrc", True)])
def test_a_run_decays_dense_matrices_alone(model: Path, tmp_path: Path, method: str, decays: bool) -> None:
    for name, weight_decay in (("without", 0.0), ("with", 0.5)):
        settings = SHORT | {"dataset": PAIRS, "weight_decay": weight_decay}
        finetuned(model, tmp_path / name, method, **settings)
    before, after = (weights(tmp_path / name / "model") for name in ("without", "with"))
    assert any(not torch.equal(before[name], after[name]) for name in before) == decays


def test_accelerate_trains_what_is_marked(model: Path) -> None:
    from accelerate import Accelerator

    net = AutoModelForCausalLM.from_pretrained(model)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    welore.mark_trainable(net, "lrc")
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, torch.optim.AdamW(welore.optimizer_groups(net), lr=1e-2))
    ids = torch.tensor([chat_tokens(0)[0]])
    accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
    optimizer.step()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith((".A.weight", ".B.weight"))} != set()


def sft_arguments(out: Path, **more: Any) -> dict[str, Any]:
    """A run of `finetune` in the words of TRL."""
    return {
        **{"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3},
        **{"warmup_steps": 1, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        **{"max_length": 200, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1},
        **{"gradient_checkpointing": False, "train_sampling_strategy": "sequential", "optim": "adamw_torch_fused"},
        **more,
    }


@needs_trl
@pytest.mark.filterwarnings("ignore")  # of trl
@pytest.mark.parametrize("shape", ["messages", "pairs", "pairs of messages"])
def test_trl_learns_the_same_tokens_and_its_trainer_gives_the_same_weights(
    model: Path, shape: str, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    of_messages = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in CHATS]
    rows: list[Any] = {"messages": CHATS, "pairs": PAIRS, "pairs of messages": of_messages}[shape]
    ours = read(rows, tokenizer=chatting(MARKED))
    order = reading_order(18, 8, seed=0)
    net = AutoModelForCausalLM.from_pretrained(model)
    welore.mark_trainable(net, "lrc")
    arguments = SFTConfig(**sft_arguments(tmp_path / "sft", assistant_only_loss=shape == "messages"))
    table = Dataset.from_list([rows[n] for n in order])
    trainer: Any = SFTTrainer(net, arguments, train_dataset=table, processing_class=chatting(MARKED))
    theirs = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert theirs == [tokens_of(ours)[n] for n in order]
    trainer.train()
    record = finetuned(model, tmp_path / "run", dataset=rows, **SHORT)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for _, loss in record.numbers["train_loss"]] == pytest.approx(losses, rel=1e-4)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")  # of trl
@pytest.mark.parametrize("number", range(6))
def test_scripts_of_the_page_run(number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "fine-tune-on-your-data.md"
    scripts = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(scripts) == 6
    if "import trl" in scripts[number] or "from trl" in scripts[number]:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, "small")
    written(CHATS[:4], Path("chats.jsonl"))
    written([{"text": "one two three"}] * 4, Path("texts.jsonl"))
    turn = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
    written([{"id": n, "conversations": turn} for n in range(4)], Path("sharegpt.jsonl"))
    short = scripts[number].replace("num_train_epochs=3", "max_steps=2, max_length=200")
    short = short.replace('SFTConfig("out"', 'SFTConfig("out", use_cpu=True, bf16=False')  # no GPU here
    if "get_training_chat_template" in short:
        from trl.chat_template_utils import qwen3_chat_template

        chatting(qwen3_chat_template).save_pretrained("small")
    exec(compile(short, str(page), "exec"), {})
    if "get_training_chat_template" in short:
        tokenizer = PreTrainedTokenizerFast.from_pretrained("small")
        with pytest.raises(WeLoreError, match="with {% generation %} marks"):
            read(CHATS, None, chatting(qwen3_chat_template))
        ids, labels = tokens_of(read(CHATS, None, tokenizer))[0]
        learned = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])
        assert re.findall(r"</think>\n\n(.*?)<\|im_end\|>", learned) == ["y", "0 is 0."]
    elif "sharegpt" in short:
        split = read("chats.jsonl", tmp_path / "chats")
        assert tokens_of(split) == [expected(("[user]Hi[end][assistant]", False), ("Ho[end]", True))] * 4
    elif "welore.finetune" not in short:
        before, after = weights(model), weights(Path("tuned"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.endswith((".A.weight", ".B.weight"))} != set()


@needs_trl
@pytest.mark.filterwarnings("ignore")  # of trl
def test_dpo_trains_what_is_marked(model: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    net = AutoModelForCausalLM.from_pretrained(model)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    welore.mark_trainable(net, "lrc")
    rows = Dataset.from_dict({"prompt": ["1 and"] * 4, "chosen": [" 1 is 2"] * 4, "rejected": [" 1 is 3"] * 4})
    arguments = sft_arguments(tmp_path / "dpo", max_steps=2)
    DPOTrainer(net, args=DPOConfig(**arguments), train_dataset=rows, processing_class=chatting()).train()
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith((".A.weight", ".B.weight"))} != set()


def test_of_another_data_set_to_hold_out_the_validation_part_is_taken() -> None:
    other = DatasetDict(train=Dataset.from_list(PAIRS), validation=Dataset.from_list(PAIRS[:3]))
    assert len(read(PAIRS, eval_dataset=other).evaluation) == 3
    assert len(read(PAIRS, eval_dataset=other, eval_split="train").evaluation) == 20
