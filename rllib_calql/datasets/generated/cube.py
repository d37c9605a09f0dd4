"""Demonstrations and noisy attempts of OGBench's cube-single task, a robot arm that moves one cube.

Data and evaluation use one environment, `CubeSingle`: OGBench's single-task version (reward -1, and 0 in states where
the cube is within 4 cm of its target, and the episode ends there), with its default task and its own randomisation of
the arm and the cube. Half of the episodes are demonstrations by OGBench's scripted oracle with little action noise, the
other half are attempts with so much noise that most of them fail: a narrow set in which success must be told from
failure.

OGBench and MuJoCo are imported on first use, not with this module.

Source:
    Park et al. 2025, OGBench, arXiv:2410.20092 (task and oracles; `ogbench.manipspace`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

MAX_EPISODE_STEPS = 200  # Of OGBench's `cube-single-singletask-v0`.
TASK_ID = 2  # OGBench's default for `cube-single`: 15 cm straight away from the robot's base.
_REGISTERED_ID = "rllib_calql/CubeSingle-v0"
_ACTION_DIM = 5
_DEMONSTRATION_NOISE = 0.1  # Standard deviation of the noise on the oracle's actions, which lie in [-1, 1].
_ATTEMPT_NOISE_RANGE = (0.75, 1.25)  # The same, of one noisy episode; about 80 % of these fail.
_REFERENCE_SEED = 20_230_309  # The reference scores depend on the environment only, not on the data's seed.


class CubeSingle(gym.Env[Float64Array, Float32Array]):
    """OGBench's cube-single task with a reset that depends on the seed alone.

    OGBench visits the goal state on every reset, with two actions from a generator that has no seed. They leave traces
    in the simulator (the solver's warm start, contact forces), so the same seed gives slightly different episodes. Here
    the traces are removed. Observations, rewards, successes and the end of episodes are OGBench's own.

    Observations are float64 (28,): joints, end effector, gripper, pose of the cube. Actions are float32 (5,), [-1, 1]:
    change of the end effector's position and yaw, and of the gripper's opening. A step's `info` holds `success`.

    Raises:
        ImportError: If OGBench is not installed.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration, read by `gymnasium.make`.

    def __init__(self) -> None:
        cube_env = _import_ogbench("ogbench.manipspace.envs.cube_env")
        self._mujoco = importlib.import_module("mujoco")
        # The arguments of OGBench's registered `cube-single-singletask-v0`, which only adds the time limit.
        self.cube: Any = cube_env.CubeEnv(
            env_type="single", permute_blocks=False, success_timing="pre", reward_task_id=TASK_ID
        )
        # OGBench makes both anew at every access: the actions' generator would lose its seed, the other takes 1 ms.
        self.observation_space = self.cube.observation_space
        self.action_space = self.cube.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float64Array, dict[str, Any]]:
        """Places arm and cube at random near the task's start.

        Args:
            seed: The same seed gives the same episode under the same actions, bit for bit.
            options: None are known.

        Raises:
            ValueError: If there are options.
        """
        if options:
            raise ValueError(f"`options` of CubeSingle must be empty, got {options}; the task is fixed.")
        super().reset(seed=seed)
        self.cube.reset(seed=seed)
        data = self.cube.data
        data.time = 0.0
        for trace in (data.qacc_warmstart, data.ctrl, data.cfrc_ext):
            trace[:] = 0.0
        self._mujoco.mj_forward(self.cube.model, data)
        return self.cube.compute_observation(), {}

    def step(self, action: Float32Array) -> tuple[Float64Array, float, bool, bool, dict[str, Any]]:
        """Moves the arm by one control step of 0.05 s; never truncates, the time limit is `gymnasium.make`'s."""
        obs, reward, terminated, truncated, info = self.cube.step(action)
        return obs, float(reward), bool(terminated), bool(truncated), {"success": bool(info["success"])}


if _REGISTERED_ID not in gym.registry:
    gym.register(id=_REGISTERED_ID, entry_point=f"{__name__}:CubeSingle", max_episode_steps=MAX_EPISODE_STEPS)


def evaluation_env_id() -> str:
    """Id of the environment with the module that registers it, for `gymnasium.make` and RLlib's `.environment(...)`."""
    return f"{__name__}:{_REGISTERED_ID}"


def collect(*, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Plays whole episodes, in turn a demonstration and a noisy attempt, until they hold `num_steps` steps.

    Args:
        num_steps: Least number of steps of all episodes together.
        seed: The same seed gives the same episodes, bit for bit, on one platform.

    Yields:
        One episode of T steps, as the fields of a Minari `EpisodeBuffer`: observations (T + 1, 28), environment actions
        (T, 5) in [-1, 1], float64 rewards, terminations, truncations, the `seed` of the reset.
    """
    rng = np.random.default_rng(seed)
    env = CubeSingle()
    is_demonstration = True
    while num_steps > 0:
        env_seed = int(rng.integers(2**31))
        noise_scale = _DEMONSTRATION_NOISE if is_demonstration else rng.uniform(*_ATTEMPT_NOISE_RANGE)
        noise = rng.normal(scale=noise_scale, size=(MAX_EPISODE_STEPS, _ACTION_DIM))
        episode = _play(env, env_seed, noise, use_oracle=True)
        yield {**episode, "seed": env_seed}
        num_steps -= len(episode["rewards"])
        is_demonstration = not is_demonstration


def reference_scores(*, num_episodes: int) -> tuple[float, float]:
    """Mean return of uniform random actions, and of OGBench's oracle without noise.

    Args:
        num_episodes: Episodes per score.
    """
    rng = np.random.default_rng(_REFERENCE_SEED)
    env = CubeSingle()
    random_returns, oracle_returns = [], []
    for env_seed in range(_REFERENCE_SEED, _REFERENCE_SEED + num_episodes):
        random_actions = rng.uniform(-1.0, 1.0, (MAX_EPISODE_STEPS, _ACTION_DIM))
        random_returns.append(_play(env, env_seed, random_actions, use_oracle=False)["rewards"].sum())
        no_noise = np.zeros((MAX_EPISODE_STEPS, _ACTION_DIM))
        oracle_returns.append(_play(env, env_seed, no_noise, use_oracle=True)["rewards"].sum())
    return float(np.mean(random_returns)), float(np.mean(oracle_returns))


def _import_ogbench(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise ImportError(
            'The environment CubeSingle needs the `ogbench` package: pip install "rllib-calql[ogbench]"'
        ) from err


def _play(env: CubeSingle, env_seed: int, noise: Float64Array, *, use_oracle: bool) -> dict[str, Any]:
    """Plays one episode with the actions `clip(oracle + noise, -1, 1)`, or `noise` alone, until success or its end."""
    first_obs, _ = env.reset(seed=env_seed)
    oracle = _new_oracle(env, env_seed) if use_oracle else None
    observations, actions, rewards = [first_obs], [], []
    terminated = False
    for step_noise in noise:
        wanted = step_noise if oracle is None else step_noise + oracle.select_action(None, _oracle_info(env))
        actions.append(np.clip(wanted, -1.0, 1.0).astype(np.float32))
        obs, reward, terminated, _, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
        if terminated:
            break
    is_last = np.arange(len(rewards)) == len(rewards) - 1
    return {
        "observations": np.stack(observations),
        "actions": np.stack(actions),
        "rewards": np.array(rewards),
        "terminations": is_last & terminated,
        "truncations": is_last & (not terminated),
    }


def _new_oracle(env: CubeSingle, seed: int) -> Any:
    """OGBench's closed-loop oracle, ready for an episode."""
    oracle = _import_ogbench("ogbench.manipspace.oracles.markov.cube_markov").CubeMarkovOracle(env=env.cube)
    with _numpy_seed(seed):
        oracle.reset(None, _oracle_info(env))
    return oracle


def _oracle_info(env: CubeSingle) -> dict[str, Any]:
    """What the oracle reads; outside OGBench's data collection mode the environment does not report the target."""
    return {
        **env.cube.compute_ob_info(),
        "privileged/target_block": 0,
        "privileged/target_block_pos": env.cube.cur_task_info["goal_xyzs"][0],
        "privileged/target_block_yaw": np.zeros(1),
    }


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, the oracle's own source of randomness, and gives it back as it was."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
