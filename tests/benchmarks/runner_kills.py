"""SIGKILLs of env runners during fine-tuning: the run ends with the success rate of one that nobody disturbed.

The main job's settings with asynchronous collection, two env runners and a simulator slowed down, so that env runners
are what the run waits for. Both runs begin with the same pre-trained networks and have the same seed. In one of them a
random runner is killed at every interval; the other makes as many env steps. Prints a table and writes JSON; exits 1 if
a check failed or the success rates differ.

    python tests/benchmarks/runner_kills.py --seconds 180 --interval 20 --output runner_kills.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.datasets.generated.pointmaze import evaluation_env_config, evaluation_env_id

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "pointmaze_umaze.py"
NUM_RUNNERS = 2
TIME_LIMIT = 300  # Env steps of an episode without success.
SECONDS_TO_RECOVER = 120.0
Z = 1.959964  # Of a 95 % interval.

Interval = tuple[float, float]


class SlowMaze(gym.Wrapper):  # type: ignore[type-arg]
    """The main job's environment, with `step_s` seconds of sleep in every step."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(gym.make(evaluation_env_id("umaze"), **evaluation_env_config("umaze")))
        self._step_s = config["step_s"]

    def step(self, action: np.ndarray) -> Any:
        """Sleeps, then steps."""
        time.sleep(self._step_s)
        return self.env.step(action)


def base_config(num_episodes: int, seed: int) -> CalQLConfig:
    """The main job. It is evaluated on demand only, and a rate is that of all episodes asked for."""
    config: CalQLConfig = runpy.run_path(str(EXAMPLE))["config"].copy(copy_frozen=False)
    config.evaluation(evaluation_interval=10**9, evaluation_duration=num_episodes)
    config.reporting(metrics_num_episodes_for_smoothing=num_episodes)
    config.debugging(seed=seed)
    return config


def evaluate(algo: CalQL) -> int:
    """Successes of the greedy policy."""
    results = algo.evaluate()["env_runners"]
    assert results["num_episodes"] == algo.config.evaluation_duration
    return round(results["success_rate"] * results["num_episodes"])


def pretrain(config: CalQLConfig, folder: Path) -> int:
    """Makes the offline updates, writes a checkpoint and returns the successes."""
    config.env_runners(num_env_runners=0)
    algo = config.build()
    while algo.phase == "offline":
        algo.train()
    algo.save_to_path(folder)
    successes = evaluate(algo)
    algo.stop()
    return successes


class Killer:
    """Kills a random live env runner at every interval.

    Args:
        algo: The algorithm whose runners they are.
        seconds: After which there are no more kills, however long the iteration under way takes.
        interval: Seconds between kills.
        seed: Of the choice.

    Attributes:
        kills: Seconds from the start, process id, and how many runners the algorithm had then, of every kill.
    """

    def __init__(self, algo: CalQL, *, seconds: float, interval: float, seed: int) -> None:
        self.kills: list[tuple[float, int, int]] = []
        self._algo = algo
        self._seconds, self._interval = seconds, interval
        self._rng = random.Random(seed)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the runners live from now on."""
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        begin, next_kill = time.perf_counter(), self._interval
        while next_kill <= self._seconds:
            if self._is_over.wait(max(0.0, begin + next_kill - time.perf_counter())):
                return
            if pids := live_runners():
                pid, num_healthy = self._rng.choice(pids), self._algo._parts.collection._collector.num_healthy
                os.kill(pid, signal.SIGKILL)
                self.kills.append((round(time.perf_counter() - begin, 1), pid, num_healthy))
            next_kill = self._interval * (len(self.kills) + 1) if pids else next_kill + 0.2


def live_runners() -> list[int]:
    """Processes of remote env runners, by Ray's own list of actors."""
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    pids = sorted(actor["Pid"] for actor in actors if "EnvRunner" in actor["ActorClassName"])
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]  # Ray notices a kill a little later.


def fine_tune(
    config: CalQLConfig, *, seconds: float = 0.0, env_steps: int = 0, killer_of: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One run, until it has lasted that long and has made as many env steps.

    Args:
        config: Settings.
        seconds: Least time.
        env_steps: Least number of env steps.
        killer_of: Settings of `Killer`, or None to disturb nobody.
    """
    algo = config.build()
    algo.train()  # Runners load their simulator meanwhile.
    begin = time.perf_counter()
    killer = None if killer_of is None else Killer(algo, seconds=seconds, **killer_of)
    while (now := time.perf_counter() - begin) < seconds or algo.num_online_env_steps < env_steps:
        result = algo.train()
    if killer is not None:
        killer.stop()
        while result["collection"]["num_healthy_env_runners"] < NUM_RUNNERS and now < seconds + SECONDS_TO_RECOVER:
            result, now = algo.train(), time.perf_counter() - begin
    collection = result["collection"]
    outcome = {
        "kills": [] if killer is None else killer.kills,
        "failures_counted": collection["num_env_runner_failures_lifetime"],
        "healthy_at_the_end": collection["num_healthy_env_runners"],
        "env_steps": algo.num_online_env_steps,
        "episodes": algo.num_online_episodes,
        "updates": algo.num_online_updates,
        "seconds": round(now, 1),
        "wrong": wrong_with(algo),
        "successes": evaluate(algo),
    }
    algo.stop()
    return outcome


def wrong_with(algo: CalQL) -> list[str]:
    """What of the counters and of the stored episodes is wrong."""
    names = ("obs", "actions", "new_obs", "terminateds")
    obs, actions, next_obs, terminateds = (np.asarray(algo.store.online_column(name)) for name in names)
    steps, episodes, updates = algo.num_online_env_steps, algo.num_online_episodes, algo.num_online_updates
    owed = algo.config.updates_per_env_step * steps - updates
    distinct = len({row.tobytes() for row in np.concatenate([obs, actions], axis=1)})
    # The next episode begins elsewhere: starts and goals are drawn.
    ends = np.append(np.flatnonzero((next_obs[:-1] != obs[1:]).any(axis=1)), len(obs) - 1)
    lengths = np.diff(ends, prepend=-1)
    is_whole = (terminateds[ends] == 1.0) | (lengths == TIME_LIMIT)
    facts = {
        f"{steps} env steps were counted, {len(obs)} are stored": steps == len(obs),
        f"{len(obs) - distinct} observation-action rows are stored twice": distinct == len(obs),
        f"{episodes} episodes were counted, {len(ends)} are stored": episodes == len(ends),
        f"{int((~is_whole).sum())} stored episodes are not whole": bool(is_whole.all()),
        f"{updates} updates were made for {steps} env steps": abs(owed - algo.lifetime.updates_owed) < 1e-6
        and owed >= 0,
    }
    return [wrong for wrong, is_right in facts.items() if not is_right]


def wilson(successes: int, number: int) -> Interval:
    """95 % interval of a rate (Wilson 1927, "Probable inference, the law of succession")."""
    rate, weight = successes / number, Z**2 / number
    centre = (rate + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(rate * (1 - rate) / number + weight / (4 * number))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_of_difference(one: int, other: int, number: int) -> Interval:
    """95 % interval of the difference of two rates (Newcombe 1998, "Interval estimation", method 10)."""
    rate, other_rate = one / number, other / number
    (low, high), (other_low, other_high) = wilson(one, number), wilson(other, number)
    below = math.hypot(rate - low, other_high - other_rate)
    above = math.hypot(high - rate, other_rate - other_low)
    return rate - other_rate - below, rate - other_rate + above


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pre-trains, makes both runs and compares them."""
    begin = time.perf_counter()
    config = base_config(options.episodes, options.seed).fine_tuning(offline_updates=options.offline_updates)
    at_switch = pretrain(config, folder / "pretrained")
    print(f"pre-trained in {time.perf_counter() - begin:.0f} s, {at_switch} of {options.episodes} succeed", flush=True)
    config = base_config(options.episodes, options.seed)
    config.environment(SlowMaze, env_config={"step_s": options.step_s}, disable_env_checking=True)
    config.evaluation(evaluation_config=CalQLConfig.overrides(explore=False, env_config={"step_s": 0.0}))
    config.env_runners(num_env_runners=NUM_RUNNERS, num_cpus_per_env_runner=0.5)
    config.fine_tuning(
        offline_updates=options.offline_updates, sample_async=True, pretrained=str(folder / "pretrained")
    )
    killer_of = {"interval": options.interval, "seed": options.seed}
    killed = fine_tune(config.copy(copy_frozen=False), seconds=options.seconds, killer_of=killer_of)
    undisturbed = fine_tune(config.copy(copy_frozen=False), env_steps=killed["env_steps"])
    difference = interval_of_difference(killed["successes"], undisturbed["successes"], options.episodes)
    wrong = [
        f"{name}: {what}" for name, run in (("killed", killed), ("undisturbed", undisturbed)) for what in run["wrong"]
    ]
    if not killed["kills"]:
        wrong.append("no runner was killed; raise `--seconds`")
    # A runner that is killed before it has answered again has failed once.
    num_sure = sum(num_healthy == NUM_RUNNERS for _, _, num_healthy in killed["kills"])
    if not num_sure <= killed["failures_counted"] <= len(killed["kills"]):
        wrong.append(f"killed: {len(killed['kills'])} kills, {killed['failures_counted']} failures were counted")
    if undisturbed["failures_counted"]:
        wrong.append(f"undisturbed: {undisturbed['failures_counted']} failures were counted")
    if killed["healthy_at_the_end"] != NUM_RUNNERS:
        wrong.append(f"killed: {killed['healthy_at_the_end']} of {NUM_RUNNERS} runners came back")
    if not difference[0] <= 0.0 <= difference[1]:
        wrong.append("the success rates differ")
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "successes_at_switch": at_switch,
        "killed": killed,
        "undisturbed": undisturbed,
        "interval_of_difference": difference,
        "failures": wrong,
    }


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="During which runners are killed.")
    parser.add_argument("--interval", type=float, default=20.0, help="Seconds between kills.")
    parser.add_argument("--offline-updates", type=int, default=8_000)
    parser.add_argument("--step-s", type=float, default=0.03, help="Sleep in every env step of training.")
    parser.add_argument("--episodes", type=int, default=100, help="Of each evaluation.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(options, Path(folder))
    ray.shutdown()
    print(
        f"{'':<13}{'kills':>6}{'failures':>9}{'env steps':>10}{'episodes':>9}{'updates':>8}{'seconds':>8}{'success':>9}"
    )
    for name in ("killed", "undisturbed"):
        run = outcome[name]
        low, high = wilson(run["successes"], options.episodes)
        print(
            f"{name:<13}{len(run['kills']):>6}{run['failures_counted']:>9}{run['env_steps']:>10}{run['episodes']:>9}"
            f"{run['updates']:>8}{run['seconds']:>8.0f}{run['successes'] / options.episodes:>9.3f}"
            f" [{low:.3f}, {high:.3f}]"
        )
    low, high = outcome["interval_of_difference"]
    print(f"Difference of the success rates: 95 % interval [{low:+.3f}, {high:+.3f}].")
    print("\n".join(outcome["failures"]) or "All checks passed.")
    if options.output:
        options.output.write_text(json.dumps(outcome, indent=2))
    sys.exit(bool(outcome["failures"]))


if __name__ == "__main__":
    main()
