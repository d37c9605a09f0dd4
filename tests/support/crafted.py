"""Pickles that would run code or take all memory where pickles are opened as such, and data files that hold them."""

from __future__ import annotations

import base64
import builtins
import functools
import json
import math
import operator
import os
import pickle
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import lz4.frame
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

ROWS = 3


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __call__(self) -> None:
        """Stands where a function must, which the pickle calls for."""

    def __reduce__(self) -> Any:
        return self.reduced


def _global(name: str) -> bytes:
    return b"c" + name.replace(":", "\n").encode() + b"\n"


def running_pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that would make the file `marker`, by the way in which they do it."""
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    code = f"__import__('os').system({touch!r})"
    numpy_file = marker.with_suffix(".npy")
    objects = np.empty(1, object)
    objects[0] = _Call(os.system, touch)
    numpy_file.write_bytes(b"")
    np.save(numpy_file, objects, allow_pickle=True)
    torch_file = marker.with_suffix(".pt")
    torch.save(_Call(os.system, touch), torch_file)
    calls: dict[str, Any] = {
        "os.system": _Call(os.system, touch),
        "eval": _Call(eval, python),
        "exec": _Call(exec, code),
        "open": _Call(builtins.open, str(marker), "w"),
        "subprocess": _Call(subprocess.check_output, ["touch", str(marker)]),
        "numpy.load": _Call(np.load, str(numpy_file), None, True),
        "numpy.memmap": _Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
        "numpy.ndarray.tofile": _Call(np.ndarray.tofile, np.zeros(1), str(marker)),
        "numpy.savetxt": _Call(np.savetxt, str(marker), np.zeros(1)),
        "numpy.vectorize": _Call(_Call(np.vectorize, os.system), [touch]),
        "torch.load": _Call(functools.partial(torch.load, weights_only=False), str(torch_file)),
        "pickle.loads": _Call(pickle.loads, pickle.dumps(_Call(os.system, touch))),
        "getattr": _Call(_Call(getattr, _Call(__import__, "os"), "system"), touch),
        "attrgetter": _Call(_Call(operator.attrgetter("system"), _Call(__import__, "os")), touch),
        "methodcaller": _Call(operator.methodcaller("system", touch), _Call(__import__, "os")),
        "partial": _Call(functools.partial(os.system, touch)),
        "Path.touch": _Call(Path.touch, marker),
        "in a list": [np.zeros(2), _Call(os.system, touch)],
        "in a dict": {"obs": _Call(os.system, touch)},
        "in an array": objects,
        "an array's state": _Call(np.ndarray, (1,), state={"a": _Call(os.system, touch)}),
    }
    pickles = {name: pickle.dumps(call, 4) for name, call in calls.items()}
    pickles["protocol 0"] = pickle.dumps(calls["os.system"], 0)
    text = f"V{touch}\n".encode()
    pickles["INST"] = b"(" + text + b"ios\nsystem\n."
    pickles["NEWOBJ"] = b"\x80\x02" + _global("functools:partial") + b"(" + _global("os:system") + text + b"t\x81)R."
    pickles["copyreg"] = (
        _global("copyreg:__newobj__") + b"(" + _global("functools:partial") + _global("os:system") + text + b"tR)R."
    )
    pickles["OBJ"] = b"(" + _global("os:system") + text + b"o."
    return pickles


def _array(shape: tuple[int, ...]) -> bytes:
    """The part of a pickle that makes an array of zeros that can be written to."""
    content = b"\0" * 8 * math.prod(shape)
    sizes = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in shape) + b"t"
    return (
        _global("numpy._core.multiarray:_reconstruct")
        + _global("numpy:ndarray")
        + b"K\0\x85C\x01b\x87R(K\x01"
        + sizes
        + _global("numpy:dtype")
        + b"Vi8\n\x85R\x89B"
        + struct.pack("<I", len(content))
        + content
        + b"tb"
    )


def endless_pickles() -> dict[str, bytes]:
    """Short pickles that would compute for ever while they are opened: of parts that hold one another 2**60 times."""
    begin = b"\x80\x04"
    doubled = b")\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60))
    number = b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"\x94"
    n = 3000
    index = b"(" + b"".join(_array(tuple(n if axis == i else 1 for axis in range(4))) for i in range(4)) + b"t"
    buffer = begin + _global("numpy._core.numeric:_frombuffer") + b"(C\x08" + b"\0" * 8
    type_ = _global("numpy:dtype") + b"Vf8\n\x85R"
    state = _global("numpy._core.multiarray:_reconstruct") + _global("numpy:ndarray") + b"K\0\x85C\x01b\x87R(K\x01"
    return {
        "a key": begin + b"}" + doubled + b"Ns.",
        "a key of many": begin + b"}(" + doubled + b"Nu.",
        "a key of a mapping": begin + b"(" + doubled + b"Nd.",
        "a key that is fetched": begin + b"}" + doubled + b"0h" + bytes([60]) + b"Ns.",
        "a key in a list": begin + b"](}" + doubled + b"Nse.",
        "a type": buffer + _global("numpy:dtype") + doubled + b"\x85RK\x01\x85VC\ntR.",
        "a shape": buffer + type_ + doubled + b"VC\ntR.",
        "an order": buffer + type_ + b"K\x01\x85" + doubled + b"tR.",
        "a large shape": begin + state + b"(" + number + b"h\0" * 9000 + b"t" + type_ + b"\x89C\x04aaaatb.",
        "a large view": buffer + type_ + b"(" + number + b"h\0" * 9000 + b"tVC\ntR.",
        "indices": begin + _array((1, 1, 1, 1)) + index + b"K\0s.",
        "indices of many": begin + _array((1, 1, 1, 1)) + b"(" + index + b"K\0u.",
        "appending to an array": begin + _array((1,)) + b"K\0a.",
    }


def greedy_pickles() -> dict[str, bytes]:
    """Short pickles that would take all memory, or for ever, or crash NumPy."""
    laughs = b"\x80\x04](K\x01K\x01e\x94" + b"".join(b"](" + b"h%c" % i * 10 + b"e\x94" for i in range(12))
    typed = b"\x80\x04" + _global("numpy:dtype") + b"(V%b\nK\x00K\x01tR"
    array = b"\x80\x04" + _global("numpy._core.numeric:_frombuffer") + b"("
    return {
        "memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        "memo as text": b"I1\np4294967290\n.",
        "length": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.",
        "laughs": laughs + b".",
        "itself": b"\x80\x04]\x94h\x00a.",
        "depth": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "parts": b"\x80\x04(" + b"N" * 3_000_000 + b"t.",
        "shape": array
        + b"\x96\x04"
        + b"\x00" * 7
        + b"abcd"
        + typed[2:] % b"u1"
        + b"\x8a\x08"
        + b"\xff" * 7
        + b"\x0f"
        + b"\x85V"
        + b"C\ntR.",
        "objects": array + b"\x96\x08" + b"\x00" * 7 + b"\x10" * 8 + typed[2:] % b"O" + b"K\x01\x85V" + b"C\ntR.",
        "a type's state": typed % b"f8" + b"(K\x03V|\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb.",
        "structure": typed % b"V8" + b"(K\x03V|\nN(Va\nt}(Va\n" + typed[2:] % b"O" + b"K\x00\x86uK\x08K\x01K\x3ftb.",
        "bytes": b"\x80\x04" + _global("builtins:bytearray") + b"(\x8a\x06\x00\x00\x00\x00\x00\x01tR.",
        "a changed function": _global("numpy._core.numeric:_frombuffer") + b"}(V__wrapped__\nK\x01ub.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02K\x01Q.",
        **endless_pickles(),
    }


def packed(payload: bytes) -> str:
    """As RLlib packs a pickle."""
    return base64.b64encode(lz4.frame.compress(payload)).decode()


def _rows() -> dict[str, Any]:
    obs = [[float(t), 0.0, 1.0] for t in range(ROWS)]
    return {
        "eps_id": ["a"] * ROWS,
        "obs": obs,
        "new_obs": [*obs[1:], [9.0, 0.0, 1.0]],
        "actions": [[0.0, 0.5]] * ROWS,
        "rewards": [0.0, 1.0, 2.0],
        "terminateds": [False] * ROWS,
        "truncateds": [False] * (ROWS - 1) + [True],
    }


def _recorded_rows(column: str) -> Callable[[Path, bytes], None]:
    def write(file: Path, payload: bytes) -> None:
        rows = _rows()
        nothing = [None] * ROWS
        for name in {"obs", "new_obs", column}:
            rows[name] = [packed(pickle.dumps(np.float32(value))) for value in rows[name]]
        rows[column][1] = packed(payload)
        pq.write_table(pa.table({**rows, "agent_id": nothing, "module_id": nothing}), file)

    return write


def _text_rows(file: Path, payload: bytes) -> None:
    pq.write_table(pa.table({**_rows(), "obs": [packed(payload)] * ROWS}), file)


def _pickled_objects(column: str) -> Callable[[Path, bytes], None]:
    def write(file: Path, payload: bytes) -> None:
        type_ = ArrowPythonObjectType()
        objects = pa.ExtensionArray.from_storage(type_, pa.array([payload] * ROWS, type_.storage_type))
        table = pa.table({name: values for name, values in _rows().items() if name != column})
        pq.write_table(table.append_column(column, objects), file)

    return write


def _episode_state() -> dict[str, Any]:
    rows = _rows()
    return SingleAgentEpisode(
        id_="a",
        observations=np.float32([*rows["obs"], rows["new_obs"][-1]]),
        infos=[{}] * (ROWS + 1),
        actions=np.float32(rows["actions"]),
        rewards=rows["rewards"],
        truncated=True,
        observation_space=gym.spaces.Box(-100, 100, (3,)),
        action_space=gym.spaces.Box(-1, 1, (2,)),
        len_lookback_buffer=0,
    ).get_state()


def _msgpack(place: str) -> Callable[[Path, bytes], None]:
    def write(file: Path, payload: bytes) -> None:
        state = _episode_state()
        objects = {b"nd": True, b"type": [["", "|O"]], b"kind": b"O", b"shape": [1], b"data": payload}
        if place == "observations":
            state["observations"]["data"] = objects
        elif place == "infos":
            state["infos"]["data"][0] = {"object": objects}
        else:
            header = b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"
            header += b" " * (117 - len(header)) + b"\n"
            npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload
            for space in (state["_observation_space"], state["observations"]["space"]):
                space["low"] = base64.b64encode(zlib.compress(npy)).decode()
        item = msgpack.packb(state, default=msgpack_numpy.encode)
        pq.write_table(pa.table({"item": pa.array([item], pa.binary())}), file)

    return write


def _second_file_of_objects(file: Path, payload: bytes) -> None:
    """A folder of episodes whose second file holds pickled objects in place of bytes."""
    file.mkdir()
    item = msgpack.packb(_episode_state(), default=msgpack_numpy.encode)
    pq.write_table(pa.table({"item": pa.array([item], pa.binary())}), file / "000001_000000-0.parquet")
    type_ = ArrowPythonObjectType()
    objects = pa.ExtensionArray.from_storage(type_, pa.array([payload], type_.storage_type))
    pq.write_table(pa.table({"item": objects}), file / "000001_000000-1.parquet")


def _d4rl() -> dict[str, Any]:
    rows = _rows()
    names = {
        "obs": "observations",
        "new_obs": "next_observations",
        "terminateds": "terminals",
        "truncateds": "timeouts",
    }
    return {names.get(name, name): np.asarray(values) for name, values in rows.items() if name != "eps_id"}


class _Raw:
    """Pickled by `numpy.save` as the given pickle."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __reduce__(self) -> Any:
        return pickle.loads, (self.payload,)


def _npz(column: str) -> Callable[[Path, bytes], None]:
    def write(file: Path, payload: bytes) -> None:
        objects = np.empty(ROWS, object)
        objects[:] = [_Raw(payload)] * ROWS
        with file.open("wb") as opened:
            np.savez(opened, **{**_d4rl(), column: objects})

    return write


def _hdf5(tag: bytes) -> Callable[[Path, bytes], None]:
    """Observations of an opaque type, which h5py takes for a type of NumPy's if the tag says so."""

    def write(file: Path, payload: bytes) -> None:
        with h5py.File(file, "w") as opened:
            for name, values in _d4rl().items():
                if name != "observations":
                    opened[name] = values
            size = 8 if tag == b"NUMPY:O" else len(payload)
            type_ = h5py.h5t.create(h5py.h5t.OPAQUE, size)
            type_.set_tag(tag)
            space = h5py.h5s.create_simple((ROWS,))
            dataset = h5py.h5d.create(opened.id, b"observations", type_, space)
            content = np.frombuffer((payload * 8)[:size] * ROWS, f"V{size}")
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, content, mtype=type_)

    return write


def _hdf5_text(file: Path, payload: bytes) -> None:
    with h5py.File(file, "w") as opened:
        for name, values in _d4rl().items():
            opened[name] = [packed(payload)] * ROWS if name == "observations" else values


FILES: dict[str, Callable[[Path, bytes], None]] = {
    "text-obs.parquet": _text_rows,
    "recorded-obs.parquet": _recorded_rows("obs"),
    "recorded-new_obs.parquet": _recorded_rows("new_obs"),
    "recorded-actions.parquet": _recorded_rows("actions"),
    "objects-obs.parquet": _pickled_objects("obs"),
    "objects-eps_id.parquet": _pickled_objects("eps_id"),
    "episodes.parquet": _msgpack("observations"),
    "infos.parquet": _msgpack("infos"),
    "spaces.parquet": _msgpack("spaces"),
    "episode-files": _second_file_of_objects,
    "objects.npz": _npz("observations"),
    "objects-actions.npz": _npz("actions"),
    "opaque.hdf5": _hdf5(b"a pickle"),
    "addresses.hdf5": _hdf5(b"NUMPY:O"),
    "text.hdf5": _hdf5_text,
}
"""Name of a file that holds a pickle -> what writes it."""

ROW_IS_KNOWN = tuple(name for name in FILES if name.endswith(".parquet"))


def name_environment(metadata: Path, marker: Path) -> None:
    """Takes the spaces from a Minari data set, and names an environment whose making would make the file `marker`."""
    content = json.loads(metadata.read_text())
    del content["observation_space"], content["action_space"]
    spec = {"id": "Crafted-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {marker}"}}
    content["env_spec"] = gym.envs.registration.EnvSpec(**spec).to_json()
    metadata.write_text(json.dumps(content))
