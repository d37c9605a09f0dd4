"""`rllib fine-tune`, killed at random moments: counters exact, no episode twice, none lost.

    python tests/benchmarks/fine_tune_kills.py [--kills 10] [--seed 0]

A small policy learns from logs to which two episodes are added before each kill. SIGKILL comes at a random moment of
what the command takes undisturbed, and half of the kills fall on the time after the updates have begun. At the end the
command is given once more, and what the checkpoint counts is compared with what the folder holds.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from logged_episodes import write_episode
from tiny import line_config

from rllib_calql import CalQL, load_policy

_UPDATES_PER_ENV_STEP = 20


def main() -> None:
    """Prints one line for each kill and the sums, and fails if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    logs, policy, tuned = folder / "logs", folder / "policy.npz", folder / "pre-fine-tuned"
    algo = line_config(folder, offline_updates=2, updates_per_iteration=2).build()
    algo.train()
    algo.save_to_path(folder / "pre")
    algo.stop()
    command = [
        *(sys.executable, "-c", "from rllib_calql.commands.main import main; main()", "fine-tune", str(folder / "pre")),
        *("--episodes", str(logs), "--export", str(policy), "--updates-per-env-step", str(_UPDATES_PER_ENV_STEP)),
    ]
    lengths: list[int] = []

    def add_episodes() -> None:
        for _ in range(2):
            lengths.append(rng.randint(2, 30))
            write_episode(logs, length=lengths[-1], start=float(len(lengths)))

    add_episodes()
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    whole = time.monotonic() - begin
    for number in range(arguments.kills):
        add_episodes()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = whole * (rng.uniform(0.5, 1.0) if number % 2 else rng.random())
        try:
            process.wait(moment)
            how = "ended before"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            how = "killed"
        print(
            json.dumps({"kill": number, "after_s": round(moment, 2), "of_s": round(whole, 2), "how": how}), flush=True
        )
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    algo = CalQL.from_checkpoint(tuned)
    counters, rewards = algo.lifetime.counters(), algo.store.online_column("rewards")
    algo.stop()
    expected = sum(lengths)
    found = {
        "env_steps": counters["num_online_env_steps_lifetime"],
        "rows": len(rewards),
        "episodes": int((rewards == 1.0).sum()),  # Each begins with reward 1.
        "updates": counters["num_online_updates_lifetime"],
        "updates_of_the_policy_file": load_policy(policy).metadata["checkpoint"]["num_online_updates_lifetime"],
    }
    updates = expected * _UPDATES_PER_ENV_STEP
    wanted = dict(zip(found, (expected, expected, len(lengths), updates, updates), strict=True))
    print(json.dumps({"found": found, "wanted": wanted}))
    np.testing.assert_equal(found, wanted)


if __name__ == "__main__":
    main()
