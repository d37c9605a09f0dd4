"""`rllib dataset inspect --episode`: numbers beside a plain statement of the networks, pictures and refusals."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.image import imread
from plain_networks import numpy_mlp

from rllib_calql import CalQLConfig
from rllib_calql.commands.main import main

Array = np.ndarray[Any, Any]
GAMMA, SCALE, BIAS = 0.5, 10.0, -5.0


def inspected(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["dataset", "inspect", *arguments])


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An episode that is cut after three steps, one of them by a person, and one that terminates after two."""
    rows = {
        "eps_id": ["cut"] * 3 + ["done"] * 2,
        "obs": [[0.0, 1.0], [1.0, 3.0], [2.5, -1.0], [4.0, 0.5], [-1.0, 2.0]],
        "new_obs": [[1.0, 3.0], [2.5, -1.0], [3.0, 0.0], [-1.0, 2.0], [0.0, 0.0]],
        "actions": [[1.0], [-3.0], [0.5], [2.0], [-1.0]],
        "executed_actions": [[1.0], [-2.0], [0.5], [2.0], [-1.0]],
        "is_intervention": [0, 1, 0, 0, 0],
        "rewards": [-1.0, 0.0, 2.0, 1.0, 1.0],
        "terminateds": [False] * 4 + [True],
        "truncateds": [False, False, True, False, False],
    }
    file = tmp_path_factory.mktemp("logs") / "logs.parquet"
    pq.write_table(pa.table(rows), file)
    return str(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, logs: str, ray_session: None) -> str:
    """Of networks whose every parameter is random, the targets' own included."""
    config = CalQLConfig().environment(
        observation_space=gym.spaces.Box(-10.0, 10.0, (2,), np.float32),
        action_space=gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
    )
    config.offline_data(input_=logs, reward_scale=SCALE, reward_bias=BIAS, truncation="bootstrap")
    config.training(gamma=GAMMA, num_critics=3, reference_value="learned", reference_updates=1)
    config.rl_module(model_config={"actor_hiddens": [6, 5], "critic_hiddens": [7, 4]}).fine_tuning(offline_updates=1)
    config.offline_data(normalize_observations=True)
    algo = config.build()
    module = algo.learner_group._learner.module["default_policy"]
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    folder = str(tmp_path_factory.mktemp("checkpoints") / "checkpoint")
    algo.save_to_path(folder)
    algo.stop()
    return folder


def weights_in(checkpoint: str) -> dict[str, Array]:
    import pickle

    file = Path(checkpoint, "learner_group/learner/rl_module/default_policy/module_state.pkl")
    return {name: np.asarray(value, np.float64) for name, value in pickle.loads(file.read_bytes()).items()}


def q_of(weights: dict[str, Array], critic: str, c: int, obs: Array, actions: Array) -> Array:
    """Critic c as one MLP on the concatenation (s, a), in double precision."""
    first = np.concatenate([weights[f"{critic}.obs_weight"][c], weights[f"{critic}.action_weight"][c]])
    layers = [first, *(weights[f"{critic}.weights.{i}"][c] for i in range(2))]
    biases = [weights[f"{critic}.biases.{i}"][c] for i in range(3)]
    return numpy_mlp(np.concatenate([obs, actions], axis=1), layers, biases, "relu")[:, 0]


def linear(weights: dict[str, Array], network: str, obs: Array) -> Array:
    layers = [f"{network}.layers.0", f"{network}.layers.1", f"{network}.head"]
    return numpy_mlp(
        obs, [weights[f"{name}.weight"].T for name in layers], [weights[f"{name}.bias"] for name in layers], "relu"
    )


def test_values_and_returns_are_those_of_plain_numpy(logs: str, checkpoint: str) -> None:
    result = inspected(logs, "--episode", "cut", "--checkpoint", checkpoint, "--json", "--no-plot")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    weights = weights_in(checkpoint)
    obs = np.array([[0.0, 1.0], [1.0, 3.0], [2.5, -1.0], [3.0, 0.0]])  # The last one after the last step.
    assert not np.allclose(weights["obs_std"], 1.0, atol=0.1)
    z = (obs - weights["obs_mean"]) / weights["obs_std"]
    actions = np.array([[0.5], [-0.99999], [0.25]])  # Bounds are +-2; a person chose -2 in place of -3.
    q = [q_of(weights, "critic", c, z[:3], actions) for c in range(3)]
    np.testing.assert_allclose(content["q"], q, rtol=1e-4, atol=1e-4)
    greedy = np.tanh(linear(weights, "policy", z)[:, :1])
    value = np.min([q_of(weights, "target_critic", c, z, greedy) for c in range(3)], axis=0)
    np.testing.assert_allclose(content["value"], value[:3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(content["reference"], linear(weights, "reference", z[:3])[:, 0], rtol=1e-4, atol=1e-4)
    # 10 r - 5 is -15, -5, 15.
    last = 15.0 + GAMMA * value[3]
    returns = [-15.0 + GAMMA * (-5.0 + GAMMA * last), -5.0 + GAMMA * last, last]
    np.testing.assert_allclose(content["returns_to_go"], returns, rtol=1e-4, atol=1e-4)
    assert (content["rewards"], content["is_intervention"]) == ([-1.0, 0.0, 2.0], [False, True, False])
    assert not np.allclose(q[0], q[1], rtol=0.1)


def test_a_terminated_episode_has_no_future(logs: str, checkpoint: str) -> None:
    result = inspected(logs, "--episode", "1", "--checkpoint", checkpoint, "--json", "--no-plot")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["id"], content["terminated"], content["returns_to_go"]) == ("done", True, [5.0 + GAMMA * 5.0, 5.0])


def test_without_a_checkpoint_returns_are_of_environment_rewards(logs: str) -> None:
    result = inspected(logs, "--episode", "cut", "--json", "--no-plot", "--gamma", "0.5")
    content = json.loads(result.stdout)
    assert content["returns_to_go"] == [-0.5, 1.0, 2.0]
    assert "q" not in content
    usual = json.loads(inspected(logs, "--episode", "cut", "--json", "--no-plot").stdout)
    np.testing.assert_allclose(usual["returns_to_go"], [-1.0 + 0.99**2 * 2.0, 0.99 * 2.0, 2.0], rtol=1e-6)


def test_the_text_and_the_page_say_units_and_stand_alone(logs: str, checkpoint: str, tmp_path: Path) -> None:
    result = inspected(logs, "--episode", "cut", "--checkpoint", checkpoint, "--output", "cut.html")
    assert result.exit_code == 0, result.output
    assert (result.stderr, list(tmp_path.glob("*.png"))) == ("Wrote cut.html\n", [])
    assert "discounted by 0.5 (training rewards: 10 * reward - 5)" in result.stdout
    assert "steps          3, cut (truncated)" in result.stdout
    assert "interventions  a person acted in 1 steps" in result.stdout
    page = (tmp_path / "cut.html").read_text()
    assert "<h1>Episode cut</h1>" in page
    assert "mean of 3 critics at the data&#x27;s action" in page
    assert not re.search(r"https?:|<script|<link", page)
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    pixels = imread(io.BytesIO(base64.b64decode(picture)))
    # Blue, vermilion and green of Q, V and the reference value.
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        assert (np.abs(pixels[..., :3] * 255 - colour) < 2).all(axis=-1).sum() > 20


def write_many(file: Path, *, size: int, steps: int, images: bool = False) -> None:
    rng = np.random.default_rng(0)
    observations: dict[str, Any] = {"observations": rng.normal(size=(steps, size)).cumsum(axis=0)}
    if images:
        observations = {"observations": rng.integers(0, 255, (steps, 16, 16, 3), np.uint8)}
    ends = np.arange(steps) == steps - 1
    rest = {"actions": rng.normal(size=(steps, size)), "rewards": rng.normal(size=steps), "terminals": ends}
    np.savez(file, **observations, **rest, timeouts=~ends & False)


@pytest.mark.parametrize(
    ("size", "steps", "images"), [(1, 1, False), (30, 40, False), (3, 20_000, False), (2, 12, True)]
)
def test_short_and_long_episodes_and_those_of_many_numbers_or_images_are_drawn(
    tmp_path: Path, size: int, steps: int, images: bool
) -> None:
    write_many(tmp_path / "rows.npz", size=size, steps=steps, images=images)
    result = inspected("rows.npz", "--episode", "0", "--plot", "episode.png")
    assert result.exit_code == 0, result.output
    pixels = imread(tmp_path / "episode.png")
    assert 0.05 < (pixels[..., :3] < 0.99).any(axis=-1).mean() < 0.9
    assert 400 < pixels.shape[0] < 2500


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("--checkpoint", "run"), 2, "`--checkpoint` is about one episode; name it with `--episode`"),
        (("--gamma", "0.9"), 2, "`--gamma` is about one episode"),
        (("--dimensions", "0"), 2, "`--dimensions` is about one episode"),
        (("--episode", "cut", "--gamma", "1.5"), 2, "1.5 is not in the range 0<=x<=1"),
        (("--episode", "cut", "--dimensions", "a"), 2, "`--dimensions` must be numbers from 0, such as 0,3-5"),
        (
            ("--episode", "cut", "--dimensions", "0-2"),
            1,
            "names the number 2 of the observations, which have 2 numbers",
        ),
        (
            ("--episode", "cut", "--checkpoint", "run", "--gamma", "0.9"),
            2,
            "are those of the `--checkpoint`; drop them",
        ),
        (("--episode", "cut", "--checkpoint", "run"), 2, "'run' does not exist"),
        (("--episode", "cut", "--env", "Pendulum-v1"), 2, "`--env` compares all data with an environment"),
        (("--episode", "cut", "--plot", "cut.pdf"), 2, "`--plot` must name a .png or .html file, got 'cut.pdf'"),
        (("--episode", "cut", "--plot", "nowhere/cut.png"), 2, "the folder of 'nowhere/cut.png' does not exist"),
        (("--episode", "cat"), 1, "There is no episode 'cat' in"),
        (("--env-config", "{}"), 2, "`--env-config` is that of an environment; name it with `--env`"),
    ],
)
def test_wrong_usage_is_told(logs: str, arguments: tuple[str, ...], exit_code: int, message: str) -> None:
    result = inspected(logs, *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in " ".join(result.stderr.split())


def test_a_checkpoint_of_other_spaces_is_told(checkpoint: str, tmp_path: Path) -> None:
    write_many(tmp_path / "rows.npz", size=3, steps=4)
    result = inspected("rows.npz", "--episode", "0", "--checkpoint", checkpoint)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "observations have 3 numbers, the environment's have 2" in " ".join(result.stderr.split())
