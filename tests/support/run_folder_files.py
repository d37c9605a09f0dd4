"""Files as runs leave them in their folders, and a process that holds such a folder."""

from __future__ import annotations

from pathlib import Path

TRIAL = "CalQL_Pendulum-v1_82950_00000_0_2026-11-28_04-02-21"


# What a run of the command left, listed by hand.
OF_A_RUN = (
    "tuner.pkl",
    ".validate_storage_marker",
    "basic-variant-state-2026-11-28_04-02-20.json",
    "experiment_state-2026-11-28_04-02-20.json",
    "rllib_calql_state.zip",
    f"{TRIAL}/params.json",
    f"{TRIAL}/params.pkl",
    f"{TRIAL}/result.json",
    f"{TRIAL}/progress.csv",
    f"{TRIAL}/events.out.tfevents.1795838548.vm",
    f"{TRIAL}/checkpoint_000000/algorithm_state.pkl",
    f"{TRIAL}/checkpoint_000000/learner_group/learner/state.pkl",
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


HOLDER = """
import sys
from pathlib import Path
from rllib_calql.system.file_lock import held_lock
with held_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
