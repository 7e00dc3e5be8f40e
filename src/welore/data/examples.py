"""Rows of prompts and answers -> examples with the loss on the answers. Formats and names are those of TRL."""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from welore.config import FinetuneConfig
from welore.data.packing import HELD_OUT, IGNORED, DatasetSplit, Example, PackedRows
from welore.data.rows import AT_ONCE, Rows
from welore.data.windows import opening_tokens
from welore.errors import WeLoreError, first_line
from welore.io.fields import parse_json
from welore.io.text_file import well_formed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")  # marks the assistant's words in a chat template

# The prompt of Stanford Alpaca (Taori et al., 2023), without and with an input.
ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
ASK, RENDERED = {"add_generation_prompt": True}, {"add_special_tokens": False}
ALPACA_INPUT = (", paired with an input that provides further context", "### Input:\n{0}\n\n")


class Examples(Sequence[Example]):
    """Encoded rows as examples. table: a datasets.Dataset of lists input_ids and labels, which stays where it lies."""

    def __init__(self, table: Any) -> None:
        self.table = table.with_format("torch")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self.table.select(range(*index.indices(len(self)))))
        return self.table[index]

    @property
    def lengths(self) -> Tensor:
        """Tokens of every example, (count,)."""
        return torch.cat([torch.tensor(ids.value_lengths().to_numpy()) for ids, _ in self.lists()])

    @property
    def extremes(self) -> Tensor:
        """The smallest and the largest tokens of a thousand examples each."""
        return torch.tensor([end(ids.flatten().to_numpy()) for ids, _ in self.lists() for end in (np.min, np.max)])

    def lists(self) -> Iterator[tuple[Any, Any]]:
        """Tokens and labels of a thousand examples at a time, as lists of pyarrow."""
        for rows in self.table.with_format("arrow").iter(AT_ONCE):
            yield rows["input_ids"].combine_chunks(), rows["labels"].combine_chunks()


def examples_of_rows(rows: Rows, tokenizer: "PreTrainedTokenizerBase", config: FinetuneConfig) -> DatasetSplit:
    """Rows as examples of at most max_length tokens; what is held out is a part of its own or the last tenth.

    Loss on completions, outputs and the assistant's turns only, unless loss_on_prompt; an end token follows a text.
    In a row that is too long a prompt loses its beginning, a conversation its end; a row that has no answer left is
    dropped. Both are counted. With packing, several rows to train on are one example of at most max_length tokens.
    """
    most, length = config.max_eval_samples, config.max_length or 0
    encoder = Encoder(rows.name, rows.shape, tokenizer, length, config.loss_on_prompt)
    train, cut = _encoded(rows.train, encoder)
    dropped = len(rows.train) - len(train)
    if rows.held_out is not None:
        part = rows.held_out.select(range(min(most, len(rows.held_out))))
        held_out, more = _encoded(part, replace(encoder, name="the held-out rows"))
        cut, dropped = cut + more, dropped + len(part) - len(held_out)
        split = f"the data set's own: {len(train)} items, {len(held_out)} held out"
    else:
        last = max(1, len(train) // HELD_OUT)
        split = f"the last {last} of {len(train)} training items are held out"
        train, held_out = train[:-last], train[-last:]
    count = len(train) + len(held_out)
    if not len(train) or not len(held_out):
        raise WeLoreError(
            f"{rows.name} has {count} training item{'s' * (count != 1)}: two are needed, one of them to evaluate on; "
            f"{dropped} have answers longer than max_length, {length} tokens"
        )
    learned = {*next(train.lists())[1].flatten().to_numpy().tolist()} - {IGNORED}
    # A token that ends an answer is special: also without a name, as <|eot_id|> in base models; not BOS or unknown.
    learned -= {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    if all(tokenizer.decode([i]) == tokenizer.decode([i], skip_special_tokens=True) for i in learned):
        LOG.warning("%s: no answer has a special token that ends it: the model learns no end of its turns", rows.name)
    sha = hashlib.sha256()
    for ids, labels in chain(train.lists(), held_out.lists()):
        for numbers in (ids.value_lengths(), ids.flatten(), labels.flatten()):
            sha.update(numbers.to_numpy().tobytes())
    counts = {"train_items": len(train), "held_out_items": len(held_out), "items_cut": cut, "items_dropped": dropped}
    packed = PackedRows(train, length) if config.packing else train
    counts |= {"packed_sequences": len(packed)} if config.packing else {}
    return DatasetSplit(packed, held_out[:most], f"{split} ({rows.shape})", counts, sha.hexdigest())


def _encoded(table: Any, encoder: "Encoder") -> tuple[Examples, int]:
    """The rows as examples, and how many of them were cut."""
    from datasets import Features, List, Value

    features = Features(input_ids=List(Value("int32")), labels=List(Value("int32")), cut=Value("bool"))
    columns = table.column_names
    encoded = table.map(encoder, with_indices=True, batched=True, remove_columns=columns, features=features)
    return Examples(encoded.remove_columns("cut")), sum(encoded["cut"])


@dataclass(frozen=True)
class Encoder:
    """Turns rows of a shape into token ids and labels; `name` of the data set is for messages.

    datasets caches the result under a hash of all fields: nothing large, and nothing that does not change it. Of a
    class it knows the name alone: `code` is what makes the tokens, in this file and in transformers.
    """

    name: str
    shape: str
    tokenizer: Any
    length: int
    loss_on_prompt: bool
    code: str = field(default_factory=lambda: transformers.__version__ + Path(__file__).read_text(encoding="utf-8"))

    def __call__(self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Columns input_ids, labels and cut of a batch of rows, for datasets.Dataset.map."""
        encode = self._conversation if self.shape == "messages" else self._pair
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "cut": []}
        for number, values in zip(numbers, zip(*rows.values(), strict=True), strict=True):
            row = _without_nulls(dict(zip(rows, values, strict=True)))
            ids, learned = encode(row, f"{self.name}, record {number + 1}")
            short, taught = self._cut(ids, learned), self._cut(learned, learned)
            if any(taught):
                labels = [i if t or self.loss_on_prompt else IGNORED for i, t in zip(short, taught, strict=True)]
                for name, value in zip(columns, (short, labels, len(short) < len(ids)), strict=True):
                    columns[name].append(value)
        return columns

    def _cut(self, values: list[int], learned: list[int]) -> list[int]:
        """At most `length` values of a row's tokens, none of a pair whose answer alone is as long.

        A conversation keeps its beginning; a pair keeps its end, and the tokens with which every text opens.
        """
        if len(values) <= self.length or self.shape == "messages":
            return values[: self.length]
        first = len(opening_tokens(self.tokenizer))
        return values[:first] + values[first - self.length :] if sum(learned) + first < self.length else []

    def _pair(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Tokens of prompt, completion and end, and 1 from where those with and without the completion part."""
        prompt, completion = row.get("prompt"), row.get("completion")
        if self.shape == "instruction" and "instruction" in row:
            more, form = ALPACA_INPUT if row.get("input") else ("", "")
            prompt = ALPACA.format(more, row["instruction"], form.format(row.get("input")))
            completion = row.get("output")
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise WeLoreError(f"{where}: the completion is empty, there is nothing to learn")
            before, ids = self._ids(prompt), self._ids(prompt + completion)
            end = self.tokenizer.eos_token_id
            ids = ids if end is None or ids[-1:] == [end] else [*ids, end]
        else:
            asked, answer = self._messages(prompt, where), self._messages(completion, where)
            begin, text = self._render(asked, row, where, **ASK), self._render([*asked, *answer], row, where)
            before, ids = (self._ids(part, **RENDERED) for part in (begin, text))
        same = _common(before, ids)
        if same == len(ids):
            raise WeLoreError(f"{where}: the tokenizer gives no tokens for the completion")
        return ids, [0] * same + [1] * (len(ids) - same)

    def _conversation(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Tokens of a conversation, and 1 for those that the assistant has to write.

        A template with generation marks says which. Without them a turn begins where `add_generation_prompt` ends.
        """
        messages = self._messages(row.get("messages"), where)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise WeLoreError(f"{where}: no message has the role assistant, there is nothing to learn")
        text = self._render(messages, row, where)
        if GENERATION.search(str(self.tokenizer.chat_template)):
            marked = self._render(messages, row, where, tokenize=True, return_assistant_tokens_mask=True)
            return marked["input_ids"], marked["assistant_masks"]
        ids, eos = self._ids(text, **RENDERED), str(self.tokenizer.eos_token)
        taught = [0] * len(ids)
        for at in filter(None, turns):  # a template that cannot be asked for a greeting leaves it unlearned
            begin = self._render(messages[:at], row, where, **ASK)
            end = self._render(messages[: at + 1], row, where)
            if not text.startswith(end) and self._render(messages[:at], row, where).endswith(eos):
                end = end.removesuffix(eos)  # that of Phi-3 stands behind every conversation, whoever speaks last
            if not (text.startswith(end) and end.startswith(begin)):
                raise WeLoreError(
                    f"{where}: the chat template writes the beginning of a conversation differently when it goes on, "
                    "so the assistant's turns cannot be told: use a template with {% generation %} marks"
                )
            first, last = (_common(self._ids(part, **RENDERED), ids) for part in (begin, end))
            taught[first:last] = [1] * (last - first)
        return ids, taught

    def _messages(self, value: Any, where: str) -> list[dict[str, Any]]:
        """Messages whose contents are texts, or lists of parts that are texts: the kind that the template reads."""
        if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) and m.get("role") for m in value):
            raise WeLoreError(f"{where}: needed are texts, or lists of messages, each with a role and a content")
        messages, reads = [dict(message) for message in value], (self._reads("probe"), self._reads(_parts("probe")))
        for message in messages:
            content, role = message.get("content"), message["role"]
            if not message.get("tool_calls") and (
                content is None or (role == "assistant" and not str(content).strip())
            ):
                raise WeLoreError(f"{where}: a message of the {role} has no content")
            if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
                texts = [part.get("text") for part in content]
                if not all(isinstance(text, str) for text in texts):
                    raise WeLoreError(f"{where}: a message has parts that are no text, which cannot be learned here")
                message["content"] = content if reads[1] else "".join(texts)
            elif isinstance(content, str) and reads == (False, True):
                message["content"] = _parts(content)
        return messages

    def _reads(self, content: Any) -> bool:
        """Whether the chat template writes the text "probe" of such a content, and not a list as it is."""
        try:
            text = str(self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        except Exception:  # a template is a program that comes with a model
            return False
        return "probe" in text and str(_parts("probe")) not in text

    def _ids(self, text: str, **how: Any) -> list[int]:
        ids: list[int] = self.tokenizer(well_formed(text), verbose=False, **how).input_ids
        return ids

    def _render(self, messages: Sequence[Any], row: Mapping[str, Any], where: str, **how: Any) -> Any:
        """The text that the chat template makes of messages, with its special tokens."""
        if not self.tokenizer.chat_template:
            raise WeLoreError(
                f"{self.name} holds conversations, and this tokenizer has no chat template: give prompts and "
                "completions that are texts, or set tokenizer.chat_template"
            )
        tools, more = row.get("tools") or None, row.get("chat_template_kwargs") or {}
        try:
            tools = parse_json(tools) if isinstance(tools, str) else tools
            return self.tokenizer.apply_chat_template(messages, **{"tools": tools} | more | {"tokenize": False} | how)
        except Exception as error:  # a template is a program that comes with a model
            raise WeLoreError(f"{where}: the chat template refuses the conversation: {first_line(error)}") from error


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _without_nulls(value: Any) -> Any:
    """A row without its empty fields at any depth: Arrow gives every tool call the arguments of all others."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
