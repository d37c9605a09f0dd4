"""SIGKILLs of clients during fine-tuning: the run ends with the main job's success, and its counters are exact.

The main job's settings, with episodes of two processes that can import neither Ray nor torch, one at each env runner.
After the switch one of them is killed at every interval and another one is started in its place. Prints what was seen
and writes JSON; exits 1 if a check failed.

    python tests/benchmarks/client_kills.py --seconds 120 --interval 20 --output client_kills.json

The pre-trained networks are kept in `--checkpoint` and taken from there the next time.
"""

from __future__ import annotations

import argparse
import json
import runpy
import signal
import socket
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

from rllib_calql import CalQL

EXAMPLES = Path(__file__).parents[2] / "tuned_examples"
CLIENT = EXAMPLES / "external_clients" / "maze_client.py"
NUM_ENV_STEPS = 2_000  # Of the main job.


class Clients:
    """Two clients, one at each port, one of which is killed at every interval and replaced after two seconds.

    Args:
        ports: To connect to.
        step_s: Pause in every step of theirs.

    Attributes:
        kills: Seconds since `begin_killing` of every kill.
    """

    def __init__(self, ports: list[int], *, step_s: float) -> None:
        self._ports, self._step_s = ports, step_s
        self._processes = [self._start(port) for port in ports]
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self.kills: list[float] = []

    def begin_killing(self, *, seconds: float, interval: float) -> None:
        """Kills for so many seconds, in a thread."""
        self._thread = threading.Thread(target=self._kill, args=(seconds, interval), daemon=True)
        self._thread.start()

    @property
    def is_killing(self) -> bool:
        """Whether more kills are to come."""
        return self._thread is None or self._thread.is_alive()

    def stop(self) -> None:
        """Ends all."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        arguments = ["--address", f"127.0.0.1:{port}", "--step-seconds", str(self._step_s)]
        return subprocess.Popen([sys.executable, "-c", BLOCKED, str(CLIENT), *arguments], stdout=subprocess.DEVNULL)

    def _kill(self, seconds: float, interval: float) -> None:
        begin = time.monotonic()
        while len(self.kills) * interval + interval <= seconds:
            due = begin + (len(self.kills) + 1) * interval
            if self._is_over.wait(max(0.0, due - time.monotonic())):
                return
            number = len(self.kills) % len(self._processes)
            self._processes[number].send_signal(signal.SIGKILL)
            self._processes[number].wait()
            self.kills.append(round(time.monotonic() - begin, 1))
            if self._is_over.wait(2.0):
                return
            self._processes[number] = self._start(self._ports[number])


def free_ports() -> list[int]:
    """Two ports beside each other that nobody listens at."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return [port, port + 1]


def main() -> int:
    """Runs it, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="during which clients are killed")
    parser.add_argument("--interval", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="pause of clients in every step")
    parser.add_argument("--checkpoint", type=Path, help="of the pre-trained networks; made if it is not there")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    ports = free_ports()
    config = runpy.run_path(str(EXAMPLES / "pointmaze_umaze.py"))["config"].copy(copy_frozen=False)
    config.external_clients(external_port=ports[0])
    folder = options.checkpoint or Path(tempfile.mkdtemp()) / "switch"
    if not folder.exists():
        algo = config.copy(copy_frozen=False).build()
        while algo.phase == "offline":
            algo.train()
        algo.save_to_path(folder)
        algo.stop()
    algo = CalQL.from_checkpoint(folder, config=config)
    clients = Clients(ports, step_s=options.step_seconds)
    begin, results = time.monotonic(), []
    clients.begin_killing(seconds=options.seconds, interval=options.interval)
    while clients.is_killing or algo.num_online_env_steps < NUM_ENV_STEPS:
        result = algo.train()
        results.append(
            {
                "seconds": round(time.monotonic() - begin, 1),
                "episodes": algo.num_online_episodes,
                "env_steps": algo.num_online_env_steps,
                "updates": algo.num_online_updates,
                "clients": result["collection"]["num_clients"],
                "success": result["evaluation"]["env_runners"]["success_rate"],
            }
        )
        print(json.dumps(results[-1]), flush=True)
    clients.stop()
    rows = np.column_stack([algo.store.online_column(name) for name in ("obs", "new_obs", "actions")])
    seen = {
        "kills": clients.kills,
        "env_steps": algo.num_online_env_steps,
        "env_steps_taken": algo.lifetime.num_online_env_steps_taken,
        "rows": algo.store.num_online,
        "rows_twice": int(sum(number - 1 for number in Counter(map(bytes, rows)).values())),
        "updates": algo.num_online_updates,
        "env_runner_failures": algo._parts.collection.num_failures,
        "success": results[-1]["success"],
        "longest_pause_s": float(np.diff([0.0, *(one["seconds"] for one in results)]).max()),
    }
    algo.stop()
    checks: dict[str, Any] = {
        "as many kills as asked for": len(clients.kills) == int(options.seconds // options.interval),
        "rows are env steps": seen["rows"] == seen["env_steps"] == seen["env_steps_taken"],
        "no row twice": seen["rows_twice"] == 0,
        "an update for every env step": seen["updates"] == seen["env_steps"],
        "no env runner failed": seen["env_runner_failures"] == 0,
        "success of the main job": seen["success"] >= 0.95,
    }
    checks = {claim: bool(holds) for claim, holds in checks.items()}
    print(json.dumps({"seen": seen, "checks": checks}, indent=1))
    if options.output:
        options.output.write_text(json.dumps({"seen": seen, "checks": checks, "results": results}, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
