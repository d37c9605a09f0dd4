"""`rllib score` and `rllib select`: tables, JSON, counted episodes, and checkpoints that cannot be judged."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny import LineEnv, line_config, write_line_data

from rllib_calql import CalQLConfig
from rllib_calql.checkpoints import reading
from rllib_calql.commands.main import main
from rllib_calql.commands.score import best_first, shown_names, table_of
from rllib_calql.common import spaces
from rllib_calql.evaluation.fqe import judging
from rllib_calql.evaluation.fqe.judging import Judged
from rllib_calql.evaluation.fqe.scoring import Interval, Score

EPISODES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Checkpoints of three policies: one that goes right, one that goes left, one that stays; and of other data."""
    folder = tmp_path_factory.mktemp("judging")
    write_line_data(folder / "line.parquet", num_episodes=EPISODES)
    algo = line_config(folder, offline_updates=2, updates_per_iteration=2).build()
    module = algo.learner_group._learner.module["default_policy"]
    for name, bias in (("right", 3.0), ("left", -3.0), ("stays", 0.0)):
        for parameter in module.policy.parameters():
            parameter.data.zero_()
        module.policy.head.bias.data[0] = bias
        algo.save_to_path(folder / name)
    algo.stop()
    other = folder / "elsewhere"
    other.mkdir()
    algo = line_config(other, offline_updates=2, updates_per_iteration=2).offline_data(validation_fraction=0.5).build()
    algo.save_to_path(folder / "of_other_data")
    algo.stop()
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_better_policy_comes_first_with_interval_behaviour_and_warnings(folder: Path) -> None:
    # -1 a step until an end of the line: who goes somewhere has the larger return.
    done = run("score", folder / "stays", folder / "right", "--updates", 400)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows[:3]] == ["checkpoint", "right", "stays"]
    assert done.stdout.count("[") >= 5  # Each value and the heading of each.
    assert f"at the first observations of {EPISODES // 10} held-out episodes" in done.stdout
    # What is true of all is said once, with a line of its own for what is true of one.
    assert done.stdout.count("it was trained on the episodes that it is judged by") == 1
    assert "Warning: all: it was trained on the episodes that it is judged by" in done.stdout


def test_json_holds_the_scores_in_the_order_of_the_arguments(folder: Path) -> None:
    done = run("score", folder / "stays", folder / "right", "--updates", 5, "--json")
    stays, right = json.loads(done.stdout)["checkpoints"]
    assert [Path(one["checkpoint"]).name for one in (stays, right)] == ["stays", "right"]
    assert right["value"]["low"] <= right["value"]["mean"] <= right["value"]["high"]
    assert right["updates"] == 5
    assert right["num_held_out_episodes"] == EPISODES // 10
    assert right["behaviour"] == stays["behaviour"]


def test_the_hold_out_of_the_training_is_used_and_not_warned_of(folder: Path) -> None:
    done = run("score", folder / "of_other_data", "--updates", 5, "--json")
    (one,) = json.loads(done.stdout)["checkpoints"]
    assert one["num_held_out_episodes"] == 6
    assert not any("trained on the episodes" in warning for warning in one["warnings"])


def test_data_that_have_moved_are_judged_by_the_hold_out_of_the_training(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copy(folder / "elsewhere" / "line.parquet", tmp_path / "moved.parquet")
    done = run("score", folder / "of_other_data", "--updates", 5, "--json", "--data", moved)
    (one,) = json.loads(done.stdout)["checkpoints"]
    assert one["num_held_out_episodes"] == 6
    assert not any("trained on the episodes" in warning for warning in one["warnings"])
    # The other one has no hold-out of these data, and is judged by the same episodes.
    both = run("score", folder / "of_other_data", folder / "right", "--updates", 5, "--json", "--data", moved)
    assert [one["num_held_out_episodes"] for one in json.loads(both.stdout)["checkpoints"]] == [6, 6]


def test_data_that_are_gone_are_told_with_the_option_that_names_others(folder: Path, tmp_path: Path) -> None:
    path = folder / "elsewhere" / "line.parquet"
    path.rename(tmp_path / "line.parquet")
    try:
        done = run("score", folder / "of_other_data")
    finally:
        (tmp_path / "line.parquet").rename(path)
    assert done.exit_code == 1
    assert "no such file or folder" in done.stderr
    assert "if it has moved, give `--data`" in done.stderr


@pytest.fixture
def left_changed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes settings of the checkpoint "left" as it is read."""

    def change(**settings: Any) -> None:
        def read(path: Any, filesystem: Any, read_policy: Any) -> Any:
            one = reading.read_of_one_save(path, filesystem, read_policy)
            if Path(path).name == "left":
                for name, value in settings.items():
                    setattr(one.config, name, value)
            return one

        monkeypatch.setattr(judging, "read_of_one_save", read)

    return change


def test_a_checkpoint_without_data_is_named_and_the_others_go_on(
    folder: Path, left_changed: Callable[..., None]
) -> None:
    left_changed(input_="sampler")
    done = run("score", folder / "left", folder / "right", "--updates", 5)
    assert done.exit_code == 1
    assert "left' was not judged: it was trained without offline data" in done.stderr
    assert done.stdout.splitlines()[1].startswith("right")


def test_no_value_is_fitted_of_a_checkpoint_that_no_episode_can_be_run_of(
    folder: Path, left_changed: Callable[..., None]
) -> None:
    left_changed(env=None)
    done = run("select", folder / "left", "--episodes", 5)
    assert done.exit_code == 1
    assert "left' was not judged: it was trained on data alone, without an environment; name one with `--env`" in (
        done.stderr
    )
    assert "fitting values" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_ends_the_fits_that_go_on_beside(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    begun, loops = threading.Barrier(2, timeout=20), [0, 0]

    def fit(data: Any, policy: int, settings: Any, *, on_progress: Callable[[int], None], **_: Any) -> None:
        begun.wait()
        for loops[policy] in range(500):
            if policy == 0:
                raise error
            time.sleep(0.01)
            on_progress(loops[policy])

    monkeypatch.setattr(judging, "score_policy", fit)
    monkeypatch.setattr(judging.os, "cpu_count", lambda: 2)
    candidates = [
        judging._Candidate(place, SimpleNamespace(config=CalQLConfig(), policy=place), [])  # type: ignore[arg-type]
        for place in (0, 1)
    ]
    with pytest.raises(error):
        judging._scores(None, candidates, None, lambda done, total: None)  # type: ignore[arg-type]
    assert loops[1] < 250


def test_a_broken_checkpoint_and_one_of_other_data_are_named_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "left", tmp_path / "broken")
    state = next(broken.rglob("module_state.pkl"))
    state.write_bytes(state.read_bytes()[:-20])
    done = run("score", broken, folder / "right", folder / "of_other_data", "--updates", 5)
    assert done.exit_code == 1
    assert f"'{broken}' was not judged: The checkpoint at '{broken}' is damaged" in done.stderr
    assert f"'{folder / 'of_other_data'}' was not judged: it was trained on other data" in done.stderr
    assert "judge all of them by `--data`" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:2]] == ["checkpoint", f"{folder.name}/right"]
    both = run("score", folder / "right", folder / "of_other_data", "--updates", 5, "--data", folder / "line.parquet")
    assert both.exit_code == 0, both.output
    alone = run("score", broken, "--updates", 5)
    assert (alone.exit_code, alone.stdout) == (1, "No checkpoint could be judged.\n")


def test_what_cannot_be_judged_is_told(folder: Path, tmp_path: Path) -> None:
    missing = run("score", tmp_path / "missing")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr
    empty = run("score", "")  # As of a variable that is not set.
    assert empty.exit_code == 2
    assert "The name of the run or checkpoint is empty" in empty.stderr
    few = write_line_data(tmp_path / "few.parquet", num_episodes=2)
    done = run("score", folder / "right", "--data", few)
    assert done.exit_code == 1
    assert "The data hold 2 episodes; judging by data needs at least 3" in done.stderr
    nowhere = run("score", folder / "right", "--data", tmp_path / "nowhere.parquet")
    assert nowhere.exit_code == 1
    assert "nowhere.parquet" in nowhere.stderr
    assert run("select", folder / "right").exit_code == 2
    assert run("select", folder / "right", "--episodes", 3, "--seed", 2**32).exit_code == 2


def ranked(folder: Path, **values: float) -> Callable[..., tuple[list[Judged], dict[str, Any]]]:
    """Stands for `judge`: checkpoints of these values by the data."""
    from pyarrow.fs import LocalFileSystem

    nothing = Interval(0.0, 0.0, 0.0)
    judged = [
        Judged(str(folder / name), Score(Interval(value, 0.0, 4.0), nothing, 0.0, 0.0, 0.0, 2, 0.99, 1, 0.0, ["why"]))
        for name, value in values.items()
    ]
    return lambda *checkpoints, **options: (judged, {one.checkpoint: LocalFileSystem() for one in judged})


def test_episodes_choose_against_the_data_and_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The data take the one that stays for the best.
    monkeypatch.setattr("rllib_calql.commands.select.judge", ranked(folder, right=2.0, left=1.0, stays=3.0))
    LineEnv.log.clear()
    chosen = run("select", folder / "right", "--episodes", 18, "--json")
    assert chosen.exit_code == 0, chosen.output
    content = json.loads(chosen.stdout)
    starts = sum(1 for step, before in zip(LineEnv.log[1:], LineEnv.log, strict=False) if step[0] != before[3]) + 1
    assert content["episodes_spent"] == 18 == starts
    assert Path(content["winner"]).name in ("right", "left")
    spent = {Path(one["checkpoint"]).name: one for one in content["checkpoints"]}
    assert sum(one["episodes"] for one in spent.values()) == 18
    assert spent["stays"]["success_rate"]["mean"] == 0.0
    winner = spent[Path(content["winner"]).name]
    assert winner["success_rate"]["mean"] == 1.0
    assert winner["success_rate"]["low"] < 1.0
    text = run("select", folder / "right", "--episodes", 2)
    assert "Spent 2 episodes." in text.stdout
    elsewhere = run("select", folder / "right", "--episodes", 2, "--env", "CartPole-v1")
    assert elsewhere.exit_code == 1
    assert "use an environment with the spaces of the checkpoint" in elsewhere.stderr
    # With two episodes only the first of the ranking takes part.
    assert "Winner: " in text.stdout
    assert "stays, success rate 0 [" in text.stdout
    assert "2 checkpoints got none" in text.stdout
    assert "raise `--episodes`" in text.stdout
    # No value stands there without its warnings and its unit.
    rows = [line.split() for line in text.stdout.splitlines()]
    assert rows[0][-1] == "warnings"
    assert {row[-1] for row in rows[1:4]} == {"1"}
    assert "values are discounted by 0.99; `rllib score` tells their warnings" in text.stdout


def test_returns_that_are_no_numbers_leave_the_json_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.commands.select.judge", ranked(folder, right=2.0, stays=1.0))
    for reward in (-np.inf, np.nan):
        monkeypatch.setattr(LineEnv, "reward", staticmethod(lambda next_obs, reward=reward: np.float64(reward)))
        done = run("select", folder / "right", "--episodes", 6, "--json")
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert [one["episode_return"]["mean"] for one in content["checkpoints"]] == [None, None]


def test_a_warning_names_the_checkpoints_that_it_is_of() -> None:
    nothing = Interval(0.0, 0.0, 0.0)
    judged = [
        Judged(f"/runs/{name}", Score(nothing, nothing, 0.0, 0.0, 0.0, 2, 0.99, 1, 0.0, warnings))
        for name, warnings in {"a": ["few", "moved by 1"], "b": ["few", "seen"], "c": ["few", "seen"]}.items()
    ]
    said = [line for line in table_of(judged).splitlines() if line.startswith("Warning")]
    assert said == ["Warning: all: few.", "Warning: 'a': moved by 1.", "Warning: 'b', 'c': seen."]
    (alone,) = [line for line in table_of(judged[:1]).splitlines() if line.endswith("few.")]
    assert alone == "Warning: 'a': few."


def test_names_leave_out_what_all_have_in_common_and_are_whole_where_some_lie_in_a_bucket() -> None:
    assert shown_names(["/runs/a/one", "/runs/b/two"]) == {"/runs/a/one": "a/one", "/runs/b/two": "b/two"}
    assert shown_names(["/runs/a/one"]) == {"/runs/a/one": "one"}
    mixed = ["bucket/runs/one", "/runs/two"]
    assert shown_names(mixed) == dict(zip(mixed, mixed, strict=True))


def test_an_interrupt_says_what_was_spent_and_what_it_showed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.commands.select.judge", ranked(folder, stays=3.0, right=2.0))
    steps: list[float] = []
    step = LineEnv.step

    def interrupted(env: LineEnv, action: Any) -> Any:
        steps.append(0.0)
        if len(steps) == 2 * LineEnv.TIME_LIMIT + 5:  # In the third episode of the one that stays.
            raise KeyboardInterrupt
        return step(env, action)

    monkeypatch.setattr(LineEnv, "step", interrupted)
    done = run("select", folder / "right", "--episodes", 12)
    assert done.exit_code == 130
    assert "Spent 3 episodes: 'stays' 2 whole ones, mean return -20." in done.stderr


def test_episodes_that_never_began_are_not_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(env: LineEnv, **_: Any) -> Any:
        raise RuntimeError("The arm is off.")

    monkeypatch.setattr("rllib_calql.commands.select.judge", ranked(folder, stays=3.0, right=2.0))
    monkeypatch.setattr(LineEnv, "reset", broken)
    done = run("select", folder / "right", "--episodes", 12, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["episodes_spent"] == 0
    assert "stays' could not be run: " in done.stderr
    assert "The arm is off." in done.stderr


def test_a_fit_that_diverged_ranks_behind_all_others() -> None:
    def judged(name: str, value: float, *, is_possible: bool = True) -> Judged:
        interval = Interval(value, value, value)
        return Judged(name, Score(interval, interval, 0.0, 0.0, 0.0, 2, 0.99, 1, 0.0, [], is_possible))

    several = [judged("huge", 1e9, is_possible=False), judged("a", 1.0), judged("nan", float("nan")), judged("b", 2.0)]
    assert [one.checkpoint for one in best_first(several)] == ["b", "a", "huge", "nan"]


def test_a_second_round_meets_other_seeds_than_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow.fs import LocalFileSystem

    from rllib_calql.commands.select import Episodes
    from rllib_calql.progress.display import Display

    path = str(folder / "right")
    runner = Episodes({path: "right"}, {path: LocalFileSystem()}, 7, None, Display())
    starts = []
    for number in (0, 0, 1):
        LineEnv.log.clear()
        runner.run(path, 2, number)
        starts.append(LineEnv.log[0][0])
    assert starts[0] == starts[1] != starts[2]


def test_spaces_survive_their_descriptions() -> None:
    import gymnasium as gym
    import numpy as np

    space = gym.spaces.Dict(
        {
            "picture": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "kind": gym.spaces.Discrete(3, start=1),
            "both": gym.spaces.Tuple([gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-1.0, 1.0, (2,))]),
            "bits": gym.spaces.MultiBinary(4),
        }
    )
    description = spaces.description_of(space)
    assert spaces.description_of(spaces.space_of_description(json.loads(json.dumps(description)))) == description
    assert gym.spaces.utils.flatdim(spaces.space_of_description(description)) == gym.spaces.utils.flatdim(space)
