"""`search_alg` and `loggers` of experiment files: Ray's own, with their settings, and what is refused."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray import cloudpickle, tune
from ray.tune.logger import LoggerCallback

from rllib_calql.experiments.experiment import Experiment, read_experiments
from rllib_calql.experiments.reading import loggers
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.experiments.tune_runs import Outcome, run_experiment
from rllib_calql.system.stop_signals import StopSignals

SPACES = "gamma: {uniform: [0.9, 0.99]}, model_config: {critic_hiddens: {choice: [[4], [8]]}}"


def read(tmp_path: Path, keys: str, settings: str = f"evaluation_interval: 1, {SPACES}") -> Experiment:
    path = tmp_path / "e.yaml"
    path.write_text(f"e: {{run: CalQL, env: Pendulum-v1, stop: {{}}, {keys}, config: {{{settings}}}}}")
    (experiment,) = read_experiments(path)
    return experiment


# --- Search algorithms ------------------------------------------------------------------------------------------------


def test_a_search_algorithm_gets_its_options_the_default_metric_and_the_seed(tmp_path: Path) -> None:
    experiment = read(
        tmp_path, "search_alg: {type: optuna, study_name: s}", f"evaluation_interval: 1, seed: 7, {SPACES}"
    )
    assert experiment.search_alg is not None
    search: Any = experiment.search_alg.build()
    assert (search.metric, search.mode) == ("evaluation/env_runners/episode_return_mean", "max")
    assert (search._study_name, search._seed) == ("s", 7)
    assert search is not experiment.search_alg.build()  # It remembers what it has seen.
    chosen: Any = read(tmp_path, "search_alg: {type: optuna, metric: training_iteration, mode: min, seed: 3}")
    search = chosen.search_alg.build()
    assert (search.metric, search.mode, search._seed) == ("training_iteration", "min", 3)
    assert read(tmp_path, "num_samples: 2").search_alg is None


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        (
            "search_alg: optuna",
            SPACES,
            r"must be \{type: ..., ...\} with a type of optuna, hyperopt, ax, .*got 'optuna'",
        ),
        ("search_alg: {type: optna}", SPACES, r"with a type of optuna, "),
        ("search_alg: {type: hyperopt}", SPACES, r"needs the `hyperopt` package: pip install hyperopt"),
        ("search_alg: {type: optuna, seeds: 1}", SPACES, r"`seeds` in `search_alg`.*did you mean `seed`"),
        ("search_alg: {type: optuna, space: {}}", SPACES, r"Unknown .*`space` in `search_alg`"),
        (
            "search_alg: {type: optuna, mode: most}",
            SPACES,
            r"`mode` in `search_alg`.*must be one of max, min; got 'most'",
        ),
        ("search_alg: {type: optuna}", SPACES, r"but nothing is evaluated; set `evaluation_interval`"),
        (
            "search_alg: {type: optuna}, scheduler: {type: pbt, hyperparam_mutations: {actor_lr: [0.1, 0.2]}}",
            f"evaluation_interval: 1, {SPACES}",
            r"a `scheduler` that changes settings while trials run, .* settings that trials no longer have; drop one",
        ),
        ("search_alg: {type: optuna, metric: a}", "gamma: 0.9", r"nothing to search over; give a setting a space"),
        (
            "search_alg: {type: optuna, metric: a}",
            "gamma: {grid_search: [0.9]}",
            r"the grid of `gamma`; take `choice` in place of `grid_search`",
        ),
        (
            "search_alg: {type: optuna, metric: a}",
            "model_config: {critic_hiddens: [{choice: [4, 8]}]}",
            r"inside the list of `model_config/critic_hiddens`; take a `\{choice: \[...\]\}` of lists",
        ),
    ],
)
def test_a_search_that_cannot_work_is_refused_by_name(tmp_path: Path, keys: str, settings: str, message: str) -> None:
    if "hyperopt" in keys and importlib.util.find_spec("hyperopt") is not None:
        pytest.skip("hyperopt is installed")
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, keys, settings)


class Parabola(tune.Trainable):
    """Stands for an algorithm: what it gives is known for every setting."""

    @classmethod
    def default_resource_request(cls, config: Any) -> tune.PlacementGroupFactory:
        """All CPUs of the tests, so that one trial runs after the other."""
        return tune.PlacementGroupFactory([{"CPU": 2}])

    def step(self) -> dict[str, Any]:
        """The best weight is 1.5."""
        return {"custom_metrics": {"loss": (self.config["min_q_weight"] - 1.5) ** 2}}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing is to be kept."""
        (Path(checkpoint_dir) / "class_and_ctor_args.pkl").touch()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


@pytest.mark.usefixtures("ray_session")
def test_a_search_learns_from_its_trials_and_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        """
        parabola:
          run: CalQL
          env: Pendulum-v1
          num_samples: 3
          search_alg: {type: optuna, metric: custom_metrics/loss, mode: min, seed: 1}
          stop: {training_iteration: 2}
          checkpoint_config: {checkpoint_frequency: 1}
          config: {min_q_weight: {uniform: [1.0, 2.0]}, model_config: {critic_hiddens: {choice: [[4], [8]]}}}
        """
    )
    (experiment,) = read_experiments(tmp_path / "e.yaml")
    experiment = replace(experiment, algorithm=Parabola)
    run = tmp_path / "r" / "parabola"

    def go(**options: Any) -> Outcome:
        return run_experiment(experiment, str(tmp_path / "r"), announce=lambda line: None, **options)

    stop = StopSignals()
    assert go(resume=False, stop=stop, on_saved=lambda: stop.on_stop and stop.on_stop()).is_interrupted
    assert len(list(run.glob("Parabola_*"))) < 3  # One has begun, another may be waiting.
    assert not go(resume=True).errors
    told = {}
    for results in run.glob("Parabola_*/result.json"):
        last = json.loads(results.read_text().splitlines()[-1])
        weight, (hidden,) = last["config"]["min_q_weight"], last["config"]["_model_config"]["critic_hiddens"]
        assert last["training_iteration"] == 2
        assert f"_critic_hiddens={hidden},min_q_weight={weight:.4f}_" in results.parent.name
        told[weight] = (weight - 1.5) ** 2
    newest = max(run.glob("searcher-state-*.pkl"))
    study = cloudpickle.loads(newest.read_bytes())["_ot_study"]
    assert {trial.params["min_q_weight"]: trial.value for trial in study.trials} == pytest.approx(told)
    assert len(told) == 3


# --- Loggers ----------------------------------------------------------------------------------------------------------


class Remembers(LoggerCallback):
    """Stands for Ray's callback of a service: knows two options, passes others on."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, project: str | None = None, tags: list[str] | None = None, **kwargs: Any) -> None:
        if tags == ["bad"]:
            raise ValueError("no such tag")
        Remembers.made.append({"project": project, "tags": tags, **kwargs})


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases and MLflow, as if they were installed; what Ray would do with them is remembered."""
    for name in ("wandb", "mlflow"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = lambda project=None, notes=None: None  # type: ignore[attr-defined]
        module.Remembers = Remembers  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    kinds = {
        "wandb": replace(loggers._KINDS["wandb"], callback="wandb:Remembers"),
        "mlflow": replace(loggers._KINDS["mlflow"], callback="mlflow:Remembers"),
    }
    monkeypatch.setattr(loggers, "_KINDS", loggers._KINDS | kinds)
    monkeypatch.delenv("WANDB_PROJECT_NAME", raising=False)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[mlflow]", [("mlflow", {})]),
        ("{mlflow: null}", [("mlflow", {})]),
        ("[mlflow, {wandb: {project: p, notes: n}}]", [("mlflow", {}), ("wandb", {"project": "p", "notes": "n"})]),
        ("{wandb: {project: p}, mlflow: {tags: [a]}}", [("wandb", {"project": "p"}), ("mlflow", {"tags": ["a"]})]),
    ],
)
def test_loggers_get_their_settings(tmp_path: Path, text: str, expected: list[tuple[str, dict[str, Any]]]) -> None:
    experiment = read(tmp_path, f"loggers: {text}")
    assert [(logger.kind, dict(logger.options)) for logger in experiment.loggers] == expected
    Remembers.made.clear()
    for logger in experiment.loggers:
        logger.build()
    assert Remembers.made == [{"project": None, "tags": None} | options for _, options in expected]


@pytest.mark.usefixtures("service")
def test_a_run_has_the_callbacks_of_its_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def tuner(*args: Any, run_config: tune.RunConfig, **kwargs: Any) -> Any:
        given.extend(run_config.callbacks or ())
        raise RuntimeError("enough")

    monkeypatch.setattr(tune, "Tuner", tuner)
    with pytest.raises(RuntimeError, match="enough"):
        run_experiment(read(tmp_path, "loggers: [mlflow]"), str(tmp_path / "r"), resume=False, announce=print)
    assert sum(isinstance(callback, Remembers) for callback in given) == 1


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlflow", r"must list some of wandb, mlflow, comet, aim, .*got 'mlflow'"),
        ("[mlflo]", r"must list some of wandb, mlflow"),
        ("[1]", r"must list some of wandb, mlflow"),
        ("[mlflow, {mlflow: {}}]", r"has `mlflow` twice; drop one"),
        ("[{mlflow: 3}]", r"`mlflow` in `loggers` of experiment 'e' must map its settings to values, got 3"),
        ("[{mlflow: {tag: a}}]", r"`tag` in `mlflow` in `loggers`.*did you mean `tags`"),
        ("[{mlflow: {notes: a}}]", r"`notes` in `mlflow` in `loggers`"),  # Nobody is there to take it.
        ("[{mlflow: {tags: [bad]}}]", r"`mlflow` in `loggers` of experiment 'e': no such tag"),
        ("[wandb]", r"has no `project`; set the one at Weights & Biases"),
        ("[aim]", r"`aim` in `loggers` of experiment 'e' needs the `aim` package: pip install aim"),
    ],
)
def test_a_logger_that_cannot_work_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, f"loggers: {text}")
