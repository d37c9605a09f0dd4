"""The file of a policy: arrays, or a model, and one text of metadata, sealed by a checksum over every byte.

A `.npz` is an archive as `numpy.savez` writes it, so `numpy.load` lists what is in it:

* `metadata`: JSON in UTF-8, as bytes (uint8). Its `format` is the number of the version.
* Every other entry: one array of a network, see `network.array_shapes`.

The comment of the archive, its last bytes, is the SHA-256 of all bytes before it. The checksum is against damage;
nothing in the file is ever executed, whoever made it. In a `.onnx` the metadata are an entry of the model's, and the
checksum is another one, `sha256`, in the last bytes of the file. A `.pt` is an archive of `torch.export` that is sealed
in the same way and has one more entry, a whole `.npz`, which is all that this package reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from rllib_calql.policy.spaces import Array, ObservationSpace

FORMAT = 1
METADATA = "metadata"
_SEAL = "sha256:"
_SEAL_BYTES = len(_SEAL) + 64
_DATE = (1980, 1, 1, 0, 0, 0)  # The same policy gives the same bytes.
_DTYPES = ("float32", "uint8")
ONNX_METADATA = "rllib_calql"  # The entry of a model's metadata.
OUTPUTS = ("action", "mean", "log_std")  # Of models.
_NPZ_ENTRY = "/rllib_calql.npz"  # Of a `.pt`, below its only folder.
# As Protocol Buffers write it: field 14 of a model, with key and value.
_ONNX_SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"
_ZIP = b"PK\x03\x04"
_ARCHIVE_ERRORS = (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, OverflowError)
_UNSEALED = (
    "is cut off, damaged, or no policy file: it does not end with the checksum of its content. Export the policy "
    "again, or copy the file anew"
)


def packed(metadata: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The content of a policy file.

    Args:
        metadata: JSON-safe; `format` and the package's name are added.
        arrays: Of float32, by name.
    """
    text = json.dumps({"format": FORMAT, **metadata}, allow_nan=False).encode()
    entries = {METADATA: np.frombuffer(text, np.uint8), **arrays}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in entries.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _DATE), entry.getvalue())
        archive.comment = b" " * _SEAL_BYTES
    return sealed(stream.getvalue()[:-_SEAL_BYTES])


def sealed(content: bytes) -> bytes:
    """Content that is followed by its checksum."""
    return content + _SEAL.encode() + hashlib.sha256(content).hexdigest().encode()


def is_sealed(content: bytes) -> bool:
    """Whether the last bytes are the checksum of all others."""
    return content == sealed(content[:-_SEAL_BYTES])


def with_policy(program: bytes, npz: bytes) -> bytes:
    """An archive of `torch.export` that holds a policy's `.npz` as well, sealed."""
    stream = io.BytesIO(program)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(zipfile.ZipInfo(folder + _NPZ_ENTRY, _DATE), npz)
        archive.comment = b" " * _SEAL_BYTES
    return sealed(stream.getvalue()[:-_SEAL_BYTES])


def policy_within(content: bytes, name: str) -> bytes:
    """The `.npz` in a `.pt`; nothing else of it is read, so nothing is unpickled.

    Args:
        content: Of the file.
        name: What messages call it.

    Raises:
        ValueError: If it is no policy file, or a damaged one.
    """
    _check_archive(content, name)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [info for info in archive.infolist() if info.filename.endswith(_NPZ_ENTRY)]
            if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
                raise KeyError("it has no policy beside the program")
            return archive.read(entries[0])
    except _ARCHIVE_ERRORS as err:
        raise _foreign(name, err) from err


def sealed_onnx(content: bytes) -> bytes:
    """A model that is followed by its checksum, which is one more entry of its metadata."""
    return content + _ONNX_SEAL + hashlib.sha256(content).hexdigest().encode()


def check_onnx_seal(content: bytes, name: str) -> None:
    """Refuses a model whose last bytes are not the checksum of all others.

    Raises:
        ValueError: If it is no policy file, or a damaged one.
    """
    if content != sealed_onnx(content[: -len(_ONNX_SEAL) - 64]):
        raise ValueError(f"{name} {_UNSEALED}.")


def observation_names(space: ObservationSpace) -> list[str]:
    """The name of each leaf in models: its path, with a prefix where that is taken; `observation` of one without parts.

    Raises:
        ValueError: If two leaves have the same path.
    """
    paths = [leaf.path for leaf in space.leaves]
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"The observation has several parts with the path {twice[0]!r}; use keys without '/'.")
    if paths == [""]:
        return ["observation"]
    return [f"observation/{path}" if path in OUTPUTS or path.startswith("/") else path for path in paths]


def unpacked(content: bytes, name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata and arrays of a policy file; whatever it holds, no code is run.

    Args:
        content: Of the file.
        name: What messages call it.

    Raises:
        ValueError: If it is no policy file, a damaged one, or one of a newer version.
    """
    _check_archive(content, name)
    try:
        arrays = _arrays(content)
        metadata = parsed_metadata(arrays.pop(METADATA).tobytes(), name)
    except _ARCHIVE_ERRORS as err:
        raise _foreign(name, err) from err
    return metadata, arrays


def _check_archive(content: bytes, name: str) -> None:
    """Refuses what is no whole, sealed archive."""
    if not content:
        raise ValueError(f"{name} is empty; export the policy again.")
    if not content.startswith(_ZIP[: len(content)]):
        raise ValueError(f"{name} is no policy file; `rllib export CHECKPOINT policy.npz` writes one.")
    if not is_sealed(content):
        raise ValueError(f"{name} {_UNSEALED}.")


def _foreign(name: str, err: Exception) -> ValueError:
    reason = err.args[0] if isinstance(err, KeyError) and err.args else err  # As text it has quotes around it.
    return ValueError(f"{name} is no policy file of this package ({reason}); export the policy again.")


def parsed_metadata(text: bytes | str, name: str) -> dict[str, Any]:
    """The metadata in a policy file, of any of its kinds.

    Raises:
        ValueError: If they cannot be read, or are of a newer version.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{name} is no policy file of this package: its metadata are no JSON ({err}).") from err
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{name} is no policy file of this package: its metadata have no `format`.")
    if version > FORMAT:
        versions = metadata.get("versions")
        writer = versions.get("rllib-calql") if isinstance(versions, dict) else None
        raise ValueError(
            f"{name} is a policy file of format {version}, written by rllib-calql {writer}; this version reads up to "
            f"format {FORMAT}. Install a newer one, `pip install -U rllib-calql`, or export with this one."
        )
    return dict(metadata)


def _arrays(content: bytes) -> dict[str, Array]:
    """Every entry of the archive. Sizes are compared with what is there before memory is taken for them."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(content):
                raise KeyError(f"entry {info.filename!r} is compressed")
            if not info.filename.endswith(".npy") or info.filename[:-4] in arrays:
                raise KeyError(f"entry {info.filename!r} is unknown or there twice")
            arrays[info.filename[:-4]] = _array(archive.read(info), info.filename)
    return arrays


def _array(entry: bytes, name: str) -> Array:
    stream = io.BytesIO(entry)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise KeyError(f"entry {name!r} is of an unknown version of NumPy's format")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as err:
        raise KeyError(f"entry {name!r} has no header of an array") from err
    if dtype.name not in _DTYPES or not dtype.isnative or is_fortran:
        raise KeyError(f"entry {name!r} holds {dtype}, not numbers of {' or '.join(_DTYPES)}")
    numbers = entry[stream.tell() :]
    if math.prod(shape) * dtype.itemsize != len(numbers) or min(shape, default=0) < 0:
        raise KeyError(f"entry {name!r} does not hold the {shape} numbers that it says")
    return np.frombuffer(numbers, dtype).reshape(shape)
