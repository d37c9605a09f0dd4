"""Ray Tune by name and by class, and the files of `tuned_examples/` in short versions."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.schedulers import PopulationBasedTraining
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql.common import metrics as keys
from rllib_calql.datasets import record
from rllib_calql.experiments.best_checkpoint import read_best
from rllib_calql.experiments.experiment import Experiment, read_experiments
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.experiments.tune_runs import run_experiment

pytestmark = pytest.mark.usefixtures("ray_session")

EXAMPLES = Path(__file__).parents[2] / "tuned_examples"
# Sizes are cut for the test; nothing else is touched.
_SHORTER = [
    (r"num_online_env_steps_lifetime: \d+", "num_online_env_steps_lifetime: 300"),
    (r"offline_updates: \d+", "offline_updates: 4"),
    (r"updates_per_iteration: \d+", "updates_per_iteration: 2"),
    (r"updates_per_env_step: 1", "updates_per_env_step: 0.02"),
    (r"evaluation_duration: \d+", "evaluation_duration: 1"),
    (r"num_samples: \d+", "num_samples: 2"),
    (r"num_env_runners: 2", "num_env_runners: 1"),
    (r"num_cpus_for_main_process: 2", "num_cpus_for_main_process: 1"),
]
_REFERENCE_SCORES = {"pointmaze": (0.0, 1.0), "pendulum": (-1219.0, -140.0), "pixel": (-40.0, -4.95)}


def _fit(trainable: Any, config: Any, tmp_path: Path) -> Any:
    tuner = tune.Tuner(
        trainable,
        param_space=config,
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "results"), stop={keys.NUM_OFFLINE_UPDATES_LIFETIME: 4}, verbose=0
        ),
    )
    return tuner.fit()


def test_a_grid_of_two_runs_by_name_and_reaches_the_learners(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=2)
    config.training(min_q_weight=tune.grid_search([0.0, 2.0]))
    results = _fit("CalQL", config, tmp_path)
    assert not results.errors
    losses = {
        result.config["min_q_weight"]: result.metrics["learners"]["default_policy"][keys.CQL_LOSS] for result in results
    }
    assert losses.keys() == {0.0, 2.0}
    assert losses[0.0] == 0.0
    assert losses[2.0] > 0.0


def test_the_class_runs_with_a_plain_dict(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=2).to_dict()
    results = _fit(CalQL, config, tmp_path)
    assert not results.errors
    assert results[0].metrics[keys.NUM_OFFLINE_UPDATES_LIFETIME] == 4
    assert (Path(results[0].path) / "result.json").exists()
    assert list(Path(results[0].path).glob("events.out.tfevents*"))  # TensorBoard, through Tune's own logger.


def _run_short(text: str, tmp_path: Path) -> Any:
    for pattern, shorter in _SHORTER:
        text = re.sub(pattern, shorter, text)
    path = tmp_path / "short.yaml"
    path.write_text(text)
    (experiment,) = read_experiments(path)
    tuner = tune.Tuner(
        experiment.algorithm,
        param_space=experiment.config.to_dict(),
        tune_config=tune.TuneConfig(num_samples=experiment.num_samples, scheduler=experiment.scheduler),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "results"), stop=experiment.stop, verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    assert len(results) == experiment.num_samples
    assert any(result.metrics[keys.PHASE] == keys.ONLINE for result in results)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pointmaze_umaze.yaml", "pointmaze_umaze_tune.yaml", "pendulum.yaml", "pixel_reach.yaml"]
)
def test_yaml_examples_run_in_short_versions(name: str, tmp_path: Path) -> None:
    for result in _run_short((EXAMPLES / name).read_text(), tmp_path):
        evaluation = result.metrics["evaluation"]["env_runners"]
        low, high = _REFERENCE_SCORES[name.split("_")[0].removesuffix(".yaml")]
        score = 100.0 * (evaluation["episode_return_mean"] - low) / (high - low)
        assert evaluation[keys.NORMALIZED_SCORE] == pytest.approx(score, abs=1.0)


@pytest.mark.slow
def test_the_hopper_example_runs_in_a_short_version_on_data_that_need_no_training(tmp_path: Path) -> None:
    falls = record(lambda obs: [0.0] * 3, "Hopper-v5", episodes=5, to=tmp_path / "falls.parquet", seed=0)
    text = (EXAMPLES / "hopper_medium.yaml").read_text()
    (result,) = _run_short(text.replace("minari:rllib-calql/hopper-medium-v0", str(falls.target)), tmp_path)
    assert result.metrics["evaluation"]["env_runners"]["episode_return_mean"] > 0.0


@pytest.mark.slow
def test_without_an_environment_the_data_decide_which_trials_go_on(tmp_path: Path) -> None:
    text = (EXAMPLES / "offline_only.yaml").read_text()
    for pattern, shorter in [(r"\b8000\b", "4"), (r"\b2000\b", "2"), (r"\[128, 128\]", "[8]")]:
        text = re.sub(pattern, shorter, text)
    experiment = _read(tmp_path, text)
    assert not run_experiment(experiment, str(tmp_path), resume=False, announce=print).errors
    trials: dict[Path, dict[int, float]] = {}
    for file in (tmp_path / experiment.name).glob("*/result.json"):
        results = [json.loads(line) for line in file.read_text().splitlines()]
        assert all("env_runners" not in result["evaluation"] for result in results)
        trials[file.parent] = {
            result[keys.NUM_OFFLINE_UPDATES_LIFETIME]: result["evaluation"]["fqe"]["value"] for result in results
        }
    assert len(trials) == 4
    assert len({values[2] for values in trials.values()}) == 4  # Each policy was judged, by a fit of its own.
    assert all(values.keys() in ({2}, {2, 4}) for values in trials.values())
    # ASHA never stops what is best at its rung.
    assert 4 in max(trials.values(), key=lambda values: values[2])
    for folder, values in trials.items():  # What `rllib export` and `rllib evaluate --best` would take.
        best = read_best(LocalFileSystem(), str(folder))
        assert best is not None
        assert (best.value, best.num_offline_updates) == max((value, after) for after, value in values.items())


def test_the_python_and_the_yaml_main_job_are_the_same() -> None:
    (from_yaml,) = read_experiments(EXAMPLES / "pointmaze_umaze.yaml")
    module = runpy.run_path(str(EXAMPLES / "pointmaze_umaze.py"), run_name="example")
    assert module["stop"] == from_yaml.stop
    for config in (module["config"], from_yaml.config):
        config.validate()  # In which RLlib fills in `simple_optimizer`.
    ours, theirs = module["config"].to_dict(), from_yaml.config.to_dict()
    assert {key: value for key, value in ours.items() if theirs[key] != value} == {}


@pytest.mark.slow
def test_the_python_main_job_runs_in_a_short_version(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (EXAMPLES / "pointmaze_umaze.py").read_text()
    for pattern, shorter in [
        (r"offline_updates=7_000", "offline_updates=4"),
        (r"updates_per_iteration=1_000", "updates_per_iteration=2"),
        (r"updates_per_env_step=1,", "updates_per_env_step=0.02,"),
        (r"2_000", "300"),
        (r"evaluation_duration=20", "evaluation_duration=1"),
        (r"num_env_runners=2", "num_env_runners=1"),
        (r"num_cpus_for_main_process=2", "num_cpus_for_main_process=1"),
    ]:
        text, count = re.subn(pattern, shorter, text)
        assert count == 1, pattern
    path = tmp_path / "example.py"
    path.write_text(text)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "offline updates     2" in printed
    assert "online " in printed
    assert "Checkpoint:" in printed


class NoteLearningRates(RLlibCallback):
    """Writes the learning rate that the next update will use, whenever a checkpoint was loaded; scores by `rank`."""

    def on_checkpoint_loaded(self, *, algorithm: Any, **kwargs: Any) -> None:
        """Writes a line."""
        optimizer = algorithm.learner_group._learner.get_optimizer("default_policy", "policy")
        note = {
            "config": algorithm.config.actor_lr,
            "optimizer": float(optimizer.param_groups[0]["lr"]),
            "updates": algorithm.num_offline_updates,
        }
        with Path(algorithm.config.env_config["notes"]).open("a") as file:
            file.write(json.dumps(note) + "\n")

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        """Makes the trial with the greater learning rate the better one."""
        result["score"] = algorithm.config.actor_lr


@pytest.mark.slow
def test_population_based_training_changes_the_learning_rate_of_the_first_update(tmp_path: Path) -> None:
    config = line_config(tmp_path, offline_updates=100, updates_per_iteration=2)
    config.environment(env_config={"notes": str(tmp_path / "notes")}).callbacks(NoteLearningRates)
    config.training(actor_lr=tune.grid_search([1e-4, 1e-2]))
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        metric="score",
        mode="max",
        perturbation_interval=1,
        resample_probability=0.0,
        quantile_fraction=0.5,
        hyperparam_mutations={"actor_lr": tune.uniform(1e-5, 1e-1)},
        synch=True,
    )
    experiment = Experiment("pbt", CalQL, config, stop={"training_iteration": 2}, scheduler=scheduler)
    outcome = run_experiment(experiment, str(tmp_path / "r"), resume=False, announce=print)
    assert not outcome.errors
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert all(note["optimizer"] == pytest.approx(note["config"]) for note in notes)
    assert all(note["updates"] == 2 for note in notes)  # Those of the checkpoint after the first iteration.
    # The worse trial goes on from the better one, with a rate 0.8 or 1.2 times as great.
    assert any(note["config"] == pytest.approx(factor * 1e-2) for note in notes for factor in (0.8, 1.2))


PBT = """
e:
  run: CalQL
  env: Pendulum-v1
  stop: {}
  config: {evaluation_interval: 1}
  scheduler: {type: pbt, perturbation_interval: 4, hyperparam_mutations: %s}
"""


def _read(tmp_path: Path, text: str) -> Any:
    (tmp_path / "e.yaml").write_text(text)
    return read_experiments(tmp_path / "e.yaml")[0]


def test_population_based_training_can_be_written_in_yaml(tmp_path: Path) -> None:
    text = PBT % "{actor_lr: {loguniform: [1e-5, 1e-3]}, tau: [0.005, 0.01]}"
    scheduler = _read(tmp_path, text).scheduler
    assert isinstance(scheduler, PopulationBasedTraining)
    assert scheduler._perturbation_interval == 4
    assert (scheduler._metric, scheduler._time_attr) == (
        "evaluation/env_runners/episode_return_mean",
        "training_iteration",
    )
    assert 1e-5 <= scheduler._hyperparam_mutations["actor_lr"].sample() <= 1e-3
    assert scheduler._hyperparam_mutations["tau"] == [0.005, 0.01]


@pytest.mark.parametrize(
    ("mutations", "message"),
    [
        ("{actor_rl: [1, 2]}", r"Unknown setting `actor_rl` in `hyperparam_mutations`.*did you mean `actor_lr`"),
        ("{actor_lr: 3e-4}", r"`actor_lr` in `hyperparam_mutations`.*must be a list of values or a space.*got 0\.0003"),
        ("{actor_lr: {grid_search: [1, 2]}}", r"`actor_lr` in `hyperparam_mutations`.*a space to sample from"),
        ("{tau: [0.1, 7]}", r"`tau`.*got 7"),
        ("{num_critics: [2, 3]}", r"`num_critics` in `hyperparam_mutations`.*cannot be changed in a run"),
        ("{gamma: {uniform: [0.9, 0.99]}}", r"`gamma` in `hyperparam_mutations`.*cannot be changed in a run"),
        ("{reference_value: [a, b]}", r"`reference_value` in `hyperparam_mutations`.*cannot be changed in a run"),
        ("{}", r"must map settings to search spaces or lists of values, got \{\}"),
    ],
)
def test_mutations_that_make_no_sense_are_refused(tmp_path: Path, mutations: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=f"(?s){message}"):
        _read(tmp_path, PBT % mutations)


@pytest.mark.parametrize("value", ["-2", "1.5", "true", "often"])
def test_max_failures_is_a_whole_number(tmp_path: Path, value: str) -> None:
    text = "e: {run: CalQL, env: Pendulum-v1, stop: {}, max_failures: %s}"
    assert _read(tmp_path, text % 3).max_failures == 3
    assert _read(tmp_path, "e: {run: CalQL, env: Pendulum-v1, stop: {}}").max_failures == 0
    with pytest.raises(ExperimentError, match=r"`max_failures` of experiment 'e' must be a whole number >= 0, or -1"):
        _read(tmp_path, text % value)
