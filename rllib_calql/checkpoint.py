"""Checkpoint folders: checked, so that a wrong path gets a clear error instead of one from inside RLlib, and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MARK = "class_and_ctor_args.pkl"  # RLlib writes it into every folder that an object can be restored from.


def checked_checkpoint(path: Path) -> Path:
    """Returns the absolute path of a checkpoint of a whole algorithm.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is a file, or a folder that holds no checkpoint; the message names one inside it, if any.
    """
    path = path.expanduser().absolute()
    remedy = "give the folder that `algo.save_to_path()` or Ray Tune wrote"
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}: no such folder; {remedy}.")
    if not (path / _MARK).is_file() or not any(path.glob("algorithm_state.*")):
        inside = sorted(folder.parent for folder in path.glob(f"*/{_MARK}")) if path.is_dir() else []
        hint = f" Did you mean {str(inside[-1])!r}?" if inside else ""
        raise ValueError(f"{str(path)!r} is no checkpoint of an algorithm; {remedy}.{hint}")
    return path


def config_of(checkpoint: Path) -> Any:
    """The config in the checkpoint of an algorithm, any of RLlib's, free to be changed.

    Unpickling runs code: read checkpoints only from where you would run programs from.
    """
    from ray import cloudpickle

    with (checkpoint / _MARK).open("rb") as stored:
        content = cloudpickle.load(stored)
    (state,), _ = content["ctor_args_and_kwargs"]
    return content["class"].get_default_config().from_state(state).copy(copy_frozen=False)
