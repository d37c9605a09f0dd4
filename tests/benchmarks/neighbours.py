"""Gradient updates on a quiet machine, beside busy programs, and of two learners side by side.

    python tests/benchmarks/neighbours.py --output neighbours.json
    python tests/benchmarks/neighbours.py --other ../an-earlier-checkout

The other checkout of this project is measured in turn with this one. Each program is a process of its own that waits
while another is measured; a neighbour is a loop that never waits, one for each core. Medians of milliseconds per
update through `learner.update`, wall and processor time, with quarters. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OBS_DIM, ACTION_DIM = 29, 8
SETTLED = 3  # Calls before measuring.


class Size:
    """Sizes of an update, as they stand in the table."""

    def __init__(self, text: str) -> None:
        self.batch, self.actions, self.layers = map(int, text.split(","))
        self.text = text

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.actions} actions, {self.layers} layers"

    @property
    def updates_per_call(self) -> int:
        """So many that a call takes about 0.4 s on two cores."""
        return min(100, max(2, 80_000 // (self.batch * (3 * self.actions + 1) * self.layers)))


def serve(text: str, num_threads: int) -> None:
    """Makes the updates of one call for each line that comes in, and prints what each took."""
    import gymnasium as gym
    import torch
    from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

    from rllib_calql import CalQLConfig

    size = Size(text)
    torch.set_num_threads(num_threads)
    config = CalQLConfig().debugging(seed=0)
    config.training(num_actions=size.actions, train_batch_size_per_learner=size.batch)
    config.rl_module(model_config={"critic_hiddens": [256] * size.layers})
    spaces = (gym.spaces.Box(-9.0, 9.0, (OBS_DIM,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32))
    learner = config.build_learner(spaces={"default_policy": spaces})
    rng, num = np.random.default_rng(0), size.updates_per_call * size.batch
    columns = {
        "obs": rng.normal(size=(num, OBS_DIM)),
        "new_obs": rng.normal(size=(num, OBS_DIM)),
        "actions": rng.uniform(-0.9, 0.9, size=(num, ACTION_DIM)),
        "rewards": rng.normal(size=num),
        "returns_to_go": rng.normal(size=num) - 1.5,  # So that 5 to 10 % of the policy's actions are bound.
        "terminateds": np.zeros(num),
        "is_offline": np.ones(num),
    }
    rows = SampleBatch({name: values.astype(np.float32) for name, values in columns.items()})

    def update() -> tuple[float, float]:
        batch = MultiAgentBatch({"default_policy": rows}, num)
        wall, processor = time.perf_counter(), time.process_time()
        learner.update(batch=batch, minibatch_size=size.batch, timesteps={})
        per_update = 1e3 / size.updates_per_call
        return (time.perf_counter() - wall) * per_update, (time.process_time() - processor) * per_update

    for _ in range(SETTLED):
        update()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(update()), flush=True)


class Program:
    """A process that updates when it is asked to."""

    def __init__(self, checkout: Path, size: Size, num_threads: int) -> None:
        command = [sys.executable, __file__, "--work", size.text, str(num_threads)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        environment.pop("OMP_NUM_THREADS", None)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for line in self._out:
            if line.strip() == "ready":
                break

    @property
    def _out(self) -> Any:
        return self._process.stdout

    def begin(self) -> None:
        """Asks for one call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> tuple[float, float]:
        """Milliseconds of an update in that call, wall and processor time."""
        wall, processor = json.loads(self._out.readline())
        return wall, processor

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """So many loops that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def in_turn(checkouts: Sequence[Path], size: Size, rounds: int, num_neighbours: int) -> list[dict[str, Any]]:
    """Rows of the table: each checkout, with and without neighbours."""
    num_threads = len(os.sched_getaffinity(0))
    programs = [Program(checkout, size, num_threads) for checkout in checkouts]
    rows = []
    try:
        for neighbours in (0, num_neighbours):
            with busy(neighbours):
                calls: list[list[tuple[float, float]]] = [[] for _ in programs]
                for _ in range(max(3, rounds // 3) if neighbours else rounds):  # Which may take very long.
                    for program, found in zip(programs, calls, strict=True):
                        program.begin()
                        found.append(program.end())
            for checkout, found in zip(checkouts, calls, strict=True):
                of_first = [one / other for (one, _), (other, _) in zip(calls[-1], found, strict=True)]
                row = {"size": size.text, "neighbours": neighbours, "checkout": checkout.name, **summary(found)}
                rows.append({**row, "speed": statistics.median(of_first)})
    finally:
        for program in programs:
            program.stop()
    return rows


def two_learners(checkout: Path, size: Size, rounds: int) -> dict[str, Any]:
    """Updates per second of two processes with one thread each, relative to one of them alone; as Tune runs trials."""
    programs = [Program(checkout, size, 1) for _ in range(2)]
    try:
        alone, together = [], []
        for _ in range(rounds):
            programs[0].begin()
            alone.append(programs[0].end())
            for program in programs:
                program.begin()
            together += [program.end() for program in programs]
    finally:
        for program in programs:
            program.stop()
    gain = 2.0 * statistics.median(wall for wall, _ in alone) / statistics.median(wall for wall, _ in together)
    return {"size": size.text, "alone": summary(alone), "together": summary(together), "gain": gain}


def summary(calls: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians and quarters."""
    walls = [wall for wall, _ in calls]
    low, _, high = statistics.quantiles(walls, n=4)
    processor = statistics.median(processor for _, processor in calls)
    return {"wall_ms": statistics.median(walls), "quarters_ms": [low, high], "processor_ms": processor}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.add_argument("--other", type=Path, action="append", default=[], help="Another checkout; may be repeated.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--size",
        action="append",
        help="Batch, actions per source and hidden layers, such as 256,10,2; may be repeated.",
    )
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        serve(options.work[0], int(options.work[1]))
        return
    own = Path(__file__).resolve().parents[2]
    checkouts = [own, *(other.resolve() for other in options.other)]
    sizes = [Size(text) for text in options.size or ("256,10,2", "256,10,4", "128,4,2", "8,4,2")]
    found: dict[str, Any] = {"updates": [], "two_learners": []}
    print("speed is that of a checkout relative to the last one's, median of pairs\n")
    for size in sizes:
        for row in in_turn(checkouts, size, options.rounds, len(os.sched_getaffinity(0))):
            found["updates"].append(row)
            low, high = row["quarters_ms"]
            print(
                f"{size}, {row['neighbours']} neighbours, {row['checkout']}: {row['wall_ms']:.2f} ms "
                f"[{low:.2f}, {high:.2f}], processor {row['processor_ms']:.2f} ms, speed {row['speed']:.2f}",
                flush=True,
            )
        both = two_learners(own, size, options.rounds)
        found["two_learners"].append(both)
        print(
            f"{size}, two learners with a thread each: {both['together']['wall_ms']:.2f} ms, alone "
            f"{both['alone']['wall_ms']:.2f} ms, together {both['gain']:.2f} times one",
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
