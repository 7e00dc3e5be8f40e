"""Processes that have imported torch already: children of the one that tests, by fork. An import takes six seconds."""

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed import TCPStore

SECONDS = 300.0  # after which a child is killed; a few, if another has failed, for which it may wait


@dataclass(frozen=True)
class Ended:
    """What a process left: its status (negative: the signal that ended it) and what it wrote."""

    status: int
    out: str
    err: str


def forked(work: Callable[[], object], **variables: str) -> Ended:
    """Call a function in a child, with these variables of the environment; see the fixture of this name."""
    return _together([(work, variables)])[0]


def launched(work: Callable[[], object], count: int = 2, **variables: str) -> list[Ended]:
    """Call a function in so many children that have the variables of torchrun, and a store to meet at."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": ""} | variables
    return _together([(work, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)])


def command(*words: object) -> Callable[[], None]:
    """The work of `welore WORDS`."""

    def run() -> None:
        from welore.cli.main import main

        sys.argv = ["welore", *map(str, words)]
        main()

    return run


def _together(works: list[tuple[Callable[[], object], dict[str, str]]]) -> list[Ended]:
    with tempfile.TemporaryDirectory() as directory:
        streams = [(Path(directory) / f"{i}.out", Path(directory) / f"{i}.err") for i in range(len(works))]
        children = [_start(*work, *files) for work, files in zip(works, streams, strict=True)]
        statuses = _wait(children)
        texts = [[file.read_text("utf-8", "replace") for file in files] for files in streams]
    return [Ended(status, *text) for status, text in zip(statuses, texts, strict=True)]


def _start(work: Callable[[], object], variables: dict[str, str], out: Path, err: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads do not live on in a child
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ |= variables
        warnings.simplefilter("default")  # of libraries: no errors, as in any process
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers that the parent is alone
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int]:
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    deadline = min(deadline, time.monotonic() + 5)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]
