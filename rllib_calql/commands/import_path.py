"""Where a command looks for modules of the user: the current folder, the file's, those that a checkpoint remembers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rllib_calql.system.parsed_json import parsed_json

_added: list[str] = []


def use_folder_of(file: Path | None = None) -> None:
    """Puts the current folder, and that of an experiment file, on the import path of this process.

    `worker_folders` puts them on that of Ray's workers.

    Args:
        file: The experiment file, if there is one; it need not exist.
    """
    folders = [os.getcwd(), *([str(file.expanduser().absolute().parent)] if file is not None else [])]
    for folder in reversed(folders):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    _added.extend(folder for folder in folders if folder not in _added)


def use_folders_of_checkpoint(manifest: bytes | None) -> str:
    """Puts the folders that a checkpoint remembers behind all others on the import path of this process.

    Args:
        manifest: Its manifest as it is stored. Checkpoints of other algorithms have none.

    Returns:
        What to say if a module is missing all the same.
    """
    try:
        content = parsed_json(manifest or b"")
        folders = [str(folder) for folder in content["environment"]["import_folders"]]
    except (ValueError, KeyError, TypeError):  # Damage is told by whoever reads the checkpoint.
        folders = []
    for folder in folders:
        if folder not in sys.path and os.path.isdir(folder):
            sys.path.append(folder)
    lay = f"; at training the environment's modules lay in {' and '.join(map(repr, folders))}" if folders else ""
    return (
        f"Modules are looked for in the current folder, in those of PYTHONPATH and among the installed ones{lay}. Run "
        "the command in the folder of the missing module, or name that folder in PYTHONPATH."
    )


def worker_folders() -> list[str]:
    """Folders for the import path of Ray's workers. On other machines of a cluster they must be shared folders."""
    return list(_added)
