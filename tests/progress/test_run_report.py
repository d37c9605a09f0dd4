"""Runs compared: what their folders tell, the table, the page, and the command."""

from __future__ import annotations

import fcntl
import io
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from click.testing import CliRunner

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.commands.main import main
from rllib_calql.experiments.experiment import Experiment
from rllib_calql.experiments.run_folders import foreign_entries
from rllib_calql.experiments.tune_runs import _write_page
from rllib_calql.progress import plots, report
from rllib_calql.progress.display import Display
from rllib_calql.progress.runs import read_run

LOCAL = pyarrow.fs.LocalFileSystem()
PNG = b"\x89PNG\r\n\x1a\n"


def result(
    iteration: int, updates: int, steps: int, episode_return: float | None = None, **more: Any
) -> dict[str, Any]:
    evaluation = {} if episode_return is None else {"evaluation": evaluated(episode_return, iteration)}
    return {
        "training_iteration": iteration,
        "phase": "online" if steps else "offline",
        "num_offline_updates_lifetime": updates,
        "num_online_env_steps_lifetime": steps,
        "time_total_s": 10.0 * iteration,
        "store": {"offline_return_mean": -500.0},
        "learners": {"default_policy": {"calibration_gap_offline": -1.0, "td_loss_q1": 0.25, "td_loss_q2": 0.75}},
        **evaluation,
        **more,
    }


def evaluated(episode_return: float, number: int) -> dict[str, Any]:
    return {"env_runners": {"episode_return_mean": episode_return, "episode_duration_sec_mean": 0.1 * number}}


def repeated(episode_return: float, number: int) -> dict[str, Any]:
    return {"env_runners": evaluated(episode_return, number)["env_runners"] | {"num_episodes_lifetime": 77.0}}


RESULTS = [
    result(1, 1_000, 0),
    result(2, 2_000, 0, -300.0),
    # RLlib repeats the last evaluation, with other counters.
    result(3, 2_000, 200, None, evaluation=repeated(-300.0, 2)),
    result(4, 2_000, 400, -350.0, fine_tuning={"dip": -50.0, "regret": 0.5}),
    result(5, 2_000, 600, -200.0, fine_tuning={"dip": -50.0, "regret": 0.25, "regime": "data"}, done=True),
]


def run_in(folder: Path, results: list[dict[str, Any]], *, trial: str = "CalQL_a", error: bool = False) -> Path:
    inside = folder / f"{trial}_2026-01-02_03-04-05"
    inside.mkdir(parents=True)
    (folder / "tuner.pkl").touch()
    (inside / "result.json").write_text("".join(json.dumps(one) + "\n" for one in results))
    (inside / "params.json").write_text(json.dumps({"gamma": 0.9, "tau": len(results)}))
    if error:
        (inside / "error.txt").write_text("ValueError")
    return folder


def test_the_table_has_final_and_best_dip_regret_and_the_returns_of_the_data(tmp_path: Path) -> None:
    (row,) = report.rows(report.named_trials([read_run(LOCAL, str(run_in(tmp_path / "r", RESULTS)))]))
    known = {name: value for name, value in row.items() if value is not None}
    assert known == {
        "run": "r",
        "status": "ended",
        "final return": -200.0,
        "best return": -200.0,
        "dip": -50.0,
        "regret": 0.25,
        "data return": -500.0,
        "regime": "data",
        "offline updates": 2_000,
        "env steps": 600,
        "time s": 50.0,
    }


def test_runs_without_an_environment_are_compared_by_their_held_out_losses(tmp_path: Path) -> None:
    def judged(iteration: int, td_loss: float | None, log_prob: float = 0.0) -> dict[str, Any]:
        held_out = {} if td_loss is None else {"held_out": {"td_loss": td_loss, "log_prob": log_prob}}
        return result(iteration, 100 * iteration, 0, evaluation=held_out)

    results = [judged(1, None), judged(2, 0.5), judged(3, 0.5), judged(4, 0.25, 1.0), judged(5, 0.75)]
    trials = report.named_trials([read_run(LOCAL, str(run_in(tmp_path / "r", results)))])
    (row,) = report.rows(trials)
    assert (row["final held-out TD loss"], row["best held-out TD loss"]) == (0.75, 0.25)
    assert trials["r"].known("held_out_td_loss") == [0.5, 0.25, 0.75]  # The third repeats the second.
    assert "best held-out TD loss   0.25" in report.as_text(trials)
    assert plots.draw(trials, "r")[:8] == PNG


def test_evaluations_at_intervals_of_their_own_are_repeated_on_their_own(tmp_path: Path) -> None:
    def judged(iteration: int, td_loss: float, value: float | None, episodes: int) -> dict[str, Any]:
        fitted = {"value": value, "value_low": (value or 0.0) - 1, "value_high": (value or 0.0) + 1}
        evaluation = {"held_out": {"td_loss": td_loss}, **evaluated(-3.0, episodes)}
        evaluation |= {} if value is None else {"fqe": fitted}
        return result(iteration, 100 * iteration, 0, None, evaluation=evaluation)

    # Held-out losses at every iteration, episodes at every second, values at the second and the fifth.
    results = [judged(1, 0.5, None, 1), judged(2, 0.4, 2.0, 2), judged(3, 0.3, 2.0, 2), judged(4, 0.2, 2.0, 3)]
    results.append(judged(5, 0.1, 3.0, 3))
    trials = report.named_trials([read_run(LOCAL, str(run_in(tmp_path / "r", results)))])
    assert trials["r"].known("held_out_td_loss") == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert trials["r"].known("episode_return") == [-3.0, -3.0, -3.0]
    assert trials["r"].known("value_by_data") == [2.0, 3.0]
    (row,) = report.rows(trials)
    assert [row[f"final value by data{end}"] for end in ("", ", low", ", high")] == [3.0, 2.0, 4.0]
    assert plots.draw(trials, "r")[:8] == PNG


def test_an_evaluation_that_rllib_repeats_counts_once_and_iterations_made_again_replace_those_before(
    tmp_path: Path,
) -> None:
    again = [*RESULTS[:4], result(3, 2_000, 180, -310.0)]
    (trial,) = read_run(LOCAL, str(run_in(tmp_path, again))).trials
    assert trial.known("episode_return") == [-300.0, -310.0]
    assert [point.iteration for point in trial.points] == [1, 2, 3]
    assert trial.points[0].td_loss == 0.5


def test_a_run_is_running_while_its_lock_is_held_and_asking_does_not_take_it(tmp_path: Path) -> None:
    run_in(tmp_path / "r", RESULTS[:2], error=True)
    lock = tmp_path / "r" / ".rllib_calql_run.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [trial.status for trial in read_run(LOCAL, str(tmp_path / "r")).trials] == ["running"]
    assert [trial.status for trial in read_run(LOCAL, str(tmp_path / "r")).trials] == ["failed"]
    assert lock.exists()  # `--resume` tells by it that the run was killed.
    run_in(tmp_path / "s", RESULTS[:2])
    assert [trial.status for trial in read_run(LOCAL, str(tmp_path / "s")).trials] == ["interrupted"]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run_in(tmp_path, RESULTS[:2])
    (file,) = tmp_path.glob("*/result.json")
    file.write_text(file.read_text() + '{"training_iteration": 3, "pha')
    (trial,) = read_run(LOCAL, str(tmp_path)).trials
    assert len(trial.points) == 2


def test_the_command_compares_runs_in_one_table_and_one_page(tmp_path: Path) -> None:
    one, two = run_in(tmp_path / "one", RESULTS), run_in(tmp_path / "two", RESULTS[:3])
    done = CliRunner().invoke(main, ["report", str(one), str(two), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    one_row = ["one", "ended", "-200.00", "-200.00", "-50.00", "0.25", "-500.00", "data", "2,000", "600", "0:50"]
    two_row = ["two", "interrupted", "-300.00", "-300.00", "-", "-", "-500.00", "-", "2,000", "200", "0:30"]
    assert [re.split(r"  +", line) for line in lines[1:3]] == [one_row, two_row]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(PNG)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r"<script|https?://|src=\"(?!data:)", page)  # It opens without a network.
    assert "<td>tau</td><td>5</td><td>3</td>" in page
    assert "gamma" not in page  # The same in both.


def test_the_command_prints_json_and_writes_nothing_then(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "one", RESULTS)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(main, ["report", str(folder), "--json"])
    (row,) = json.loads(done.output)
    assert (row["run"], row["final return"], row["final success"]) == ("one", -200.0, None)
    assert sorted(folder.rglob("*")) == before


def test_without_matplotlib_the_page_has_tables_and_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = run_in(tmp_path / "one", RESULTS)
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 0
    assert 'pip install "rllib-calql[plots]"' in done.output
    page = (folder / "progress.html").read_text()
    assert "-200.00" in page
    assert "<img" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"'nowhere' does not exist; give the folder of a run"),
        (["file"], r"'file' is a file; give the folder of a run"),
        (["empty"], r"'empty' is neither the folder of a run nor of a study; give"),
        (["."], r"'\.' is neither .* There are runs in it: 'run'"),
        (["run/CalQL_a_2026-01-02_03-04-05/checkpoint_000000"], r"is a checkpoint; give .*'/.*/run'\."),
        (["run", "study"], r"on runs or on studies, got the run 'run' and the study 'study'"),
        (["study", "--json"], r"`--json` is for runs"),
    ],
)
def test_folders_that_are_neither_or_both_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run_in(tmp_path / "run", RESULTS) / "CalQL_a_2026-01-02_03-04-05" / "checkpoint_000000"
    checkpoint.mkdir()
    (checkpoint / "calql.json").touch()
    for name in ("empty", "study"):
        (tmp_path / name).mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exit_code == 2, done.output
    assert re.search(message, " ".join(done.output.split()))


def test_a_page_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "one", RESULTS)
    (folder / "progress.html").write_text("<h1>Notes</h1>")
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 1
    assert "is of no report" in done.output
    assert (folder / "progress.html").read_text() == "<h1>Notes</h1>"


def written_at_the_end(storage: Path, name: str) -> str:
    experiment = Experiment(name, CalQL, CalQLConfig().training(gamma=0.9), stop={"training_iteration": 5})
    output = io.StringIO()
    _write_page(experiment, str(storage), Display(output))
    return output.getvalue()


def test_at_the_end_a_run_gets_a_page_with_its_budget_and_what_it_sets(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "one", RESULTS[:3], error=True)
    assert f"What came out is drawn in {folder}/progress.html" in written_at_the_end(tmp_path, "one")
    page = (folder / "progress.html").read_text()
    assert "<td>failed</td>" in page
    assert "3 of 5 iterations" in page
    assert "<td>gamma</td><td>0.9</td>" in page
    assert "<td>tau</td>" not in page  # Not set.
    assert (folder / "progress.png").read_bytes().startswith(PNG)
    assert foreign_entries(LOCAL, str(folder)) == []  # So `--overwrite` may remove them.


def test_a_report_on_a_run_keeps_the_budget_and_the_settings_that_the_run_wrote_into_its_page(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "one", RESULTS[:3])
    written_at_the_end(tmp_path, "one")
    for _ in range(2):
        assert CliRunner().invoke(main, ["report", str(folder)]).exit_code == 0
    page = (folder / "progress.html").read_text()
    for once in ("Budget: training_iteration: 5", "3 of 5 iterations", "<td>gamma</td><td>0.9</td>", "<h2>Trials</h2>"):
        assert page.count(once) == 1, once


def test_the_page_counts_every_kind_of_budget(tmp_path: Path) -> None:
    spent = {"num_online_episodes_lifetime": 7, "num_online_env_steps_taken_lifetime": 590}
    folder = run_in(tmp_path / "one", [*RESULTS[:4], RESULTS[4] | spent])
    (trial,) = read_run(LOCAL, str(folder)).trials
    trial = replace(trial, settings={"max_online_env_steps": 600})
    page = report.page("one", {"a": trial}, None, stop={"num_online_episodes_lifetime": 9})
    assert "7 of 9 online episodes, 590 of 600 online env steps taken" in page
    assert "590 of 600 online env steps taken" in report.page("one", {"a": trial}, None, stop={})


def test_a_curve_has_a_gap_where_another_trial_was_offline_for_longer(tmp_path: Path) -> None:
    longer = [result(1, 3_000, 0, -300.0), result(2, 4_000, 300, -200.0)]
    runs = [read_run(LOCAL, str(run_in(tmp_path / name, made))) for name, made in (("a", RESULTS), ("b", longer))]
    (short,), (long,) = (run.trials for run in runs)
    scale = plots._Scale(4_000, 600)
    places = [place for place, _ in plots._curve(short, "episode_return", scale)]
    assert places == pytest.approx([0.2, math.nan, 0.4 + 0.6 * 400 / 600, 1.0], nan_ok=True)
    assert [place for place, _ in plots._curve(long, "episode_return", scale)] == pytest.approx([0.3, 0.7])


def test_a_picture_that_cannot_be_made_is_said_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(tmp_path / "one", RESULTS)

    def fail(*arguments: Any) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "draw", fail)
    assert re.search(
        r"progress.html could not be written to '.*/one': RuntimeError: no font", written_at_the_end(tmp_path, "one")
    )


def test_a_run_without_results_is_said_to_have_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(run_in(tmp_path / "one", []))])
    assert done.exit_code == 1
    assert "There is no result yet in" in done.output


def test_a_trial_that_failed_before_its_first_result_is_in_the_table(tmp_path: Path) -> None:
    failed = tmp_path / "one" / "CalQL_b_2026-01-02_03-04-05"
    failed.mkdir(parents=True)
    (failed / "error.txt").write_text("RuntimeError: no answer")
    (tmp_path / "one" / "tuner.pkl").touch()
    done = CliRunner().invoke(main, ["report", str(tmp_path / "one")])
    assert done.exit_code == 1
    assert "There is no result yet in" in done.output
    assert "a trial failed before its first, its `error.txt` there says why" in done.output
    run_in(tmp_path / "one", RESULTS)
    done = CliRunner().invoke(main, ["report", str(tmp_path / "one")])
    assert done.exit_code == 0
    assert re.search(r"^CalQL_a +ended .*\nCalQL_b +failed +- ", done.output, re.MULTILINE)
    assert (tmp_path / "one" / "progress.png").read_bytes().startswith(PNG)


def test_a_trial_that_failed_was_resumed_and_interrupted_is_interrupted(tmp_path: Path) -> None:
    failed = [*RESULTS[:2], result(3, 2_000, 200, timestamp=int(time.time()) - 60)]
    again = [*failed, result(4, 2_000, 400, timestamp=int(time.time()) + 60)]
    for name, results, status in (("a", failed, "failed"), ("b", again, "interrupted")):
        (trial,) = read_run(LOCAL, str(run_in(tmp_path / name, results, error=True))).trials
        assert trial.status == status


def test_a_file_for_the_folder_of_the_report_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for command in (["report", str(tmp_path / "missing")], ["study", str(tmp_path / "missing.yaml")]):
        done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "notes.txt")])
        assert done.exit_code == 2
        assert "'--output'" in done.output
        assert "notes.txt' is a file" in done.output
