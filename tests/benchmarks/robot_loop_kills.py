"""`tuned_examples/robot_loop` with SIGKILL at random moments: counters exact, no episode twice, none lost.

    python tests/benchmarks/robot_loop_kills.py [--kills 10] [--kills-of-tuning 3] [--seed 0]

The example's control loop, which can import neither Ray nor torch, drives without end while `rllib fine-tune --watch`
takes its episodes. Either is killed at random moments and started again. At the end the loop is stopped, the command is
given once more without `--watch`, and what its checkpoint holds is compared row by row with the files in the folder.
What the folder must hold is told by the control loop, which names every episode once its file is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from no_ray import BLOCKED

from rllib_calql import CalQL, export_policy, load_policy
from rllib_calql.experiments.experiment import read_experiments

EXAMPLE = Path(__file__).parents[2] / "tuned_examples" / "robot_loop"
_UPDATES_PER_ENV_STEP = 0.1
_RLLIB = "from rllib_calql.commands.main import main; main()"


class Killed:
    """A program that is killed at random moments and started again.

    Args:
        command: Its command line.
        output: Where its standard output goes, one line after the other.
        kills: How often.
        within_s: Each kill comes at most so many seconds after the first line that the program has printed.
        seed: Of the moments.

    Attributes:
        moments: Seconds from each first line to the kill.
    """

    def __init__(self, command: list[str], output: Path, *, kills: int, within_s: float, seed: int) -> None:
        self._command, self._output = command, output
        self._rng, self._within_s = random.Random(seed), within_s
        self._kills = kills
        self._thread = threading.Thread(target=self._run)
        self._is_over = threading.Event()
        self.moments: list[float] = []

    def start(self) -> None:
        """Starts it, and the kills."""
        self._thread.start()

    def wait(self) -> None:
        """Waits for the last kill."""
        while self._thread.is_alive() and len(self.moments) < self._kills:
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends it by Ctrl-C."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._output.open("ab") as output:
                size = output.tell()
                process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.DEVNULL)
            if len(self.moments) < self._kills:
                while self._output.stat().st_size == size and process.poll() is None:
                    time.sleep(0.01)
                moment = self._rng.uniform(0.0, self._within_s)
                time.sleep(moment)
                process.kill()
                self.moments.append(round(moment, 2))
            else:
                self._is_over.wait()
                process.send_signal(signal.SIGINT)
            process.wait(timeout=300)


def pretrained(folder: Path) -> Path:
    """A checkpoint of the example's experiment after two updates."""
    (experiment,) = read_experiments(EXAMPLE / "pretrain.yaml")
    config: Any = experiment.config.copy(copy_frozen=False)
    config.fine_tuning(offline_updates=2, updates_per_iteration=2)
    algo = config.build()
    algo.train()
    algo.save_to_path(folder / "pre")
    algo.stop()
    return folder / "pre"


def main() -> int:
    """Prints what was seen, and returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of the control loop")
    parser.add_argument("--kills-of-tuning", type=int, default=3, help="of `rllib fine-tune --watch`")
    parser.add_argument("--within-seconds", type=float, default=3.0, help="from its first episode to a kill")
    parser.add_argument("--tuning-within-seconds", type=float, default=20.0, help="from its first line to a kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in the background of a shell, and by children.
    folder = Path(tempfile.mkdtemp())
    episodes, policy = folder / "episodes", folder / "policy.npz"
    episodes.mkdir()
    pre = pretrained(folder)
    export_policy(pre, policy)
    tune = [
        *(sys.executable, "-c", _RLLIB, "fine-tune", str(pre), "--episodes", str(episodes), "--export", str(policy)),
        *("--updates-per-env-step", str(_UPDATES_PER_ENV_STEP)),
    ]
    drive = [
        *(sys.executable, "-c", BLOCKED, str(EXAMPLE / "control_loop.py"), "--policy", str(policy)),
        *("--episodes", str(episodes), "--env-steps", str(10**9), "--step-seconds", "0.001"),
    ]
    robot = Killed(drive, folder / "robot.txt", kills=options.kills, within_s=options.within_seconds, seed=options.seed)
    tuning = Killed(
        [*tune, "--watch"],
        folder / "tuning.txt",
        kills=options.kills_of_tuning,
        within_s=options.tuning_within_seconds,
        seed=options.seed + 1,
    )
    begin = time.monotonic()
    tuning.start()
    robot.start()
    robot.wait()
    tuning.wait()
    robot.stop()
    tuning.stop()
    subprocess.run(tune, check=True, capture_output=True, timeout=600)
    seen, checks = compared(folder / "pre-fine-tuned", episodes, policy, folder / "robot.txt")
    seen |= {"kills": robot.moments, "kills_of_tuning": tuning.moments, "seconds": round(time.monotonic() - begin)}
    print(json.dumps({"seen": seen, "checks": checks}, indent=1))
    return 0 if all(checks.values()) else 1


def rows_of(file: Any, kind: str) -> Any:
    """Observations of an episode's file ("o") or those after them ("next_o"), as the store keeps them, (T, 8)."""
    parts = ("achieved_goal", "desired_goal", "observation")
    return np.hstack([file[f"{kind}bservations/{part}"] for part in parts]).astype(np.float32)


def compared(checkpoint: Path, episodes: Path, policy: Path, told: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    """What a checkpoint holds, and whether it is what the folder holds, read by NumPy alone."""
    files = [np.load(file) for file in sorted(episodes.glob("[!.]*.npz"))]
    on_disk = Counter(
        row.tobytes() for file in files for row in np.hstack([rows_of(file, "o"), rows_of(file, "next_o")])
    )
    num_steps = sum(len(file["rewards"]) for file in files)
    algo = CalQL.from_checkpoint(checkpoint)
    counters, owed = algo.lifetime.counters(), algo.lifetime.updates_owed
    in_store = Counter(
        row.tobytes() for row in np.hstack([algo.store.online_column("obs"), algo.store.online_column("new_obs")])
    )
    algo.stop()
    seen = {
        "episodes_named_by_the_control_loop": len(re.findall(r"^episode \d", told.read_text(), flags=re.MULTILINE)),
        "episodes_on_disk": len(files),
        "env_steps_on_disk": num_steps,
        "partial_files_left": len(os.listdir(episodes)) - len(files),
        "episodes": counters["num_online_episodes_lifetime"],
        "env_steps": counters["num_online_env_steps_lifetime"],
        "rows": in_store.total(),
        "updates": counters["num_online_updates_lifetime"],
        "updates_of_the_policy_file": load_policy(policy).metadata["checkpoint"]["num_online_updates_lifetime"],
    }
    checks = {
        "no episode was lost that the control loop had named": seen["episodes_named_by_the_control_loop"]
        <= seen["episodes_on_disk"],
        "episodes as on disk": seen["episodes"] == seen["episodes_on_disk"],
        "env steps as on disk": seen["env_steps"] == seen["env_steps_on_disk"],
        "rows as on disk, each once": on_disk == in_store,
        "all updates that are owed": owed < 1
        and abs(seen["updates"] + owed - _UPDATES_PER_ENV_STEP * num_steps) < 1e-6 * num_steps,
        "the policy file is the checkpoint's": seen["updates_of_the_policy_file"] == seen["updates"],
    }
    return seen, checks


if __name__ == "__main__":
    sys.exit(main())
