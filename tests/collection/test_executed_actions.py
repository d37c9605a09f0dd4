"""What the system executed in place of what it was asked for is what is stored, and interventions are counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from test_storing import Kept, episode_of
from tiny import LineEnv, assert_identical, line_config, run_state

from rllib_calql import CalQL
from rllib_calql.datasets.episodes.reader import ReadOptions
from rllib_calql.datasets.readers.opening import open_input

LIMIT = 0.5


class LimitedLineEnv(LineEnv):
    """Moves by at most `LIMIT`, and says so where that changes an action; a person acts in every third step."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves by what is executed."""
        person = self.t % 3 == 2
        executed = np.float32([0.25]) if person else np.clip(action, -LIMIT, LIMIT)
        obs, reward, terminated, truncated, info = super().step(executed)
        if person or not np.array_equal(executed, action):
            info["executed_action"] = executed
        if person:
            info["is_intervention"] = True
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("num_envs", [1, 2])
def test_rows_hold_what_was_executed(tmp_path: Path, num_envs: int) -> None:
    config = line_config(tmp_path, offline_updates=0, updates_per_env_step=0.02).environment(LimitedLineEnv)
    algo = config.env_runners(num_envs_per_env_runner=num_envs).build()
    LineEnv.log.clear()
    result = algo.train()
    column: Any = algo.store.online_column
    num_rows, actions = algo.store.num_online, column(Columns.ACTIONS)[:, 0]
    # The point moves by what was executed, in [-2, 2], so every row tells what it must hold.
    moved = (column(Columns.NEXT_OBS) - column(Columns.OBS))[:, 0]
    np.testing.assert_allclose(actions, moved / 2.0, atol=1e-6)
    assert np.abs(actions).max() <= LIMIT / 2.0 + 1e-6
    by_person = np.abs(moved - 0.25) < 1e-6
    assert algo.store.online_interventions.tolist() == by_person.tolist()
    collection = result["collection"]
    assert collection["num_intervention_env_steps_lifetime"] == by_person.sum() > 0
    assert collection["intervention_share"] == by_person.sum() / num_rows
    # Most of what an untrained policy asks for is beyond the limit.
    assert by_person.sum() < collection["num_replaced_actions_lifetime"] <= num_rows
    restored = CalQL.from_checkpoint(algo.save_to_path(tmp_path / "checkpoint"))
    assert restored.store.online_interventions.tolist() == by_person.tolist()
    assert_identical(run_state(restored), run_state(algo))
    restored.stop()
    algo.stop()


def with_infos(*infos: dict[str, Any], actions: tuple[float, ...] = (0.5, -0.5, 0.0)) -> SingleAgentEpisode:
    episode = episode_of([1.0, 2.0, 4.0])
    episode.infos.data[:] = [{"executed_action": "that of the reset says nothing"}, *infos]
    episode.actions.data[:] = np.float32(actions)[:, None]
    return episode


def test_module_actions_are_made_of_environment_units() -> None:
    kept = Kept()  # Actions in [-2, 2].
    kept.keeper.keep(
        [with_infos({"executed_action": np.array([-1.0])}, {"executed_action": None}, {"is_intervention": np.True_})]
    )
    assert kept.store.online_column(Columns.ACTIONS)[:, 0].tolist() == [-0.5, -0.5, 0.0]
    assert kept.store.online_interventions.tolist() == [False, False, True]
    counted = kept.keeper.results()
    assert counted["num_replaced_actions_lifetime"] == counted["num_intervention_env_steps_lifetime"] == 1


def test_the_same_action_executed_is_no_replaced_one() -> None:
    kept = Kept()
    kept.keeper.keep([with_infos({"executed_action": np.float64([1.0])}, {}, {"is_intervention": 0})])
    assert kept.keeper.results()["num_replaced_actions_lifetime"] == 0
    assert kept.keeper.results()["num_intervention_env_steps_lifetime"] == 0


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ({"executed_action": [0.1, 0.2]}, ValueError, r"step 1: .*`infos\['executed_action'\]` has the shape \(2,\)"),
        ({"executed_action": 0.1}, ValueError, r"the shape \(\), an action has \(1,\)"),
        ({"executed_action": ["stop"]}, TypeError, r"must hold numbers, got <U4"),
        ({"executed_action": [2.1]}, ValueError, r"step 1, .*action \[2\.1\] is outside the bounds of Box\(-2"),
        ({"is_intervention": "yes"}, ValueError, r"`infos\['is_intervention'\]` must be True or False, got 'yes'"),
        ({"is_intervention": 0.5}, ValueError, "True or False, got 0.5"),
    ],
)
def test_what_cannot_be_an_executed_action_is_refused(
    info: dict[str, Any], error: type[Exception], message: str
) -> None:
    kept = Kept(env="'my_robot:Arm-v0'")
    with pytest.raises(error, match=rf"Environment 'my_robot:Arm-v0', episode .*{message}"):
        kept.keeper.keep([with_infos({}, info, {})])
    assert (kept.store.num_online, kept.lifetime.num_online_episodes) == (0, 0)


def test_an_executed_action_that_is_not_finite_costs_the_episode(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        kept.keeper.keep([with_infos({"executed_action": [np.nan]}, {}, {}), episode_of([1.0])])
    assert (kept.store.num_online, kept.keeper.num_discarded) == (1, 1)
    assert "step 0: `infos['executed_action']` is [nan]; it must be finite" in caplog.text


def test_episodes_that_are_handed_over_are_read_by_the_same_rule() -> None:
    whole = with_infos({"executed_action": [0.25]}, {}, {"is_intervention": True})
    (reader,) = open_input([whole], ReadOptions(columns=frozenset()))
    (block,) = reader.blocks()
    executed = block.extra_model_outputs["executed_actions"][:, 0]
    np.testing.assert_array_equal(executed, [0.25, np.nan, np.nan])
    assert block.extra_model_outputs["is_intervention"].tolist() == [False, False, True]


def test_a_piece_of_an_episode_without_executed_actions_loses_none_of_the_others() -> None:
    pieces = [SingleAgentEpisode(id_="e")]
    pieces[0].add_env_reset(np.zeros(1, np.float32))
    for step in range(4):
        if step == 2:
            pieces.append(pieces[0].cut())
        info = {"executed_action": np.float32([0.25])} if step == 1 else {}
        pieces[-1].add_env_step(np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0, infos=info, terminated=step == 3)
    (reader,) = open_input(pieces, ReadOptions(columns=frozenset()))
    (block,) = reader.blocks()
    executed = block.extra_model_outputs["executed_actions"][:, 0]
    np.testing.assert_array_equal(executed, [np.nan, 0.25, np.nan, np.nan])


def test_a_fixed_dimension_is_never_replaced() -> None:
    space = gym.spaces.Box(np.float32([-2.0, 3.0]), np.float32([2.0, 3.0]))
    kept = Kept(action_space=space, action_dim=2)
    episode = episode_of([1.0])
    episode.actions.data = np.float32([[0.5, 0.7]])
    episode.infos.data[:] = [{}, {"executed_action": np.float32([1.0, 3.0])}]
    kept.keeper.keep([episode])
    assert kept.store.online_column(Columns.ACTIONS).tolist() == [[0.5, 0.0]]
    assert kept.keeper.results()["num_replaced_actions_lifetime"] == 0
