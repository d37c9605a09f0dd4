"""`rllib study` and `rllib report`: strict files, trials that go on where they were killed, results, reports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tiny import TINY_NETWORKS, write_line_data

from rllib_calql.checkpoints.integrity import write_manifest
from rllib_calql.commands.main import main
from rllib_calql.experiments.experiment import num_cpus_of_largest
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.study import trial as trials
from rllib_calql.study.evaluations import Evaluation, read_results, write_results
from rllib_calql.study.plan import Study, read_study
from rllib_calql.study.report import group, summary_rows, write_report
from rllib_calql.study.runner import requests
from rllib_calql.study.statistics import fate_of
from rllib_calql.study.trial import finished_evaluations, run_trial

TIMEOUT_S = 150


def study_file(folder: Path, **changes: Any) -> Path:
    """A study of three algorithms on `LineEnv`; `changes` replace its keys."""
    data = folder / "line.parquet"
    if not data.exists():
        write_line_data(data)
    experiment = {
        "run": "CalQL",
        "env": "registered_line:Line-v0",
        "stop": {"num_online_env_steps_lifetime": 60},
        "config": {
            "offline_data": {"input_": str(data)},
            "training": {"num_actions": 3, "train_batch_size_per_learner": 8, "calibrate": True},
            "offline_updates": 20,
            "updates_per_iteration": 5,
            "updates_per_env_step": 0.2,
            "model_config": TINY_NETWORKS,
        },
    }
    (folder / "line.yaml").write_text(yaml.safe_dump({"line": experiment}))
    study = {
        "name": "lines",
        "seeds": [0, 1],
        "tasks": {
            "Line": {
                "file": "line.yaml",
                "config": {"tau": 0.01},
                "evaluation_episodes": 2,
                "evaluate_every_offline_updates": 10,
                "evaluate_every_env_steps": 25,
            }
        },
        "algorithms": {
            "Cal-QL": {},
            "CQL": {"calibrate": False},
            "SAC from scratch": {
                "input_": None,
                "offline_updates": None,
                "conservative_online": False,
                "warmup_env_steps": 20,
            },
        },
    } | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def study_of(folder: Path, **changes: Any) -> Study:
    return read_study(study_file(folder, **changes))


# --- Files ------------------------------------------------------------------------------------------------------------


def test_every_algorithm_gets_the_tasks_settings_and_its_own(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert [(t.seed, t.algorithm) for t in study.trials] == [
        (seed, algorithm) for seed in (0, 1) for algorithm in ("Cal-QL", "CQL", "SAC from scratch")
    ]
    calql, cql, sac = (trial.config for trial in study.trials[3:])
    assert [config.seed for config in (calql, cql, sac)] == [1, 1, 1]
    assert [config.tau for config in (calql, cql, sac)] == [0.01] * 3
    assert (calql.calibrate, cql.calibrate) == (True, False)  # In place of the one grouped under `training`.
    assert (calql.num_offline_updates, sac.num_offline_updates) == (20, 0)
    assert not sac.is_offline
    assert study.description["algorithms"]["CQL"] == {"calibrate": False}


def test_a_task_may_take_another_environment_than_its_experiment_file(tmp_path: Path) -> None:
    task = {"file": "line.yaml", "evaluation_episodes": 2, "evaluate_every_offline_updates": 10}
    task |= {"evaluate_every_env_steps": 25}
    study = study_of(tmp_path, tasks={"Line": task, "Other line": task | {"config": {"env": "tiny:LineEnv"}}})
    assert {(trial.task, trial.config.env) for trial in study.trials} == {
        ("Line", "registered_line:Line-v0"),
        ("Other line", "tiny:LineEnv"),
    }


def test_ray_gets_whole_cpus_for_trials_that_need_parts_of_one(tmp_path: Path) -> None:
    shared_cores = {"num_env_runners": 1, "num_cpus_per_env_runner": 0.5}
    study = study_of(tmp_path, algorithms={"Cal-QL": {}, "two runners to a core": shared_cores})
    assert num_cpus_of_largest(requests(study)) == 2  # 1.5, of the second algorithm.


def test_the_fingerprint_tells_settings_and_schedule_apart_and_not_seeds(tmp_path: Path) -> None:
    first = study_of(tmp_path)
    assert len({trial.fingerprint for trial in first.trials}) == 3
    assert [t.fingerprint for t in study_of(tmp_path).trials] == [t.fingerprint for t in first.trials]
    task = first.description["tasks"]["Line"]
    how = {key: value for key, value in task.items() if key != "experiment"} | {"file": "line.yaml"}
    for changed in ({"evaluation_episodes": 3}, {"config": {"tau": 0.02}}):
        other = study_of(tmp_path, tasks={"Line": how | {"config": {"tau": 0.01}} | changed})
        assert not {t.fingerprint for t in other.trials} & {t.fingerprint for t in first.trials}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"Unknown key `seed` in study file .*; did you mean `seeds`"),
        ({"seeds": []}, "has no `seeds`"),
        ({"seeds": [1, 1]}, "must be a list of different whole numbers >= 0, got .1, 1."),
        ({"seeds": [-1]}, "different whole numbers"),
        ({"seeds": 3}, "different whole numbers"),
        ({"tasks": ["Line"]}, "`tasks` of .* must map names to settings"),
        ({"tasks": {"Line": {"file": "line.yaml"}}}, "Task 'Line' .* has no `evaluation_episodes`"),
        ({"algorithms": {"CQL": {"calibrat": False}}}, r"Unknown setting `calibrat`.*Line \| CQL.*did you mean"),
        ({"algorithms": {"CQL": {"tau": 7.0}}}, "`tau`"),
        ({"algorithms": {"CQL": {"tau": {"grid_search": [0.1, 0.2]}}}}, "searches over settings"),
        ({"algorithms": {"CQL": {"max_online_env_steps": 60}}}, "drop `max_online_env_steps`"),
        ({"algorithms": {"Cal-QL": {}, "cal ql": {}}}, "differ in signs alone"),
    ],
)
def test_wrong_studies_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=message):
        study_of(tmp_path, **changes)


def test_wrong_tasks_are_refused_by_name(tmp_path: Path) -> None:
    def refuse(message: str, **changes: Any) -> None:
        task = {
            "file": "line.yaml",
            "evaluation_episodes": 2,
            "evaluate_every_offline_updates": 10,
            "evaluate_every_env_steps": 25,
        } | changes
        with pytest.raises(ExperimentError, match=message):
            study_of(tmp_path, tasks={"Line": task})

    refuse("'.*nowhere.yaml' of task 'Line' does not exist", file="nowhere.yaml")
    refuse("`evaluation_episodes` of task 'Line' must be a whole number >= 1, got 0", evaluation_episodes=0)
    refuse("Unknown key `evaluation_episode`", evaluation_episode=3)
    (tmp_path / "two.yaml").write_text("a: {run: CalQL}\nb: {run: CalQL}")
    refuse("must hold one experiment", file="two.yaml")
    (tmp_path / "sac.yaml").write_text("a: {run: SAC, env: Pendulum-v1, stop: {training_iteration: 3}}")
    refuse("runs SAC; a study runs CalQL", file="sac.yaml")
    (tmp_path / "stop.yaml").write_text("a: {run: CalQL, env: Pendulum-v1, stop: {training_iteration: 3}}")
    refuse("must be `num_online_env_steps_lifetime` alone", file="stop.yaml")
    endless = "a: {run: CalQL, env: Pendulum-v1, stop: {num_online_env_steps_lifetime: .inf}}"
    (tmp_path / "stop.yaml").write_text(endless)
    refuse("must be `num_online_env_steps_lifetime` alone.*got .*inf", file="stop.yaml")


# --- Trials -----------------------------------------------------------------------------------------------------------


def without_time(rows: list[Evaluation]) -> list[Evaluation]:
    return [dataclasses.replace(row, time_s=0.0) for row in rows]


@pytest.mark.usefixtures("ray_session")
def test_a_trial_is_evaluated_at_its_begin_by_its_schedule_at_the_switch_and_at_its_end(tmp_path: Path) -> None:
    calql, _, sac = study_of(tmp_path).trials[:3]
    announced: list[Evaluation] = []
    run_trial(calql, tmp_path / "calql", announced.append)
    fingerprint, rows = finished_evaluations(tmp_path / "calql")  # type: ignore[misc]
    assert fingerprint == calql.fingerprint
    assert rows == announced
    offline = [row for row in rows if row.num_online_env_steps == 0]
    assert [row.num_offline_updates for row in offline] == [0, 10, 20]
    steps = [row.num_online_env_steps for row in rows[3:]]
    assert len({step // 25 for step in steps if step < 60}) == len([step for step in steps if step < 60])
    assert steps[-2] < 60 <= steps[-1]
    assert rows[-1].num_online_updates == int(0.2 * steps[-1])
    assert {row.num_episodes for row in rows} == {2}
    assert all(row.success_rate in (0.0, 0.5, 1.0) and -20.0 <= row.return_mean <= 0.0 for row in rows)
    assert rows[0].calibration_gap is None
    assert all(row.calibration_gap is not None and 0.0 <= row.bound_rate <= 1.0 for row in rows[1:])  # type: ignore[operator]

    run_trial(sac, tmp_path / "sac", announced.append)
    rows = finished_evaluations(tmp_path / "sac")[1]  # type: ignore[index]
    assert rows[0].num_online_env_steps == 0
    assert {row.num_offline_updates for row in rows} == {0}
    assert rows[-1].num_online_updates > 0


@pytest.mark.usefixtures("ray_session")
def test_a_row_has_nothing_of_what_is_not_evaluated_after_the_switch(tmp_path: Path) -> None:
    (trial,) = study_of(tmp_path, seeds=[0], algorithms={"SAC after the switch": {"conservative_online": False}}).trials
    run_trial(trial, tmp_path / "sac", lambda row: None)
    rows = finished_evaluations(tmp_path / "sac")[1]  # type: ignore[index]
    assert all(0.0 <= row.bound_rate <= 1.0 for row in rows if row.num_offline_updates and not row.num_online_updates)  # type: ignore[operator]
    online = [row for row in rows if row.num_online_updates]
    assert online
    assert {row.bound_rate for row in online} == {None}
    assert all(math.isfinite(row.q_data) for row in online)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray_session")
def test_a_trial_that_was_stopped_anywhere_goes_on_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = study_of(tmp_path).trials[0]
    run_trial(trial, tmp_path / "whole", lambda row: None)
    whole = finished_evaluations(tmp_path / "whole")[1]  # type: ignore[index]
    monkeypatch.setattr(trials, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)

    def stop_after(count: int) -> Any:
        seen: list[Evaluation] = []

        def announce(row: Evaluation) -> None:
            seen.append(row)
            if len(seen) == count:
                raise KeyboardInterrupt

        return announce

    for interruption in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_trial(trial, tmp_path / "parts", stop_after(3))
        assert finished_evaluations(tmp_path / "parts") is None
        if interruption:  # As if it had been killed just before the new checkpoint took the old one's place.
            (tmp_path / "parts" / "checkpoint").rename(tmp_path / "parts" / "checkpoint.partial")
    run_trial(trial, tmp_path / "parts", lambda row: None)
    assert without_time(finished_evaluations(tmp_path / "parts")[1]) == without_time(whole)  # type: ignore[index]
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["evaluations.json"]


@pytest.mark.usefixtures("ray_session")
def test_a_trial_that_is_asked_to_stop_saves_its_state_and_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    trial = study_of(tmp_path).trials[0]
    assert run_trial(trial, tmp_path / "whole", lambda row: None)
    whole = finished_evaluations(tmp_path / "whole")[1]  # type: ignore[index]
    for num_asked in (1, 3, 4):  # At once, in the offline phase, online.
        answers = iter([False] * (num_asked - 1) + [True])
        assert not run_trial(trial, tmp_path / "parts", lambda row: None, is_stopped=answers.__next__)
        assert (tmp_path / "parts" / "checkpoint").is_dir() == (num_asked > 1)
    assert run_trial(trial, tmp_path / "parts", lambda row: None)
    assert without_time(finished_evaluations(tmp_path / "parts")[1]) == without_time(whole)  # type: ignore[index]
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["evaluations.json"]


def test_a_damaged_checkpoint_of_a_trial_is_named_and_not_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trial = study_of(tmp_path).trials[0]
    damaged, incomplete = trials.checkpoints(tmp_path / "trial")
    for folder in (damaged, incomplete):
        folder.mkdir(parents=True)
        for name in ("class_and_ctor_args.pkl", "algorithm_state.pkl"):
            (folder / name).write_bytes(b"content")
        write_manifest(folder, {"versions": {}})
        trials._write_evaluations([], trial, folder)
    (damaged / "algorithm_state.pkl").write_bytes(b"Content")
    (incomplete / "algorithm_state.pkl").unlink()
    assert trials._restored(trial, tmp_path / "trial") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"The checkpoint at '{damaged}' is damaged: 'algorithm_state.pkl' has other content than was saved. The trial "
        f"'{trial.name}' does not go on from it.",
        f"The checkpoint at '{incomplete}' is incomplete: saving it was interrupted or files were lost, "
        "'algorithm_state.pkl' is missing; give the folder that `algo.save_to_path()` or Ray Tune wrote. The trial "
        f"'{trial.name}' does not go on from it.",
    ]


def in_shell(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from rllib_calql.commands.main import main; main(prog_name='rllib')", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


@pytest.mark.slow
def test_a_killed_study_goes_on_without_repeating_finished_trials_and_reports(tmp_path: Path) -> None:
    algorithms = {"Cal-QL": {}, "CQL": {"calibrate": False}}
    path, folder = study_file(tmp_path, algorithms=algorithms, seeds=[3]), tmp_path / "results"
    command = ["study", str(path), "--output", str(folder), "--num-cpus", "1"]  # One trial after the other.
    process = in_shell(*command)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(folder.glob("trials/*/*/*/evaluations.json"))) < 1 and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished = {file: file.read_text() for file in folder.glob("trials/*/*/*/evaluations.json")}
    assert len(finished) == 1
    process = in_shell(*command)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert "1 of 2 trials are finished already." in output
    assert re.findall(r"^(.*): finished \(1/1\)$", output, flags=re.MULTILINE) == ["Line | CQL | seed 3"]
    assert {file: file.read_text() for file in finished} == finished
    rows, description = read_results(folder)
    assert {(row.algorithm, row.seed) for row in rows} == {(algorithm, 3) for algorithm in algorithms}
    assert description["versions"]["ray"].startswith("2.")
    assert f"Wrote {folder}/report.html" in output
    page = (folder / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in algorithms)


def test_a_folder_with_results_of_other_settings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    trial = study_of(tmp_path).trials[0]
    (folder / trial.folder).mkdir(parents=True)
    (folder / trial.folder / "evaluations.json").write_text(json.dumps({"fingerprint": "other", "evaluations": []}))
    result = CliRunner().invoke(main, ["study", str(tmp_path / "study.yaml"), "--output", str(folder)])
    assert result.exit_code == 2
    assert "was made with other settings than 'Line | Cal-QL | seed 0' has now" in result.output


def test_a_study_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["study", str(tmp_path / "no.yaml")])
    assert result.exit_code == 2
    assert "no.yaml' does not exist" in result.output


# --- Results and reports ----------------------------------------------------------------------------------------------


def rows_of(algorithm: str, seed: int, scores: list[float], task: str = "Maze") -> list[Evaluation]:
    """A trial with evaluations at 0 and 100 updates, then every 50 env steps."""
    times = [(0, 0), (100, 0)] + [(100, 50 * i) for i in range(1, len(scores) - 1)]
    return [
        Evaluation(
            task, algorithm, seed, updates, steps, steps, 20, score - 1.0, success_rate=score, calibration_gap=-s
        )
        for (updates, steps), score, s in zip(times, scores, range(len(scores)), strict=True)
    ]


SCORES = {
    "Cal-QL": [[0.0, 0.8, 0.8, 1.0], [0.0, 0.6, 0.8, 1.0]],
    "CQL": [[0.0, 0.8, 0.2, 0.8], [0.0, 0.6, 0.2, 0.4]],
}


def all_rows() -> list[Evaluation]:
    return [
        row for name, its in SCORES.items() for seed, scores in enumerate(its) for row in rows_of(name, seed, scores)
    ]


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path / "r", all_rows(), {"name": "mazes"})
    assert read_results(tmp_path / "r") == (all_rows(), {"name": "mazes"})
    write_results(tmp_path / "r", all_rows()[:3], {"name": "other"})
    assert read_results(tmp_path / "r") == (all_rows()[:3], {"name": "other"})
    with pytest.raises(ValueError, match="holds no results of a study"):
        read_results(tmp_path)


def test_the_table_of_a_task() -> None:
    fates = {name: [fate_of(trial) for trial in its] for name, its in group(all_rows())["Maze"].items()}
    calql, cql = summary_rows(fates)
    # Areas of 100 env steps: 0.8 0.8 1.0 and 0.6 0.8 1.0 -> 85 and 80; 0.8 0.2 0.8 and 0.6 0.2 0.4 -> 50 and 35.
    assert calql[:3] == ["Cal-QL", "2", "0.70 [0.60, 0.80]"]
    assert calql[3:] == ["1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "0.17 [0.15, 0.20]", "0.00 [0.00, 0.00]", "0"]
    assert cql[5:] == ["0.57 [0.50, 0.65]", "0.50 [0.40, 0.60]", "100 (1 of 2 never)"]


def test_rows_in_any_order_make_trials_in_order_of_time() -> None:
    grouped = group(reversed(all_rows()))
    assert list(grouped["Maze"]) == ["CQL", "Cal-QL"]
    assert grouped["Maze"]["CQL"] == [rows_of("CQL", seed, scores) for seed, scores in enumerate(SCORES["CQL"])]


def test_a_report_is_one_page_that_needs_nothing_else_and_is_the_same_each_time(tmp_path: Path) -> None:
    write_results(tmp_path / "one", all_rows(), {"name": "mazes & more"})
    write_results(tmp_path / "two", [dataclasses.replace(row, task="Other") for row in all_rows()], {"name": "two"})
    pages = [write_report([tmp_path / "one", tmp_path / "two"], tmp_path / to).read_text() for to in ("a", "b")]
    assert pages[0] == pages[1]
    assert "mazes &amp; more" in pages[0]
    assert "<h2>Maze</h2>" in pages[0]
    assert "<h2>Over all tasks</h2>" in pages[0]
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", pages[0])
    pictures = {"learning_curves.png", "regret.png", "dip.png", "calibration_gap.png", "bound_rate.png"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == pictures | {"report.html", "summary.md"}
    lines = (tmp_path / "a" / "summary.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### Maze", "### Other"]
    assert lines[2].startswith("| algorithm | seeds | score at the switch (IQM) |")
    assert lines[3] == "| --- | --- | --- | --- | --- | --- | --- | --- |"
    assert lines[4].startswith("| Cal-QL | 2 | 0.70 [0.60, 0.80] | 1.00 [1.00, 1.00] |")
    assert pages[0].count("data:image/png;base64,") == len(pictures)
    assert all((tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_report_command_names_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "is neither the folder of a run nor of a study" in result.output
    (tmp_path / "study.json").write_text("{}")
    assert "holds no results of a study" in CliRunner().invoke(main, ["report", str(tmp_path)]).output
    write_results(tmp_path, [], {"name": "empty"})
    assert "No trial in" in CliRunner().invoke(main, ["report", str(tmp_path)]).output
