"""Runs `welore` in forked children of one process that has imported everything, and drives a campaign of cases.

An import of torch and transformers takes seconds, a fork milliseconds. A child has limits of memory and time. It notes
every file that it writes, renames or removes outside the directory of its case, and it can be killed before its n-th
step in the file system.
"""

import argparse
import atexit
import faulthandler
import gc
import hashlib
import importlib
import json
import logging
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MEMORY, SECONDS = 3 << 30, 30.0  # of a child, beyond the memory of its parent
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
OUTWARD = {"socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "subprocess.Popen"}
TIMES = re.compile(r"\w*(second|memory|peak)\w*|created|resumed_at|timed_steps|tokens|work_bytes|probe_share|stages")
GOOD = {"accepted", "refused", "equal"}


@dataclass
class Answer:
    """What a command left: its status (negative: ended by that signal; HANG), its words, its notes, its steps."""

    status: int | str
    out: str
    err: str
    notes: list[str]
    steps: int
    seconds: float


@dataclass
class Outcome:
    """One case of a campaign: the class of what happened, the command, and a note for whoever mends it."""

    kind: str
    command: Sequence[object]
    note: str = ""


Case = Callable[[Path, random.Random], Outcome]


@dataclass
class Home:
    """Directories of a campaign: good files to copy, the case in work, the streams, a home and a temporary one."""

    root: Path
    shared: Path = field(init=False)
    case: Path = field(init=False)
    logs: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("shared", "case", "logs", "home", "tmp"):
            path = self.root / name
            path.mkdir(parents=True, exist_ok=True)
            setattr(self, name, path)
        os.environ |= {
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "home"),
            "HF_HOME": str(self.root / "home" / "hf"),
            "TMPDIR": str(self.root / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def fresh(self, *names: str, **others: str) -> Path:
        """The empty directory of a case, with copies of these files and directories of `shared`; others: new=old."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        for new, name in [*zip(names, names, strict=True), *others.items()]:
            source = self.shared / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, self.case / new)
        return self.case


home: Home  # of this process; set once, before anything that reads the environment is imported


def import_everything() -> None:
    """Import whatever a command may import later, in one thread."""
    import torch

    import welore

    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for module in pkgutil.walk_packages(welore.__path__, "welore."):
        if module.name not in ("welore.__main__", "welore.models.vllm_plugin"):  # the second is for vLLM's processes
            importlib.import_module(module.name)
    others = (
        "transformers.trainer pydantic accelerate datasets pyarrow.parquet gguf jinja2 matplotlib.backends.backend_svg"
    )
    for name in [*others.split(), "matplotlib.backends.backend_agg", "scipy.linalg", "safetensors.torch"]:
        importlib.import_module(name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    gc.collect()
    gc.freeze()


@dataclass
class Child:
    """A command at work."""

    pid: int
    streams: Path
    started: float

    def end(self, seconds: float = SECONDS, after: float | None = None, sent: int = signal.SIGKILL) -> Answer:
        """Wait for it; send a signal after so many seconds, and kill it after `seconds`."""
        status: int | str | None = None
        while status is None:
            done, code = os.waitpid(self.pid, os.WNOHANG)
            passed = time.monotonic() - self.started
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif after is not None and passed >= after:
                os.kill(self.pid, sent)
                after = None
            elif passed > seconds:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                status = "HANG"
            else:
                time.sleep(0.003)
        out, err, notes = (
            self.streams.with_suffix(f".{name}").read_text("utf-8", errors="replace")
            for name in ("out", "err", "notes")
        )
        lines = notes.splitlines()
        steps = [int(line.split()[1]) for line in lines if line.startswith("steps ")]
        others = [line for line in lines if not line.startswith("steps ")]
        return Answer(status, out, err, others, steps[0] if steps else 0, time.monotonic() - self.started)


def start(
    command: Sequence[object],
    cwd: Path,
    *,
    before: int | None = None,
    setup: Callable[[], object] | None = None,
    memory: int = MEMORY,
    tag: str = "child",
) -> Child:
    """Fork a child that runs `welore COMMAND`; before: kill it before this step in the file system.

    setup: is called in the child first. A callable as `command` is run in place of welore.
    """
    streams, started = home.logs / tag, time.monotonic()
    for name in ("out", "err", "notes"):
        streams.with_suffix(f".{name}").write_bytes(b"")
    pid = os.fork()
    if pid:
        return Child(pid, streams, started)
    code = 70
    try:
        _redirect(streams, cwd)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        watch = _watch(streams.with_suffix(".notes"), cwd, before)
        if setup is not None:
            setup()
        code = _run(command)
        watch()
    except BaseException:  # of the campaign itself
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def run(command: Sequence[object], cwd: Path, *, seconds: float = SECONDS, **how: Any) -> Answer:
    """`start` and wait; after, sent: see Child.end."""
    waiting = {name: how.pop(name) for name in ("after", "sent") if name in how}
    return start(command, cwd, **how).end(seconds, **waiting)


def _redirect(streams: Path, cwd: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams.with_suffix(f".{name}"), os.O_WRONLY), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")
    faulthandler.enable(sys.stderr)


def _watch(notes: Path, cwd: Path, before: int | None) -> Callable[[], None]:
    """Note steps outside the campaign's directories, count all, kill before one; the function notes their number."""
    file, steps = os.open(notes, os.O_WRONLY), 0
    inside = (os.path.realpath(cwd), str(home.root / "home"), str(home.root / "tmp"), "/dev/", "/proc/")

    def note(text: str) -> None:
        os.write(file, (text.replace("\n", " ") + "\n").encode(errors="replace"))

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in OUTWARD:
            note(f"{event} {arguments!r:.120}")
        if event not in WRITES and not (event == "open" and _writes(*arguments)):
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            directory, name = os.path.split(os.fsdecode(path))
            real = f"{os.path.realpath(directory)}/{name}"
            if not real.startswith(inside):
                note(f"{event} {real}")
        steps += 1
        if steps == before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    return lambda: note(f"steps {steps}")


def _writes(path: object, mode: object, flags: object) -> bool:
    by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    by_flags = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return isinstance(path, (str, bytes)) and (by_mode or by_flags)


def _run(command: Any) -> int:
    """Status of the command, ended as an interpreter ends it."""
    from welore.cli.main import main

    code = 0
    try:
        if callable(command):
            command()
        else:
            sys.argv = ["welore", *map(str, command)]
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        code = 120  # as an interpreter ends that cannot flush
    except BaseException:
        traceback.print_exc()
        code = code or 1
    return code


# --- what an answer is ----------------------------------------------------------------------------------------------


def judge(answer: Answer) -> str:
    """Class of an answer by itself: refused, accepted, or what a command must not do."""
    usual = re.compile(r"\s*$|\[transformers\]|.*%\|")  # nothing, a warning, a bar of progress
    lines = [line for line in answer.err.splitlines() if not usual.match(line)]
    if any(note.startswith(tuple(WRITES | {"open"})) for note in answer.notes):
        return "OUTSIDE"
    if answer.notes:
        return "NETWORK"
    if answer.status == "HANG":
        return "HANG"
    if "Traceback (most recent" in answer.err or "this is a bug" in answer.err:
        return "OOM" if re.search(r"MemoryError|bad_alloc|allocate memory", answer.err) else "TRACEBACK"
    if answer.status == 2:
        return "refused" if len(lines) == 1 and lines[0].startswith("welore: ") else "NOISY"
    if answer.status != 0:
        return f"STATUS {answer.status}"
    return "accepted"


def last_line(text: str) -> str:
    """The last line that says something, and where in the package an error came from."""
    lines = [line for line in text.splitlines() if line.strip()]
    log = re.search(r"(/\S+\.(?:log|txt))", text)
    if "this is a bug" in text and log and Path(log[1]).is_file():
        text += Path(log[1]).read_text("utf-8", errors="replace")
    frames = re.findall(r'File "[^"]*/welore/([^"]+)", line (\d+), in (\S+)', text)
    where = " at {}:{} {}".format(*frames[-1]) if frames else ""
    return (lines[-1][:300] if lines else "") + where


def tree(directory: Path) -> list[str]:
    """Names of everything below a directory but checkpoints: a kill may keep the Trainer from deleting an old one."""
    names = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    return sorted(name for name in names if not re.search(r"checkpoint-\d+", name))


def digest(path: Path) -> dict[str, str]:
    """Digest of every file at or below a path; times, machines and checkpoints of a trainer are left out."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path] if path.exists() else []
    names = {p: str(p.relative_to(path)) for p in files}
    return {name: hashlib.sha256(_timeless(p)).hexdigest() for p, name in names.items() if "checkpoint-" not in name}


def _timeless(path: Path) -> bytes:
    """The content of a file; of JSON, also in the header of safetensors, without what a clock or a machine says."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        return b"\n".join(_without_times(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data]))
    end = 8 + int.from_bytes(data[:8], "little")
    if path.suffix == ".safetensors" and end <= len(data):
        return _without_times(data[8:end]) + data[end:]
    return data


def _without_times(text: bytes) -> bytes:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if not TIMES.fullmatch(key)}
        if isinstance(value, str) and value.startswith("{"):  # a record inside a header
            return clean(json.loads(value))
        return list(map(clean, value)) if isinstance(value, list) else value

    return json.dumps(clean(json.loads(text))).encode()


# --- a campaign -----------------------------------------------------------------------------------------------------


def campaign(cases: dict[str, Case], prepare: Callable[[Home], None], description: str | None) -> int:
    """Run cases of every kind, round after round, until the time is spent; 1 if one failed."""
    global home
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0, help="number of the first round")
    parser.add_argument("--budget", type=float, default=60, help="seconds; 0: one round")
    parser.add_argument("--only", default="", help=f"kinds with commas between them, of {', '.join(cases)}")
    parser.add_argument("--work", type=Path, help="directory for the files of the campaign; made again if it is absent")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name] or list(cases)
    work = options.work or Path(tempfile.mkdtemp())
    home = Home(work.resolve())
    try:
        import_everything()
        if not (home.shared / "ready").exists():
            prepare(home)
            (home.shared / "ready").touch()
        failures, classes = _rounds(chosen, cases, options)
    finally:
        if options.work is None:  # not by a TemporaryDirectory, which a child would remove at its end
            shutil.rmtree(work, ignore_errors=True)
    _table(classes)
    print(f"{sum(map(sum, (c.values() for c in classes.values())))} cases, {failures} failures", flush=True)
    return int(failures > 0)


def _rounds(chosen: list[str], cases: dict[str, Case], options: argparse.Namespace) -> tuple[int, dict[str, Counter]]:
    failures, classes, began = 0, defaultdict(Counter), time.monotonic()
    for seed, name in _order(chosen, options.seed):
        if time.monotonic() - began > options.budget and seed > options.seed:
            break
        outcome = cases[name](home.root, random.Random(f"{name} {seed}"))
        classes[name][outcome.kind] += 1
        if outcome.kind not in GOOD:
            failures += 1
            words = " ".join(map(str, outcome.command))
            again = f"--only {name} --seed {seed} --budget 0"
            print(f"{outcome.kind} [{again}] welore {words}\n    {outcome.note}", flush=True)
    return failures, classes


def _order(names: list[str], seed: int) -> Iterator[tuple[int, str]]:
    while True:
        for name in names:
            yield seed, name
        seed += 1


def _table(classes: dict[str, Counter]) -> None:
    kinds = sorted({kind for counts in classes.values() for kind in counts}, key=lambda kind: (kind not in GOOD, kind))
    width = max(map(len, classes))
    print(" " * width, *(f"{kind:>10}" for kind in kinds))
    for name, counts in classes.items():
        print(f"{name:{width}}", *(f"{counts[kind] or '':>{max(10, len(kind))}}" for kind in kinds))
    print(f"{'all':{width}}", *(f"{sum(c[kind] for c in classes.values()):>{max(10, len(kind))}}" for kind in kinds))
