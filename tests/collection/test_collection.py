"""Joining pieces of episodes, and the call that runs inside an env runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.collection.requests import EpisodeJoiner, Failure, collect, collect_or_tell, join_pieces
from rllib_calql.common.returns import RewardSettings
from rllib_calql.store.returns_connector import AddReturnsToGo


def step_of(t: int, offset: float) -> dict[str, Any]:
    """What step t adds to an episode; `offset` tells episodes apart."""
    return {
        "observation": np.array([offset + t + 1, -t], np.float32),
        "action": np.array([0.01 * t + offset], np.float32),
        "reward": offset + 0.5 * t,
        "extra_model_outputs": {Columns.ACTION_LOGP: np.float32(-t)},
    }


def pieces_of(
    lengths: list[int], *, offset: float = 0.0, lookback: int = 0, terminated: bool = True, id_: str | None = None
) -> list[SingleAgentEpisode]:
    """One episode in NumPy pieces of the given lengths, cut as RLlib's runners cut them."""
    episode = SingleAgentEpisode(id_)
    episode.add_env_reset(np.array([offset, 1.0], np.float32))
    pieces, t = [], 0
    for number, length in enumerate(lengths):
        if number:
            episode = episode.cut(len_lookback_buffer=lookback)
        for _ in range(length):
            is_last = t == sum(lengths) - 1
            episode.add_env_step(
                **step_of(t, offset), terminated=is_last and terminated, truncated=is_last and not terminated
            )
            t += 1
        pieces.append(episode)
    return [piece.to_numpy() for piece in pieces]


def assert_same_episode(joined: SingleAgentEpisode, whole: SingleAgentEpisode) -> None:
    assert joined.id_ == whole.id_
    assert len(joined) == len(whole)
    assert (joined.t_started, joined.t) == (0, len(whole))
    assert (joined.is_terminated, joined.is_truncated) == (whole.is_terminated, whole.is_truncated)
    np.testing.assert_array_equal(joined.get_observations(), whole.get_observations())
    np.testing.assert_array_equal(joined.get_actions(), whole.get_actions())
    np.testing.assert_array_equal(joined.get_rewards(), whole.get_rewards())
    joined.validate()


@pytest.mark.parametrize("terminated", [True, False])
@pytest.mark.parametrize("lookback", [0, 1, 10])
@pytest.mark.parametrize("lengths", [[5], [2, 3], [1, 1, 3], [3, 1, 1]])
def test_joined_pieces_are_the_whole_episode(lengths: list[int], lookback: int, terminated: bool) -> None:
    pieces = pieces_of(lengths, lookback=lookback, terminated=terminated, id_="e")
    (whole,) = pieces_of([5], terminated=terminated, id_="e")
    joiner = EpisodeJoiner()
    for piece in pieces[:-1]:
        assert joiner.add([piece]) == []
    (joined,) = joiner.add([pieces[-1]])
    assert_same_episode(joined, whole)


def test_pieces_of_one_call_are_joined_too() -> None:
    (joined,) = EpisodeJoiner().add(pieces_of([2, 2, 1], lookback=1, id_="e"))
    assert_same_episode(joined, pieces_of([5], id_="e")[0])


def test_interleaved_episodes_come_out_in_the_order_they_end() -> None:
    first, second, third = (
        pieces_of(lengths, offset=100.0 * number, lookback=1, id_=f"e{number}")
        for number, lengths in enumerate([[1, 2, 3], [2, 1], [4]])
    )
    joiner = EpisodeJoiner()
    assert joiner.add([first[0], second[0]]) == []
    finished = joiner.add([first[1], third[0], second[1]])
    finished += joiner.add([first[2]])
    assert [episode.id_ for episode in finished] == ["e2", "e1", "e0"]
    for episode, (length, offset) in zip(finished, [(4, 200.0), (3, 100.0), (6, 0.0)], strict=True):
        assert_same_episode(episode, pieces_of([length], offset=offset, id_=episode.id_)[0])


def test_a_joined_episode_has_the_returns_of_the_whole_one() -> None:
    joined = join_pieces(pieces_of([2, 2, 1], lookback=1))
    (whole,) = pieces_of([5])
    AddReturnsToGo(RewardSettings(0.9))(batch={}, episodes=[joined, whole])
    np.testing.assert_array_equal(
        joined.get_extra_model_outputs(Columns.RETURNS_TO_GO), whole.get_extra_model_outputs(Columns.RETURNS_TO_GO)
    )


def test_a_joined_episode_keeps_the_infos_of_its_steps() -> None:
    pieces = [SingleAgentEpisode()]
    pieces[0].add_env_reset(0.0, infos={"step": 0})
    for step in range(1, 6):
        if step in (3, 5):
            pieces.append(pieces[-1].cut(len_lookback_buffer=1))
        pieces[-1].add_env_step(0.0, 0.0, 0.0, infos={"step": step}, truncated=step == 5)
    joined = join_pieces([piece.to_numpy() for piece in pieces])
    assert [info["step"] for info in joined.get_infos()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_lost", [1, 2])
def test_an_episode_whose_beginning_was_lost_is_dropped(num_lost: int) -> None:
    joiner = EpisodeJoiner()
    assert joiner.add(pieces_of([2, 1, 2], id_="e")[num_lost:]) == []
    (other,) = joiner.add(pieces_of([2, 1], id_="e"))  # Nothing of the dropped one is left under its id.
    assert len(other) == 3


def test_clearing_forgets_unfinished_episodes() -> None:
    joiner = EpisodeJoiner()
    pieces = pieces_of([2, 3], id_="e")
    joiner.add(pieces[:1])
    joiner.clear()
    assert joiner.add(pieces[1:]) == []


def test_a_lost_runner_takes_its_unfinished_episodes_with_it() -> None:
    joiner = EpisodeJoiner()
    mine, other = pieces_of([2, 3], id_="mine"), pieces_of([1, 2], id_="other")
    joiner.add(mine[:1], runner=1)
    joiner.add(other[:1], runner=2)
    assert joiner.num_env_steps == 3
    assert joiner.forget(1) == 1
    assert joiner.num_env_steps == 1
    assert joiner.add(mine[1:], runner=1) == []
    (joined,) = joiner.add(other[1:], runner=2)
    assert joined.id_ == "other"
    assert joiner.num_env_steps == 0


def test_pieces_with_different_extra_columns_are_joined() -> None:
    first, last = pieces_of([2, 3], id_="e")
    del first.extra_model_outputs[Columns.ACTION_LOGP]  # A random action has no density.
    assert_same_episode(join_pieces([first, last]), pieces_of([5], id_="e")[0])


def test_dict_observations_are_joined_part_by_part() -> None:
    space = Dict({"a": Box(-9.0, 9.0, (2,)), "b": Box(-9.0, 9.0, (1,))})
    space.seed(0)
    observations = [space.sample() for _ in range(6)]
    episode = SingleAgentEpisode("e")
    episode.add_env_reset(observations[0])
    pieces = [episode]
    for t in range(5):
        if t == 2:
            pieces.append(pieces[-1].cut(len_lookback_buffer=1))
        pieces[-1].add_env_step(observations[t + 1], np.zeros(1, np.float32), 1.0, terminated=t == 4)
    joined = join_pieces([piece.to_numpy() for piece in pieces]).get_observations()
    for part in ("a", "b"):
        np.testing.assert_array_equal(joined[part], np.stack([observation[part] for observation in observations]))


# Inside a runner


class Runner:
    """Stands for RLlib's runner: records how it was asked, draws from torch's global generator."""

    def __init__(self, worker_index: int | None) -> None:
        self.worker_index, self.num_envs = worker_index, 1
        self.module = SimpleNamespace(explores_randomly=None)
        self.asked: dict[str, Any] = {}
        self.drawn = torch.empty(0)

    def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
        """Keeps the arguments; no episode."""
        self.asked = kwargs
        self.drawn = torch.rand(3)
        self.was_random = self.module.explores_randomly
        return []

    def _try_env_step(self, actions: Any) -> None:
        """Not called: `sample` makes no steps."""

    def get_metrics(self) -> dict[str, Any]:
        """Tells whose metrics they are."""
        return {"worker": self.worker_index}


def collected(worker_index: int | None = 0, runner: Runner | None = None, **changes: Any) -> Runner:
    runner = runner or Runner(worker_index)
    arguments: dict[str, Any] = {"seed": 5, "num_env_steps": None, "random_actions": False}
    result = collect(runner, **(arguments | changes))
    assert (result.pieces, result.metrics, result.num_env_steps) == ([], {"worker": worker_index}, 0)
    return runner


def test_one_environment_gives_one_episode_begun_by_a_seeded_reset() -> None:
    runner = collected()
    assert runner.asked == {"num_episodes": 1, "explore": True}
    assert runner._needs_initial_reset is True  # type: ignore[attr-defined]
    assert runner._seed == collected()._seed != collected(seed=6)._seed  # type: ignore[attr-defined]


def test_by_steps_environments_are_reset_once_with_a_seed_and_never_again() -> None:
    runner = Runner(0)
    runner._needs_initial_reset = True  # type: ignore[attr-defined]
    collected(runner=runner, num_env_steps=64)
    assert runner.asked == {"num_timesteps": 64, "explore": True}
    first_seed = runner._seed  # type: ignore[attr-defined]
    runner._needs_initial_reset = False  # type: ignore[attr-defined] # As RLlib does after the reset.
    collected(runner=runner, num_env_steps=64, seed=6)
    assert runner._needs_initial_reset is False  # type: ignore[attr-defined]
    assert runner._seed == first_seed  # type: ignore[attr-defined]


def test_after_a_restore_environments_begin_anew_once() -> None:
    runner = Runner(0)
    for generation, is_reset in [(0, False), (1, True), (1, False)]:
        runner._needs_initial_reset = False  # type: ignore[attr-defined]
        collected(runner=runner, num_env_steps=64, generation=generation)
        assert runner._needs_initial_reset is is_reset


def test_what_goes_wrong_in_a_remote_runner_is_told_with_its_cause() -> None:
    class Broken(Runner):
        def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
            try:
                raise ValueError("the gripper is stuck")
            except ValueError as error:
                raise RuntimeError from error  # As RLlib does around a step of the environment.

    runner = Broken(1)
    answer = collect_or_tell(runner, seed=5, num_env_steps=None, random_actions=True)
    assert answer == Failure("ValueError: the gripper is stuck")
    assert runner.module.explores_randomly is False


def test_the_same_seed_gives_the_same_noise_and_runners_differ() -> None:
    assert torch.equal(collected().drawn, collected().drawn)
    assert torch.equal(collected().drawn, collected(None).drawn)
    noises = [collected(index).drawn for index in (0, 1, 2)] + [collected(seed=6).drawn]
    assert len({tuple(noise.tolist()) for noise in noises}) == 4


def test_collecting_leaves_torchs_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    collected()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("random_actions", [True, False])
def test_random_actions_are_asked_of_the_module(random_actions: bool) -> None:
    runner = collected(random_actions=random_actions)
    assert runner.was_random is random_actions
    assert runner.module.explores_randomly is False  # An evaluation on the same runner must not act randomly.
