"""Groups and arrays of HDF5 files that hold one group per episode, opened after a look at what is stored there.

Whatever is refused raises an error that says why; the caller names the episode and the file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What deflate reaches at most; beyond it, the size in the file is damaged, and allocating it would end the program.
_MAX_COMPRESSION = 1032


def group_in(h5py: Any, group: Any, name: bytes) -> Any:
    """Opens a group in a group.

    Raises:
        ValueError: If it stands in another file.
        Exception: Whatever HDF5 makes of damaged bytes.
    """
    refuse_link_to_file(h5py, group, name)
    inner = h5py.h5g.open(group, name)
    refuse_other_file(h5py, group, inner, name.decode())
    return inner


def dataset_in(h5py: Any, group: Any, name: bytes) -> Any:
    """Opens an array in a group, by HDF5's low level; nothing of it is read.

    Raises:
        ValueError: If its numbers stand in another file, or are Python objects, or more than the file can hold.
        Exception: Whatever HDF5 makes of damaged bytes.
    """
    refuse_link_to_file(h5py, group, name)
    stored = h5py.h5d.open(group, name)
    refuse_other_file(h5py, group, stored, name.decode())
    check_stored(h5py, stored, name.decode())
    return stored


def array_in(h5py: Any, group: Any, name: bytes) -> NDArray[Any]:
    """Reads a whole array in a group.

    Raises:
        ValueError: As `dataset_in`.
        Exception: As `dataset_in`.
    """
    stored = dataset_in(h5py, group, name)
    values = np.empty(stored.shape, stored.dtype)
    stored.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def refuse_link_to_file(h5py: Any, group: Any, name: bytes) -> None:
    """Refuses a link to another file before it is followed."""
    if group.links.get_info(name).type == h5py.h5l.TYPE_EXTERNAL:
        raise ValueError(f"`{name.decode()}` is a link to another file")


def refuse_other_file(h5py: Any, group: Any, entry: Any, name: str) -> None:
    """A soft link may lead through a link to another file."""
    if h5py.h5f.get_name(entry) != h5py.h5f.get_name(group):
        raise ValueError(f"`{name}` stands in another file, {h5py.h5f.get_name(entry).decode(errors='replace')!r}")


def check_stored(h5py: Any, stored: Any, name: str) -> None:
    """Refuses an array of Python objects, of numbers in another file, or of more bytes than the file can hold."""
    # Text and images of any length are objects that h5py makes. Of an opaque type that calls itself NumPy's objects, it
    # would take the stored bytes for their addresses.
    base = h5py.check_vlen_dtype(stored.dtype)
    is_known = h5py.check_string_dtype(stored.dtype) is not None or (base is not None and not base.hasobject)
    if stored.dtype.hasobject and not is_known:
        raise ValueError(f"`{name}` holds Python objects, where only numbers and text are read")
    made = stored.get_create_plist()
    if made.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"`{name}` is a view on numbers that stand elsewhere")
    if made.get_external_count():
        raise ValueError(f"the numbers of `{name}` stand in another file")
    num_bytes = math.prod(stored.shape) * stored.dtype.itemsize
    if num_bytes > 2**30:
        # The size of an array that is stored in one piece is computed from its shape, so it may be damaged as well.
        held = min(stored.get_storage_size(), h5py.h5i.get_file_id(stored).get_filesize())
        if num_bytes > _MAX_COMPRESSION * held:
            raise ValueError(f"`{name}` claims {num_bytes} bytes and holds {held}")
