"""`--resume` of runs of which single files are damaged: what is whole is used, and what was skipped is said."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest
from damaged_checkpoints import flipped
from ray import tune
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.checkpoints import integrity
from rllib_calql.experiments import run_state
from rllib_calql.experiments.experiment import Experiment
from rllib_calql.experiments.resuming import ResumeError, _read_state, _take_newest_checkpoint, prepare_resume

LOCAL = pyarrow.fs.LocalFileSystem()
OLDER = {"experiment_state-2026-01-01.json": b'{"a": 1}', "searcher-2026-01-01.json": pickle.dumps({"b": 1})}
NEWER = {"experiment_state-2026-01-02.json": b'{"a": 2}', "searcher-2026-01-02.json": pickle.dumps({"b": 2})}
ARCHIVE, MARK = "rllib_calql_state.zip", "rllib_calql_whole.pkl"


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_flipped_bit(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), 4 * path.stat().st_size))


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "content").touch()


DAMAGES = pytest.mark.parametrize("damage", [emptied, halved, with_a_flipped_bit, replaced_by_a_folder])


def write_checkpoint(trial_folder: Path, number: int, *, is_marked: bool = True, is_summed: bool = True) -> Path:
    path = trial_folder / f"checkpoint_{number:06d}"
    (path / "learner_group").mkdir(parents=True)
    for name in ("class_and_ctor_args.pkl", "algorithm_state.pkl", "learner_group/state.pkl"):
        (path / name).write_bytes(pickle.dumps({"iteration": number + 1, "weights": bytes(100)}))
    if is_summed:
        integrity.write_manifest(path, {"versions": {}})
    if is_marked:
        run_state.mark_whole(LOCAL, str(path), {"training_iteration": number + 1})
    return path


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """A trial with three checkpoints, all known to its state."""
    return trial_in(tmp_path)


def trial_in(tmp_path: Path, *, is_summed: bool = True) -> Trial:
    trial = Trial("CalQL", stub=True, storage=StorageContext(str(tmp_path), "run"))
    trial.storage.trial_dir_name = "trial"
    for number in range(3):
        path = write_checkpoint(tmp_path / "run" / "trial", number, is_summed=is_summed)
        result = SimpleNamespace(
            checkpoint=tune.Checkpoint(str(path), LOCAL), metrics={"training_iteration": number + 1}
        )
        trial.run_metadata.checkpoint_manager.register_checkpoint(result)
        trial.storage.current_checkpoint_index += 1
    return trial


def resumed_at(trial: Trial, said: list[str]) -> int | None:
    """The iteration from which the trial goes on."""
    _take_newest_checkpoint(trial, needs_marks=True, announce=said.append)
    latest = trial.run_metadata.checkpoint_manager.latest_checkpoint_result
    return latest and latest.metrics["training_iteration"]


# --- Tune's state -----------------------------------------------------------------------------------------------------


@DAMAGES
def test_a_damaged_archive_gives_way_to_tunes_own_state_and_is_written_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run_state.write_state(LOCAL, str(tmp_path), OLDER)
    run_state.write_state(LOCAL, str(tmp_path), NEWER)
    damage(tmp_path / ARCHIVE)
    said: list[str] = []
    assert run_state.read_newest_state(LOCAL, str(tmp_path), said.append) == NEWER
    (message,) = said
    assert message.startswith(f"Skipped '{tmp_path / ARCHIVE}', which is damaged (")
    halved(tmp_path / "searcher-2026-01-02.json")
    assert run_state.read_newest_state(LOCAL, str(tmp_path), said.append) == OLDER
    assert said[2].endswith(": experiment_state-2026-01-02.json and its like; an older state is used.")
    run_state.write_state(LOCAL, str(tmp_path), NEWER)
    for name in NEWER:
        (tmp_path / name).unlink()
    assert run_state.read_newest_state(LOCAL, str(tmp_path), said.append) == NEWER
    assert len(said) == 3  # Of the two calls before.


def test_any_flipped_bit_of_the_archive_is_seen_or_harmless(tmp_path: Path) -> None:
    run_state.write_state(LOCAL, str(tmp_path), OLDER)
    for name in OLDER:
        (tmp_path / name).unlink()
    content = (tmp_path / ARCHIVE).read_bytes()
    seen = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 600):
        (tmp_path / ARCHIVE).write_bytes(flipped(content, bit))
        found = run_state.read_newest_state(LOCAL, str(tmp_path), lambda message: None)
        assert found in ({}, OLDER)
        seen += found == {}
    assert seen > 500  # The others change the sum into none, as in archives of earlier versions.


@pytest.mark.parametrize("content", [b'{"trial_dat`": [], "runner_data": {}}', b'{"trial_data": [["{", "{}"]]}', b"[]"])
def test_a_state_that_is_json_but_makes_no_sense_gives_way_to_an_older_one(tmp_path: Path, content: bytes) -> None:
    good = {"experiment_state-2026-01-01.json": b'{"trial_data": [], "runner_data": {}}'}
    run_state.write_state(LOCAL, str(tmp_path), good)
    (tmp_path / ARCHIVE).unlink()
    (tmp_path / "experiment_state-2026-01-02.json").write_bytes(content)
    said: list[str] = []
    newest = _read_state(LOCAL, str(tmp_path), said.append)
    assert newest is not None
    assert newest[0] == good
    assert said[0].startswith(f"Skipped 'experiment_state-2026-01-02.json' in '{tmp_path}', which is damaged")


def test_a_lost_state_names_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    experiment = Experiment("run", CalQL, line_config(tmp_path, offline_updates=4))
    for number in range(3):
        write_checkpoint(tmp_path / "run" / "trial", number)
    with_a_flipped_bit(tmp_path / "run" / "trial" / "checkpoint_000002" / "algorithm_state.pkl")
    with pytest.raises(ResumeError, match=r"is lost, but not its checkpoints.*/trial/checkpoint_000001'; continue"):
        prepare_resume(experiment, str(tmp_path), print)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@DAMAGES
@pytest.mark.parametrize("name", ["algorithm_state.pkl", "learner_group/state.pkl", "calql.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named(
    trial: Trial, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "run" / "trial" / "checkpoint_000002"
    damage(path / name)
    said: list[str] = []
    assert resumed_at(trial, said) == 2
    assert said[0].startswith(f"Skipped the damaged checkpoint '{path}': '{name}' ")
    assert len(said) == 1
    assert trial.storage.current_checkpoint_index == 2  # The next one gets a folder of its own.
    with_a_flipped_bit(path.with_name("checkpoint_000001") / name)
    assert resumed_at(trial, said) == 1
    with_a_flipped_bit(path.with_name("checkpoint_000000") / name)
    assert resumed_at(trial, said) is None
    assert said[-1] == f"No whole checkpoint of trial '{trial}' is left; it begins anew."


@DAMAGES
def test_a_damaged_mark_does_not_matter_where_checksums_and_the_state_tell_the_same(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for is_summed, expected in ((True, 3), (False, 2)):
        trial = trial_in(tmp_path, is_summed=is_summed)
        path = tmp_path / "run" / "trial" / "checkpoint_000002"
        damage(path / MARK)
        said: list[str] = []
        assert resumed_at(trial, said) == expected
        assert said == [] if is_summed else said[0].startswith(f"Skipped the damaged checkpoint '{path}': '{MARK}' ")
        shutil.rmtree(tmp_path / "run")


@DAMAGES
@pytest.mark.parametrize("name", [MARK, "algorithm_state.pkl"])
def test_a_damaged_checkpoint_that_the_state_does_not_know_is_moved_aside(
    trial: Trial, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run" / "trial"
    for number in (3, 4):
        damage(write_checkpoint(folder, number) / name)
    write_checkpoint(folder, 5, is_marked=False)
    said: list[str] = []
    assert resumed_at(trial, said) == 3
    aside = [folder / f"damaged_1_checkpoint_00000{number}" for number in (3, 4)]
    for number, message in zip((3, 4), said, strict=False):
        assert message.startswith(f"Skipped the damaged checkpoint '{folder / f'checkpoint_00000{number}'}': '{name}' ")
        assert message.endswith(f"; it is now at '{folder / f'damaged_1_checkpoint_00000{number}'}'.")
    assert said[2] == f"Removed the unfinished checkpoint '{folder / 'checkpoint_000005'}'."
    names = [f"checkpoint_00000{number}" for number in range(3)] + [path.name for path in aside]
    assert sorted(os.listdir(folder)) == sorted(names)


def test_any_flipped_bit_of_a_mark_is_seen_or_harmless_and_marks_without_a_sum_are_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 0, is_summed=False)
    content = (path / MARK).read_bytes()
    for bit in range(8 * len(content)):
        (path / MARK).write_bytes(flipped(content, bit))
        assert run_state.result_of_whole(LOCAL, str(path)) in (None, {"training_iteration": 1})
    (path / MARK).write_bytes(content.split(b"\nrllib_calql crc32 ")[0])
    assert run_state.result_of_whole(LOCAL, str(path)) == {"training_iteration": 1}


# --- A loss of power --------------------------------------------------------------------------------------------------


def test_what_a_resume_depends_on_is_on_the_disk_before_it_is_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "run" / "trial", 0, is_marked=False)
    done: list[str] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run_state.mark_whole(LOCAL, str(path), {"training_iteration": 1})
    run_state.write_state(LOCAL, str(tmp_path / "run"), OLDER)
    # Renamed between the two: first the content, then the folder's entry.
    mark = done.index(f"{path / MARK}.new")
    before = {str(file) for file in path.rglob("*") if file.name != MARK}
    assert before | {str(path), str(path.parent), str(path.parent.parent)} <= set(done[:mark])
    assert str(path) in done[mark:]
    archive = done.index(f"{tmp_path / 'run' / ARCHIVE}.new")
    assert str(tmp_path / "run") in done[archive:]


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_a_run_with_one_damaged_file_of_each_kind_is_continued_exactly(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=2, updates_per_env_step=0.1)
    experiment = Experiment(
        "run", CalQL, config, stop={"training_iteration": 3}, checkpoint_config={"checkpoint_frequency": 1}
    )
    from rllib_calql.experiments.tune_runs import run_experiment

    said: list[str] = []
    assert not run_experiment(experiment, str(tmp_path / "r"), resume=False, announce=said.append).errors
    run = tmp_path / "r" / "run"
    (folder,) = (path for path in run.iterdir() if path.is_dir())
    assert said == []
    with_a_flipped_bit(folder / "checkpoint_000002" / "learner_group" / "learner" / "state.pkl")
    halved(run / ARCHIVE)
    halved(run / "tuner.pkl")
    emptied(folder / "checkpoint_000001" / MARK)
    experiment.stop["training_iteration"] = 4
    assert not run_experiment(experiment, str(tmp_path / "r"), resume=True, announce=said.append).errors
    assert [message.split("'")[0] for message in said] == [
        "Skipped ",
        "Skipped the damaged checkpoint ",
        "Trial ",
        "",
    ]
    assert "'learner_group/learner/state.pkl' has other content than was saved" in said[1]
    assert " goes on from 'checkpoint_000001' (iteration 2, offline, 4 updates and 0 env steps, 0:" in said[2]
    assert said[2].endswith(" old); iteration 3 is made again.")
    assert said[3].startswith("'tuner.pkl' in ")
    newest = run_state.numbered_checkpoints(LOCAL, str(folder))[-1][1]
    manifest = json.loads((Path(newest) / "calql.json").read_text())
    assert manifest["num_offline_updates_lifetime"] == 4
    assert manifest["num_online_episodes_lifetime"] == 2
    assert run_state.result_of_whole(LOCAL, newest) is not None
