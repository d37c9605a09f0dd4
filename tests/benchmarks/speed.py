"""All speeds in one run: updates, sampling, env steps, both phases, loading. Prints tables and writes JSON.

Each beside the same work by plain PyTorch or NumPy, and by RLlib's CQL where it does that work. Takes 20 minutes on
two cores; keep the machine quiet meanwhile.

    python tests/benchmarks/speed.py --output speed.json
    python tests/benchmarks/speed.py --parts sampling env_steps
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import loading
import numpy as np
import ray
import torch
import updates
from bare_torch import BareCalQL
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.cql import CQLConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from updates import ACTION_DIM, BATCH_SIZE, OBS_DIM

from rllib_calql import CalQLConfig
from rllib_calql.collection.requests import collect

ROUNDS = 5
EPISODE_LENGTH = 200


class FreeEnv(updates.BoxEnv):
    """The benchmark's spaces; a step costs next to nothing."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode."""
        gym.Env.reset(self, seed=seed)
        self.t = 0
        return self.np_random.normal(size=OBS_DIM).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Goes on to a random state."""
        self.t += 1
        obs = self.np_random.normal(size=OBS_DIM).astype(np.float32)
        return obs, float(action[0]), False, self.t >= EPISODE_LENGTH, {}


def in_turn(programs: dict[str, Callable[[], float]], unit: str) -> dict[str, float]:
    """Medians of the rates that the programs return, run in turn after a warm-up each; prints them."""
    rates: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, program in programs.items():
            rate = program()
            if turn:
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:44}{rate:14,.0f} {unit}")
    return medians


def rate_of(work: Callable[[], Any], amount: float) -> float:
    """Amount of work per second."""
    begin = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begin)


def data_and_env(path: Path, **fine_tuning: Any) -> CalQLConfig:
    """Ours at the benchmark's sizes, in this process."""
    config = updates.calql_config(path, 100).environment(FreeEnv)
    config.fine_tuning(**fine_tuning)
    return config


def measure_updates(path: Path) -> dict[str, Any]:
    """Gradient steps, every precision, critics of 2 and 4 layers."""
    options = argparse.Namespace(
        rounds=ROUNDS, steps=60, stock_steps=12, precisions=updates.PRECISIONS, batch_size=BATCH_SIZE
    )
    return {f"{depth} layers": updates.report(depth, updates.measure(path, depth, options)) for depth in (2, 4)}


def measure_sampling(path: Path) -> dict[str, float]:
    """Rows per second out of the store, half of them offline."""
    algo = data_and_env(path, offline_updates=10**9).build()
    store, num_batches = algo.store, 50
    rng = np.random.default_rng(0)
    columns = {
        "obs": rng.normal(size=(20_000, OBS_DIM)).astype(np.float32),
        "new_obs": rng.normal(size=(20_000, OBS_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(20_000, ACTION_DIM)).astype(np.float32),
        **{name: np.zeros(20_000, np.float32) for name in ("rewards", "terminateds", "returns_to_go")},
    }
    store.add_online(columns)
    buffer = EpisodeReplayBuffer(capacity=20_000)
    for start in range(0, 20_000, EPISODE_LENGTH):
        rows = slice(start, start + EPISODE_LENGTH)
        observations = [*columns["obs"][rows], columns["new_obs"][rows][-1]]
        actions, rewards = list(columns["actions"][rows]), list(columns["rewards"][rows])
        lookback = 0
        episode = SingleAgentEpisode(
            observations=observations, actions=actions, rewards=rewards, truncated=True, len_lookback_buffer=lookback
        )
        buffer.add(episode.to_numpy())

    def ours() -> float:
        half = BATCH_SIZE // 2
        sample = lambda: store.sample(num_batches=num_batches, batch_size=BATCH_SIZE, num_offline_rows=half)  # noqa: E731
        return rate_of(sample, num_batches * BATCH_SIZE)

    def plain() -> float:
        def sample() -> None:
            rows = rng.integers(20_000, size=num_batches * BATCH_SIZE)
            for column in columns.values():
                column[rows]

        return rate_of(sample, num_batches * BATCH_SIZE)

    rates = in_turn(
        {
            "CalQL's store, half of each batch offline": ours,
            "one NumPy index per column": plain,
            "RLlib's episode buffer": lambda: rate_of(lambda: buffer.sample(BATCH_SIZE, n_step=1), BATCH_SIZE),
        },
        "rows/s",
    )
    algo.stop()
    return rates


def plain_env_loop(program: BareCalQL, env: gym.Env[Any, Any], num_steps: int) -> list[tuple[Any, ...]]:
    """Steps an environment with the policy, and returns transitions."""
    transitions = []
    obs, _ = env.reset(seed=0)
    for _ in range(num_steps):
        with torch.no_grad():
            action = program.sample(torch.from_numpy(obs).unsqueeze(0), 1)[0][0, 0].numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        transitions.append((obs, action, reward, next_obs, float(terminated)))
        obs = next_obs if not (terminated or truncated) else env.reset()[0]
    return transitions


def measure_env_steps(path: Path) -> dict[str, float]:
    """Env steps per second of one runner in this process, policy of two layers of 256 included."""

    def runner_of(config: AlgorithmConfig, num_envs: int) -> SingleAgentEnvRunner:
        config.environment(FreeEnv).env_runners(num_envs_per_env_runner=num_envs)
        return SingleAgentEnvRunner(config=config)

    def ours(num_envs: int) -> Callable[[], float]:
        runner, num_steps = runner_of(CalQLConfig(), num_envs), 500 * num_envs
        task = {"seed": 0, "num_env_steps": num_steps, "random_actions": False}
        return lambda: rate_of(lambda: collect(runner, **task), num_steps)

    def stock(num_envs: int) -> Callable[[], float]:
        runner, num_steps = runner_of(CQLConfig(), num_envs), 500 * num_envs
        return lambda: rate_of(lambda: runner.sample(num_timesteps=num_steps, explore=True), num_steps)

    program, env = BareCalQL(OBS_DIM, ACTION_DIM, (256, 256)), FreeEnv()
    programs = {"plain PyTorch loop": lambda: rate_of(lambda: plain_env_loop(program, env, 500), 500)}
    for num_envs in (1, 8):
        programs[f"CalQL, {num_envs} environments a runner"] = ours(num_envs)
        programs[f"RLlib's CQL, {num_envs} environments a runner"] = stock(num_envs)
    return in_turn(programs, "env steps/s")


def measure_phases(path: Path) -> dict[str, float]:
    """Seconds of 200 offline updates, then 400 env steps with one update each, half of each batch offline."""
    num_offline, num_online = 200, 400
    program = BareCalQL(OBS_DIM, ACTION_DIM, (256, 256))

    def ours() -> float:
        config = data_and_env(path, offline_updates=num_offline, updates_per_iteration=100, updates_per_env_step=1)
        algo = config.env_runners(num_env_runners=0).build()
        begin = time.perf_counter()
        while algo.num_online_env_steps < num_online:
            algo.train()
        seconds = time.perf_counter() - begin
        algo.stop()
        return seconds

    algo = data_and_env(path, offline_updates=10**9).build()
    offline = {name: torch.from_numpy(algo.store.offline_column(name).copy()) for name in algo.store._batch_columns}
    algo.stop()

    def batch_of(num_rows: int, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = torch.randint(len(columns["rewards"]), (num_rows,))
        return {name: column[rows] for name, column in columns.items()}

    def plain() -> float:
        begin = time.perf_counter()
        for _ in range(num_offline):
            program.step(batch_of(BATCH_SIZE, offline))
        env = FreeEnv()
        for _ in range(num_online // EPISODE_LENGTH):
            steps = zip(*plain_env_loop(program, env, EPISODE_LENGTH), strict=True)
            arrays = [torch.from_numpy(np.asarray(values, dtype=np.float32)) for values in steps]
            online = dict(zip(("obs", "actions", "rewards", "new_obs", "terminateds"), arrays, strict=True))
            online["returns_to_go"] = online["rewards"].flip(0).cumsum(0).flip(0)
            for _ in range(EPISODE_LENGTH):
                halves = [batch_of(BATCH_SIZE // 2, columns) for columns in (offline, online)]
                program.step({name: torch.cat([half[name] for half in halves]) for name in online})
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {"CalQL": [], "plain PyTorch": []}
    for turn in range(4):
        for name, run in (("CalQL", ours), ("plain PyTorch", plain)):
            value = run()
            if turn:
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:44}{value:14.1f} s")
    print("(RLlib's CQL has no online phase.)")
    return medians


PARTS: dict[str, Callable[[Path], Any]] = {
    "updates": measure_updates,
    "sampling": measure_sampling,
    "env_steps": measure_env_steps,
    "phases": measure_phases,
    "loading": lambda _: loading.compare_formats(1_000_000, 20_000),
}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "python": platform.python_version(),
    }
    print(results)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        updates.write_rows(path, 20_000)
        for part in options.parts:
            print(f"\n== {part.replace('_', ' ')}", flush=True)
            if part != "loading":  # Which starts processes of its own.
                ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
            results[part] = PARTS[part](path)
            gc.collect()  # Ray Data complains about iterators that outlive Ray.
            ray.shutdown()
            if options.output:
                options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
