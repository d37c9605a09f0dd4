"""Writing whole Minari datasets: built at any path, then moved into place in one rename.

Readers see a whole dataset or none, and of two processes that write one dataset at once the first wins. Minari is
imported on first use, not with this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym

from rllib_calql.system.plain_names import refuse_unplain_id

_DATA_FORMAT = "hdf5"  # One file; Minari's Arrow format takes 7 times as long to write 450 episodes.


def dataset_path(dataset_id: str) -> Path:
    """Folder of a dataset below `MINARI_DATASETS_PATH`, which is read at the time of the call; "" is the root.

    Raises:
        ValueError: If the id leads elsewhere.
    """
    from minari.storage import get_dataset_path

    if dataset_id:
        refuse_unplain_id(dataset_id, "The id of a Minari dataset")
    return Path(get_dataset_path(dataset_id))


def new_dataset_path(dataset_id: str, argument: str, prefix: str = "") -> Path:
    """Folder of a dataset that is to be written.

    Args:
        dataset_id: Its id.
        argument: What the user gave it as, for the message.
        prefix: What stood before the id there.

    Raises:
        ImportError: If Minari is not installed.
        ValueError: If Minari could not read a dataset of that id.
    """
    try:
        from minari.dataset.minari_dataset import parse_dataset_id
    except ImportError as err:
        raise ImportError('Writing Minari data needs the `minari` package: pip install "rllib-calql[minari]"') from err
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as err:  # Minari's own check lets an id without a version pass.
        raise ValueError(
            f"{argument} must be `{prefix}<name>-v<number>`, with namespaces in front if wanted, such as "
            f"`{prefix}mine/hopper-v0`, got '{prefix}{dataset_id}'."
        ) from err
    return dataset_path(dataset_id)


def is_dataset(path: Path) -> bool:
    """Whether a folder holds a Minari dataset."""
    return (path / "data" / "metadata.json").is_file()


def write_dataset(
    path: Path,
    episodes: Iterable[dict[str, Any]],
    *,
    dataset_id: str,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    env_spec: Any,
    metadata: dict[str, Any],
) -> None:
    """Writes a dataset to any path, one episode in memory at a time.

    `minari.create_dataset_from_buffers` writes below `MINARI_DATASETS_PATH` only. That would have to be changed for the
    whole process meanwhile, and worker processes started at that moment would inherit it.

    Args:
        path: A folder that does not exist yet.
        episodes: Fields of a Minari `EpisodeBuffer` each.
        dataset_id: Minari id that the dataset will have.
        observation_space: Space of the observations.
        action_space: Space of the actions.
        env_spec: What `recover_environment` makes the environment from, or None.
        metadata: Further entries of `metadata.json`.
    """
    import minari
    from minari.dataset.minari_storage import MinariStorage

    path.mkdir()
    storage = MinariStorage.new(
        path / "data",
        observation_space=observation_space,
        action_space=action_space,
        env_spec=env_spec,
        data_format=_DATA_FORMAT,
        jpeg_encoding=False,  # Images are to come back as they were.
    )
    storage.update_episodes(minari.data_collector.EpisodeBuffer(**episode) for episode in episodes)
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            **({} if env_spec is None else {"eval_env_spec": env_spec.to_json()}),
            "author": {"rllib-calql"},
            **metadata,
        }
    )


def publish(built: Path, path: Path) -> bool:
    """Moves a whole dataset into place; leaves it where it is and returns False if another process was first.

    Raises:
        FileExistsError: If something other than a dataset stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        built.rename(path)
        return True
    except OSError as err:
        if not path.exists():
            raise
        if not is_dataset(path):
            raise FileExistsError(
                f"{path} exists but holds no Minari dataset (no data/metadata.json); move it away or delete it."
            ) from err
        return False
