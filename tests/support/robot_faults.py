"""What readers of robot data say about the faults of `test_bad_data`, and which of these are none for a format."""

from __future__ import annotations

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
}
