"""A little of every campaign, in one process: a test of the gate runs it."""

import sys

import faults
import kills
import materials
import mutations
from zygote import campaign

CHOSEN = {
    "mutate": (mutations.CASES, "config header layout spectra plan compressed report unfinished text settings"),
    "kill": (kills.CASES, "allocate compress merge finetune"),
    "fault": (faults.CASES, "own_input neighbours odd_output streams"),
}
CASES = {f"{way}-{name}": cases[name] for way, (cases, names) in CHOSEN.items() for name in names.split()}

if __name__ == "__main__":
    sys.exit(campaign(CASES, materials.prepare, __doc__))
