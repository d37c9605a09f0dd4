"""Experiment files: what is read from them, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray.rllib.algorithms.ppo import PPO
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.sample import Categorical, Float

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.experiments.experiment import Experiment, ExperimentError, read_experiments
from rllib_calql.experiments.reading.typed_settings import settings_by_method


def write(tmp_path: Path, text: str, name: str = "experiment.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def read_one(tmp_path: Path, text: str) -> Experiment:
    (experiment,) = read_experiments(write(tmp_path, text))
    return experiment


def config_of(tmp_path: Path, settings: str, run: str = "CalQL") -> Any:
    return read_one(tmp_path, f"e:\n  run: {run}\n  env: Pendulum-v1\n  stop: {{}}\n  config: {{{settings}}}\n").config


def test_an_experiment_has_its_algorithm_environment_stop_and_settings(tmp_path: Path) -> None:
    experiment = read_one(
        tmp_path,
        """
        swing-up:
          run: CalQL
          env: Pendulum-v1
          stop: {num_online_env_steps_lifetime: 4000, evaluation: {env_runners: {episode_return_mean: -150.5}}}
          num_samples: 3
          checkpoint_config: {checkpoint_frequency: 5}
          config: {min_q_weight: 1.5, warmup_env_steps: 200, num_env_runners: 2, seed: 7, evaluation_interval: 1}
        """,
    )
    assert experiment.name == "swing-up"
    assert experiment.algorithm is CalQL
    assert experiment.config.env == "Pendulum-v1"
    assert experiment.stop == {
        "num_online_env_steps_lifetime": 4000,
        "evaluation/env_runners/episode_return_mean": -150.5,
    }
    assert (experiment.num_samples, experiment.checkpoint_config) == (3, {"checkpoint_frequency": 5})
    config: Any = experiment.config
    assert (config.min_q_weight, config.warmup_env_steps, config.num_env_runners, config.seed) == (1.5, 200, 2, 7)
    assert CalQLConfig().update_from_dict(experiment.param_space)._ends_at_env_steps == 4000
    assert experiment.num_cpus_of_largest_trial == 3  # The algorithm itself and two env runners.


@pytest.mark.parametrize(
    ("text", "num_cpus"),
    [
        ("num_env_runners: 2, num_cpus_per_env_runner: 0.01", 0.01),
        ("num_env_runners: 2, num_cpus_per_env_runner: 0, custom_resources_per_env_runner: {robot: 1}", 0),
        ("num_env_runners: 0, num_cpus_per_env_runner: 0", 0),
    ],
)
def test_env_runners_need_a_place_but_no_whole_cpu(tmp_path: Path, text: str, num_cpus: float) -> None:
    assert config_of(tmp_path, text).num_cpus_per_env_runner == num_cpus


def test_a_file_may_hold_several_experiments_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "b: {run: CalQL, env: Pendulum-v1, stop: {}}\na: {run: PPO, env: CartPole-v1, stop: {}}\n")
    assert [(e.name, e.algorithm) for e in read_experiments(path)] == [("b", CalQL), ("a", PPO)]


@pytest.mark.parametrize(
    ("text", "number"),
    [("3e-4", 0.0003), ("1e6", 1e6), ("-2E+3", -2000.0), (".5", 0.5), ("1.", 1.0), ("0.05", 0.05), ("-.5e1", -5.0)],
)
def test_exponents_and_bare_dots_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert config_of(tmp_path, f"reward_bias: {text}").reward_bias == number


def test_whole_numbers_stay_whole_and_become_whole_where_the_setting_is(tmp_path: Path) -> None:
    config = config_of(tmp_path, "num_actions: 4, online_capacity: 1e5, min_q_weight: 1e0")
    assert [(value, type(value)) for value in (config.num_actions, config.online_capacity, config.min_q_weight)] == [
        (4, int),
        (100_000, int),
        (1.0, float),
    ]


def test_infinity_and_words_are_read_as_such(tmp_path: Path) -> None:
    config = config_of(tmp_path, "conservative_gap_clip: [-200, .inf], mixing_ratio: proportional")
    assert config.conservative_gap_clip == (-200, math.inf)
    assert config.mixing_ratio == "proportional"


def test_settings_may_be_grouped_by_method(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "training: {min_q_weight: 2.0, gamma: 0.9}, fine_tuning: {warmup_env_steps: 5}, tau: 0.1"
    )
    assert (config.min_q_weight, config.gamma, config.warmup_env_steps, config.tau) == (2.0, 0.9, 5, 0.1)


def test_settings_go_through_the_typed_methods(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "model_config: {actor_hiddens: [8]}, train_batch_size_per_learner: 32, framework: torch"
    )
    assert config.model_config["actor_hiddens"] == [8]
    assert config.model_config["critic_hiddens"] == [256, 256]  # `rl_module` fills in the defaults.
    assert config.train_batch_size_per_learner == 32


def test_names_of_rllibs_yaml_files_are_understood(tmp_path: Path) -> None:
    config = read_one(tmp_path, "e: {run: PPO, env: CartPole-v1, stop: {}, config: {lambda: 0.8}}").config
    assert config.lambda_ == 0.8  # type: ignore[attr-defined]


def test_the_methods_of_a_config_are_found_with_what_they_forward() -> None:
    methods = settings_by_method(type(CalQL.get_default_config()))
    assert "min_q_weight" in methods["training"]
    assert "gamma" in methods["training"]  # From AlgorithmConfig, three classes up.
    assert "offline_updates" in methods["fine_tuning"]
    assert not {"build", "copy", "validate", "update_from_dict"} & set(methods)


def test_search_spaces_reach_the_config_at_any_depth(tmp_path: Path) -> None:
    experiment = read_one(
        tmp_path,
        """
        e:
          run: CalQL
          env: Pendulum-v1
          stop: {}
          config:
            min_q_weight: {grid_search: [1, 5e0]}
            actor_lr: {loguniform: [1e-5, 1e-3]}
            training: {tau: {uniform: [0.01, 0.1]}}
            model_config: {actor_hiddens: {choice: [[8], [16, 16]]}}
            online_capacity: {grid_search: [1e3, 1e4]}
        """,
    )
    space: dict[str, Any] = experiment.config.to_dict()
    assert space["min_q_weight"] == {"grid_search": [1, 5.0]}
    assert space["online_capacity"] == {"grid_search": [1000, 10000]}
    assert [type(capacity) for capacity in space["online_capacity"]["grid_search"]] == [int, int]
    assert isinstance(space["actor_lr"], Float)
    assert (space["actor_lr"].lower, space["actor_lr"].upper) == (1e-5, 1e-3)
    assert (space["tau"].lower, space["tau"].upper) == (0.01, 0.1)
    hiddens = space["_model_config"]["actor_hiddens"]
    assert isinstance(hiddens, Categorical)
    assert hiddens.categories == [[8], [16, 16]]


def test_every_foreseeable_value_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"`mixing_ratio`.*got 1\.5"):
        config_of(tmp_path, "mixing_ratio: {grid_search: [0.5, 1.5]}")


def test_values_that_do_not_go_together_are_refused_before_training(tmp_path: Path) -> None:
    searched = "critic_subset: {grid_search: [1, 2]}, num_critics: {grid_search: [2, 1]}"  # 2 of 2 and 1 of 1 are fine.
    with pytest.raises(ExperimentError, match=r"`critic_subset` must be .* to `num_critics`, 1, got 2"):
        config_of(tmp_path, searched)
    config_of(tmp_path, searched.replace("[2, 1]", "[3, 2]"))


def test_both_ends_of_random_whole_numbers_are_checked(tmp_path: Path) -> None:
    config_of(tmp_path, "critic_subset: {randint: [1, 3]}")  # 1 and 2, as Tune draws them.
    for ends, bad in (("[0, 3]", 0), ("[1, 4]", 3)):
        with pytest.raises(ExperimentError, match=rf"`critic_subset` must be .*got {bad}"):
            config_of(tmp_path, f"critic_subset: {{randint: {ends}}}")


def test_a_trial_is_sized_by_the_largest_value_of_the_grid(tmp_path: Path) -> None:
    text = "e: {run: CalQL, env: Pendulum-v1, stop: {}, config: {num_env_runners: {grid_search: [0, 3, 1]}}}"
    assert read_one(tmp_path, text).num_cpus_of_largest_trial == 4


def test_a_scheduler_judges_by_the_evaluation_return_unless_told(tmp_path: Path) -> None:
    head = "e: {run: CalQL, env: Pendulum-v1, config: {evaluation_interval: 1}, scheduler: "
    scheduler: Any = read_one(tmp_path, head + "{type: asha, max_t: 20, grace_period: 4}}").scheduler
    assert isinstance(scheduler, AsyncHyperBandScheduler)
    assert (scheduler.metric, scheduler._mode) == ("evaluation/env_runners/episode_return_mean", "max")
    assert scheduler._max_t == 20
    other: Any = read_one(tmp_path, head + "{type: asha, metric: training_iteration, mode: min}}").scheduler
    assert (other.metric, other._mode) == ("training_iteration", "min")


def test_the_seed_of_the_command_replaces_that_of_the_file(tmp_path: Path) -> None:
    experiment = read_one(tmp_path, "e: {run: CalQL, env: Pendulum-v1, stop: {}, config: {seed: 1}}")
    assert experiment.with_seed(5).config.seed == 5
    assert experiment.config.seed == 1


def test_a_python_file_gives_its_config_and_stop(tmp_path: Path) -> None:
    text = (
        "from rllib_calql import CalQLConfig\n"
        "stop = {'training_iteration': 2}\n"
        "config = CalQLConfig().environment('Pendulum-v1').training(tau=0.25)\n"
    )
    (experiment,) = read_experiments(write(tmp_path, text, "swing_up.py"))
    assert (experiment.name, experiment.algorithm, experiment.stop) == ("swing_up", CalQL, {"training_iteration": 2})
    config: Any = experiment.config
    assert config.tau == 0.25
    assert experiment.num_cpus_of_largest_trial == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", r"could not be run: No module named 'nothing_of_this_name'"),
        ("config = {'lr': 1}", r"must define `config`.*got dict"),
        ("", r"must define `config`.*got NoneType"),
        (
            "from rllib_calql import CalQLConfig\nconfig = CalQLConfig().fine_tuning(mixing_ratio=2.0)",
            r"Experiment 'bad': `mixing_ratio`.*got 2\.0",
        ),
    ],
)
def test_a_python_file_without_a_usable_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read_experiments(write(tmp_path, text, "bad.py"))


HEAD = "run: CalQL, env: Pendulum-v1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must map experiment names"),
        ("- a\n- b\n", r"must map experiment names.*got \['a', 'b'\]"),
        ("e: 3\n", r"The experiment 'e' must be a mapping"),
        ("e: {run: [CalQL\n", r"is not valid YAML.*line 2"),
        ("e: {run: CalQL, run: PPO}\n", r"the key 'run' is there twice"),
        ("e: {run: CalQL}\ne: {run: PPO}\n", r"the key 'e' is there twice"),
        ("e: {env: Pendulum-v1}\n", r"'e' has no `run`"),
        ("e: {run: CalQ, env: Pendulum-v1}\n", r"Unknown algorithm 'CalQ' in experiment 'e'; did you mean `CalQL`"),
        ("e: {run: calql, env: Pendulum-v1}\n", r"did you mean `CalQL`"),
        ("e: {run: 3}\n", r"Unknown algorithm 3"),
        (f"e: {{{HEAD}, stopp: {{}}}}\n", r"Unknown key `stopp` in experiment 'e'; did you mean `stop`\?"),
        (f"e: {{{HEAD}, config: [1]}}\n", r"`config` of experiment 'e' must be a mapping, got \[1\]"),
        (f"e: {{{HEAD}, config: {{env: CartPole-v1}}}}\n", r"has `env` twice"),
        (f"e: {{{HEAD}, config: {{min_q_wieght: 1}}}}\n", r"`min_q_wieght` in `config`.*did you mean `min_q_weight`"),
        (
            f"e: {{{HEAD}, config: {{actor_hiddens: [16]}}}}\n",
            r"one of the networks; write it as `model_config: {actor_hiddens: \.\.\.}`",
        ),
        (f"e: {{{HEAD}, config: {{trainin: {{tau: 1}}}}}}\n", r"`trainin`.*did you mean `training`"),
        (f"e: {{{HEAD}, config: {{training: {{taw: 0.1}}}}}}\n", r"`taw` in `training`.*did you mean `tau`"),
        (
            f"e: {{{HEAD}, config: {{training: {{mixing_ratio: 0.1}}}}}}\n",
            r"Unknown setting `mixing_ratio` in `training`.*: it is one of `fine_tuning`; move it there",
        ),
        (f"e: {{{HEAD}, config: {{tau: 0.1, training: {{tau: 0.2}}}}}}\n", r"`tau` of experiment 'e' is there twice"),
        (f"e: {{{HEAD}, config: {{mixing_ratio: 7}}}}\n", r"Experiment 'e': `mixing_ratio`.*got 7"),
        (
            f"e: {{{HEAD}, config: {{num_env_runners: 2, num_cpus_per_env_runner: 0}}}}\n",
            r"Experiment 'e': `num_cpus_per_env_runner` must be above 0, since Ray Tune .* set 0\.01",
        ),
        (
            f"e: {{{HEAD}, config: {{num_cpus_per_env_runner: 0, evaluation_num_env_runners: 1}}}}\n",
            r"Experiment 'e': `num_cpus_per_env_runner` must be above 0",
        ),
        (
            f"e: {{{HEAD}, config: {{num_learners: 1, num_cpus_per_learner: 0}}}}\n",
            r"and so must `num_cpus_per_learner`; set 0\.01",
        ),
        (f"e: {{{HEAD}, config: {{grad_clip_by: nrom}}}}\n", r"`training` \(`grad_clip_by`\): `grad_clip_by` \(nrom\)"),
        (
            f"e: {{{HEAD}, config: {{tau: {{uniform: [1]}}}}}}\n",
            r"`tau`: `uniform` needs a list of 2 values, got \[1\]",
        ),
        (f"e: {{{HEAD}, config: {{tau: {{grid_search: []}}}}}}\n", r"`grid_search` needs a list of one or more values"),
        (f"e: {{{HEAD}, config: {{tau: {{loguniform: [0, 1]}}}}}}\n", r"`tau`: `loguniform`"),
        (
            f"e: {{{HEAD}, config: {{model_config: {{grid_search: [{{}}, {{}}]}}}}}}\n",
            r"`model_config` of experiment 'e' cannot be searched over here",
        ),
        (f"e: {{{HEAD}, stop: 3}}\n", r"`stop` of experiment 'e' must map metrics to numbers"),
        (f"e: {{{HEAD}, stop: {{training_iteration: ten}}}}\n", r"`training_iteration` must be a number, got 'ten'"),
        (
            f"e: {{{HEAD}, stop: {{num_online_env_steps_lifetme: 10}}}}\n",
            r"did you mean `num_online_env_steps_lifetime`",
        ),
        (f"e: {{{HEAD}, num_samples: 0}}\n", r"`num_samples` of experiment 'e' must be a whole number >= 1, got 0"),
        (f"e: {{{HEAD}, checkpoint_config: {{frequency: 3}}}}\n", r"did you mean `checkpoint_frequency`"),
        (f"e: {{{HEAD}, scheduler: {{type: ahsa}}}}\n", r"with a type of asha, hyperband, median_stopping"),
        (
            f"e: {{{HEAD}, config: {{evaluation_interval: 1}}, scheduler: {{type: asha, gracep: 2}}}}\n",
            r"`gracep` in `scheduler`.*did you mean `grace_period`",
        ),
        (f"e: {{{HEAD}, scheduler: {{type: asha}}}}\n", r"but nothing is evaluated; set `evaluation_interval`"),
        (
            f"e: {{{HEAD}, config: {{evaluation_interval: 1}}, scheduler: {{type: asha, max_t: -1}}}}\n",
            r"`scheduler` of experiment 'e': Max \(time_attr\) not valid",
        ),
        (
            f"e: {{{HEAD}, config: {{evaluation_interval: 1}}, scheduler: {{type: asha, metric: retrun}}}}\n",
            r"`scheduler` of experiment 'e': Unknown metric `retrun`.* so nothing would be judged by it",
        ),
        (
            f"e: {{{HEAD}, config: {{evaluation_interval: 1}}, scheduler: {{type: asha, time_attr: iteration}}}}\n",
            r"`scheduler` of experiment 'e': Unknown metric `iteration`.*did you mean `training_iteration`",
        ),
        (
            f"e: {{{HEAD}, config: {{gamma: {{uniform: [0.9, 0.99]}}}}, search_alg: {{type: optuna, metric: loss}}}}\n",
            r"`search_alg` of experiment 'e': Unknown metric `loss`.* so nothing would be judged by it",
        ),
        (
            f"e: {{{HEAD}, config: {{evaluation_interval: 1}}, scheduler: {{type: asha, metric: phase}}}}\n",
            r"`scheduler` of experiment 'e': `phase` is no number that could be compared",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=f"(?s){message}"):
        read_experiments(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.yaml", r"missing\.yaml' does not exist"), ("", "is a folder"), ("a.json", r"must end in \.yaml")],
)
def test_something_that_is_no_experiment_file_is_refused_by_its_path(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "{}", "a.json")
    with pytest.raises(ExperimentError, match=message):
        read_experiments(tmp_path / name)


BOUNDLESS = {
    "e: " + "[" * 5000: "is not valid YAML: maximum recursion depth",
    "e: &loop {run: CalQL, env: Pendulum-v1, config: {env_config: *loop}}": "cannot be read: its collections",
    f"e: {{run: CalQL, env: Pendulum-v1, num_samples: 0x{'f' * 5000}}}": "a whole number has 20000 bits, at most 64",
    f"e: {{run: CalQL, env: Pendulum-v1, num_samples: {'9' * 5000}}}": "is not valid YAML: Exceeds the limit",
    "[e]": r"must map experiment names to .*, got \['e'\]",
    "e: {run: CalQL, env: Pendulum-v1, stop: {time_total_s: .nan}}": "`time_total_s` must be a number, got nan",
}


@pytest.mark.parametrize("text", BOUNDLESS, ids=range(len(BOUNDLESS)))
def test_what_python_cannot_copy_or_print_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ExperimentError, match=BOUNDLESS[text]):
        read_experiments(write(tmp_path, text))
