"""Cal-QL of d3rlpy beside this package's: the same data, sizes and work, in turn, wall time and processor time.

    python tests/benchmarks/peers.py --output peers.json

makes a virtual environment for d3rlpy in `--environment` (it asks for another Gymnasium), unless it is there already.
Each program is a process of its own with two threads that waits while the other one works. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

PACKAGES = ("torch>=2.6,<2.14", "d3rlpy==2.8.1")
OBS_DIM, ACTION_DIM, NUM_ROWS, EPISODE_LENGTH = 29, 8, 20_000, 200
# Rows of a batch, actions per source; two hidden layers of 256 each.
SIZES = {"batch 256, 10 actions": (256, 10), "batch 128, 4 actions": (128, 4)}
OURS, PEER = "rllib_calql", "d3rlpy"


class FreeEnv(gym.Env):  # type: ignore[type-arg]
    """A random process; a step costs next to nothing."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (OBS_DIM,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        self._time = 0
        return self.np_random.normal(size=OBS_DIM).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Goes on to a random state."""
        self._time += 1
        obs = self.np_random.normal(size=OBS_DIM).astype(np.float32)
        return obs, -0.05, False, self._time >= EPISODE_LENGTH, {}


def write_data(path: Path) -> None:
    """Episodes without an end of their own. Their returns lie around -4, so that few rows are bound at first."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(NUM_ROWS + 1, OBS_DIM)).astype(np.float32)
    np.savez(
        path,
        observations=obs[:-1],
        next_observations=obs[1:],
        actions=rng.uniform(-0.9, 0.9, (NUM_ROWS, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(-0.05, 0.2, NUM_ROWS).astype(np.float32),
        terminals=np.zeros(NUM_ROWS, bool),
        timeouts=np.arange(NUM_ROWS) % EPISODE_LENGTH == EPISODE_LENGTH - 1,
    )


# --- The programs, each in a process of its own ----------------------------------------------------------------------


def ours(data: str, batch_size: int, num_actions: int) -> tuple[Callable[[int], None], Callable[[int, int], None]]:
    """This package: makes updates; runs both phases."""
    import ray

    from rllib_calql import CalQLConfig

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

    def config(num_offline: int, per_iteration: int) -> Any:
        made = CalQLConfig().environment(FreeEnv).offline_data(input_=data).debugging(seed=0)
        made.training(train_batch_size_per_learner=batch_size, num_actions=num_actions, max_target_backup=False)
        made.rl_module(model_config={"actor_hiddens": [256, 256], "critic_hiddens": [256, 256]})
        made.fine_tuning(offline_updates=num_offline, updates_per_iteration=per_iteration, mixing_ratio=0.5)
        return made

    algos: dict[int, Any] = {}

    def update(num_updates: int) -> None:
        if num_updates not in algos:
            algos[num_updates] = config(10**9, num_updates).build()
        algos[num_updates].train()

    def both_phases(num_updates: int, num_env_steps: int) -> None:
        algo = config(num_updates, num_updates).build()
        while algo.num_online_env_steps < num_env_steps or algo.phase == "offline":
            algo.train()
        algo.stop()

    return update, both_phases


def of_d3rlpy(data: str, batch_size: int, num_actions: int) -> tuple[Callable[[int], None], Callable[[int, int], None]]:
    """d3rlpy: the same."""
    import d3rlpy

    columns = dict(np.load(data))
    dataset = d3rlpy.dataset.MDPDataset(
        *(columns[name] for name in ("observations", "actions", "rewards", "terminals")), timeouts=columns["timeouts"]
    )
    hidden = d3rlpy.models.VectorEncoderFactory([256, 256])
    quiet = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}

    def algorithm() -> Any:
        made = d3rlpy.algos.CalQLConfig(
            batch_size=batch_size,
            n_action_samples=num_actions,
            actor_encoder_factory=hidden,
            critic_encoder_factory=hidden,
            alpha_learning_rate=0.0,  # A constant weight.
        ).create(device=False)
        made.build_with_dataset(dataset)
        return made

    updated = algorithm()

    def update(num_updates: int) -> None:
        updated.fit(dataset, n_steps=num_updates, n_steps_per_epoch=num_updates, save_interval=2, **quiet)

    def both_phases(num_updates: int, num_env_steps: int) -> None:
        env, algo = FreeEnv(), algorithm()
        algo.fit(dataset, n_steps=num_updates, n_steps_per_epoch=num_updates, save_interval=2, **quiet)
        online = d3rlpy.dataset.create_fifo_replay_buffer(limit=100_000, env=env)
        both = d3rlpy.dataset.MixedReplayBuffer(online, dataset, secondary_mix_ratio=0.5)
        # It can update after the first episode only: then it makes more at each step, as many as there are env steps.
        after_first = {"update_start_step": EPISODE_LENGTH, "n_updates": updates_per_later_step(num_env_steps)}
        steps = {"n_steps": num_env_steps, "n_steps_per_epoch": num_env_steps, **after_first}
        algo.fit_online(env, both, save_interval=2, **steps, **quiet)

    return update, both_phases


def updates_per_later_step(num_env_steps: int) -> int:
    """Updates at each env step after the first episode, if there are as many as env steps in all.

    Raises:
        ValueError: If it is no whole number.
    """
    num_later = num_env_steps - EPISODE_LENGTH
    if num_later < 1 or num_env_steps % num_later:
        raise ValueError(
            f"Env steps must be a multiple of those after the first episode, such as {2 * EPISODE_LENGTH}, got "
            f"{num_env_steps}."
        )
    return num_env_steps // num_later


def work(name: str, size: str, data: str) -> None:
    """Does what each line of standard input asks for, and answers by a line with its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print goes elsewhere.
    update, both_phases = {OURS: ours, PEER: of_d3rlpy}[name](data, *SIZES[size])
    for line in sys.stdin:
        job = json.loads(line)
        wall, processor = time.perf_counter(), time.process_time()
        if job["env_steps"]:
            both_phases(job["updates"], job["env_steps"])
        else:
            update(job["updates"])
        seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        print(json.dumps(seconds), file=answers, flush=True)


# --- The driver ------------------------------------------------------------------------------------------------------


class Program:
    """A process that works when it is asked to.

    Args:
        python: Interpreter of its environment.
        arguments: See `work`.
        log: Where its other output goes.
    """

    def __init__(self, python: Path, arguments: tuple[str, ...], log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(python), __file__, "--work", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2", "RAY_worker_niceness": "0"},
        )

    def do(self, updates: int, env_steps: int = 0) -> dict[str, float]:
        """Seconds that the work takes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"updates": updates, "env_steps": env_steps}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"It ended, and said:\n{Path(self._log.name).read_text()[-3000:]}")
        seconds: dict[str, float] = json.loads(answer)
        return seconds

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=60)
        self._log.close()


def environment_of_peer(folder: Path) -> Path:
    """The interpreter of d3rlpy's environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if (
        not python.exists()
        or subprocess.run([python, "-c", "import d3rlpy"], capture_output=True, check=False).returncode
    ):
        print(f"Installing d3rlpy in {folder} ...", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def compare(programs: dict[str, Program], job: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds of all rounds, in turn after a warm-up each, and d3rlpy's divided by ours, round by round."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            taken = program.do(*job)
            if turn:
                seconds[name].append(taken)
    found: dict[str, Any] = {"updates": job[0], "env_steps": job[1], "seconds": seconds}
    for kind in ("wall", "processor"):
        pairs = zip(seconds[PEER], seconds[OURS], strict=True)
        ratios = sorted(peer[kind] / mine[kind] for peer, mine in pairs)
        found[f"times_{kind}"] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    return found


def row(size: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    cells = []
    for name in (OURS, PEER):
        for kind in ("wall", "processor"):
            seconds = statistics.median(taken[kind] for taken in found["seconds"][name])
            per_update = f"{1e3 * seconds / found['updates']:.1f} ms"
            cells.append(f"{seconds:.1f} s" if found["env_steps"] else per_update)
    for kind in ("wall", "processor"):
        times = found[f"times_{kind}"]
        cells.append(f"{times['median']:.2f} ({times['least']:.2f} to {times['most']:.2f})")
    what = f"{found['updates']} updates"
    what += f", {found['env_steps']} env steps with an update each" if found["env_steps"] else ""
    return f"| {size}: {what} | {' | '.join(cells)} |"


def main() -> None:
    """Runs the benchmark, or one of its programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "rllib_calql" / "d3rlpy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--env-steps", type=int, default=400)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    updates_per_later_step(options.env_steps)
    pythons = {OURS: Path(sys.executable), PEER: environment_of_peer(options.environment)}
    result: dict[str, Any] = {}
    print(f"| | {OURS}: wall | processor | {PEER}: wall | processor | times, wall | times, processor |")
    print(f"|{' --- |' * 7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        write_data(data)
        for size in SIZES:
            programs = {
                name: Program(python, (name, size, str(data)), Path(folder) / f"{name}.log")
                for name, python in pythons.items()
            }
            try:
                for job in ((options.updates, 0), (options.updates, options.env_steps)):
                    found = compare(programs, job, options.rounds)
                    result.setdefault(size, []).append(found)
                    print(row(size, found), flush=True)
                    if options.output:
                        options.output.write_text(json.dumps(result, indent=2))
            finally:
                for program in programs.values():
                    program.close()


if __name__ == "__main__":
    main()
