"""What `input_` and `input_filesystem` may be, and the form in which a config keeps them."""

from __future__ import annotations

import os
from typing import Any


def checked_input(input_: Any, *, is_local: bool = True) -> Any:
    """Returns `input_` as strings, or as objects that survive copies of the config.

    RLlib would silently take a `pathlib.Path` for no input, and copy a list of episodes with every copy of the config.
    What is there under a relative path is named by its absolute one, because Tune runs trials in folders of their own.

    Args:
        input_: What the user set; or `tune.grid_search` of several.
        is_local: Whether paths are those of this machine, and not of an `input_filesystem`.

    Raises:
        TypeError: If it is none of the things that can be read.
    """
    if isinstance(input_, dict) and list(input_) == ["grid_search"]:
        input_["grid_search"] = [checked_input(choice, is_local=is_local) for choice in input_["grid_search"]]
        return input_
    if isinstance(input_, (list, tuple)) and not _is_list_of_episodes(input_):
        parts = [_checked_part(part, is_local) for part in input_]
        if parts and None not in parts:
            return parts
    elif (part := _checked_part(input_, is_local)) is not None:
        return part
    raise TypeError(
        "`input_` must be a string, a path, a `ray.data.Dataset`, a list of `SingleAgentEpisode`, or a non-empty list "
        f"of these, got {input_!r}."
    )


def _checked_part(part: Any, is_local: bool) -> Any:
    """One input as it is kept in a config; None if it is none."""
    if isinstance(part, (str, os.PathLike)):
        path = os.fspath(part)
        return os.path.abspath(path) if is_local and path and os.path.exists(path) else path
    from rllib_calql.common.held_data import InMemoryDataset, InMemoryEpisodes

    if isinstance(part, (InMemoryDataset, InMemoryEpisodes)):
        return part
    if _is_list_of_episodes(part):
        return InMemoryEpisodes(part)
    # Told by name, because importing Ray Data takes seconds that most configs need not wait for.
    if any(base.__module__.startswith("ray.data.") and base.__name__ == "Dataset" for base in type(part).__mro__):
        return InMemoryDataset(part)
    return None


def _is_list_of_episodes(part: Any) -> bool:
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    return isinstance(part, (list, tuple)) and bool(part) and isinstance(part[0], SingleAgentEpisode)


def filesystem_of(setting: Any, kwargs: dict[str, Any]) -> Any:
    """The PyArrow file system that `input_filesystem` and `input_filesystem_kwargs` describe, or None.

    Raises:
        ValueError: If it is neither a file system nor the name of one.
    """
    if setting is None:
        return None
    from pyarrow import fs

    if isinstance(setting, fs.FileSystem):
        return setting
    by_name = {"s3": "S3FileSystem", "gcs": "GcsFileSystem", "abs": "AzureFileSystem"}
    if isinstance(setting, str) and hasattr(fs, by_name.get(setting, "")):
        return getattr(fs, by_name[setting])(**kwargs)
    if hasattr(setting, "protocol") and hasattr(setting, "open"):
        return fs.PyFileSystem(fs.FSSpecHandler(setting))
    raise ValueError(
        f'`input_filesystem` must be a `pyarrow.fs.FileSystem`, an fsspec file system, "s3", "gcs" or "abs", got '
        f"{setting!r}."
    )
