"""Checkpoints under attack: two writers of one folder, and damage to every file; and what saving costs.

    python tests/benchmarks/checkpoint_damage.py --rounds 200 --bits 20

* Two live processes save to one folder in every round, while a third reads it: once whole checkpoints of small files,
  once those of an algorithm. Never may a reader find a mixed or missing checkpoint, nor a round end without a new one.
* Every file of a checkpoint is removed, emptied, cut in half, and has single bits flipped. Every restore must end in an
  error that names the file, with the algorithm as it was, or in exactly the state saved.
* `--save-mib 0 100` prints milliseconds per save with that much online data, for comparisons in turn with other code.

Exits 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny import line_config

from rllib_calql import CalQL

_ALGORITHM: list[CalQL] = []


def small_algorithm(folder: Path) -> CalQL:
    """A learner of a few weights that has begun its online phase."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    algo = line_config(folder, offline_updates=3, updates_per_iteration=3).build()
    algo.train()
    algo.train()
    return algo


def save_algorithm(target: Path, generation: str) -> None:
    """A save of an algorithm of this process, which goes on between saves."""
    if not _ALGORITHM:
        _ALGORITHM.append(small_algorithm(Path(tempfile.mkdtemp())))
    _ALGORITHM[0].train()
    _ALGORITHM[0].save_to_path(target)


def milliseconds_per_save(folder: Path, *, mib: int, times: int) -> list[float]:
    """Durations of saves with this much online data, the first ones left out."""
    algo = small_algorithm(folder)
    state = algo.store.get_state(with_online=True)
    columns = state["online"]["columns"]
    repeats = max(mib * 2**20 // sum(column.nbytes for column in columns.values()), 1)
    state["online"]["columns"] = {name: np.concatenate([column] * repeats) for name, column in columns.items()}
    algo.store.get_state = lambda with_online: state  # type: ignore[method-assign]
    durations = []
    for _ in range(times + 2):
        begin = time.perf_counter()
        algo.save_to_path(folder / "saved")
        durations.append(1e3 * (time.perf_counter() - begin))
    algo.stop()
    return durations[2:]


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--bits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-mib", type=int, nargs="*", default=[])
    parser.add_argument("--saves", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.save_mib:
            for mib in arguments.save_mib:
                taken = milliseconds_per_save(folder, mib=mib, times=arguments.saves)
                print(f"{mib} MiB: median {statistics.median(taken):.1f} ms, least {min(taken):.1f} ms")
            return
        from checkpoint_writers import race, race_of_algorithms
        from damaged_checkpoints import damage_every_file, files_of, state_of

        wrong = []
        for kind, outcome in (
            ("small files", race(folder / "files", arguments.rounds)),
            ("an algorithm", race_of_algorithms(folder / "algorithms", arguments.rounds, save_algorithm)),
        ):
            refused = len(outcome.refusals)
            print(f"{arguments.rounds} rounds of {kind}: {outcome.num_saved} saved, {refused} refused, {outcome.wrong}")
            wrong += outcome.wrong
        algo = small_algorithm(folder)
        checkpoint = Path(algo.save_to_path(folder / "checkpoint"))
        saved = state_of(algo)
        algo.train()
        trials = damage_every_file(algo, checkpoint, saved, num_bits=arguments.bits, seed=arguments.seed)
        algo.stop()
        num_files = len(files_of(checkpoint))
        print(
            f"{num_files} files: {trials.num_named} damages named, {trials.num_exact} exact, {len(trials.wrong)} wrong"
        )
        wrong += trials.wrong
    print("\n".join(wrong) or "All checks passed.", flush=True)
    os._exit(bool(wrong))  # Ray's own end takes seconds.


if __name__ == "__main__":
    main()
