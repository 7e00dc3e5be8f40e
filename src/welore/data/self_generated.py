"""Text that the model itself writes: calibration without data.

Windows are filled by sampling, many at once, with a cache of keys and values. A text begins with an opening (OPENINGS)
and ends with the model's end token; then the next one begins in the same window, as in packed training. Why not by
`generate`: docs/concepts/statistics.md.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.config import MAX_LENGTH, CalibrationConfig, require_at_least
from welore.data.decoding import GroupedAttention, reserve
from welore.data.windows import opening_tokens, require_known_tokens
from welore.errors import WeLoreError, choose, first_line
from welore.io.context import finest_dtype
from welore.io.memory import free_memory
from welore.io.parallel import ALONE, Processes
from welore.io.progress import Progress, counted, silent
from welore.io.resume import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = "written.{}"  # in the workspace: the finished windows of a batch, by the number of the first
LAST = math.nextafter(1, 0)  # the largest number below 1
MARK = "\N{SNOWMAN}"  # stands for the user's words while a chat template is taken apart
USABLE = 0.8  # share of the free memory that windows may take; the rest is for what other parts of the job hold
PIECE = 1 << 21  # probabilities in float64 at once: a larger piece of memory is fetched anew from the system every time


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    config: CalibrationConfig = CalibrationConfig(),
    *,
    batch_size: int | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
    workspace: Workspace | None = None,
) -> Tensor:
    """Windows (ceil(num_tokens / max_length), max_length) of token ids that the model wrote, on the CPU.

    config: size, seed, opening and sampling; temperature 1, top_k 0 and top_p 1 leave the model's distribution as it
    is. batch_size: windows written at once, None: all that the free memory holds; the random numbers of a window do
    not depend on it. processes: each writes its share, and all get every window. workspace: keeps finished batches.
    """
    require_at_least(1, batch_size=batch_size)
    texts = Texts.of(model, tokenizer, config)
    uniform = uniform_numbers(config).to(finest_dtype(model.device))
    count, length = uniform.shape
    mine = range(count)[processes.rank :: processes.size]
    size = batch_size or windows_at_once(model.config, model.dtype, free_memory(model.device), length, len(mine))
    written = _Written(workspace, mine, size)
    training = model.training
    model.eval()
    try:
        batch: _Batch | None = None
        steps = [(rows, position) for rows in written.missing() for position in range(length)]
        for rows, position in counted(progress, steps, "the model writes"):
            if position == 0:
                batch = _Batch(model, texts, uniform[rows], _warpers(config))
            assert batch is not None
            batch.step()
            if position == length - 1:
                written.add(rows, batch.text)
    finally:
        model.train(training)
    everyones = processes.gather(written.windows())
    windows = torch.empty((count, length), dtype=torch.long)
    for rank, theirs in enumerate(everyones):
        windows[rank :: processes.size] = theirs
    return windows


def uniform_numbers(config: CalibrationConfig) -> Tensor:
    """Numbers (windows, length) in [0, 1) that choose the tokens, float64; no window depends on its batch."""
    length = config.max_length or MAX_LENGTH
    shape = -(-config.tokens // length), length
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))


def window_bytes(config: Any, length: int, itemsize: int) -> int:
    """Memory of a window of `length` tokens while a model writes it: its keys and values, and what a step makes.

    2 x layers x width of the keys x length numbers of `itemsize` bytes; the logits, once more in float32. config: of
    transformers; a model that caches less (states of fixed size, short windows) takes less.
    """
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    return 2 * config.num_hidden_layers * keys * length * itemsize + config.vocab_size * (itemsize + 4)


def windows_at_once(config: Any, dtype: torch.dtype, free: int | None, length: int, windows: int) -> int:
    """As many windows as `free` bytes of memory hold, in batches of about equal size; at least one."""
    if free is None:
        return windows
    fit = int(USABLE * free) // window_bytes(config, length, dtype.itemsize)
    batches = -(-windows // max(fit, 1))
    return -(-windows // max(batches, 1))


class _Written:
    """The windows that this process has written, in batches; a workspace keeps those of a run that is killed."""

    def __init__(self, workspace: Workspace | None, mine: range, size: int) -> None:
        self.workspace, self.mine, self.done = workspace, mine, dict[int, Tensor]()
        begun = self._fetch(mine[0]) if len(mine) else None
        # In half precision the last bits of a window, and then a word, can depend on the size of its batch.
        self.size = size if begun is None else len(begun)

    def missing(self) -> list[range]:
        """The batches that are still to be written, each the numbers of its windows."""
        batches = [self.mine[start : start + self.size] for start in range(0, len(self.mine), self.size)]
        stored = {rows: self._fetch(rows[0]) for rows in batches}
        self.done = {rows[0]: windows for rows, windows in stored.items() if windows is not None}
        return [rows for rows, windows in stored.items() if windows is None]

    def add(self, rows: range, windows: Tensor) -> None:
        """Keep the finished windows of a batch; the only one is stored by the caller."""
        self.done[rows[0]] = windows
        if self.workspace is not None and len(rows) < len(self.mine):
            self.workspace.store(BATCH.format(rows[0]), {"windows": windows.int()})

    def windows(self) -> Tensor:
        """All windows (count, length)."""
        return torch.cat([self.done[first] for first in sorted(self.done)] or [torch.empty((0, 1), dtype=torch.long)])

    def _fetch(self, first: int) -> Tensor | None:
        stored = None if self.workspace is None else self.workspace.fetch(BATCH.format(first))
        return None if stored is None else stored["windows"].long()


# --- openings --------------------------------------------------------------------------------------------------------

Begin = Callable[[float], list[int]]  # a number in [0, 1) -> the first tokens of a text


def _any_token(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """Any token of the vocabulary that is no special one, each as likely."""
    opening, ordinary = opening_tokens(tokenizer), _ordinary(tokenizer)
    return lambda number: [*opening, ordinary[int(number * len(ordinary))]]


def _any_word(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """Any token that begins with a letter, at the start of a word where the vocabulary tells, each as likely."""
    pieces = {t: str(tokenizer.convert_ids_to_tokens(t)) for t in _ordinary(tokenizer)}
    marked = {t: p for t, p in pieces.items() if p and p[0] in "\u0120\u2581"}  # bytes with a space; sentencepiece
    words = [t for t, p in (marked or pieces).items() if p and p.lstrip("\u0120\u2581")[:1].isalpha()]
    if not words:
        raise WeLoreError("the vocabulary has no token that begins with a letter: take first='vocabulary'")
    opening = opening_tokens(tokenizer)
    return lambda number: [*opening, words[int(number * len(words))]]


def _from_nothing(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """The opening token of the tokenizer, or the end token, as if another text had ended: the model goes on."""
    opening = opening_tokens(tokenizer) or [token for token in [tokenizer.eos_token_id] if token is not None]
    if not opening:
        raise WeLoreError("this tokenizer has neither a first nor an end token: take first='vocabulary'")
    return lambda number: opening


def _chat(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """The chat template up to the user's words: the model writes both question and answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise WeLoreError("this tokenizer has no chat template: take another beginning than 'chat'")
    try:
        chat = str(tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False))
    except Exception as error:  # a template is a program that comes with a model
        raise WeLoreError(f"the chat template of this tokenizer cannot be used: {first_line(error)}") from error
    ids: list[int] = tokenizer(chat.partition(MARK)[0], add_special_tokens=False).input_ids
    if not ids or MARK not in chat:
        raise WeLoreError("the chat template has nothing before the user's words: take another beginning than 'chat'")
    return lambda number: ids


# The first tokens of a text; the tokenizer's own opening token (Llama's <s>, Gemma's <bos>) always comes first.
OPENINGS: dict[str, Callable[["PreTrainedTokenizerBase"], Begin]] = {
    "vocabulary": _any_token,
    "word": _any_word,
    "nothing": _from_nothing,
    "chat": _chat,
}


def _ordinary(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of the vocabulary that are no special ones."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return [token for token in range(len(tokenizer)) if token not in special]


def configured_ends(model: "PreTrainedModel") -> list[int]:
    """The tokens that end a text (or a turn of a chat) by the model's generation_config."""
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [] if configured is None else [configured]
    if not all(isinstance(token, int) for token in several):
        raise WeLoreError(f"generation_config.json: eos_token_id is {configured!r}, it must be the number of a token")
    return list(several)


@dataclass(frozen=True)
class Texts:
    """Where texts begin and end in the windows of a model.

    ends: tokens that end a turn; a text ends with the `turns`-th of them. size: of the vocabulary; rows of the output
    layer beyond it, which many models have as padding, stand for no token and are never drawn.
    """

    begin: Begin
    ends: frozenset[int]
    turns: int
    size: int

    @classmethod
    def of(cls, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: CalibrationConfig) -> "Texts":
        """The texts that a model writes by the settings; WeLoreError for a tokenizer that is another model's."""
        begin = choose("beginning", config.first, OPENINGS)(tokenizer)
        require_known_tokens(model, torch.tensor(begin(0.0)), torch.tensor(begin(LAST)))
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = frozenset([*configured_ends(model), *own])
        return cls(begin, ends, 2 if config.first == "chat" else 1, max(tokenizer.get_vocab().values()) + 1)


class _Batch:
    """Windows that are written together, token by token: `text` (b, length) after as many steps.

    uniform: (b, length) numbers in [0, 1) that choose the tokens.
    """

    def __init__(
        self, model: "PreTrainedModel", texts: Texts, uniform: Tensor, warp: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.texts, self.uniform, self.warp = model, texts, uniform, warp
        self.caches = "past_key_values" in inspect.signature(model.forward).parameters
        self.cache: Any = None
        self.text = torch.empty((len(uniform), 0), dtype=torch.long)
        self.pending = [texts.begin(number) for number in uniform[:, 0].tolist()]  # the rest of an opening
        self.ended = [0] * len(uniform)

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every window."""
        numbers = self.uniform[:, self.text.shape[1]]
        chosen = self._drawn(numbers) if self.text.shape[1] else [0] * len(numbers)
        for row, number in enumerate(numbers.tolist()):
            if not self.pending[row] and self.ended[row] == self.texts.turns:
                self.pending[row], self.ended[row] = self.texts.begin(number), 0
            if self.pending[row]:
                chosen[row], *self.pending[row] = self.pending[row]
            elif chosen[row] in self.texts.ends:
                self.ended[row] += 1
        self.text = torch.cat([self.text, torch.tensor(chosen)[:, None]], 1)

    def _drawn(self, numbers: Tensor) -> list[int]:
        """A token for every window from the model's distribution; WeLoreError where that is none."""
        logits = self._logits()[:, : self.texts.size]
        rows = max(1, PIECE // logits.shape[1])
        pieces = zip(logits.split(rows), numbers[:, None].to(logits.device).split(rows), strict=True)
        tokens: list[int] = torch.cat([self._draw(*piece) for piece in pieces]).tolist()  # the only wait for a GPU
        if -1 in tokens:
            raise WeLoreError("the model computes NaN or Inf: look for damaged weights")
        return tokens

    def _draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        cumulated = self.warp(logits.float()).softmax(-1).cumsum(-1, dtype=numbers.dtype)
        tokens = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
        tokens = tokens.squeeze(1).clamp_(max=cumulated.shape[-1] - 1)
        return tokens.where(cumulated[:, -1].isfinite(), -1)

    def _logits(self) -> Tensor:
        """The logits (b, vocabulary) of the next token."""
        device = self.model.device
        if self.caches:
            last = self.text[:, -1:].to(device)
            with GroupedAttention() if device.type == "cpu" else nullcontext():
                out = self.model(last, past_key_values=self.cache, use_cache=True)
            self.cache = (
                out.get("past_key_values") if self.cache else reserve(out.get("past_key_values"), self.uniform.shape[1])
            )
            self.caches = self.cache is not None
        else:
            out = self.model(self.text.to(device), use_cache=False)
        logits: Tensor = out.logits[:, -1]
        return logits


def _warpers(config: CalibrationConfig) -> Callable[[Tensor], Tensor]:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rules: Any = LogitsProcessorList()
    if config.temperature != 1.0:
        rules.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k:
        rules.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        rules.append(TopPLogitsWarper(config.top_p))
    return lambda scores: rules(None, scores)
