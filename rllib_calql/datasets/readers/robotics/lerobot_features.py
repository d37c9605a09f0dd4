"""What the `meta/info.json` of a LeRobot data set says: which features there are, and how they are stored."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ray.rllib.core.columns import Columns

from rllib_calql.datasets.episodes.files import DataFile, file_in
from rllib_calql.datasets.readers.robotics.column_map import ColumnMap, Joined
from rllib_calql.system.parsed_json import parsed_json

_VERSIONS = ("v2.0", "v2.1", "v3.0")
_OBSERVATION = "observation."
_KEYS = ("obs", "actions", "rewards", "terminated", "truncated")
FLAGS = {Columns.TERMINATEDS: "next.terminated", Columns.TRUNCATEDS: "next.truncated"}
"""Features of single ends, which this package writes; LeRobot's own is `next.done`."""

REWARD, DONE, SUCCESS = "next.reward", "next.done", "next.success"


@dataclass(frozen=True)
class LeRobotInfo:
    """A data set before its frames are read.

    Attributes:
        file: `meta/info.json`.
        features: Name -> what is said of it.
        leaves: Leaf of `obs`, `actions` and `rewards` -> the features that it is made of.
        flags: RLlib's names of flags -> features.
        num_frames: Number of frames, None if it is not told.
        num_episodes: Number of episodes, None if it is not told.
    """

    file: DataFile
    features: dict[str, dict[str, Any]]
    leaves: dict[str, Joined]
    flags: dict[str, str]
    num_frames: int | None
    num_episodes: int | None

    def is_image(self, name: str) -> bool:
        """Whether a feature is stored as encoded images."""
        return bool(self.features[name].get("dtype") == "image")

    def size(self, name: str) -> int:
        """Numbers of a feature in one frame."""
        shape = self.features[name].get("shape")
        is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        return math.prod(shape) if is_shape and shape else 1


def info_file(name: str, filesystem: Any = None) -> DataFile | None:
    """The `meta/info.json` in a folder; None if it is no LeRobot data set, or if nothing can be reached there."""
    try:
        return file_in(f"{name.rstrip('/')}/meta", "info.json", filesystem)
    except (ValueError, FileNotFoundError):  # Whoever looks for the data themselves tells it by the user's own name.
        return None


def read_info(file: DataFile, column_map: ColumnMap | None) -> LeRobotInfo:
    """Reads what there is, and says what is read.

    Raises:
        ValueError: If it is of a version that is not known, has no rewards, or observations are videos.
    """
    content, features = _parsed(file)
    if column_map is not None:
        column_map.refuse_keys(_KEYS, "LeRobot data sets")
    mapped = {} if column_map is None else column_map.leaves
    leaves = {leaf: joined for leaf, joined in mapped.items() if leaf not in FLAGS}
    if not any(leaf.partition("/")[0] == Columns.OBS for leaf in leaves):
        names = sorted(name for name in features if name.startswith(_OBSERVATION))
        leaves |= {
            Columns.OBS if len(names) == 1 else f"{Columns.OBS}/{_part(file, name)}": Joined((name,), False)
            for name in names
        }
        if not names:
            raise _missing(file, features, "observations, `observation.state` and so on")
    if not any(leaf.partition("/")[0] == Columns.ACTIONS for leaf in leaves):
        leaves[Columns.ACTIONS] = Joined(("action",), False)
    leaves.setdefault(Columns.REWARDS, Joined((REWARD,), False))
    flags = {column: joined.names[0] for column, joined in mapped.items() if column in FLAGS}
    if not flags:
        flags = {column: name for column, name in FLAGS.items() if name in features}
    for leaf, joined in leaves.items():
        for name in joined.names:
            _check_feature(file, features, leaf, name)
    for name in flags.values():
        if name not in features:
            raise _missing(file, features, f"`{name}`, which the column map names")
    counts = [content.get(name) for name in ("total_frames", "total_episodes")]
    num_frames, num_episodes = (count if type(count) is int else None for count in counts)
    return LeRobotInfo(file, features, leaves, flags, num_frames, num_episodes)


def _parsed(file: DataFile) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    with file.open() as opened:
        text = opened.read(16 * 2**20)
    try:
        content = parsed_json(text)
    except ValueError as err:
        raise ValueError(f"{str(file)!r} is no JSON ({err}); download or write the data set again.") from err
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise ValueError(
            f"{str(file)!r} does not describe a LeRobot data set: it has no `features`; write it again, or keep other "
            "data in a folder without `meta/info.json`."
        )
    version = content.get("codebase_version")
    if version not in _VERSIONS:
        raise ValueError(
            f"{str(file)!r} says `codebase_version` {version!r}; {', '.join(_VERSIONS)} are read. Convert the data set "
            "with LeRobot's own scripts, `lerobot.datasets.v30` or those of its version."
        )
    return content, features


def _check_feature(file: DataFile, features: dict[str, dict[str, Any]], leaf: str, name: str) -> None:
    if name not in features:
        if leaf != Columns.REWARDS:
            raise _missing(file, features, f"`{name}`")
        remedy = (
            f"by a column map `columns.yaml` in its folder, a flag of success may serve: `rewards: {SUCCESS}`"
            if SUCCESS in features
            else "add a feature `next.reward`, for instance 1 where the task succeeds and 0 elsewhere"
        )
        raise ValueError(
            f"The LeRobot data set of {str(file)!r} has no rewards (`{name}`), as data for imitation have none; values "
            f"are learned from rewards: {remedy}. Its features are {_listed(features)}."
        )
    if features[name].get("dtype") == "video":
        others = [
            other for other in features if other.startswith(_OBSERVATION) and features[other].get("dtype") != "video"
        ]
        raise ValueError(
            f"`{name}` of the LeRobot data set of {str(file)!r} is a video, which is not decoded here; leave it out by "
            f"a column map `columns.yaml` in its folder, `obs: [{', '.join(others) or '...'}]`, or write the data set "
            "with `use_videos=False`, which stores images in its Parquet files."
        )


def _part(file: DataFile, name: str) -> str:
    part = name.removeprefix(_OBSERVATION)
    if not re.fullmatch(r"[^/]+", part):
        raise ValueError(f"{str(file)!r} has the feature {name!r}, whose name cannot be part of a path; rename it.")
    return part


def _missing(file: DataFile, features: dict[str, Any], what: str) -> ValueError:
    return ValueError(
        f"The LeRobot data set of {str(file)!r} has no {what}; its features are {_listed(features)}. A column map "
        "`columns.yaml` in its folder names others, such as `obs: [observation.state]`."
    )


def _listed(features: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in features)
