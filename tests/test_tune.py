"""Ray Tune by name and by class, and the files of `tuned_examples/` in short versions."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from tiny import line_config

from rllib_calql import CalQL
from rllib_calql import metrics as keys
from rllib_calql.experiment import read_experiments

pytestmark = pytest.mark.usefixtures("ray_session")

EXAMPLES = Path(__file__).parent.parent / "tuned_examples"
# Sizes are cut for the test; nothing else is touched.
_SHORTER = [
    (r"num_online_env_steps_lifetime: \d+", "num_online_env_steps_lifetime: 300"),
    (r"offline_updates: \d+", "offline_updates: 4"),
    (r"updates_per_iteration: \d+", "updates_per_iteration: 2"),
    (r"updates_per_env_step: 1", "updates_per_env_step: 0.02"),
    (r"evaluation_duration: \d+", "evaluation_duration: 1"),
    (r"num_samples: \d+", "num_samples: 2"),
    (r"num_env_runners: 2", "num_env_runners: 1"),
]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointmaze_umaze.yaml", "pointmaze_umaze_tune.yaml", "pendulum.yaml"])
def test_yaml_examples_run_in_short_versions(name: str, tmp_path: Path) -> None:
    text = (EXAMPLES / name).read_text()
    for pattern, shorter in _SHORTER:
        text = re.sub(pattern, shorter, text)
    path = tmp_path / name
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
    for result in results:
        evaluation = result.metrics["evaluation"]["env_runners"]
        low, high = (0.0, 1.0) if "pointmaze" in name else (-1219.0, -140.0)  # Reference scores of the data sets.
        score = 100.0 * (evaluation["episode_return_mean"] - low) / (high - low)
        assert evaluation[keys.NORMALIZED_SCORE] == pytest.approx(score, abs=1.0)


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
        (r"offline_updates=8_000, updates_per_iteration=1_000", "offline_updates=4, updates_per_iteration=2"),
        (r"updates_per_env_step=1\)", "updates_per_env_step=0.02)"),
        (r"2_000", "300"),
        (r"evaluation_duration=20", "evaluation_duration=1"),
        (r"num_env_runners=2", "num_env_runners=1"),
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
