"""An environment that one process knows: in env runners, in trials of Ray Tune, and for whoever opens a checkpoint."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from gymnasium.envs.registration import registry
from ray.tune.registry import ENV_CREATOR, _global_registry, register_env
from tiny import LineEnv

from rllib_calql import CalQLConfig
from rllib_calql.environments.sharing import import_folders, shared_env

SCRIPT = """
import gymnasium as gym
import numpy as np

class TankEnv(gym.Env):
    observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)

    def __init__(self, level=0.5):
        self.level = level

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.full(2, self.level, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(2, self.level, np.float32), 1.0, False, self.t >= 5, {}

gym.register(id="Tank-v0", entry_point=%s, kwargs={"level": 0.25}, max_episode_steps=4)
"""
TINY = "num_actions=1, train_batch_size_per_learner=4"


def run_script(tmp_path: Path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("entry_point", ["TankEnv", "'__main__:TankEnv'", "lambda **kwargs: TankEnv(**kwargs)"])
def test_an_id_registered_by_a_script_goes_with_the_pickled_config(tmp_path: Path, entry_point: str) -> None:
    run_script(
        tmp_path,
        SCRIPT % entry_point
        + "from ray import cloudpickle\n"
        + "from rllib_calql import CalQLConfig\n"
        + "config = CalQLConfig().environment('Tank-v0', env_config={'level': 0.75})\n"
        + "open('config.pkl', 'wb').write(cloudpickle.dumps([config.copy(), config.get_state()]))\n",
    )
    assert "Tank-v0" not in registry
    try:
        config, state = pickle.loads((tmp_path / "config.pkl").read_bytes())
        spec = registry.pop("Tank-v0")
        env = spec.make(**config.env_config)
        assert (env.unwrapped.level, env.spec.max_episode_steps) == (0.75, 4)
        # A checkpoint holds the state, and the next copy of what came from there goes on holding it.
        CalQLConfig.from_state(state)
        assert registry["Tank-v0"].kwargs == {"level": 0.25}
    finally:
        registry.pop("Tank-v0", None)


def test_a_name_of_ray_goes_with_the_state_of_the_config() -> None:
    register_env("line-of-ray", lambda config: LineEnv(config))
    state = pickle.loads(pickle.dumps(CalQLConfig().environment("line-of-ray").get_state()))
    _global_registry.unregister(ENV_CREATOR, "line-of-ray")
    try:
        CalQLConfig.from_state(state)
        assert isinstance(_global_registry.get(ENV_CREATOR, "line-of-ray")({}), LineEnv)
    finally:
        _global_registry.unregister(ENV_CREATOR, "line-of-ray")


def test_what_every_process_knows_is_not_shipped() -> None:
    assert [shared_env(env) for env in ("Pendulum-v1", "tiny:LineEnv", "nobody's", LineEnv, None)] == [None] * 5


def test_a_class_that_is_gone_is_told_when_the_environment_is_made_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "gone.py").write_text(SCRIPT % "'gone:TankEnv'" + "gym.register('Gone-v0', TankEnv)\n")
    run_script(
        tmp_path,
        "import gone\nfrom ray import cloudpickle\nfrom rllib_calql import CalQLConfig\n"
        "open('state.pkl', 'wb').write(cloudpickle.dumps(CalQLConfig().environment('Gone-v0').get_state()))\n",
    )
    try:
        CalQLConfig.from_state(pickle.loads((tmp_path / "state.pkl").read_bytes()))
        with pytest.raises(ImportError, match=r"'Gone-v0' needs what cannot be imported.*No module named 'gone'"):
            registry["Gone-v0"].make()
    finally:
        registry.pop("Gone-v0", None)


def test_the_folder_of_a_module_is_known_and_installed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_plant").mkdir()
    (tmp_path / "own_plant" / "__init__.py").write_text("")
    (tmp_path / "own_plant" / "tanks.py").write_text("from tiny import LineEnv\nclass Tank(LineEnv):\n    pass\n")
    assert import_folders("own_plant.tanks:Tank") == [str(tmp_path)]
    assert import_folders(LineEnv) == [str(Path(sys.modules["tiny"].__file__ or "").parent)]
    assert import_folders("Pendulum-v1") == import_folders("no such thing") == []


@pytest.mark.slow
def test_tune_and_remote_env_runners_know_what_the_script_registered(tmp_path: Path) -> None:
    # A plain dictionary, which carries no registration: trials get it from the driver, env runners from the trial.
    output = run_script(
        tmp_path,
        SCRIPT % "TankEnv"
        + f"""
if __name__ == "__main__":
    import ray
    from ray import tune
    import rllib_calql

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    space = dict(env="Tank-v0", num_env_runners=1, warmup_env_steps=0, seed=0, updates_per_env_step=0.25,
                 {TINY})
    run = tune.RunConfig(stop={{"training_iteration": 1}}, storage_path="{tmp_path}", verbose=0)
    (result,) = tune.Tuner("CalQL", param_space=space, run_config=run).fit()
    assert result.error is None, result.error
    print("return", result.metrics["env_runners"]["episode_return_mean"])
""",
    )
    assert "return 4.0" in output  # Four steps of reward 1: the time limit of the registration holds.
