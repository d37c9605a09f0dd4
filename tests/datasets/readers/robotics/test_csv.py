"""CSV logs: what the column map says, times, flags and ids as text, files in pieces, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.datasets import ReadOptions, open_input
from rllib_calql.datasets.readers.robotics import csv_files
from rllib_calql.datasets.rows import flat

MAP = "obs: [q1, q2]\nactions: [u]\nrewards: r\n"
ENDS = "terminated: success\ntruncated: cut\n"
HEADER = "q1,q2,u,r,success,cut\n"


def episodes(input_: Path, **options: Any) -> list[SingleAgentEpisode]:
    (reader,) = open_input(input_, ReadOptions(**options))
    return list(reader)


def written(folder: Path, columns: str, **files: str) -> Path:
    (folder / "columns.yaml").write_text(columns)
    for name, content in files.items():
        (folder / f"{name}.csv").write_text(content)
    return folder


# --- What is read -----------------------------------------------------------------------------------------------------


def test_every_file_is_an_episode_where_nothing_else_is_said(tmp_path: Path) -> None:
    rows = "1,2,3,0,0,0\n4,5,6,1,{}\n"
    written(tmp_path, MAP + ENDS, one=HEADER + rows.format("1,0"), two=HEADER + rows.format("0,1"))
    first, second = episodes(tmp_path)
    assert (first.is_terminated, len(first)) == (True, 2)
    assert (second.is_truncated, len(second)) == (True, 1)  # No observation follows its last step.
    np.testing.assert_array_equal(first.get_observations(), [[1, 2], [4, 5], [4, 5]])
    np.testing.assert_array_equal(second.get_observations(), [[1, 2], [4, 5]])
    np.testing.assert_array_equal(first.get_actions(), [[3], [6]])
    assert first.get_rewards().tolist() == [0, 1]


def test_a_mapping_makes_a_dict_and_one_name_is_a_number(tmp_path: Path) -> None:
    columns = "obs: {arm: [q2, q1], gripper: u}\nactions: u\nrewards: success\nterminated: success\nfurther: [r]\n"
    written(tmp_path, columns, log=HEADER + "1,2,3,7,0,0\n4,5,6,8,1,0\n")
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.get_observations()["arm"], [[2, 1], [5, 4], [5, 4]])
    np.testing.assert_array_equal(episode.get_observations()["gripper"], [3, 6, 6])
    assert episode.get_rewards().tolist() == [0, 1]  # A flag as reward: that of a success.
    assert list(episode.get_extra_model_outputs("r")) == [7, 8]
    (reader,) = open_input(tmp_path)
    assert reader.info.ignored_columns == ("cut (not in the column map)",)


@pytest.mark.parametrize("yes", ["1", "1.0", "True", "true", " TRUE", "1.000000000000000000e+00"])
def test_flags_are_read_as_programs_write_them(yes: str, tmp_path: Path) -> None:
    no = yes.replace("1", "0") if "1" in yes else "False"
    written(tmp_path, MAP + ENDS, log=f"{HEADER}1,2,3,0,{no},{no}\n4,5,6,1,{yes},{no}\n")
    assert episodes(tmp_path)[0].is_terminated


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("\ufeffq1; q2 ;u;r;success\r\n1,5;2;3;0;0\r\n4;5;6;1e-1;1\r\n", "decimal: ','\n"),
        ("q1\tq2\tu\tr\tsuccess\n1.5\t2\t3\t0\t0\n4\t5\t6\t0.1\t1\n", ""),
        ('"q1","q2",u,note,r,success\n1.5, 2,3,"a, b",0,0\n\n4,5,6,,.1,1', ""),
        ("q1|q2|u|r|success\n1.5|2|3|0|0\n4|5|6|0.1|1\n", "delimiter: '|'\n"),
    ],
    ids=["semicolons", "tabs", "quotes", "bars"],
)
def test_dialects_are_read(content: str, columns: str, tmp_path: Path) -> None:
    written(tmp_path, MAP + "terminated: success\n" + columns, log=content)
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.get_observations(), [[1.5, 2], [4, 5], [4, 5]])
    assert episode.get_rewards().tolist() == [0, 0.1]


def test_truths_are_numbers_where_numbers_are_read(tmp_path: Path) -> None:
    columns = "obs: [open, q]\nactions: [u]\nrewards: won\n"
    written(tmp_path, columns, log="open,q,u,won\ntrue,1,2,False\n\nfalse,3,4,True\n")
    (episode,) = episodes(tmp_path, unfinished_episodes="truncate", missing_final_observation="repeat")
    np.testing.assert_array_equal(episode.get_observations(), [[1, 1], [0, 3], [0, 3]])
    assert episode.get_rewards().tolist() == [0, 1]


def test_a_flag_with_a_decimal_comma_is_read(tmp_path: Path) -> None:
    content = "q1;q2;u;r;success\n1,5;0,0;0,0;0,0;0,0\n2,5;0,0;0,0;1,0;1,0\n"
    written(tmp_path, MAP + "terminated: success\ndecimal: ','\n", log=content)
    (episode,) = episodes(tmp_path)
    assert (episode.is_terminated, episode.get_observations()[:, 0].tolist()) == (True, [1.5, 2.5, 2.5])


def test_a_map_may_be_called_yml_and_there_is_one(tmp_path: Path) -> None:
    written(tmp_path, MAP + ENDS, log=HEADER + "1,2,3,0,1,0\n")
    (tmp_path / "columns.yaml").rename(tmp_path / "columns.yml")
    assert len(episodes(tmp_path)) == 1
    (tmp_path / "columns.yaml").write_text(MAP)
    with pytest.raises(ValueError, match=r"There are two column maps, .*columns\.yaml' and '.*columns\.yml'; keep one"):
        open_input(tmp_path)


def test_numbers_are_those_that_python_reads(tmp_path: Path) -> None:
    numbers = (np.random.default_rng(0).normal(size=270) * 10.0 ** np.arange(-235, 35)).tolist()
    rows = "".join(f"{number!r},0,0,0,0,{int(i == 269)}\n" for i, number in enumerate(numbers))
    written(tmp_path, MAP + ENDS, log=HEADER + rows)
    (episode,) = episodes(tmp_path, missing_final_observation="repeat")
    np.testing.assert_array_equal(episode.get_observations()[:-1, 0], numbers)


def test_long_files_are_read_in_pieces_to_the_same_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat([f"run {i}" for i in range(40)], rng.integers(1, 12, 40))
    lines, times = [], {}
    for row, id_ in enumerate(ids):
        is_last = row + 1 == len(ids) or ids[row + 1] != id_
        times[id_] = times.get(id_, 7.0) + 0.02 * rng.uniform(0.8, 1.2)
        lines.append(f"{row},{-row},{row % 7},{row / 8},{int(is_last)},{times[id_]!r},{id_}\n")
    columns = MAP + "terminated: success\nt: time\nepisode: id\n"
    written(tmp_path, columns, log="q1,q2,u,r,success,time,id\n" + "".join(lines))
    whole = episodes(tmp_path)
    assert [episode.id_ for episode in whole] == [f"run {i}" for i in range(40)]
    assert np.concatenate([episode.get_rewards() for episode in whole]).tolist() == [row / 8 for row in range(len(ids))]
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 500)
    monkeypatch.setattr(flat, "_MAX_PIECE_ROWS", 7)
    for one, other in zip(whole, episodes(tmp_path), strict=True):
        assert one.id_ == other.id_
        np.testing.assert_array_equal(one.get_observations(), other.get_observations())


def test_without_ids_an_episode_begins_where_the_time_goes_back(tmp_path: Path) -> None:
    header = "q1,q2,u,r,success,cut,time\n"
    rows = "1,0,0,0,0,0,0.0\n2,0,0,0,0,0,0.1\n3,0,0,0,0,0,0.21\n4,0,0,0,0,0,0.0\n5,0,0,1,1,0,0.1\n6,0,0,0,1,0,9.0\n"
    written(tmp_path, MAP + ENDS + "t: time\n", log=header + rows)
    found = episodes(tmp_path, unfinished_episodes="truncate", missing_final_observation="repeat")
    assert [episode.get_observations()[:-1, 0].tolist() for episode in found] == [[1, 2, 3], [4, 5], [6]]
    with pytest.raises(ValueError, match=r"ends neither terminated nor truncated .*row 2 of"):
        episodes(tmp_path)


def test_a_map_elsewhere_names_its_data_and_counts_in_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text(HEADER + "1,2,3,0,0,0\n4,5,6,1,1,0\n")
    fingerprints = set()
    for obs in ("[q1, q2]", "[q2, q1]"):
        (tmp_path / "arm.yaml").write_text(f"data: logs\nobs: {obs}\nactions: u\nrewards: r\nterminated: success\n")
        (reader,) = open_input(tmp_path / "arm.yaml")
        assert len(next(iter(reader))) == 2
        fingerprints.add(reader.fingerprint())
    assert len(fingerprints) == 2


def test_a_table_beside_other_data_is_no_data(tmp_path: Path) -> None:
    rows = {"obs": [[0.0]], "actions": [[0.0]], "rewards": [1.0], "terminateds": [True]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    (tmp_path / "progress.csv").write_text("step,loss\n1,2\n")
    assert len(episodes(tmp_path)[0]) == 1
    (tmp_path / "columns.yaml").write_text(MAP)
    with pytest.raises(ValueError, match="holds files of several formats"):
        open_input(tmp_path)


# --- What is refused --------------------------------------------------------------------------------------------------

TIMED = MAP + ENDS + "t: time\n"


@pytest.mark.parametrize(
    ("columns", "content", "message"),
    [
        (TIMED, "q1,q2,u,r,success,cut,time\n" + "0,0,0,0,0,0,0.0\n0,0,0,0,0,0,0.1\n0,0,0,0,0,0,0.2\n0,0,0,0,0,1,0.4\n",
         r"out of order or missing: `time` goes from 0\.2 to 0\.4 in row 3 of .*usually takes 0\.1; .*leave `t` out"),
        (TIMED, "q1,q2,u,r,success,cut,time\n" + "0,0,0,0,0,0,0.0\n0,0,0,0,0,0,0.1\n0,0,0,0,0,0,0.1\n",
         r"`time` goes from 0\.1 to 0\.1 in row 2"),
        (TIMED + "episode: id\n", "q1,q2,u,r,success,cut,time,id\n0,0,0,0,0,0,2,a\n0,0,0,0,0,0,1,a\n0,0,0,0,0,0,3,b\n",
         r"`time` goes from 2 to 1 in row 1"),
        (TIMED, "q1,q2,u,r,success,cut,time\n0,0,0,0,0,0,2026-11-28T10:00:00\n",
         r"`time` must hold numbers, got '2026-11-28T10:00:00' in row 0 .*write times as numbers, such as seconds, or"),
        (MAP, "q1,q2,u,r\nrad,rad,Nm,-\n0,0,0,0\n", r"`q1` must .*, got 'rad' in row 0 .*delete the row if .* units"),
        (MAP, "q1;q2;u;r\n0,5;0;0;0\n", r"`q1` must hold numbers, got '0,5' in row 0 .*say `decimal: ','` in the"),
        (MAP, "q1 q2 u r\n0 0 0 0\n", r"no column `q1`.*are `q1 q2 u r`; .*say by `delimiter` what separates"),
        (MAP, "q1,q2,u,r\nTrue,0,0,0\n3,0,0,0\n", r"`q1` must hold numbers, got '3' in row 1 of"),
        ("obs: [1]\nactions: [on]\n", HEADER, r"`obs` .* got \[1\]; names are text, so write .* in quotes"),
        ("obs: on\n", HEADER, r"`obs` .* got True; names are text, so write .* in quotes"),
        (MAP, "q1,q2,u,r\n0,0,0,0\n0,x,0,0\n", r"`q2` must hold numbers, got 'x' in row 1 of .*log\.csv'; repair"),
        (MAP, "q1,q2,u,r\n0,0,0,0\n0,,0,0\n", r"`q2` has no value in row 1 of .*fill it in"),
        (MAP, "q1,q2,u,r\n0,0,0,0\n0,0,0\n", r"There are 3 values in row 1 of .*, and 4 columns in the header"),
        (MAP, "q1,q2,u,r\n0,0,0,nan\n", r"`r` holds nan in row 0 of"),
        (MAP, "q1,q3,u,r\n0,0,0,0\n", r"has no column `q2`, which the column map '.*columns\.yaml' names; its columns"),
        (MAP, "q1,q2,u,r,q1\n0,0,0,0,0\n", "has more than one column `q1`"),
        (MAP, "0,0,0,0\n0,0,0,0\n", r"begins with numbers \('0,0,0,0'\); its first line must name the columns"),
        (MAP, "", "has no header"),
        (MAP, "q1,q2,u,r\n", "is empty: its files have no rows"),
        (MAP, "q1,q2,u,r\n0,0,0,0\n", r"ends neither terminated nor truncated .*`unfinished_episodes=\"truncate\"`"),
        (MAP + ENDS, HEADER + "0,0,0,0,0,maybe\n", r"`cut` must be 0 or 1 in every row, got maybe in row 0"),
        ("obs: [q1]\nactions: u\n", HEADER, "has no key `rewards`; .*Without rewards there is nothing to learn from"),
        ("obs: [q1]\nactions: u\nreward: r\n", HEADER, "unknown key 'reward'. Did you mean 'rewards'?"),
        ("obs: [q1, q1]\n", HEADER, r"`obs` in the column map .* must name each column once"),
        ("obs: 3\n", HEADER, r"`obs` in the column map .* must be a column, a list of columns, or a mapping"),
        ("rewards: [r]\n", HEADER, r"`rewards` in the column map .* must be a column, got \['r'\]"),
        ("obs: {a/b: q1}\n", HEADER, "must have names of parts without slashes, got 'a/b'"),
        ("obs: &a {x: *a}\n", HEADER, "must be a column"),
        ("obs: [q1\n", HEADER, r"columns\.yaml' cannot be read: .*; repair it"),
        ("obs: q1\nobs: q2\n", HEADER, "cannot be read: .*'obs' is there twice"),
        ("- q1\n", HEADER, "must map `obs`, `actions`, `rewards` and so on to columns"),
        ("obs: !!python/object/apply:os.system ['true']\n", HEADER, "cannot be read: could not determine a constr"),
        (MAP + "delimiter: ', '\n", HEADER, "`delimiter` in the column map .* must be one character"),
        (MAP + "further: [obs]\n", HEADER, "must name columns without slashes that mean nothing else, got 'obs'"),
        (MAP + "demos: train\n", HEADER, "has the key `demos`, which means nothing for CSV files"),
        (MAP + "data: logs\n", HEADER, "names data of its own, `data: logs`; give the map as `input_`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(columns: str, content: str, message: str, tmp_path: Path) -> None:
    written(tmp_path, columns, log=content)
    with pytest.raises(ValueError, match=message) as caught:
        episodes(tmp_path)
    assert "log.csv" in str(caught.value) or "columns.yaml" in str(caught.value) or str(tmp_path) in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    written(tmp_path, MAP)
    (tmp_path / "log.csv").write_bytes("q1,q2,u,r,\xb5\n0,0,0,0,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"log\.csv' is not text in UTF-8 .*save it as CSV in UTF-8"):
        episodes(tmp_path)


def test_a_map_of_data_with_names_of_their_own_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", observations=np.zeros((1, 1)))
    (tmp_path / "map.yaml").write_text("data: rows.npz\n" + MAP)
    with pytest.raises(
        ValueError, match=r"names .*rows\.npz', NumPy whose columns have names of their own; rename them"
    ):
        open_input(tmp_path / "map.yaml")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'map\.yaml'\?"):
        open_input(tmp_path / "maps.yaml")
