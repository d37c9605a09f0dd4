"""`stop`: what is refused because it would never end a run, and what ends one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_calql import CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.experiments.experiment import parse_experiment, read_experiments
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.stopping import metrics_of, why_absent

METRICS = Path(metrics_of.__code__.co_filename).parent / "common" / "METRICS.md"
BOUND = {"training_iteration": 3}
DATA = {"input_": "minari:rllib-calql/pendulum-swingup-v0", "offline_updates": 20}


def stop_of(stop: Any, run: str = "CalQL", config: dict[str, Any] | None = None, **more: Any) -> dict[str, float]:
    entry = {"run": run, "env": "Pendulum-v1", "config": config or {}, **more}
    return parse_experiment("e", entry | ({} if stop == "none" else {"stop": stop})).stop


EVALUATED = {"evaluation_interval": 1}
# Metric, settings, what the message names.
UNKNOWN = [
    ("num_online_steps", {}, "did you mean `num_online_env_steps_lifetime`?"),
    ("timesteps_total", {}, "did you mean `num_env_steps_sampled_lifetime`?"),
    ("num_env_steps_trained_lifetime", {}, "`learners/__all_modules__/num_env_steps_trained_lifetime`"),
    ("time_budget", {}, "did you mean `time_total_s`?"),
    ("time_total", {}, "did you mean `time_total_s`"),
    ("training_iterations", {}, "did you mean `training_iteration`?"),
    ("success_rate", EVALUATED, "did you mean `evaluation/env_runners/success_rate`"),
    ("episode_reward_mean", {}, "did you mean `env_runners/episode_return_mean`?"),
    ("evaluation/env_runners/episode_reward_mean", EVALUATED, "`evaluation/env_runners/episode_return_mean`"),
    ("evaluation/episode_return_mean", EVALUATED, "`evaluation/env_runners/episode_return_mean`"),
    ("env_runners/sucess_rate", {}, "`env_runners/success_rate`"),
    ("learners/default_policy/qf_los", {}, "`learners/default_policy/qf_loss`"),
    ("learners/qf_loss", {}, "`learners/default_policy/qf_loss`"),
    ("q_out_of_rnge", {}, "`q_out_of_range`"),
    ("custom_metrics/", {}, "Unknown metric"),
    ("entirely_mine", {}, "Metrics of your own may stand below `custom_metrics/`, or anywhere if `callbacks_class`"),
    (keys.PHASE, {}, "`phase` is no number"),
]


@pytest.mark.parametrize(("metric", "config", "message"), UNKNOWN)
def test_a_metric_that_no_result_has_is_refused_with_what_may_be_meant(
    metric: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExperimentError, match=f"`stop` of experiment 'e': .*{re.escape(message)}"):
        stop_of({metric: 1.0, **BOUND}, config=config)


def test_nested_mappings_are_checked_like_paths() -> None:
    with pytest.raises(ExperimentError, match="`evaluation/env_runners/success_rate`"):
        stop_of({"evaluation": {"env_runners": {"sucess_rate": 1.0}}} | BOUND, config=EVALUATED)
    nested = {"evaluation": {"env_runners": {"success_rate": 1.0}}} | BOUND
    assert stop_of(nested, config=EVALUATED) == {"evaluation/env_runners/success_rate": 1.0, "training_iteration": 3}
    with pytest.raises(ExperimentError, match="has `evaluation/env_runners/success_rate` twice; drop one"):
        stop_of({**nested, "evaluation/env_runners/success_rate": 0.5}, config=EVALUATED)


# Metric, settings, why it never appears.
ABSENT = [
    ("evaluation/env_runners/episode_return_mean", {}, "nothing is evaluated; set `evaluation_interval`"),
    ("fine_tuning/regret", {}, "nothing is evaluated; set `evaluation_interval`"),
    ("learners/default_policy/alpha_prime", {}, "set `lagrangian: true`"),
    ("learners/default_policy/q3_data", {"num_critics": {"grid_search": [3, 2]}}, "raise `num_critics`"),
    ("collection/num_env_runner_failures_lifetime", {}, "set `num_env_runners`"),
    ("collection/learner_busy_share", {"num_env_runners": 1, "sample_async": False}, "set `sample_async: true`"),
    ("num_offline_updates_lifetime", {}, "there are no offline data; set `input_`"),
    ("fine_tuning/regime_policy", {"evaluation_interval": 1}, "there are no offline data; set `input_`"),
    (
        "fine_tuning/regime_data",
        {"evaluation_interval": 1, "input_": "minari:rllib-calql/pendulum-swingup-v0", "offline_updates": 0},
        "nothing is learned before the switch; raise `offline_updates`",
    ),
]


# Of an experiment without an environment.
ABSENT_OFFLINE = [
    ("evaluation/held_out/td_loss", {"validation_fraction": 0.1}, "nothing is evaluated; set `evaluation_interval`"),
    ("store/num_held_out_transitions", {}, "nothing is held out; set `validation_fraction`"),
    (
        "evaluation/env_runners/success_rate",
        {"validation_fraction": 0.1, "evaluation_interval": 1},
        "there is no environment; set `env`",
    ),
]


@pytest.mark.parametrize(("metric", "config", "message"), ABSENT_OFFLINE)
def test_a_metric_of_held_out_episodes_or_of_none_is_told_apart(
    metric: str, config: dict[str, Any], message: str
) -> None:
    judged = DATA | config
    with pytest.raises(ExperimentError, match=f"`{metric}` never appears, because .*{message}"):
        parse_experiment("e", {"run": "CalQL", "stop": {metric: 1.0}, "config": judged})
    with pytest.raises(ExperimentError, match="`overfitting` is no number"):
        parse_experiment("e", {"run": "CalQL", "stop": {"overfitting": 1.0}, "config": judged})


def test_without_a_hold_out_nothing_is_judged_by_one() -> None:
    metric = "evaluation/held_out/td_loss"
    with pytest.raises(ExperimentError, match=f"`{metric}` never appears, because nothing is held out; set `val"):
        stop_of({metric: 1.0, **BOUND}, config=DATA | EVALUATED)
    judge = {"metric": metric, "mode": "min"}
    for entry in ({"scheduler": {"type": "asha"} | judge}, {"keep_best": judge}):
        with pytest.raises(ExperimentError, match=f"judges by `{metric}`, but nothing is held out; set `val"):
            stop_of(BOUND, config=DATA | EVALUATED, num_samples=2, **entry)


JUDGED = {"validation_fraction": 0.25, "evaluation_interval": 1}
JUDGED_BY_DATA = {
    "validation_fraction": 0.25,
    "offline_evaluation_interval": 1,
    "offline_evaluation_type": "held_out",
}


@pytest.mark.parametrize(
    ("metric", "mode", "config", "message"),
    [
        ("held_out/td_loss", "min", {"validation_fraction": 0.25}, "nothing is evaluated; set `evaluation_interval`"),
        ("held_out/td_loss", "max", JUDGED, "the least is the best there; set `mode: min`"),
        ("held_out/action_distance", "max", JUDGED, "the least is the best there; set `mode: min`"),
        ("env_runners/success_rate", "max", JUDGED, "there is no environment; set `env`, or judge by `.*/td_loss`"),
        ("held_out/td_loss", "min", JUDGED, None),
        ("held_out/td_loss", "min", JUDGED_BY_DATA, None),
        ("env_runners/success_rate", "max", JUDGED_BY_DATA, "nothing is evaluated; set `evaluation_interval`"),
        ("fqe/value", "max", JUDGED, "nothing fits values to the data; set `offline_evaluation_interval` and"),
        ("held_out/log_prob", "max", JUDGED, None),
    ],
)
def test_schedulers_and_best_checkpoints_judge_by_what_is_there_and_the_right_way_round(
    metric: str, mode: str, config: dict[str, Any], message: str | None
) -> None:
    judge = {"metric": f"evaluation/{metric}", "mode": mode}
    for entry in ({"scheduler": {"type": "asha"} | judge}, {"keep_best": judge}):
        spec = {"run": "CalQL", "config": DATA | config, "num_samples": 2, **entry}
        if message is None:
            parse_experiment("e", spec)
            continue
        with pytest.raises(ExperimentError, match=f"judges by `evaluation/{metric}`, but {message}"):
            parse_experiment("e", spec)


@pytest.mark.parametrize(("metric", "config", "message"), ABSENT)
def test_a_metric_that_cannot_appear_in_this_experiment_is_refused(
    metric: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExperimentError, match=f"`{metric}` never appears, because .*{message}"):
        stop_of({metric: 1.0, **BOUND}, config=config)


def test_without_an_environment_what_is_counted_there_is_refused() -> None:
    with pytest.raises(ExperimentError, match="never appears, because there is no environment; set `env`"):
        parse_experiment("e", {"run": "CalQL", "stop": {"num_online_env_steps_lifetime": 5}, "config": DATA})
    assert parse_experiment("e", {"run": "CalQL", "config": DATA}).stop == {}  # It ends with `offline_updates`.


def test_whoever_has_own_callbacks_may_stop_at_own_metrics() -> None:
    class Mine(RLlibCallback):
        pass

    own = {"entirely_mine": 1.0, "custom_metrics/energy": 5.0, **BOUND}
    assert metrics_of(CalQLConfig()).fault_of("custom_metrics/energy") is None
    assert stop_of(own, config={"callbacks_class": Mine}) == own
    with pytest.raises(ExperimentError, match="did you mean `num_online_env_steps_lifetime`"):
        stop_of({"num_online_env_steps_lifetme": 5, **BOUND}, config={"callbacks_class": Mine})


@pytest.mark.parametrize("run", ["SAC", "PPO"])
def test_other_algorithms_are_checked_by_the_metrics_of_rllib(run: str) -> None:
    learner = {"learners/default_policy/anything_it_reports": 1.0, "env_runners/episode_return_mean": -200.0}
    assert stop_of(learner | BOUND, run) == learner | BOUND
    with pytest.raises(ExperimentError, match="did you mean `num_env_steps_sampled_lifetime`"):
        stop_of({"num_env_steps_sampled_lifetme": 3}, run)
    with pytest.raises(ExperimentError, match="Unknown metric `num_online_env_steps_lifetime`"):
        stop_of({"num_online_env_steps_lifetime": 3}, run)
    with pytest.raises(ExperimentError, match=r"has an environment and has no end.*num_env_steps_sampled_lifetime"):
        stop_of("none", run)


SCORE = "evaluation/env_runners/success_rate"


@pytest.mark.parametrize(
    ("stop", "config"),
    [
        ("none", {}),
        (None, {}),  # `stop:` with nothing behind it.
        ({SCORE: 0.9}, EVALUATED),
        ({"num_offline_updates_lifetime": 21}, DATA),
        ({"num_offline_updates_lifetime": 20}, DATA | {"offline_updates": {"grid_search": [20, 10]}}),
        ({"store/num_online_transitions": 51}, {"online_capacity": 50}),
        ({"q_out_of_range": 1.0}, {}),
    ],
)
def test_an_experiment_that_may_interact_for_ever_is_refused(stop: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=r"Experiment 'e' has an environment and .* for ever.*`stop: \{\}`"):
        stop_of(stop, config=config)


@pytest.mark.parametrize(
    ("stop", "config"),
    [
        ({}, {}),
        ({SCORE: 0.9}, EVALUATED | {"max_online_env_steps": 2_000}),
        ({SCORE: 0.9, "time_total_s": float("inf")}, EVALUATED),
        ({SCORE: 0.9, "time_total_s": 60}, EVALUATED),
        ({"num_offline_updates_lifetime": 20}, DATA),
        *(({metric: 5}, {}) for metric in ("training_iteration", "time_total_s", "num_env_steps_sampled_lifetime")),
        *(({metric: 5}, {}) for metric in (keys.NUM_ONLINE_ENV_STEPS_LIFETIME, keys.NUM_ONLINE_EPISODES_LIFETIME)),
        *(({metric: 5}, {}) for metric in (keys.NUM_ONLINE_UPDATES_LIFETIME, "env_runners/num_episodes_lifetime")),
        ({"store/num_online_transitions": 50}, {"online_capacity": 50}),
    ],
)
def test_an_experiment_with_a_bound_or_an_explicit_refusal_of_one_is_run(stop: Any, config: dict[str, Any]) -> None:
    assert stop_of(stop, config=config) == stop


def test_the_setting_is_a_bound_without_any_stop() -> None:
    assert stop_of("none", config={"max_online_env_steps": 2_000}) == {}
    with pytest.raises(ExperimentError, match="for ever"):
        stop_of("none", config={"max_online_env_steps": {"grid_search": [2_000, None]}})


def test_a_scheduler_that_ends_every_trial_is_a_bound() -> None:
    scheduler = {"type": "asha", "max_t": 10, "metric": "env_runners/episode_return_mean"}
    assert stop_of("none", scheduler=scheduler) == {}
    with pytest.raises(ExperimentError, match="for ever"):
        stop_of("none", scheduler=scheduler | {"stop_last_trials": False})


def test_a_bound_that_ends_the_run_at_its_first_result_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"`num_online_env_steps_lifetime` must be above 0, got 0"):
        stop_of({"num_online_env_steps_lifetime": 0})


def test_a_python_file_without_an_end_is_refused_like_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "e.py"
    text = "from rllib_calql import CalQLConfig\nconfig = CalQLConfig().environment('Pendulum-v1')\n"
    for stop, message in (("", "has no end"), ("stop = {'num_online_steps': 5}", "num_online_env_steps_lifetime")):
        file.write_text(text + stop)
        with pytest.raises(ExperimentError, match=message):
            read_experiments(file)
    file.write_text(text + "stop = {}")
    assert read_experiments(file)[0].stop == {}


def test_every_documented_metric_can_stop_a_run() -> None:
    config = CalQLConfig().environment("Pendulum-v1").offline_data(input_="data.h5").evaluation(evaluation_interval=1)
    config = config.training(lagrangian=True).env_runners(num_env_runners=1).fine_tuning(offline_updates=1)
    config.training(reference_value="learned", calibration_form="penalty", bound_uniform_actions=True)
    config.offline_data(normalize_observations=True, validation_fraction=0.1)
    config.evaluation(offline_evaluation_interval=1, offline_evaluation_type="fqe")
    config.external_clients(external_port=5555)
    section, documented = "", []
    for line in METRICS.read_text().splitlines():
        section = line if line.startswith("## ") else section
        if line.startswith("| `"):
            place = "learners/default_policy/" if section == "## Learner" else ""
            documented += [place + name.replace("{c}", "1") for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    metrics = metrics_of(config)
    assert len(documented) > 40
    not_numbers = {keys.PHASE, keys.OFFLINE_DATA, keys.Q_WARNING, keys.OFFLINE_DATA_WARNINGS, keys.SUCCESS_WARNING}
    not_numbers |= {keys.PRETRAINED_WARNING, keys.OVERFITTING, f"evaluation/{keys.FQE}/{keys.FQE_WARNINGS}"}
    not_numbers |= {"fine_tuning/regime", "fine_tuning/regime_quantity"}
    assert {name for name in documented if metrics.fault_of(name) or why_absent(name, config)} <= not_numbers


@pytest.mark.parametrize(
    ("settings", "metric", "reason"),
    [
        ({"conservative_online": False}, "cql_loss", "after the switch there is no conservative term"),
        ({"conservative_online": False}, "cql_gap_q2", "after the switch there is no conservative term"),
        ({"conservative_online": False}, "q1_data", None),
        ({}, "cql_loss", None),
        ({"actor_update_period_online": 4}, "policy_loss", "results without a step of the actor lack it"),
        ({"actor_update_period_online": 4}, "alpha_value", None),
    ],
)
def test_what_is_not_evaluated_after_the_switch_ends_no_trial(
    settings: dict[str, Any], metric: str, reason: str | None
) -> None:
    config = CalQLConfig().environment("Pendulum-v1").offline_data(input_="rows.parquet")
    config.fine_tuning(offline_updates=1, **settings)
    told = why_absent(f"learners/default_policy/{metric}", config)
    assert told is None if reason is None else (told or "").startswith(reason)
