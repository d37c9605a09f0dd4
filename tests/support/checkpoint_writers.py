"""Two live processes that save to one folder, round after round, for tests and benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_calql.checkpoints.integrity import write_manifest
from rllib_calql.checkpoints.reading import CheckpointFiles, read_of_one_save, replaced_folder
from rllib_calql.system.file_lock import LockedError

FILES = (
    "class_and_ctor_args.pkl",
    "rllib_checkpoint.json",
    "learner_group/state.pkl",
    "learner_group/learner/state.pkl",
    "learner_group/learner/rl_module/default_policy/module_state.pkl",
    "algorithm_state.pkl",
)


@dataclass
class Outcome:
    """What the rounds came to.

    Attributes:
        num_saved: Saves that returned.
        refusals: Messages of those that were refused.
        wrong: What should never be: mixed or missing checkpoints, other errors.
    """

    num_saved: int = 0
    refusals: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def save_generation(target: Path, generation: str, pause: Callable[[], None] = lambda: None) -> None:
    """Saves what stands for a checkpoint: every file says which one it is of."""
    with replaced_folder(target) as folder:
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(generation)
            pause()
        write_manifest(folder, {"versions": {}, "generation": generation})


def generation_of(target: Path) -> str:
    """The one save that all files are of, as a reader without any lock finds them.

    Raises:
        ValueError: If they are of several saves, or not complete.
    """

    def read(files: CheckpointFiles) -> str:
        found = {(Path(files.path) / name).read_text() for name in FILES} | {files.manifest()["generation"]}
        if len(found) != 1:
            raise ValueError(f"mixed: {sorted(found)}")
        return found.pop()

    return read_of_one_save(target, None, read)


def _write(target: Path, writer: int, rounds: int, start: Any, save: Callable[[Path, str], None], queue: Any) -> None:
    outcome = Outcome()
    for number in range(rounds):
        start.wait(60)
        try:
            save(target, f"{writer}-{number}")
            outcome.num_saved += 1
        except LockedError as err:
            outcome.refusals.append(str(err))
        except Exception as err:
            outcome.wrong.append(f"writer {writer}: {type(err).__name__}: {err}")
        start.wait(60)
    queue.put(outcome)


def _save_slowly(target: Path, generation: str) -> None:
    rng = random.Random(generation)
    save_generation(target, generation, lambda: os.sched_yield() if rng.random() < 0.5 else None)


def _counters_of(target: Path) -> str:
    """The manifest of a real checkpoint, whose files must all be as it says, and whose counters those of the state."""

    def read(files: CheckpointFiles) -> str:
        manifest, own = files.manifest(), files.read("algorithm_state.pkl")["calql"]
        counters = {name: number for name, number in own.items() if name.startswith("num_")}
        num_updates = int(files.learner_state()["calql"]["num_updates"])
        if any(manifest[name] != number for name, number in counters.items()):
            raise ValueError(f"mixed: {counters} beside {manifest}")
        if num_updates != own["num_offline_updates_lifetime"] + own["num_online_updates_lifetime"]:
            raise ValueError(f"mixed: {counters} beside a learner of {num_updates} updates")
        return str(manifest["save"])

    return read_of_one_save(target, None, read)


def race_of_algorithms(target: Path, rounds: int, save: Callable[[Path, str], None]) -> Outcome:
    """As `race`, with real checkpoints."""
    return race(target, rounds, save=save, read=_counters_of)


def race(
    target: Path,
    rounds: int,
    *,
    save: Callable[[Path, str], None] = _save_slowly,
    read: Callable[[Path], str] = generation_of,
) -> Outcome:
    """Both save at once in every round, while this process reads; afterwards there is one whole checkpoint of it."""
    context = multiprocessing.get_context("spawn")
    start, queue = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_write, args=(target, writer, rounds, start, save, queue), daemon=True)
        for writer in (1, 2)
    ]
    for process in processes:
        process.start()
    wrong, last = [], ""
    for number in range(rounds):
        start.wait(120)
        for is_over in (False, True):
            if is_over:
                start.wait(120)
            try:
                found = read(target)
            except FileNotFoundError as err:
                if number or is_over:
                    wrong.append(f"round {number}: {err}")
            except Exception as err:
                wrong.append(f"round {number}: {type(err).__name__}: {err}")
            else:
                if is_over and found == last:
                    wrong.append(f"round {number}: nobody saved, the checkpoint is {found}")
                last = found if is_over else last
    outcomes = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    return Outcome(
        num_saved=sum(outcome.num_saved for outcome in outcomes),
        refusals=[message for outcome in outcomes for message in outcome.refusals],
        wrong=wrong + [message for outcome in outcomes for message in outcome.wrong],
    )
