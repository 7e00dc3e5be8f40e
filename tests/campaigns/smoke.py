"""A little of every campaign, in one process: a test of the gate runs it."""

import sys

import faults
import kills
import materials
import mutations
from zygote import campaign

CHOSEN = {
    "mutate": (mutations.CASES, "header index spectra compressed report unfinished task text reference options"),
    "kill": (kills.CASES, "allocate compress merge evaluate"),
    "fault": (faults.CASES, "neighbours streams changed"),
}
CASES = {f"{way}-{name}": cases[name] for way, (cases, names) in CHOSEN.items() for name in names.split()}

if __name__ == "__main__":
    sys.exit(campaign(CASES, materials.prepare, __doc__))
