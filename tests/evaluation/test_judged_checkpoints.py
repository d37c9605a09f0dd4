"""Which data checkpoints are judged by, which of them fit the first one's, and what is to be known beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import LineEnv, line_config, write_line_data

from rllib_calql.checkpoints.manifest import hold_out_of
from rllib_calql.common.spaces import description_of
from rllib_calql.evaluation.fqe.judging import HELD_OUT_OTHERS, TRAINED_ON, _misfit, _read_data, _remarks, settings_for
from rllib_calql.evaluation.fqe.policies import CheckpointPolicy
from rllib_calql.store.split import split_episodes

LENGTHS = np.full(20, 3)
SPACE = {"size": 2, "low": [-1.0, -1.0], "high": [1.0, 1.0], "space": "the first's"}


def checkpoint(*, fraction: float = 0.0, seed: int = 0, **changes: Any) -> Any:
    """Of 20 episodes of three steps; `changes` are of the manifest, or `gamma` and `input_` of the config."""
    split = split_episodes(LENGTHS, fraction=fraction, seed=seed)
    config = SimpleNamespace(gamma=changes.pop("gamma", 0.99), input_=changes.pop("input_", "logs.parquet"))
    manifest = {
        "offline_data": {"fingerprint": "same", "transitions": 60},
        "hold_out": None if split is None else hold_out_of(split),
        "spaces": {"action_space": SPACE},
    }
    return SimpleNamespace(config=config, manifest=manifest | changes)


def remarks(one: Any, *, fraction: float = 0.2, is_other_data: bool = False, fingerprint: str = "same") -> list[str]:
    split = split_episodes(LENGTHS, fraction=fraction, seed=0)
    data: Any = SimpleNamespace(split=split, table=_Table(LENGTHS), gamma=0.99)
    return _remarks(data, one, {"offline_data": {"fingerprint": fingerprint}}, is_other_data=is_other_data)


class _Table:
    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return int(self.lengths.sum())


@pytest.mark.parametrize(
    ("fraction", "seed", "expected"),
    [
        (0.2, 0, []),
        (0.5, 0, []),  # A larger fraction holds out the same episodes and some more.
        (0.1, 0, [HELD_OUT_OTHERS]),
        (0.2, 1, [HELD_OUT_OTHERS]),
        (0.0, 0, [TRAINED_ON]),
    ],
)
def test_a_policy_is_said_to_have_seen_the_episodes_only_if_it_has_seen_one(
    fraction: float, seed: int, expected: list[str]
) -> None:
    one = checkpoint(fraction=fraction, seed=seed)
    assert remarks(one) == expected
    # Whatever the data are called. Of others nothing is known.
    assert remarks(one, is_other_data=True) == expected
    assert remarks(one, is_other_data=True, fingerprint="other") == []


def test_another_discount_and_data_that_have_changed_are_told() -> None:
    changed = checkpoint(fraction=0.2, offline_data={"fingerprint": "same", "transitions": 1_234})
    assert remarks(changed) == ["it was trained on 1,234 transitions of `input_`, which now has 60"]
    assert remarks(checkpoint(fraction=0.2, gamma=0.9)) == ["it was trained with `gamma` 0.9, and is judged by 0.99"]


@pytest.mark.parametrize(
    ("change", "is_same"), [({}, True), ({"size": 3}, False), ({"low": [-1.0, -2.0]}, False), ({"high": [9, 9]}, False)]
)
def test_a_checkpoint_of_another_space_is_no_fit(change: dict[str, Any], is_same: bool) -> None:
    other = checkpoint(spaces={"action_space": SPACE | {"space": "another"} | change})
    problem = _misfit(checkpoint(), other, with_own_data=True)
    assert (problem is None) == is_same
    if problem is not None:
        assert (
            "made with the action space another, the data are those of the first checkpoint, which has the first's"
            in (problem)
        )


def test_a_checkpoint_of_another_structure_of_the_same_size_is_no_fit() -> None:
    import gymnasium as gym

    flat, nested = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Dict({"a": gym.spaces.Box(-1.0, 1.0, (2,))})
    one, other = (
        checkpoint(spaces={"observation_space": {"size": 2, "structure": description_of(space), "space": str(space)}})
        for space in (flat, nested)
    )
    assert _misfit(one, one, with_own_data=True) is None
    assert "made with the observation space Dict" in str(_misfit(one, other, with_own_data=True))


def test_a_checkpoint_of_other_data_fits_only_where_data_are_given() -> None:
    other = checkpoint(input_=["logs.parquet", "more.parquet"])
    assert "it was trained on other data" in str(_misfit(checkpoint(), other, with_own_data=True))
    assert _misfit(checkpoint(), other, with_own_data=False) is None
    assert _misfit(checkpoint(), checkpoint(input_=["logs.parquet"]), with_own_data=True) is None


def line_checkpoint(tmp_path: Path, **settings: Any) -> CheckpointPolicy:
    """Of `LineEnv`, with the manifest of a run on other data."""
    config = line_config(tmp_path, offline_updates=1).update_from_dict(settings)
    env = LineEnv()
    manifest = {"offline_data": {"fingerprint": "of other data", "transitions": 5}, "hold_out": None}
    return CheckpointPolicy(config, manifest, None, env.observation_space, env.action_space)  # type: ignore[arg-type]


def test_other_data_need_no_column_of_the_reference_value_and_no_long_episodes(tmp_path: Path) -> None:
    first = line_checkpoint(tmp_path, reference_value="expert", n_step=500, validation_fraction=0.5, reward_scale=3.0)
    data, _ = _read_data([first], first.config.input_)
    assert data.has_own_split
    assert set(data.rows(data.training_rows).rewards) == {-1.0, 0.0}


def test_critics_are_of_the_size_of_those_of_the_training(tmp_path: Path) -> None:
    assert settings_for(line_checkpoint(tmp_path).config, 7).hiddens == (8,)
    assert settings_for(line_checkpoint(tmp_path).config, 7).updates == 7
    assert settings_for(line_checkpoint(tmp_path).config).updates == 4_000


def test_the_hold_out_is_that_of_the_first_that_has_one_whatever_its_rewards_are(tmp_path: Path) -> None:
    other_rewards = {"reward_scale": 3.0, "gamma": 0.5, "truncation": "steady"}
    without, scaled = line_checkpoint(tmp_path), line_checkpoint(tmp_path, **other_rewards)
    own, own_of_scaled = (_read_data([one], None)[1] for one in (without, scaled))
    assert own["offline_data"] != own_of_scaled["offline_data"]
    assert own["behaviour"] == own_of_scaled["behaviour"]
    num_episodes = 12  # Of `line_config`.
    split = split_episodes(np.ones(num_episodes, int), fraction=0.5, seed=4)
    assert split is not None
    of_data = {**own_of_scaled["offline_data"], "transitions": len(_read_data([scaled], None)[0].table)}
    trained = {**own_of_scaled, "offline_data": of_data, "hold_out": hold_out_of(split)}
    scaled = dataclasses.replace(scaled, manifest=trained)
    for input_ in (None, str(tmp_path / "line.parquet")):  # Of the training, and named anew.
        data, own = _read_data([without, scaled], input_)
        np.testing.assert_array_equal(data.split.held_out_episodes, split.held_out_episodes)
        said = _remarks(data, scaled, own, is_other_data=input_ is not None)
        assert said == ["it was trained with `gamma` 0.5, and is judged by 0.99"]
    # Of other data nothing is known, not of those that are as long either.
    write_line_data(tmp_path / "other.parquet", num_episodes=num_episodes, seed=1)
    data, own = _read_data([without, scaled], str(tmp_path / "other.parquet"))
    assert data.has_own_split
    assert TRAINED_ON not in _remarks(data, scaled, own, is_other_data=True)


def test_data_that_are_named_anew_are_known_where_rewards_are_read_otherwise(tmp_path: Path) -> None:
    first, scaled = line_checkpoint(tmp_path), line_checkpoint(tmp_path, reward_scale=3.0)
    manifest = _read_data([scaled], None)[1] | {"hold_out": None}
    scaled = dataclasses.replace(scaled, manifest=manifest)
    data, own = _read_data([first, scaled], str(tmp_path / "line.parquet"))
    assert _remarks(data, scaled, own, is_other_data=True) == [TRAINED_ON]
