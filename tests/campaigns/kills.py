"""Kills of every verb that writes, at random moments and before steps in the file system; then the same command again.

    python tests/campaigns/kills.py --seed 0 --budget 600 --only compress,finetune

The result must equal that of an undisturbed run, file by file, and nothing else may lie there. Classes: equal; and the
failures REFUSED, TRACEBACK, HANG (of the command after the kill), UNEQUAL, LEFT (something is left over), HALF (after
the kill, half a result has the output's name), LOST (after the kill of --overwrite, neither result is there).
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import materials
import zygote
from materials import VERBS, Verb
from zygote import Outcome, campaign, digest, judge, last_line, tree

LONG = 120.0


@dataclass
class Undisturbed:
    """What a command does that nobody disturbs."""

    result: dict[str, str]
    names: list[str]
    steps: int
    seconds: float


undisturbed: dict[str, Undisturbed] = {}


def once(name: str) -> Undisturbed:
    """The undisturbed run of a verb, made once in the directory of the case."""
    verb = VERBS[name]
    if name not in undisturbed:
        at = zygote.home.fresh(*verb.needs, **verb.old)
        answer = zygote.run(verb.command, at, seconds=LONG)
        if judge(answer) != "accepted":
            raise SystemExit(f"{name} fails undisturbed: {answer.err[-3000:]}")
        undisturbed[name] = Undisturbed(digest(at / verb.output), tree(at), answer.steps, answer.seconds)
    return undisturbed[name]


def case(name: str, verb: Verb) -> zygote.Case:
    """A case of a verb: kill it once or twice, look, run it again, compare."""

    def one(_: Path, rng: random.Random) -> Outcome:
        good = once(name)
        at = zygote.home.fresh(*verb.needs, **verb.old)
        old, kills = digest(at / verb.output), []
        command = verb.command
        for _kill in range(rng.choice([1, 1, 1, 2])):
            how, words = moment(good, rng)
            kills.append(words)
            zygote.run(command, at, seconds=LONG, **how)
            state = after_kill(at, verb, good, old)
            if state is not None:
                return Outcome(state, command, f"killed {kills}: {sorted(p.name for p in at.iterdir())}")
            command = next_commands(verb, at)[0]
        answer = again(verb, at)
        note = f"killed {kills}: {last_line(answer.err)}"
        if answer.status != 0:
            return Outcome(judge(answer).replace("refused", "REFUSED"), verb.command, note)
        result = digest(at / verb.output)
        unequal = [key for key in sorted(result.keys() | good.result.keys()) if result.get(key) != good.result.get(key)]
        if unequal:
            return Outcome("UNEQUAL", verb.command, f"{note} {unequal[:5]}")
        others = sorted(set(tree(at)) ^ set(good.names))
        return Outcome("LEFT" if others else "equal", verb.command, f"{note} {others[:5]}")

    return one


def moment(good: Undisturbed, rng: random.Random) -> tuple[dict[str, float], str]:
    """When to kill: before a step, often one of the last, or after some seconds."""
    if rng.random() < 0.6:
        first = max(1, good.steps - 25) if rng.random() < 0.5 else 1
        step = rng.randint(first, good.steps)
        return {"before": step}, f"before step {step} of {good.steps}"
    seconds = good.seconds * rng.uniform(0.02, 1.0)
    return {"after": seconds}, f"after {seconds:.3f} of {good.seconds:.3f} s"


def after_kill(at: Path, verb: Verb, good: Undisturbed, old: dict[str, str]) -> str | None:
    """HALF or LOST, or None if all is well after a kill."""
    there = digest(at / verb.output)
    there = {name: data for name, data in there.items() if ".welore-" not in name}  # files in work
    if verb.command[0] == "report" and "report.html" not in there:
        return None  # the figures of a page that is written last
    if not verb.resumable and there not in ({}, old, good.result):
        return "HALF"
    if old and old not in map(digest, at.iterdir()) and good.result not in map(digest, at.iterdir()):
        return "LOST"
    return None


def next_commands(verb: Verb, at: Path) -> list[list[str]]:
    """What a user gives after a kill: the same; of a run that has begun with --resume."""
    if not verb.resumable or not (at / verb.output).exists():
        return [verb.command]
    return [[*(word for word in verb.command if word != "--overwrite"), "--resume"], verb.command]


def again(verb: Verb, at: Path) -> zygote.Answer:
    """The answer of the first command after a kill that is not refused."""
    for command in next_commands(verb, at):
        answer = zygote.run(command, at, seconds=LONG)
        done = "exists already" in answer.err or "is finished" in answer.err
        if done and judge(answer) == "refused" and not verb.old:
            answer.status = 0
        if judge(answer) != "refused" or answer.status == 0:
            break
    return answer


CASES = {name: case(name, verb) for name, verb in VERBS.items()}

if __name__ == "__main__":
    sys.exit(campaign(CASES, materials.prepare, __doc__))
