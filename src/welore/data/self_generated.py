"""Text that the model itself writes: calibration without data.

Windows are filled by sampling, many at once, with a cache of keys and values. A text begins with an opening (OPENINGS)
and ends with the model's end token; then the next one begins in the same window, as in packed training. Why not by
`generate`: docs/concepts/statistics.md.
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.config import MAX_LENGTH, CalibrationConfig, require_at_least
from welore.data.windows import opening_tokens, require_known_tokens
from welore.errors import WeLoreError, choose, first_line
from welore.io.context import finest_dtype
from welore.io.progress import Progress, counted, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAST = math.nextafter(1, 0)  # the largest number below 1
MARK = "\N{SNOWMAN}"  # stands for the user's words while a chat template is taken apart


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    config: CalibrationConfig = CalibrationConfig(),
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Tensor:
    """Windows (ceil(num_tokens / max_length), max_length) of token ids that the model wrote, on the CPU.

    config: size, seed, opening and sampling; temperature 1, top_k 0 and top_p 1 leave the model's distribution as it
    is. batch_size: windows written at once; the random numbers of a window do not depend on it.
    """
    require_at_least(1, batch_size=batch_size)
    length = config.max_length or MAX_LENGTH
    begin = choose("beginning", config.first, OPENINGS)(tokenizer)
    require_known_tokens(model, torch.tensor(begin(0.0)), torch.tensor(begin(LAST)))
    windows = -(-config.num_tokens // length)
    # One row of numbers per window: a window does not depend on its batch.
    uniform = torch.rand((windows, length), dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))
    uniform = uniform.to(finest_dtype(model.device))
    steps = [(start, position) for start in range(0, windows, batch_size) for position in range(length)]
    written = torch.empty((windows, length), dtype=torch.long)
    warp = _warpers(config)
    ends = {*configured_ends(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    size = max(tokenizer.get_vocab().values()) + 1
    batch: _Batch | None = None
    training = model.training
    model.eval()
    try:
        for start, position in counted(progress, steps, "the model writes"):
            if position == 0:
                batch = _Batch(model, begin, ends, 2 if config.first == "chat" else 1, size)
            assert batch is not None
            numbers = uniform[start : start + batch_size, position]
            written[start : start + batch_size, position] = batch.next_tokens(numbers, warp)
    finally:
        model.train(training)
    return written


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


class _Batch:
    """Windows that are written together, token by token.

    ends: tokens that end a turn; a text ends with the `turns`-th of them. size: of the vocabulary; rows of the output
    layer beyond it, which many models have as padding, stand for no token and are never drawn.
    """

    def __init__(self, model: "PreTrainedModel", begin: Begin, ends: set[int], turns: int, size: int) -> None:
        self.model, self.begin, self.ends, self.turns, self.size = model, begin, ends, turns, size
        self.caches = "past_key_values" in inspect.signature(model.forward).parameters
        self.cache: Any = None
        self.text = torch.empty((0, 0), dtype=torch.long)  # of a model without such a cache, which reads all of it
        self.last: Tensor | None = None
        self.pending: list[list[int]] = []  # the rest of an opening, of every window
        self.ended: list[int] = []

    @torch.inference_mode()
    def next_tokens(self, numbers: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
        """The next token of every window (b,), on the CPU; numbers (b,) in [0, 1) choose it."""
        if self.last is None:
            self.pending = [self.begin(number) for number in numbers.tolist()]
            self.ended = [0] * len(numbers)
            chosen = [0] * len(numbers)
        else:
            device = self.model.device
            self.text = torch.cat([self.text.view(len(numbers), -1), self.last[:, None]], 1)
            if self.caches:
                out = self.model(self.last[:, None].to(device), past_key_values=self.cache, use_cache=True)
                self.cache = out.get("past_key_values")
                self.caches = self.cache is not None
            else:
                out = self.model(self.text.to(device), use_cache=False)
            cumulated = warp(out.logits[:, -1, : self.size].float()).softmax(-1).cumsum(-1, dtype=numbers.dtype)
            tokens = torch.searchsorted(cumulated, numbers[:, None].to(device) * cumulated[:, -1:], right=True)
            tokens = tokens.squeeze(1).clamp_(max=cumulated.shape[-1] - 1)
            chosen = tokens.where(cumulated[:, -1].isfinite(), -1).tolist()  # the only wait for a GPU
            if -1 in chosen:
                raise WeLoreError("the model computes NaN or Inf: look for damaged weights")
        for row, number in enumerate(numbers.tolist()):
            if not self.pending[row] and self.ended[row] == self.turns:
                self.pending[row], self.ended[row] = self.begin(number), 0
            if self.pending[row]:
                chosen[row], *self.pending[row] = self.pending[row]
            elif chosen[row] in self.ends:
                self.ended[row] += 1
        self.last = torch.tensor(chosen)
        return self.last


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
