"""Misspelt settings are refused in Python as they are in YAML."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from ray.rllib.algorithms.cql.cql import CQLConfig

from rllib_calql import CalQL, CalQLConfig

MISSPELT: list[tuple[str, dict[str, Any], str]] = [
    (
        "training",
        {"min_q_wieght": 5},
        r"`\.training\(\.\.\.\)` has no setting `min_q_wieght`\. Did you mean `min_q_weight`",
    ),
    ("training", {"gama": 0.9}, r"Did you mean `gamma`"),
    ("training", {"mixing_ratio": 0.5}, r"`mixing_ratio` is a setting of `\.fine_tuning\(.*not of `\.training\("),
    ("fine_tuning", {"gamma": 0.9}, r"write `\.training\(gamma=\.\.\.\)`"),
    ("fine_tuning", {"offline_update": 1}, r"Did you mean `offline_updates`"),
    (
        "fine_tuning",
        {"lagranian": True},
        r"no setting `lagranian`\. Did you mean `lagrangian` .*of `\.training\(\.\.\.\)`\?",
    ),
    ("offline_data", {"input": "logs"}, r"Did you mean `input_`"),
    ("offline_data", {"reward_scal": 2}, r"Did you mean `reward_scale`"),
    ("evaluation", {"evaluation_intervall": 1}, r"Did you mean `evaluation_interval`"),
    ("environment", {"env_cfg": {}}, r"has no setting `env_cfg`\. Did you mean `env_config`"),
    ("env_runners", {"num_env_runner": 2}, r"Did you mean `num_env_runners`"),
    ("env_runners", {"num_learners": 2}, r"is a setting of `\.learners\("),
    ("learners", {"num_gpu_per_learner": 1}, r"Did you mean `num_gpus_per_learner`"),
    ("rl_module", {"model_confg": {}}, r"Did you mean `model_config`"),
    ("debugging", {"sed": 1}, r"Did you mean `seed`"),
    ("training", {"actor_hiddens": [16]}, r"of the networks; write `\.rl_module\(model_config=\{'actor_hiddens': "),
    ("rl_module", {"layer_norm": True}, r"of the networks; write `\.rl_module\(model_config=\{'layer_norm': "),
    ("reporting", {"zzzz": 1}, r"has no setting `zzzz`\. See `help\(reporting\)`"),
]


@pytest.mark.parametrize(("method", "keywords", "message"), MISSPELT)
def test_a_misspelt_keyword_names_the_setting_that_was_meant(
    method: str, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(CalQLConfig(), method)(**keywords)


def test_signatures_documentation_and_parents_stay() -> None:
    for method in ("training", "fine_tuning", "environment", "learners"):
        assert "NotProvided" not in str(inspect.signature(getattr(CalQLConfig, method))).split("->")[0][:200]
        assert "Args:" in (getattr(CalQLConfig, method).__doc__ or "")
    assert "min_q_weight" in inspect.signature(CalQLConfig.training).parameters
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'num_env_runner'"):
        CQLConfig().env_runners(num_env_runner=1)
    config = pickle.loads(pickle.dumps(CalQLConfig().training(min_q_weight=3.0, gamma=0.5)))
    assert (config.min_q_weight, config.gamma) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_q_wieght": 1}, r"CalQLConfig has no setting `min_q_wieght`\. Did you mean `min_q_weight`"),
        ({"num_env_runer": 1}, r"has no setting `num_env_runer`\. Did you mean `num_env_runners`"),
        ({"training": {"gamma": 1}}, r"`training` is a method of CalQLConfig and no setting"),
        ({"evaluation_config": {"explor": False}}, r"has no setting `explor`\. Did you mean `explore`"),
    ],
)
def test_a_misspelt_key_of_a_dictionary_is_refused_also_by_ray_tune(settings: dict[str, Any], message: str) -> None:
    # Ray Tune asks every trial for its resources, and so checks the dictionary, before the trial begins.
    with pytest.raises(TypeError, match=message):
        CalQL.default_resource_request({"env": "Pendulum-v1"} | settings)


def test_every_key_that_rllib_hands_over_is_taken() -> None:
    config = CalQLConfig().environment("Pendulum-v1").training(min_q_weight=3.0)
    handed = config.to_dict() | {"__trial_info__": {}, "framework": "torch", "model_config": {"actor_hiddens": [8]}}
    updated = CalQLConfig().update_from_dict(handed)
    assert (updated.env, updated.min_q_weight, updated.model_config["actor_hiddens"]) == ("Pendulum-v1", 3.0, [8])
    assert updated.model_config["critic_hiddens"] == [256, 256]
