"""Every attribute of a config is ours, effective with a proof, or refused; and the proofs of RLlib's own settings."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import time
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import ray.rllib
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics.stats.mean import MeanStats
from small_learners import make_learner
from tiny import TINY_NETWORKS, LineEnv

import rllib_calql.settings.calql_settings
import rllib_calql.settings.data_settings
import rllib_calql.settings.external_clients
from rllib_calql import CalQL, CalQLConfig
from rllib_calql.learning.learner import CalQLTorchLearner
from rllib_calql.settings.calql_settings import CalQLSettings
from rllib_calql.settings.inherited import EFFECTIVE_SETTINGS, PRIVATE_SETTINGS
from rllib_calql.settings.input_settings import filesystem_of
from rllib_calql.settings.refused import UNUSED_SETTINGS, deprecated_settings
from rllib_calql.store.offline_data import as_multi_agent_batch
from rllib_calql.store.replay import IS_OFFLINE

RLLIB = Path(ray.rllib.__file__).parent
TESTS = Path(__file__).parents[1]


# --- Every attribute is in one list -----------------------------------------------------------------------------------


def own_settings() -> set[str]:
    """What `CalQLSettings` and what it is derived from set themselves."""
    names: set[str] = set()
    wing = rllib_calql.settings
    for module in (wing.calql_settings, wing.data_settings, wing.external_clients):
        (kind,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef))
        (init,) = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        attributes = (node for node in ast.walk(init) if isinstance(node, ast.Attribute))
        names |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return {{"train_batch_size_per_learner": "_train_batch_size_per_learner"}.get(name, name) for name in names}


@cache
def lists() -> dict[str, frozenset[str]]:
    return {
        "ours": frozenset(own_settings()),
        "effective": frozenset(EFFECTIVE_SETTINGS),
        "refused": frozenset(UNUSED_SETTINGS),
        "given up by RLlib": deprecated_settings(CalQLConfig()),
        "private": frozenset(PRIVATE_SETTINGS),
    }


def test_every_attribute_of_a_config_is_in_exactly_one_list() -> None:
    attributes = set(vars(CalQLConfig()))
    assert len(attributes) > 300
    named = {name: [where for where, names in lists().items() if name in names] for name in attributes}
    assert {name: where for name, where in named.items() if len(where) != 1} == {}
    assert set().union(*lists().values()) == attributes, "a list names a setting that there is not"
    assert len(PRIVATE_SETTINGS) < 10


def test_every_setting_of_ours_is_an_argument_of_a_method() -> None:
    names = ("training", "offline_data", "fine_tuning", "external_clients", "evaluation", "rl_module")
    methods = [getattr(CalQLConfig, name) for name in names]
    keywords = {
        name for method in (*methods, AlgorithmConfig.training) for name in inspect.signature(method).parameters
    }
    assert {name.lstrip("_") for name in own_settings()} <= keywords
    assert set(vars(CalQLSettings(CalQL))) == set(vars(CalQLConfig())), "settings stand in `CalQLSettings`"


@cache
def names_of_tests() -> frozenset[str]:
    files = [file.read_text() for file in TESTS.rglob("test_*.py")]
    return frozenset(name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(EFFECTIVE_SETTINGS))
def test_what_shows_that_a_setting_works_is_there(name: str) -> None:
    proof = EFFECTIVE_SETTINGS[name]
    if proof.startswith("test_"):
        assert proof in names_of_tests()
        return
    text = (RLLIB / proof).read_text()
    assert re.search(rf"config\.{name}\b", text), f"RLlib's `{proof}` does not read `{name}` any more"


# --- What Ray is asked for --------------------------------------------------------------------------------------------


def test_ray_is_asked_for_these_resources() -> None:
    config = CalQLConfig().environment("Pendulum-v1")
    config.resources(num_cpus_for_main_process=3, placement_strategy="SPREAD")
    config.custom_resources_for_main_process = {"disk": 1}
    config.env_runners(
        num_env_runners=2,
        num_cpus_per_env_runner=0.5,
        num_gpus_per_env_runner=0.25,
        custom_resources_per_env_runner={"arm": 1},
    )
    config.learners(
        num_learners=1, num_cpus_per_learner=5, num_gpus_per_learner=2, custom_resources_per_learner={"fast": 1}
    )
    config.evaluation(evaluation_interval=1, evaluation_num_env_runners=1)
    request = CalQL.default_resource_request(config)
    bundles = sorted(({k: v for k, v in bundle.items() if v} for bundle in request.bundles), key=str)
    runner = {"CPU": 0.5, "GPU": 0.25, "arm": 1}
    expected = [{"CPU": 3, "disk": 1}, runner, runner, runner, {"CPU": 5, "GPU": 2, "fast": 1}]
    assert bundles == sorted(expected, key=str)
    assert request.strategy == "SPREAD"


# --- Learners ---------------------------------------------------------------------------------------------------------


def updated(learner: CalQLTorchLearner) -> dict[str, Any]:
    """Metrics of one update with eight rows."""
    rng = np.random.default_rng(0)
    shapes = {Columns.OBS: (8, 3), Columns.NEXT_OBS: (8, 3), Columns.REWARDS: 8, Columns.RETURNS_TO_GO: 8}
    rows = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    rows[Columns.ACTIONS] = rng.uniform(-0.9, 0.9, (8, 2)).astype(np.float32)
    rows |= {Columns.TERMINATEDS: np.zeros(8, np.float32), IS_OFFLINE: np.ones(8, np.float32)}
    return learner.update(batch=as_multi_agent_batch(rows), minibatch_size=8)[DEFAULT_MODULE_ID]


def clipped(learner: CalQLTorchLearner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[Any]]]:
    """Gradients of one update, optimiser by optimiser, before and after clipping."""
    seen: dict[str, Any] = {}
    postprocess, apply = learner.postprocess_gradients, learner.apply_gradients

    def before(gradients: Any) -> Any:
        seen["before"] = {key: gradient.clone() for key, gradient in gradients.items()}
        return postprocess(gradients)

    monkeypatch.setattr(learner, "postprocess_gradients", before)
    monkeypatch.setattr(learner, "apply_gradients", lambda gradients: seen.update(after=gradients) or apply(gradients))
    updated(learner)
    groups = []
    for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID):
        keys = [learner.get_param_ref(param) for group in optimizer.param_groups for param in group["params"]]
        groups.append(([seen["before"][key].double() for key in keys], [seen["after"][key].double() for key in keys]))
    return groups


@pytest.mark.parametrize("by", ["value", "norm", "global_norm"])
def test_gradients_are_clipped_as_set(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 0.05
    groups = clipped(make_learner(grad_clip=limit, grad_clip_by=by), monkeypatch)
    assert len(groups) == 3  # Critic, policy, temperature.
    assert any(gradient.abs().max() > limit for before, _ in groups for gradient in before)
    for before, after in groups:
        total = torch.sqrt(sum((gradient**2).sum() for gradient in before))  # type: ignore[arg-type]
        for gradient, actual in zip(before, after, strict=True):
            expected = {
                "value": gradient.clamp(-limit, limit),
                "norm": gradient * min(1.0, limit / (float(gradient.norm()) + 1e-12)),
                "global_norm": gradient * min(1.0, limit / float(total)),
            }[by]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_a_clip_of_nothing_is_refused() -> None:
    # RLlib would take 0 for "on" in one place and "off" in the next, and hand on no gradients at all.
    for value in (0, 0.0, -1.0, float("nan"), "big"):
        config = CalQLConfig().training(grad_clip=value)
        with pytest.raises(ValueError, match=r"`grad_clip` must be None or a positive number, got"):
            config.validate()
    config.update_from_dict({"grad_clip": 1.0, "grad_clip_by": "nrom"})
    with pytest.raises(ValueError, match=r"`grad_clip_by` must be one of .*'global_norm'.*, got 'nrom'"):
        config.validate()


def test_norms_of_gradients_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    results = updated(make_learner(log_gradients=True))
    ((before, _), *_) = clipped(make_learner(), monkeypatch)
    norm = float(torch.sqrt(sum((gradient**2).sum() for gradient in before)))  # type: ignore[arg-type]
    logged = {name: value for name, value in results.items() if name.startswith("gradients_")}
    assert len(logged) == 3
    (critic,) = (value for name, value in logged.items() if "critic" in name)
    assert float(critic.peek() if hasattr(critic, "peek") else critic) == pytest.approx(norm, rel=1e-4)


def test_the_entropy_settings_reach_the_learner() -> None:
    learner = make_learner(initial_alpha=0.2, target_entropy=-7.5)
    assert float(learner.curr_log_alpha[DEFAULT_MODULE_ID].detach().exp()) == pytest.approx(0.2)
    assert float(learner.target_entropy[DEFAULT_MODULE_ID]) == -7.5


def test_a_file_system_is_made_with_its_arguments() -> None:
    assert filesystem_of("s3", {"region": "eu-north-1"}).region == "eu-north-1"


# --- Environments and env runners -------------------------------------------------------------------------------------


class ShiftedLine(LineEnv):
    """Begins at `start`, and fails once at the step `fails_at` over all environments."""

    failures: ClassVar[list[int]] = []

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.start = float((config or {}).get("start", 0.0))
        self.fails_at = (config or {}).get("fails_at")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins there."""
        super().reset(seed=seed)
        self.x = np.array([self.start], np.float32)
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves, or fails."""
        if self.t + 1 == self.fails_at and not self.failures:
            self.failures.append(self.t)
            raise ValueError("the gripper is stuck")
        return super().step(action)


def small_config(env: Any = ShiftedLine) -> CalQLConfig:
    config = CalQLConfig().environment(env).rl_module(model_config=TINY_NETWORKS).debugging(seed=0)
    config.training(num_actions=2, train_batch_size_per_learner=4)
    return config.fine_tuning(warmup_env_steps=5, updates_per_env_step=0.1)


def runner_of(config: CalQLConfig) -> SingleAgentEnvRunner:
    config.validate()
    return SingleAgentEnvRunner(config=config)


@pytest.mark.parametrize(("mode", "kind"), [("sync", gym.vector.SyncVectorEnv), ("async", gym.vector.AsyncVectorEnv)])
def test_environments_are_made_as_set(mode: str, kind: type) -> None:
    config = small_config().environment(env_config={"start": 2.5})
    runner = runner_of(config.env_runners(num_envs_per_env_runner=3, gym_env_vectorize_mode=mode))
    assert isinstance(runner.env.unwrapped, kind)
    pieces = runner.sample(num_timesteps=3, explore=False)
    assert [float(piece.get_observations(0)[0]) for piece in pieces] == [2.5, 2.5, 2.5]
    runner.stop()


@pytest.mark.parametrize("horizon", [1, 4])
def test_pieces_of_episodes_look_back_as_far_as_set(horizon: int) -> None:
    runner = runner_of(small_config().env_runners(episode_lookback_horizon=horizon))
    runner.sample(num_timesteps=6, explore=False)
    (piece,) = runner.sample(num_timesteps=2, explore=False)
    assert piece.observations.lookback == horizon
    runner.stop()


def test_default_connectors_can_be_left_out() -> None:
    runner = runner_of(small_config())
    for name in ("env_to_module", "module_to_env"):
        lengths = []
        for with_defaults in (True, False):
            config = small_config().env_runners(**{f"{name}_connector": lambda *_: []})
            config.env_runners(**{f"add_default_connectors_to_{name}_pipeline": with_defaults})
            config.validate()
            lengths.append(len(getattr(config, f"build_{name}_connector")(env=runner.env, spaces=runner.get_spaces())))
        assert lengths[0] > lengths[1] == 0
    runner.stop()


def test_an_environment_that_fails_is_made_anew_if_set() -> None:
    ShiftedLine.failures.clear()
    config = small_config().environment(env_config={"fails_at": 3})
    runner = runner_of(config.fault_tolerance(restart_failed_sub_environments=True))
    (episode,) = runner.sample(num_episodes=1, explore=False)
    runner.stop()
    assert ShiftedLine.failures == [2]
    assert episode.is_done
    ShiftedLine.failures.clear()
    runner = runner_of(small_config().environment(env_config={"fails_at": 3}))
    with pytest.raises(RuntimeError):
        runner.sample(num_episodes=1, explore=False)
    runner.stop()


def test_returns_are_means_over_as_many_episodes_as_set() -> None:
    runner = runner_of(small_config(LineEnv).reporting(metrics_num_episodes_for_smoothing=2))
    runner.module.explores_randomly = True
    returns = [sum(episode.get_rewards()) for episode in runner.sample(num_episodes=5, explore=True)]
    metrics = runner.get_metrics()
    runner.stop()
    assert len(set(returns)) > 2
    assert float(metrics["episode_return_mean"].peek()) == pytest.approx(np.mean(returns[-2:]))


# --- A whole algorithm ------------------------------------------------------------------------------------------------

EVENTS = (
    *("algorithm_init", "train_result", "environment_created", "episode_created", "episode_start", "episode_step"),
    *("episode_end", "sample_end", "evaluate_start", "evaluate_end"),
)


@pytest.mark.usefixtures("ray_session")
def test_every_callback_is_called() -> None:
    called = set()
    config = small_config().evaluation(evaluation_interval=1, evaluation_duration=1)
    config.callbacks(**{f"on_{event}": lambda event=event, **_: called.add(event) for event in EVENTS})
    algo = config.build()
    algo.train()
    algo.stop()
    assert called == set(EVENTS)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("duration", "unit"), [(3, "episodes"), (50, "timesteps")])
def test_evaluations_are_made_as_set(duration: int, unit: str) -> None:
    config = small_config().environment(env_config={"start": 5.9})
    algo = config.evaluation(
        evaluation_interval=2,
        evaluation_duration=duration,
        evaluation_duration_unit=unit,
        evaluation_config={"env_config": {"start": 0.0}},
    ).build()
    first, second = algo.train(), algo.train()
    assert "evaluation" not in first
    evaluated = second["evaluation"]["env_runners"]
    assert evaluated["num_episodes" if unit == "episodes" else "num_env_steps_sampled"] == duration
    assert algo.eval_env_runner_group is not None
    # RLlib merges `env_config` into the algorithm's; episodes that begin 0.1 before the end are shorter.
    assert {env.unwrapped.start for env in algo.eval_env_runner.env.unwrapped.envs} == {0.0}
    algo.config.validate()  # What RLlib changed while it built is no setting of the user.
    algo.evaluation_config.validate()
    algo.stop()


@pytest.mark.usefixtures("ray_session")
def test_an_evaluation_function_of_the_user_takes_the_place_of_ours() -> None:
    calls = []
    config = small_config().evaluation(
        evaluation_interval=1, custom_evaluation_function=lambda algo, group: calls.append(group) or ({}, 1, 1)
    )
    algo = config.build()
    result = algo.train()
    assert calls == [algo.eval_env_runner_group]
    assert "episode_return_mean" not in result["evaluation"].get("env_runners", {})
    algo.stop()


class OfTheUser(SingleAgentEnvRunner):
    """An env runner of a user."""


class Configured(CalQLTorchLearner):
    """A learner of a user, that reads a setting of its own."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Notes it."""
        self.noted = self.config.learner_config_dict["noted"]
        super().configure_optimizers_for_module(module_id, config)


@pytest.mark.usefixtures("ray_session")
def test_classes_of_the_user_do_the_work() -> None:
    config = small_config().env_runners(env_runner_cls=OfTheUser)
    algo = config.learners(learner_class=Configured, learner_config_dict={"noted": 7}).build()
    assert type(algo.env_runner) is OfTheUser
    assert algo.learner_group._learner.noted == 7
    algo.stop()


@pytest.mark.parametrize(
    ("keyword", "method", "own"),
    [
        ("learner_class", "learners", "CalQLTorchLearner"),
        ("env_runner_cls", "env_runners", "SingleAgentEnvRunner"),
        ("offline_data_class", "offline_data", "CalQLOfflineData"),
    ],
)
def test_classes_that_do_other_work_are_refused(keyword: str, method: str, own: str) -> None:
    config = CalQLConfig()
    getattr(config, method)(**{keyword: LineEnv})
    with pytest.raises(ValueError, match=rf"`{keyword}` must be a subclass of `{own}`, got .*LineEnv.*; drop it"):
        config.validate()


@pytest.mark.usefixtures("ray_session")
def test_an_iteration_lasts_as_long_as_set() -> None:
    algo = small_config().reporting(min_time_s_per_iteration=0.8).build()
    algo.train()  # The first step is slower than all others.
    begin, num_episodes = time.monotonic(), algo.num_online_episodes
    algo.train()
    assert time.monotonic() - begin >= 0.8
    assert algo.num_online_episodes - num_episodes > 1  # One without it.
    algo.stop()


class Counting(MeanStats):
    """A statistic of a user."""


@pytest.mark.usefixtures("ray_session")
def test_statistics_of_the_user_compute_metrics() -> None:
    lookup = CalQLConfig().stats_cls_lookup | {"mean": Counting}
    algo = small_config().reporting(custom_stats_cls_lookup=lookup).build()
    algo.env_runner.metrics.log_value("noted", 1.0, reduce="mean")
    assert type(algo.env_runner.metrics.stats["noted"]) is Counting
    algo.stop()


@pytest.mark.usefixtures("ray_session")
def test_the_log_level_of_rllib_is_set() -> None:
    logger = logging.getLogger("ray.rllib")
    before = logger.level
    try:
        small_config().debugging(log_level="ERROR").build().stop()
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)
