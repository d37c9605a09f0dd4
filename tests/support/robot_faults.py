"""What readers of robot data say about the faults of `test_bad_data`, and which of these are none for a format."""

from __future__ import annotations

PLACES = {
    "robomimic": r"step {step} of 'demo_1' in '\S*part-{part}\.hdf5'",
    "d3rlpy": r"step {step} of '1' in '\S*part-{part}\.h5'",
    "lerobot": r"row {row} of '\S*part-{part}\.parquet'",
    "sb3": r"row {step} of '\S*part-{part}\.npz \(environment 1\)'",
}
"""What messages call a row of the second episode of a part."""

SECOND = {"lerobot": "'1'", "robomimic": r"'(\S*/)?demo_1'", "d3rlpy": r"'(\S*/)?1'", "sb3": r"'\d'"}
"""The id of that episode."""

OTHER: dict[str, dict[str, str]] = {
    "csv": {
        "nan in obs": "`obs_0` holds nan in ROW30; .*must be finite: repair the value or drop the episode",
        "nan in new_obs": "`new_obs_0` holds nan in ROW30; .*must be finite",
        "infinity in the last observation": "`new_obs_0` holds inf in ROW39; .*must be finite",
        "nan in actions": "`actions_0` holds nan in ROW30; .*must be finite",
        "infinity in rewards": "`rewards` holds -inf in ROW30; .*must be finite",
        "no obs": "has no column `obs_0`, which the column map .* names; its columns are .*; correct the map, or the",
        "no actions": "has no column `actions_0`, which the column map",
        "no rewards": "has no column `rewards`, which the column map",
        "no terminateds": "has no column `terminateds`, which the column map",
        "two rewards a row": "has no column `rewards`, .*its columns are .*`rewards_0`, `rewards_1`",
        "complex observations": r"`obs_0` must hold numbers, got '\(.*j\)' in ROW0; repair the value",
        "complex rewards": r"`rewards` must hold numbers, got '\(.*j\)' in ROW0; repair the value",
        "ragged observations": "There are [0-9]+ values in ROW30, and [0-9]+ columns in the header; .*write it again",
        "ragged actions": "There are [0-9]+ values in ROW30, and [0-9]+ columns in the header; .*write it again",
        "an id of another file's episode": "Episode 'first' begins in row 0 of FILE0 and comes back in row 0 of FILE1",
        "a column that another file lacks": "FILE1 has no column `truncateds`, which the column map",
        "half a file": "There are [0-9]+ values in row .* of FILE1, .*write it again",
        "a file of nothing": "FILE1 has no header; its first line must name the columns",
        "another kind of file": "FILE1 has no column `obs_0`, which the column map",
        "a file without its end": "There are [0-9]+ values in row 39 of FILE1, .*write it again",
    },
}


def _of_hdf5(format_: str, names: dict[str, str], first: str) -> dict[str, str]:
    """What is said of arrays that bear the names of their episodes."""
    said = {
        f"{kind} as {what}" if kind == "strings" else f"{kind} {what}": f"`{names[what]}` must hold numbers.*FILE0"
        for kind, whats in (("strings", ("observations", "actions", "rewards", "flags")), ("complex", ("rewards",)))
        for what in whats
    }
    said["complex observations"] = f"`{names['observations']}` must hold numbers, got complex128 .*; convert the column"
    said["strings in another file"] = f"`{names['rewards']}` must hold numbers.*FILE1"
    said["an action less than rewards"] = (
        "in FILE0 has 20 rows, and the actions of its episode 19; .*write the file again"
    )
    agree = f"`{first}` holds .* in FILE0, and .* in FILE1; the files of one data set must agree"
    return said | dict.fromkeys(("wider observations in another file", "integers in another file"), agree)


OTHER["robomimic"] = {
    **_of_hdf5(
        "robomimic",
        {
            "observations": "data/demo_0/obs/state",
            "actions": "data/demo_0/actions",
            "rewards": "data/demo_0/rewards",
            "flags": "data/demo_0/terminateds",
        },
        "obs",
    ),
    "empty": "is empty: its files have no episodes; name files that have",
    "no obs": "`data/demo_0` in FILE0 has no 'obs' for `obs`; it has .*dataset_states_to_obs.*a column map names other",
    "no actions": "`data/demo_0` in FILE0 has no 'actions' for `actions`; it has",
    "no rewards": "`data/demo_0` in FILE0 has no 'rewards' for `rewards`; it has",
    "no terminateds": "`data/demo_0` in FILE0 has no 'dones' for `terminateds`; it has",
    **{
        f"the flag {value}": f"`data/demo_1/truncateds` must be 0 or 1 in every row, got {value} in row 19 of FILE0"
        for value in ("0.5", "2.0", "-1.0", "nan")
    },
    "a flag less than rewards": "`data/demo_1/terminateds` in FILE0 has 19 rows, and the actions of its episode 20",
}
OTHER["d3rlpy"] = {
    **_of_hdf5(
        "d3rlpy",
        {
            "observations": "observations_0",
            "actions": "actions_0",
            "rewards": "rewards_0",
            "flags": "terminated_0",
        },
        "obs",
    ),
    "empty": "is empty: its files have no episodes; name files that have",
    "no obs": "FILE0 has no array `observations_0`",
    "no actions": "is empty: its files have no episodes",
    "no rewards": "FILE0 has no array `rewards_0`",
    "no terminateds": "`terminated_0` in FILE0 must hold numbers, one flag, got none; write the file again",
    "strings as flags": "`terminated_0` in FILE0 must hold numbers, one flag, got bytes",
}
_NUMBERS = "`{0}` must hold numbers, got .* in FILE0; save numbers"
OTHER["sb3"] = {
    "no obs": "FILE0 has `rewards` of shape .20, 2., .* and no array `observations`; save `observations`, .*`timeouts`",
    "no actions": "FILE0 has no column `actions`",
    "no rewards": "FILE0 has no column `rewards`",
    "no terminateds": "FILE0 has no column `terminateds`",
    "two rewards a row": "FILE0 has no column `terminateds`",
    "strings as observations": _NUMBERS.format(r"\w*observations"),
    "strings as actions": _NUMBERS.format("actions"),
    "strings as rewards": _NUMBERS.format("rewards"),
    "strings as flags": _NUMBERS.format("dones"),
    "complex observations": _NUMBERS.format(r"\w*observations"),
    "complex rewards": _NUMBERS.format("rewards"),
    **dict.fromkeys(
        ("wider observations in another file", "integers in another file"),
        "`observations` holds .*part-0.npz .*, and .*part-1.npz .*; the files of one data set must agree",
    ),
    "objects as rewards": _NUMBERS.format("rewards"),
    **{
        f"the flag {value}": f"`.*` must be 0 or 1 in every row, got {value} in row 19 of .*npz .environment 1."
        for value in ("0.5", "2.0", "-1.0", "nan")
    },
    "strings in another file": "`rewards` must hold numbers, got .* in FILE1; save numbers",
}
OTHER["lerobot"] = {
    **{
        f"no {name}": f"FILE0 has no column `{feature}`; its columns are .*; download or write the data set again"
        for name, feature in (
            ("obs", "observation.state"),
            ("actions", "action"),
            ("rewards", "next.reward"),
            ("terminateds", "next.terminated"),
        )
    },
    "strings as observations": "`observation.state` must hold numbers .*, got .* in ROW0; convert the column",
    "strings as actions": "`action` must hold numbers .*, got .* in ROW0; convert the column",
    "strings as flags": "`next.terminated` must hold numbers .*, got string in ROW0; convert the column",
    "ragged observations": "`observation.state` has 4 values in ROW30 and 2 in .*; every row must have the same shape",
    "ragged actions": "`action` has 2 values in ROW30 and 1 in .*; every row must have the same shape",
    **{
        f"the flag {value}": f"`next.truncated` must be 0 or 1 in every row, got {value} in ROW39; repair the value"
        for value in ("0.5", "2.0", "-1.0", "nan")
    },
    "an id of another file's episode": "Two files use the episode id '0' for different episodes: .*FILE0 and .*FILE1",
    "a column that another file lacks": "FILE1 has no column `next.truncated`",
    "wider observations in another file": r"`obs` has shape \(4,\) from row 0 of FILE1 on .*; every row must have the",
    "integers in another file": "`observation.state` holds float in FILE0 and int64 in FILE1; store it in one type",
    "strings in another file": "`next.reward` holds double in FILE0 and string in FILE1; store it in one type",
}

_ANY_NUMBERS = "a table of text has one kind of numbers"
_RECTANGLE = "a table has all columns in every row"
LEFT_OUT: dict[str, dict[str, str]] = {
    "csv": {
        **dict.fromkeys(("strings as observations", "strings as actions", "strings as rewards"), "all is text"),
        "strings as flags": "True and False are read as flags",
        **dict.fromkeys(("an action less than rewards", "a flag less than rewards"), _RECTANGLE),
        "wider observations in another file": "the map names the columns that are read",
        **dict.fromkeys(("integers in another file", "strings in another file"), _ANY_NUMBERS),
    },
    "robomimic": {
        "objects as rewards": "HDF5 holds no objects",
        **dict.fromkeys(("ragged observations", "ragged actions"), "an array has one shape"),
        "an id of another file's episode": "ids of several files begin with the file's name",
        "a column that another file lacks": "a demonstration that did not terminate was cut",
    },
    "d3rlpy": {
        **dict.fromkeys(("nan in new_obs", "infinity in the last observation"), "no such column"),
        **dict.fromkeys(("never finished", "a column that another file lacks"), "what did not terminate was cut"),
        **dict.fromkeys(("goes on after its end", "a flag less than rewards"), "one flag per episode"),
        **dict.fromkeys(("swapped rows", "a lost row"), "no next observations, which would tell"),
        "objects as rewards": "HDF5 holds no objects",
        **dict.fromkeys(("ragged observations", "ragged actions"), "an array has one shape"),
        **{f"the flag {value}": "no flag of truncation" for value in ("0.5", "2.0", "-1.0", "nan")},
        "an id of another file's episode": "ids of several files begin with the file's name",
    },
    "sb3": {
        "goes on after its end": "without ids the flag is where the episode ends",
        **dict.fromkeys(("swapped rows", "a lost row"), "a jump ends an episode, which is remarked"),
        "action out of bounds": "actions are a policy's, which the library clips on the way to the environment",
        **dict.fromkeys(("ragged observations", "ragged actions"), "an array has one shape"),
        **dict.fromkeys(("an action less than rewards", "a flag less than rewards"), "no such array of environments"),
        "an id of another file's episode": "no ids",
        "a column that another file lacks": "refused as any missing array",
    },
    "lerobot": {
        **dict.fromkeys(("nan in new_obs", "infinity in the last observation"), "no such column"),
        **dict.fromkeys(("swapped rows", "a lost row"), "frames are numbered by what writes them"),
        **dict.fromkeys(("complex observations", "complex rewards"), "Arrow has no complex numbers"),
        **dict.fromkeys(("an action less than rewards", "a flag less than rewards"), "Arrow makes no such table"),
    },
}
