"""A policy file gives the actions that environments get from env runners, greedy and sampled, for all spaces."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from policies import ACTIONS, CASES, VECTOR, Case, Trained, assert_same_actions, trained
from scipy import stats

from rllib_calql import load_policy
from rllib_calql.export.writing import WRITERS
from rllib_calql.policy.policy import Policy

Steps = tuple[list[Any], np.ndarray]  # Raw observations that the environment gave, and actions that it got.


class Acted(NamedTuple):
    """A policy, and steps of an env runner that acts by it."""

    policy: Trained
    greedy: Steps
    sampled: Steps


@pytest.fixture(scope="module", params=CASES)
def acted(request: pytest.FixtureRequest) -> Acted:
    """A policy, and what it does in an env runner."""
    made = trained(CASES[request.param])
    number = made.case.num_observations
    greedy, sampled = made.acts(number), made.acts(number, noise=np.random.default_rng(3))
    made.runner.stop()
    return Acted(made, greedy, sampled)


@pytest.fixture(params=[".npz", ".onnx"])
def ending(request: pytest.FixtureRequest) -> str:
    if request.param == ".onnx":
        pytest.importorskip("onnx", reason='pip install ".[test]"')
        pytest.importorskip("onnxruntime", reason='pip install ".[test]"')
    return str(request.param)


def policy_of(made: Trained, folder: Path, ending: str = ".npz") -> Policy:
    file = folder / f"policy{ending}"
    file.write_bytes(WRITERS[ending](made.data))
    return load_policy(file)


def stacked(space: Any, observations: list[Any]) -> Any:
    """A batch of observations, in the structure of one."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: stacked(space[key], [one[key] for one in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(stacked(part, [one[i] for one in observations]) for i, part in enumerate(space.spaces))
    return np.stack(observations)


def test_greedy_actions_are_those_of_env_runners(acted: Acted, ending: str, tmp_path: Path) -> None:
    observations, expected = acted.greedy
    policy, case = policy_of(acted.policy, tmp_path, ending), acted.policy.case
    batch = policy.compute_actions(stacked(case.observations, observations))
    assert_same_actions(batch, expected, case.actions)
    single = np.stack([policy(observation) for observation in observations[::10]])
    assert_same_actions(single, expected[::10], case.actions)
    free = case.actions.low < case.actions.high
    assert (expected.std(axis=0)[free] > 0.0).all()  # The observations matter.


def test_sampled_actions_are_those_of_env_runners_for_the_same_noise(acted: Acted, ending: str, tmp_path: Path) -> None:
    observations, expected = acted.sampled
    policy, case = policy_of(acted.policy, tmp_path, ending), acted.policy.case
    batch = stacked(case.observations, observations)
    found = policy.compute_actions(batch, explore=True, rng=np.random.default_rng(3))
    assert_same_actions(found, expected, case.actions)
    rng = np.random.default_rng(3)
    single = np.stack([policy(observation, explore=True, rng=rng) for observation in observations[:50]])
    assert_same_actions(single, expected[:50], case.actions)


def test_a_model_gives_actions_without_this_package(acted: Acted) -> None:
    pytest.importorskip("onnx", reason='pip install ".[test]"')
    onnxruntime = pytest.importorskip("onnxruntime", reason='pip install ".[test]"')
    session = onnxruntime.InferenceSession(WRITERS[".onnx"](acted.policy.data), providers=["CPUExecutionProvider"])
    assert_acts_as_env_runners(acted, lambda parts: dict(zip(OUTPUTS, session.run(OUTPUTS, parts), strict=True)))


def test_a_program_gives_actions_without_this_package(acted: Acted) -> None:
    # `load_policy` reads the same bytes of a `.pt` as of a `.npz`, see test_torch_program.py.
    program = torch.export.load(io.BytesIO(WRITERS[".pt"](acted.policy.data))).module()

    def outputs(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = program({name: torch.from_numpy(part) for name, part in parts.items()})
        return {name: values.numpy() for name, values in found.items()}

    assert_acts_as_env_runners(acted, outputs)


OUTPUTS = ["action", "mean", "log_std"]


def assert_acts_as_env_runners(acted: Acted, outputs: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """`action` is the greedy one; `mean` and `log_std` give the sampled ones by the formula of the documents."""
    space = acted.policy.case.actions
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    for (observations, expected), explore in ((acted.greedy, False), (acted.sampled, True)):
        batch = stacked(acted.policy.case.observations, observations)
        parts = dict(leaves(batch)) if isinstance(batch, (dict, tuple)) else {"observation": batch}
        found = outputs({("observation/action" if path == "action" else path): part for path, part in parts.items()})
        mean, log_std = (found[name].astype(np.float64) for name in ("mean", "log_std"))
        assert ((log_std >= -20.0) & (log_std <= 2.0)).all()
        noise = np.zeros(expected.shape)
        if explore:
            free = np.flatnonzero(low < high)
            noise[:, free] = np.random.default_rng(3).standard_normal((len(expected), len(free)), np.float32)
        else:
            assert_same_actions(found["action"], expected, space)
        actions = low + (np.tanh(mean + np.exp(log_std) * noise) + 1.0) * (high - low) / 2.0
        assert_same_actions(actions.astype(space.dtype), expected, space)


def leaves(batch: Any, path: str = "") -> Any:
    """Path and array of every part."""
    if isinstance(batch, (dict, tuple)):
        for key, part in batch.items() if isinstance(batch, dict) else enumerate(batch):
            yield from leaves(part, f"{path}/{key}" if path else str(key))
    else:
        yield path, batch


@pytest.fixture(scope="module")
def small() -> Trained:
    made = trained(Case(VECTOR))
    made.runner.stop()
    return made


def test_samples_are_a_squashed_gaussian(small: Trained, tmp_path: Path) -> None:
    # In float64 by the formula of the paper: tanh(mean + std * noise), std = exp(multiplier * output + offset).
    arrays = {name: array.astype(np.float64) for name, array in small.data.arrays.items()}
    observation = np.linspace(-1.0, 1.0, 5).astype(np.float32)
    hidden = observation.astype(np.float64)
    for number in range(2):
        hidden = np.maximum(arrays[f"hidden_{number}.weight"] @ hidden + arrays[f"hidden_{number}.bias"], 0.0)
    mean, raw = np.split(arrays["head.weight"] @ hidden + arrays["head.bias"], 2)
    std = np.exp(np.clip(arrays["log_std_multiplier"] * raw + arrays["log_std_offset"], -20.0, 2.0))
    batch = np.repeat(observation[None], 4000, axis=0)
    sampled = policy_of(small, tmp_path).compute_actions(batch, explore=True, rng=np.random.default_rng(0))
    standard = (np.arctanh(sampled.astype(np.float64)) - mean) / std
    for dimension in range(3):
        inside = standard[:, dimension][np.abs(sampled[:, dimension]) < 1.0]
        assert stats.kstest(inside, stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(standard[:, 0], standard[:, 1])[0, 1]) < 0.05


def test_a_generator_gives_the_same_sample_again_and_others_give_another(small: Trained, tmp_path: Path) -> None:
    policy, observation = policy_of(small, tmp_path), np.ones(5, np.float32)
    one, same, other = (policy(observation, explore=True, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(policy(observation, explore=True), policy(observation, explore=True))
    np.testing.assert_array_equal(policy(observation), policy(observation))
    assert ACTIONS.contains(one)


def test_an_observation_is_not_changed(small: Trained, tmp_path: Path) -> None:
    observation = np.ones(5, np.float32)
    policy_of(small, tmp_path)(observation)
    np.testing.assert_array_equal(observation, np.ones(5, np.float32))


def test_a_batch_of_none_gives_no_action(small: Trained, tmp_path: Path) -> None:
    assert policy_of(small, tmp_path).compute_actions(np.zeros((0, 5), np.float32)).shape == (0, 3)
