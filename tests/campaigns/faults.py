"""Faults of the machine and of the place: full disks, odd outputs, two commands at once, signals, little memory.

    python tests/campaigns/faults.py --seed 0 --budget 600 --only disk_full,own_input

Whatever happens, a command answers in one sentence, changes no file of the user, leaves a whole result or none, and
gives the bytes of an undisturbed run as soon as the fault is gone. Classes: refused, accepted, equal; and the failures
TRACEBACK, NOISY, HANG, OUTSIDE (see mutations.py), CHANGED (a file of the user), HALF, UNEQUAL, LEFT (see kills.py),
STATUS (none that is documented), MODE (a file's mode is not that of the umask). As root some faults are real mounts.
"""

import builtins
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import materials
import zygote
from kills import LONG, again, once
from materials import VERBS, Verb, words
from zygote import Answer, Outcome, campaign, digest, judge, last_line, tree

ROOT = os.geteuid() == 0
QUICK = [name for name in VERBS if name not in ("best", "pretrain", "pretrain-again", "teach")]
Fault = Callable[[random.Random], Outcome]


def pick(rng: random.Random, names: list[str] = QUICK) -> tuple[str, Verb, Path]:
    """A verb and a fresh directory with what it reads."""
    name = rng.choice(names)
    once(name)
    return name, VERBS[name], zygote.home.fresh(*VERBS[name].needs, **VERBS[name].old)


def elsewhere(verb: Verb, output: str) -> list[str]:
    """The command with another output."""
    return [output if word == verb.output else word for word in verb.command]


def users(at: Path, output: str) -> dict[str, bytes]:
    """Every file that is the user's, and its bytes; a link's target."""
    files = (p for p in at.rglob("*") if p.is_symlink() or p.is_file())
    names = {str(p.relative_to(at)): p for p in files}
    return {
        name: str(p.readlink()).encode() if p.is_symlink() else p.read_bytes()
        for name, p in names.items()
        if not Path(name).is_relative_to(output)
    }


def verdict(verb: Verb, command: list[str], answer: Answer, note: str, allowed: tuple[int, ...] = ()) -> Outcome:
    """The class of an answer to a fault; allowed: statuses that are documented for it."""
    kind = "refused" if answer.status in allowed and "Traceback" not in answer.err else judge(answer)
    return Outcome(kind, command, f"{note}: {answer.notes[0] if kind == 'OUTSIDE' else last_line(answer.err)}")


def safe(
    at: Path, verb: Verb, good: dict[str, str], before: dict[str, bytes], old: dict[str, str], output: str
) -> tuple[str, str] | None:
    """CHANGED or HALF, with the reason; None if nobody lost anything."""
    after = users(at, output)
    lost = [name for name, data in before.items() if after.get(name) != data]
    if lost:
        return "CHANGED", f"{lost[:4]}"
    there = digest(at / output)
    if not verb.resumable and there not in ({}, old, good):
        return "HALF", f"{sorted(there)[:4]}"
    return None


def then_again(name: str, verb: Verb, at: Path, first: Outcome) -> Outcome:
    """The fault is gone: the same command must give the result of an undisturbed run."""
    if first.kind not in zygote.GOOD:
        return first
    good, answer = once(name), again(verb, at)
    if answer.status != 0:
        kind = judge(answer).replace("refused", "REFUSED")
        return Outcome(kind, first.command, f"{first.note}; then {last_line(answer.err)}")
    result = digest(at / verb.output)
    unequal = [key for key in sorted(result.keys() | good.result.keys()) if result.get(key) != good.result.get(key)]
    others = sorted(set(tree(at)) ^ set(good.names))
    if unequal or others:
        return Outcome("UNEQUAL" if unequal else "LEFT", first.command, f"{first.note}; then {(unequal or others)[:5]}")
    return Outcome("equal", first.command, first.note)


def disturbed(name: str, verb: Verb, at: Path, note: str, **how: Any) -> Outcome:
    """Run under a fault; then see that nobody lost anything, and run again without it."""
    allowed = how.pop("allowed", ())
    before, old = users(at, verb.output), digest(at / verb.output)
    answer = zygote.run(verb.command, at, seconds=LONG, **how)
    outcome = verdict(verb, verb.command, answer, note, allowed)
    trouble = safe(at, verb, once(name).result, before, old, verb.output)
    if trouble:
        return Outcome(trouble[0], verb.command, f"{trouble[1]} {outcome.note}")
    return then_again(name, verb, at, outcome)


# --- limits -----------------------------------------------------------------------------------------------------------


def limit(what: int, value: int) -> Callable[[], None]:
    """Set a limit of the process."""
    return lambda: resource.setrlimit(what, (value, value))


def file_size(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    size = rng.choice([5_000, 10_000, 20_000, 60_000, 120_000])
    zygote_limit = limit(resource.RLIMIT_FSIZE, size)
    return disturbed(name, verb, at, f"files of at most {size} bytes", setup=zygote_limit)


def memory(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    size = rng.choice([8, 16, 40, 80, 160])
    dead = (-signal.SIGABRT, -signal.SIGSEGV, 1)  # C++ code may abort; 1: memory ends in a sentence and that status
    return disturbed(name, verb, at, f"{size} MB of memory", memory=size << 20, allowed=dead)


def signals(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng, list(VERBS))
    sent, seconds = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), rng.uniform(0.0, 1.0)
    seconds *= once(name).seconds
    ends = (128 + sent, -sent)
    return disturbed(name, verb, at, f"{sent.name} after {seconds:.3f} s", after=seconds, sent=sent, allowed=ends)


def from_the_start(rng: random.Random) -> Outcome:
    """A signal to a process of its own, at any moment from its birth: imports, too, must end quietly."""
    name, verb, at = pick(rng, ["analyze", "compress", "evaluate"])
    sent, seconds = rng.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM]), rng.uniform(0.0, 5.0)
    command = [sys.executable, "-m", "welore", *verb.command]
    with subprocess.Popen(command, cwd=at, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(sent)
        out, err = process.communicate(timeout=LONG)
    answer = Answer(process.returncode, out, err, [], 0, seconds)
    outcome = verdict(verb, verb.command, answer, f"{sent.name} after {seconds:.2f} s", (128 + sent, -sent))
    return then_again(name, verb, at, outcome)


@contextmanager
def mounted(at: Path, options: str) -> Iterator[None]:
    """A small file system in memory at a directory."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def disk_full(rng: random.Random) -> Outcome:
    if not ROOT:
        return file_size(rng)
    name, verb, at = pick(rng)
    size = rng.choice([4, 40, 100, 200, 400])
    command = elsewhere(verb, f"disk/{verb.output}")
    with mounted(at / "disk", f"size={size}k"):
        if verb.old:
            return Outcome("accepted", command, "an old result may not go in there")
        answer = zygote.run(command, at, seconds=LONG)
        outcome = verdict(verb, command, answer, f"a disk of {size} kB")
        there = digest(at / "disk" / verb.output)
        if answer.status != 0 and there and not verb.resumable:
            return Outcome("HALF", command, f"{sorted(there)[:4]} {outcome.note}")
        subprocess.run(["mount", "-o", "remount,size=64m", at / "disk"], check=True)
        moved = Verb(command, f"disk/{verb.output}", verb.needs, verb.resumable)
        if outcome.kind not in zygote.GOOD:
            return outcome
        more = again(moved, at)
        if more.status != 0 or digest(at / moved.output) != once(name).result:
            return Outcome("UNEQUAL", command, f"{outcome.note}; then {more.status} {last_line(more.err)}")
    return outcome


# --- odd places -------------------------------------------------------------------------------------------------------


def read_only(rng: random.Random) -> Outcome:
    _name, verb, at = pick(rng)
    command = elsewhere(verb, f"disk/{verb.output}")
    if ROOT and rng.random() < 0.5:
        with mounted(at / "disk", "ro,size=1m"):
            return verdict(verb, command, zygote.run(command, at), "a read-only disk")
    (at / "disk").mkdir()
    (at / "disk").chmod(0o555)
    zygote.home.root.chmod(0o755)
    setup = (lambda: os.setuid(65534)) if ROOT else None
    outcome = verdict(verb, command, zygote.run(command, at, setup=setup), "a directory without permission")
    return outcome if outcome.kind != "accepted" else Outcome("STATUS", command, "accepted without permission")


def odd_output(rng: random.Random) -> Outcome:
    _name, verb, at = pick(rng, [name for name in QUICK if not VERBS[name].old])
    (at / "else").mkdir()
    (at / "else" / "thesis.txt").write_text("mine")
    (at / "thesis.txt").write_text("mine")
    kinds = ["file", "fifo", "dangling", "link to a file", "link to a directory", "directory", "below a file", "long"]
    how, path, output = rng.choice([*kinds, *(["device", "mount"] if ROOT else [])]), at / verb.output, verb.output
    if how == "file":
        path.write_text("mine")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "device":
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
    elif how.startswith("link"):
        path.symlink_to("thesis.txt" if "file" in how else "else")
    elif how == "dangling":
        path.symlink_to("nowhere")
    elif how == "directory":
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    elif how == "below a file":
        output = f"thesis.txt/{verb.output}"
    elif how == "long":
        output = "x" * rng.choice([240, 250, 255, 300])
    command = elsewhere(verb, output)
    more = (
        ["--overwrite"] if rng.random() < 0.3 and verb.command[0] in ("compress", "merge", "export", "finetune") else []
    )
    before, kind = users(at, "?"), path.lstat().st_mode if path.is_symlink() or path.exists() else None
    with mounted(path, "size=4m") if how == "mount" else nullcontext():
        answer = zygote.run([*command, *more], at, seconds=LONG)
        outcome = verdict(verb, [*command, *more], answer, f"output is {how}")
    if how in ("fifo", "device") and path.lstat().st_mode != kind:
        return Outcome("CHANGED", command, f"the {how} is gone")
    replaced = {"file": verb.output, "link to a file": "thesis.txt"}  # what -o replaces: a file, or that of a link
    free = {replaced.get(how)} if "." in verb.output else set()
    after = users(at, "?")
    lost = [key for key, data in before.items() if after.get(key) != data and key not in free]
    if lost and (how != "dangling" or answer.status != 0):
        return Outcome("CHANGED", [*command, *more], f"output is {how}: {lost}")
    return outcome


def neighbours(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    suffixes = [".work", ".partial", ".replaced", ".lock", ".old", ".removed", ".tmp"]
    neighbour = at / rng.choice([f"{verb.output}{x}" for x in suffixes] + [f".{verb.output}{x}" for x in suffixes])
    way = rng.choice(["directory", "directory", "file", "link"])
    (at / "else").mkdir()
    (at / "else" / "thesis.txt").write_text("mine")
    if way == "directory":
        neighbour.mkdir()
        (neighbour / "thesis.txt").write_text("mine")
    elif way == "file":
        neighbour.write_text("mine")
    else:
        neighbour.symlink_to("else")
    before, old = users(at, verb.output), digest(at / verb.output)
    answer = zygote.run(verb.command, at, seconds=LONG)
    outcome = verdict(verb, verb.command, answer, f"{neighbour.name} is a {way} of the user's")
    trouble = safe(at, verb, once(name).result, before, old, verb.output)
    return Outcome(trouble[0], verb.command, f"{trouble[1]} {outcome.note}") if trouble else outcome


def own_input(rng: random.Random) -> Outcome:
    _name, verb, at = pick(rng)
    targets = [*verb.needs, "."]
    for directory in [need for need in verb.needs if (at / need).is_dir()]:
        targets += [f"{directory}/{p.name}" for p in sorted((at / directory).iterdir())] + [
            f"./{directory}/.",
            f"{directory}/x",
        ]
    (at / "link").symlink_to(rng.choice(verb.needs))
    output = rng.choice([*targets, "link"])
    command = elsewhere(verb, output)
    more = rng.choice([[], ["--overwrite"]]) if verb.command[0] in ("compress", "merge", "export", "finetune") else []
    more = [word for word in more if word not in command]
    before = users(at, "?")
    answer = zygote.run([*command, *more], at, seconds=LONG)
    outcome = verdict(verb, [*command, *more], answer, f"output is {output}")
    after = users(at, "?")
    lost = [key for key, data in before.items() if after.get(key) != data]
    return Outcome("CHANGED", [*command, *more], f"{lost[:4]} {outcome.note}") if lost else outcome


# --- others at work, and the surroundings -----------------------------------------------------------------------------


def two_at_once(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    delay = rng.choice([0.0, 0.02, 0.1, 0.5]) * once(name).seconds
    first = zygote.start(verb.command, at, tag="first")
    time.sleep(delay)
    second = zygote.start(verb.command, at, tag="second")
    answers = [first.end(LONG), second.end(LONG)]
    outcomes = [verdict(verb, verb.command, answer, f"two, {delay:.3f} s apart") for answer in answers]
    bad = [outcome for outcome in outcomes if outcome.kind not in zygote.GOOD]
    if bad:
        return bad[0]
    if 0 not in [answer.status for answer in answers]:
        return Outcome("REFUSED", verb.command, f"both: {outcomes[0].note}; {outcomes[1].note}")
    good = once(name)
    if digest(at / verb.output) != good.result:
        return Outcome("UNEQUAL", verb.command, outcomes[0].note)
    others = sorted(set(tree(at)) ^ set(good.names))
    return Outcome("LEFT" if others else "equal", verb.command, f"{outcomes[0].note} {others[:4]}")


def others_at_work(rng: random.Random) -> Outcome:
    """Two different commands on one output, or two outputs of one .gguf file that neither has converted yet."""
    first, second = rng.choice(
        [("compress", "merge"), ("export", "finetune"), ("analyze", "calibrate"), ("gguf", "gguf")]
    )
    results = [once(first).result, once(second).result]
    at = zygote.home.fresh(*{*VERBS[first].needs, *VERBS[second].needs})
    commands = [VERBS[first].command, VERBS[second].command]
    if first == second:
        commands[1] = elsewhere(VERBS[second], "o2.safetensors")
    children = [zygote.start(commands[0], at, tag="first")]
    time.sleep(rng.uniform(0.0, 0.5) * once(first).seconds)
    children.append(zygote.start(commands[1], at, tag="second"))
    answers = [child.end(LONG) for child in children]
    for command, answer in zip(commands, answers, strict=True):
        if judge(answer) not in zygote.GOOD or (first == second and answer.status != 0):
            return Outcome(judge(answer).replace("refused", "REFUSED"), command, f"{commands}: {last_line(answer.err)}")
    if digest(at / VERBS[first].output) not in results:
        return Outcome("UNEQUAL", commands[0], f"{commands}")
    left = sorted(path.name for path in at.rglob("*") if "welore-" in path.name or path.name.endswith(".work"))
    return Outcome("LEFT" if left else "equal", commands[0], f"{left[:4]}")


def cache(rng: random.Random) -> Outcome:
    """A .gguf file whose conversion has no room, or may not be written."""
    at = zygote.home.fresh("g.gguf")
    command = words("analyze g.gguf -o o.safetensors --cache-dir disk")
    how = rng.choice([f"size={rng.choice([4, 20, 60, 90])}k", "ro,size=1m"])
    if not ROOT:
        return Outcome("accepted", command, "only root mounts")
    with mounted(at / "disk", how):
        outcome = verdict(VERBS["gguf"], command, zygote.run(command, at), f"a cache with {how}")
        left = tree(at / "disk")
    left = [name for name in left if "welore-" in name]
    return Outcome("LEFT", command, f"{left[:4]} {outcome.note}") if left else outcome


def streams(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    how, number = rng.choice(["full", "closed pipe", "closed"]), rng.choice([1, 1, 2])

    def setup() -> None:
        if how == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        elif how == "closed":
            os.close(number)
            setattr(sys, {1: "stdout", 2: "stderr"}[number], None)  # as an interpreter that starts so has it
        else:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, number)

    ends = (1, 2, 74, 141, -signal.SIGPIPE)
    return disturbed(name, verb, at, f"stream {number} is {how}", setup=setup, allowed=ends)


def surroundings(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    names = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "HF_MODULES_CACHE")
    chosen, value = (
        rng.sample(names, rng.choice([1, 2, 6])),
        rng.choice([None, "/nonexistent", "/proc", "/dev/null", ""]),
    )

    def setup() -> None:
        for variable in chosen:
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value

    return disturbed(name, verb, at, f"{chosen} = {value!r}", setup=setup)


def processes(rng: random.Random) -> Outcome:
    name, verb, at = pick(rng)
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

    def setup() -> None:
        os.environ |= (
            {"WORLD_SIZE": rng.choice(["1", "x", "", "0"])} if rng.random() < 0.7 else variables | {"WORLD_SIZE": "1"}
        )

    return disturbed(name, verb, at, "variables of torchrun", setup=setup)


def modes(rng: random.Random) -> Outcome:
    _name, verb, at = pick(rng, list(VERBS))
    mask = rng.choice([0o022, 0o002, 0o027, 0o077])
    answer = zygote.run(verb.command, at, seconds=LONG, setup=lambda: os.umask(mask))
    outcome, path = verdict(verb, verb.command, answer, f"umask {mask:03o}"), at / verb.output
    odd = [
        f"{p.name} {p.stat().st_mode & 0o777:03o}"
        for p in [path, *path.rglob("*")]
        if p.stat().st_mode & 0o777 != (0o777 if p.is_dir() else 0o666) & ~mask and "checkpoint" not in str(p)
    ]
    return Outcome("MODE", verb.command, f"{odd[:5]} {outcome.note}") if odd else outcome


def out_of_memory_in_recovery(rng: random.Random) -> Outcome:
    _name, verb, at = pick(rng, ["recover", "best"])
    step, error = (
        rng.choice([1, 2, 3]),
        rng.choice(["OutOfMemoryError", "RuntimeError", "MemoryError", "KeyboardInterrupt"]),
    )

    def setup() -> None:
        import torch
        from transformers import Trainer

        usual, done = Trainer.training_step, 0

        def training_step(*words: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                raise (getattr(torch, error, None) or getattr(builtins, error))("as a test")
            return usual(*words, **named)

        Trainer.training_step = training_step

    answer = zygote.run(verb.command, at, seconds=LONG, setup=setup)
    outcome = verdict(verb, verb.command, answer, f"{error} at step {step}", allowed=(3, 130))
    if answer.status != 130 and not (at / "out" / "config.json").is_file():
        return Outcome("LOST", verb.command, outcome.note)
    return outcome


def changed(rng: random.Random) -> Outcome:
    """Kill, change what is read, run again: the result must be that of the changed input."""
    name, verb, at = pick(rng, ["scaled", "analyze", "calibrate", "compress", "recover", "best"])
    good = once(name)
    step = rng.randint(max(1, good.steps // 2), good.steps)
    zygote.run(verb.command, at, seconds=LONG, before=step)
    if digest(at / verb.output):
        return Outcome("accepted", verb.command, "finished already")
    how = rng.choice(["config", "weights", "text", "tokenizer"] if "t.txt" in verb.needs else ["config", "weights"])
    file = at / {"config": "m/config.json", "weights": "m/model.safetensors", "text": "t.txt"}.get(
        how, "m/tokenizer.json"
    )
    times, data = file.stat(), bytearray(file.read_bytes())
    if how == "weights":
        data[-1024:] = bytes(1024)
    else:
        word = {"config": (b"1e-06", b"1e-01"), "text": (b"rain", b"snow"), "tokenizer": (b'"a"', b'"\\u00e4"')}[how]
        data = bytearray(bytes(data).replace(*word))
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh = zygote.home.root / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(
        at, fresh, ignore=lambda _, names: [n for n in names if n.startswith((verb.output, f".{verb.output}"))]
    )
    answers = [again(verb, at), zygote.run(verb.command, fresh, seconds=LONG)]
    note = f"killed before step {step}, {how} changed: {last_line(answers[0].err)}"
    if answers[0].status != answers[1].status or judge(answers[0]) not in zygote.GOOD:
        return Outcome("STATUS" if judge(answers[0]) in zygote.GOOD else judge(answers[0]), verb.command, note)
    same = digest(at / verb.output) == digest(fresh / verb.output)
    return Outcome("equal" if same else "UNEQUAL", verb.command, note)


FAULTS: list[Fault] = [
    *(
        file_size,
        memory,
        signals,
        from_the_start,
        disk_full,
        read_only,
        odd_output,
        neighbours,
        own_input,
        two_at_once,
        others_at_work,
        cache,
        streams,
    ),
    *(surroundings, processes, modes, out_of_memory_in_recovery, changed),
]
CASES: dict[str, zygote.Case] = {fault.__name__: (lambda _, rng, fault=fault: fault(rng)) for fault in FAULTS}

if __name__ == "__main__":
    sys.exit(campaign(CASES, materials.prepare, __doc__))
