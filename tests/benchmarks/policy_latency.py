"""Median latency of one action on one thread, 2 x 256 units: RLlib's module path, a `.npz` and a `.onnx` policy file.

    python tests/benchmarks/policy_latency.py

Every way takes a raw observation and gives an action of the environment. They take turns in short rounds of one
process, so that whatever else the machine does meets all of them; the table has the median over all calls, and the
quartiles of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy and torch read it when they are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import gymnasium as gym
import numpy as np
import onnxruntime
import torch
from policies import Case, Trained, trained
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.spaces.space_utils import unsquash_action

from rllib_calql import load_policy
from rllib_calql.export.writing import WRITERS

OBS_DIM, ACTION_DIM = 17, 6
BASE = "RLlib's module path: connectors, module, connectors"
Act = Callable[[np.ndarray], Any]


def module_path(made: Trained) -> Act:
    """What an env runner would do with RLlib's default pipelines."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    config = made.runner.config
    to_module = AlgorithmConfig.build_env_to_module_connector(config, made.runner.env)
    to_env = AlgorithmConfig.build_module_to_env_connector(config, made.runner.env)
    return _through(made, to_module, to_env)


def lean_path(made: Trained) -> Act:
    """What an env runner does for an action, with the connectors of this package."""
    return _through(made, made.runner._env_to_module, made.runner._module_to_env)


def _through(made: Trained, to_module: Any, to_env: Any) -> Act:
    module, spaces = made.runner.module, (made.case.observations, made.case.actions)

    def act(observation: np.ndarray) -> Any:
        episode = SingleAgentEpisode(observation_space=spaces[0], action_space=spaces[1])
        episode.add_env_reset(observation)
        shared: dict[str, Any] = {}
        kwargs = {"rl_module": module, "episodes": [episode], "explore": False, "shared_data": shared}
        outputs = module.forward_inference(to_module(batch={}, **kwargs))
        return to_env(batch=outputs, **kwargs)[Columns.ACTIONS_FOR_ENV][0]

    return act


def module_alone(made: Trained) -> Act:
    """The module without connectors, and the mapping to the bounds: what RLlib's examples of inference do."""
    module, space = made.runner.module, made.case.actions

    def act(observation: np.ndarray) -> Any:
        outputs = module.forward_inference({Columns.OBS: torch.from_numpy(observation[None])})
        return unsquash_action(outputs[Columns.ACTIONS].numpy()[0], space)

    return act


def runtime_alone(file: Path) -> Act:
    """ONNX Runtime without this package."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda observation: session.run(["action"], {"observation": observation[None]})[0][0]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=50, help="In every round.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spaces = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,))
    made = trained(Case(*spaces), hiddens=(256, 256))
    with tempfile.TemporaryDirectory() as folder:
        files = {ending: Path(folder) / f"policy{ending}" for ending in (".npz", ".onnx")}
        for ending, file in files.items():
            file.write_bytes(WRITERS[ending](made.data))
        ways: dict[str, Act] = {
            BASE: lean_path(made),
            "the same with RLlib's default connectors": module_path(made),
            "the module alone, without connectors": module_alone(made),
            '`load_policy("policy.npz")`': load_policy(files[".npz"]),
            '`load_policy("policy.onnx")`': load_policy(files[".onnx"]),
            "ONNX Runtime alone": runtime_alone(files[".onnx"]),
        }
        observations = np.random.default_rng(0).normal(size=(arguments.calls, OBS_DIM)).astype(np.float32)
        expected = ways[BASE](observations[0])
        for name, act in ways.items():
            np.testing.assert_allclose(act(observations[0]), expected, atol=1e-6, err_msg=name)
        taken: dict[str, list[np.ndarray]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, act in ways.items():
                times = np.empty(arguments.calls)
                for number, observation in enumerate(observations):
                    begin = time.perf_counter()
                    act(observation)
                    times[number] = time.perf_counter() - begin
                taken[name].append(times)
    made.runner.stop()
    medians = {name: np.median(rounds, axis=1) * 1e6 for name, rounds in taken.items()}
    print("| one action | median, microseconds | times as fast as the first row [quartiles] |\n| --- | --- | --- |")
    for name, of_rounds in medians.items():
        low, middle, high = np.quantile(medians[BASE] / of_rounds, [0.25, 0.5, 0.75])
        print(f"| {name} | {np.median(taken[name]) * 1e6:.1f} | {middle:.1f} [{low:.1f}, {high:.1f}] |")


if __name__ == "__main__":
    main()
