"""Data of gymnasium-robotics' PointMaze by a noisy waypoint controller: wide play data, and narrow demonstrations.

Data and evaluation use one and the same environment: a fixed reset cell, a fixed goal cell, sparse reward, and an
episode that ends at the goal. At every reset the environment moves start and goal by up to 0.25 m per axis inside their
cells, in evaluation and data alike; an episode's exact goal is its `desired_goal`.

In play data the start cell varies, through the reset option `reset_cell`, and the controller heads for random cells,
whatever the goal is. A demonstration begins where evaluation does and goes straight to the goal, with little noise.

Steps are taken by MuJoCo itself with the environment's own velocity limit, which is four times as fast as the
environment's `step` and gives the same numbers bit for bit (the tests replay the data through the environment).

gymnasium-robotics and MuJoCo are imported on first use, not with this module.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

Cell = tuple[int, int]
Point = tuple[float, float]
Float64Array = npt.NDArray[np.float64]

SUCCESS_RADIUS = 0.45  # m; gymnasium_robotics/envs/maze/maze_v4.py, `compute_reward` (its docstring says 0.5).
_MAX_SPEED = 5.0  # m/s per axis; gymnasium_robotics/envs/maze/point.py, `_clip_velocity`.
_JITTER = 0.25  # m per axis around a cell's centre, for the play targets as for the environment's own goals.
_TARGET_RADIUS = 0.2  # m from a play target, at which the next one is drawn.
_GAIN = 2.0  # Action per metre. With `_DAMPING` slightly under critical: one unit of action accelerates by 24 m/s^2.
_DAMPING = 0.5  # Action per m/s.
_GAIN_RANGE = (0.5, 1.0)  # Factor on `_GAIN` of one episode, so that the data hold slow and fast driving.
_NOISE_RANGE = (0.1, 0.6)  # Standard deviation of the action noise of one episode of play.
_DEMONSTRATION_NOISE = 0.1  # The same of all demonstrations.
_REFERENCE_SEED = 20_230_309  # The reference scores depend on the evaluation environment only, not on the data's seed.


@dataclass(frozen=True)
class Maze:
    """One PointMaze environment.

    Attributes:
        env_id: Its id, with the module that registers it, as `gymnasium.make` and RLlib take it.
        rows: The map: `#` wall, `.` free, `r` start of an evaluation episode, `g` its goal. Cells are 1 m wide.
        goal_visits: Probability that the next target of the play controller is the goal cell. Chosen so that about 40 %
            of the data's episodes end at the goal.
    """

    env_id: str
    rows: tuple[str, ...]
    goal_visits: float

    def cells(self, marks: str = ".rg") -> list[Cell]:
        """All (row, column) whose mark is one of `marks`, in reading order."""
        return [(i, j) for i, row in enumerate(self.rows) for j, mark in enumerate(row) if mark in marks]

    def centre(self, cell: Cell) -> Point:
        """Coordinates of a cell's centre in metres; the origin is the middle of the map."""
        return cell[1] + 0.5 - len(self.rows[0]) / 2, len(self.rows) / 2 - cell[0] - 0.5

    def cell_at(self, point: Point) -> Cell:
        """The cell that holds a point, the inverse of `centre`."""
        return math.floor(len(self.rows) / 2 - point[1]), math.floor(point[0] + len(self.rows[0]) / 2)


MAZES = {
    "umaze": Maze(
        env_id="gymnasium_robotics:PointMaze_UMaze-v3",
        rows=(
            "#####",
            "#r..#",
            "###.#",
            "#g..#",
            "#####",
        ),
        goal_visits=0.2,
    ),
    "medium": Maze(
        env_id="gymnasium_robotics:PointMaze_Medium-v3",
        rows=(
            "########",
            "#r.##..#",
            "#..#...#",
            "##...###",
            "#..#...#",
            "#.#..#.#",
            "#...#.g#",
            "########",
        ),
        goal_visits=0.17,
    ),
    "large": Maze(
        env_id="gymnasium_robotics:PointMaze_Large-v3",
        rows=(
            "############",
            "#r...#.....#",
            "#.##.#.#.#.#",
            "#......#...#",
            "#.####.###.#",
            "#..#.#.....#",
            "##.#.#.#.###",
            "#..#...#..g#",
            "############",
        ),
        goal_visits=0.22,
    ),
}


def evaluation_env_id(size: str) -> str:
    """Id of the environment of a maze size ("umaze", "medium", "large"), for RLlib's `.environment(...)`."""
    return _maze(size).env_id


def evaluation_env_config(size: str) -> dict[str, Any]:
    """Constructor arguments of the evaluation environment, for `gymnasium.make` and RLlib's `env_config`.

    Args:
        size: "umaze", "medium" or "large".
    """
    marks: dict[str, int | str] = {"#": 1, ".": 0}
    return {
        "maze_map": [[marks.get(mark, mark) for mark in row] for row in _maze(size).rows],
        "continuing_task": False,
    }


def next_cells(maze: Maze, target: Cell) -> dict[Cell, Cell]:
    """The neighbour that every free cell goes to next on a shortest path to `target` (breadth-first search)."""
    free = set(maze.cells())
    towards = {target: target}
    frontier = deque([target])
    while frontier:
        i, j = cell = frontier.popleft()
        for neighbour in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if neighbour in free and neighbour not in towards:
                towards[neighbour] = cell
                frontier.append(neighbour)
    return towards


def collect(size: str, *, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Plays whole episodes until they hold `num_steps` steps.

    Args:
        size: "umaze", "medium" or "large".
        num_steps: Least number of steps of all episodes together.
        seed: The same seed gives the same episodes, bit for bit, on one platform.

    Yields:
        One episode of T steps, as the fields of a Minari `EpisodeBuffer`: observations of length T + 1, environment
        actions (T, 2) in [-1, 1], float64 rewards, terminations, truncations, the `seed` and `options` of the reset.
    """
    maze = _maze(size)
    starts = maze.cells(".r")
    return _collect(size, num_steps, seed, starts, lambda env, rng: _play_targets(maze, rng), _NOISE_RANGE)


def collect_demonstrations(size: str, *, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Drives from the evaluation's start straight to its goal, in whole episodes, until they hold `num_steps` steps.

    Args and yields as of `collect`.
    """
    noise_range = (_DEMONSTRATION_NOISE, _DEMONSTRATION_NOISE)
    starts = _maze(size).cells("r")
    return _collect(size, num_steps, seed, starts, lambda env, rng: repeat(_goal(env)), noise_range)


def _collect(
    size: str,
    num_steps: int,
    seed: int,
    starts: list[Cell],
    targets: Callable[[Any, np.random.Generator], Iterator[Point]],
    noise_range: tuple[float, float],
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    env, max_steps = _make_env(size)
    try:
        while num_steps > 0:
            env_seed = int(rng.integers(2**31))
            options = {"reset_cell": list(starts[rng.integers(len(starts))])}
            env.reset(seed=env_seed, options=options)
            gain = _GAIN * rng.uniform(*_GAIN_RANGE)
            noise = rng.normal(scale=rng.uniform(*noise_range), size=(max_steps, 2))
            episode = _drive(env, _maze(size), targets(env, rng), gain=gain, noise=noise)
            yield {**episode, "seed": env_seed, "options": options}
            num_steps -= len(episode["rewards"])
    finally:
        env.close()


def reference_scores(size: str, *, num_episodes: int) -> tuple[float, float]:
    """Mean return of evaluation episodes under uniform random actions, and under the controller without noise.

    Args:
        size: "umaze", "medium" or "large".
        num_episodes: Episodes per score.
    """
    maze = _maze(size)
    rng = np.random.default_rng(_REFERENCE_SEED)
    env, max_steps = _make_env(size)
    random_returns, controller_returns = [], []
    try:
        for episode_index in range(num_episodes):
            env_seed = _REFERENCE_SEED + episode_index
            env.reset(seed=env_seed)
            noise = rng.uniform(-1.0, 1.0, (max_steps, 2))
            random_episode = _drive(env, maze, repeat(_goal(env)), gain=0.0, damping=0.0, noise=noise)
            random_returns.append(random_episode["rewards"].sum())
            env.reset(seed=env_seed)
            episode = _drive(env, maze, repeat(_goal(env)), gain=_GAIN, noise=np.zeros((max_steps, 2)))
            controller_returns.append(episode["rewards"].sum())
    finally:
        env.close()
    return float(np.mean(random_returns)), float(np.mean(controller_returns))


def _maze(size: str) -> Maze:
    if size not in MAZES:
        raise ValueError(f"`size` must be one of {', '.join(MAZES)}, got {size!r}.")
    return MAZES[size]


def _make_env(size: str) -> tuple[Any, int]:
    """The bare environment (its attributes are not part of `gymnasium.Env`) and its time limit in steps."""
    env = gym.make(evaluation_env_id(size), **evaluation_env_config(size))
    assert env.spec is not None
    assert env.spec.max_episode_steps is not None
    return env.unwrapped, env.spec.max_episode_steps


def _goal(env: Any) -> Point:
    x, y = env.goal.tolist()
    return x, y


_routes = cache(next_cells)


def _play_targets(maze: Maze, rng: np.random.Generator) -> Iterator[Point]:
    """Random points near cell centres, the goal cell with probability `goal_visits`."""
    goal_cells, other_cells = maze.cells("g"), maze.cells(".r")
    while True:
        cells = goal_cells if rng.random() < maze.goal_visits else other_cells
        x, y = maze.centre(cells[rng.integers(len(cells))])
        dx, dy = rng.uniform(-_JITTER, _JITTER, size=2)
        yield x + dx, y + dy


def _drive(
    env: Any,
    maze: Maze,
    targets: Iterator[Point],
    *,
    gain: float,
    noise: Float64Array,
    damping: float = _DAMPING,
) -> dict[str, Any]:
    """Drives a freshly reset environment from target to target until it succeeds or `len(noise)` steps have passed.

    The action is `clip(gain * (waypoint - position) - damping * velocity + noise, -1, 1)`; the waypoint is the centre
    of the next cell on the way, in the target's own cell the target.
    """
    mujoco = importlib.import_module("mujoco")
    model, data = env.model, env.data
    goal_x, goal_y = _goal(env)
    states = np.empty((len(noise) + 1, 4))
    actions = np.empty((len(noise), 2), dtype=np.float32)
    x, y, vx, vy = states[0] = *data.qpos.tolist(), *data.qvel.tolist()
    target = next(targets)
    succeeded = False
    for step, (noise_x, noise_y) in enumerate(noise.tolist()):
        if math.hypot(target[0] - x, target[1] - y) <= _TARGET_RADIUS:
            target = next(targets)
        cell, target_cell = maze.cell_at((x, y)), maze.cell_at(target)
        way_x, way_y = target if cell == target_cell else maze.centre(_routes(maze, target_cell)[cell])
        action = actions[step]
        action[0] = min(1.0, max(-1.0, gain * (way_x - x) - damping * vx + noise_x))
        action[1] = min(1.0, max(-1.0, gain * (way_y - y) - damping * vy + noise_y))
        if abs(vx) > _MAX_SPEED or abs(vy) > _MAX_SPEED:
            data.qvel[:] = np.clip(data.qvel, -_MAX_SPEED, _MAX_SPEED)
        data.ctrl[:] = action
        mujoco.mj_step(model, data)
        x, y, vx, vy = states[step + 1] = *data.qpos.tolist(), *data.qvel.tolist()
        succeeded = math.hypot(x - goal_x, y - goal_y) <= SUCCESS_RADIUS
        if succeeded:
            break
    length = step + 1
    states = states[: length + 1].copy()
    is_last = np.arange(length) == length - 1
    return {
        "observations": {
            "achieved_goal": states[:, :2].copy(),
            "desired_goal": np.tile(env.goal, (length + 1, 1)),
            "observation": states,
        },
        "actions": actions[:length].copy(),
        "rewards": (is_last & succeeded).astype(np.float64),
        "terminations": is_last & succeeded,
        "truncations": is_last & (not succeeded),
    }
