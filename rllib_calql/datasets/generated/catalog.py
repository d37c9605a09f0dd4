"""The datasets this package generates itself, and their making on first use.

A dataset is written into a hidden folder beside its final place and moved there in one rename. Readers therefore see a
whole dataset or none, of two processes that build at once the first wins and the other drops its copy, and no lock can
be left behind by a process that dies. A dataset whose policy is trained first keeps the training's checkpoints in
another hidden folder, named after dataset and seed, until the dataset is in place: a killed build goes on from there.

Minari, the simulators and Ray are imported on first use, not with this module.
"""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from rllib_calql.datasets.episodes import minari_storage
from rllib_calql.datasets.generated import cube, hopper, hopper_training, pendulum, pixel_reach, pointmaze
from rllib_calql.system import activity

_REFERENCE_EPISODES = 20
_STEPS = "generated steps"  # Unit of what a process is doing, see `system.activity`.
_BUILD_PREFIX = ".rllib-calql-build-"  # Minari does not list hidden folders.
_TRAINING_PREFIX = ".rllib-calql-training-"
_ABANDONED_AFTER_S = 3600.0  # Writing takes seconds. Only a killed process leaves a folder that grows old.


class _ReferenceScores(Protocol):
    def __call__(self, *, num_episodes: int) -> tuple[float, float]: ...


@dataclass(frozen=True)
class _Generator:
    """How one dataset is made.

    Attributes:
        collect: Called with `num_steps` and `seed`; yields episodes as the fields of a Minari `EpisodeBuffer`.
        reference_scores: Mean evaluation return of random actions and of an expert, mostly the noiseless controller.
        env_id: Environment of both the data and the evaluation.
        algorithm_name: Of the controller that made the data.
        description: One sentence.
        num_steps: Default size in environment steps.
        env_config: Constructor arguments of the environment.
        has_goal: Whether an episode is terminated by success, and only by success.
        is_trained: Whether `collect` trains a policy first; it then also takes `work_dir` and `report`.
        packages: Modules that must be importable beside those of the core installation.
        extra: The extra of this package that installs them.
    """

    collect: Callable[..., Iterator[dict[str, Any]]]
    reference_scores: _ReferenceScores
    env_id: str
    algorithm_name: str
    description: str
    num_steps: int
    env_config: dict[str, Any] = field(default_factory=dict)
    has_goal: bool = False
    is_trained: bool = False
    packages: tuple[str, ...] = ("minari", "h5py", "PIL")
    extra: str = "examples"


def _pointmaze(size: str, num_steps: int, *, collect: Callable[..., Any], description: str) -> _Generator:
    return _Generator(
        collect=partial(collect, size),
        reference_scores=partial(pointmaze.reference_scores, size),
        env_id=pointmaze.evaluation_env_id(size),
        algorithm_name="waypoint PD controller with Gaussian noise",
        description=description,
        num_steps=num_steps,
        env_config=pointmaze.evaluation_env_config(size),
        has_goal=True,
        packages=("minari", "h5py", "PIL", "mujoco", "gymnasium_robotics"),
    )


def _pointmaze_play(size: str, num_steps: int) -> _Generator:
    description = (
        f"A point robot driven between random cells of PointMaze ({size}) from random start cells. Sparse reward for "
        "the fixed goal cell of the evaluation environment, which ends the episode."
    )
    return _pointmaze(size, num_steps, collect=pointmaze.collect, description=description)


def _pointmaze_demos(size: str, num_steps: int) -> _Generator:
    description = (
        f"A point robot driven from the start to the goal of PointMaze ({size}) with little noise. Sparse reward for "
        "the goal, which ends the episode."
    )
    return _pointmaze(size, num_steps, collect=pointmaze.collect_demonstrations, description=description)


_GENERATORS = {
    "rllib-calql/pointmaze-umaze-play-v0": _pointmaze_play("umaze", num_steps=100_000),
    "rllib-calql/pointmaze-medium-play-v0": _pointmaze_play("medium", num_steps=200_000),
    "rllib-calql/pointmaze-large-play-v0": _pointmaze_play("large", num_steps=300_000),
    "rllib-calql/pointmaze-umaze-demos-v0": _pointmaze_demos("umaze", num_steps=12_000),
    "rllib-calql/pointmaze-medium-demos-v0": _pointmaze_demos("medium", num_steps=20_000),
    "rllib-calql/pendulum-swingup-v0": _Generator(
        collect=pendulum.collect,
        reference_scores=pendulum.reference_scores,
        env_id=pendulum.ENV_ID,
        algorithm_name="energy-shaping swing-up with PD balancing, mixed with uniform random actions",
        description="Pendulum swing-up; the share of random actions of an episode is uniform in [0, 1].",
        num_steps=20_000,
    ),
    "rllib-calql/pixel-reach-v0": _Generator(
        collect=pixel_reach.collect,
        reference_scores=pixel_reach.reference_scores,
        env_id=pixel_reach.evaluation_env_id(),
        algorithm_name="proportional controller with Gaussian noise, mixed with uniform random actions",
        description=(
            "A point is driven to a goal and seen as an image of 32 x 32; the share of random actions of an episode is "
            "uniform in [0, 1]. Reward -1 until the goal is reached, which ends the episode."
        ),
        num_steps=20_000,
        has_goal=True,
    ),
    "rllib-calql/cube-single-narrow-v0": _Generator(
        collect=cube.collect,
        reference_scores=cube.reference_scores,
        env_id=cube.evaluation_env_id(),
        algorithm_name="OGBench's scripted oracle with Gaussian noise",
        description=(
            "A robot arm moves one cube (OGBench's cube-single, task 2): about 50 demonstrations and as many attempts "
            "with so much noise that most of them fail. Reward -1 until the cube is in place, which ends the episode."
        ),
        num_steps=11_500,
        has_goal=True,
        packages=("minari", "h5py", "PIL", "mujoco", "ogbench"),
        extra="ogbench",
    ),
    "rllib-calql/hopper-medium-v0": _Generator(
        collect=hopper.collect,
        reference_scores=hopper.reference_scores,
        env_id=hopper_training.ENV_ID,
        algorithm_name="RLlib SAC, stopped at a medium return",
        description="Hopper, played by a policy whose training was stopped at a medium return, with exploration noise.",
        num_steps=100_000,
        is_trained=True,
        packages=("minari", "h5py", "PIL", "mujoco"),
    ),
}


def generated_dataset_ids() -> list[str]:
    """Minari ids of all datasets that this package can generate."""
    return list(_GENERATORS)


def is_generated(dataset_id: str) -> bool:
    """Whether this package can generate the dataset of that Minari id."""
    return dataset_id in _GENERATORS


def check_packages(dataset_id: str) -> None:
    """Checks that a dataset is there or that what generates it is installed, without importing it.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If the id is not one of `generated_dataset_ids()`.
    """
    generator = _generator(dataset_id)
    _import_package("minari", dataset_id)
    if minari_storage.is_dataset(minari_storage.dataset_path(dataset_id)):
        return
    for package in generator.packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package, dataset_id)


def ensure_dataset(dataset_id: str, *, seed: int = 0, progress: bool | None = None) -> None:
    """Generates a dataset unless it is in the local Minari folder already.

    Args:
        dataset_id: One of `generated_dataset_ids()`.
        seed: Seed of the data if they are made now. A dataset that exists stays as it is, whatever its seed.
        progress: As in `generate`.

    Raises:
        ImportError: If a package that the dataset needs is not installed.
        ValueError: If the id is not one of `generated_dataset_ids()`.
        FileExistsError: If something other than a dataset stands in its place.
    """
    _generator(dataset_id)  # Refuses an unknown id, even where somebody's dataset of that id exists.
    _import_package("minari", dataset_id)
    if not minari_storage.is_dataset(minari_storage.dataset_path(dataset_id)):
        _import_packages(dataset_id)
        _build(dataset_id, dataset_id, seed=seed, num_steps=None, progress=progress)


def generate(
    dataset_id: str,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    progress: bool | None = None,
    save_as: str | None = None,
) -> None:
    """Generates a dataset in the local Minari folder (`MINARI_DATASETS_PATH`, read at the time of the call).

    Args:
        dataset_id: One of `generated_dataset_ids()`.
        seed: Seed of the data, at least 0. The same seed gives the same data bit for bit.
        num_steps: Least number of environment steps (whole episodes are kept), at least 1. Default: the dataset's own.
        progress: Whether progress is shown on stderr. By default a bar on a terminal and plain lines elsewhere; True is
            a bar in any case, False is silence.
        save_as: Minari id to save the data under. Default: `dataset_id`.

    Raises:
        ImportError: If a package that the dataset needs is not installed.
        ValueError: If an argument is out of range or the id is not one of `generated_dataset_ids()`.
        FileExistsError: If the dataset exists already.
    """
    _import_packages(dataset_id)
    target_id = dataset_id if save_as is None else save_as
    path = minari_storage.new_dataset_path(target_id, "`save_as`")
    if path.exists() or not _build(dataset_id, target_id, seed=seed, num_steps=num_steps, progress=progress):
        raise FileExistsError(
            f"There is a dataset {target_id!r} at {path} already; delete it (minari delete {target_id}) "
            "or choose another id with `save_as`."
        )


def _generator(dataset_id: str) -> _Generator:
    if dataset_id in _GENERATORS:
        return _GENERATORS[dataset_id]
    close = difflib.get_close_matches(dataset_id, _GENERATORS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"`dataset_id` must be one of {', '.join(_GENERATORS)}, got {dataset_id!r}.{hint}")


def _import_packages(dataset_id: str) -> None:
    for package in _generator(dataset_id).packages:
        _import_package(package, dataset_id)


def _import_package(package: str, dataset_id: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as err:
        raise _missing(package, dataset_id) from err


def _missing(package: str, dataset_id: str) -> ImportError:
    return ImportError(
        f"Generating the dataset {dataset_id!r} needs the `{package}` package: "
        f'pip install "rllib-calql[{_generator(dataset_id).extra}]"'
    )


def _build(dataset_id: str, target_id: str, *, seed: int, num_steps: int | None, progress: bool | None) -> bool:
    """Collects, writes to a hidden folder, moves into place; False if another process was first."""
    generator = _generator(dataset_id)
    num_steps = generator.num_steps if num_steps is None else num_steps
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    root = minari_storage.dataset_path("")
    work_dir = root / f"{_TRAINING_PREFIX}{dataset_id.replace('/', '-')}-seed{seed}"
    training = {"work_dir": work_dir, "report": _reporter(progress)} if generator.is_trained else {}
    activity.say(f"generating {target_id}: {{done}} of {num_steps:,} steps", unit=_STEPS, total=num_steps)
    with _progress_on_stderr(target_id, num_steps, progress) as advance:
        episodes = []
        for episode in generator.collect(num_steps=num_steps, seed=seed, **training):
            episodes.append(episode)
            advance(len(episode["rewards"]))
            activity.count(_STEPS, len(episode["rewards"]))
        _remove_abandoned_builds(root)
        build_path = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=root))
        try:
            _write(build_path / "dataset", generator, episodes, dataset_id=dataset_id, target_id=target_id, seed=seed)
            is_first = minari_storage.publish(build_path / "dataset", root / target_id)
        finally:
            shutil.rmtree(build_path, ignore_errors=True)
    shutil.rmtree(work_dir, ignore_errors=True)
    return is_first


def _reporter(show: bool | None) -> Callable[[str], None]:
    def report(line: str) -> None:
        activity.say(line)
        if show is not False:
            print(line, file=sys.stderr, flush=True)

    return report


def _write(
    path: Path,
    generator: _Generator,
    episodes: list[dict[str, Any]],
    *,
    dataset_id: str,
    target_id: str,
    seed: int,
) -> None:
    """Writes the episodes with their environment and reference scores to any path."""
    ref_min_score, ref_max_score = generator.reference_scores(num_episodes=_REFERENCE_EPISODES)
    env: Any = gym.make(generator.env_id, **generator.env_config)
    env.close()
    success_share = float(np.mean([episode["terminations"][-1] for episode in episodes]))
    minari_storage.write_dataset(
        path,
        episodes,
        dataset_id=target_id,
        observation_space=env.observation_space,
        action_space=env.action_space,
        env_spec=env.spec,
        metadata={
            "algorithm_name": generator.algorithm_name,
            "description": generator.description,
            "generator": dataset_id,
            "seed": seed,
            "ref_min_score": ref_min_score,
            "ref_max_score": ref_max_score,
            "num_episodes_average_score": _REFERENCE_EPISODES,
            **({"success_share": success_share} if generator.has_goal else {}),
        },
    )


def _remove_abandoned_builds(root: Path) -> None:
    for path in root.glob(f"{_BUILD_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _progress_on_stderr(dataset_id: str, num_steps: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of steps just made."""
    if show is False:
        yield lambda steps: None
    elif (show or sys.stderr.isatty()) and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"Generating {dataset_id}", total=num_steps)
            yield lambda steps: bar.advance(task, steps)
    else:
        start_s = time.monotonic()
        print(f"Generating {dataset_id} ({num_steps:,} steps) ...", file=sys.stderr, flush=True)
        yield lambda steps: None
        print(f"Generated {dataset_id} in {time.monotonic() - start_s:.1f} s.", file=sys.stderr, flush=True)
