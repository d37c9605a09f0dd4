"""`tuned_examples/recipes`: other algorithms on the tasks of the examples, and the same in the studies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID

from rllib_calql import CalQL
from rllib_calql.common import metrics as keys
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.experiments.reading.yaml_files import load_yaml
from rllib_calql.study.plan import Trial, read_study

EXAMPLES = Path(__file__).parents[2] / "tuned_examples"
RECIPES = EXAMPLES / "recipes"
TASKS = ("pointmaze_umaze", "pointmaze_medium")
# By the last part of the file's name, what the studies call them.
ALGORITHMS = {
    "rlpd": "RLPD",
    "wsrl": "WSRL",
    "sac_with_data": "SAC with the data",
    "sac": "SAC alone",
    "bc": "BC",
    "bc_then_sac": "BC then SAC",
}
# Sizes are cut for the test; nothing else is touched.
_SHORTER = [
    (r" offline_updates: [1-9]\d+", " offline_updates: 4"),
    (r" bc_updates: \d{4,5}\b", " bc_updates: 4"),
    (r"updates_per_iteration: \d+", "updates_per_iteration: 4"),
    (r"warmup_env_steps: \d+", "warmup_env_steps: 5"),
    (r"num_cpus_for_main_process: 2", "num_cpus_for_main_process: 1"),
    (r"env_config:\n", "env_config:\n      max_episode_steps: 5\n"),
    (r"evaluation_interval: 1", "evaluation_interval: null"),
    (r"pointmaze-umaze-play-v0", "pointmaze-umaze-demos-v0"),  # Made in a second.
]

recipes = pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS for name in ALGORITHMS])


def _file(task: str, name: str) -> Path:
    return RECIPES / f"{task}_{name}.yaml"


def _entry(path: Path) -> dict[str, Any]:
    (entry,) = load_yaml(path).values()
    assert isinstance(entry, dict)
    return entry


def test_every_file_is_a_recipe_of_a_task() -> None:
    assert {path.name for path in RECIPES.iterdir()} == {
        _file(task, name).name for task in TASKS for name in ALGORITHMS
    }


@recipes
def test_a_recipe_has_environment_data_rewards_gamma_and_sizes_of_its_task(task: str, name: str) -> None:
    recipe, its_task = _entry(_file(task, name)), _entry(EXAMPLES / f"{task}.yaml")
    shared = [
        *("env_config", "reward_scale", "reward_bias", "failure_reward", "gamma", "train_batch_size_per_learner"),
        *("evaluation_interval", "evaluation_duration", "seed"),
        *(() if name == "sac" else ("input_", "normalize_observations")),
    ]
    assert {key: recipe[key] for key in ("run", "env", "stop")} == {
        key: its_task[key] for key in ("run", "env", "stop")
    }
    ours, theirs = recipe["config"], its_task["config"]
    assert {key: ours.get(key) for key in shared} == {key: theirs.get(key) for key in shared}
    for key in ("actor_hiddens", "critic_hiddens"):
        assert ours["model_config"][key] == theirs["model_config"][key]
    assert ours.get("offline_updates", 0) in (0, theirs["offline_updates"])
    (experiment,) = read_experiments(_file(task, name))
    experiment.config.validate()


def _learning(config: AlgorithmConfig) -> dict[str, Any]:
    """What decides how a config learns, and not how it is executed or evaluated."""
    other = ("num_env_runners", "num_cpus_for_main_process", "sample_async", "seed", "evaluation_interval")
    return {key: value for key, value in config.to_dict().items() if key not in other}


@pytest.fixture(scope="module")
def trials() -> dict[tuple[str, str], Trial]:
    """Those of the studies, by study and algorithm, one seed of each."""
    found = {}
    for study in TASKS:
        for trial in read_study(EXAMPLES / "studies" / f"{study}.yaml").trials:
            found[study, trial.algorithm] = trial
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_study_of_the_task_runs_the_recipe(task: str, name: str, trials: dict[tuple[str, str], Trial]) -> None:
    (experiment,) = read_experiments(_file(task, name))
    ours, theirs = _learning(experiment.config), _learning(trials[task, ALGORITHMS[name]].config)
    assert {key: (value, theirs[key]) for key, value in ours.items() if theirs[key] != value} == {}


def test_the_studies_of_umaze_change_the_same_settings_but_the_number_of_cloning_updates() -> None:
    play, demonstrations = (
        load_yaml(EXAMPLES / "studies" / f"{name}.yaml")["algorithms"]
        for name in ("pointmaze_umaze", "narrow_demonstrations")
    )
    assert (
        play["BC then SAC"].pop("bc_updates") == _entry(EXAMPLES / "pointmaze_umaze.yaml")["config"]["offline_updates"]
    )
    cloning = demonstrations["BC then SAC"].pop("bc_updates")
    assert cloning == _entry(EXAMPLES / "pointmaze_umaze_demos.yaml")["config"]["offline_updates"]
    assert play == demonstrations


def test_a_source_is_named_with_its_commit_and_the_lines() -> None:
    for path in RECIPES.iterdir():
        text = path.read_text()
        assert re.search(r"[\w-]+/[\w-]+ at [0-9a-f]{7}\b", " ".join(text.replace("\n#", "").split())), path
        assert re.search(r"\w\.(py|sh|md):\d+", text), path
        assert f"`rllib train file tuned_examples/recipes/{path.name}`" in text


# --- In short versions ------------------------------------------------------------------------------------------------


@pytest.fixture
def short(ray_session: None, tmp_path: Path) -> Iterator[Callable[[str], CalQL]]:
    """Builds a recipe on the main job's task, with few updates and episodes of five env steps."""
    algos = []

    def build(name: str) -> CalQL:
        text = _file("pointmaze_umaze", name).read_text()
        for pattern, shorter in _SHORTER:
            text = re.sub(pattern, shorter, text)
        (tmp_path / "short.yaml").write_text(text)
        (experiment,) = read_experiments(tmp_path / "short.yaml")
        algos.append(experiment.config.build())
        return algos[-1]

    yield build
    for algo in algos:
        algo.stop()


def _weights(algo: CalQL, network: str) -> list[torch.Tensor]:
    module = algo.learner_group._learner.module[DEFAULT_MODULE_ID]
    return [value.clone() for key, value in module.state_dict().items() if key.startswith(f"{network}.")]


def _equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _num_actor_steps(algo: CalQL) -> int:
    """Steps that Adam has made with the actor's parameters."""
    learner = algo.learner_group._learner
    weight = learner.module[DEFAULT_MODULE_ID].policy.head.weight
    optimizers = dict(learner.get_optimizers_for_module(DEFAULT_MODULE_ID)).values()
    (state,) = (optimizer.state[weight] for optimizer in optimizers if weight in optimizer.state)
    return int(state["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "updates_per_env_step"), [("rlpd", 20), ("wsrl", 4), ("sac_with_data", 1), ("sac", 1)]
)
def test_the_critics_step_as_often_as_the_source_says_and_the_actor_once_per_env_step(
    name: str, updates_per_env_step: int, short: Callable[[str], CalQL]
) -> None:
    algo = short(name)
    while algo.num_online_env_steps < 5:  # Until the end of the warm-up.
        algo.train()
        assert algo.num_online_updates == 0
    num_offline = algo.num_offline_updates
    assert num_offline == (4 if name == "wsrl" else 0)
    learned = algo.train()["learners"][DEFAULT_MODULE_ID]
    assert algo.num_online_env_steps == 10
    assert algo.num_online_updates == 5 * updates_per_env_step
    assert _num_actor_steps(algo) == 5 + num_offline
    assert math.isnan(learned.get(keys.CQL_LOSS, math.nan))  # RLlib: NaN where something was reported earlier.


@pytest.mark.slow
def test_cloning_then_sac_starts_with_a_cloned_actor_untrained_critics_and_the_first_temperature(
    short: Callable[[str], CalQL],
) -> None:
    algo = short("bc_then_sac")
    networks = ("policy", "critic", "target_critic")
    before = {network: _weights(algo, network) for network in networks}
    algo.train()
    assert algo.phase == keys.ONLINE
    at_switch = {network: _weights(algo, network) for network in networks}
    assert [_equal(before[network], at_switch[network]) for network in networks] == [False, True, True]
    algo.train()
    learned = algo.train()["learners"][DEFAULT_MODULE_ID]
    assert learned[keys.ALPHA_VALUE] == pytest.approx(0.1, rel=0.01)
    assert [_equal(at_switch[network], _weights(algo, network)) for network in networks] == [False, False, False]


@pytest.mark.slow
def test_cloning_goes_on_after_the_switch_on_the_data_alone(short: Callable[[str], CalQL]) -> None:
    algo = short("bc")
    algo.train()
    assert algo.phase == keys.ONLINE
    module = algo.learner_group._learner.module[DEFAULT_MODULE_ID]
    with torch.no_grad():
        module.critic.biases[-1].add_(1e6)  # Would be the actor's loss, if it followed the critics.
    learned = algo.train()["learners"][DEFAULT_MODULE_ID]
    assert algo.num_online_updates == algo.num_online_env_steps == 5
    assert abs(learned[keys.POLICY_LOSS]) < 100.0
