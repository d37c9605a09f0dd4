"""`export_policy`: the policy of a checkpoint, written to a file at once or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_calql.checkpoints.reading import read_of_one_save
from rllib_calql.policy.file_format import packed
from rllib_calql.policy.step_values import checked_flag
from rllib_calql.policy.whole_files import write_whole

if TYPE_CHECKING:
    from rllib_calql.export.reading import PolicyData


def _npz(data: PolicyData) -> bytes:
    return packed(data.metadata, data.arrays)


def _onnx(data: PolicyData) -> bytes:
    from rllib_calql.export.onnx_model import onnx_model

    return onnx_model(data)


def _pt(data: PolicyData) -> bytes:
    from rllib_calql.export.torch_program import torch_program

    return torch_program(data)


WRITERS: dict[str, Callable[[PolicyData], bytes]] = {".npz": _npz, ".onnx": _onnx, ".pt": _pt}
_PACKAGES = {".onnx": "onnx"}  # Which not every installation has.


def export_policy(
    checkpoint: Any,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    filesystem: Any = None,
    scores: Mapping[str, float] | None = None,
) -> Path:
    """Writes the policy of a checkpoint to a file that needs neither Ray nor a checkpoint, see `policy/README.md`.

    A checkpoint is code: export only one that you would run as a program. What is written is not.

    Args:
        checkpoint: Folder, URI or Ray Train `Checkpoint`.
        output: The file; its ending says the format, `.npz`, `.onnx` or `.pt`.
        force: Whether a file that is there already is replaced.
        filesystem: PyArrow file system of `checkpoint`; by default what the URI says.
        scores: Of evaluations, for the metadata, besides those that the checkpoint holds.

    Returns:
        The file.

    Raises:
        TypeError: If `checkpoint` is none of these, `output` no path, or `force` neither True nor False.
        FileExistsError: If the file is there and `force` is False.
        FileNotFoundError: If there is no such checkpoint, or no folder for the file.
        ImportError: If a package that the format needs is missing, with the command that installs it.
        ValueError: If the ending is unknown, the checkpoint damaged or of another algorithm, or if something in it
            cannot be exported, by its name.
    """
    file = checked_output(output, force=checked_flag("force", force))

    from rllib_calql.export.reading import read_policy_data

    data = read_of_one_save(checkpoint, filesystem, lambda files: read_policy_data(files, scores))
    write_whole(file, WRITERS[file.suffix.lower()](data))
    return file


def checked_output(output: str | os.PathLike[str], *, force: bool) -> Path:
    """The file to write to, as an absolute path.

    Raises:
        FileExistsError: If it is there and `force` is False.
        FileNotFoundError: If its folder is not there.
        ImportError: If a package that the format needs is missing, with the command that installs it.
        ValueError: If its ending is unknown, or if it is a folder.
    """
    if not isinstance(output, (str, os.PathLike)):
        raise TypeError(f"`output` must be the path of a file, got {type(output).__name__}.")
    file = Path(output).expanduser().absolute()
    if file.suffix.lower() not in WRITERS:
        raise ValueError(f"The file must end in .npz, .onnx or .pt, which says its format, got '{output}'.")
    if file.is_dir():
        raise ValueError(f"'{output}' is a folder; name a file in it, such as '{file / 'policy.npz'}'.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")
    if file.exists() and not force:
        raise FileExistsError(f"'{output}' is there already; choose another name, or replace it with `--force`.")
    package = _PACKAGES.get(file.suffix.lower())
    if package is not None and find_spec(package) is None:
        raise ImportError(
            f'Writing {file.suffix} needs the `{package}` package: pip install "rllib-calql[export]"; .npz needs none.'
        )
    return file
