"""`rllib score` and `rllib select`: tables, JSON, counted episodes, and checkpoints that cannot be judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import LineEnv, line_config, write_line_data

from rllib_calql.commands.main import main
from rllib_calql.common import spaces
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
    assert "Warning: 'right': it was trained on the episodes that it is judged by" in done.stdout


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
    few = write_line_data(tmp_path / "few.parquet", num_episodes=2)
    done = run("score", folder / "right", "--data", few)
    assert done.exit_code == 1
    assert "The data hold 2 episodes; judging by data needs at least 3" in done.stderr
    nowhere = run("score", folder / "right", "--data", tmp_path / "nowhere.parquet")
    assert nowhere.exit_code == 1
    assert "nowhere.parquet" in nowhere.stderr
    assert run("select", folder / "right").exit_code == 2


def test_episodes_choose_against_the_data_and_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ranked(*checkpoints: Any, **options: Any) -> tuple[list[Judged], dict[str, Any]]:
        from pyarrow.fs import LocalFileSystem

        nothing = Interval(0.0, 0.0, 0.0)
        value = {"stays": 3.0, "right": 2.0, "left": 1.0}  # The data take the one that stays for the best.
        judged = [
            Judged(
                str(folder / name),
                Score(Interval(value[name], 0.0, 4.0), nothing, 0.0, 0.0, 0.0, 2, 0.99, 1, 0.0, []),
            )
            for name in ("right", "left", "stays")
        ]
        return judged, {one.checkpoint: LocalFileSystem() for one in judged}

    monkeypatch.setattr("rllib_calql.commands.select.judge", ranked)
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
