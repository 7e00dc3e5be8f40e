"""How a command ends that does not end well: one sentence and an exit status, never a traceback."""

import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from welore.errors import WeLoreError, choose, first_line
from welore.io.atomic import storage_reason


class Stopped(BaseException):
    """Raised where the process is when it is told to end, so that SIGTERM tidies up as Ctrl-C does."""

    def __init__(self, number: int = signal.SIGINT, frame: Any = None) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and the end of a terminal raise Stopped, unless they are ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        launched = os.environ.get("WORLD_SIZE", "1") not in ("", "1")  # a wait for other processes hears no SIGTERM
        others = () if launched else (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
        for number in (signal.SIGINT, *others):
            if signal.getsignal(number) not in (signal.SIG_IGN, None, _stop):
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def say_end(error: BaseException) -> int:
    """Say why a command ended, once for all processes of a job; returns the exit status."""
    status, sentence = _end_of(error)
    if sentence and _is_first():
        print(printable(sentence), file=sys.stdout if status == 0 else sys.stderr)
    return status


def printable(text: str) -> str:
    """The text, with an escape for every letter that would do something to a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit status and sentence."""
    if isinstance(error, KeyboardInterrupt | Stopped):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        notes = "; ".join(getattr(error, "__notes__", []))
        return 128 + number, f"welore: stopped{'; ' + notes if notes else ''}" if is_main_process() else ""
    if isinstance(error, WeLoreError):
        return 2, f"welore: {' '.join(str(error).splitlines())}"
    if hasattr(error, "format_message"):  # one of the option parser's
        text = error.format_message()
        helps = type(error).__name__ == "NoArgsIsHelpError"
        return (0, text) if helps else (2, f"welore: {usage_sentence(text)}")
    memory = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    if memory or isinstance(error, MemoryError):
        advice = "free some, or choose fewer --workers or another --device"
        return 2, f"welore: out of memory ({first_line(error)}): {advice}"
    if isinstance(error, ImportError):
        return 2, f"welore: a package is missing or does not fit: {first_line(error)}"
    reason = storage_reason(error) or (first_line(error) if isinstance(error, OSError) else None)
    if reason is not None:
        file = getattr(error, "filename", None)
        return 2, f"welore: {f'{file}: ' if file is not None else ''}{reason}"
    return 1, f"welore: {_bug(error)}"


def _bug(error: BaseException) -> str:
    """The sentence for an error that nobody foresaw; its traceback goes to a file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    log = "could not be written anywhere"
    with suppress(OSError):
        prefix, coding = "welore-bug-", {"encoding": "utf-8", "errors": "backslashreplace"}
        with tempfile.NamedTemporaryFile("w", prefix=prefix, suffix=".log", delete=False, **coding) as file:  # type: ignore[call-overload]
            file.write(text)
        log = f"is in {file.name}"
    where = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
    what = f"{type(error).__name__}: {first_line(error)} ({where})"
    return f"this is a bug in welore: {what}; the traceback {log}: report it with the command that you ran"


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") in ("", "0")


def _is_first() -> bool:
    """Whether no other process of the job has failed before: the others fail because of the first."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return is_main_process()
    try:
        return bool(distributed.distributed_c10d._get_default_store().add("welore ended", 1) == 1)
    except RuntimeError:  # the process that has the store is gone
        return True


def flush_output(text: str = "") -> None:
    """Write a text to the standard output, and all of it out; a reader that has gone (`| head`) is no failure."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # what is left in the buffer would fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise WeLoreError(f"the standard output cannot be written: {storage_reason(error)}") from error


def usage_sentence(message: str) -> str:
    """One sentence of a usage error of the option parser; an unknown name is answered with the nearest one."""
    text = " ".join(message.split()).replace("Value error, ", "")
    wrong = re.fullmatch(r"Invalid value for '--([\w-]+)'.*?: '(.*?)' is not one of (.+)", text)
    if wrong:
        option, value, names = wrong.groups()
        try:
            choose(option.replace("-", " "), value, dict.fromkeys(re.findall(r"'([^']+)'", names)))
        except WeLoreError as error:
            return str(error)
    return text[:1].lower() + text[1:] if text.startswith(("Missing", "Invalid", "No such")) else text
