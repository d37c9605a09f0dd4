"""Files of other tools, which are not read: what they are, and how their content becomes a file that is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

_TO_NPZ = 'numpy.savez("data.npz", observations=..., actions=..., rewards=..., terminals=..., timeouts=...)'
_TO_PARQUET = '.to_parquet("data.parquet")'
_PICKLE = (
    "a pickle, which runs code where it is opened and is therefore no data file here; open it in a program of yours, "
    f"if you trust its origin, and save its arrays: `{_TO_NPZ}`"
)
_ROS = f"a recording of ROS; take one row per step from its topics, with the package `rosbags`, then `{_TO_NPZ}`"
_TFRECORD = (
    "records of TensorFlow, as RLDS has them; read them with `tensorflow_datasets`, collect one row per step, then "
    f"`{_TO_NPZ}`"
)
_ZARR = f"an array store of Zarr's; read its arrays, `zarr.open(path)[name][:]`, then `{_TO_NPZ}`"
_ARCHIVE = "an archive or compressed file; unpack it first"
JOIN_REMEDY = 'join numbers of one vector: `table["obs"] = table[["obs_0", "obs_1"]].values.tolist()`'
"""What to do with a table that has a column for each number."""
_TABLE = f"Rename its columns to `obs`, `actions`, `rewards`, `terminateds` and `truncateds`, and {JOIN_REMEDY}"

_KINDS: dict[tuple[str, ...], str] = {
    (".pt", ".pth", ".ckpt"): (
        "a file of PyTorch's `torch.save`; read it by `torch.load(path, weights_only=True)`, and save its tensors as "
        f"arrays (`.numpy()`): `{_TO_NPZ}`"
    ),
    (".pkl", ".pickle", ".p", ".dill", ".joblib", ".cloudpickle"): _PICKLE,
    (
        ".txt",
    ): f"a table of text; name it `*.csv`, or convert it: `table = pandas.read_csv(path)`, `table{_TO_PARQUET}`",
    (".jsonl", ".ndjson"): (
        f"lines of JSON; convert them: `table = pandas.read_json(path, lines=True)`, `table{_TO_PARQUET}`. {_TABLE}"
    ),
    (".json",): (
        "JSON. Of RLlib's old API stack (`SampleBatch`): record again with `config.offline_data(output=...)` of the "
        "new one, or collect the batches of `ray.rllib.offline.json_reader.JsonReader(path).next()`, which opens "
        f"pickles, into arrays and `{_TO_NPZ}`. Any other: `pandas.read_json(path){_TO_PARQUET}`"
    ),
    (".arrow", ".feather", ".ipc"): f"a file of Arrow's; convert it: `pandas.read_feather(path){_TO_PARQUET}`",
    (
        ".xls",
        ".xlsx",
        ".ods",
    ): f"a spreadsheet; convert it: `table = pandas.read_excel(path)`, `table{_TO_PARQUET}`. {_TABLE}",
    (".orc",): f"a file of ORC; convert it: `pandas.read_orc(path){_TO_PARQUET}`",
    (".mat",): f"a file of MATLAB's; read it by `scipy.io.loadmat(path)`, then `{_TO_NPZ}`",
    (".npy",): f"one array, and a data set is several; put them into one file: `{_TO_NPZ}`",
    (".bag", ".mcap", ".db3"): _ROS,
    (".tfrecord", ".tfrecords", ".rlds", ".riegeli", ".array_record"): _TFRECORD,
    (".zarr",): _ZARR,
    (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"): _ARCHIVE,
    (".mp4", ".avi", ".mkv", ".webm"): f"a video; decode its frames into observations, then `{_TO_NPZ}`",
    (".sqlite", ".sqlite3", ".db"): f"a database; convert a table of it: `pandas.read_sql(...){_TO_PARQUET}`. {_TABLE}",
}
_KIND_OF_SUFFIX = {suffix: kind for suffixes, kind in _KINDS.items() for suffix in suffixes}


def what_it_is(name: str) -> str | None:
    """What a file of this name is and how it is converted; None if the name does not tell."""
    if ".tfrecord" in name.lower():
        return _TFRECORD
    return _KIND_OF_SUFFIX.get(PurePosixPath(name).suffix.lower())


def found_instead(names: Iterable[str]) -> str:
    """A sentence about a folder without data: what its files are; empty if there are none.

    Args:
        names: Paths of the files in it and below it.
    """
    names = sorted(names)
    if not names:
        return ""
    if any(PurePosixPath(name).name in (".zarray", ".zgroup", "zarr.json") for name in names):
        return f" It is {_ZARR}."
    known = [(name, kind) for name in names if (kind := what_it_is(name)) is not None]
    if not known:
        return f" It holds {PurePosixPath(names[0]).name!r}, for example, which is of no known format."
    # What there is most of; a description in JSON often stands beside it.
    kinds = [kind for _, kind in known]
    most = max(kinds, key=kinds.count)
    example = next(name for name, kind in known if kind == most)
    return f" {PurePosixPath(example).name!r} in it is {most}."


def layout_of_other_tool(names: Collection[str]) -> str | None:
    """What a file with columns or arrays of these names is and how it is converted; None if nothing tells."""
    if any(name.startswith("observation.") for name in names):
        return "these are LeRobot's columns; give the folder of the data set, with `meta/info.json` in it, as `input_`"
    return None
