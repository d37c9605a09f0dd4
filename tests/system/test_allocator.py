"""Memory that an update frees is reused by the next one, not fetched from the kernel again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from rllib_calql.system.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    blocks = [np.ones(2**20) for _ in range(8)]  # 8 MiB each, larger than what stays by default.
for _ in range(3):
    work()
before = faults()
for _ in range(20):
    work()
print(kept, faults() - before)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


def run(argument: str, **variables: str) -> tuple[bool, int]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    out = subprocess.run([sys.executable, "-c", PROGRAM, argument], env=env, check=True, capture_output=True, text=True)
    kept, faults = out.stdout.split()
    return kept == "True", int(faults)


def test_freed_memory_is_kept() -> None:
    kept, faults = run("keep")
    assert kept
    _, faults_without = run("leave")
    assert faults_without > 20 * 8 * 8 * 2**20 // 2**21  # More than one per huge page: it was fetched anew.
    assert faults < faults_without // 20


def test_the_users_own_settings_win() -> None:
    assert not run("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0]
