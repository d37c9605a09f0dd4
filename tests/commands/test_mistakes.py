"""Wrong usage, one row for each mistake: the message says what is wrong and what to do, without starting Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from click.testing import CliRunner
from pendulum_data import two_episodes, write

from rllib_calql import CalQLConfig
from rllib_calql.commands.main import main

LONGEST_MESSAGE = 700  # Characters: a message is read, a traceback is not.


class Mistake(NamedTuple):
    """What somebody gives, and the words that the message must have.

    Attributes:
        given: Lines of the experiment `e` that differ from the right ones, or a whole file.
        says: Words of the message.
        options: What follows `rllib train file FILE`.
    """

    given: dict[str, Any] | str
    says: tuple[str, ...]
    options: tuple[str, ...] = ()


def config(**settings: Any) -> dict[str, Any]:
    return {"config": {"input_": "DATA", "offline_updates": 2} | settings}


RIGHT = {"run": "CalQL", "env": "Pendulum-v1", "stop": {"training_iteration": 1}} | config()

IN_A_FILE = {
    # --- The budget
    "a misspelt metric of `stop`": Mistake({"stop": {"num_online_steps": 300}}, ("`num_online_steps`", "did you mean")),
    "a metric of RLlib's former results": Mistake({"stop": {"timesteps_total": 300}}, ("`timesteps_total`", "`stop`")),
    "no bound of the interaction": Mistake(
        {"stop": None}, ("no end", "`stop: {num_online_env_steps_lifetime:", "`stop: {}`")
    ),
    "a bound of the score alone": Mistake(
        {"stop": {"evaluation/env_runners/episode_return_mean": -100}} | config(evaluation_interval=1),
        ("which may never come", "`stop: {num_online_env_steps_lifetime:"),
    ),
    "a path that no result has": Mistake(
        {"stop": {"training_iteration": 1, "evaluation/episode_return_mean": -100}} | config(evaluation_interval=1),
        ("`evaluation/episode_return_mean`", "evaluation/env_runners/episode_return_mean"),
    ),
    "a bound that is no number": Mistake({"stop": {"training_iteration": "five"}}, ("`training_iteration`", "'five'")),
    "`stop` without a metric": Mistake({"stop": 300}, ("`stop`", "300", "metrics")),
    "a budget of no steps": Mistake(config(max_online_env_steps=0), ("`max_online_env_steps`", "0", "positive")),
    "`stop` in the wrong place": Mistake(config(stop={"training_iteration": 1}), ("`stop`", "beside `config`")),
    # --- The file
    "a misspelt key": Mistake({"stpo": {"training_iteration": 1}}, ("`stpo`", "`stop`")),
    "a misspelt setting": Mistake(config(min_q_wieght=5.0), ("`min_q_wieght`", "`min_q_weight`")),
    "an unknown algorithm": Mistake({"run": "CalQl"}, ("'CalQl'", "CalQL")),
    "no algorithm": Mistake({"run": None}, ("algorithm", "CalQL")),
    "a file that is no YAML": Mistake("e: [", ("not valid YAML",)),
    "an empty file": Mistake("", ("must map experiment names",)),
    "a key twice": Mistake("e: {run: CalQL, run: SAC}", ("'run' is there twice",)),
    # --- Settings
    "a setting out of its range": Mistake(config(mixing_ratio=1.5), ("`mixing_ratio`", "[0, 1]", "1.5")),
    "a number as a word": Mistake(config(actor_lr="small"), ("`actor_lr`", "'small'", "number")),
    "a setting that does nothing here": Mistake(config(lr=1e-3), ("`lr`", "actor_lr")),
    "two settings that contradict": Mistake(config(lagrangian_thresh=3.0), ("`lagrangian_thresh`", "lagrangian=True")),
    # --- The online side
    "a schedule that begins late": Mistake(
        config(mixing_ratio=[[10, 0.5], [20, 0.1]]), ("`mixing_ratio`", "start at 0 env steps, not at 10")
    ),
    "a schedule that goes back": Mistake(
        config(min_q_weight_online=[[0, 1.0], [20, 0.5], [10, 0.1]]),
        ("`min_q_weight_online`", "must not fall back", "10 comes after 20"),
    ),
    "a schedule that leaves its range": Mistake(
        config(mixing_ratio=[[0, 0.5], [20, 1.5]]), ("`mixing_ratio`", "at most 1")
    ),
    "a schedule of words": Mistake(config(bc_weight=[[0, "much"], [9, 0]]), ("`bc_weight`", "pairs", "numbers")),
    "more critics in the target than there are": Mistake(
        config(critic_subset=3), ("`critic_subset`", "`num_critics`, 2", "got 3")
    ),
    "an unknown way to judge actions": Mistake(config(actor_q="max"), ("`actor_q`", "'mean'", "'max'")),
    "no step in a target": Mistake(config(n_step=0), ("`n_step`", "positive integer", "0")),
    "more steps in a target than an episode has": Mistake(
        config(n_step=20_000), ("`n_step`", "`max_episode_env_steps`", "20000")
    ),
    "imitation without data": Mistake({"config": {"bc_weight": 1.0}}, ("`bc_weight`", "no offline data", "`.offline_")),
    "a weight of a term that is off": Mistake(
        config(conservative_online=False, min_q_weight_online=1.0), ("`min_q_weight_online`", "`conservative_online`")
    ),
    "a metric that fine-tuning does not have": Mistake(
        {"stop": {"training_iteration": 9, "learners/default_policy/cql_loss": 3.0}}
        | config(conservative_online=False),
        ("`learners/default_policy/cql_loss`", "no conservative term", "`conservative_online: true`"),
    ),
    # --- Data and phases
    "data without a number of updates": Mistake(
        {"config": {"input_": "DATA"}}, ("`offline_updates`", "`input_`", "fine_tuning")
    ),
    "updates without data": Mistake({"config": {"offline_updates": 9}}, ("`offline_updates`", "`input_`")),
    "a value of a grid out of its range": Mistake(
        config(min_q_weight={"grid_search": [1.0, -1.0]}), ("`min_q_weight`", "-1.0")
    ),
    "an empty grid": Mistake(config(min_q_weight={"grid_search": []}), ("`min_q_weight`", "grid_search")),
    "no sample": Mistake({"num_samples": 0}, ("`num_samples`", ">= 1", "0")),
    "a scheduler that there is not": Mistake({"scheduler": {"type": "phb"}}, ("scheduler", "'phb'", "pbt")),
    "a misspelt key of the checkpoints": Mistake(
        {"checkpoint_config": {"checkpoint_freq": 1}}, ("`checkpoint_freq`", "`checkpoint_frequency`")
    ),
    "an unknown rule of success": Mistake(
        config(evaluation_interval=1, success_key="on_setpoint", success_rule="all"),
        ("`success_rule`", "'all'", "any", "last", "fraction"),
    ),
    "a clip that clips all": Mistake(
        config(normalize_observations=True, observation_clip=0.0), ("`observation_clip`", "0.0", "positive")
    ),
    # --- The environment
    "an unknown environment": Mistake({"env": "Pendulumm-v1"}, ("'Pendulumm-v1'", "'Pendulum-v1'", "'MODULE:ID'")),
    "an environment of no module": Mistake({"env": "my_tank:Tank-v0"}, ("my_tank", "env")),
    "a class that its module has not": Mistake(
        {"env": "gymnasium.envs.classic_control:PendulumEnvv"}, ("PendulumEnvv", "PendulumEnv")
    ),
    "a class that is no environment": Mistake({"env": "pathlib:Path"}, ("pathlib", "Path", "gymnasium.Env")),
    "an old version of an environment": Mistake({"env": "Pendulum-v0"}, ("Pendulum-v0", "Pendulum-v1")),
    # --- The data
    "data that are not there": Mistake(config(input_="DIR/tank.h5"), ("`input_`", "tank.h5", "no such file")),
    "Minari data that are not there": Mistake(
        config(input_="minari:tank/logs-v0"), ("'tank/logs-v0'", "`rllib dataset list`", "minari download")
    ),
    "data of an unknown kind": Mistake(config(input_="DIR/e.yaml"), ("e.yaml",)),
    # --- Resources
    "a GPU that there is not": Mistake(config(num_gpus_per_learner=1), ("GPU", "num_gpus_per_learner")),
    "a resource that there is not": Mistake(
        config(num_env_runners=1, custom_resources_per_env_runner={"robot": 1}), ("robot", "custom_resources")
    ),
    "fewer CPUs than workers": Mistake(config(num_env_runners=3), ("`--num-cpus`", "4", "2"), ("--num-cpus", "2")),
    # --- Options
    "networks to begin with that are not there": Mistake(
        config(pretrained="DIR/none"), ("`pretrained`", "no such folder")
    ),
    "a best checkpoint of nothing": Mistake({"keep_best": True}, ("`keep_best`", "`evaluation_interval`")),
    "a time that is no time": Mistake({"checkpoint_every_s": "often"}, ("`checkpoint_every_s`", "seconds", "'often'")),
    "a metric that only evaluations have": Mistake(
        {"stop": {"training_iteration": 9, "evaluation/env_runners/episode_return_mean": 0}},
        ("evaluation/env_runners/episode_return_mean", "`evaluation_interval`"),
    ),
    "a budget that the warm-up takes": Mistake(
        config(max_online_env_steps=50, warmup_env_steps=50), ("`max_online_env_steps`", "warm-up", "50")
    ),
    "resuming what never ran": Mistake({}, ("nothing to resume", "`--name`", "`--storage-path`"), ("--resume",)),
    "resuming and overwriting": Mistake({}, ("`--resume`", "`--overwrite`", "drop one"), ("--resume", "--overwrite")),
    "a name that is a path": Mistake({}, ("`--name`", "a/b"), ("--name", "a/b")),
    "a cluster at an address without one": Mistake({}, ("127.0.0.1:1", "cluster"), ("--address", "127.0.0.1:1")),
    "a size beside an address": Mistake({}, ("`--num-cpus`", "`--address`"), ("--num-cpus", "2", "--address", "x:1")),
}


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray costs 10 s, and what is wrong can be seen before."""

    def start(*_: Any, address: str | None = None, **__: Any) -> None:
        if address == "127.0.0.1:1":
            raise ConnectionError("nobody listens")
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "data.parquet", two_episodes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    # The tests' own Ray writes in between when it hears that a worker of an earlier test has ended.
    lines = [line for line in result.output.splitlines() if "(raylet)" not in line]
    return result.exit_code, " ".join(" ".join(lines).split())


def with_folder(value: Any, folder: Path) -> Any:
    text = json.dumps(value)
    return json.loads(text.replace('"DATA"', json.dumps(str(folder / "data.parquet"))).replace("DIR", str(folder)))


@pytest.mark.parametrize("name", IN_A_FILE)
def test_a_mistake_in_an_experiment_is_named_before_ray_starts(name: str, folder: Path) -> None:
    given, says, options = IN_A_FILE[name]
    if not isinstance(given, str):
        experiment = {key: value for key, value in (RIGHT | given).items() if value is not None}
        given = json.dumps({"e": with_folder(experiment, folder)})
    (folder / "e.yaml").write_text(given)

    code, message = outcome("train", "file", "e.yaml", "--storage-path", str(folder / "runs"), *options)

    assert code == 2
    assert [word for word in says if word not in message] == [], message
    assert "Traceback" not in message
    assert len(message) <= LONGEST_MESSAGE, message


IN_A_COMMAND: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a command that there is not": (["trian", "file", "e.yaml"], ("No such command", "trian")),
    "a file that there is not": (["train", "file", "missing.yaml"], ("missing.yaml", "does not exist", ".yaml or .py")),
    "a folder for a file": (["train", "file", "."], ("is a folder", ".yaml or .py")),
    "evaluating what there is not": (["evaluate", "missing"], ("'missing' does not exist", "run", "checkpoint")),
    "evaluating another folder": (["evaluate", "."], ("not a checkpoint", "run", "trial")),
    "the best of another folder": (["evaluate", ".", "--best"], ("not a checkpoint", "run", "trial")),
    "a report on what there is not": (["report", "missing"], ("missing", "rllib study", "rllib train")),
    "a report on another folder": (["report", "."], ("'.'", "rllib study", "rllib train")),
    "inspecting what there is not": (["dataset", "inspect", "missing.h5", "--no-plot"], ("missing.h5", "no such file")),
    "inspecting Minari data that there are not": (
        ["dataset", "inspect", "minari:tank/logs-v0", "--no-plot"],
        ("tank/logs-v0", "`rllib dataset list`"),
    ),
    "comparing with an unknown environment": (
        ["dataset", "inspect", "data.parquet", "--no-plot", "--env", "Pendulumm-v1"],
        ("Pendulumm-v1", "Pendulum-v1"),
    ),
    "episodes without an end": (
        ["dataset", "inspect", "endless.parquet", "--no-plot"],
        ("neither terminated nor truncated", "unfinished"),
    ),
    "no number": (["dataset", "inspect", "nan.parquet", "--no-plot"], ("rewards", "nan.parquet")),
    "no column of actions": (["dataset", "inspect", "no_actions.parquet", "--no-plot"], ("actions", "no_actions")),
}


@pytest.mark.parametrize("name", IN_A_COMMAND)
def test_a_mistake_in_a_command_is_named_before_ray_starts(name: str, folder: Path) -> None:
    rows = two_episodes()
    write(folder / "endless.parquet", rows | {key: [False] * len(rows["obs"]) for key in ("terminateds", "truncateds")})
    write(folder / "nan.parquet", rows | {"rewards": [float("nan"), *rows["rewards"][1:]]})
    write(folder / "no_actions.parquet", {key: values for key, values in rows.items() if key != "actions"})
    arguments, says = IN_A_COMMAND[name]

    code, message = outcome(*arguments)

    assert code in (1, 2)
    assert [word for word in says if word not in message] == [], message
    assert "Traceback" not in message
    assert len(message) <= LONGEST_MESSAGE, message


def offline(**settings: Any) -> CalQLConfig:
    return CalQLConfig().environment("Pendulum-v1").offline_data(input_="data.parquet", **settings)


IN_PYTHON: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a misspelt setting": (
        lambda: CalQLConfig().training(min_q_wieght=5.0),  # type: ignore[call-arg]
        TypeError,
        ("`min_q_wieght`", "`min_q_weight`"),
    ),
    "a setting of another method": (
        lambda: CalQLConfig().fine_tuning(min_q_weight=5.0),  # type: ignore[call-arg]
        TypeError,
        ("`min_q_weight`", "`.training("),
    ),
    "a misspelt key of a dictionary": (
        lambda: CalQLConfig().update_from_dict({"min_q_wieght": 5.0}),
        Exception,
        ("`min_q_wieght`", "`min_q_weight`"),
    ),
    "a setting out of its range": (
        lambda: CalQLConfig().training(tau=0.0).validate(),
        ValueError,
        ("`tau`", "positive", "0.0"),
    ),
    "data without a number of updates": (lambda: offline().validate(), ValueError, ("`offline_updates`", "`input_`")),
    "an unknown environment": (
        lambda: CalQLConfig().environment("Pendulumm-v1").build(),
        Exception,
        ("'Pendulumm-v1'", "'Pendulum-v1'", "'MODULE:ID'"),
    ),
    "data that are not there": (
        lambda: (
            CalQLConfig()
            .environment("Pendulum-v1")
            .offline_data(input_="missing.h5")
            .fine_tuning(offline_updates=2)
            .build()
        ),
        FileNotFoundError,
        ("missing.h5", "no such file"),
    ),
    "a GPU that there is not": (
        lambda: offline().fine_tuning(offline_updates=2).learners(num_gpus_per_learner=1).build(),
        ValueError,
        ("GPU", "num_gpus_per_learner"),
    ),
    "neither data nor an environment": (lambda: CalQLConfig().build(), ValueError, ("environment", "input_")),
    "a checkpoint that there is not": (
        lambda: offline().fine_tuning(offline_updates=2, pretrained="missing").build(),
        Exception,
        ("`pretrained`", "missing"),
    ),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_a_mistake_in_python_is_named_before_ray_starts(name: str, folder: Path) -> None:
    do, kind, says = IN_PYTHON[name]
    with pytest.raises(kind) as caught:
        do()
    message = " ".join(str(caught.value).split())
    assert [word for word in says if word not in message] == [], message
    assert len(message) <= LONGEST_MESSAGE, message


def test_the_table_has_at_least_forty_mistakes() -> None:
    assert len(IN_A_FILE) + len(IN_A_COMMAND) + len(IN_PYTHON) >= 40
