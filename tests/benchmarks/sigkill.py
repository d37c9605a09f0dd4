"""Signals to `rllib train file` at random moments, each followed by `--resume`: nothing counted twice, nothing lost.

The environment's observations are random numbers, so that no two transitions are the same and each can be found again.
A third of the signals falls into the start of the command, a third into training, a third into the writing of a
checkpoint; every start of the command draws its number of env runners anew. SIGKILL goes to the driver; SIGTERM and
SIGHUP go to it alone or to all its processes, by turns, and have to end it in order, with a checkpoint where one
could be written. Prints a table and writes JSON; exits 1 if a check failed.

    python tests/benchmarks/sigkill.py --kills 20 --output sigkill.json
    python tests/benchmarks/sigkill.py --kills 30 --signals KILL TERM HUP --output signals.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from rllib_calql.experiments import run_state

# As in a terminal, whatever the process that runs this ignores. Before the handlers stand, a signal ends Python.
RESET = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGTERM, signal.SIG_DFL); "
COMMAND = [sys.executable, "-c", f"{RESET}from rllib_calql.commands.main import main; main(prog_name='rllib')"]
MOMENTS = ("start", "training", "checkpoint")
SIGNALS = ("KILL", "TERM", "HUP")
BARE_PYTHON_S = 12.0  # On a busy machine.
OBS_DIM, OFFLINE_UPDATES, UPDATES_PER_ENV_STEP = 4, 12, 0.1
ATTEMPT_LIMIT_S = 150
# Ray's workers end within seconds of a driver that was killed; two small agents notice it after about a minute.
OTHERS_LIMIT_S, AGENTS_LIMIT_S = 20, 150
LOCAL = pyarrow.fs.LocalFileSystem()
EXPERIMENT = """
killed:
  run: CalQL
  env: sigkill:RandomObservations-v0
  stop: {{training_iteration: {stop}}}
  checkpoint_config: {{checkpoint_frequency: 1}}
  config: {{input_: {data}, offline_updates: {offline_updates}, updates_per_iteration: 2, num_actions: 1,
           train_batch_size_per_learner: 8, updates_per_env_step: {updates_per_env_step},
           num_env_runners: {num_env_runners}, model_config: {{actor_hiddens: [8], critic_hiddens: [8]}}}}
"""


class RandomObservations(gym.Env):  # type: ignore[type-arg]
    """Observations that never come twice, episodes of 5 to 15 steps that all terminate."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (OBS_DIM,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self._rng = np.random.default_rng()  # From the system, so that a restarted process differs.

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws a length."""
        self._left = int(self._rng.integers(5, 16))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Counts down."""
        self._left -= 1
        return self._observe(), float(self._rng.uniform()), self._left == 0, False, {}

    def _observe(self) -> np.ndarray:
        return self._rng.uniform(-1.0, 1.0, OBS_DIM).astype(np.float32)


gym.register("RandomObservations-v0", entry_point=RandomObservations)


@dataclass(frozen=True)
class Kill:
    """One kill and the resume after it.

    Attributes:
        moment: Where it was to fall.
        signal: Which signal.
        exit_code: Of the command.
        after_s: Seconds from the start of the command.
        iterations: Iterations of the newest whole checkpoint then; 0 for none.
        env_steps: Env steps in it.
        first_iteration: Iterations of the first checkpoint after the resume; None if the next kill came first.
    """

    moment: str
    signal: str
    exit_code: int
    after_s: float
    iterations: int
    env_steps: int
    first_iteration: int | None


def write_offline_data(path: Path, num_episodes: int = 12) -> None:
    """Writes episodes of the environment under random actions."""
    env, rng, rows = RandomObservations(), np.random.default_rng(0), []
    for episode in range(num_episodes):
        obs, terminated = env.reset()[0], False
        while not terminated:
            action = rng.uniform(-1.0, 1.0, 1).astype(np.float32)
            next_obs, reward, terminated, _, _ = env.step(action)
            row = {"eps_id": str(episode), "obs": obs, "actions": action, "rewards": reward, "new_obs": next_obs}
            rows.append(row | {"terminateds": terminated, "truncateds": False})
            obs = next_obs
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in rows[0]}), path)


class Run:
    """The command, and what it leaves on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settings = {
            "data": folder / "data.parquet",
            "offline_updates": OFFLINE_UPDATES,
            "updates_per_env_step": UPDATES_PER_ENV_STEP,
        }
        write_offline_data(folder / "data.parquet")

    def start(self, *, stop: int, num_env_runners: int) -> subprocess.Popen[str]:
        """Starts the run, or resumes it if it has begun."""
        text = EXPERIMENT.format(stop=stop, num_env_runners=num_env_runners, **self._settings)
        (self._folder / "e.yaml").write_text(text)
        resume = (self._folder / "r" / "killed").exists()
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # For workers.
        # Ray's folder is that of this benchmark: a killed driver leaves the note of a current cluster in it.
        ray_folder = str(self._folder)
        environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "RAY_TMPDIR": ray_folder}
        arguments = ["train", "file", "e.yaml", "--storage-path", "r", "--num-cpus", "2", *["--resume"] * resume]
        with (self._folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                [*COMMAND, *arguments], cwd=self._folder, env=os.environ | environment, stdout=output, stderr=output
            )

    def output(self) -> str:
        """All that the commands have said so far."""
        return (self._folder / "output.txt").read_text()

    def checkpoints(self) -> list[str]:
        """Checkpoints of the trial, whole or not, in order."""
        trials = [folder for folder in self._folder.glob("r/killed/CalQL*") if folder.is_dir()]
        numbered = [found for trial in trials for found in run_state.numbered_checkpoints(LOCAL, str(trial))]
        return [path for _, path in sorted(numbered)]

    def newest_whole(self) -> tuple[str, dict[str, Any]] | None:
        """The newest whole checkpoint and its result."""
        for path in reversed(self.checkpoints()):
            if (result := run_state.result_of_whole(LOCAL, path)) is not None:
                return path, result
        return None


def own_state(checkpoint: str) -> dict[str, Any]:
    """Counters and online data in a checkpoint."""
    with (Path(checkpoint) / "algorithm_state.pkl").open("rb") as file:
        state: dict[str, Any] = pickle.load(file)["calql"]
    return state


def online_rows(checkpoint: str) -> list[bytes]:
    """The online transitions of a checkpoint, by their observations."""
    return [row.tobytes() for row in own_state(checkpoint)["store"]["online"]["columns"]["obs"]]


def descendants(pid: int) -> set[int]:
    """Processes below this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # It ended meanwhile.
                continue
    found, level = set(), {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def name_of(pid: int) -> str:
    """The command line of a process, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_moment(run: Run, process: subprocess.Popen[str], moment: str, rng: random.Random) -> None:
    """Returns when the process is to be killed."""
    begin = time.monotonic()
    if moment == "start":
        time.sleep(rng.uniform(0.0, 15.0))
        return
    time.sleep(3)  # A process of the command killed before may still write.
    before = set(run.checkpoints())
    while time.monotonic() - begin < ATTEMPT_LIMIT_S and process.poll() is None:
        new = [path for path in run.checkpoints() if path not in before]
        if new and moment == "training":
            time.sleep(rng.uniform(0.0, 6.0))
            return
        if new and not run_state.is_marked(LOCAL, new[-1]) and rng.random() < 0.3:
            time.sleep(rng.uniform(0.0, 0.01))
            return
        time.sleep(0.001)
    raise TimeoutError(f"The command made no checkpoint within {ATTEMPT_LIMIT_S} s, exit code {process.poll()}.")


class Remains:
    """How long processes of killed commands live on, while the next command runs already."""

    def __init__(self, *, with_agents: bool) -> None:
        self._with_agents = with_agents
        self.agents_s: list[float] = []
        self.others_s: list[float] = []
        self._threads: list[threading.Thread] = []

    def end(self, process: subprocess.Popen[str], signum: int, *, all_processes: bool) -> None:
        """Sends a signal to the driver, or to it and all that it started, and waits for the driver's end."""
        started = descendants(process.pid)
        agents = {pid for pid in started if "agent" in name_of(pid).lower()}
        for pid in (*(started if all_processes else ()), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        process.wait(ATTEMPT_LIMIT_S)
        for pids, seconds in ((agents, self.agents_s), (started - agents, self.others_s)):
            if pids is agents and not self._with_agents:
                continue
            self._threads.append(threading.Thread(target=self._watch, args=(pids, seconds), daemon=True))
            self._threads[-1].start()

    def wait(self) -> None:
        """Waits until they are gone, or their time is over."""
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _watch(pids: set[int], seconds: list[float]) -> None:
        begin = time.monotonic()
        while any(map(is_alive, pids)) and time.monotonic() - begin < AGENTS_LIMIT_S:
            time.sleep(0.1)
        seconds.append(round(time.monotonic() - begin, 1))


def measure(
    folder: Path,
    *,
    num_kills: int,
    seed: int,
    moments: tuple[str, ...] = MOMENTS,
    signals: tuple[str, ...] = SIGNALS[:1],
    with_agents: bool = True,
) -> dict[str, Any]:
    """Kills and resumes, lets the run complete, and checks what is left."""
    rng = random.Random(seed)
    run, remains = Run(folder), Remains(with_agents=with_agents)
    kills: list[Kill] = []
    failures: list[str] = []
    rows_once_safe: set[bytes] = set()
    seen = 0  # Checkpoints before this start of the command.
    for index in range(num_kills + 1):
        is_last = index == num_kills
        newest = newest_before = run.newest_whole()
        iteration = newest[1]["training_iteration"] if newest else 0
        if newest:
            rows_once_safe |= set(online_rows(newest[0]))
        begin, said_before = time.monotonic(), len(run.output()) if kills else 0
        # More than any attempt gets done; the last one makes a few iterations in each phase that is left.
        stop = max(iteration, OFFLINE_UPDATES // 2) + 5 if is_last else 100_000
        process = run.start(stop=stop, num_env_runners=rng.choice([0, 1]))
        if is_last:
            exit_code = process.wait(ATTEMPT_LIMIT_S)
            if exit_code != 0:
                failures.append(f"the last resume exited with {exit_code}")
        else:
            name = signals[index % len(signals)]
            moment = moments[(index + index // len(signals)) % len(moments)]
            wait_for_moment(run, process, moment, rng)
            after_s = time.monotonic() - begin
            before, said = run.newest_whole(), len(run.output())
            remains.end(
                process, getattr(signal, f"SIG{name}"), all_processes=name != "KILL" and index // len(signals) % 2 == 1
            )
            if name != "KILL":
                failures += check_orderly_end(
                    f"SIG{name} {index + 1}",
                    process.returncode,
                    run.output()[said:],
                    getattr(signal, f"SIG{name}"),
                    after_s=after_s,
                    is_checkpoint_due=moment != "start" and run.newest_whole() == before,
                )
        results = [run_state.result_of_whole(LOCAL, path) for path in run.checkpoints()]
        made = [r for r in results if r is not None and r["training_iteration"] > iteration]
        first = made[0] if made else None
        if kills and first is not None and first["training_iteration"] != iteration + 1:
            failures.append(f"after kill {index} the run went on at {first['training_iteration']}, not {iteration + 1}")
        if (
            newest_before
            and made
            and f" goes on from '{Path(newest_before[0]).name}' (" not in run.output()[said_before:]
        ):
            failures.append(f"after kill {index} the command did not say from where it goes on")
        if len([r for r in results if r is not None]) < seen:
            failures.append(f"after kill {index} a whole checkpoint had vanished")
        seen = len([r for r in results if r is not None])
        if kills:
            kills[-1] = Kill(**asdict(kills[-1]) | {"first_iteration": first and first["training_iteration"]})
        if not is_last:
            newest = run.newest_whole()
            result = newest[1] if newest else {}
            steps = result.get("num_online_env_steps_lifetime", 0)
            kills.append(
                Kill(moment, name, process.returncode, after_s, result.get("training_iteration", 0), steps, None)
            )
            print(kills[-1], flush=True)
    newest = run.newest_whole()
    assert newest is not None
    failures += check_end(newest[0], rows_once_safe)
    logged = [json.loads(line) for line in (Path(newest[0]).parent / "result.json").read_text().splitlines()]
    if (iterations := [result["training_iteration"] for result in logged]) != list(range(1, len(logged) + 1)):
        failures.append(f"the log of results has the iterations {iterations}")
    remains.wait()
    if max(remains.others_s) > OTHERS_LIMIT_S or max(remains.agents_s, default=0) >= AGENTS_LIMIT_S:
        failures.append(f"processes of a killed command were left for {remains.others_s} s, agents {remains.agents_s}")
    state = own_state(newest[0])
    return {
        "seed": seed,
        "kills": [asdict(one) for one in kills],
        "longest_process_s": max(remains.others_s),
        "longest_agent_s": max(remains.agents_s, default=None),
        "counters": {key: state[key] for key in sorted(state) if key.startswith("num_") or key == "updates_owed"},
        "failures": failures,
    }


def check_orderly_end(
    which: str, exit_code: int, said: str, signum: int, *, after_s: float, is_checkpoint_due: bool
) -> list[str]:
    """What is wrong with the end of a command that was asked to end."""
    if exit_code == -signum and after_s < BARE_PYTHON_S and not said:
        return []
    facts = {
        f"exit code {exit_code}": exit_code == 128 + signum,
        "a traceback": "Traceback" not in said,
        "a stack dump": "***" not in said,
        "no word about what is saved": any(
            words in said for words in ("Checkpoints are in", "Nothing was trained", "Nothing was saved")
        ),
        "no checkpoint": not is_checkpoint_due,
    }
    return [f"{which}: {wrong}; it said {said!r}" for wrong, is_right in facts.items() if not is_right]


def check_end(checkpoint: str, rows_once_safe: set[bytes]) -> list[str]:
    """What is wrong with the last checkpoint of the completed run."""
    state, rows = own_state(checkpoint), online_rows(checkpoint)
    steps, updates = state["num_online_env_steps_lifetime"], state["num_online_updates_lifetime"]
    ends = int(np.sum(state["store"]["online"]["columns"]["terminateds"]))
    owed = UPDATES_PER_ENV_STEP * steps - updates
    facts = {
        "the run ended in the offline phase": steps > 0,
        f"{state['num_offline_updates_lifetime']} offline updates": state["num_offline_updates_lifetime"]
        == OFFLINE_UPDATES,
        f"{steps} env steps were counted, {len(rows)} are stored": steps == len(rows),
        f"{len(rows) - len(set(rows))} transitions are stored twice": len(set(rows)) == len(rows),
        f"{state['num_online_episodes_lifetime']} episodes were counted, {ends} stored": ends
        == state["num_online_episodes_lifetime"],
        f"{updates} online updates for {steps} env steps": abs(owed - state["updates_owed"]) < 1e-6 and owed >= 0,
        "a transition of a whole checkpoint was lost": rows_once_safe <= set(rows),
    }
    return [wrong for wrong, is_right in facts.items() if not is_right]


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS[:1])
    parser.add_argument("--skip-agents", action="store_true", help="do not wait a minute for the end of Ray's agents")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = measure(
                Path(folder),
                num_kills=arguments.kills,
                seed=arguments.seed,
                moments=tuple(arguments.moments),
                signals=tuple(arguments.signals),
                with_agents=not arguments.skip_agents,
            )
        except Exception:
            print((Path(folder) / "output.txt").read_text()[-5_000:])
            raise
    print(f"{'moment':<12}{'signal':<7}{'exit':>5}{'after s':>9}{'iteration':>11}{'env steps':>11}{'resumed at':>12}")
    for one in outcome["kills"]:
        resumed = one["first_iteration"] or "-"
        begin = f"{one['moment']:<12}{one['signal']:<7}{one['exit_code']:>5}{one['after_s']:>9.1f}"
        print(f"{begin}{one['iterations']:>11}{one['env_steps']:>11}{resumed:>12}")
    print(f"Processes were left for {outcome['longest_process_s']} s, agents for {outcome['longest_agent_s']} s.")
    print(outcome["counters"])
    print("\n".join(outcome["failures"]) or "All checks passed.")
    if arguments.output:
        arguments.output.write_text(json.dumps(outcome, indent=2))
    sys.exit(bool(outcome["failures"]))


if __name__ == "__main__":
    main()
