"""The policy judged by data while it is trained: by RLlib's verbs, without a trace in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny import LineEnv, assert_identical, line_config, run_state

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.stopping import why_absent


def fqe_config(tmp_path: Path, **settings: Any) -> CalQLConfig:
    given = {"offline_evaluation_interval": 2, "offline_evaluation_type": "fqe", "offline_evaluation_duration": 3}
    config: CalQLConfig = line_config(tmp_path, offline_updates=20, updates_per_iteration=2).evaluation(
        **given | settings
    )
    return config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"offline_evaluation_interval": 0}, "`offline_evaluation_interval` must be None or an integer of at least 1"),
        ({"offline_evaluation_type": None}, "`offline_evaluation_type` is not set; set it to"),
        ({"offline_evaluation_type": "eval_loss"}, "got 'eval_loss': losses on data .* are `\"held_out\"`"),
        ({"offline_evaluation_type": "is"}, "got 'is': importance sampling .* take `\"fqe\"`"),
        ({"offline_evaluation_type": "pdis"}, "got 'pdis': importance sampling"),
        ({"offline_evaluation_type": "dr"}, 'must be None, "fqe" or "held_out", got \'dr\''),
        ({"offline_evaluation_duration": 0}, "`offline_evaluation_duration` must be None or an integer of at least 1"),
        ({"offline_evaluation_interval": None}, "`offline_evaluation_type` is 'fqe', but .* is not set"),
        ({"offline_evaluation_type": "held_out"}, '`offline_evaluation_duration` is 3, .* "held_out", which fits'),
        (
            {"offline_evaluation_type": "held_out", "offline_evaluation_duration": None},
            r"no episode is held out; set `.offline_data\(validation_fraction=0.1\)`",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fqe_config(tmp_path, **settings).validate()


def test_without_data_there_is_nothing_to_judge_by() -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    config.evaluation(offline_evaluation_interval=1, offline_evaluation_type="fqe")
    with pytest.raises(ValueError, match="there are no offline data to judge by"):
        config.validate()


def test_a_metric_of_fqe_that_is_never_there_is_told(tmp_path: Path) -> None:
    assert why_absent("evaluation/fqe/value", fqe_config(tmp_path)) is None
    assert "offline_evaluation_type" in str(
        why_absent("evaluation/fqe/value", line_config(tmp_path, offline_updates=20))
    )


@pytest.mark.usefixtures("ray_session")
def test_the_policy_is_judged_by_data_as_often_as_set(tmp_path: Path) -> None:
    calls: list[str] = []
    config = fqe_config(tmp_path).callbacks(
        on_evaluate_offline_start=lambda **_: calls.append("start"),
        on_evaluate_offline_end=lambda evaluation_metrics, **_: calls.extend(evaluation_metrics),
    )
    algo = config.build()
    plain = line_config(tmp_path, offline_updates=20, updates_per_iteration=2).build()
    first, second, third = algo.train(), algo.train(), algo.train()
    assert "evaluation" not in first
    judged = second["evaluation"]["fqe"]
    assert judged["value_low"] <= judged["value"] <= judged["value_high"]
    assert -20.0 <= judged["behaviour_return"] <= 0.0  # -1 a step, at most 20 of them.
    assert 0.0 <= judged["share_off_data"] <= 1.0
    assert math.isfinite(judged["td_error"])
    assert "it was trained on the episodes that it is judged by" in judged["warnings"]
    assert third["evaluation"]["fqe"] == judged  # Schedulers need a metric in every result.
    assert calls == ["start", "fqe"]
    # Nothing of it is seen in training.
    for _ in range(3):
        plain.train()
    states = [one.learner_group.get_state()["learner"]["rl_module"]["default_policy"] for one in (algo, plain)]
    assert_identical(*states)
    assert run_state(algo)["store"]["rng"] == run_state(plain)["store"]["rng"]
    restored = CalQL.from_checkpoint(algo.save_to_path(tmp_path / "checkpoint"))
    assert restored.train()["evaluation"]["fqe"] != judged  # The fourth iteration judges anew.
    for one in (algo, plain, restored):
        one.stop()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["fqe", "held_out"])
def test_without_an_environment_data_judge_as_well(tmp_path: Path, kind: str) -> None:
    duration = 3 if kind == "fqe" else None
    config = fqe_config(
        tmp_path, offline_evaluation_interval=1, offline_evaluation_type=kind, offline_evaluation_duration=duration
    ).offline_data(validation_fraction=0.25)
    config.environment(env=None, observation_space=LineEnv().observation_space, action_space=LineEnv().action_space)
    algo = config.build()
    judged = algo.train()["evaluation"][kind]
    assert math.isfinite(judged["value" if kind == "fqe" else "td_loss"])
    # The hold-out is that of the training, so there is nothing to warn of.
    assert "trained on the episodes" not in judged.get("warnings", "")
    algo.stop()


@pytest.mark.usefixtures("ray_session")
def test_without_settings_an_offline_evaluation_says_what_to_set(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=20, updates_per_iteration=2).build()
    with pytest.raises(RuntimeError, match="Nothing says how to judge by data"):
        algo.evaluate_offline()
    algo.stop()


@pytest.mark.usefixtures("ray_session")
def test_data_that_cannot_be_judged_by_are_refused_before_training(tmp_path: Path) -> None:
    from tiny import write_line_data

    path = write_line_data(tmp_path / "few.parquet", num_episodes=2)
    config = fqe_config(tmp_path).offline_data(input_=str(path))
    with pytest.raises(ValueError, match="The data hold 2 episodes; judging by data needs at least 3"):
        config.build()
