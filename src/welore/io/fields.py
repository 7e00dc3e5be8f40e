"""Fields of files that nobody has checked: parsed, and of the type that is expected, or refused in one sentence."""

import json
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin

from safetensors import SafetensorError

from welore.errors import WeLoreError

LARGEST = 1 << 63  # a larger whole number is none that anything here counts

ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)  # of unchecked values
WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "null"}


def parse_json(text: str) -> Any:
    """The content of a JSON text; ValueError for anything else, however deep or long."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError("it has a number of thousands of digits") from error
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


def typed(value: Any, kind: Any, name: str) -> Any:
    """A JSON value as `kind`: a class, a Literal, a union, or a tuple, list or mapping of such; numbers are finite.

    Lists are returned as tuples where `kind` says so. name: of the field, for the sentence of the WeLoreError.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal and any(type(value) is type(a) and value == a for a in args):
        return value
    if origin in (Union, types.UnionType):
        members = [member for member in args if value is None or member is not type(None)]
        if len(members) == 1:
            return typed(value, members[0], name)
        for member in members:
            try:
                return typed(value, member, name)
            except WeLoreError:
                continue
    elif origin is tuple and isinstance(value, list | tuple) and (args[-1] is ... or len(value) == len(args)):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(typed(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {typed(n, args[0], f"a name in {name}"): typed(v, args[1], f"{name} of {n}") for n, v in value.items()}
    elif isinstance(kind, type) and _is_instance(value, kind):
        return value
    raise WeLoreError(f"{name} is {reprlib.repr(value)}, it must be {_words(kind)}")


def _words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        return "an object with names"
    if origin is tuple:
        return "a list" if args[-1] is ... else f"a list of {len(args)}"
    return WORDS.get(kind, str(kind))


def _is_instance(value: Any, kind: type) -> bool:
    if kind is float:
        return math.isfinite(value) if type(value) is float else _is_instance(value, int)
    if kind is int:
        return type(value) is int and abs(value) < LARGEST
    if kind is str and isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)  # half a letter, which no file can hold
    return isinstance(value, kind)


@contextmanager
def refusing(sentence: str, advice: str) -> Iterator[None]:
    """Make every error of a block that reads an untrusted file one: SENTENCE (reason): advice."""
    try:
        yield
    except (*ERRORS, OSError, SafetensorError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise WeLoreError(f"{sentence} ({reason}): {advice}") from error
