"""Remote learners: one equals the local one, several stay identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import line_config

from rllib_calql import CalQL, CalQLConfig

pytestmark = pytest.mark.usefixtures("ray_session")


def _parameters(learner: Any, *_: Any) -> dict[str, np.ndarray]:
    state = dict(learner.module.get_state()["default_policy"])
    state["log_alpha"] = learner.curr_log_alpha["default_policy"].detach().numpy().copy()
    state["log_alpha_prime"] = learner.log_alpha_prime.detach().numpy().copy()
    return state


def _trained(config: CalQLConfig, num_iterations: int = 2) -> tuple[list[dict[str, np.ndarray]], CalQL]:
    algo = config.build()
    for _ in range(num_iterations):
        algo.train()
    parameters = algo._foreach_learner(_parameters)
    algo.stop()
    return parameters, algo


def test_one_remote_learner_trains_as_the_local_one(tmp_path: Path) -> None:
    ((local,), _) = _trained(line_config(tmp_path, offline_updates=20))
    ((remote,), _) = _trained(line_config(tmp_path, offline_updates=20).learners(num_learners=1))
    for name, value in local.items():
        np.testing.assert_allclose(remote[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_two_learners_stay_bit_identical_though_their_data_differ(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=20).training(lagrangian=True).learners(num_learners=2)
    (first, second), algo = _trained(config, num_iterations=3)
    assert algo.num_online_updates > 0
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name
    ((alone,), _) = _trained(line_config(tmp_path, offline_updates=20).training(lagrangian=True), num_iterations=3)
    assert not np.array_equal(alone["policy.head.weight"], first["policy.head.weight"])
