"""Text that the model itself writes: calibration without data.

Windows are filled by sampling, many at once, with a cache of keys and values. A text begins with a given beginning
(BEGINNINGS) and ends with the model's end token; then the next one begins in the same window, as in packed training.

transformers' own sampling rules are used, but not `generate`: it would follow settings in the model's
generation_config.json (repetition penalties, end tokens), and draw from the global random state.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from welore.errors import WeLoreError, choose
from welore.io.progress import Progress, counted, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS, LENGTH = 65536, 512  # written by default, in windows of
MARK = "\N{SNOWMAN}"  # stands for what the user says while a chat template is taken apart


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    first: str = "vocabulary",
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Tensor:
    """Windows (ceil(tokens / length), length) of token ids that the model wrote, on the CPU.

    temperature, top_k, top_p: of the sampling; 1, 0 and 1 leave the model's distribution as it is. first: what a
    text begins with, see BEGINNINGS. batch_size: windows written at once; the random numbers of a window do not
    depend on it.
    """
    _check(tokens, length, temperature, top_k, top_p, batch_size)
    begin = choose("beginning", first, BEGINNINGS)(tokenizer)
    windows = -(-tokens // length)
    # One row of numbers per window: what a window says does not depend on its batch.
    uniform = torch.rand((windows, length), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    starts = range(0, windows, batch_size)
    steps = [(start, position) for start in starts for position in range(length)]
    written = torch.empty((windows, length), dtype=torch.long)
    warp = _warpers(temperature, top_k, top_p)
    ends = _end_tokens(model, tokenizer)
    training = model.training
    model.eval()
    batch: _Batch | None = None
    for start, position in counted(progress, steps, "the model writes"):
        if position == 0:
            batch = _Batch(model, begin, ends, 2 if first == "chat" else 1)
        assert batch is not None
        numbers = uniform[start : start + batch_size, position]
        written[start : start + batch_size, position] = batch.next_tokens(numbers, warp)
    model.train(training)
    return written


# --- how a text begins ----------------------------------------------------------------------------------------------

Begin = Callable[[float], list[int]]  # a number in [0, 1) -> the first tokens of a text


def _any_token(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """Any token of the vocabulary that is no special one, each as likely."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    opening = _opening(tokenizer)
    return lambda number: [*opening, ordinary[int(number * len(ordinary))]]


def _any_word(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """Any token that begins with a letter, at the start of a word where the vocabulary tells, each as likely."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    pieces = {t: str(tokenizer.convert_ids_to_tokens(t)) for t in range(len(tokenizer)) if t not in special}
    marked = {t: p for t, p in pieces.items() if p and p[0] in "\u0120\u2581"}  # bytes with a space; sentencepiece
    words = [t for t, p in (marked or pieces).items() if p and p.lstrip("\u0120\u2581")[:1].isalpha()]
    if not words:
        raise WeLoreError("the vocabulary has no token that begins with a letter: take first='vocabulary'")
    opening = _opening(tokenizer)
    return lambda number: [*opening, words[int(number * len(words))]]


def _from_nothing(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """What the tokenizer puts before every text, or the end token, as if another text had ended: the model goes on."""
    opening = _opening(tokenizer) or [_end(tokenizer)]
    return lambda number: opening


def _chat(tokenizer: "PreTrainedTokenizerBase") -> Begin:
    """The chat template up to where the user speaks: the model writes both question and answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise WeLoreError("this tokenizer has no chat template: take another beginning than 'chat'")
    said = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    assert isinstance(said, str)
    ids: list[int] = tokenizer(said.partition(MARK)[0], add_special_tokens=False).input_ids
    return lambda number: ids


# What a text begins with; the tokenizer's own opening token (Llama's <s>, Gemma's <bos>) always comes first.
BEGINNINGS: dict[str, Callable[["PreTrainedTokenizerBase"], Begin]] = {
    "vocabulary": _any_token,
    "word": _any_word,
    "nothing": _from_nothing,
    "chat": _chat,
}


def _opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    ids: list[int] = tokenizer("").input_ids
    return [token for token in ids if token != tokenizer.eos_token_id]


def _end(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise WeLoreError("this tokenizer has neither a first nor an end token: take first='vocabulary'")
    return int(tokenizer.eos_token_id)


def _end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens that end a text (or a turn of a chat)."""
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, Sequence) else [configured]
    return {int(token) for token in (*several, tokenizer.eos_token_id) if token is not None}


# --- sampling -------------------------------------------------------------------------------------------------------


class _Batch:
    """Windows that are written together, token by token.

    ends: tokens that end a turn; a text ends with the `turns`-th of them.
    """

    def __init__(self, model: "PreTrainedModel", begin: Begin, ends: set[int], turns: int) -> None:
        self.model, self.begin, self.ends, self.turns = model, begin, ends, turns
        self.cache: Any = None
        self.last: Tensor | None = None
        self.pending: list[list[int]] = []  # tokens with which the text of a window goes on in any case
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
            out = self.model(self.last[:, None].to(device), past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            cumulated = warp(out.logits[:, -1].float()).softmax(-1).cumsum(-1, dtype=torch.float64)
            if not bool(torch.isfinite(cumulated[:, -1]).all()):
                raise WeLoreError("the model computes NaN or Inf: look for damaged weights")
            drawn = torch.searchsorted(cumulated, numbers[:, None].to(device) * cumulated[:, -1:], right=True)
            chosen = drawn.squeeze(1).clamp_(max=cumulated.shape[-1] - 1).tolist()
        for row, number in enumerate(numbers.tolist()):
            if not self.pending[row] and self.ended[row] == self.turns:
                self.pending[row], self.ended[row] = self.begin(number), 0
            if self.pending[row]:
                chosen[row], *self.pending[row] = self.pending[row]
            elif chosen[row] in self.ends:
                self.ended[row] += 1
        self.last = torch.tensor(chosen)
        return self.last


def _warpers(temperature: float, top_k: int, top_p: float) -> Callable[[Tensor], Tensor]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rules: list[Any] = []
    if temperature != 1.0:
        rules.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        rules.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        rules.append(TopPLogitsWarper(top_p))

    def warp(scores: Tensor) -> Tensor:
        for rule in rules:
            scores = rule(None, scores)
        return scores

    return warp


def _check(tokens: int, length: int, temperature: float, top_k: int, top_p: float, batch_size: int) -> None:
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise WeLoreError(f"{name} is {value}: it must be at least {least}")
    if not temperature > 0:
        raise WeLoreError(f"temperature is {temperature}: it must be above 0 (1 is the model's own distribution)")
    if top_k < 0:
        raise WeLoreError(f"top_k is {top_k}: it must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise WeLoreError(f"top_p is {top_p}: it must be above 0 and at most 1")
