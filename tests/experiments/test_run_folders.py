"""Folders of runs and studies: two of one name are never mixed, and nothing that no run made is ever removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pyarrow.fs
import pytest
from click.testing import CliRunner, Result
from run_folder_files import HOLDER, OF_A_RUN, TRIAL, files_in, write

from rllib_calql.commands import main as cli
from rllib_calql.commands.main import main
from rllib_calql.experiments import run_folders
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.experiments.run_folders import RunFolder
from rllib_calql.system.file_lock import held_lock
from rllib_calql.system.plain_names import refuse_unplain_id, refuse_unplain_name


class ReachedRay(click.ClickException):
    """Ends the command where it would start Ray."""

    exit_code = 77


def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    """The command up to the start of Ray, for which the exit code is 77."""

    def start_ray(*args: object, **kwargs: object) -> None:
        raise ReachedRay("start")

    monkeypatch.setattr(cli, "start_ray", start_ray)
    (tmp_path / "e.yaml").write_text("a: {run: CalQL, env: Pendulum-v1, stop: {}}\n")
    arguments = ["train", "file", str(tmp_path / "e.yaml"), "--storage-path", str(tmp_path / "r"), *options]
    return CliRunner().invoke(main, arguments)


def test_a_name_that_has_a_run_is_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r" / "a", *OF_A_RUN)
    outcome = train(tmp_path, monkeypatch)
    assert outcome.exit_code == 2, outcome.output
    message = " ".join(outcome.output.split())
    assert f"There is a run in '{tmp_path}/r/a' already." in message
    assert all(option in message for option in ("`--resume`", "`--name NAME`", "`--overwrite`"))
    assert files_in(tmp_path / "r" / "a") == set(OF_A_RUN)


def test_an_empty_folder_another_name_and_a_resume_are_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r" / "a").mkdir(parents=True)
    assert train(tmp_path, monkeypatch).exit_code == 77
    write(tmp_path / "r" / "a", *OF_A_RUN)
    assert train(tmp_path, monkeypatch, "--name", "b").exit_code == 77
    assert not (tmp_path / "r" / "b").exists()  # It was made for the lock.
    assert train(tmp_path, monkeypatch, "--resume").exit_code == 77
    assert files_in(tmp_path / "r" / "a") == set(OF_A_RUN)


def test_overwrite_removes_the_run_of_that_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r" / "a", *OF_A_RUN)
    write(tmp_path / "r" / "other", *OF_A_RUN)
    write(tmp_path / "r", "notes.txt")
    assert train(tmp_path, monkeypatch, "--overwrite").exit_code == 77
    assert files_in(tmp_path / "r") == {"notes.txt", *(f"other/{name}" for name in OF_A_RUN)}


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "src/model.py",
        f"{TRIAL}/notes.txt",
        f"{TRIAL}/plots/curve.png",
        "CalQL/params.json",
        "checkpoint_000000/weights.pkl",
    ],
)
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_folder_that_holds_something_else_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str, options: tuple[str, ...]
) -> None:
    write(tmp_path / "r" / "a", *OF_A_RUN, foreign)
    outcome = train(tmp_path, monkeypatch, *options)
    assert outcome.exit_code == 2
    assert "which no run made" in outcome.output
    assert files_in(tmp_path / "r" / "a") == {*OF_A_RUN, foreign}


def test_folders_that_only_look_like_trials_are_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r" / "a", f"{TRIAL}/params.json", f"{TRIAL}/result.json")
    assert train(tmp_path, monkeypatch, "--overwrite").exit_code == 2
    assert files_in(tmp_path / "r" / "a") == {f"{TRIAL}/params.json", f"{TRIAL}/result.json"}


def test_what_links_lead_to_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r" / "a", "tuner.pkl")
    write(tmp_path / "mine", "params.json", "result.json")
    (tmp_path / "r" / "a" / TRIAL).symlink_to(tmp_path / "mine")
    outcome = train(tmp_path, monkeypatch, "--overwrite")
    assert outcome.exit_code == 2
    assert files_in(tmp_path / "mine") == {"params.json", "result.json"}
    # A run that was moved to another disk is removed there; the link to its folder stays.
    (tmp_path / "r" / "a" / TRIAL).unlink()
    write(tmp_path / "elsewhere", *OF_A_RUN)
    (tmp_path / "r" / "a" / "tuner.pkl").unlink()
    (tmp_path / "r" / "a").rmdir()
    (tmp_path / "r" / "a").symlink_to(tmp_path / "elsewhere")
    assert train(tmp_path, monkeypatch, "--overwrite").exit_code == 77
    assert files_in(tmp_path / "elsewhere") == set()


def test_contradicting_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "r" / "a", *OF_A_RUN)
    outcome = train(tmp_path, monkeypatch, "--overwrite", "--resume")
    assert outcome.exit_code == 2
    assert "drop one" in outcome.output
    assert files_in(tmp_path / "r" / "a") == set(OF_A_RUN)


def test_a_storage_without_folders_is_treated_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = pyarrow.fs._MockFileSystem()
    monkeypatch.setattr(run_folders, "get_fs_and_path", lambda uri: (filesystem, uri.removeprefix("s3://")))
    run = RunFolder("s3://bucket/runs", "a")
    assert not run.has_begun()
    for name in (*OF_A_RUN, "../b/tuner.pkl"):
        path = os.path.normpath(f"bucket/runs/a/{name}")
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        with filesystem.open_output_stream(path) as stream:
            stream.write(b"x")
    with run.locked():
        assert run.has_begun()
        assert not run.foreign()
        run.remove_run()
    assert not run.has_begun()
    assert RunFolder("s3://bucket/runs", "b").has_begun()


# --- Two at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--resume",), ("--overwrite",)])
def test_a_run_that_another_process_runs_is_refused_until_that_one_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    write(tmp_path / "r" / "a", *(OF_A_RUN if options else ()), *(() if options else ("x",)))
    if not options:
        (tmp_path / "r" / "a" / "x").unlink()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "r" / "a" / ".rllib_calql_run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        outcome = train(tmp_path, monkeypatch, *options)
        assert outcome.exit_code == 2, outcome.output
        assert f"The run in '{tmp_path}/r/a' is still going on: Process {holder.pid} on" in outcome.output
        if options:
            assert set(OF_A_RUN) <= files_in(tmp_path / "r" / "a")
        holder.kill()
    # What is left is a lock without a holder: the run may be resumed, or begin if there is nothing else.
    assert (tmp_path / "r" / "a" / ".rllib_calql_run.lock").exists()
    assert train(tmp_path, monkeypatch, *(options or ("--resume",))).exit_code == 77


def test_all_experiments_of_a_file_are_checked_before_the_first_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "r" / "a", *OF_A_RUN)
    write(tmp_path / "r" / "b", "notes.txt")
    train(tmp_path, monkeypatch)
    (tmp_path / "e.yaml").write_text(
        "a: {run: CalQL, env: Pendulum-v1, stop: {}}\nb: {run: CalQL, env: Pendulum-v1, stop: {}}\n"
    )
    arguments = ["train", "file", str(tmp_path / "e.yaml"), "--storage-path", str(tmp_path / "r"), "--overwrite"]
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 2
    assert files_in(tmp_path / "r" / "a") == set(OF_A_RUN)


# --- Names -----------------------------------------------------------------------------------------------------------

BAD_NAMES = ["", " ", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "-rf", "a\nb", "a\0b", "\x1b[2J", "é" * 128]


@pytest.mark.parametrize("name", [*BAD_NAMES, "\ud800", None, 3])
def test_names_that_would_lead_elsewhere_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"^the name must be a plain name"):
        refuse_unplain_name(name, "the name")


@pytest.mark.parametrize("name", ["a", "Cal-QL, 5 %", "seed0", "größe", "a.b", "~", "x" * 255, "…", "名前"])
def test_other_names_are_admitted(name: str) -> None:
    refuse_unplain_name(name, "the name")


@pytest.mark.parametrize(
    "dataset_id", ["../x-v0", "/etc/x-v0", "a//b-v0", "a/../b-v0", "a/./b-v0", "a/", "", "a\\b-v0"]
)
def test_ids_that_would_lead_elsewhere_are_refused(dataset_id: str) -> None:
    with pytest.raises(ValueError, match="must be plain names with `/` between them"):
        refuse_unplain_id(dataset_id, "the id")
    refuse_unplain_id("mujoco/pen/human-v0", "the id")


@pytest.mark.parametrize("name", ["../x", "", "-rf", "/etc"])
def test_a_name_given_to_the_command_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    outcome = train(tmp_path, monkeypatch, "--overwrite", f"--name={name}")
    assert outcome.exit_code == 2
    assert "`--name` must be a plain name" in outcome.output
    assert files_in(tmp_path) == {"e.yaml"}


def test_names_in_experiment_files_are_refused(tmp_path: Path) -> None:
    experiment = "{run: CalQL, env: Pendulum-v1, stop: {}}"
    (tmp_path / "e.yaml").write_text(f"{json.dumps('../other')}: {experiment}")
    with pytest.raises(ExperimentError, match=r"The name of an experiment in '.*e\.yaml' must be a plain name"):
        read_experiments(tmp_path / "e.yaml")
    (tmp_path / "e.yaml").write_text(f"0x3: {experiment}\n'3': {experiment}")
    with pytest.raises(ExperimentError, match="have the same name"):
        read_experiments(tmp_path / "e.yaml")
    for name, meant in (("off", "False"), ("~", "None"), ("2026-11-29", "datetime")):
        (tmp_path / "e.yaml").write_text(f"{name}: {experiment}")
        with pytest.raises(
            ExperimentError, match=rf"an experiment in '.*e\.yaml' is {meant}.* in quotes, such as 'off'"
        ):
            read_experiments(tmp_path / "e.yaml")
    python = "from rllib_calql import CalQLConfig\nconfig = CalQLConfig().environment('Pendulum-v1')\nstop = {}\n"
    (tmp_path / "e.py").write_text(python + "name = '/abs'")
    with pytest.raises(ExperimentError, match="must be a plain name"):
        read_experiments(tmp_path / "e.py")


@pytest.mark.parametrize("dataset_id", ["../../evil-v0", "/evil-v0", "a//evil-v0", "evil", "..", ""])
def test_a_data_set_is_saved_under_no_other_id_than_minaris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_id: str
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "a" / "b" / "minari"))
    arguments = ["dataset", "generate", "rllib-calql/pendulum-swingup-v0", "--num-steps", "1"]
    outcome = CliRunner().invoke(main, [*arguments, f"--save-as={dataset_id}"])
    assert outcome.exit_code == 2, outcome.output
    assert "`--save-as`" in outcome.output or "The id of a Minari dataset" in outcome.output
    assert files_in(tmp_path) == set()


def test_a_data_set_outside_of_minaris_folder_is_not_read(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(main, ["dataset", "inspect", "--no-plot", "minari:../elsewhere-v0"])
    assert outcome.exit_code == 1
    assert "must be plain names with `/` between them" in outcome.output


def test_locks_are_given_back(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "a")
    with run.locked():
        assert not run.has_begun()
    with held_lock(tmp_path / "lock"):
        pass
    assert files_in(tmp_path) == set()
