"""The folder of a study's results: which study it is of, who runs it, and what in it may be removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs

from rllib_calql.experiments.run_folders import foreign_entries, shown
from rllib_calql.study.evaluations import STUDY_FILE, is_own_file, read_json, read_study_file, write_json
from rllib_calql.system.file_lock import held_lock

TRIALS_FOLDER = "trials"
TUNE_FOLDER = "tune"
_MARK_FILE = ".rllib_calql_study.json"  # In every folder that a study made.
_LOCK_FILE = ".rllib_calql_study.lock"
_STUDY = "study"  # Key of the mark: the study's name.
_SEED = re.compile(r"seed_\d+")


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes from the folder, and marks it as that of the study.

    Args:
        folder: Made if it does not exist.
        name: The study's name.

    Raises:
        FileExistsError: If the folder holds anything else, or is another study's. Nothing has been changed then.
        ValueError: If that cannot be told, since a file is damaged.
        LockedError: If another process runs a study there.
    """
    refuse_foreign(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held_lock(folder / _LOCK_FILE):
            refuse_foreign(folder, name)
            yield
    finally:
        with suppress(OSError):  # Not empty, as a rule; one that stayed so is taken back.
            folder.rmdir()


def mark(folder: Path, name: str) -> None:
    """Marks a folder as made by the study."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _MARK_FILE, {_STUDY: name})


def refuse_foreign(folder: Path, name: str) -> None:
    """Checks that a folder is new, empty, or that of the study of this name.

    Raises:
        FileExistsError: If it is not.
        ValueError: If that cannot be told, since a file is damaged.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"'{folder}' is no folder; give another `--output`.")
    owner = _owner(folder)
    if owner is None and (foreign := _foreign(folder)):
        raise FileExistsError(
            f"'{folder}' holds {shown(foreign)}, which no study made; give `--output` a folder that is new, empty, or "
            "of this study."
        )
    if owner not in (None, name):
        raise FileExistsError(
            f"'{folder}' holds the results of the study {owner!r}, this one is called {name!r}; give another "
            "`--output`."
        )


def new_tune_folder(folder: Path, name: str) -> Path:
    """Makes the folder for Ray Tune anew. What lasts lies in the trials' folders.

    Raises:
        FileExistsError: If there is one that this study did not make. It stays as it is.
    """
    path = folder / TUNE_FOLDER
    if path.is_symlink() or path.exists():
        if not _is_removable(path, name):
            raise FileExistsError(
                f"'{path}' was not made by the study {name!r}, so it is not replaced; move it away, or give another "
                "`--output`."
            )
        shutil.rmtree(path)
    mark(path, name)
    return path


def _is_removable(path: Path, name: str) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    if (path / _MARK_FILE).is_file():
        return _marked_owner(path) == name
    return not foreign_entries(pyarrow.fs.LocalFileSystem(), str(path))  # As earlier versions left it.


def _owner(folder: Path) -> str | None:
    """Name of the study that made a folder; None if it is not known."""
    if (folder / _MARK_FILE).is_file():
        return _marked_owner(folder)
    if (folder / STUDY_FILE).exists():  # As earlier versions left it.
        name: str = read_study_file(folder)["name"]
        return name
    return None


def _marked_owner(folder: Path) -> str | None:
    content = read_json(folder / _MARK_FILE)
    owner = content.get(_STUDY) if isinstance(content, dict) else None
    return owner if isinstance(owner, str) else None


def _foreign(folder: Path) -> list[str]:
    """Paths in a folder without a mark that no earlier version of this package wrote for a study."""
    foreign = []
    for path in sorted(folder.iterdir()):
        if path.name == TUNE_FOLDER and path.is_dir():
            is_own = not path.is_symlink() and not foreign_entries(pyarrow.fs.LocalFileSystem(), str(path))
        elif path.name == TRIALS_FOLDER and path.is_dir():
            is_own = all(_SEED.fullmatch(trial.name) for trial in path.glob("*/*/*")) and all(
                inner.is_dir() for pattern in ("*", "*/*") for inner in path.glob(pattern)
            )
        else:
            is_own = path.name == _LOCK_FILE or is_own_file(path.name)
        if not is_own:
            foreign.append(str(path))
    return foreign
